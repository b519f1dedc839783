//! A token server as docker-registry expects one (distribution's "Token Authentication Specification"): signs with openssl(1).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

const SERVICE: &str = "test-registry";
/// What the server accepts.
pub(crate) const USER: &str = "user";
pub(crate) const PASSWORD: &str = "pass:word";
pub(crate) const IDENTITY: &str = "an identity token";

/// Listens until the process ends.
pub(crate) struct TokenServer {
    address: String,
    certificate: PathBuf,
}

/// Runs openssl(1); its output.
pub(crate) fn openssl(args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("openssl")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl starts: install Debian's package openssl");
    child.stdin.take().expect("its input").write_all(input).expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "openssl {args:?}");
    output.stdout
}

/// A self-signed certificate for 127.0.0.1 in `cert.pem`, and its key in `key.pem`.
pub(crate) fn certificate(dir: &Path) {
    let file = |name: &str| dir.join(name).display().to_string();
    let (key, cert) = (file("key.pem"), file("cert.pem"));
    let args = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ];
    openssl(&[&args[..], &["-keyout", &key, "-out", &cert]].concat(), b"");
}

impl TokenServer {
    pub(crate) fn start(dir: &Path) -> Self {
        certificate(dir);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let der = openssl(&["x509", "-in", &dir.join("cert.pem").display().to_string(), "-outform", "DER"], b"");
        let signer = Arc::new(Signer { key: dir.join("key.pem"), certificate: STANDARD.encode(der) });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let signer = Arc::clone(&signer);
                std::thread::spawn(move || signer.serve(stream));
            }
        });
        Self { address, certificate: dir.join("cert.pem") }
    }

    /// The registry's `auth` section.
    pub(crate) fn auth(&self) -> String {
        let (address, certificate) = (&self.address, self.certificate.display());
        format!(
            "  token: {{realm: \"http://{address}/token\", service: {SERVICE}, issuer: test, rootcertbundle: {certificate}}}"
        )
    }

    /// A token for anything, to push with.
    pub(crate) fn push_token(&self, repository: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("connected");
        let basic = STANDARD.encode(format!("{USER}:{PASSWORD}"));
        write!(
            stream,
            "GET /token?scope=repository:{repository}:pull,push HTTP/1.1\r\nauthorization: Basic {basic}\r\n\r\n"
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let body: serde_json::Value =
            serde_json::from_str(answer.split("\r\n\r\n").nth(1).expect("a body")).expect("JSON");
        body["token"].as_str().expect("a token").to_owned()
    }
}

struct Signer {
    key: PathBuf,
    /// Base64 of its DER form.
    certificate: String,
}

impl Signer {
    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let (mut first, mut basic, mut length) = (String::new(), None, 0);
        reader.read_line(&mut first).ok()?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            match line.trim().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                    basic = value.strip_prefix("Basic ").map(str::to_owned);
                }
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.parse().ok()?,
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let post = first.starts_with("POST");
        let query =
            if post { String::from_utf8(body).ok()? } else { first.split(' ').nth(1)?.split_once('?')?.1.to_owned() };
        let query: Vec<_> =
            reqwest::Url::parse(&format!("http://x/?{query}")).ok()?.query_pairs().into_owned().collect();
        let param = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let good = if post {
            param("grant_type") == Some("refresh_token") && param("refresh_token") == Some(IDENTITY)
        } else {
            basic.is_none_or(|basic| basic == STANDARD.encode(format!("{USER}:{PASSWORD}")))
        };
        let answer = match (good, param("scope")) {
            (true, Some(scope)) => {
                let name = if post { "access_token" } else { "token" };
                format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", serde_json::json!({name: self.token(scope)?}))
            }
            _ => "HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n".to_owned(),
        };
        stream.write_all(answer.as_bytes()).ok()
    }

    fn token(&self, scope: &str) -> Option<String> {
        let mut parts = scope.splitn(3, ':');
        let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = encode(serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]}));
        let claims = encode(serde_json::json!({
            "iss": "test", "sub": USER, "aud": SERVICE, "iat": now, "nbf": now - 10, "exp": now + 300, "jti": "1",
            "access": [{"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()}],
        }));
        let signed = format!("{header}.{claims}");
        let signature = openssl(&["dgst", "-sha256", "-sign", &self.key.display().to_string()], signed.as_bytes());
        Some(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}
