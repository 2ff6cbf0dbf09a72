//! Where a service may run: the node score of failover domains.
//!
//! | node | unrestricted | restricted |
//! |---|---|---|
//! | offline | 0 | 0 |
//! | no domain | 3 | 3 |
//! | not in domain, no domain member online | 3 | 0 |
//! | not in domain, some domain member online | 1 | 0 |
//! | in domain, a better priority is online | ordered 2 (3 with nofailback if it runs the service), unordered 3 | same |
//! | in domain, best priority online | 3 (2 with nofailback while another online node runs the service) | same |

use cairn_base::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// A `<failoverdomain>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domain {
    pub name: String,
    pub is_ordered: bool,
    pub is_restricted: bool,
    pub has_no_failback: bool,
    /// Node → priority, 1 best … 100.
    pub nodes: BTreeMap<NodeId, u8>,
}

/// 0 illegal … 3 best.
pub fn score(
    domain: Option<&Domain>,
    node: NodeId,
    online: &BTreeSet<NodeId>,
    running_on: Option<NodeId>,
) -> u8 {
    if !online.contains(&node) {
        return 0;
    }
    let Some(d) = domain else { return 3 };
    let member_online = d.nodes.keys().any(|n| online.contains(n));
    let Some(&priority) = d.nodes.get(&node) else {
        return match (d.is_restricted, member_online) {
            (true, _) => 0,
            (false, false) => 3,
            (false, true) => 1,
        };
    };
    let better_online = d.nodes.iter().any(|(n, p)| *p < priority && online.contains(n));
    if better_online && d.is_ordered {
        return if d.has_no_failback && running_on == Some(node) { 3 } else { 2 };
    }
    let runs_elsewhere = running_on.is_some_and(|n| n != node && online.contains(&n));
    if d.has_no_failback && runs_elsewhere { 2 } else { 3 }
}

/// Candidates, best first. Equal scores are ordered by a hash of service and node, which spreads services over nodes and
/// gives every node the same answer.
pub fn candidates(
    service: &str,
    domain: Option<&Domain>,
    online: &BTreeSet<NodeId>,
    running_on: Option<NodeId>,
) -> Vec<(u8, NodeId)> {
    let mut list: Vec<_> = online
        .iter()
        .map(|&n| (score(domain, n, online, running_on), spread(service, n), n))
        .filter(|(s, _, _)| *s > 0)
        .collect();
    list.sort_by(|a, b| b.cmp(a));
    list.into_iter().map(|(s, _, n)| (s, n)).collect()
}

/// FNV-1a over service name and node id.
fn spread(service: &str, node: NodeId) -> u64 {
    service
        .bytes()
        .chain(node.0.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u16]) -> BTreeSet<NodeId> {
        ids.iter().map(|&n| NodeId(n)).collect()
    }

    fn domain(ordered: bool, restricted: bool, nofailback: bool, nodes: &[(u16, u8)]) -> Domain {
        Domain {
            name: "d".into(),
            is_ordered: ordered,
            is_restricted: restricted,
            has_no_failback: nofailback,
            nodes: nodes.iter().map(|&(n, p)| (NodeId(n), p)).collect(),
        }
    }

    #[test]
    fn scores_follow_the_table() {
        let all = set(&[1, 2, 3]);
        let ordered = domain(true, false, false, &[(1, 1), (2, 2)]);
        assert_eq!(score(None, NodeId(9), &all, None), 0, "offline");
        assert_eq!(score(None, NodeId(1), &all, None), 3, "no domain");
        assert_eq!(score(Some(&ordered), NodeId(1), &all, None), 3, "best priority");
        assert_eq!(score(Some(&ordered), NodeId(2), &all, None), 2, "worse priority");
        assert_eq!(score(Some(&ordered), NodeId(3), &all, None), 1, "outside, members online");
        assert_eq!(score(Some(&ordered), NodeId(3), &set(&[3]), None), 3, "outside, none online");
        let restricted = domain(true, true, false, &[(1, 1)]);
        assert_eq!(score(Some(&restricted), NodeId(3), &set(&[3]), None), 0, "restricted");
        let unordered = domain(false, false, false, &[(1, 1), (2, 2)]);
        assert_eq!(score(Some(&unordered), NodeId(2), &all, None), 3, "unordered ignores priority");
    }

    #[test]
    fn nofailback_keeps_the_service_where_it_runs() {
        let all = set(&[1, 2]);
        let d = domain(true, false, true, &[(1, 1), (2, 2)]);
        assert_eq!(score(Some(&d), NodeId(2), &all, Some(NodeId(2))), 3);
        assert_eq!(score(Some(&d), NodeId(1), &all, Some(NodeId(2))), 2);
        assert_eq!(score(Some(&d), NodeId(1), &all, None), 3);
    }

    #[test]
    fn candidates_are_the_same_for_every_node_and_best_first() {
        let all = set(&[1, 2, 3]);
        let d = domain(true, false, false, &[(1, 1), (2, 2)]);
        let order: Vec<_> = candidates("service:web", Some(&d), &all, None).iter().map(|c| c.1.0).collect();
        assert_eq!(order, [1, 2, 3]);
    }
}
