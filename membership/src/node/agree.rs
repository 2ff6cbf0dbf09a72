//! What node cores say to each other: ordered messages, and each one's part of the synchronisation round.

use super::NodeAction;
use crate::event::RingId;
use crate::fence::domain::{self, DomainMerged, DomainMsg, DomainSync};
use crate::groups::Agreed;
use bytes::Bytes;
use cairn_base::{NodeId, Proc};
use qdisk::ViewName;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Ordered messages between node cores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum NodeMsg {
    Domain(DomainMsg),
    /// The sender has installed this view.
    Installed(ViewName),
    /// The sender has recorded it.
    Recorded(ViewName),
    /// An evicted life is out of the view: the electorate may shrink to what is there.
    Shrink(Proc),
    Expected(u32),
    /// That life must stop.
    Kill(Proc),
    /// A mount process of the sender's node must end without a leave. Comes before its groups hear of it.
    MountDying {
        client: u32,
        fs: String,
    },
    /// The mount process of the sender's node is gone, its I/O done.
    MountGone {
        client: u32,
        fs: String,
    },
}

/// A node's part of the synchronisation round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct NodeSync {
    /// The last view that was installed here.
    pub(super) past: RingId,
    pub(super) expected: u32,
    pub(super) effective: u32,
    pub(super) all_seen: bool,
    pub(super) config_version: u32,
    pub(super) domain: DomainSync,
    /// Mount processes of this node that are ending.
    pub(super) dying: Vec<(u32, String)>,
    /// The newest recorded view that this node knows of, and those that its state includes.
    pub(super) last: ViewName,
    pub(super) included: Vec<ViewName>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct NodeMerged {
    /// All come from the same view, so that what they agreed on still holds.
    pub(super) same_past: bool,
    pub(super) expected: u32,
    pub(super) effective: u32,
    pub(super) all_seen: bool,
    /// Nodes whose configuration is not the newest among us.
    pub(super) outdated: Vec<NodeId>,
    pub(super) domain: DomainMerged,
    pub(super) dying: BTreeMap<(Proc, u32), String>,
    pub(super) last: ViewName,
    /// What the states of those who go on include.
    pub(super) included: BTreeSet<ViewName>,
    /// Lives with state that does not include the last recorded view.
    pub(super) passed_by: BTreeSet<Proc>,
}

/// The merge function for `Groups`. A part that does not decode (another version) is as if the node knew nothing.
pub fn merge(_ring: &RingId, ring_parts: &[(crate::event::Member, Bytes)]) -> Agreed {
    let parts: Vec<(Proc, NodeSync)> = ring_parts
        .iter()
        .filter_map(|(m, bytes)| postcard::from_bytes(bytes).ok().map(|sync| (m.proc(), sync)))
        .collect();
    let newest = parts.iter().map(|(_, s)| s.config_version).max().unwrap_or(0);
    let last = parts.iter().map(|(_, s)| s.last).max().unwrap_or(ViewName::NONE);
    let is_passed_by =
        |s: &NodeSync| s.domain.state.formed && last != ViewName::NONE && !s.included.contains(&last);
    let passed_by: BTreeSet<Proc> = parts.iter().filter(|(_, s)| is_passed_by(s)).map(|(p, _)| *p).collect();
    let dying = parts.iter().flat_map(|(p, s)| s.dying.iter().map(|(c, fs)| ((*p, *c), fs.clone())));
    let merged = NodeMerged {
        same_past: parts.windows(2).all(|w| w[0].1.past == w[1].1.past),
        expected: parts.iter().map(|(_, s)| s.expected).max().unwrap_or(0),
        effective: parts.iter().map(|(_, s)| s.effective).max().unwrap_or(0),
        all_seen: parts.iter().any(|(_, s)| s.all_seen),
        outdated: parts.iter().filter(|(_, s)| s.config_version < newest).map(|(p, _)| p.node).collect(),
        domain: domain::merge(parts.iter().map(|(p, s)| (p.node, &s.domain)), &passed_by),
        dying: dying.collect(),
        last,
        included: parts
            .iter()
            .filter(|(p, _)| !passed_by.contains(p))
            .flat_map(|(_, s)| s.included.iter().copied())
            .collect(),
        passed_by,
    };
    let excluded = ring_parts
        .iter()
        .map(|(m, _)| m.proc())
        .filter(|p| {
            merged.outdated.contains(&p.node)
                || merged.passed_by.contains(p)
                || merged.domain.state.is_excluded(*p)
        })
        .collect();
    Agreed { state: postcard::to_stdvec(&merged).unwrap_or_default(), excluded }
}

/// An ordered message of this node.
pub(super) fn send(msg: &NodeMsg, safe: bool, out: &mut Vec<NodeAction>) {
    let data = postcard::to_stdvec(msg).expect("a message of our own always encodes");
    out.push(NodeAction::Service { safe, data: data.into() });
}
