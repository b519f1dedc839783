//! When a disk's thread looks for more requests before it sleeps.
//!
//! A guest that has many requests to make makes one, which wakes the thread, and the next ones while the thread is at work: each
//! costs it an exit and an interrupt if the thread is the faster of the two. So the thread lingers: it does not ask to be
//! notified yet, pauses, and takes together what has come. It goes on so as long as that is [`MANY`]. A guest that has one
//! request at a time would wait in vain, so whether there are many is tried seldom, and the more seldom the less there were.

use std::thread;
use std::time::Duration;

/// Requests in a pause from which on it pays.
const MANY: usize = 6;

/// How long a pause is: some requests' worth of a guest's time.
const PAUSE: Duration = Duration::from_micros(20);

/// Requests between two tries: at least, and at most.
const OFTEN: usize = 16;
const SELDOM: usize = 1024;

#[derive(Debug)]
pub(super) struct Pace {
    /// The last requests came in a pause.
    lingering: bool,
    /// Requests until the next try.
    until_try: usize,
    /// Requests between tries, now.
    between: usize,
    /// Requests taken since the queue was empty.
    taken: usize,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { lingering: false, until_try: OFTEN, between: OFTEN, taken: 0 }
    }

    /// A request was taken.
    pub(super) fn take(&mut self) {
        self.taken = self.taken.saturating_add(1);
    }

    /// The queue is empty: whether to look again after a pause.
    pub(super) fn lingers(&mut self) -> bool {
        let taken = std::mem::take(&mut self.taken);
        if self.lingering {
            self.between = if taken >= MANY { OFTEN } else { self.between.saturating_mul(2).min(SELDOM) };
            self.until_try = self.between;
            self.lingering = taken >= MANY;
        } else {
            self.until_try = self.until_try.saturating_sub(taken);
            self.lingering = self.until_try == 0;
        }
        self.lingering
    }

    /// Lets requests come.
    pub(super) fn pause() {
        thread::park_timeout(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The queue is empty after so many requests.
    fn empty_after(pace: &mut Pace, requests: usize) -> bool {
        (0..requests).for_each(|_| pace.take());
        pace.lingers()
    }

    #[test]
    fn one_request_at_a_time_is_hardly_ever_waited_for() {
        let mut pace = Pace::new();
        let mut tries =
            |requests| (0..requests).filter(|_| empty_after(&mut pace, 1) && !empty_after(&mut pace, 0)).count();
        tries(4096);
        assert!((9..=10).contains(&tries(10 * SELDOM)));
    }

    #[test]
    fn many_are_taken_together_as_long_as_they_come() {
        let mut pace = Pace::new();
        assert_eq!((1..=SELDOM).find(|_| empty_after(&mut pace, 1)), Some(OFTEN), "while the thread is the faster one");
        assert!((0..100).all(|_| empty_after(&mut pace, MANY)));
        assert!(!empty_after(&mut pace, MANY - 1), "no longer");
        assert!((0..OFTEN * 2).any(|_| empty_after(&mut pace, 1)), "but it is tried again soon");
        assert!(!empty_after(&mut pace, 0));
    }
}
