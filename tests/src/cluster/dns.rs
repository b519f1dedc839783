//! The cluster's DNS server: CoreDNS, as kubeadm sets it up, in a pod of our own. It has no image here: a container of busybox runs
//! the program that was built from its sources.

use serde_json::{Value, json};

use super::config::DNS;
use super::{Cluster, container};

const COREFILE: &str = ".:53 {
    errors
    health :8080
    ready :8181
    kubernetes cluster.local in-addr.arpa ip6.arpa
    cache 5
}
";

impl Cluster {
    /// Starts it, once, and waits until it is ready.
    pub fn start_dns(&self) {
        if self.at("/apis/apps/v1/namespaces/kube-system/deployments/coredns").is_null() {
            let meta = json!({"name": "coredns", "namespace": "kube-system"});
            let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "coredns"});
            let account = json!([{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}]);
            let look = json!(["list", "watch"]);
            self.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
                {
                    "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "coredns"},
                    "rules": [
                        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": look},
                        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": look},
                    ],
                },
                {
                    "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "coredns"},
                    "roleRef": role, "subjects": account,
                },
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"Corefile": COREFILE}},
                {
                    "apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
                    "spec": {"selector": {"app": "coredns"}, "clusterIP": DNS, "ports": [
                        {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                    ]},
                },
                self.dns_deployment(&meta),
            ]}));
        }
        self.kubectl(["-n", "kube-system", "rollout", "status", "deployment/coredns", super::WAIT]).ok();
    }

    fn dns_deployment(&self, meta: &Value) -> Value {
        let labels = json!({"app": "coredns"});
        let server = container(
            "coredns",
            &json!({
                "command": ["/host/coredns", "-conf", "/etc/coredns/Corefile"],
                "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
                "volumeMounts": [
                    {"name": "config", "mountPath": "/etc/coredns"}, {"name": "program", "mountPath": "/host", "readOnly": true},
                ],
            }),
        );
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta,
            "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "runtimeClassName": "pericarp", "serviceAccountName": "coredns", "dnsPolicy": "Default",
                    "volumes": [
                        {"name": "config", "configMap": {"name": "coredns"}},
                        {"name": "program", "hostPath": {"path": self.tools}},
                    ],
                    "containers": [server],
                },
            }},
        })
    }
}
