//! Stable names of the state changes that tests, `cairn timeline` and operators wait for.
//!
//! They are `tracing` event names at level INFO with the fields `node`, `view`, `fs`, `jid`, `svc`
//! where they apply. Every name that a driver emits stands here, once.

/// A quorate or inquorate view was delivered. Fields: node, view, members, quorate.
pub const VIEW_INSTALLED: &str = "view_installed";
/// A member was lost without having left. Fields: node (the lost one), incarnation.
pub const NODE_LOST: &str = "node_lost";
/// The quorum disk's master evicted a node. Fields: node.
pub const QDISK_EVICTED: &str = "qdisk_evicted";
/// Fencing of a victim begins. Fields: node, incarnation, method.
pub const FENCE_START: &str = "fence_start";
/// Fencing is proved, ordered, delivered. Fields: node, incarnation, proof.
pub const FENCE_DONE: &str = "fence_done";
/// A fence attempt failed. Fields: node, method, err.
pub const FENCE_FAILED: &str = "fence_failed";
/// A dead mount's journal was replayed. Fields: fs, jid, node.
pub const JOURNAL_REPLAYED: &str = "journal_replayed";
/// The mount stopped itself. Fields: fs, err.
pub const WITHDRAWN: &str = "withdrawn";
/// A mount is in service. Fields: fs, jid.
pub const MOUNTED: &str = "mounted";
/// A mount ended cleanly. Fields: fs, jid.
pub const UNMOUNTED: &str = "unmounted";
/// The permit to write was withdrawn or ran out. Fields: why.
pub const PERMIT_LOST: &str = "permit_lost";
/// A service changed its state. Fields: svc, state, node.
pub const SERVICE_STATE: &str = "service_state";
