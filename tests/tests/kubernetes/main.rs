//! A whole Kubernetes whose only runtime is Pericarp: one test per promise, all in one cluster.

mod life;
mod network;
mod node;
mod resources;
mod restarts;
mod streams;
mod volumes;
