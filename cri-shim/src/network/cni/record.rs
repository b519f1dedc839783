//! What is kept of a pod's network: enough to ask every plugin for DEL as it was asked for ADD.
//!
//! `<state>/<pod id>/record.json` is there before the first plugin runs and goes when the last has agreed to DEL.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::CniError;
use super::config::{ConfList, Plugin};

const RECORD: &str = "record.json";
const INPUT: &str = "stdin";

/// How often a lock that a plugin of an earlier daemon holds is tried again.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// All that plugins were told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) netns: PathBuf,
    pub(super) args: String,
    pub(super) capabilities: Map<String, Value>,
    pub(super) list: ConfList,
    /// How many plugins have carried out ADD.
    pub(super) added: usize,
    /// Of the last of them.
    pub(super) result: Option<Value>,
}

impl Record {
    /// What one plugin reads (CNI spec 1.0 §3, "Deriving execution configuration from plugin configuration").
    pub(super) fn conf(&self, plugin: &Plugin) -> Value {
        let mut conf = plugin.conf.clone();
        conf.insert("cniVersion".to_owned(), self.list.version.clone().into());
        conf.insert("name".to_owned(), self.list.name.clone().into());
        let declared = |(name, _): &(&String, &Value)| plugin.capabilities.contains(name);
        let runtime: Map<String, Value> =
            self.capabilities.iter().filter(declared).map(|(name, value)| (name.clone(), value.clone())).collect();
        if !runtime.is_empty() {
            conf.insert("runtimeConfig".to_owned(), runtime.into());
        }
        if let Some(result) = &self.result {
            conf.insert("prevResult".to_owned(), result.clone());
        }
        Value::Object(conf)
    }
}

/// The right to run plugins for one pod, held by a lock on the file that is their standard input.
pub(super) struct Session {
    dir: PathBuf,
    input: File,
}

impl Session {
    /// Puts the record down, before anything is done.
    pub(super) fn begin(state_dir: &Path, pod_id: &str, record: &Record) -> Result<Self, CniError> {
        let dir = state_dir.join(pod_id);
        let failed = |e| CniError::io(format!("keep a record in {}", dir.display()), e);
        fs::create_dir_all(state_dir).map_err(failed)?;
        fs::create_dir(&dir).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => CniError::AlreadyAttached(pod_id.to_owned()),
            _ => failed(e),
        })?;
        let input = open(&dir).map_err(failed)?;
        input.try_lock().map_err(|e| failed(e.into()))?;
        let session = Self { dir, input };
        session.save(record)?;
        Ok(session)
    }

    /// Finds what [`Session::begin`] left and waits, for a while, until no plugin works on it any more.
    pub(super) async fn resume(
        state_dir: &Path,
        pod_id: &str,
        limit: Duration,
    ) -> Result<Option<(Self, Record)>, CniError> {
        let dir = state_dir.join(pod_id);
        let failed = |e| CniError::io(format!("read the record in {}", dir.display()), e);
        let bytes = match fs::read(dir.join(RECORD)) {
            Ok(bytes) => bytes,
            // Without a record no plugin was run.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return forget(&dir).map(|()| None),
            Err(e) => return Err(failed(e)),
        };
        let record = serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))?;
        let deadline = Instant::now() + limit;
        let input = open(&dir).map_err(failed)?;
        loop {
            match input.try_lock() {
                Ok(()) => return Ok(Some((Self { dir, input }, record))),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    tokio::time::sleep(LOCK_INTERVAL).await;
                }
                Err(error) => {
                    let action =
                        format!("wait for a CNI plugin that still works on pod {pod_id}: end it and try again");
                    return Err(CniError::io(action, error.into()));
                }
            }
        }
    }

    /// Replaces the record at one stroke.
    pub(super) fn save(&self, record: &Record) -> Result<(), CniError> {
        let path = self.dir.join(RECORD);
        let next = path.with_extension("new");
        let save = || {
            fs::write(&next, serde_json::to_vec(record)?)?;
            fs::rename(&next, &path)
        };
        save().map_err(|e| CniError::io(format!("write {}", path.display()), e))
    }

    /// A standard input that holds `conf`; it carries the lock.
    pub(super) fn input(&mut self, conf: &Value) -> Result<Stdio, CniError> {
        let mut fill = || {
            self.input.set_len(0)?;
            self.input.rewind()?;
            self.input.write_all(&serde_json::to_vec(conf)?)?;
            self.input.rewind()?;
            self.input.try_clone()
        };
        fill().map(Stdio::from).map_err(|e| CniError::io("write a plugin's input", e))
    }

    /// Forgets the pod.
    pub(super) fn end(self) -> Result<(), CniError> {
        forget(&self.dir)
    }
}

fn open(dir: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(INPUT))
}

fn forget(dir: &Path) -> Result<(), CniError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CniError::io(format!("remove {}", dir.display()), e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Read;

    fn record() -> Record {
        let plugin = |kind: &str, capabilities: &[&str]| Plugin {
            kind: kind.to_owned(),
            capabilities: capabilities.iter().map(|&c| c.to_owned()).collect(),
            conf: json!({"type": kind}).as_object().cloned().unwrap_or_default(),
        };
        let list = ConfList {
            name: "net".into(),
            version: "1.0.0".into(),
            plugins: vec![plugin("bridge", &[]), plugin("portmap", &["portMappings"])],
        };
        let capabilities = json!({"portMappings": [1], "dns": {}}).as_object().cloned().unwrap_or_default();
        Record { netns: "/run/x".into(), args: "A=b".into(), capabilities, list, added: 0, result: None }
    }

    #[test]
    fn a_plugin_reads_what_it_declared_and_the_result_before_it() {
        let mut record = record();
        assert_eq!(
            record.conf(&record.list.plugins[0]),
            json!({"type": "bridge", "cniVersion": "1.0.0", "name": "net"})
        );
        record.result = Some(json!({"ips": []}));
        assert_eq!(
            record.conf(&record.list.plugins[1]),
            json!({
                "type": "portmap", "cniVersion": "1.0.0", "name": "net",
                "runtimeConfig": {"portMappings": [1]}, "prevResult": {"ips": []},
            })
        );
    }

    #[tokio::test]
    async fn a_record_is_found_again_and_the_lock_travels_with_the_input() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut session = Session::begin(dir.path(), "p", &record()).expect("begin");
        assert!(matches!(Session::begin(dir.path(), "p", &record()), Err(CniError::AlreadyAttached(_))));

        // A plugin that outlives the daemon.
        let input = session.input(&json!({"name": "net"})).expect("input");
        let mut plugin = std::process::Command::new("/bin/sh")
            .args(["-c", "cat; exec sleep 600"])
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn");
        drop(session);
        let mut said = [0; 14];
        plugin.stdout.take().expect("piped").read_exact(&mut said).expect("read");
        assert_eq!(&said, b"{\"name\":\"net\"}");
        let busy = Session::resume(dir.path(), "p", Duration::from_millis(60)).await;
        assert!(busy.is_err_and(|e| e.to_string().contains("still works on pod p")));
        plugin.kill().expect("kill");
        plugin.wait().expect("wait");

        let (again, found) =
            Session::resume(dir.path(), "p", Duration::from_secs(60)).await.expect("ok").expect("there");
        assert_eq!(found, record());
        again.end().expect("end");
        assert!(Session::resume(dir.path(), "p", Duration::ZERO).await.expect("ok").is_none());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[tokio::test]
    async fn a_crash_before_the_record_leaves_nothing_to_do() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("p")).expect("mkdir");
        assert!(Session::resume(dir.path(), "p", Duration::ZERO).await.expect("ok").is_none());
        assert!(!dir.path().join("p").exists());
    }
}
