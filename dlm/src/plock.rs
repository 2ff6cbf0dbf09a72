//! Byte-range (fcntl) locks of one file at its master: a resource kind of its own, with the tree's mastership,
//! directory entry and recovery.
//!
//! Server mode: every operation is decided by the master. Members remember the ranges they were granted and present
//! them when a master dies; a dead node's ranges go when it is fenced (they cover no block of the volume). What a dead
//! *master* held is unknown: until it is fenced nothing is granted in the trees it mastered. `end` is inclusive.

use crate::msg::PlockAnswer;
use cairn_base::Proc;
use serde::Serialize;
use std::collections::BTreeMap;

/// An owner in the cluster: (member, lock owner on it).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct PlockKey {
    pub who: Proc,
    pub owner: u64,
}

/// A range and its kind, for one owner of the member that sends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct PlockRange {
    pub owner: u64,
    pub pid: u32,
    pub start: u64,
    pub end: u64,
    pub write: bool,
}

impl PlockRange {
    pub const fn overlaps(&self, o: &Self) -> bool {
        self.start <= o.end && o.start <= self.end
    }
}

/// Who stands in the way (F_GETLK).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlockTest {
    pub who: Proc,
    pub range: PlockRange,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    who: Proc,
    ticket: u64,
    range: PlockRange,
    test: bool,
}

/// An answer for `who`.
#[derive(Debug)]
pub(crate) struct PlockOut {
    pub(crate) who: Proc,
    pub(crate) ticket: u64,
    pub(crate) answer: PlockAnswer,
}

/// Replaces what `owner` holds in the range by `kind` (`None`: nothing), joining neighbours of one kind.
pub(crate) fn apply(list: &mut Vec<PlockRange>, range: PlockRange, lock: bool) {
    let mut kept = Vec::with_capacity(list.len() + 2);
    let mut new = range;
    for r in list.drain(..) {
        if r.owner != range.owner {
            kept.push(r);
            continue;
        }
        let touches = r.start <= range.end.saturating_add(1) && range.start <= r.end.saturating_add(1);
        if lock && r.write == range.write && touches {
            new.start = new.start.min(r.start);
            new.end = new.end.max(r.end);
            continue;
        }
        if !r.overlaps(&range) {
            kept.push(r);
            continue;
        }
        if r.start < range.start {
            kept.push(PlockRange { end: range.start - 1, ..r });
        }
        if r.end > range.end {
            kept.push(PlockRange { start: range.end + 1, ..r });
        }
    }
    if lock {
        kept.push(new);
    }
    *list = kept;
}

#[derive(Debug, Default)]
pub(crate) struct Ranges {
    held: BTreeMap<Proc, Vec<PlockRange>>,
    waiting: Vec<Wait>,
    /// Dead procs that may hold anything here, until they are fenced.
    masks: Vec<Proc>,
    /// Highest ticket executed per member: an operation that arrives twice is executed once.
    last: BTreeMap<Proc, u64>,
}

impl Ranges {
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.masks.is_empty() && self.held.values().all(Vec::is_empty)
    }

    pub(crate) fn haunted(&self, gates: &BTreeMap<Proc, bool>) -> bool {
        !self.masks.is_empty() || self.held.iter().any(|(p, l)| gates.contains_key(p) && !l.is_empty())
    }

    pub(crate) fn mask(&mut self, dead: &[Proc]) {
        self.masks.extend_from_slice(dead);
    }

    fn first_time(&mut self, who: Proc, ticket: u64) -> bool {
        let last = self.last.entry(who).or_default();
        let first = ticket > *last;
        *last = (*last).max(ticket);
        first
    }

    fn conflict(&self, who: Proc, range: &PlockRange) -> Option<PlockTest> {
        self.held
            .iter()
            .flat_map(|(&p, l)| l.iter().map(move |r| PlockTest { who: p, range: *r }))
            .filter(|t| (t.who, t.range.owner) != (who, range.owner))
            .filter(|t| (t.range.write || range.write) && t.range.overlaps(range))
            .min_by_key(|t| (t.range.start, t.who))
    }

    pub(crate) fn waiting_owner(&self, who: Proc, ticket: u64) -> Option<u64> {
        self.waiting.iter().find(|w| w.who == who && w.ticket == ticket && !w.test).map(|w| w.range.owner)
    }

    /// Owners that keep the wait of `ticket` waiting.
    pub(crate) fn blockers(&self, who: Proc, ticket: u64) -> Vec<PlockKey> {
        let Some(w) = self.waiting.iter().find(|w| w.who == who && w.ticket == ticket && !w.test) else {
            return Vec::new();
        };
        let mut keys: Vec<_> = self
            .held
            .iter()
            .flat_map(|(&p, l)| l.iter().map(move |r| (PlockKey { who: p, owner: r.owner }, r)))
            .filter(|(k, r)| {
                (k.who, k.owner) != (who, w.range.owner) && (r.write || w.range.write) && r.overlaps(&w.range)
            })
            .map(|(k, _)| k)
            .collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    pub(crate) fn restore(&mut self, who: Proc, ranges: &[PlockRange]) {
        self.held.entry(who).or_default().extend_from_slice(ranges);
    }

    pub(crate) fn lock(
        &mut self,
        who: Proc,
        ticket: u64,
        range: PlockRange,
        wait: bool,
        out: &mut Vec<PlockOut>,
    ) {
        if !self.first_time(who, ticket) {
            return;
        }
        let answer = if self.masks.is_empty() && self.conflict(who, &range).is_none() {
            apply(self.held.entry(who).or_default(), range, true);
            PlockAnswer::Granted
        } else if wait {
            self.waiting.push(Wait { who, ticket, range, test: false });
            PlockAnswer::Queued
        } else {
            PlockAnswer::Again
        };
        out.push(PlockOut { who, ticket, answer });
        if answer == PlockAnswer::Granted {
            self.pass(out); // write to read is a release
        }
    }

    pub(crate) fn unlock(&mut self, who: Proc, ticket: u64, range: PlockRange, out: &mut Vec<PlockOut>) {
        if !self.first_time(who, ticket) {
            return;
        }
        if let Some(list) = self.held.get_mut(&who) {
            apply(list, range, false);
        }
        out.push(PlockOut { who, ticket, answer: PlockAnswer::Granted });
        self.pass(out);
    }

    pub(crate) fn test(&mut self, who: Proc, ticket: u64, range: PlockRange, out: &mut Vec<PlockOut>) {
        if !self.first_time(who, ticket) {
            return;
        }
        if self.masks.is_empty() {
            let answer = PlockAnswer::Tested(self.conflict(who, &range));
            out.push(PlockOut { who, ticket, answer });
        } else {
            self.waiting.push(Wait { who, ticket, range, test: true });
            out.push(PlockOut { who, ticket, answer: PlockAnswer::Queued });
        }
    }

    pub(crate) fn cancel(&mut self, who: Proc, ticket: u64, deadlock: bool, out: &mut Vec<PlockOut>) {
        if let Some(at) = self.waiting.iter().position(|w| w.who == who && w.ticket == ticket) {
            self.waiting.remove(at);
            let answer = if deadlock { PlockAnswer::Deadlock } else { PlockAnswer::Cancelled };
            out.push(PlockOut { who, ticket, answer });
        }
    }

    /// Grants, in order of arrival, whatever no longer conflicts.
    pub(crate) fn pass(&mut self, out: &mut Vec<PlockOut>) {
        if !self.masks.is_empty() {
            return;
        }
        let mut at = 0;
        while let Some(&w) = self.waiting.get(at) {
            let conflict = self.conflict(w.who, &w.range);
            if w.test || conflict.is_none() {
                self.waiting.remove(at);
                let answer = if w.test {
                    PlockAnswer::Tested(conflict)
                } else {
                    apply(self.held.entry(w.who).or_default(), w.range, true);
                    PlockAnswer::Granted
                };
                out.push(PlockOut { who: w.who, ticket: w.ticket, answer });
                at = 0;
            } else {
                at += 1;
            }
        }
    }

    /// `who` is gone; what it holds stays until it is fenced, unless it left cleanly.
    pub(crate) fn member_gone(&mut self, who: Proc, clean: bool) {
        self.waiting.retain(|w| w.who != who);
        self.last.remove(&who);
        if clean {
            self.held.remove(&who);
        }
    }

    pub(crate) fn fenced(&mut self, who: Proc) {
        self.held.remove(&who);
        self.masks.retain(|p| *p != who);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(owner: u64, start: u64, end: u64, write: bool) -> PlockRange {
        PlockRange { owner, pid: 1, start, end, write }
    }

    /// Byte by byte, what `apply` must do.
    #[test]
    fn apply_agrees_with_a_byte_map() {
        let mut rng = cairn_base::Rng::new(7);
        for round in 0..2000 {
            let mut list = Vec::new();
            let mut map = [[None; 24]; 2];
            for _ in 0..12 {
                let (a, b) = (rng.below(24), rng.below(24));
                let x = r(rng.below(2), a.min(b), a.max(b), rng.chance(1, 2));
                let lock = rng.chance(2, 3);
                apply(&mut list, x, lock);
                for i in x.start..=x.end {
                    map[x.owner as usize][i as usize] = lock.then_some(x.write);
                }
                for owner in 0..2 {
                    for i in 0..24 {
                        let at: Vec<_> =
                            list.iter().filter(|l| l.owner == owner && l.start <= i && i <= l.end).collect();
                        assert!(at.len() <= 1, "round {round}: overlap");
                        assert_eq!(
                            at.first().map(|l| l.write),
                            map[owner as usize][i as usize],
                            "round {round}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn ends_of_the_number_range_do_not_overflow() {
        let mut list = vec![r(0, 0, u64::MAX, true)];
        apply(&mut list, r(0, u64::MAX, u64::MAX, true), false);
        assert_eq!(list, [r(0, 0, u64::MAX - 1, true)]);
        apply(&mut list, r(0, 0, 0, false), true);
        assert_eq!(list, [r(0, 1, u64::MAX - 1, true), r(0, 0, 0, false)]);
    }
}
