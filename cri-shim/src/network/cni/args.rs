//! What plugins are told of a pod: `CNI_ARGS` and the values of capabilities (the CNI conventions document).

use serde_json::{Map, Value, json};

use super::CniError;
use crate::spec::PodSpec;

/// Pod annotations that ask for a bandwidth, as the kubelet documents them.
const INGRESS_BANDWIDTH: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS_BANDWIDTH: &str = "kubernetes.io/egress-bandwidth";

/// Burst in bits where only a rate is given: as large as the plugin takes.
const BURST_BITS: u32 = i32::MAX.cast_unsigned();

/// `KEY=value` pairs separated by semicolons, understood by plugins that know Kubernetes.
pub(super) fn cni_args(pod_id: &str, pod: &PodSpec) -> Result<String, CniError> {
    let identity = &pod.identity;
    let pairs = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &identity.namespace),
        ("K8S_POD_NAME", &identity.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod_id),
        ("K8S_POD_UID", &identity.uid),
    ];
    for (_, value) in pairs {
        if value.contains([';', '=', '\0']) {
            let reason = format!("{value:?} cannot be told to CNI plugins: leave out \";\" and \"=\"");
            return Err(CniError::BadRequest(reason));
        }
    }
    Ok(pairs.map(|(key, value)| format!("{key}={value}")).join(";"))
}

/// Every capability that a plugin may have declared, with its value for this pod; none that has nothing to say.
pub(super) fn capabilities(pod: &PodSpec) -> Result<Map<String, Value>, CniError> {
    let mut all = Map::new();
    let ports: Vec<Value> = pod.port_mappings.iter().filter(|port| port.host_port != 0).map(port_mapping).collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), ports.into());
    }
    let mut bandwidth = Map::new();
    for (annotation, direction) in [(INGRESS_BANDWIDTH, "ingress"), (EGRESS_BANDWIDTH, "egress")] {
        if let Some(text) = pod.annotations.get(annotation) {
            let rate = bits_per_second(text).ok_or_else(|| {
                CniError::BadRequest(format!("annotation {annotation}: {text:?} is not a rate such as 10M"))
            })?;
            bandwidth.insert(format!("{direction}Rate"), rate.into());
            bandwidth.insert(format!("{direction}Burst"), BURST_BITS.into());
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".to_owned(), bandwidth.into());
    }
    if let Some(dns) = &pod.dns {
        let value = json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options});
        all.insert("dns".to_owned(), value);
    }
    if !pod.cgroup_parent.is_empty() {
        all.insert("cgroupPath".to_owned(), pod.cgroup_parent.clone().into());
    }
    all.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(pod.annotations));
    Ok(all)
}

fn port_mapping(port: &crate::spec::PortMapping) -> Value {
    let mut value = json!({
        "hostPort": port.host_port,
        "containerPort": port.container_port,
        "protocol": port.protocol.to_lowercase(),
    });
    if let (Some(ip), Some(object)) = (port.host_ip, value.as_object_mut()) {
        object.insert("hostIP".to_owned(), ip.to_string().into());
    }
    value
}

/// A Kubernetes quantity without fractions: digits and a decimal or binary suffix.
fn bits_per_second(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Dns, PodIdentity, PortMapping};

    fn pod() -> PodSpec {
        let identity = PodIdentity { name: "web".into(), namespace: "shop".into(), uid: "u-1".into(), attempt: 0 };
        PodSpec { identity, ..PodSpec::default() }
    }

    #[test]
    fn args_name_the_pod() {
        assert_eq!(
            cni_args("p1", &pod()).expect("valid"),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=u-1"
        );
        let mut evil = pod();
        evil.identity.name = "a;K8S_POD_NAMESPACE=kube-system".into();
        assert!(cni_args("p1", &evil).is_err());
    }

    #[test]
    fn capabilities_carry_only_what_was_asked_for() {
        let all = capabilities(&pod()).expect("valid");
        assert_eq!(all.keys().collect::<Vec<_>>(), ["io.kubernetes.cri.pod-annotations"]);

        let mut pod = pod();
        let port = |host_port, host_ip| PortMapping { protocol: "TCP".into(), container_port: 80, host_port, host_ip };
        pod.port_mappings = vec![port(0, None), port(8080, None), port(8081, Some([127, 0, 0, 1].into()))];
        pod.dns = Some(Dns { servers: vec!["1.1.1.1".into()], ..Dns::default() });
        pod.cgroup_parent = "/kubepods".into();
        pod.annotations.insert(INGRESS_BANDWIDTH.into(), "10M".into());
        let all = capabilities(&pod).expect("valid");
        assert_eq!(
            all["portMappings"],
            json!([
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"},
            ])
        );
        assert_eq!(all["bandwidth"], json!({"ingressRate": 10_000_000, "ingressBurst": 2_147_483_647}));
        assert_eq!(all["dns"], json!({"servers": ["1.1.1.1"], "searches": [], "options": []}));
        assert_eq!(all["cgroupPath"], "/kubepods");

        pod.annotations.insert(EGRESS_BANDWIDTH.into(), "fast".into());
        assert!(capabilities(&pod).is_err());
    }

    #[test]
    fn quantities() {
        for (text, bits) in [("1", Some(1)), ("10M", Some(10_000_000)), ("2Ki", Some(2048)), ("", None), ("M", None)] {
            assert_eq!(bits_per_second(text), bits, "{text}");
        }
        assert_eq!(bits_per_second("99999999999T"), None);
        assert_eq!(bits_per_second("-1"), None);
    }
}
