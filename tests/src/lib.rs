//! What the end-to-end tests stand on: a node with real components, and an inventory of all that a pod could leave behind.
//!
//! Each file under `tests/` is run inside the lab by `make test`; outside of it a test fails and says so.

mod client;
mod cluster;
mod containerd;
mod front;
mod inventory;
mod late;
mod log_writes;
mod node;
mod terminal;

pub use client::Client;
pub use cluster::{Cluster, Outside, Pod, container};
pub use containerd::{Containerd, RUNTIME, Release};
pub use front::{Fault, Front};
pub use inventory::Inventory;
pub use late::status_of;
pub use log_writes::{Entry, LoggedDisk};
pub use node::{Call, Node, Settings, resident_kib, wait_until};
pub use terminal::Terminal;

/// The images that `tests/lab/images` makes, by the names under which tests pull them.
pub mod image {
    /// Debian's busybox.
    pub const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
    /// Debian's nginx, port 80.
    pub const NGINX: &str = "registry.k8s.io/e2e-test-images/nginx:1.14-2";
    /// Debian's nginx on IPv4 and IPv6, port 80.
    pub const WEB: &str = "registry.k8s.io/pericarp/nginx:latest";
    /// Debian's busybox and curl.
    pub const CLIENT: &str = "registry.k8s.io/pericarp/client:latest";
    /// A few KiB.
    pub const SMALL: &str = "registry.k8s.io/pause:3.9";
}
