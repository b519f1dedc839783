//! The epoll of one device thread.
//!
//! It owns the epoll descriptor and nothing that is registered with it; it never reads what it watches.

use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Most events taken in one wait; the rest stay ready for the next.
const EVENTS: usize = 64;

/// Whether [`Poller::wait`] may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until something happens.
    Block,
    /// At most this many milliseconds.
    Millis(u16),
    /// Not at all: there is work left over.
    Poll,
}

impl Wait {
    /// The one of two that ends first.
    pub fn sooner(self, other: Self) -> Self {
        match (self, other) {
            (Self::Poll, _) | (_, Self::Poll) => Self::Poll,
            (Self::Millis(one), Self::Millis(other)) => Self::Millis(one.min(other)),
            (Self::Block, wait) | (wait, Self::Block) => wait,
        }
    }
}

/// A set of watched descriptors, each known by a token.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
    events: [EpollEvent; EVENTS],
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, events: [EpollEvent::default(); EVENTS] })
    }

    /// Watches a descriptor, level-triggered.
    pub fn add(&self, fd: &impl AsRawFd, interest: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(interest, token))
    }

    /// Changes what a watched descriptor is watched for; an empty set leaves only errors and hang-ups.
    pub fn modify(&self, fd: &impl AsRawFd, interest: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd.as_raw_fd(), EpollEvent::new(interest, token))
    }

    /// Watches a descriptor no more; call before it is closed.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
    }

    /// Waits, and returns token and readiness of what is ready. A signal starts the wait anew.
    pub fn wait(&mut self, wait: Wait) -> io::Result<impl Iterator<Item = (u64, EventSet)> + use<>> {
        let timeout = match wait {
            Wait::Block => -1,
            Wait::Millis(millis) => i32::from(millis),
            Wait::Poll => 0,
        };
        let count = loop {
            match self.epoll.wait(timeout, &mut self.events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        let ready = self.events.into_iter().take(count);
        Ok(ready.map(|event| (event.data(), EventSet::from_bits_truncate(event.events()))))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[test]
    fn ready_descriptors_are_named_by_their_token() {
        let mut poller = Poller::new().unwrap();
        let (quiet, loud) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        poller.add(&quiet, EventSet::IN, 1).unwrap();
        poller.add(&loud, EventSet::IN, 2).unwrap();
        assert_eq!(poller.wait(Wait::Poll).unwrap().count(), 0);
        loud.write(1).unwrap();
        assert_eq!(poller.wait(Wait::Block).unwrap().collect::<Vec<_>>(), [(2, EventSet::IN)]);
        poller.remove(&loud).unwrap();
        assert_eq!(poller.wait(Wait::Poll).unwrap().count(), 0);
    }

    #[test]
    fn interest_can_be_taken_back_but_a_hang_up_still_shows() {
        let mut poller = Poller::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        poller.add(&ours, EventSet::IN, 7).unwrap();
        theirs.write_all(b"x").unwrap();
        poller.modify(&ours, EventSet::empty(), 7).unwrap();
        assert_eq!(poller.wait(Wait::Poll).unwrap().count(), 0);
        drop(theirs);
        let (token, ready) = poller.wait(Wait::Block).unwrap().next().unwrap();
        assert_eq!(token, 7);
        assert!(ready.contains(EventSet::HANG_UP));
    }
}
