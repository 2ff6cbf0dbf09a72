//! The lock manager of one member of one lock space, as a pure state machine: calls and messages in, actions out.
//!
//! A *tree* (root resource and what lies below) has one master at a time, named by the owner of its directory slice
//! together with a rising *term*. Three roles live in one `Core`: holder (`holder.rs`: this node's own locks),
//! master (`master.rs`: trees decided here), directory and recovery (`recovery.rs`).
//!
//! Why nothing stops when a member dies (5.6): its locks stay as ghosts at surviving masters; trees it mastered are
//! presented by their holders to the slice owner, which bounds by masks what the dead may have held; each dead proc
//! has a gate that opens when it is fenced and recovered.
//!
//! Order and stamps: one FIFO exactly-once lane per pair of members. A message carries its sender's view; one from the
//! future waits for that view; one from a proc that is not a member now is dropped. Directory messages count only in
//! the view in which they were sent (senders repeat them after a view change); operations and answers count by term.
//!
//! Views rise; a member without quorum may miss some. Which slices a member gained is computed by every member from
//! the view before, so one that missed a view tells all it masters.

mod dump;
mod holder;
mod master;
mod recovery;
#[cfg(test)]
mod tests;

pub use dump::{DumpDir, DumpLock, DumpResource, DumpState};

use crate::directory::{Directory, slice_of};
use crate::msg::{Claim, Msg, PlockAnswer, TreeOp};
use crate::mutant::{self, Mutant};
use crate::name::ResName;
use crate::plock::{PlockOut, PlockRange, Ranges};
use crate::resource::{LvbCopy, Out, Resource};
use crate::types::{Flags, LVB_LEN, LockError, LockId, Lvb, Mode, SbFlags, Status, Term};
use cairn_base::{Boottime, Proc, ViewId};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// How a lock space is run. All members must agree.
#[derive(Clone, Debug)]
pub struct Config {
    pub me: Proc,
    /// The gate of a dead member opens when it is fenced *and* `recovered` was said; else when it is fenced.
    pub needs_recovery: bool,
    /// Conservative: grant nothing while any gate is shut, as the Linux manager does.
    pub stop_all: bool,
    /// How long an unused tree stays mastered here.
    pub idle: Duration,
}

impl Config {
    pub fn new(me: Proc) -> Self {
        Self { me, needs_recovery: true, stop_all: false, idle: Duration::from_secs(10) }
    }
}

/// A totally ordered, quorate view.
#[derive(Clone, Debug)]
pub struct CoreView {
    pub id: ViewId,
    pub members: Vec<Proc>,
    /// Those that left since the view before in good order: everything released, nothing to fence.
    pub left_clean: Vec<Proc>,
}

/// The one answer to an accepted operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    pub lock: LockId,
    /// What the caller gave with `request`.
    pub user: u64,
    pub status: Status,
    /// Granted mode now; `None`: the lock is gone.
    pub mode: Option<Mode>,
    pub sb: SbFlags,
    /// With VALBLK, where the operation reads and the resource ever had a value.
    pub lvb: Option<Lvb>,
}

#[derive(Clone, Debug)]
pub enum Action {
    Complete(Completion),
    /// A granted lock stands in the way of `mode`.
    Block {
        lock: LockId,
        user: u64,
        mode: Mode,
    },
    Send {
        to: Proc,
        msg: Msg,
    },
    PlockDone {
        ticket: u64,
        answer: PlockAnswer,
    },
    /// A rebuild after a view change is over at this node.
    Rebuilt(RebuildReport),
    /// A peer said something impossible.
    PeerError {
        from: Proc,
        what: &'static str,
    },
}

/// What a rebuild did here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebuildReport {
    pub view: ViewId,
    pub trees_rebuilt: usize,
    pub locks_rebuilt: usize,
    pub trees_given: usize,
    pub trees_masked: usize,
}

/// Inputs other than calls of local users.
#[derive(Clone, Debug)]
pub enum Event {
    View(CoreView),
    Msg {
        from: Proc,
        view: ViewId,
        msg: Msg,
    },
    Fenced(Proc),
    /// `spread`: tell the other members too.
    Recovered {
        who: Proc,
        spread: bool,
    },
    /// Quorum lost: decide nothing until the next view or `Resume`.
    Suspend,
    Resume,
    Tick,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    /// The operation has not reached a master for certain: in `lookup_op` or `unsent`.
    Queued,
    /// Sent to the master; presented at a rebuild.
    Sent,
}

/// A lock of this node.
#[derive(Debug)]
struct Lock {
    generation: u32,
    live: bool,
    /// Released by its user; the slot lives until the release is on its way.
    closing: bool,
    tree: u32,
    /// `None`: the root resource.
    name: Option<Box<ResName>>,
    user: u64,
    flags: Flags,
    granted: Option<Mode>,
    /// As the master knows it once it has read its lane.
    sent: Option<Mode>,
    want: Option<Mode>,
    phase: Phase,
    op: u32,
    /// Last operation that a master has got.
    sent_op: u32,
    order: u64,
    cancelling: bool,
    timed_out: bool,
    deadline: Option<Boottime>,
    valblk: bool,
    /// Copy of the value: `seq` 0 when the resource had none. `None`: never read.
    lvb: Option<LvbCopy>,
    lvb_valid: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Know {
    Unknown,
    LookingUp,
    At(Proc, Term),
    Mine,
    /// Its master is gone; our records lie with the slice owner.
    Orphan,
}

/// Byte-range locks of this node in one tree.
#[derive(Debug, Default)]
struct PlockHolder {
    held: Vec<PlockRange>,
    /// Unanswered operations in order.
    ops: Vec<PlockPending>,
}

#[derive(Debug)]
struct PlockPending {
    ticket: u64,
    op: TreeOp,
    /// Reached a master for certain.
    sent: bool,
    /// Its master said that it waits.
    queued: bool,
    cancelling: bool,
}

#[derive(Debug)]
struct Tree {
    root: ResName,
    live: bool,
    slice: u16,
    know: Know,
    /// Highest term seen for this root.
    term: Term,
    lookup_op: Option<(ResName, TreeOp)>,
    unsent: VecDeque<(ResName, TreeOp)>,
    locks: Vec<u32>,
    master: Option<Box<Master>>,
    plocks: Option<Box<PlockHolder>>,
    idle_since: Option<Boottime>,
    in_idle_queue: bool,
}

/// State of a tree that is mastered here.
#[derive(Debug)]
struct Master {
    term: Term,
    /// Dead procs that may hold any resource of the tree that no survivor presented.
    masks: Vec<Proc>,
    top: Resource,
    below: BTreeMap<ResName, Resource>,
    ranges: Ranges,
    /// Asked the directory to forget it: nothing is executed until the answer.
    dropping: bool,
    held: Vec<(Proc, ResName, TreeOp, bool)>,
}

#[derive(Debug, Default)]
struct Sync {
    /// Members whose end marker for this view is missing.
    waiting: BTreeSet<Proc>,
    claims: BTreeMap<ResName, Vec<(Proc, Claim)>>,
    /// A rebuild was completed at this node since it joined.
    synced: bool,
    /// What members with state say about gates, for a joiner.
    peer_gates: Option<BTreeMap<Proc, bool>>,
    /// What other newcomers say; counts when there is no member with state.
    fresh_gates: BTreeMap<Proc, bool>,
    founder: bool,
    /// A user here has asked for a lock.
    used: bool,
    /// Gates of the others count at the end of this rebuild.
    merge: bool,
    running: bool,
    report: RebuildReport,
}

/// Most messages kept for views that have not arrived here yet; beyond it the peer is reported and dropped from.
const FUTURE_LIMIT: usize = 1 << 20;

/// The state machine.
#[derive(Debug)]
pub struct Core {
    cfg: Config,
    me: Proc,
    now: Boottime,
    view: Option<ViewId>,
    members: Vec<Proc>,
    evicted: bool,
    suspended: bool,
    leaving: bool,
    /// Lamport clock for order stamps.
    clock: u64,
    term_counter: u32,
    next_ticket: u64,
    trees: Vec<Tree>,
    free_trees: Vec<u32>,
    by_root: FxHashMap<ResName, u32>,
    locks: Vec<Lock>,
    free_locks: Vec<u32>,
    tickets: FxHashMap<u64, u32>,
    idle: VecDeque<u32>,
    deadlines: BTreeSet<(Boottime, LockId)>,
    lookups: BTreeSet<u32>,
    /// Trees mastered here with ghosts or masks.
    haunted: BTreeSet<u32>,
    dir: Directory,
    held_lookups: Vec<(Proc, ResName, TreeOp)>,
    gates: BTreeMap<Proc, bool>,
    early_fenced: BTreeSet<Proc>,
    early_recovered: BTreeSet<Proc>,
    sync: Sync,
    future: BTreeMap<ViewId, Vec<(Proc, Msg)>>,
    future_len: usize,
    scratch: Vec<Out>,
    plock_scratch: Vec<PlockOut>,
}

impl Core {
    pub fn new(cfg: Config) -> Self {
        Self {
            me: cfg.me,
            cfg,
            now: Boottime::ZERO,
            view: None,
            members: Vec::new(),
            evicted: false,
            suspended: false,
            leaving: false,
            clock: 0,
            term_counter: 0,
            next_ticket: 0,
            trees: Vec::new(),
            free_trees: Vec::new(),
            by_root: FxHashMap::default(),
            locks: Vec::new(),
            free_locks: Vec::new(),
            tickets: FxHashMap::default(),
            idle: VecDeque::new(),
            deadlines: BTreeSet::new(),
            lookups: BTreeSet::new(),
            haunted: BTreeSet::new(),
            dir: Directory::new(),
            held_lookups: Vec::new(),
            gates: BTreeMap::new(),
            early_fenced: BTreeSet::new(),
            early_recovered: BTreeSet::new(),
            sync: Sync::default(),
            future: BTreeMap::new(),
            future_len: 0,
            scratch: Vec::new(),
            plock_scratch: Vec::new(),
        }
    }

    pub fn view(&self) -> Option<ViewId> {
        self.view
    }

    /// Every slice and orphan of the present view is settled at this node.
    pub fn settled(&self) -> bool {
        self.view.is_some() && !self.sync.running
    }

    /// True once this node has taken part in a completed rebuild, so that it knows every shut gate.
    pub fn synced(&self) -> bool {
        self.sync.synced
    }

    /// This member's first rebuild found no member with state: nobody knows who died before. Its user must wait for
    /// every fence under way and replay every journal before it relies on a lock.
    pub fn founder(&self) -> bool {
        self.sync.founder
    }

    /// Knows of no gate but by hearsay. A founder stays so until its user relies on it: members with state that come meanwhile (they
    /// were only missed, without quorum) know more than it does, and what it knows must not open a gate of theirs.
    fn is_fresh(&self) -> bool {
        !self.sync.synced || (self.sync.founder && !self.sync.used)
    }

    /// Dead procs whose gates are shut, with "fenced already".
    pub fn gates(&self) -> impl Iterator<Item = (Proc, bool)> + '_ {
        self.gates.iter().map(|(p, f)| (*p, *f))
    }

    /// One input; what has to be done about it is appended to `out`.
    pub fn step(&mut self, now: Boottime, event: Event, out: &mut Vec<Action>) -> Result<(), LockError> {
        self.now = self.now.max(now);
        match event {
            Event::View(v) => return self.install_view(v, out),
            Event::Msg { from, view, msg } => self.receive(from, view, msg, out),
            Event::Fenced(who) => self.fenced(who, out),
            Event::Recovered { who, spread } => {
                if spread {
                    for p in self.members.clone() {
                        if p != self.me {
                            out.push(Action::Send { to: p, msg: Msg::Recovered { who } });
                        }
                    }
                }
                self.recovered(who, out);
            }
            Event::Suspend => self.suspended = true,
            Event::Resume => self.resume(out),
            Event::Tick => self.tick(out),
        }
        Ok(())
    }

    /// Next moment at which `Tick` has something to do.
    pub fn next_deadline(&self) -> Option<Boottime> {
        self.deadlines.first().map(|(t, _)| *t)
    }

    fn receive(&mut self, from: Proc, view: ViewId, msg: Msg, out: &mut Vec<Action>) {
        if self.evicted || from == self.me {
            return;
        }
        if self.view.is_none_or(|v| view > v) {
            if self.future_len == FUTURE_LIMIT {
                out.push(Action::PeerError { from, what: "too many messages of a view that does not come" });
                return;
            }
            self.future_len += 1;
            self.future.entry(view).or_default().push((from, msg));
            return;
        }
        if self.members.binary_search(&from).is_err() && !mutant::on(Mutant::StaleView) {
            return;
        }
        let current = self.view == Some(view);
        match msg {
            Msg::Lookup { name, op } if current => {
                self.see_order(&op);
                self.dir_lookup(from, name, op, out);
            }
            Msg::YouAreMaster { root, term, masks } if current => {
                self.you_are_master(from, &root, term, &masks, out);
            }
            Msg::Drop { root, term } if current => self.dir_drop(from, &root, term, out),
            Msg::Dropped { root, term } if current => self.dropped(&root, term, out),
            Msg::Claims { claims } if current => {
                for c in claims {
                    for r in &c.records {
                        self.clock = self.clock.max(r.order);
                    }
                    self.sync.claims.entry(c.root.clone()).or_default().push((from, c));
                }
                if mutant::on(Mutant::EarlyAssign) {
                    self.sync.waiting.clear();
                    self.try_complete_sync(out);
                }
            }
            Msg::SyncEnd { fresh, gates } if current => self.sync_end(from, fresh, gates, out),
            Msg::Lookup { .. }
            | Msg::YouAreMaster { .. }
            | Msg::Drop { .. }
            | Msg::Dropped { .. }
            | Msg::Claims { .. }
            | Msg::SyncEnd { .. } => {} // of an older view: its sender repeats it in this one
            Msg::Assign { root, master, term } => self.assigned(from, current, &root, master, term, out),
            Msg::Mastered { trees } => self.mastered(from, trees),
            Msg::Forward { origin, name, term, op } => {
                if self.members.binary_search(&origin).is_ok() {
                    self.see_order(&op);
                    self.master_op(origin, name, term, op, true, out);
                }
            }
            Msg::Op { name, term, op } => {
                self.see_order(&op);
                self.master_op(from, name, term, op, false, out);
            }
            Msg::Redirect { root, term, looked_up } => self.redirected(from, &root, term, looked_up, out),
            Msg::Result { name, term, id, op, status, mode, sb, lvb } => {
                let r = Out::Result { who: self.me, id, op, status, mode, sb, lvb };
                self.holder_result(from, &name, term, r, out);
            }
            Msg::Bast { id, mode } => self.holder_bast(id, mode, out),
            Msg::PlockResult { name, term, ticket, answer } => {
                self.plock_result(from, &name, term, ticket, answer, out);
            }
            Msg::Probe(p) => self.probe_at_home(p, out),
            Msg::PlockVictim { ticket } => self.plock_take_back(ticket, true, out),
            Msg::Recovered { who } => self.recovered(who, out),
        }
    }

    fn see_order(&mut self, op: &TreeOp) {
        if let TreeOp::Request { order, .. } | TreeOp::Convert { order, .. } = op {
            self.clock = self.clock.max(*order);
        }
    }

    fn send(&self, to: Proc, msg: Msg, out: &mut Vec<Action>) {
        debug_assert!(to != self.me);
        out.push(Action::Send { to, msg });
    }

    // ---- trees ---------------------------------------------------------------------------------------------------

    fn tree_of(&mut self, root: ResName) -> u32 {
        if let Some(&t) = self.by_root.get(&root) {
            return t;
        }
        let tree = Tree {
            slice: slice_of(&root),
            root: root.clone(),
            live: true,
            know: Know::Unknown,
            term: Term::default(),
            lookup_op: None,
            unsent: VecDeque::new(),
            locks: Vec::new(),
            master: None,
            plocks: None,
            idle_since: None,
            in_idle_queue: false,
        };
        let at = if let Some(at) = self.free_trees.pop() {
            self.trees[at as usize] = tree;
            at
        } else {
            self.trees.push(tree);
            (self.trees.len() - 1) as u32
        };
        self.by_root.insert(root, at);
        at
    }

    fn free_tree(&mut self, at: u32) {
        let t = &mut self.trees[at as usize];
        assert!(
            t.live && t.locks.is_empty() && t.unsent.is_empty() && t.lookup_op.is_none(),
            "freeing a used tree"
        );
        t.live = false;
        t.master = None;
        t.plocks = None;
        let in_queue = t.in_idle_queue;
        let root = t.root.clone();
        self.by_root.remove(&root);
        self.lookups.remove(&at);
        self.haunted.remove(&at);
        // A slot that is still in the idle queue is reused only after it was taken out of it.
        if !in_queue {
            self.free_trees.push(at);
        }
    }

    fn tree_is_idle(&self, at: u32) -> bool {
        let t = &self.trees[at as usize];
        t.locks.is_empty()
            && t.unsent.is_empty()
            && t.lookup_op.is_none()
            && t.plocks.as_ref().is_none_or(|p| p.ops.is_empty() && p.held.is_empty())
            && t.master.as_ref().is_none_or(|m| m.is_idle())
    }

    /// Called after anything that may have used a tree up.
    fn settle(&mut self, at: u32) {
        if !self.trees[at as usize].live {
            return;
        }
        let idle = self.tree_is_idle(at);
        let now = self.now;
        let t = &mut self.trees[at as usize];
        if !idle {
            t.idle_since = None;
            return;
        }
        if t.idle_since.is_none() {
            t.idle_since = Some(now);
        }
        if !t.in_idle_queue {
            t.in_idle_queue = true;
            self.idle.push_back(at);
        }
    }

    fn tick(&mut self, out: &mut Vec<Action>) {
        while let Some(&(t, id)) = self.deadlines.first() {
            if t > self.now {
                break;
            }
            self.deadlines.pop_first();
            self.timed_out(id, out);
        }
        let cutoff = self.now;
        for _ in 0..self.idle.len().min(4096) {
            let at = self.idle.pop_front().expect("counted");
            let t = &mut self.trees[at as usize];
            t.in_idle_queue = false;
            if !t.live {
                self.free_trees.push(at);
                continue;
            }
            match t.idle_since {
                Some(since) if since + self.cfg.idle <= cutoff => self.drop_tree(at, out),
                Some(_) => {
                    t.in_idle_queue = true;
                    self.idle.push_back(at);
                }
                None => {}
            }
        }
    }

    /// Gives up an idle tree, or the memory of where it is mastered.
    fn drop_tree(&mut self, at: u32, out: &mut Vec<Action>) {
        if !self.tree_is_idle(at) {
            return;
        }
        let t = &mut self.trees[at as usize];
        let owner = self.dir.owner(t.slice);
        match (&mut t.master, owner) {
            (None, _) => self.free_tree(at),
            (Some(m), Some(owner)) if owner == self.me => {
                if self
                    .dir
                    .entries
                    .get(&t.root)
                    .is_some_and(|e| e.master == Some(self.me) && e.term == m.term)
                {
                    let root = t.root.clone();
                    self.dir.entries.remove(&root);
                }
                self.free_tree(at);
            }
            (Some(m), Some(owner)) if !m.dropping && !self.evicted => {
                m.dropping = true;
                let (root, term) = (t.root.clone(), m.term);
                self.send(owner, Msg::Drop { root, term }, out);
            }
            (Some(_), _) => {}
        }
    }

    fn dropped(&mut self, root: &ResName, term: Term, out: &mut Vec<Action>) {
        let Some(&at) = self.by_root.get(root) else { return };
        let t = &mut self.trees[at as usize];
        let Some(m) = t.master.as_mut().filter(|m| m.dropping && m.term == term) else { return };
        let held = std::mem::take(&mut m.held);
        t.master = None;
        t.know = Know::Unknown;
        self.haunted.remove(&at);
        for (from, name, op, looked_up) in held {
            if from == self.me {
                // Ours: start again from the directory.
                self.mark_queued(&op);
                self.dispatch(at, name, op, out);
            } else {
                let root = root.clone();
                self.send(from, Msg::Redirect { root, term, looked_up }, out);
            }
        }
        if self.tree_is_idle(at) {
            self.free_tree(at);
        }
    }

    /// A lock slot of this node, if the id is alive.
    fn lock_slot(&self, id: LockId) -> Option<usize> {
        let l = self.locks.get(id.slot())?;
        (l.live && l.generation == id.generation()).then_some(id.slot())
    }

    fn id_of(&self, slot: usize) -> LockId {
        LockId::new(slot as u32, self.locks[slot].generation)
    }

    fn name_of(&self, slot: usize) -> ResName {
        let l = &self.locks[slot];
        l.name.as_ref().map_or_else(|| self.trees[l.tree as usize].root.clone(), |n| (**n).clone())
    }
}

impl Master {
    fn is_idle(&self) -> bool {
        !self.dropping
            && self.masks.is_empty()
            && self.top.is_idle()
            && self.below.is_empty()
            && self.ranges.is_idle()
    }

    fn resources(&mut self) -> impl Iterator<Item = &mut Resource> {
        std::iter::once(&mut self.top).chain(self.below.values_mut())
    }
}

const ZERO_LVB: Lvb = [0; LVB_LEN];
