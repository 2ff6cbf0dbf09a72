//! The synchronisation round of one ring, and the merge that all members compute alike.

use super::wire::GroupReport;
use super::{Agreed, GroupState, MAX_MEMBERS, MergeFn};
use crate::event::{GroupEntry, GroupMember, GroupName, Member, Reason, RingId};
use bytes::Bytes;
use cairn_base::Proc;
use std::collections::{BTreeMap, BTreeSet};

pub(super) struct Round {
    pub(super) ring: RingId,
    pub(super) members: Vec<Member>,
    pub(super) state_sent: bool,
    pub(super) floor: u64,
    /// Who says that it was apart from whom.
    pub(super) apart: BTreeSet<(Proc, Proc)>,
    pub(super) states: BTreeMap<Proc, (Vec<GroupReport>, Bytes)>,
    pub(super) result: Option<Merged>,
    pub(super) barriers: BTreeMap<Proc, u64>,
    pub(super) installed: bool,
}

pub(super) struct Merged {
    pub(super) groups: BTreeMap<GroupName, GroupState>,
    /// Groups whose members are to see a new view.
    pub(super) changed: Vec<GroupName>,
    pub(super) floor: u64,
    pub(super) service: Bytes,
    pub(super) excluded: BTreeSet<Proc>,
    pub(super) digest: u64,
}

impl Round {
    pub(super) fn new(ring: RingId, members: Vec<Member>) -> Self {
        Self {
            ring,
            members,
            state_sent: false,
            floor: 0,
            apart: BTreeSet::new(),
            states: BTreeMap::new(),
            result: None,
            barriers: BTreeMap::new(),
            installed: false,
        }
    }

    /// A function of the states alone.
    pub(super) fn merge(&self, merge: &MergeFn) -> Merged {
        let parts: Vec<(Member, Bytes)> =
            self.members.iter().map(|m| (*m, self.states[&m.proc()].1.clone())).collect();
        let Agreed { state: service, excluded } = merge(&self.ring, &parts);
        let service = Bytes::from(service);
        let mut groups: BTreeMap<GroupName, GroupState> = BTreeMap::new();
        let mut believed: BTreeMap<GroupName, BTreeSet<(u64, &[(GroupMember, u64)])>> = BTreeMap::new();
        for (p, (reports, _)) in &self.states {
            for r in reports {
                let g = groups.entry(r.name.clone()).or_default();
                g.view_no = g.view_no.max(r.view_no);
                // Each node speaks for its own clients only, and one whose life is over for none.
                if !excluded.contains(p) {
                    g.members.extend(r.own.iter().filter(|e| e.member.proc() == *p).cloned());
                }
                believed.entry(r.name.clone()).or_default().insert((r.view_no, &r.believed));
            }
        }
        let mut changed = Vec::new();
        let mut floor = self.floor;
        groups.retain(|name, g| {
            g.members.sort_by_key(|e| e.member);
            g.members.dedup_by_key(|e| e.member);
            g.members.truncate(MAX_MEMBERS);
            let now: Vec<(GroupMember, u64)> = brief(&g.members);
            let same = believed[name].iter().all(|&(no, list)| no == g.view_no && list == now);
            let apart = g
                .members
                .iter()
                .any(|a| g.members.iter().any(|b| self.apart.contains(&(a.member.proc(), b.member.proc()))));
            let same = same && !apart;
            if !same {
                g.view_no += 1;
                changed.push(name.clone());
            }
            if g.members.is_empty() {
                floor = floor.max(g.view_no);
            }
            !g.members.is_empty()
        });
        let list: Vec<_> = groups.iter().map(|(n, g)| (n, g.view_no, &g.members)).collect();
        let bytes =
            postcard::to_stdvec(&(&self.ring, floor, list)).expect("invariant: plain data into memory");
        let digest = digest(&[&bytes, &service]);
        Merged { groups, changed, floor, service, excluded, digest }
    }
}

fn brief(list: &[GroupEntry]) -> Vec<(GroupMember, u64)> {
    list.iter().map(|e| (e.member, e.join_no)).collect()
}

/// FNV-1a: finds programming errors, defends against nobody.
fn digest(parts: &[&[u8]]) -> u64 {
    let bytes = parts.iter().flat_map(|p| p.iter());
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

pub(super) fn my_groups(groups: &BTreeMap<GroupName, GroupState>, me: Proc) -> Vec<GroupReport> {
    let report = |(name, g): (&GroupName, &GroupState)| GroupReport {
        name: name.clone(),
        view_no: g.view_no,
        believed: brief(&g.members),
        own: g.members.iter().filter(|e| e.member.proc() == me).cloned().collect(),
    };
    groups.iter().map(report).collect()
}

/// Joined and left, from one list to the next. Who left and joined again in between is in both.
pub(super) fn difference(
    old: &[GroupEntry],
    new: &[GroupEntry],
) -> (Vec<GroupMember>, Vec<(GroupMember, Reason)>) {
    let (old, new) = (brief(old), brief(new));
    let joined = new.iter().filter(|e| !old.contains(e)).map(|e| e.0).collect();
    let left = old.iter().filter(|e| !new.contains(e)).map(|e| (e.0, Reason::NodeDown)).collect();
    (joined, left)
}

/// The smaller set stops; of equal sets the one without the lowest node.
pub(super) fn must_stop(barriers: &BTreeMap<Proc, u64>, me: Proc) -> bool {
    let mine = barriers[&me];
    let weight = |d: u64| {
        let set = barriers.iter().filter(|(_, x)| **x == d);
        (set.clone().count(), std::cmp::Reverse(set.map(|(p, _)| *p).min()))
    };
    barriers.values().any(|&d| d != mine && weight(d) > weight(mine))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_base::{Incarnation, NodeId};

    /// Two nodes with a client each in one group; the services' state says that the second is over.
    #[test]
    fn no_group_has_a_life_that_is_excluded() {
        let member = |n: u16| Member { node: NodeId(n), incarnation: Incarnation(1), votes: 1 };
        let group = GroupName::new("g").expect("a short name");
        let ring = RingId { seq: 8, rep: NodeId(1), rep_incarnation: Incarnation(1) };
        let mut round = Round::new(ring, vec![member(1), member(2)]);
        for n in [1, 2] {
            let p = member(n).proc();
            let who = GroupMember { node: p.node, incarnation: p.incarnation, client: 1 };
            let own = vec![GroupEntry { member: who, join_no: 1, payload: Bytes::new() }];
            let report = GroupReport { name: group.clone(), view_no: 3, believed: brief(&own), own };
            round.states.insert(p, (vec![report], Bytes::new()));
        }
        let members = |excluded: BTreeSet<Proc>| {
            let f: MergeFn = Box::new(move |_, _| Agreed { state: Vec::new(), excluded: excluded.clone() });
            let merged = round.merge(&f);
            merged.groups[&group].members.iter().map(|e| e.member.node.0).collect::<Vec<_>>()
        };
        assert_eq!(members(BTreeSet::new()), [1, 2]);
        assert_eq!(members(BTreeSet::from([member(2).proc()])), [1]);
    }
}
