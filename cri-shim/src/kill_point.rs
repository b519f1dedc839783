//! Named points of a pod's and an image's life at which a test ends the daemon, as SIGKILL would.
//!
//! They are there in a daemon built with the feature `kill-points` only; tests/tests/kill_points.rs names each of them.

/// Environment variable that names the point at which to end.
#[cfg(feature = "kill-points")]
const VARIABLE: &str = "PERICARP_KILL_POINT";

/// Ends the process by SIGKILL if this is the point that was asked for.
#[cfg(feature = "kill-points")]
pub(crate) fn kill_point(name: &str) {
    if std::env::var_os(VARIABLE).is_some_and(|asked| asked == name) {
        // It cannot be refused by its own process, and does not return.
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Does nothing: this daemon has no such points.
#[cfg(not(feature = "kill-points"))]
#[inline]
pub(crate) fn kill_point(_name: &str) {}
