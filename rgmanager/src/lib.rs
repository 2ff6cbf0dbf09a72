//! Service manager: keeps each service running on at most one node, and only where its storage is safe.
//!
//! All nodes run the same replicated state machine ([`core::Core`]) over totally ordered group messages, so they agree on
//! every service's record without a lock. Only the owner named by a record runs agents, and a record changes its owner
//! only through an ordered `Claim` of a service that is stopped, or whose owner is proven fenced.
//!
//! ```text
//!   cluster.conf <rm> ── config ──► tree (what, in which order)   place (where)
//!                                      │                             │
//!   group "rgmanager", Fenced, views ──► core (step) ──► run start/stop/status ──► agent (processes)
//! ```
//!
//! Source of states, texts and orders: rgmanager of RHEL 5 and 6 (its sources and manual pages).

pub mod agent;
pub mod config;
pub mod core;
pub mod driver;
pub mod place;
pub mod record;
pub mod tree;

pub use config::{ConfigError, RmConfig};
pub use record::{Record, ServiceState};
