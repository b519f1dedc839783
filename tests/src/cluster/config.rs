//! What the parts of a one-node cluster are told: as a person would who follows Kubernetes' own documents.

use std::path::Path;

use serde_json::{Value, json};

use super::{ADDRESS, ADDRESS_V6, NODE};

const PKI: &str = "/etc/kubernetes/pki";
const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/112";
/// As in deploy/10-pericarp.conflist.
const PODS: &str = "10.88.0.0/16,fd00:10:88::/64";
/// The address of the cluster's DNS server.
pub(super) const DNS: &str = "10.96.0.10";

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Of `kubeadm init phase`; elliptic keys, since the lab takes long to find primes.
pub(super) fn kubeadm(socket: &Path) -> String {
    let init = json!({
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": ADDRESS, "bindPort": 6443},
        "nodeRegistration": {"name": NODE, "criSocket": format!("unix://{}", socket.display())},
    });
    let cluster = json!({
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "ClusterConfiguration",
        "kubernetesVersion": "v1.36.1",
        "encryptionAlgorithm": "ECDSA-P256",
        "networking": {"serviceSubnet": SERVICES, "podSubnet": PODS},
    });
    format!("{init}\n---\n{cluster}\n")
}

pub(super) fn etcd() -> Vec<String> {
    words(
        "--data-dir /var/lib/etcd/data --listen-client-urls http://127.0.0.1:2379
         --advertise-client-urls http://127.0.0.1:2379",
    )
}

/// Sizes of lists are estimated by reads that Debian's etcd, which is older, lets time out one after the other.
pub(super) fn apiserver() -> Vec<String> {
    words(&format!(
        "--feature-gates=SizeBasedListCostEstimate=false
         --etcd-servers=http://127.0.0.1:2379 --secure-port=6443 --advertise-address={ADDRESS} --allow-privileged=true
         --service-cluster-ip-range={SERVICES} --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction
         --client-ca-file={PKI}/ca.crt --tls-cert-file={PKI}/apiserver.crt --tls-private-key-file={PKI}/apiserver.key
         --kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt
         --kubelet-client-key={PKI}/apiserver-kubelet-client.key
         --service-account-issuer=https://kubernetes.default.svc.cluster.local
         --service-account-key-file={PKI}/sa.pub --service-account-signing-key-file={PKI}/sa.key"
    ))
}

pub(super) fn controller_manager() -> Vec<String> {
    words(&format!(
        "--kubeconfig=/etc/kubernetes/controller-manager.conf --leader-elect=false --use-service-account-credentials
         --service-account-private-key-file={PKI}/sa.key --root-ca-file={PKI}/ca.crt"
    ))
}

pub(super) fn scheduler() -> Vec<String> {
    words("--kubeconfig=/etc/kubernetes/scheduler.conf --leader-elect=false")
}

/// The kubelet's defaults but for what says where things are; `more` is what a test has otherwise.
pub(super) fn kubelet(socket: &Path, more: &Value) -> String {
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        "containerRuntimeEndpoint": format!("unix://{}", socket.display()),
        "clusterDNS": [DNS],
        "clusterDomain": "cluster.local",
    });
    crate::node::merge(&mut config, more);
    config.to_string()
}

/// How a kubelet knows who asks it, in a cluster.
pub(super) fn kubelet_authentication() -> Value {
    json!({
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{PKI}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
    })
}

pub(super) fn kubelet_arguments(file: &Path) -> Vec<String> {
    words(&format!(
        "--config={} --kubeconfig=/etc/kubernetes/kubelet.conf --hostname-override={NODE} --node-ip={ADDRESS},{ADDRESS_V6}",
        file.display()
    ))
}

/// kube-proxy runs beside the kubelet: a DaemonSet of it wants the host's network, which a pod in a VM does not have.
pub(super) fn proxy() -> String {
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": PODS,
        "hostnameOverride": NODE,
        "clientConnection": {"kubeconfig": "/etc/kubernetes/super-admin.conf"},
        "conntrack": {"maxPerCore": 0},
    });
    config.to_string()
}
