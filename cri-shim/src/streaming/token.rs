//! Tokens: what a client shows to get what somebody else was allowed to ask for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Request;
use crate::error::{Error, Result};
use crate::random;

/// How long a token is good for.
const LIFE: Duration = Duration::from_secs(60);

/// Most tokens that wait for their client.
const TOKENS: usize = 1000;

/// The tokens that wait for their client. Cheap to clone; every clone is the same set.
#[derive(Clone, Debug, Default)]
pub(super) struct Tokens(Arc<Mutex<HashMap<String, (Instant, Request)>>>);

impl Tokens {
    pub(super) fn issue(&self, request: Request) -> Result<String> {
        let token = random::id()?;
        let now = Instant::now();
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, (issued, _)| now.duration_since(*issued) < LIFE);
        if tokens.len() >= TOKENS {
            let text = format!("{TOKENS} clients have not fetched their streams yet: try again in a minute");
            return Err(Error::ResourceExhausted(text));
        }
        tokens.insert(token.clone(), (now, request));
        Ok(token)
    }

    /// What the token stands for, the first time it is shown.
    pub(super) fn redeem(&self, token: &str) -> Option<Request> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(token);
        found.filter(|(issued, _)| issued.elapsed() < LIFE).map(|(_, request)| request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::PortForward { pod: "p".into() }
    }

    #[test]
    fn a_token_is_good_once() {
        let tokens = Tokens::default();
        let token = tokens.issue(request()).expect("there is room");
        assert_eq!(token.len(), 64);
        assert_eq!(tokens.redeem("0"), None);
        assert_eq!(tokens.redeem(&token), Some(request()));
        assert_eq!(tokens.redeem(&token), None);
    }

    #[test]
    fn an_old_token_is_good_for_nothing_and_makes_room() {
        let tokens = Tokens::default();
        let mut last = String::new();
        for _ in 0..TOKENS {
            last = tokens.issue(request()).expect("there is room");
        }
        assert!(matches!(tokens.issue(request()), Err(Error::ResourceExhausted(_))));
        let long_ago = Instant::now().checked_sub(LIFE).expect("the machine has run for a minute");
        for (issued, _) in tokens.0.lock().expect("unpoisoned").values_mut() {
            *issued = long_ago;
        }
        assert_eq!(tokens.redeem(&last), None);
        tokens.issue(request()).expect("there is room again");
    }
}
