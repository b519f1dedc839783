//! Network configurations on disk (CNI spec 1.0 §1), in the forms that nodes have: lists and single plugins.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CniError;

/// Versions of the protocol whose results look alike.
const VERSIONS: [&str; 6] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "1.1"];

/// Largest configuration file that is read, in bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// A network: plugins to run in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ConfList {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) plugins: Vec<Plugin>,
}

/// One plugin of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Plugin {
    /// Name of its executable.
    pub(super) kind: String,
    /// Capabilities that it declares.
    pub(super) capabilities: Vec<String>,
    /// Its configuration as written, without `capabilities`, which plugins must not see.
    pub(super) conf: Map<String, Value>,
}

impl ConfList {
    pub(super) fn to_json(&self) -> Value {
        let plugins = self.plugins.iter().map(|plugin| Value::Object(plugin.conf.clone())).collect::<Vec<_>>();
        serde_json::json!({"cniVersion": self.version, "name": self.name, "plugins": plugins})
    }
}

/// Loads the lexically first valid configuration of a directory. Files may change at any time, so nothing is kept.
pub(super) fn load(dir: &Path) -> Result<ConfList, CniError> {
    let none = |reason: String| CniError::NoConfiguration { dir: dir.to_owned(), reason };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| none(e.to_string()))? {
        let path = entry.map_err(|e| none(e.to_string()))?.path();
        if path.extension().is_some_and(|e| e == "conflist" || e == "conf" || e == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut reason = "put a .conflist file there".to_owned();
    for path in paths {
        let read = fs::metadata(&path).map_err(|e| e.to_string()).and_then(|metadata| {
            if metadata.len() > FILE_LIMIT {
                return Err(format!("larger than {FILE_LIMIT} bytes"));
            }
            fs::read(&path).map_err(|e| e.to_string())
        });
        match read.and_then(|bytes| parse(&bytes)) {
            Ok(list) => return Ok(list),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "not a valid CNI configuration");
                reason = format!("{}: {error}", path.display());
            }
        }
    }
    Err(none(reason))
}

fn parse(bytes: &[u8]) -> Result<ConfList, String> {
    let mut document: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let text = |document: &Map<String, Value>, key: &str| match document.get(key) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
        _ => Err(format!("{key:?} is missing")),
    };
    let name = text(&document, "name")?;
    let version = text(&document, "cniVersion")?;
    if !VERSIONS.contains(&version.as_str()) {
        return Err(format!("cniVersion {version:?} is not one of {}", VERSIONS.join(", ")));
    }
    let plugins = match document.remove("plugins") {
        Some(Value::Array(plugins)) => plugins,
        Some(_) => return Err("\"plugins\" is not a list".to_owned()),
        // A file of one plugin.
        None => vec![Value::Object(document)],
    };
    if plugins.is_empty() {
        return Err("\"plugins\" is empty".to_owned());
    }
    let plugins = plugins.into_iter().map(parse_plugin).collect::<Result<_, _>>()?;
    Ok(ConfList { name, version, plugins })
}

fn parse_plugin(plugin: Value) -> Result<Plugin, String> {
    let Value::Object(mut conf) = plugin else { return Err("a plugin is not an object".to_owned()) };
    let Some(Value::String(kind)) = conf.get("type") else { return Err("a plugin has no \"type\"".to_owned()) };
    // The name of an executable in a plugin directory, nothing elsewhere.
    if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
        return Err(format!("plugin type {kind:?} is not a file name"));
    }
    let kind = kind.clone();
    let capabilities = match conf.remove("capabilities") {
        Some(Value::Object(declared)) => {
            declared.into_iter().filter(|(_, on)| *on == Value::Bool(true)).map(|(name, _)| name).collect()
        }
        _ => Vec::new(),
    };
    Ok(Plugin { kind, capabilities, conf })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [
        {"type": "bridge", "bridge": "cni0"},
        {"type": "portmap", "capabilities": {"portMappings": true, "dns": false}}]}"#;

    #[test]
    fn a_list_is_read_and_capabilities_are_taken_out() {
        let list = parse(LIST.as_bytes()).expect("valid");
        assert_eq!((list.name.as_str(), list.version.as_str(), list.plugins.len()), ("n", "1.0.0", 2));
        assert_eq!(list.plugins[1].capabilities, ["portMappings"]);
        assert!(!list.plugins[1].conf.contains_key("capabilities"));
        assert_eq!(list.plugins[0].conf["bridge"], "cni0");
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let list = parse(br#"{"cniVersion": "0.4.0", "name": "n", "type": "ptp"}"#).expect("valid");
        assert_eq!((list.plugins.len(), list.plugins[0].kind.as_str()), (1, "ptp"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, complaint) in [
            ("{", "EOF"),
            ("[]", "invalid type"),
            (r#"{"cniVersion": "1.0.0"}"#, "\"name\" is missing"),
            (r#"{"name": "n", "type": "ptp"}"#, "\"cniVersion\" is missing"),
            (r#"{"name": "n", "cniVersion": "0.1.0", "type": "ptp"}"#, "not one of"),
            (r#"{"name": "n", "cniVersion": "1.0.0", "plugins": []}"#, "empty"),
            (r#"{"name": "n", "cniVersion": "1.0.0", "plugins": {}}"#, "not a list"),
            (r#"{"name": "n", "cniVersion": "1.0.0", "plugins": [3]}"#, "not an object"),
            (r#"{"name": "n", "cniVersion": "1.0.0"}"#, "no \"type\""),
            (r#"{"name": "n", "cniVersion": "1.0.0", "type": "../sh"}"#, "not a file name"),
        ] {
            let error = parse(text.as_bytes()).expect_err(text);
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_valid_file_wins() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = load(dir.path()).expect_err("empty").to_string();
        assert!(error.contains("put a .conflist file there"), "{error}");
        fs::write(dir.path().join("00.conflist"), "{}").expect("write");
        fs::write(dir.path().join("10.conflist"), LIST).expect("write");
        fs::write(dir.path().join("05.txt"), LIST.replace("\"n\"", "\"text\"")).expect("write");
        fs::write(dir.path().join("20.conflist"), LIST.replace("\"n\"", "\"later\"")).expect("write");
        assert_eq!(load(dir.path()).expect("valid").name, "n");
        fs::write(dir.path().join("05.conf"), r#"{"cniVersion": "0.4.0", "name": "new", "type": "ptp"}"#)
            .expect("write");
        assert_eq!(load(dir.path()).expect("valid").name, "new");
        assert!(load(&dir.path().join("missing")).is_err());
    }
}
