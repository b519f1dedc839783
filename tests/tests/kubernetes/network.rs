//! Services and addresses, each seen from inside guests: kube-proxy, CoreDNS and the CNI plugins are the real ones.

use std::fs;

use pericarp_tests::{Cluster, Outside, Pod, container, image};
use serde_json::{Value, json};

fn web<'c>(cluster: &'c Cluster, name: &str) -> Pod<'c> {
    Pod::run(cluster, name, &serving(&json!({})))
}

fn serving(more: &Value) -> Value {
    let mut web =
        container("c", &json!({"image": image::WEB, "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 1}}));
    for (key, value) in more.as_object().expect("an object") {
        web[key] = value.clone();
    }
    json!({"containers": [web]})
}

fn client<'c>(cluster: &'c Cluster, name: &str) -> Pod<'c> {
    Pod::run(cluster, name, &json!({"terminationGracePeriodSeconds": 0, "containers": [asking()]}))
}

/// A container that has curl.
fn asking() -> Value {
    container("c", &json!({"image": image::CLIENT, "command": ["sleep", "100000"]}))
}

fn service(cluster: &Cluster, name: &str, app: &str, more: &Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": app}, "ports": [{"port": 8080, "targetPort": 80}]},
    });
    for (key, value) in more.as_object().expect("an object") {
        service["spec"][key] = value.clone();
    }
    cluster.apply(&service);
    cluster.object("service", name)
}

fn url(address: &str, port: u64) -> String {
    if address.contains(':') { format!("http://[{address}]:{port}/") } else { format!("http://{address}:{port}/") }
}

/// Whether nginx answers a guest.
fn answers(from: &Pod, url: &str) -> bool {
    from.exec(&format!("curl -sf --max-time 5 -o /dev/null -w %{{http_code}} '{url}'")).stdout == "200"
}

#[test]
fn services_of_both_families_and_node_ports() {
    let cluster = Cluster::get();
    let mut both = serving(&json!({"name": "web"}));
    both["containers"].as_array_mut().expect("a list").push(asking());
    let (served, client) = (Pod::run(&cluster, "served", &both), client(&cluster, "asks"));
    let made =
        service(&cluster, "served", "served", &json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack"}));
    let addresses = made["spec"]["clusterIPs"].as_array().cloned().unwrap_or_default();
    assert_eq!(addresses.len(), 2, "{made}");
    for address in addresses.iter().filter_map(Value::as_str) {
        cluster.eventually(&format!("service address {address}"), || answers(&client, &url(address, 8080)));
    }
    let port = made["spec"]["ports"][0]["nodePort"].as_u64().expect("a port");
    for address in ["10.9.0.1", "fd00:10:9::1"] {
        cluster.eventually(&format!("node port {port} of {address}, inside"), || answers(&client, &url(address, port)));
        let ask = format!("curl -sf --max-time 5 '{}'", url(address, port));
        cluster.eventually(&format!("node port {port} of {address}, outside"), || Outside::sh(&ask).code == 0);
    }
    // A pod reaches itself by its service, and the cluster's own API.
    let own = url(addresses[0].as_str().expect("text"), 8080);
    cluster.eventually("a pod to reach itself by its service", || answers(&served, &own));
    let api =
        "curl -s --max-time 20 --cacert /var/run/secrets/kubernetes.io/serviceaccount/ca.crt https://10.96.0.1/version";
    assert!(client.sh(api).contains("v1.36.1"));
    cluster.delete("service", "served");
}

#[test]
fn pods_have_addresses_of_both_families() {
    let cluster = Cluster::get();
    let (web, client) = (web(&cluster, "dual"), client(&cluster, "dual-asks"));
    let addresses = web.addresses();
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    for address in &addresses {
        assert!(answers(&client, &url(address, 80)), "{address}");
    }
}

#[test]
fn host_ports_are_the_nodes() {
    let cluster = Cluster::get();
    let _pod = Pod::run(&cluster, "host-port", &serving(&json!({"ports": [{"containerPort": 80, "hostPort": 8088}]})));
    for address in ["10.9.0.1", "fd00:10:9::1"] {
        let ask = format!("curl -sf --max-time 5 '{}'", url(address, 8088));
        cluster.eventually(&format!("host port of {address}"), || Outside::sh(&ask).code == 0);
    }
}

#[test]
fn names_are_found_by_coredns() {
    let cluster = Cluster::get();
    cluster.start_dns();
    let (first, second) = (web(&cluster, "named-0"), web(&cluster, "named-1"));
    for name in ["named-0", "named-1"] {
        cluster.kubectl(["label", "pod", name, "set=named"]).ok();
    }
    let selector = json!({"selector": {"set": "named"}});
    let made = service(&cluster, "one", "none", &selector);
    service(&cluster, "headless", "none", &json!({"selector": {"set": "named"}, "clusterIP": "None"}));
    let client = client(&cluster, "resolves");
    let look = |name: &str| client.exec(&format!("nslookup {name}.default.svc.cluster.local")).stdout;
    let address = made["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    cluster.eventually("a service's name", || look("one").contains(&address));
    let all: Vec<String> =
        [first.addresses(), second.addresses()].into_iter().map(|mut list| list.swap_remove(0)).collect();
    cluster.eventually("the pods of a headless service", || {
        let found = look("headless");
        all.iter().all(|address| found.contains(address))
    });
    // By the search list that the kubelet gives.
    assert!(answers(&client, "http://one:8080/"), "{}", client.sh("cat /etc/resolv.conf"));
    cluster.delete("service", "one");
    cluster.delete("service", "headless");
}

#[test]
fn a_host_outside_sees_the_nodes_address() {
    let cluster = Cluster::get();
    let client = client(&cluster, "goes-out");
    let answer = "while read -r line && [ ${#line} -gt 1 ]; do :; done
                  printf 'HTTP/1.0 200 OK\\r\\n\\r\\n%s' \"$SOCAT_PEERADDR\"\n";
    let answer = format!("EXEC:sh {}", cluster.write("answer", answer));
    for (listen, to, expected) in [
        ("TCP4-LISTEN:7000", format!("http://{}:7000/", Outside::ADDRESS), "10.9.0.1"),
        (
            "TCP6-LISTEN:7001",
            format!("http://[{}]:7001/", Outside::ADDRESS_V6),
            "[fd00:0010:0009:0000:0000:0000:0000:0001]",
        ),
    ] {
        let mut socat = Outside::command("socat");
        let mut socat = socat.args([&format!("{listen},fork,reuseaddr"), &answer]).spawn().expect("socat runs");
        let mut seen = String::new();
        cluster.eventually("an answer from outside", || {
            seen = client.exec(&format!("curl -s --max-time 5 '{to}'")).stdout;
            !seen.is_empty()
        });
        let _ = socat.kill();
        let _ = socat.wait();
        assert_eq!(seen, expected);
    }
}

/// As a network policy engine does it: on the host, at the pod's own veth.
#[test]
fn rules_at_the_hosts_end_of_a_pod_hold() {
    let cluster = Cluster::get();
    let (web, client) = (web(&cluster, "guarded"), client(&cluster, "knocks"));
    let address = web.addresses().swap_remove(0);
    let at = url(&address, 80);
    assert!(answers(&client, &at));
    let link = host_link(&address);
    let nft = |text: &str| {
        let file = cluster.write("rules.nft", text);
        let done = std::process::Command::new("nft").args(["-f", &file]).output().expect("nft is installed");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    nft(&format!(
        "table bridge guard {{ chain forward {{ type filter hook forward priority 0; policy accept; oifname \"{link}\" tcp dport 80 drop; }}; }}"
    ));
    assert!(!answers(&client, &at), "a packet passed that was to be dropped");
    nft("delete table bridge guard");
    assert!(answers(&client, &at), "a packet was dropped that was to pass");
}

/// The veth on the bridge behind which an address is.
fn host_link(address: &str) -> String {
    let run = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program).args(arguments).output().expect("iproute2 is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let neighbour = run("ip", &["neighbour", "show", address]);
    let words: Vec<&str> = neighbour.split_whitespace().collect();
    let mac = words.iter().position(|word| *word == "lladdr").and_then(|at| words.get(at + 1));
    let mac = mac.unwrap_or_else(|| panic!("{neighbour:?}"));
    let table = run("bridge", &["fdb", "show", "br", "cni0"]);
    let line =
        table.lines().find(|line| line.starts_with(mac) && line.contains("veth")).unwrap_or_else(|| panic!("{table}"));
    let link = line.split_whitespace().nth(2).expect("a name").to_owned();
    assert!(fs::exists(format!("/sys/class/net/{link}")).expect("sys is mounted"), "{link}");
    link
}
