#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use super::*;

fn endpoint(host: &str, original: bool) -> Endpoint {
    let (host, prefix, named) = (host.to_owned(), String::new(), "docker.io".to_owned());
    Endpoint { host, prefix, plain_http: false, original, named, stall: Duration::from_secs(1) }
}

fn basic(user: &str) -> Auth {
    Auth { username: user.to_owned(), password: "p".to_owned(), ..Auth::default() }
}

#[test]
fn credentials_go_where_they_are_meant_to() {
    let shown = |auth: &Auth, host, original| auth.credentials(&endpoint(host, original)).unwrap() != Credentials::None;
    let (registry, mirror) = (("registry-1.docker.io", true), ("mirror:5000", false));
    assert!(shown(&basic("u"), registry.0, registry.1) && !shown(&basic("u"), mirror.0, mirror.1));
    let named = |address: &str| Auth { server_address: address.to_owned(), ..basic("u") };
    assert!(shown(&named("https://index.docker.io/v1/"), registry.0, registry.1));
    assert!(shown(&named("docker.io"), registry.0, registry.1));
    assert!(!shown(&named("quay.io"), registry.0, registry.1));
    assert!(
        shown(&named("http://mirror:5000"), mirror.0, mirror.1)
            && !shown(&named("mirror:5000"), registry.0, registry.1)
    );
}

#[test]
fn every_form_of_credentials_is_read() {
    let credentials = |auth: Auth| auth.credentials(&endpoint("registry-1.docker.io", true));
    let password = Credentials::Password("u".to_owned(), "p:q".to_owned());
    assert!(credentials(Auth { auth: "dTpwOnE=".to_owned(), ..Auth::default() }).unwrap() == password);
    assert!(matches!(credentials(Auth { auth: "%".to_owned(), ..Auth::default() }), Err(Error::BadAuth)));
    let identity = Auth { identity_token: "t".to_owned(), ..basic("<token>") };
    assert!(credentials(identity).unwrap() == Credentials::Identity("t".to_owned()));
    let token = Auth { registry_token: "r".to_owned(), ..Auth::default() };
    assert!(credentials(token).unwrap() == Credentials::Token("r".to_owned()));
    assert!(credentials(Auth::default()).unwrap() == Credentials::None);
    assert!(!format!("{:?}", basic("secret-user")).contains("secret"));
}
