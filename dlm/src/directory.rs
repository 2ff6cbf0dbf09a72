//! Which member masters which tree: 4096 slices, each owned by the member with the highest rendezvous score, so that a
//! membership change moves only slices of the member that changed. Every node computes the same table from the view.

use crate::name::{ResName, mix};
use crate::types::Term;
use cairn_base::Proc;
use rustc_hash::FxHashMap;

pub(crate) const SLICES: usize = 4096;

/// Slice of a tree.
pub(crate) fn slice_of(root: &ResName) -> u16 {
    (root.root_hash() >> 52) as u16
}

#[derive(Debug)]
pub(crate) struct Entry {
    /// `None`: its master is dead and nobody claimed it (yet).
    pub(crate) master: Option<Proc>,
    pub(crate) term: Term,
    /// Dead procs that may hold anything in it.
    pub(crate) masks: Vec<Proc>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Slice {
    /// Every member has told what it masters here.
    pub(crate) ready: bool,
    /// Dead procs that may master roots nobody told us about.
    pub(crate) taint: Vec<Proc>,
}

#[derive(Debug)]
pub(crate) struct Directory {
    /// Empty before the first view.
    owners: Vec<Proc>,
    pub(crate) slices: Vec<Slice>,
    /// Of the slices that this node owns.
    pub(crate) entries: FxHashMap<ResName, Entry>,
}

impl Directory {
    pub(crate) fn new() -> Self {
        Self { owners: Vec::new(), slices: vec![Slice::default(); SLICES], entries: FxHashMap::default() }
    }

    pub(crate) fn owner(&self, slice: u16) -> Option<Proc> {
        self.owners.get(slice as usize).copied()
    }

    /// The table of a view. `members` must not be empty.
    pub(crate) fn table(members: &[Proc]) -> Vec<Proc> {
        let salt: Vec<u64> =
            members.iter().map(|p| mix(mix(u64::from(p.node.0) + 1) ^ p.incarnation.0)).collect();
        (0..SLICES as u64)
            .map(|s| {
                let best = (0..members.len()).max_by_key(|&i| (mix(salt[i] ^ mix(s + 0x5bd1)), members[i]));
                members[best.expect("a view has members")]
            })
            .collect()
    }

    /// Takes over a new table and gives the old one back.
    pub(crate) fn install(&mut self, owners: Vec<Proc>) -> Vec<Proc> {
        std::mem::replace(&mut self.owners, owners)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_base::{Incarnation, NodeId};

    fn procs(n: u16) -> Vec<Proc> {
        (1..=n).map(|i| Proc { node: NodeId(i), incarnation: Incarnation(100 + u64::from(i)) }).collect()
    }

    #[test]
    fn a_leaving_member_moves_only_its_own_slices_and_load_is_even() {
        let four = procs(4);
        let a = Directory::table(&four);
        let b = Directory::table(&four[..3]);
        for (x, y) in a.iter().zip(&b) {
            assert!(x == y || *x == four[3]);
        }
        for p in &four {
            let n = a.iter().filter(|x| *x == p).count();
            assert!((SLICES / 4 - 200..SLICES / 4 + 200).contains(&n), "{p}: {n}");
        }
    }
}
