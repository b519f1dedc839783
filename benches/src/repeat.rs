//! Measuring again and again.

use anyhow::{Context, Result};

/// Runs before those that count: they fill page caches, and have the lab kernel patch itself.
const WARM_UPS: usize = 2;

/// Runs that may fail before the benchmark does; each that does is shown.
const FAILURES: usize = 3;

/// What `runs` runs measured, warm-ups left out.
pub(crate) async fn repeat<T>(what: &str, runs: usize, mut once: impl AsyncFnMut() -> Result<T>) -> Result<Vec<T>> {
    let mut measured = Vec::new();
    let mut failures = 0;
    while measured.len() < WARM_UPS + runs {
        match once().await {
            Ok(figures) => measured.push(figures),
            Err(error) if failures < FAILURES => {
                failures += 1;
                println!("{what}: a run failed and is repeated: {error:#}");
            }
            Err(error) => return Err(error).context(what.to_owned()),
        }
    }
    Ok(measured.split_off(WARM_UPS))
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn run(failing: &[usize]) -> Result<Vec<usize>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut count = 0;
        runtime.block_on(repeat("it", 3, async || {
            count += 1;
            if failing.contains(&count) { bail!("run {count}") } else { Ok(count) }
        }))
    }

    #[test]
    fn warm_ups_and_a_few_failures_do_not_count() {
        assert_eq!(run(&[]).unwrap(), [3, 4, 5]);
        assert_eq!(run(&[1, 4]).unwrap(), [5, 6, 7]);
        assert!(run(&[1, 2, 3, 4]).is_err());
    }
}
