//! One run of a plugin: bounded in time and output, and never left behind.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// Most bytes that are read of a plugin's output.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// Most characters of a plugin's own words that are passed on.
const WORDS_LIMIT: usize = 2_000;

/// Kills a plugin and what it started, unless it has ended by itself.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // The leader has not been waited for, so its number is still its own.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

/// Runs a plugin and returns what it printed, or why it failed. Dropping the future kills the plugin.
pub(super) async fn run(mut command: Command, limit: Duration) -> Result<Vec<u8>, String> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| format!("it cannot be started: {e}"))?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = tokio::time::timeout(limit, async {
        let (stdout, stderr) = tokio::join!(read(stdout), read(stderr));
        (child.wait().await, stdout, stderr)
    });
    let Ok((status, stdout, stderr)) = ended.await else {
        let waiting = group.0.map(whereabouts).unwrap_or_default();
        return Err(format!("it did not end within {} s and was killed{waiting}", limit.as_secs()));
    };
    group.0 = None;
    match status {
        Ok(status) if status.success() => Ok(stdout),
        Ok(status) => Err(complaint(&stdout, &stderr).unwrap_or_else(|| format!("{status} without a word"))),
        Err(error) => Err(format!("it cannot be waited for: {error}")),
    }
}

/// What a plugin and the programs that it started wait for, for whoever has to find out why it hangs: each with its name,
/// state and place in the kernel (proc(5), `stat` and `wchan`).
fn whereabouts(leader: Pid) -> String {
    let group = leader.to_string();
    let place = |entry: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name is in parentheses and may hold any character, so the rest is counted from the last one.
        let (head, rest) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1;
        let mut fields = rest.split_whitespace();
        let state = fields.next()?;
        if fields.nth(1)? != group {
            return None;
        }
        let place = std::fs::read_to_string(entry.path().join("wchan")).unwrap_or_default();
        Some(format!("{name} {state} {place}"))
    };
    let found: Vec<String> = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(place).collect();
    if found.is_empty() { String::new() } else { format!("; there were {}", found.join(", ")) }
}

async fn read(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // What was read before an error is still worth showing.
        let _ = stream.take(OUTPUT_LIMIT).read_to_end(&mut bytes).await;
    }
    bytes
}

/// A failed plugin's own words: its error object (CNI spec 1.0 §5, "Error"), or else what it printed.
fn complaint(stdout: &[u8], stderr: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Wire {
        #[serde(default)]
        code: u64,
        msg: String,
        #[serde(default)]
        details: String,
    }
    let words = match serde_json::from_slice::<Wire>(stdout) {
        Ok(Wire { code, msg, details }) if details.is_empty() => format!("{msg} (code {code})"),
        Ok(Wire { code, msg, details }) => format!("{msg}: {details} (code {code})"),
        Err(_) => {
            let text = if stderr.trim_ascii().is_empty() { stdout } else { stderr };
            String::from_utf8_lossy(text.trim_ascii()).into_owned()
        }
    };
    (!words.is_empty()).then(|| words.chars().take(WORDS_LIMIT).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    #[test]
    fn the_plugins_own_words_are_passed_on() {
        let object = br#"{"cniVersion": "1.0.0", "code": 11, "msg": "no free address", "details": "range full"}"#;
        assert_eq!(complaint(object, b"noise").as_deref(), Some("no free address: range full (code 11)"));
        assert_eq!(complaint(br#"{"code": 7, "msg": "bad"}"#, b"").as_deref(), Some("bad (code 7)"));
        assert_eq!(complaint(b"", b"panic: x\n").as_deref(), Some("panic: x"));
        assert_eq!(complaint(b" printed ", b"").as_deref(), Some("printed"));
        assert_eq!(complaint(b"", b""), None);
    }

    #[tokio::test]
    async fn output_and_failures_come_back() {
        let limit = Duration::from_secs(60);
        assert_eq!(run(shell("echo hello"), limit).await, Ok(b"hello\n".to_vec()));
        assert_eq!(run(shell("echo no >&2; exit 1"), limit).await, Err("no".to_owned()));
        assert_eq!(run(shell("exit 3"), limit).await, Err("exit status: 3 without a word".to_owned()));
        let error = run(Command::new("/nonexistent/plugin"), limit).await.expect_err("cannot start");
        assert!(error.contains("cannot be started"), "{error}");
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_its_children() {
        let start = Instant::now();
        let error = run(shell("sleep 600 & sleep 600"), Duration::from_millis(100)).await.expect_err("hangs");
        assert!(error.contains("was killed; there were sh S ") && error.matches("sleep S ").count() == 2, "{error}");
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
