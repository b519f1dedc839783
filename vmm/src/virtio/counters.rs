//! Plain counters of what a device has done: written by its thread alone, read by any.

use std::sync::atomic::{AtomicU64, Ordering};

/// Names and values since the VMM started.
pub type Snapshot = Vec<(&'static str, u64)>;

/// Declares a device's `Counters`, and how all of them are read under their names.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What the device has done so far.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* $name: $crate::virtio::counters::Counter,)*
        }

        impl Counters {
            /// All of them.
            pub fn snapshot(&self) -> $crate::virtio::counters::Snapshot {
                vec![$((stringify!($name), self.$name.get())),*]
            }
        }
    };
}
pub(super) use counters;

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the count.
    pub fn add(&self, more: u64) {
        // Relaxed: a count orders nothing, it is only looked at.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
