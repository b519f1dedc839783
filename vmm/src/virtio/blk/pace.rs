//! When a disk's thread looks for more requests before it sleeps.
//!
//! A guest that has many requests to make makes one, which wakes the thread, and the next ones while the thread is at work: each
//! costs it an exit and an interrupt if the thread is the faster of the two. So the thread lingers: it does not ask to be
//! notified yet, lets requests come, and takes together what has come. First it gives way, which lets a guest go on that waits for
//! this very processor, and is over at once if none does; then it pauses. It goes on so as long as that brings enough. A
//! guest that has one request at a time would wait in vain, so whether there are many is tried seldom, and the more seldom the
//! less there were.

use std::thread;
use std::time::Duration;

/// How long a pause is: some requests' worth of a guest's time.
const PAUSE: Duration = Duration::from_micros(20);

/// Requests between two tries: at least, and at most.
const OFTEN: usize = 16;
const SELDOM: usize = 1024;

/// How requests are let come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    GiveWay,
    Pause,
}

impl Way {
    /// Requests from which on it pays.
    fn enough(self) -> usize {
        match self {
            Self::GiveWay => 2,
            Self::Pause => 6,
        }
    }
}

#[derive(Debug)]
pub(super) struct Pace {
    /// How the last requests were let come.
    lingering: Option<Way>,
    /// Requests until the next try.
    until_try: usize,
    /// Requests between tries, now.
    between: usize,
    /// Requests taken since the queue was empty.
    taken: usize,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { lingering: None, until_try: OFTEN, between: OFTEN, taken: 0 }
    }

    /// A request was taken.
    pub(super) fn take(&mut self) {
        self.taken = self.taken.saturating_add(1);
    }

    /// The queue is empty: whether to look again after [`Pace::linger`].
    pub(super) fn lingers(&mut self) -> bool {
        let taken = std::mem::take(&mut self.taken);
        self.lingering = match self.lingering {
            None => {
                self.until_try = self.until_try.saturating_sub(taken);
                (self.until_try == 0).then_some(Way::GiveWay)
            }
            Some(way) if taken >= way.enough() => {
                self.between = OFTEN;
                Some(way)
            }
            Some(Way::GiveWay) if taken == 0 => Some(Way::Pause),
            Some(_) => {
                self.between = self.between.saturating_mul(2).min(SELDOM);
                self.until_try = self.between;
                None
            }
        };
        self.lingering.is_some()
    }

    /// Lets requests come.
    pub(super) fn linger(&self) {
        match self.lingering {
            Some(Way::GiveWay) => thread::yield_now(),
            Some(Way::Pause) => thread::park_timeout(PAUSE),
            None => {}
        }
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

    /// A pace that has just begun to give way.
    fn giving_way() -> Pace {
        let mut pace = Pace::new();
        assert_eq!((1..=SELDOM).find(|_| empty_after(&mut pace, 1)), Some(OFTEN), "while the thread is the faster one");
        assert_eq!(pace.lingering, Some(Way::GiveWay));
        pace
    }

    #[test]
    fn one_request_at_a_time_is_hardly_ever_waited_for() {
        let mut pace = Pace::new();
        let mut tries =
            |requests| (0..requests).filter(|_| empty_after(&mut pace, 1) && !empty_after(&mut pace, 1)).count();
        tries(4096);
        assert!((9..=10).contains(&tries(10 * SELDOM)));
    }

    #[test]
    fn where_nobody_waits_for_the_processor_it_pauses() {
        let mut pace = giving_way();
        assert!(empty_after(&mut pace, 0));
        assert_eq!(pace.lingering, Some(Way::Pause));
        assert!((0..100).all(|_| empty_after(&mut pace, 6)), "as long as many come");
        assert!(!empty_after(&mut pace, 5), "no longer");
        assert!((0..OFTEN * 2).any(|_| empty_after(&mut pace, 1)), "but it is tried again soon");
        assert!(empty_after(&mut pace, 0) && !empty_after(&mut pace, 0));
    }

    #[test]
    fn it_gives_way_as_long_as_two_come_of_it() {
        let mut pace = giving_way();
        assert!((0..100).all(|_| empty_after(&mut pace, 2)));
        assert_eq!(pace.lingering, Some(Way::GiveWay));
        assert!(!empty_after(&mut pace, 1));
    }
}
