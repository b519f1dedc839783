//! When a device's thread looks for more work before it sleeps.
//!
//! A guest that has many requests to make makes one, which wakes the thread, and the next ones while the thread is at work: each
//! costs it an exit and an interrupt if the thread is the faster of the two. So do packets for the guest. So the thread lingers: it
//! does not ask to be notified yet, lets work come, and takes together what has come. First it gives way, which lets whoever has
//! more go on if that waits for this very processor, and is over at once if nobody does; then it pauses. It goes on so as long as
//! that brings enough. Where one thing comes at a time it would wait in vain, so whether there are many is tried seldom, and the more
//! seldom the more often it was in vain. So it is where others have the processor: what came while they had it came late.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::thread;
use std::time::{Duration, Instant};

/// How long a pause is: some requests' worth of a guest's time.
const PAUSE: Duration = Duration::from_micros(20);

/// Longest time that one who has more for the thread may need; whoever takes longer has other work.
const LATE: Duration = Duration::from_millis(2);

/// Things taken one by one between two tries, at first and at most.
const OFTEN: usize = 16;
const SELDOM: usize = 1024;

/// How work is let come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Whoever waits for the processor runs first.
    GiveWay,
    /// The thread sleeps for a moment.
    Pause,
}

impl Way {
    /// How much it has to bring to pay.
    fn enough(self) -> usize {
        match self {
            Self::GiveWay => 2,
            Self::Pause => 6,
        }
    }
}

/// The pace of one direction's work: requests of a disk, packets to a guest or from it.
#[derive(Debug)]
pub struct Pace {
    /// How the last things were let come.
    lingering: Option<Way>,
    /// Whether lingering has brought enough at all, this time.
    paid: bool,
    /// Whether it took longer than it may.
    late: bool,
    /// Things to take one by one until the next try.
    until_try: usize,
    /// The same between tries, now.
    between: usize,
    /// Things taken since there was nothing to take.
    taken: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { lingering: None, paid: false, late: false, until_try: OFTEN, between: OFTEN, taken: 0 }
    }
}

impl Pace {
    /// A request or packet was taken.
    pub fn take(&mut self) {
        self.taken = self.taken.saturating_add(1);
    }

    /// Lets work come, if [`Pace::lingers`] said so.
    pub fn linger(&mut self, way: Option<Way>) {
        let Some(way) = way else { return };
        let began = Instant::now();
        match way {
            Way::GiveWay => thread::yield_now(),
            Way::Pause => thread::park_timeout(PAUSE),
        }
        self.late |= began.elapsed() > LATE;
    }

    /// There is nothing left: whether to look again after having [lingered](Pace::linger).
    pub fn lingers(&mut self) -> Option<Way> {
        let (taken, late) = (std::mem::take(&mut self.taken), std::mem::take(&mut self.late));
        self.lingering = match self.lingering {
            None => {
                self.paid = false;
                self.until_try = self.until_try.saturating_sub(usize::from(taken == 1));
                (self.until_try == 0).then_some(Way::GiveWay)
            }
            Some(way) if taken >= way.enough() && !late => {
                self.paid = true;
                Some(way)
            }
            Some(Way::GiveWay) if taken == 0 && !self.paid && !late => Some(Way::Pause),
            Some(_) => {
                let next = if self.paid && !late { self.between / 2 } else { self.between.saturating_mul(2) };
                self.between = next.clamp(1, SELDOM);
                self.until_try = self.between;
                None
            }
        };
        self.lingering
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There is nothing left after so many.
    fn empty_after(pace: &mut Pace, count: usize) -> Option<Way> {
        (0..count).for_each(|_| pace.take());
        pace.lingers()
    }

    /// A pace that has just begun to give way.
    fn giving_way() -> Pace {
        let mut pace = Pace::default();
        let first = (1..=SELDOM).find(|_| empty_after(&mut pace, 1) == Some(Way::GiveWay));
        assert_eq!(first, Some(OFTEN), "while the thread is the faster one");
        pace
    }

    #[test]
    fn one_at_a_time_is_hardly_ever_waited_for() {
        let mut pace = Pace::default();
        let mut tries =
            |count| (0..count).filter(|_| empty_after(&mut pace, 1).is_some() && pace.lingers().is_some()).count();
        tries(4096);
        assert!((9..=11).contains(&tries(10 * SELDOM)));
    }

    #[test]
    fn where_nobody_waits_for_the_processor_it_pauses() {
        let mut pace = giving_way();
        assert_eq!(empty_after(&mut pace, 0), Some(Way::Pause));
        assert!((0..100).all(|_| empty_after(&mut pace, 6) == Some(Way::Pause)), "as long as many come");
        assert_eq!(empty_after(&mut pace, 5), None, "no longer");
        assert!((0..OFTEN).any(|_| empty_after(&mut pace, 1).is_some()), "but it is tried again soon");
        assert_eq!((empty_after(&mut pace, 0), empty_after(&mut pace, 0)), (Some(Way::Pause), None));
    }

    #[test]
    fn it_gives_way_as_long_as_two_come_of_it() {
        let mut pace = giving_way();
        assert!((0..100).all(|_| empty_after(&mut pace, 2) == Some(Way::GiveWay)));
        assert_eq!(empty_after(&mut pace, 1), None);
    }

    #[test]
    fn it_is_over_where_others_have_the_processor() {
        let mut pace = Pace::default();
        let mut between = 0;
        for _ in 0..10 {
            between = (1..).find(|_| empty_after(&mut pace, 1).is_some()).unwrap();
            pace.late = true;
            assert_eq!(empty_after(&mut pace, 64), None);
        }
        assert_eq!(between, SELDOM);
    }

    #[test]
    fn bursts_are_waited_for_from_their_first_on() {
        let mut pace = Pace::default();
        // Of a burst the thread takes seven one by one and then the rest, or all the rest as soon as it waits for that.
        let mut lone = 0;
        for _ in 0..40 {
            lone = (1..=7).find(|_| empty_after(&mut pace, 1).is_some()).unwrap_or(7);
            while empty_after(&mut pace, 64 - lone).is_some() && empty_after(&mut pace, 0).is_some() {}
        }
        assert_eq!(lone, 1);
    }
}
