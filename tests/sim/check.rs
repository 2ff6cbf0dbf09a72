//! The rules, asserted by name in true time, with knowledge that no node has.
//!
//! | name | rule |
//! |---|---|
//! | I1 | granted modes are compatible among mounts not proven fenced; what the dead held stays held until their replay (gate) |
//! | I2 | one master per resource per view |
//! | I3 | a request ends exactly once |
//! | I4 | bypassing is bounded once the faults are over |
//! | I5 | a valid value block is the last one written |
//! | I6 | recovery keeps the locks of survivors and none of the dead |
//! | I7 | same view, same members; sequence rises in a life; never two quorate sides; the device counts on one side |
//! | I8 | fencing from a quorate view only; replay of a journal only after the proof for its owner |
//! | I9 | no write of a life lands after its proof; a proof is never given for what still runs |
//! | I10 | no write starts after the stop deadline or without quorum |
//! | I11 | a slot of the quorum disk is written by its owner, in order; one master per term; who is found silent has no permit; no permit of an evicted life rests on a renewal submitted after its kill entry could be read |
//! | I14 | what was acknowledged is read by whoever gets the lock next; no increase is lost |
//! | I16 | a journal is written by its owner, or by the recoverer that holds its lock |
//! | EVS1…9 | the ring's, over the merged record of all lives (`membership::sim::evs`) |
//! | I24 | after the faults: one view, progress, nothing left waiting |

use crate::lun::{Op, Pending};
use crate::mount::{JOURNAL, Mount, until_fence};
use crate::world::{COUNTERS, MS, World};
use cairn_base::{Boottime, NodeId, Proc};
use dlm::Mode;
use membership::event::{RingId, View};
use membership::ipc::{ClusterEvent, Scope};
use membership::sim::evs::{self, Trace};
use qdisk::KillReason;
use qdisk::ondisk::EBlock;
use std::collections::{BTreeMap, BTreeSet};

/// Grants to later requests that a waiting request may see pass once the faults are over.
const BYPASS: u32 = 64;

struct Grave {
    who: Proc,
    life: Proc,
    client: u32,
    name: usize,
    mode: Mode,
}

#[derive(Default)]
pub(crate) struct Audit {
    pub(crate) broken: Option<String>,
    /// (life of the node, client) of each mount that ever was.
    pub(crate) mounts: BTreeMap<Proc, (Proc, u32)>,
    pub(crate) lvb: [Option<u64>; COUNTERS],
    /// Highest value of each counter that is in a journal on the disk; that was acknowledged to a user.
    logged: [u64; COUNTERS],
    acked: [u64; COUNTERS],
    proved: BTreeMap<Proc, u64>,
    proved_mounts: BTreeSet<(Proc, u32)>,
    told: BTreeSet<(Proc, Proc, Option<u32>)>,
    begun: BTreeMap<NodeId, u64>,
    before: BTreeMap<NodeId, u64>,
    replayed: BTreeSet<Proc>,
    graves: Vec<Grave>,
    views: BTreeMap<RingId, Vec<Proc>>,
    last_seq: BTreeMap<Proc, u64>,
    masters: BTreeMap<u64, Proc>,
    /// By its own clock, since when its kill entry can be read.
    evicted: BTreeMap<Proc, Boottime>,
    asked: BTreeMap<(Proc, usize), (Mode, u64, u32)>,
    pub(crate) calm: bool,
    traces: Vec<Trace>,
    sampled: u64,
    pub(crate) seen: Seen,
}

/// What the runs have reached, so that a simulation that avoids trouble is noticed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) views: u64,
    pub(crate) fences: u64,
    pub(crate) replays: u64,
    pub(crate) entries: u64,
    pub(crate) grants: u64,
    pub(crate) writes: u64,
    pub(crate) evictions: u64,
    pub(crate) grants_of_votes: u64,
    pub(crate) lost_permits: u64,
    pub(crate) rejoined: u64,
    pub(crate) mounts_only: u64,
}

impl Seen {
    pub(crate) fn add(&mut self, o: &Self) {
        self.views += o.views;
        self.fences += o.fences;
        self.replays += o.replays;
        self.entries += o.entries;
        self.grants += o.grants;
        self.writes += o.writes;
        self.evictions += o.evictions;
        self.grants_of_votes += o.grants_of_votes;
        self.lost_permits += o.lost_permits;
        self.rejoined += o.rejoined;
        self.mounts_only += o.mounts_only;
    }
}

impl Audit {
    /// The first broken rule ends the run.
    pub(crate) fn fail(&mut self, what: String) {
        if self.broken.is_none() {
            self.broken = Some(what);
        }
    }

    pub(crate) fn end_of_life(&mut self, trace: Trace) {
        self.traces.push(trace);
    }

    /// Proved by an ordered event; or, in a cluster that starts cold, by a later life (which conquered the run directory) or by
    /// the fence of whatever ran there before.
    fn fenced(&self, life: Proc, client: u32) -> bool {
        self.proved.contains_key(&life)
            || self.proved_mounts.contains(&(life, client))
            || self.begun.get(&life.node).is_some_and(|inc| *inc > life.incarnation.0)
            || self.before.get(&life.node).is_some_and(|inc| *inc >= life.incarnation.0)
    }

    pub(crate) fn life_begins(&mut self, me: Proc) {
        self.begun.insert(me.node, me.incarnation.0);
    }

    pub(crate) fn mount_fenced(&self, who: Proc) -> bool {
        self.mounts.get(&who).is_some_and(|(life, client)| self.fenced(*life, *client))
    }

    pub(crate) fn buried(
        &mut self,
        who: Proc,
        life: Proc,
        client: u32,
        held: Vec<(usize, Mode)>,
        clean: bool,
    ) {
        self.asked.retain(|(w, _), _| *w != who);
        if clean && !held.is_empty() {
            return self.fail(format!("I3 {who} leaves cleanly and holds {held:?}"));
        }
        self.graves.extend(held.into_iter().map(|(name, mode)| Grave { who, life, client, name, mode }));
    }

    pub(crate) fn replayed(&mut self, who: Proc) {
        self.seen.replays += 1;
        self.replayed.insert(who);
        self.tidy();
    }

    fn tidy(&mut self) {
        let mut graves = std::mem::take(&mut self.graves);
        graves.retain(|g| {
            !self.replayed.contains(&g.who) && !(until_fence(g.name) && self.fenced(g.life, g.client))
        });
        self.graves = graves;
    }

    pub(crate) fn logged(&mut self, counter: usize, value: u64) {
        self.seen.writes += 1;
        if value != self.logged[counter] + 1 {
            let last = self.logged[counter];
            self.fail(format!("I14 lost update: {value} written to counter {counter} after {last}"));
        }
        self.logged[counter] = value;
    }

    pub(crate) fn acknowledged(&mut self, who: Proc, counter: usize, value: u64) {
        if value > self.logged[counter] {
            self.fail(format!(
                "I14 {who} acknowledged {value} of counter {counter} before it is on the disk"
            ));
        }
        self.acked[counter] = self.acked[counter].max(value);
    }

    pub(crate) fn asked(&mut self, who: Proc, name: usize, mode: Mode, at: u64) {
        self.asked.entry((who, name)).or_insert((mode, at, 0));
    }

    pub(crate) fn answered(&mut self, who: Proc, name: usize, granted: bool, _now: u64) {
        let Some((_, at, _)) = self.asked.remove(&(who, name)) else { return };
        if !granted || !self.calm {
            return;
        }
        let mut worst = 0;
        for ((_, n), (_, asked, passed)) in &mut self.asked {
            if *n == name && *asked + 1000 * MS < at {
                *passed += 1;
                worst = worst.max(*passed);
            }
        }
        if worst > BYPASS {
            self.fail(format!("I4 a request for {name} saw {worst} later ones granted"));
        }
    }

    pub(crate) fn waiting(&self) -> Vec<String> {
        self.asked.iter().map(|((who, name), (mode, ..))| format!("{who} {mode:?} on {name}")).collect()
    }
}

/// A node of both, in whatever life: then one of the two views is over, because it needs that node to go on.
fn entangled(a: &[Proc], b: &[Proc]) -> bool {
    a.iter().any(|p| b.iter().any(|q| q.node == p.node))
}

impl World {
    // ---- views, quorum, fencing ----

    pub(crate) fn check_view(&mut self, i: usize, view: &View) {
        let me = self.nodes[i].daemon.as_ref().expect("invariant: it installs a view").me;
        let members: Vec<Proc> = view.members.iter().map(|m| m.proc()).collect();
        self.audit.seen.views += 1;
        let known = self.audit.views.entry(view.id).or_insert_with(|| members.clone());
        if *known != members {
            let text = format!("I7 view {} of {me} is {members:?}, elsewhere {known:?}", view.id);
            self.audit.fail(text);
        }
        let last = self.audit.last_seq.insert(me, view.seq).unwrap_or(0);
        if view.seq <= last {
            self.audit.fail(format!("I7 {me} installs view {} after {last}", view.seq));
        }
        if !members.contains(&me) {
            self.audit.fail(format!("I7 {me} is not in its own view {}", view.id));
        }
    }

    /// Never two quorate sides, and the device counts on one side only. What a sleeper would believe at this instant counts.
    pub(crate) fn check_quorum(&mut self) {
        let mut quorate: Vec<(RingId, usize)> = Vec::new();
        let mut holders: Vec<(RingId, usize)> = Vec::new();
        for i in 0..self.nodes.len() {
            let local = self.local(i);
            let Some(d) = &self.nodes[i].daemon else { continue };
            let Some(id) = d.stack.core.view_id() else { continue };
            if d.stack.core.quorum_at(local).quorate {
                quorate.push((id, i));
            }
            // who is cut from the device may believe in its old lease: the others waited for that proof instead
            if d.stack.core.device_held(local) && !self.nodes[i].blocked {
                holders.push((id, i));
            }
        }
        let members = |w: &Self, i: usize| {
            w.nodes[i].daemon.as_ref().map(|d| d.stack.core.members()).unwrap_or_default()
        };
        for (list, what) in [(&quorate, "quorate sides"), (&holders, "holders of the device")] {
            for (x, (va, a)) in list.iter().enumerate() {
                for (vb, b) in &list[..x] {
                    if va == vb {
                        continue;
                    }
                    let (ma, mb) = (members(self, *a), members(self, *b));
                    if !entangled(&ma, &mb) {
                        self.audit.fail(format!("I7 two {what}: {va} {ma:?} and {vb} {mb:?}"));
                    }
                }
            }
        }
    }

    pub(crate) fn check_event(&mut self, i: usize, event: &ClusterEvent) {
        let now = self.now;
        let me = self.nodes[i].daemon.as_ref().expect("invariant: it speaks").me;
        match event {
            ClusterEvent::Fenced { proc, scope, proof, .. } if proc.incarnation.0 != 0 => {
                let client = match scope {
                    Scope::Node => None,
                    Scope::Mount { client, .. } => Some(*client),
                };
                if !self.audit.told.insert((me, *proc, client)) {
                    self.audit.fail(format!("I9 {me} tells the proof for {proc} {client:?} twice"));
                }
                self.audit.seen.fences += 1;
                self.audit.seen.rejoined += u64::from(matches!(proof, membership::ipc::Proof::Rejoined(_)));
                self.audit.seen.mounts_only += u64::from(client.is_some());
                let first = match client {
                    None => self.audit.proved.insert(*proc, now).is_none(),
                    Some(client) => self.audit.proved_mounts.insert((*proc, client)),
                };
                if first {
                    self.check_proof(*proc, client);
                }
                self.audit.tidy();
            }
            ClusterEvent::PermitWithdrawn { .. } => self.audit.seen.lost_permits += 1,
            ClusterEvent::Device { held: true, .. } => self.audit.seen.grants_of_votes += 1,
            _ => {}
        }
    }

    /// An agent has proved that whatever ran on that node is dead. The proof is told for a long time, of what begins later it says nothing.
    pub(crate) fn unknown_proved(&mut self, node: NodeId) {
        let n = &self.nodes[usize::from(node.0) - 1];
        // what is cut from the LUN is proved too, although it runs
        let later = u64::from(n.daemon.is_some() && !n.blocked);
        let last = n.incarnation - later.min(n.incarnation);
        let before = self.audit.before.entry(node).or_default();
        *before = last.max(*before);
    }

    /// Nothing of what is proved dead may be able to write.
    fn check_proof(&mut self, life: Proc, client: Option<u32>) {
        let n = &self.nodes[usize::from(life.node.0) - 1];
        let hit = |who: Proc| {
            let (l, c) = self.audit.mounts[&who];
            l == life && client.is_none_or(|x| x == c)
        };
        let runs = n.mount.as_ref().is_some_and(|m| !m.dead && hit(m.who)) && !n.blocked;
        let writes = self.lun.pending.values().any(|p| hit(p.who)) && !n.blocked;
        if runs || writes {
            let what = if runs { "runs" } else { "has writes on their way" };
            self.audit.fail(format!("I9 {life} {client:?} is proved dead and {what}"));
        }
    }

    pub(crate) fn check_fencing(&mut self, i: usize, victim: Proc, probe: bool) {
        let local = self.local(i);
        let d = self.nodes[i].daemon.as_ref().expect("invariant: it acts");
        if !probe && !d.stack.core.quorum_at(local).quorate {
            let me = d.me;
            self.audit.fail(format!("I8 {me} fences {victim} without quorum"));
        }
    }

    // ---- the quorum disk ----

    pub(crate) fn check_master(&mut self, term: u64, me: Proc) {
        let first = *self.audit.masters.entry(term).or_insert(me);
        if first != me {
            self.audit.fail(format!("I11 two masters of term {term}: {first} and {me}"));
        }
    }

    pub(crate) fn check_slot(&mut self, me: Proc, block: &EBlock) {
        if block.proc() != me {
            self.audit.fail(format!("I11 {me} writes a block of {}", block.proc()));
        }
    }

    pub(crate) fn check_block(&mut self, block: &EBlock, failed: bool) {
        let i = usize::from(block.node.0) - 1;
        if let Some(old) = &self.lun.slots[i] {
            let back = old.incarnation == block.incarnation && block.seq <= old.seq && !failed;
            if back || block.incarnation < old.incarnation {
                let (new, old) = ((block.incarnation, block.seq), (old.incarnation, old.seq));
                self.audit.fail(format!("I11 slot {} goes back from {old:?} to {new:?}", i + 1));
            }
        }
        for (v, kill) in block.kill.iter().enumerate() {
            if let Some(k) = kill.filter(|_| !failed) {
                let victim = Proc { node: NodeId(v as u16 + 1), incarnation: k.incarnation };
                let at = self.local(v);
                if !self.audit.evicted.contains_key(&victim) {
                    self.audit.evicted.insert(victim, at);
                    self.audit.seen.evictions += u64::from(k.reason == KillReason::Silent);
                    self.say(|| format!("LUN kill entry against {victim}: {:?}", k.reason));
                }
            }
        }
    }

    /// A renewal counts after a read that began after its write: an entry that was there before is seen by it.
    pub(crate) fn check_renewal(&mut self, me: Proc, submitted: Boottime) {
        if let Some(at) = self.audit.evicted.get(&me).filter(|at| submitted > **at) {
            let late = submitted.since(*at);
            self.audit.fail(format!("I11 {me} is renewed {late:?} after its eviction could be read"));
        }
    }

    /// Who is found silent had no permit any more when the read began that found it.
    pub(crate) fn check_missed(&mut self, by: Proc, silent: Proc, read_began: u64) {
        let v = usize::from(silent.node.0) - 1;
        let began = self.local_at(v, read_began);
        let Some(d) = self.nodes[v].daemon.as_ref().filter(|d| d.me == silent) else { return };
        let known = d.renewals.iter().rev().find(|(at, _)| *at <= read_began);
        if let Some((_, until)) = known.filter(|(_, until)| began < *until) {
            let early = until.since(began);
            self.audit.fail(format!("I11 {by} finds {silent} silent {early:?} before its permit ends"));
        }
    }

    // ---- locks ----

    pub(crate) fn check_grant(&mut self, i: usize, name: usize, mode: Mode) {
        self.audit.seen.grants += 1;
        let me = self.nodes[i].mount.as_ref().expect("invariant: it has a lock").who;
        if self.audit.mount_fenced(me) {
            return;
        }
        let mut clash = None;
        for n in &self.nodes {
            let Some(m) = n.mount.as_ref().filter(|m| m.who != me && !m.dead) else { continue };
            let other = m.glocks.get(&name).and_then(|g| g.held);
            if let Some(held) = other.filter(|h| !h.compatible(mode))
                && !self.audit.mount_fenced(m.who)
            {
                clash = Some(format!("I1 {me} is granted {mode:?} on {name}, {} holds {held:?}", m.who));
            }
        }
        self.audit.tidy();
        for g in self.audit.graves.iter().filter(|g| g.name == name && !g.mode.compatible(mode)) {
            clash = Some(format!(
                "I1 gate: {me} is granted {mode:?} on {name}, the dead {} held {:?} and is not replayed (fenced {})",
                g.who,
                g.mode,
                self.audit.fenced(g.life, g.client)
            ));
        }
        if let Some(text) = clash {
            self.audit.fail(text);
        }
    }

    pub(crate) fn check_lvb(&mut self, who: Proc, name: usize, value: u64) {
        if self.audit.lvb[name] != Some(value) && !self.audit.mount_fenced(who) {
            let last = self.audit.lvb[name];
            self.audit
                .fail(format!("I5 {who} gets the value {value} of {name} as valid, last written {last:?}"));
        }
    }

    /// Sampled: one master per resource among those in the same view.
    pub(crate) fn sample(&mut self) {
        if self.now < self.audit.sampled + 700 * MS {
            return;
        }
        self.audit.sampled = self.now;
        let mut masters: BTreeMap<(u64, Vec<String>, String), Proc> = BTreeMap::new();
        let mut broken = None;
        for n in &self.nodes {
            let Some(m) = n.mount.as_ref().filter(|m| !m.dead && m.core.settled()) else { continue };
            let view = m.core.view().unwrap_or_default().0;
            let dump = m.core.dump();
            for r in dump.resources.into_iter().filter(|r| r.master == "here") {
                if let Some(other) = masters.insert((view, dump.members.clone(), r.name.clone()), m.who) {
                    broken =
                        Some(format!("I2 {} is mastered by {other} and {} in view {view}", r.name, m.who));
                }
            }
        }
        if let Some(text) = broken {
            self.audit.fail(text);
        }
    }

    /// When nothing moves: masters know exactly the locks of the living (I6), gates are open.
    pub(crate) fn check_tables(&mut self) {
        let mut granted: BTreeSet<(String, String, Mode)> = BTreeSet::new();
        let living: BTreeSet<String> =
            self.nodes.iter().filter_map(|n| n.mount.as_ref()).map(|m| m.who.to_string()).collect();
        let mut broken = None;
        for m in self.nodes.iter().filter_map(|n| n.mount.as_ref()) {
            for r in m.core.dump().resources.into_iter().filter(|r| r.master == "here") {
                if !r.ghosts.is_empty() || !r.masked_by.is_empty() {
                    broken = Some(format!("I6 {} has ghosts {:?} masks {:?}", r.name, r.ghosts, r.masked_by));
                }
                for l in r.granted.iter().chain(&r.converting) {
                    if !living.contains(&l.member) {
                        broken = Some(format!("I6 {} is held by the dead {}", r.name, l.member));
                    }
                    if let Some(mode) = l.granted {
                        granted.insert((r.name.clone(), l.member.clone(), mode));
                    }
                }
            }
        }
        let lanes_empty = self
            .nodes
            .iter()
            .filter_map(|n| n.mount.as_ref())
            .all(|m| self.lane_is_empty(m.who) && m.glocks.values().all(|g| g.pending.is_none()));
        if lanes_empty {
            for m in self.nodes.iter().filter_map(|n| n.mount.as_ref()) {
                for (name, g) in &m.glocks {
                    let key = (crate::mount::name_of(*name).to_string(), m.who.to_string());
                    if let Some(mode) = g.held
                        && !granted.contains(&(key.0.clone(), key.1.clone(), mode))
                    {
                        broken =
                            Some(format!("I6 {} holds {mode:?} on {name}, its master does not know", m.who));
                    }
                }
            }
        }
        if let Some(text) = broken {
            self.audit.fail(text);
        }
    }

    // ---- writes and reads ----

    pub(crate) fn check_write_start(&mut self, i: usize) {
        let local = self.local(i);
        let n = &self.nodes[i];
        let m = n.mount.as_ref().expect("invariant: it writes");
        let (who, life) = (m.who, m.life);
        let daemon = n.daemon.as_ref().filter(|d| d.me == life);
        let deadline = daemon.map_or(n.quorate_deadline, |d| self.stop_deadline(d));
        if local >= deadline {
            let late = local.since(deadline);
            self.audit.fail(format!("I10 {who} starts a write {late:?} after its stop deadline"));
        } else if let Some(d) = daemon.filter(|_| n.daemon_asleep == 0)
            && !d.stack.core.quorum_at(local).quorate
        {
            self.audit.fail(format!("I10 {who} starts a write without quorum"));
        }
    }

    pub(crate) fn check_landing(&mut self, p: &Pending) {
        let (life, client) = self.audit.mounts[&p.who];
        if self.audit.fenced(life, client) {
            self.audit.fail(format!("I9 {:?} of {} lands after the proof of its death", p.op, p.who));
        }
        let (jid, logs) = match p.op {
            Op::Log { jid, .. } | Op::Revoke { jid, .. } => (Some(jid), true),
            Op::Clear { jid } => (Some(jid), false),
            Op::InPlace { counter, value } => {
                let (old, logged) = (self.lun.counters[counter], self.audit.logged[counter]);
                if value < old || value > logged {
                    let text = format!(
                        "I14 counter {counter} goes from {old} to {value} by {}, logged {logged}",
                        p.who
                    );
                    self.audit.fail(text);
                }
                (None, false)
            }
        };
        let Some(jid) = jid else { return };
        if logs && self.lun.journal_of[jid] != Some(p.who) {
            let text = format!("I16 {} writes journal {jid} of {:?}", p.who, self.lun.journal_of[jid]);
            self.audit.fail(text);
        }
        let other = self.nodes.iter().filter_map(|n| n.mount.as_ref()).find(|m| {
            m.who != p.who && m.glocks.get(&(JOURNAL + jid)).is_some_and(|g| g.held == Some(Mode::EX))
        });
        if let Some(other) = other.filter(|m| !self.audit.mount_fenced(m.who)) {
            let text = format!("I16 {} writes journal {jid}, {} has its lock", p.who, other.who);
            self.audit.fail(text);
        }
    }

    pub(crate) fn check_read(&mut self, i: usize, counter: usize, value: u64) {
        let who = self.nodes[i].mount.as_ref().expect("invariant: it reads").who;
        let (logged, acked) = (self.audit.logged[counter], self.audit.acked[counter]);
        if value != logged && !self.audit.mount_fenced(who) {
            self.audit.fail(format!(
                "I14 {who} reads {value} of counter {counter} under its lock, logged {logged}, acknowledged {acked}"
            ));
        }
    }

    pub(crate) fn check_look(&mut self, who: Proc, counter: usize, value: u64) {
        let logged = self.audit.logged[counter];
        if value != logged && !self.audit.mount_fenced(who) {
            self.audit.fail(format!(
                "I14 {who} shows {value} of counter {counter} under its lock, logged {logged}"
            ));
        }
    }

    // ---- journals ----

    /// A replay begins: the owner must be proved dead. A recoverer that is proved dead itself (cut from the LUN while it slept) changes
    /// nothing any more; that none of its writes lands is I9.
    pub(crate) fn check_replay(&mut self, who: Proc, jid: usize, dead: Option<Proc>) {
        if self.audit.mount_fenced(who) {
            return;
        }
        self.audit.seen.entries += self.lun.journals[jid].len() as u64;
        let owner = self.lun.journal_of[jid].filter(|o| *o != who);
        for o in owner.into_iter().chain(dead) {
            if !self.audit.mount_fenced(o) {
                self.audit.fail(format!("I8 {who} replays journal {jid} of {o}, which is not proved dead"));
            }
            let n = &self.nodes[usize::from(o.node.0) - 1];
            let runs = n.mount.as_ref().is_some_and(|m: &Mount| m.who == o && !m.dead) && !n.blocked;
            if runs || self.lun.busy(o) && !n.blocked {
                self.audit.fail(format!("I8 {who} replays journal {jid} of {o}, which can still write"));
            }
        }
    }

    pub(crate) fn check_journal_taken(&mut self, who: Proc, jid: usize) {
        if let Some(o) = self.lun.journal_of[jid].filter(|o| *o != who)
            && !self.audit.mount_fenced(o)
        {
            self.audit.fail(format!("I16 {who} takes journal {jid} of {o}, which is not proved dead"));
        }
    }

    /// A first mounter has replayed every journal: what the dead held is free.
    pub(crate) fn check_first_mounter(&mut self, who: Proc) {
        let unproved = self.audit.graves.iter().find(|g| !self.audit.fenced(g.life, g.client)).map(|g| g.who);
        if let Some(o) = unproved {
            self.audit
                .fail(format!("I8 the first mounter {who} does not know of {o}, which is not proved dead"));
        }
        let dead: Vec<Proc> = self.audit.graves.iter().map(|g| g.who).collect();
        self.audit.replayed.extend(dead);
        // who is cut from the LUN may run on and die later
        let cut: Vec<Proc> = self
            .nodes
            .iter()
            .filter_map(|n| n.mount.as_ref().map(|m| m.who))
            .filter(|p| self.audit.mount_fenced(*p))
            .collect();
        self.audit.replayed.extend(cut);
        self.audit.tidy();
    }

    // ---- the end ----

    /// The ring's rules over everything that was delivered.
    pub(crate) fn check_evs(&mut self) -> Result<(), String> {
        let mut alive = BTreeSet::new();
        for n in &self.nodes {
            if let Some(d) = &n.daemon {
                alive.insert(d.me);
                self.audit.traces.push(d.stack.groups.engine().trace.clone());
            }
        }
        evs::check(&self.audit.traces, &alive)
    }

    /// Why the cluster is not whole yet; empty when it is.
    pub(crate) fn missing(&self) -> String {
        if self.agents > 0 {
            return format!("{} fence agents run", self.agents);
        }
        let mut first = None;
        for (i, n) in self.nodes.iter().enumerate() {
            let local = self.local(i);
            let Some(d) = n.daemon.as_ref().filter(|_| n.daemon_asleep == 0) else {
                return format!("n{} has no daemon", i + 1);
            };
            if n.leaving {
                return format!("n{} is leaving", i + 1);
            }
            let core = &d.stack.core;
            let id = core.view_id();
            if *first.get_or_insert(id) != id || core.members().len() != self.nodes.len() {
                return format!("n{} is in view {id:?} {:?}", i + 1, core.members());
            }
            if !core.quorum_at(local).quorate {
                return format!("n{} is not quorate: {:?}", i + 1, core.quorum_at(local));
            }
            if d.disk.is_some() && !core.device_held(local) {
                return format!("n{} does not hold the device", i + 1);
            }
            let state = core.domain().state();
            if !state.victims.is_empty() || state.members.len() != self.nodes.len() {
                return format!("n{} domain {:?} victims {:?}", i + 1, state.members, state.victims);
            }
            let Some(m) = n.mount.as_ref().filter(|m| m.is_mounted() && n.mount_asleep == 0) else {
                return format!("n{} is not mounted: {:?}", i + 1, n.mount.as_ref().map(Mount::picture));
            };
            if !m.members.is_settled() || m.core.gates().next().is_some() {
                return format!("n{} waits for a replay: {}", i + 1, m.picture());
            }
        }
        self.services_missing()
    }
}
