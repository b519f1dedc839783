//! The cluster's API as tests ask it: by kubectl's proxy and curl, since the start of a kubectl for each object and each look would
//! take the lab's one processor from what is looked at. What people do with kubectl (exec, logs, cp) the tests do with it too.

use std::process::Command;

use serde_json::Value;

use super::{Cluster, PROXY};
use crate::node::run;

/// What a `curl` may take, in seconds.
const LIMIT: &str = "60";

/// Where the objects of a kind are.
fn collection(kind: &str, namespace: &str) -> String {
    let kind = kind.to_ascii_lowercase();
    let (group, namespaced) = match kind.as_str() {
        "configmap" | "persistentvolumeclaim" | "pod" | "resourcequota" | "secret" | "service" | "serviceaccount" => {
            ("api/v1", true)
        }
        "namespace" | "node" | "persistentvolume" => ("api/v1", false),
        "deployment" => ("apis/apps/v1", true),
        "runtimeclass" => ("apis/node.k8s.io/v1", false),
        "clusterrole" | "clusterrolebinding" => ("apis/rbac.authorization.k8s.io/v1", false),
        _ => panic!("{kind}: the tests know no objects of this kind"),
    };
    let plural = if kind.ends_with('s') { "es" } else { "s" };
    let namespace = if namespaced { format!("namespaces/{namespace}/") } else { String::new() };
    format!("/{group}/{namespace}{kind}{plural}")
}

impl Cluster {
    /// The status and the body of an answer; status 0 if there was none.
    fn ask(&self, path: &str, arguments: &[&str]) -> (u16, Value) {
        let url = format!("http://{PROXY}{path}");
        let mut curl = Command::new("curl");
        curl.args(["-sg", "--max-time", LIMIT, "-w", "\n%{http_code}"]).args(arguments).arg(url);
        let said = run(&mut curl).stdout;
        let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
        (status.parse().unwrap_or_default(), serde_json::from_str(body).unwrap_or_default())
    }

    /// What the API has at a path; `Null` if nothing.
    pub fn at(&self, path: &str) -> Value {
        match self.ask(path, &[]) {
            (200, body) => body,
            _ => Value::Null,
        }
    }

    /// An object as it is.
    #[track_caller]
    pub fn object(&self, kind: &str, name: &str) -> Value {
        let object = self.at(&format!("{}/{name}", collection(kind, "default")));
        assert!(!object.is_null(), "there is no {kind} {name}");
        object
    }

    /// Asks for an object to be as written, or several in a `List`; a field that the API does not know is an error.
    #[track_caller]
    pub fn apply(&self, object: &Value) {
        if let Some(items) = object["items"].as_array() {
            return items.iter().for_each(|item| self.apply(item));
        }
        if let Err(refusal) = self.try_apply(object) {
            panic!("{refusal}");
        }
    }

    /// As [`Cluster::apply`], where a refusal is what is asked for.
    pub fn try_apply(&self, object: &Value) -> Result<(), String> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let kind = text("/kind").expect("an object has a kind");
        let name = text("/metadata/name").expect("an object has a name");
        let within = collection(kind, text("/metadata/namespace").unwrap_or("default"));
        let file = format!("@{}", self.write("object.json", &object.to_string()));
        let path = format!("{within}/{name}?fieldManager=tests&force=true&fieldValidation=Strict");
        let header = "Content-Type: application/apply-patch+yaml";
        match self.ask(&path, &["-X", "PATCH", "-H", header, "--data-binary", &file]) {
            (200 | 201, _) => Ok(()),
            (status, body) => Err(format!("{kind} {name}: {status}: {}", body["message"].as_str().unwrap_or_default())),
        }
    }

    /// Removes an object, which is gone then.
    #[track_caller]
    pub fn delete(&self, kind: &str, name: &str) {
        self.start_to_delete(kind, name, "");
        let path = format!("{}/{name}", collection(kind, "default"));
        self.eventually(&format!("{kind} {name} to be gone"), || self.ask(&path, &[]).0 == 404);
    }

    /// Asks for an object's end, without waiting for it; `more` is for the query.
    pub(super) fn start_to_delete(&self, kind: &str, name: &str, more: &str) {
        let path = format!("{}/{name}?propagationPolicy=Background{more}", collection(kind, "default"));
        self.ask(&path, &["-X", "DELETE"]);
    }
}
