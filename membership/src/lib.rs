//! Membership, quorum and fencing: cluster.conf, timing, the Totem ring, process groups, the fence domain, and the node
//! runtime `cairnd` with its local protocol and client library.

pub mod alive;
pub mod client;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod event;
pub mod fence;
pub mod groups;
pub mod ipc;
pub mod log;
pub mod node;
pub mod permit;
pub mod quorum;
pub mod ring;
pub mod sim;
pub mod stack;
pub mod timing;
