//! Sets of processors as the membership protocol merges them: per node the highest incarnation known.
//!
//! Incarnations only rise, so the pointwise maximum is a join of a lattice: merging is monotone, commutative and
//! bounded by the number of nodes, which is what ends every GATHER. A processor is *in* `failed` when that or a later
//! incarnation of its node is.

use cairn_base::{Incarnation, NodeId, Proc};
use std::collections::BTreeMap;

#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct ProcSet(BTreeMap<NodeId, Incarnation>);

impl ProcSet {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Proc> + '_ {
        self.0.iter().map(|(&node, &incarnation)| Proc { node, incarnation })
    }

    /// Exactly this incarnation.
    pub(crate) fn has(&self, p: Proc) -> bool {
        self.0.get(&p.node) == Some(&p.incarnation)
    }

    /// This incarnation or a later one of the same node.
    pub(crate) fn covers(&self, p: Proc) -> bool {
        self.0.get(&p.node).is_some_and(|&i| i >= p.incarnation)
    }

    pub(crate) fn add(&mut self, p: Proc) {
        let slot = self.0.entry(p.node).or_insert(p.incarnation);
        *slot = (*slot).max(p.incarnation);
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        other.iter().for_each(|p| self.add(p));
    }

    pub(crate) fn is_covered_by(&self, other: &Self) -> bool {
        self.iter().all(|p| other.covers(p))
    }

    /// Members of `self` that are not in `failed`.
    pub(crate) fn without(&self, failed: &Self) -> Vec<Proc> {
        self.iter().filter(|&p| !failed.covers(p)).collect()
    }
}

impl FromIterator<Proc> for ProcSet {
    fn from_iter<I: IntoIterator<Item = Proc>>(iter: I) -> Self {
        let mut set = Self::default();
        iter.into_iter().for_each(|p| set.add(p));
        set
    }
}
