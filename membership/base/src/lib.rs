//! Words that every crate of Cairn shares: identities, time, seeded randomness, event names.
//!
//! Nothing here does I/O, reads a clock or draws entropy: time and randomness come in through the
//! door (`Boottime` values and [`Rng`] seeds are given by drivers or by the simulator).

#![forbid(unsafe_code)]

pub mod events;
pub mod exit;
mod rng;
mod time;

pub use rng::Rng;
pub use time::Boottime;

use serde::{Deserialize, Serialize};
use std::fmt;

/// Id of a cluster node as written in cluster.conf: 1…4096 (1…16 with a quorum disk). 0 means "none".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct NodeId(pub u16);

/// One life of a node (or of a mount on it): strictly rising per node id. A restarted node is another node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

/// Number of a quorate view; totally ordered over the life of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ViewId(pub u64);

/// A node in one of its lives: the unit that is fenced.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Proc {
    pub node: NodeId,
    pub incarnation: Incarnation,
}

macro_rules! show {
    ($t:ident, $p:literal) => {
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($p, "{}"), self.0)
            }
        }
    };
}
show!(NodeId, "n");
show!(Incarnation, "i");
show!(ViewId, "v");

impl fmt::Display for Proc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node.0, self.incarnation.0)
    }
}
impl fmt::Debug for Proc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
