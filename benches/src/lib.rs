//! Counted benchmarks.
