//! The node side of Pericarp: pods, images and networks, and the doors through which they are asked for.

pub mod cli;
pub mod error;
pub mod image;
pub mod network;
pub mod pod;
pub mod spec;

pub use error::{Error, Result};
