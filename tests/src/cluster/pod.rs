//! A pod of the cluster, which goes when it is dropped.

use std::fs;

use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Cluster, is_ready};
use crate::image;
use crate::node::{Call, merge};

/// A pod that this test made.
#[derive(Debug)]
pub struct Pod<'c> {
    cluster: &'c Cluster,
    /// Its name, in the default namespace.
    pub name: String,
    kept: bool,
}

impl<'c> Pod<'c> {
    /// Makes a pod of the class `pericarp` with one container `c`, which sleeps unless `spec` says otherwise.
    #[track_caller]
    pub fn create(cluster: &'c Cluster, name: &str, spec: &Value) -> Self {
        Self::create_with(cluster, name, &Value::Null, spec)
    }

    /// As [`Pod::create`], with metadata of its own.
    #[track_caller]
    pub fn create_with(cluster: &'c Cluster, name: &str, metadata: &Value, spec: &Value) -> Self {
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "runtimeClassName": "pericarp",
                "terminationGracePeriodSeconds": 2,
                "containers": [container("c", &Value::Null)],
            },
        });
        merge(&mut pod["metadata"], metadata);
        merge(&mut pod["spec"], spec);
        cluster.apply(&pod);
        Self { cluster, name: name.to_owned(), kept: false }
    }

    /// One that is there already.
    pub fn known(cluster: &'c Cluster, name: &str) -> Self {
        Self { cluster, name: name.to_owned(), kept: false }
    }

    /// Leaves it where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// As [`Pod::create`], and waits until it is ready.
    #[track_caller]
    pub fn run(cluster: &'c Cluster, name: &str, spec: &Value) -> Self {
        let pod = Self::create(cluster, name, spec);
        pod.ready();
        pod
    }

    /// Waits until it is ready.
    #[track_caller]
    pub fn ready(&self) {
        self.wait_for("to be ready", is_ready);
    }

    /// Waits until it has ended well.
    #[track_caller]
    pub fn succeeded(&self) {
        self.wait_for("to have ended well", |status| status["phase"] == "Succeeded");
    }

    #[track_caller]
    fn wait_for(&self, what: &str, is_so: impl Fn(&Value) -> bool) {
        let mut status = Value::Null;
        self.cluster.eventually(&format!("{} {what}", self.name), || {
            status = self.object()["status"].clone();
            is_so(&status) || status["phase"] == "Failed"
        });
        assert!(is_so(&status), "{}: {status}\n{}", self.name, self.events());
    }

    /// As it is now.
    #[track_caller]
    pub fn object(&self) -> Value {
        self.cluster.at(&format!("/api/v1/namespaces/default/pods/{}", self.name))
    }

    /// Its uid, by which its cgroup is named.
    #[track_caller]
    pub fn uid(&self) -> String {
        self.object()["metadata"]["uid"].as_str().expect("a pod has a uid").to_owned()
    }

    /// Its VMM.
    #[track_caller]
    pub fn vmm_pid(&self) -> Pid {
        let uid = self.uid();
        let pids = fs::read_dir("/proc").expect("proc is mounted").flatten();
        let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_it = |pid: &i32| {
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            read("cmdline").contains("pericarp-vmm") && read("cgroup").contains(&uid)
        };
        Pid::from_raw(pids.find(is_it).unwrap_or_else(|| panic!("no VMM of {}", self.name)))
    }

    /// Its address of IPv4, and then that of IPv6.
    #[track_caller]
    pub fn addresses(&self) -> Vec<String> {
        let object = self.object();
        let list = object["status"]["podIPs"].as_array().cloned().unwrap_or_default();
        list.iter().filter_map(|entry| Some(entry["ip"].as_str()?.to_owned())).collect()
    }

    /// The status of one of its containers.
    #[track_caller]
    pub fn container(&self, name: &str) -> Value {
        let object = self.object();
        let lists = ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"];
        let all = lists.iter().filter_map(|list| object["status"][list].as_array()).flatten();
        all.into_iter().find(|status| status["name"] == name).cloned().unwrap_or(Value::Null)
    }

    /// Runs a shell script in its first container.
    pub fn exec(&self, script: &str) -> Call {
        self.cluster.kubectl(["exec", &self.name, "-c", "c", "--", "sh", "-c", script])
    }

    /// The standard output of a script that must work.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.exec(script).ok()
    }

    /// What a container has logged.
    pub fn logs(&self, more: &[&str]) -> String {
        self.cluster.kubectl(["logs", &self.name].iter().chain(more).copied()).ok()
    }

    /// What events say of it, one a line: reason, then message.
    pub fn events(&self) -> String {
        let path = "/api/v1/namespaces/default/events?fieldSelector=involvedObject.name=";
        let list = self.cluster.at(&format!("{path}{}", self.name));
        let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let events = list["items"].as_array().into_iter().flatten();
        events.map(|event| format!("{}: {}\n", text(event, "reason"), text(event, "message"))).collect()
    }

    /// Removes it, and waits until it is gone.
    #[track_caller]
    pub fn remove(self) {
        self.cluster.delete("pod", &self.name);
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        self.cluster.start_to_delete("pod", &self.name, "&gracePeriodSeconds=1");
    }
}

/// A container of busybox that sleeps and ends when it is asked to, `more` merged into it; one of another image does what
/// that image does.
pub fn container(name: &str, more: &Value) -> Value {
    let mut container = json!({"name": name, "image": image::BUSYBOX, "imagePullPolicy": "IfNotPresent"});
    if more["image"].is_null() {
        container["command"] = json!(["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]);
    }
    merge(&mut container, more);
    container
}
