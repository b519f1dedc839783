//! SIGUSR1: somebody has unmounted volumes.
#![expect(unsafe_code, reason = "signal sets")]

/// A set of SIGUSR1 alone.
fn set() -> libc::sigset_t {
    // SAFETY: all zeroes is a valid set, which the two calls then fill in (sigsetops(3)).
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        set
    }
}

/// Lets it wait until [`each`] takes it, in this thread and those it starts.
pub(crate) fn block() {
    let set = set();
    // SAFETY: the set is valid and lives past the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Calls `work` after each; never returns.
pub(crate) fn each(work: impl Fn()) {
    let (set, mut signal) = (set(), 0);
    loop {
        // SAFETY: both live past the call, and the signal is blocked.
        if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
            work();
        }
    }
}
