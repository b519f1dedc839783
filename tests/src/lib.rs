//! End-to-end tests; each file under `tests/` is one.
