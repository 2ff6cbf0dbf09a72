//! Which nodes go on together when not everybody hears everybody.
//!
//! A ring must be a clique of the graph "hear each other in both directions", else the token never goes round. Of
//! all maximal cliques the preferred one: contains the known master of the quorum device; most votes; most nodes;
//! smallest sorted list of node ids. Every node decides from what it has heard; different answers only cost another
//! round of GATHER.

use cairn_base::NodeId;
use std::cmp::Reverse;

/// Steps of the search after which the best clique so far is taken. 64 nodes with a few bad links need a handful;
/// a hostile graph may not stall the ring.
const WORK: u32 = 200_000;

pub(crate) struct Graph {
    /// Sorted by node id, at most 64.
    pub(crate) nodes: Vec<(NodeId, u8)>,
    /// `edges[i]` bit j: i and j hear each other. Symmetric, without own bits.
    pub(crate) edges: Vec<u64>,
    pub(crate) device_master: Option<NodeId>,
}

type Rank = (bool, u32, u32, Reverse<Vec<NodeId>>);

impl Graph {
    fn rank(&self, set: u64) -> Rank {
        let ids: Vec<NodeId> = self.members(set).collect();
        let votes =
            (0..self.nodes.len()).filter(|i| set >> i & 1 == 1).map(|i| u32::from(self.nodes[i].1)).sum();
        (self.device_master.is_some_and(|m| ids.contains(&m)), votes, set.count_ones(), Reverse(ids))
    }

    pub(crate) fn members(&self, set: u64) -> impl Iterator<Item = NodeId> + '_ {
        (0..self.nodes.len()).filter(move |i| set >> i & 1 == 1).map(|i| self.nodes[i].0)
    }

    /// The preferred maximal clique among those that contain all of `must`.
    pub(crate) fn best(&self, must: u64) -> u64 {
        let all = if self.nodes.len() == 64 { u64::MAX } else { (1u64 << self.nodes.len()) - 1 };
        let mut candidates = all & !must;
        for i in (0..self.nodes.len()).filter(|i| must >> i & 1 == 1) {
            candidates &= self.edges[i];
        }
        let mut best = (self.rank(must), must);
        let mut work = WORK;
        self.expand(must, candidates, 0, &mut best, &mut work);
        best.1
    }

    /// Bron–Kerbosch with a pivot (Comm. ACM 16, 1973), in index order.
    fn expand(
        &self,
        clique: u64,
        mut candidates: u64,
        mut excluded: u64,
        best: &mut (Rank, u64),
        work: &mut u32,
    ) {
        if *work == 0 {
            return;
        }
        *work -= 1;
        if candidates == 0 && excluded == 0 {
            let rank = self.rank(clique);
            if rank > best.0 {
                *best = (rank, clique);
            }
            return;
        }
        let pivot = bits(candidates | excluded).max_by_key(|&i| (candidates & self.edges[i]).count_ones());
        let skip = pivot.map_or(0, |i| self.edges[i]);
        for i in bits(candidates & !skip) {
            let near = self.edges[i];
            self.expand(clique | 1 << i, candidates & near, excluded & near, best, work);
            candidates &= !(1 << i);
            excluded |= 1 << i;
        }
    }
}

fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (set != 0).then(|| {
            let i = set.trailing_zeros() as usize;
            set &= set - 1;
            i
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_base::Rng;

    fn graph(n: usize, edge: impl Fn(usize, usize) -> bool) -> Graph {
        let nodes = (0..n).map(|i| (NodeId(i as u16 + 1), 1)).collect();
        let edges = (0..n)
            .map(|i| (0..n).filter(|&j| i != j && edge(i, j) && edge(j, i)).fold(0, |m, j| m | 1 << j))
            .collect();
        Graph { nodes, edges, device_master: None }
    }

    #[test]
    fn a_cut_pair_leaves_the_side_with_smaller_ids() {
        let g = graph(3, |i, j| (i, j) != (0, 2));
        assert_eq!(g.best(0), 0b011);
        assert_eq!(g.best(0b100), 0b110, "node 3's own best");
    }

    #[test]
    fn device_master_beats_votes_and_votes_beat_count() {
        let mut g = graph(4, |i, j| i / 2 == j / 2);
        g.nodes[2].1 = 3;
        assert_eq!(g.best(0), 0b1100);
        g.device_master = Some(NodeId(1));
        assert_eq!(g.best(0), 0b0011);
        let mut g = graph(4, |i, j| (i < 3) == (j < 3));
        g.nodes[3].1 = 9;
        assert_eq!(g.best(0), 0b1000);
    }

    #[test]
    fn best_equals_brute_force_over_all_subsets() {
        let mut rng = Rng::new(7);
        for _ in 0..200 {
            let n = 3 + rng.below(6) as usize;
            let mut m = vec![vec![false; n]; n];
            for i in 0..n {
                for j in 0..i {
                    m[i][j] = rng.chance(2, 3);
                    m[j][i] = m[i][j];
                }
            }
            let g = graph(n, |i, j| m[i][j]);
            let is_clique = |s: u64| bits(s).all(|i| s & !(1 << i) & !g.edges[i] == 0);
            let brute = (1..1u64 << n).filter(|&s| is_clique(s)).max_by_key(|&s| g.rank(s)).unwrap();
            assert_eq!(g.best(0), brute);
        }
    }

    #[test]
    fn sixty_four_nodes_do_not_stall() {
        let g = graph(64, |i, j| (i * 7 + j * 7) % 5 != 0);
        assert!(g.best(0).count_ones() >= 2);
        assert_eq!(graph(64, |_, _| true).best(0), u64::MAX);
    }
}
