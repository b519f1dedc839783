//! The node side of Pericarp: pods, images and networks, and the doors through which they are asked for.

pub mod cli;
pub mod spec;
