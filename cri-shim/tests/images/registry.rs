//! Debian's docker-registry, as a child process on a loopback port with its storage in a directory that goes with it.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// From start to the first answer.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How the registry guards itself.
#[derive(Default)]
pub(crate) struct Options {
    /// `user:bcrypt hash`, as htpasswd(1) writes it.
    pub(crate) htpasswd: Option<String>,
    /// Certificate and key, PEM.
    pub(crate) tls: Option<(String, String)>,
    /// YAML below `auth:`.
    pub(crate) auth: Option<String>,
    /// A storage directory to serve as it is, instead of an empty one.
    pub(crate) storage: Option<PathBuf>,
}

/// A running registry.
pub(crate) struct Registry {
    child: Option<Child>,
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
    pub(crate) dir: TempDir,
}

impl Registry {
    pub(crate) fn start(options: &Options) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|s| s.local_addr()).expect("a port").port();
        let address = format!("127.0.0.1:{port}");
        let config = dir.path().join("config.yml");
        fs::write(&config, options.config(dir.path(), &address)).expect("the configuration is written");
        let mut registry = Self { child: None, address, dir };
        registry.serve();
        registry
    }

    /// Starts it, again if it was killed, and waits until it answers.
    pub(crate) fn serve(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(self.dir.path().join("config.yml"))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("docker-registry starts: install Debian's package docker-registry (tests/lab/prepare does)");
        self.child = Some(child);
        let begun = Instant::now();
        while std::net::TcpStream::connect(&self.address).is_err() {
            assert!(begun.elapsed() < START_LIMIT, "docker-registry does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it, in the middle of whatever it does.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _gone = child.kill();
            let _gone = child.wait();
        }
    }

    /// The file of a blob.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a digest");
        self.dir.path().join(format!("storage/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    /// How many requests for something it has answered.
    pub(crate) fn requests(&self, what: &str) -> usize {
        self.log().lines().filter(|line| line.contains("\"GET ") && line.contains(what)).count()
    }

    /// What it said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Options {
    fn config(&self, dir: &Path, address: &str) -> String {
        let storage = self.storage.clone().unwrap_or_else(|| dir.join("storage"));
        let served = if self.storage.is_some() {
            ", maintenance: {readonly: {enabled: true}, uploadpurging: {enabled: false}}"
        } else {
            ""
        };
        let mut config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}{served}}}\nhttp:\n  addr: {address}\n",
            storage.display()
        );
        if let Some((certificate, key)) = &self.tls {
            fs::write(dir.join("cert.pem"), certificate).expect("written");
            fs::write(dir.join("key.pem"), key).expect("written");
            config += &format!("  tls: {{certificate: {0}/cert.pem, key: {0}/key.pem}}\n", dir.display());
        }
        if let Some(htpasswd) = &self.htpasswd {
            fs::write(dir.join("htpasswd"), htpasswd).expect("written");
            config += &format!("auth:\n  htpasswd: {{realm: test, path: {}/htpasswd}}\n", dir.display());
        }
        if let Some(auth) = &self.auth {
            config += &format!("auth:\n{auth}\n");
        }
        config
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.kill();
    }
}
