#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use super::*;

/// A key that is right in its form.
fn pem(curve: u8) -> String {
    let mut der = P256.to_vec();
    der[22] = curve;
    der.push(4);
    der.extend([1; POINT_BYTES - 1]);
    let base64 = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN PUBLIC KEY-----\n{base64}\n-----END PUBLIC KEY-----\n")
}

fn toml(body: &str) -> Result<Policy, String> {
    Policy::parse(body)
}

#[test]
fn the_longest_prefix_decides() {
    let text = format!(
        "default = \"reject\"\n[[images]]\nprefix = \"docker.io\"\npolicy = \"accept\"\n\
         [[images]]\nprefix = \"docker.io/library/app\"\npolicy = \"signed\"\nkeys = ['''{}''']\n\
         [[images]]\nprefix = \"docker.io/library\"\npolicy = \"reject\"\n",
        pem(7)
    );
    let policy = toml(&text).unwrap();
    let rule = |name: &str| policy.rule(&Reference::parse(name).unwrap()).clone();
    assert!(matches!(rule("app:1"), Rule::Signed(keys) if keys.len() == 1));
    assert!(matches!(rule("docker.io/library/app/part"), Rule::Signed(_)));
    assert!(matches!(rule("apple"), Rule::Reject), "a prefix ends where a name does");
    assert!(matches!(rule("someone/app"), Rule::Accept));
    assert!(matches!(rule("registry.example/app"), Rule::Reject));
}

#[test]
fn mistakes_of_a_policy_are_named() {
    let keys = |pem: &str| format!("default = \"signed\"\nkeys = ['''{pem}''']");
    assert!(toml(&keys(&pem(7))).is_ok());
    for (text, word) in [
        ("", "default"),
        ("default = \"perhaps\"", "perhaps"),
        ("default = \"signed\"", "no keys"),
        ("defualt = \"accept\"", "defualt"),
        ("default = \"accept\"\nkeys = [\"x\"]", "not \"signed\""),
        ("default = \"accept\"\n[[images]]\nprefix = \"a/\"\npolicy = \"accept\"", "prefix"),
        (&keys("nonsense"), "P-256"),
        (&keys(&pem(34)), "another kind"),
    ] {
        let error = toml(text).unwrap_err();
        assert!(error.contains(word), "{text}: {error}");
    }
    assert!(matches!(Policy::load(Path::new("/nonexistent")), Err(Error::Read(..))));
}
