//! The LUN: blocks of the quorum disk, journals and counters, and what is on its way to them.
//!
//! A counter is increased in the holder's journal first (then it is acknowledged), and in its place when the lock is given up; then
//! the journal entry is revoked. Replay of a journal puts its entries into place. This is the file system in one page: whoever
//! gets a lock before the replay reads the past, whoever writes after its fence destroys the present.

use crate::world::{COUNTERS, Ev, MS, Tag, World};
use cairn_base::Proc;
use qdisk::ondisk::EBlock;
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// The new value, in the journal.
    Log {
        jid: usize,
        counter: usize,
        value: u64,
    },
    InPlace {
        counter: usize,
        value: u64,
    },
    Revoke {
        jid: usize,
        counter: usize,
    },
    /// A clean header.
    Clear {
        jid: usize,
    },
}

pub(crate) struct Pending {
    pub(crate) node: usize,
    pub(crate) life: Proc,
    pub(crate) who: Proc,
    pub(crate) op: Op,
    pub(crate) fails: bool,
    tag: Tag,
}

pub(crate) struct Lun {
    pub(crate) slots: Vec<Option<EBlock>>,
    pub(crate) counters: [u64; COUNTERS],
    pub(crate) journals: Vec<BTreeMap<usize, u64>>,
    /// Ended by a clean header.
    pub(crate) clean: Vec<bool>,
    /// Who may write the journal: its owner, or the recoverer that holds its lock.
    pub(crate) journal_of: Vec<Option<Proc>>,
    pub(crate) pending: BTreeMap<u64, Pending>,
    next: u64,
}

impl Lun {
    pub(crate) fn new(nodes: usize) -> Self {
        // spare journals: a node may be back before its last one is replayed
        let journals = nodes + 2;
        Self {
            slots: vec![None; nodes],
            counters: [0; COUNTERS],
            journals: vec![BTreeMap::new(); journals],
            clean: vec![true; journals],
            journal_of: vec![None; journals],
            pending: BTreeMap::new(),
            next: 0,
        }
    }

    pub(crate) fn busy(&self, who: Proc) -> bool {
        self.pending.values().any(|p| p.who == who)
    }
}

impl World {
    /// The write leaves the process.
    pub(crate) fn submit(&mut self, i: usize, op: Op, tag: Tag) {
        let Some(m) = &self.nodes[i].mount else { return };
        let (life, who) = (m.life, m.who);
        let latency = self.latency(i);
        let fails = !self.healed && self.rng.chance(1, 4000);
        let id = self.lun.next;
        self.lun.next += 1;
        self.lun.pending.insert(id, Pending { node: i, life, who, op, fails, tag });
        self.after(latency, Ev::Land { id });
    }

    /// It takes effect, or is refused.
    pub(crate) fn land(&mut self, id: u64) {
        let Some(p) = self.lun.pending.remove(&id) else { return };
        let refused = self.nodes[p.node].blocked;
        let half = p.fails && self.rng.chance(1, 2);
        if !refused && !half {
            self.check_landing(&p);
            match p.op {
                Op::Log { jid, counter, value } => {
                    self.lun.journals[jid].insert(counter, value);
                    self.lun.clean[jid] = false;
                    self.audit.logged(counter, value);
                }
                Op::InPlace { counter, value } => self.lun.counters[counter] = value,
                Op::Revoke { jid, counter } => {
                    self.lun.journals[jid].remove(&counter);
                }
                Op::Clear { jid } => {
                    self.lun.journals[jid].clear();
                    self.lun.clean[jid] = true;
                }
            }
        }
        let (who, op, ok) = (p.who, p.op, !refused && !p.fails);
        self.say(|| format!("LUN {who} {op:?} {}", if ok { "landed" } else { "failed" }));
        let d = self.rng.below(MS);
        self.after(d, Ev::Done { node: p.node, who: p.who, ok, tag: p.tag });
    }

    /// The process or machine is gone; what it had issued is settled now: landed already, or it never will.
    pub(crate) fn settle_io(&mut self, node: usize, up_to: u64) {
        self.lun.pending.retain(|_, p| p.node != node || p.life.incarnation.0 > up_to);
    }

    /// Power is lost: an arbitrary part of what was on its way never arrives.
    pub(crate) fn lose_io(&mut self, node: usize) {
        let ids: Vec<u64> =
            self.lun.pending.iter().filter(|(_, p)| p.node == node).map(|(id, _)| *id).collect();
        for id in ids {
            if self.rng.chance(1, 2) {
                self.lun.pending.remove(&id);
            }
        }
    }
}
