//! Quorum: a pure function of the view, the device votes and two replicated numbers.
//!
//! V votes of all configured nodes, Q device votes, E the expectation, E_eff what a shrinking cluster has agreed on. A component
//! is quorate when it `have`s at least `needed`:
//!
//! ```text
//! needed = E/2 + 1, except:   two_node with at most two members                                   → 1
//!                             rhel5, device held *now*, configuration decisive, E_eff < E         → E_eff/2 + 1
//! have   = votes of the members, plus Q while the device is held; 0 when the members have no vote at all (rule Z)
//! decisive: Q ≥ V − 2 · (smallest vote)
//! ```
//!
//! Why two sides can never be quorate, given that the device is counted on one side only: without shrinking both `have`s
//! together are at most E, and each would need more than half. With it, a side without the device needs more than
//! V − (smallest vote), that is every voter, so that the other side has no voter and, by rule Z, nothing. The tests enumerate it.

use serde::{Deserialize, Serialize};

/// What of the configuration quorum depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Electorate {
    /// V.
    pub node_votes: u32,
    /// Q; 0 without a quorum disk.
    pub device_votes: u32,
    /// The smallest vote that is not zero.
    pub smallest: u32,
    pub two_node: bool,
    /// Quorum may sink as nodes are evicted (`rhel5`).
    pub shrinks: bool,
}

/// Where a component stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Votes of the members.
    pub voters: u32,
    pub members: u32,
    /// E as agreed; never counts below V + Q.
    pub expected: u32,
    /// E_eff.
    pub effective: u32,
    pub device_held: bool,
    /// `wait_for_all`: not all nodes have been seen since the cluster was started cold.
    pub waiting: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quorum {
    pub needed: u32,
    pub have: u32,
    pub quorate: bool,
}

/// The parts of the rule, so that the tests can take one away and see the enumeration object.
#[derive(Clone, Copy)]
struct Rules {
    shrink_only_while_held: bool,
    shrink_only_if_decisive: bool,
    no_voters_no_votes: bool,
}

const RULES: Rules =
    Rules { shrink_only_while_held: true, shrink_only_if_decisive: true, no_voters_no_votes: true };

/// Are there so many device votes that only their holder can be quorate with any voter missing?
pub fn decisive(node_votes: u32, device_votes: u32, smallest: u32) -> bool {
    device_votes > 0 && device_votes >= node_votes.saturating_sub(2 * smallest)
}

pub fn evaluate(e: &Electorate, s: &Standing) -> Quorum {
    evaluate_by(RULES, e, s)
}

/// E: what was agreed, but never below what exists (except in a two-node cluster, whose rule is another).
pub fn expected(e: &Electorate, agreed: u32) -> u32 {
    if e.two_node { agreed.max(1) } else { agreed.max(e.node_votes + e.device_votes) }
}

fn evaluate_by(rules: Rules, e: &Electorate, s: &Standing) -> Quorum {
    let expected = expected(e, s.expected);
    let have = if s.voters == 0 && rules.no_voters_no_votes {
        0
    } else {
        s.voters + if s.device_held { e.device_votes } else { 0 }
    };
    let may_shrink = e.shrinks
        && (s.device_held || !rules.shrink_only_while_held)
        && (decisive(e.node_votes, e.device_votes, e.smallest) || !rules.shrink_only_if_decisive);
    let needed = if e.two_node && s.members <= 2 && e.device_votes == 0 {
        1
    } else if may_shrink && s.effective < expected {
        s.effective / 2 + 1
    } else {
        expected / 2 + 1
    };
    Quorum { needed, have, quorate: have >= needed && have > 0 && !s.waiting }
}

/// May the expectation be set to `wanted` while `have` votes are counted?
pub fn may_expect(e: &Electorate, wanted: u32, have: u32) -> bool {
    let needed = wanted / 2 + 1;
    !e.two_node && wanted >= e.node_votes + e.device_votes && 2 * needed > have && needed <= have
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn electorate(votes: &[u32], q: u32) -> Electorate {
        Electorate {
            node_votes: votes.iter().sum(),
            device_votes: q,
            smallest: votes.iter().copied().filter(|&v| v > 0).min().unwrap_or(0),
            two_node: false,
            shrinks: true,
        }
    }

    /// A component: its nodes as a mask, and its E_eff.
    type Part = (u8, u32);

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct World {
        parts: Vec<Part>,
        /// Mask of the component that holds the device.
        holder: Option<u8>,
    }

    impl World {
        fn tidy(mut self) -> Self {
            self.parts.retain(|p| p.0 != 0);
            self.parts.sort_unstable();
            if let Some(h) = self.holder
                && !self.parts.iter().any(|p| p.0 == h)
            {
                self.holder = None;
            }
            self
        }
    }

    /// Walks every reachable state: cuts, heals, crashes, restarts, the device moving at any time, shrinking whenever the holder
    /// misses a node. Returns the number of states and whether two sides were quorate in any.
    fn walk(rules: Rules, votes: &[u32], q: u32) -> (usize, bool) {
        let e = electorate(votes, q);
        let all: u8 = (1u8 << votes.len()) - 1;
        let full = e.node_votes + q;
        let sum = |mask: u8| (0..votes.len()).filter(|&i| mask >> i & 1 == 1).map(|i| votes[i]).sum::<u32>();
        let judge = |part: &Part, held: bool| {
            evaluate_by(
                rules,
                &e,
                &Standing {
                    voters: sum(part.0),
                    members: part.0.count_ones(),
                    expected: full,
                    effective: part.1,
                    device_held: held,
                    waiting: false,
                },
            )
        };
        let start = World { parts: vec![(all, full)], holder: None };
        let mut seen = HashSet::from([start.clone()]);
        let mut queue = vec![start];
        while let Some(w) = queue.pop() {
            let quorate = w.parts.iter().filter(|p| judge(p, w.holder == Some(p.0)).quorate).count();
            if quorate > 1 {
                return (seen.len(), true);
            }
            let mut next = Vec::new();
            let alive = w.parts.iter().fold(0, |m, p| m | p.0);
            for h in w.parts.iter().map(|p| Some(p.0)).chain([None]) {
                if q > 0 {
                    next.push(World { holder: h, ..w.clone() });
                }
            }
            for (i, part) in w.parts.iter().enumerate() {
                // cut: every way to split in two; both sides remember
                let mut side = (part.0 - 1) & part.0;
                while side != 0 {
                    for keeps in [side, part.0 & !side] {
                        let mut n = w.clone();
                        n.parts[i] = (side, part.1);
                        n.parts.push((part.0 & !side, part.1));
                        if n.holder == Some(part.0) {
                            n.holder = Some(keeps);
                        }
                        next.push(n);
                    }
                    side = (side - 1) & part.0;
                }
                // heal: a join raises the expectation again
                for (j, other) in w.parts.iter().enumerate().skip(i + 1) {
                    let mut n = w.clone();
                    let whole = part.0 | other.0;
                    if n.holder == Some(part.0) || n.holder == Some(other.0) {
                        n.holder = Some(whole);
                    }
                    n.parts[i] = (whole, full);
                    n.parts.remove(j);
                    next.push(n);
                }
                // crash
                for b in (0..8).filter(|b| part.0 >> b & 1 == 1) {
                    let mut n = w.clone();
                    n.parts[i].0 &= !(1 << b);
                    if n.holder == Some(part.0) {
                        n.holder = Some(n.parts[i].0);
                    }
                    next.push(n);
                }
                // shrink: agreed while the device is held and a node is missing
                if w.holder == Some(part.0) && part.0 != all {
                    let mut n = w.clone();
                    n.parts[i].1 = judge(part, true).have;
                    next.push(n);
                }
            }
            for b in (0..votes.len()).filter(|b| alive >> b & 1 == 0) {
                let mut n = w.clone();
                n.parts.push((1 << b, full));
                next.push(n);
            }
            for n in next {
                let n = n.tidy();
                if seen.insert(n.clone()) {
                    queue.push(n);
                }
            }
        }
        (seen.len(), false)
    }

    /// (n, Q) of the unit-vote configurations in which `rules` let two sides be quorate.
    fn bad_configurations(rules: Rules) -> (usize, Vec<(usize, u32)>) {
        let mut bad = Vec::new();
        let mut states = 0;
        for n in 2..=5 {
            for q in 0..=n as u32 + 1 {
                let (count, two) = walk(rules, &vec![1; n], q);
                states += count;
                if two {
                    bad.push((n, q));
                }
            }
        }
        (states, bad)
    }

    #[test]
    fn never_two_quorate_sides_with_unit_votes() {
        let (states, bad) = bad_configurations(RULES);
        assert!(states > 10_000, "the enumeration must not be empty: {states}");
        assert_eq!(bad, []);
    }

    #[test]
    fn never_two_quorate_sides_with_any_votes_from_zero_to_three() {
        let mut configurations = 0;
        for n in 2..=4u32 {
            for code in 0..4u32.pow(n) {
                let votes: Vec<u32> = (0..n).map(|i| code / 4u32.pow(i) % 4).collect();
                // order of the nodes does not matter
                if votes.is_sorted() && votes.iter().any(|&v| v > 0) {
                    for q in 0..=votes.iter().sum::<u32>() + 1 {
                        configurations += 1;
                        assert!(!walk(RULES, &votes, q).1, "votes {votes:?} device {q}");
                    }
                }
            }
        }
        assert!(configurations > 400, "{configurations}");
    }

    #[test]
    fn the_enumeration_catches_a_remembered_shrink() {
        let (_, bad) = bad_configurations(Rules { shrink_only_while_held: false, ..RULES });
        assert!(bad.contains(&(4, 2)), "the historical rule with the historical votes: {bad:?}");
    }

    #[test]
    fn the_enumeration_catches_a_shrink_that_is_not_decisive() {
        let (_, bad) = bad_configurations(Rules { shrink_only_if_decisive: false, ..RULES });
        assert_eq!(bad, [(4, 1), (5, 1), (5, 2)]);
    }

    #[test]
    fn the_enumeration_catches_a_device_without_voters() {
        let rules = Rules { no_voters_no_votes: false, ..RULES };
        assert!(walk(rules, &[0, 1, 1], 1).1);
        assert!(!walk(RULES, &[0, 1, 1], 1).1);
    }

    #[test]
    fn shrink_then_device_moves_does_not_make_two() {
        // {1,2,3} shrank to 3 with the device, then the device went to 4
        let e = electorate(&[1; 4], 2);
        let three =
            Standing { voters: 3, members: 3, expected: 6, effective: 5, device_held: false, waiting: false };
        let one = Standing { voters: 1, members: 1, effective: 3, device_held: true, ..three };
        assert!(!evaluate(&e, &three).quorate);
        assert!(evaluate(&e, &one).quorate);
    }

    #[test]
    fn cases_of_the_specification() {
        struct Case {
            votes: &'static [u32],
            q: u32,
            members: &'static [u32],
            held: bool,
            effective: u32,
            rhel5: (u32, u32, bool),
            rhel6: (u32, u32, bool),
        }
        let four: &[u32] = &[1, 1, 1, 1];
        #[rustfmt::skip]
        let cases = [
            Case { votes: four, q: 2, members: &[1; 4], held: true, effective: 6, rhel5: (4, 6, true), rhel6: (4, 6, true) },
            Case { votes: four, q: 2, members: &[1; 3], held: true, effective: 5, rhel5: (3, 5, true), rhel6: (4, 5, true) },
            Case { votes: four, q: 2, members: &[1; 2], held: true, effective: 4, rhel5: (3, 4, true), rhel6: (4, 4, true) },
            Case { votes: four, q: 2, members: &[1; 1], held: true, effective: 3, rhel5: (2, 3, true), rhel6: (4, 3, false) },
            Case { votes: four, q: 2, members: &[1; 3], held: true, effective: 6, rhel5: (4, 5, true), rhel6: (4, 5, true) },
            Case { votes: four, q: 2, members: &[1; 3], held: false, effective: 5, rhel5: (4, 3, false), rhel6: (4, 3, false) },
            Case { votes: four, q: 0, members: &[1; 3], held: false, effective: 4, rhel5: (3, 3, true), rhel6: (3, 3, true) },
            Case { votes: four, q: 0, members: &[1; 2], held: false, effective: 4, rhel5: (3, 2, false), rhel6: (3, 2, false) },
            Case { votes: four, q: 3, members: &[1; 1], held: true, effective: 4, rhel5: (3, 4, true), rhel6: (4, 4, true) },
            Case { votes: four, q: 1, members: &[1; 1], held: true, effective: 2, rhel5: (3, 2, false), rhel6: (3, 2, false) },
            Case { votes: &[1; 3], q: 2, members: &[1], held: true, effective: 3, rhel5: (2, 3, true), rhel6: (3, 3, true) },
            Case { votes: &[1; 2], q: 1, members: &[1], held: true, effective: 3, rhel5: (2, 2, true), rhel6: (2, 2, true) },
            Case { votes: &[1; 2], q: 1, members: &[1], held: false, effective: 3, rhel5: (2, 1, false), rhel6: (2, 1, false) },
            Case { votes: &[0, 1, 1], q: 1, members: &[0], held: true, effective: 3, rhel5: (2, 0, false), rhel6: (2, 0, false) },
        ];
        for (i, c) in cases.iter().enumerate() {
            for (shrinks, want) in [(true, c.rhel5), (false, c.rhel6)] {
                let e = Electorate { shrinks, ..electorate(c.votes, c.q) };
                let got = evaluate(
                    &e,
                    &Standing {
                        voters: c.members.iter().sum(),
                        members: c.members.len() as u32,
                        expected: e.node_votes + e.device_votes,
                        effective: c.effective,
                        device_held: c.held,
                        waiting: false,
                    },
                );
                assert_eq!((got.needed, got.have, got.quorate), want, "case {i}, shrinks {shrinks}");
            }
        }
    }

    #[test]
    fn two_nodes_need_one_vote_and_waiting_beats_all() {
        let e = Electorate { two_node: true, ..electorate(&[1, 1], 0) };
        let s =
            Standing { voters: 1, members: 1, expected: 1, effective: 1, device_held: false, waiting: false };
        assert_eq!(evaluate(&e, &s), Quorum { needed: 1, have: 1, quorate: true });
        assert!(!evaluate(&e, &Standing { waiting: true, ..s }).quorate);
    }

    #[test]
    fn expected_votes_are_set_within_half_and_all_of_what_is_there() {
        let e = electorate(&[1; 3], 0);
        assert!(may_expect(&e, 3, 3));
        assert!(!may_expect(&e, 2, 3), "below what is configured");
        assert!(!may_expect(&e, 8, 3), "would lose quorum");
    }
}
