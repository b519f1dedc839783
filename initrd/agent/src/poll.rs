//! What the agent waits for: one epoll set, whose entries name what they belong to.
//!
//! A descriptor that is not wanted is taken out of the set altogether, because a hang-up is reported whether asked
//! for or not and would spin the loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Most events taken at once.
const EVENTS: usize = 64;

/// A process's descriptors in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The channel to a process that is not yet its program.
    Status,
    /// Its standard input.
    Stdin,
    /// Its standard output, or its terminal.
    Stdout,
    /// Its standard error.
    Stderr,
    /// Where its log goes.
    Log,
    /// Whether anything still runs in its cgroup.
    Cgroup,
}

/// What an event belongs to. Numbers are never used twice, so a late event finds nothing and is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// A child has ended.
    Signals,
    /// Somebody dials the control port.
    ControlListener,
    /// Somebody dials the session port.
    SessionListener,
    /// A control connection.
    Control(u32),
    /// A session connection.
    Session(u32),
    /// The TCP connection of a session that forwards a port.
    Forward(u32),
    /// A process that the agent started.
    Task(u32, Part),
}

const PARTS: [Part; 6] = [Part::Status, Part::Stdin, Part::Stdout, Part::Stderr, Part::Log, Part::Cgroup];

/// Kinds of entries from here on are parts of a task.
const FIRST_PART: u64 = 6;

impl Token {
    fn pack(self) -> u64 {
        let (kind, number): (u64, u32) = match self {
            Self::Signals => (0, 0),
            Self::ControlListener => (1, 0),
            Self::SessionListener => (2, 0),
            Self::Control(number) => (3, number),
            Self::Session(number) => (4, number),
            Self::Forward(number) => (5, number),
            Self::Task(number, part) => {
                let part = PARTS.iter().position(|&each| each == part).unwrap_or_default();
                (u64::try_from(part).unwrap_or_default().saturating_add(FIRST_PART), number)
            }
        };
        (kind << 32) | u64::from(number)
    }

    fn unpack(word: u64) -> Option<Self> {
        let number = u32::try_from(word & u64::from(u32::MAX)).ok()?;
        Some(match word >> 32 {
            0 => Self::Signals,
            1 => Self::ControlListener,
            2 => Self::SessionListener,
            3 => Self::Control(number),
            4 => Self::Session(number),
            5 => Self::Forward(number),
            kind => Self::Task(number, *PARTS.get(usize::try_from(kind.checked_sub(FIRST_PART)?).ok()?)?),
        })
    }
}

/// The set.
pub(crate) struct Poll {
    epoll: Epoll,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Waits until something happens, or only looks whether it has.
    pub(crate) fn wait(&self, only_look: bool) -> io::Result<Vec<(Token, EpollFlags)>> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let limit = if only_look { EpollTimeout::ZERO } else { EpollTimeout::NONE };
        let count = match self.epoll.wait(&mut events, limit) {
            Err(nix::Error::EINTR) => 0,
            other => other?,
        };
        Ok(events.iter().take(count).filter_map(|event| Some((Token::unpack(event.data())?, event.events()))).collect())
    }
}

/// A descriptor that may be in the set.
#[derive(Debug)]
pub(crate) struct Watched<T: AsFd> {
    io: T,
    token: Token,
    wanted: EpollFlags,
}

impl<T: AsFd> Watched<T> {
    /// Not in the set yet.
    pub(crate) fn new(io: T, token: Token) -> Self {
        Self { io, token, wanted: EpollFlags::empty() }
    }

    pub(crate) fn get(&self) -> &T {
        &self.io
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }

    /// Waits for `wanted` from now on; for nothing at all if it is empty.
    pub(crate) fn want(&mut self, poll: &Poll, wanted: EpollFlags) -> io::Result<()> {
        if wanted == self.wanted {
            return Ok(());
        }
        let mut event = EpollEvent::new(wanted, self.token.pack());
        if wanted.is_empty() {
            poll.epoll.delete(&self.io)?;
        } else if self.wanted.is_empty() {
            poll.epoll.add(&self.io, event)?;
        } else {
            poll.epoll.modify(&self.io, &mut event)?;
        }
        self.wanted = wanted;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_survives_its_word() {
        let mut tokens = vec![Token::Signals, Token::ControlListener, Token::SessionListener];
        for number in [0, 1, u32::MAX] {
            tokens.extend([Token::Control(number), Token::Session(number), Token::Forward(number)]);
            tokens.extend(PARTS.map(|part| Token::Task(number, part)));
        }
        for token in tokens {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}
