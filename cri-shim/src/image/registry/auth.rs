//! Credentials, and how a registry wants to see them (RFC 7235; distribution's "Token Authentication Specification" and its
//! OAuth2 form for identity tokens).

use std::fmt;

use base64::Engine as _;
use http_auth::ChallengeRef;
use reqwest::header::WWW_AUTHENTICATE;
use reqwest::{Client, RequestBuilder, Response, Url};
use serde::Deserialize;

use super::{Endpoint, Error, body};

/// Largest answer of a token server.
const MAX_TOKEN: u64 = 1 << 20;
/// How this program names itself to token servers.
const CLIENT_ID: &str = "pericarp";

/// Credentials as the CRI has them (AuthConfig); empty fields are not given.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    /// The registry they are for; another one does not get them.
    pub server_address: String,
    /// Traded for a token at the registry's token server.
    pub identity_token: String,
    /// Sent to the registry as it is.
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Auth(for {:?})", self.server_address)
    }
}

/// What is shown with each request.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Authorization {
    Anonymous,
    Basic(String, String),
    Bearer(String),
}

/// What there is to show.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    None,
    Password(String, String),
    Identity(String),
    Token(String),
}

impl Auth {
    /// Credentials for a host: those without an address are for the registry in the image's name, never for its mirrors.
    pub(super) fn credentials(&self, endpoint: &Endpoint) -> Result<Credentials, Error> {
        let meant = match server_host(&self.server_address) {
            Some(host) => host == endpoint.host || (endpoint.original && host == endpoint.named),
            None => endpoint.original,
        };
        if !meant {
            return Ok(Credentials::None);
        }
        if !self.registry_token.is_empty() {
            return Ok(Credentials::Token(self.registry_token.clone()));
        }
        if !self.identity_token.is_empty() {
            return Ok(Credentials::Identity(self.identity_token.clone()));
        }
        if !self.username.is_empty() {
            return Ok(Credentials::Password(self.username.clone(), self.password.clone()));
        }
        if self.auth.is_empty() {
            return Ok(Credentials::None);
        }
        let decoded = base64::engine::general_purpose::STANDARD.decode(self.auth.trim()).ok();
        let text = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let (user, password) = text.as_deref().and_then(|text| text.split_once(':')).ok_or(Error::BadAuth)?;
        Ok(Credentials::Password(user.to_owned(), password.trim_end_matches('\0').to_owned()))
    }
}

/// The host in an address, which may be a URL such as `https://index.docker.io/v1/`; that one means Docker Hub.
fn server_host(address: &str) -> Option<&str> {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split('/').next().filter(|host| !host.is_empty())?;
    Some(if host == "index.docker.io" { "docker.io" } else { host })
}

/// Adds what was agreed on.
pub(super) fn apply(request: RequestBuilder, auth: &Authorization) -> RequestBuilder {
    match auth {
        Authorization::Anonymous => request,
        Authorization::Basic(user, password) => request.basic_auth(user, Some(password)),
        Authorization::Bearer(token) => request.bearer_auth(token),
    }
}

/// What to show at the start, before the registry has asked.
pub(super) fn initial(credentials: &Credentials) -> Authorization {
    match credentials {
        Credentials::Token(token) => Authorization::Bearer(token.clone()),
        _ => Authorization::Anonymous,
    }
}

/// Answers a refusal; `None` if there is nothing more to show.
pub(super) async fn answer(
    http: &Client,
    endpoint: &Endpoint,
    repository: &str,
    credentials: &Credentials,
    refusal: &Response,
) -> Result<Option<Authorization>, Error> {
    if let Credentials::Token(_) = credentials {
        return Ok(None); // it has been shown already
    }
    let headers = refusal.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let challenges: Vec<_> = headers.filter_map(|value| http_auth::parse_challenges(value).ok()).flatten().collect();
    let of_scheme =
        |scheme| challenges.iter().find(|challenge: &&ChallengeRef<'_>| challenge.scheme.eq_ignore_ascii_case(scheme));
    if let Some(challenge) = of_scheme("bearer") {
        return token(http, endpoint, repository, credentials, challenge).await.map(Some);
    }
    match (of_scheme("basic"), credentials) {
        (Some(_), Credentials::Password(user, password)) => {
            Ok(Some(Authorization::Basic(user.clone(), password.clone())))
        }
        _ => Ok(None),
    }
}

#[derive(Deserialize)]
struct TokenReply {
    token: Option<String>,
    access_token: Option<String>,
}

async fn token(
    http: &Client,
    endpoint: &Endpoint,
    repository: &str,
    credentials: &Credentials,
    challenge: &ChallengeRef<'_>,
) -> Result<Authorization, Error> {
    let param = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    let realm = param("realm").unwrap_or_default();
    let mut url =
        Url::parse(&realm).map_err(|_| Error::Reply(endpoint.to_string(), format!("the token server {realm:?}")))?;
    // A password never leaves by a weaker way than it was meant for.
    if !endpoint.plain_http && url.scheme() != "https" && *credentials != Credentials::None {
        return Err(Error::Reply(endpoint.to_string(), format!("the unencrypted token server {realm:?}")));
    }
    let scope = param("scope").unwrap_or_else(|| format!("repository:{repository}:pull"));
    let mut query = vec![("scope", scope)];
    query.extend(param("service").map(|service| ("service", service)));
    let request = match credentials {
        Credentials::Identity(identity) => {
            query.extend([
                ("grant_type", "refresh_token".to_owned()),
                ("client_id", CLIENT_ID.to_owned()),
                ("refresh_token", identity.clone()),
            ]);
            let mut form = url.clone();
            form.query_pairs_mut().clear().extend_pairs(query);
            let form = form.query().unwrap_or_default().to_owned();
            http.post(url).header("content-type", "application/x-www-form-urlencoded").body(form)
        }
        Credentials::Password(user, password) => {
            url.query_pairs_mut().extend_pairs(query);
            http.get(url).basic_auth(user, Some(password))
        }
        Credentials::None | Credentials::Token(_) => {
            url.query_pairs_mut().extend_pairs(query);
            http.get(url)
        }
    };
    let response = request.send().await.map_err(|error| endpoint.error(error))?;
    if !response.status().is_success() {
        let (status, name) = (response.status().as_u16(), format!("{}/{repository}", endpoint.named));
        return Err(match status {
            400 | 401 | 403 => Error::Denied { name, at: realm },
            _ => Error::Status(realm, status),
        });
    }
    let bytes = body(endpoint, response, "answer of the token server", MAX_TOKEN).await?;
    let reply: Option<TokenReply> = serde_json::from_slice(&bytes).ok();
    let token = reply.and_then(|reply| reply.token.or(reply.access_token));
    token.map(Authorization::Bearer).ok_or_else(|| Error::Reply(realm, "an answer without a token".to_owned()))
}

#[cfg(test)]
mod tests;
