//! How much a device may do: so many operations, which are requests or packets, and so many bytes a second.
//!
//! Each is a meter that knows when all that was taken so far is paid for, at the rate that is allowed. An operation is taken
//! unless that is more than a [`BURST`] away, whatever its size, and its cost is added. So a short burst passes, what is
//! large is paid for afterwards, and in the long run nobody gets more than the rate.

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

use std::num::NonZeroU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_control::Limits;

use crate::notes::now;

/// What may be taken at once beyond the rate, in nanoseconds of it.
const BURST: u64 = 100_000_000;

const NS_PER_S: u128 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;

#[derive(Clone, Copy, Debug)]
struct Meter {
    per_s: NonZeroU64,
    /// `CLOCK_BOOTTIME` in nanoseconds.
    paid_at: u64,
}

impl Meter {
    fn new(per_s: u64) -> Option<Self> {
        NonZeroU64::new(per_s).map(|per_s| Self { per_s, paid_at: 0 })
    }

    /// Nanoseconds until something may be taken.
    fn delay(&self, now: u64) -> u64 {
        self.paid_at.saturating_sub(now).saturating_sub(BURST)
    }

    fn charge(&mut self, now: u64, amount: usize) {
        let amount = u128::try_from(amount).unwrap_or(u128::MAX);
        let cost = amount.saturating_mul(NS_PER_S).checked_div(self.per_s.get().into()).unwrap_or(u128::MAX);
        self.paid_at = self.paid_at.max(now).saturating_add(u64::try_from(cost).unwrap_or(u64::MAX));
    }
}

/// The meters of a disk, or of a direction of a network interface.
#[derive(Debug)]
pub struct Limit {
    operations: Option<Meter>,
    bytes: Option<Meter>,
}

impl Limit {
    /// Meters at which nothing has been taken yet.
    pub fn new(limits: Limits) -> Self {
        Self { operations: Meter::new(limits.operations_per_s), bytes: Meter::new(limits.bytes_per_s) }
    }

    /// Milliseconds to wait before the next operation is taken; `None` if it may be taken now.
    pub fn delay(&self) -> Option<u16> {
        self.is_any().then(|| self.delay_at(now())).flatten()
    }

    /// Counts an operation that moves so many bytes.
    pub fn charge(&mut self, bytes: usize) {
        if self.is_any() {
            self.charge_at(now(), bytes);
        }
    }

    /// A device without limits does not look at the clock.
    fn is_any(&self) -> bool {
        self.operations.is_some() || self.bytes.is_some()
    }

    fn delay_at(&self, now: u64) -> Option<u16> {
        let longest = [&self.operations, &self.bytes].into_iter().flatten().map(|meter| meter.delay(now)).max()?;
        (longest > 0).then(|| u16::try_from(longest.div_ceil(NS_PER_MS)).unwrap_or(u16::MAX))
    }

    fn charge_at(&mut self, now: u64, bytes: usize) {
        if let Some(meter) = &mut self.operations {
            meter.charge(now, 1);
        }
        if let Some(meter) = &mut self.bytes {
            meter.charge(now, bytes);
        }
    }
}

/// A [`Limit`] that the threads of one device have together; none at all costs no lock.
#[derive(Debug)]
pub struct SharedLimit(Option<Mutex<Limit>>);

impl SharedLimit {
    /// As [`Limit::new`].
    pub fn new(limits: Limits) -> Self {
        let limit = Limit::new(limits);
        Self(limit.is_any().then(|| Mutex::new(limit)))
    }

    /// As [`Limit::delay`].
    pub fn delay(&self) -> Option<u16> {
        self.lock()?.delay()
    }

    /// As [`Limit::charge`].
    pub fn charge(&self, bytes: usize) {
        if let Some(mut limit) = self.lock() {
            limit.charge(bytes);
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Limit>> {
        self.0.as_ref().map(|limit| limit.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(operations_per_s: u64, bytes_per_s: u64) -> Limit {
        Limit::new(Limits { operations_per_s, bytes_per_s })
    }

    /// Operations of so many bytes that pass in a time, in which each is asked for as soon as it may be.
    fn passed(limit: &mut Limit, bytes: usize, ms: u64) -> u64 {
        let (start, mut at, mut count) = (5 * NS_PER_MS, 5 * NS_PER_MS, 0);
        while at - start < ms * NS_PER_MS {
            match limit.delay_at(at) {
                Some(delay) => at += u64::from(delay) * NS_PER_MS,
                None => {
                    limit.charge_at(at, bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn no_more_than_the_rate_and_one_burst_passes() {
        assert_eq!(passed(&mut limit(100, 0), 1 << 20, 10_000), 1000 + 10);
        assert_eq!(passed(&mut limit(0, 1 << 20), 4096, 10_000), 2560 + 26);
        assert_eq!(passed(&mut limit(100, 1 << 20), 4096, 1000), 100 + 10, "the lower one counts");
    }

    #[test]
    fn what_is_larger_than_a_burst_passes_and_is_paid_for() {
        let mut limit = limit(0, 1 << 20);
        assert_eq!(limit.delay_at(0), None);
        limit.charge_at(0, 10 << 20);
        assert_eq!(limit.delay_at(0), Some(9900));
        assert_eq!(limit.delay_at(9_900 * NS_PER_MS), None);
        limit.charge_at(u64::MAX, usize::MAX);
        assert_eq!(limit.delay_at(0), Some(u16::MAX));
    }

    #[test]
    fn time_that_was_not_used_is_no_credit() {
        let mut limit = limit(100, 0);
        let later = 3600 * 1000 * NS_PER_MS;
        let count =
            (0..100).take_while(|_| limit.delay_at(later).is_none().then(|| limit.charge_at(later, 0)).is_some());
        assert_eq!(count.count(), 11);
    }

    #[test]
    fn what_has_no_limits_never_waits() {
        let mut limit = limit(0, 0);
        limit.charge(usize::MAX);
        assert_eq!(limit.delay(), None);
    }
}
