//! The command line that containerd gives a shim, in the way of Go's flag package: `-name value`, `-name=value`.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// What a shim is asked to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Action {
    /// Make a server for a pod, or find the one that is there.
    Start,
    /// Be it.
    #[default]
    Serve,
    /// Remove what one that was killed has left.
    Delete,
    /// Say what it can do.
    Info,
    /// Say which release it is.
    Version,
}

/// All that is told.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub(super) action: Action,
    /// Of containerd, not of Kubernetes or Linux.
    pub(super) namespace: String,
    /// The container's.
    pub(super) id: String,
    /// Where the server is to be reached.
    pub(super) socket: String,
    /// The container's directory, if it is not the working directory.
    pub(super) bundle: PathBuf,
    /// containerd's own socket.
    pub(super) address: String,
    /// Log more.
    pub(super) debug: bool,
}

impl Arguments {
    pub(super) fn parse(words: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut words = words.into_iter();
        let mut parsed = Self::default();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                parsed.action = match word.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => bail!("there is no action {word:?}: containerd starts this program, with start or delete"),
                };
                continue;
            };
            let (name, value) =
                flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value.to_owned())));
            match name {
                "debug" => parsed.debug = true,
                "info" => parsed.action = Action::Info,
                "v" | "version" => parsed.action = Action::Version,
                _ => {
                    let Some(value) = value.or_else(|| words.next()) else { bail!("-{name} needs a value") };
                    parsed.set(name, value)?;
                }
            }
        }
        Ok(parsed)
    }

    fn set(&mut self, name: &str, value: String) -> Result<()> {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "socket" => self.socket = value,
            "bundle" => self.bundle = value.into(),
            "address" => self.address = value,
            // Events go to containerd by its socket.
            "publish-binary" => {}
            _ => bail!("there is no option -{name}"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn both_ways_of_a_value_are_read() {
        let parsed =
            parse("-namespace k8s.io --id=a -address /run/c.sock -publish-binary c -debug start").expect("parses");
        assert_eq!((parsed.action, parsed.namespace.as_str(), parsed.id.as_str()), (Action::Start, "k8s.io", "a"));
        assert!(parsed.debug && parsed.address == "/run/c.sock");
        assert_eq!(parse("-id a -bundle /b delete").expect("parses").bundle, PathBuf::from("/b"));
        assert_eq!(parse("-info").expect("parses").action, Action::Info);
        assert_eq!(parse("-id a -socket unix:///s").expect("parses").action, Action::Serve);
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (line, word) in [("stop", "stop"), ("-fast 1 start", "-fast"), ("-id", "-id")] {
            assert!(parse(line).expect_err(line).to_string().contains(word), "{line}");
        }
    }
}
