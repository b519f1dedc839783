//! Compares `proto/cri.proto` with the reference, name by name and number by number, and with what docs/conformance.md
//! says of each field of a request.
//!
//! The reference comes from the Go module k8s.io/cri-api, as `go mod download` fetches and verifies it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use prost_types::field_descriptor_proto::Label;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

const REFERENCE: &str = "k8s.io/cri-api@v0.36.1";

/// Everything that goes over the wire, each thing as a line, by its full name.
type Facts = BTreeMap<String, String>;

#[test]
fn every_call_message_and_field_is_the_references() {
    let module = download();
    let reference = facts(&module.join("pkg/apis/runtime/v1"), "api.proto");
    let ours = facts(&Path::new(env!("CARGO_MANIFEST_DIR")).join("proto"), "cri.proto");
    let calls = |facts: &Facts| facts.keys().filter(|name| name.starts_with("call ")).count();
    assert_eq!(calls(&reference), 41);
    let missing: Vec<_> = reference.iter().filter(|fact| ours.get(fact.0) != Some(fact.1)).collect();
    let extra: Vec<_> = ours.iter().filter(|fact| reference.get(fact.0) != Some(fact.1)).collect();
    assert!(missing.is_empty() && extra.is_empty(), "only in the reference: {missing:#?}\nonly in ours: {extra:#?}");
}

#[test]
fn the_documentation_speaks_of_every_field_of_a_request() {
    let FileDescriptorSet { file } =
        protox::compile(["cri.proto"], [Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")]).expect("it compiles");
    let file = file.first().expect("one file");
    let simple = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let messages: BTreeMap<&str, &DescriptorProto> = file.message_type.iter().map(|m| (m.name(), m)).collect();
    let documented = documented();
    let mut seen = BTreeSet::new();
    let mut queue: Vec<String> =
        file.service.iter().flat_map(|service| &service.method).map(|method| simple(method.input_type())).collect();
    while let Some(name) = queue.pop() {
        // Refused as a whole.
        if name.starts_with("Windows") || !seen.insert(name.clone()) {
            continue;
        }
        for field in messages.get(name.as_str()).expect("a message of the file").field.iter() {
            let row = documented.get(&name).unwrap_or_else(|| panic!("no row for {name}"));
            assert!(row.contains(field.name()), "{name}.{} is not in its row", field.name());
            let kind = simple(field.type_name());
            if messages.contains_key(kind.as_str()) {
                queue.push(kind);
            }
        }
    }
    let strangers: Vec<_> = documented.keys().filter(|name| !seen.contains(*name)).collect();
    assert!(strangers.is_empty(), "rows for what no request has: {strangers:?}");
}

/// Fields by message, from the table's rows: "| `Message`, `Message` | `field` … |".
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    let text = std::fs::read_to_string(path).expect("the document is there");
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<BTreeSet<_>>();
    let mut rows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let (names, fields) = line.trim_start_matches("| ").split_once('|').expect("a table has columns");
        for name in quoted(names) {
            rows.entry(name).or_default().extend(quoted(fields));
        }
    }
    rows
}

fn download() -> PathBuf {
    let output = Command::new("go")
        .args(["mod", "download", "-json", REFERENCE])
        .current_dir(std::env::temp_dir())
        .output()
        .expect("Go is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    answer["Dir"].as_str().expect("a directory").into()
}

fn facts(dir: &Path, file: &str) -> Facts {
    let FileDescriptorSet { file } = protox::compile([file], [dir]).expect("it compiles");
    let mut facts = Facts::new();
    for FileDescriptorProto { package, service, message_type, enum_type, .. } in file {
        let package = package.unwrap_or_default();
        assert_eq!(package, "runtime.v1");
        for service in service {
            for method in &service.method {
                let streams = (method.client_streaming(), method.server_streaming());
                let fact = format!("{} -> {} {streams:?}", method.input_type(), method.output_type());
                facts.insert(format!("call {}/{}", service.name(), method.name()), fact);
            }
        }
        message_type.iter().for_each(|message| message_facts(message, &package, &mut facts));
        enum_type.iter().for_each(|values| enum_facts(values, &package, &mut facts));
    }
    facts
}

fn message_facts(message: &DescriptorProto, scope: &str, facts: &mut Facts) {
    let name = format!("{scope}.{}", message.name());
    facts.insert(format!("message {name}"), String::new());
    for field in &message.field {
        let repeated = field.label() == Label::Repeated;
        let fact = format!(
            "{} = {} {:?} {} repeated: {repeated} oneof: {:?} optional: {}",
            field.name(),
            field.number(),
            field.r#type(),
            field.type_name(),
            field.oneof_index,
            field.proto3_optional()
        );
        facts.insert(format!("field {name}.{}", field.number()), fact);
    }
    message.nested_type.iter().for_each(|nested| message_facts(nested, &name, facts));
    message.enum_type.iter().for_each(|values| enum_facts(values, &name, facts));
}

fn enum_facts(values: &EnumDescriptorProto, scope: &str, facts: &mut Facts) {
    for value in &values.value {
        let name = format!("value {scope}.{}.{}", values.name(), value.name());
        facts.insert(name, value.number().to_string());
    }
}
