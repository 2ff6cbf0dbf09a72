//! Messages between members. One ordered, exactly-once lane per pair of members carries them; each is stamped by the
//! driver's frame with the sender and the sender's view.

use crate::name::ResName;
use crate::plock::{PlockKey, PlockRange, PlockTest};
use crate::resource::LvbCopy;
use crate::types::{Flags, LockId, Lvb, Mode, SbFlags, Status, Term};
use cairn_base::Proc;

/// An operation executed by the master of a tree, for the member that sent it.
#[derive(Clone, PartialEq, Debug)]
pub enum TreeOp {
    Request {
        id: LockId,
        op: u32,
        mode: Mode,
        flags: Flags,
        order: u64,
    },
    Convert {
        id: LockId,
        op: u32,
        mode: Mode,
        flags: Flags,
        order: u64,
        lvb: Option<Lvb>,
    },
    Release {
        id: LockId,
        flags: Flags,
        lvb: Option<Lvb>,
    },
    Cancel {
        id: LockId,
        op: u32,
    },
    PlockLock {
        ticket: u64,
        range: PlockRange,
        wait: bool,
    },
    PlockUnlock {
        ticket: u64,
        range: PlockRange,
    },
    /// `deadlock`: taken back because its wait closes a circle.
    PlockCancel {
        ticket: u64,
        deadlock: bool,
    },
    /// Does the wait of `ticket` lead back to the probe's victim?
    PlockProbe {
        ticket: u64,
        probe: Probe,
    },
    PlockTest {
        ticket: u64,
        range: PlockRange,
    },
}

/// A lock as its holder presents it to the new master of an orphaned tree.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    pub name: ResName,
    pub id: LockId,
    pub op: u32,
    /// As the dead master last knew it for certain.
    pub granted: Option<Mode>,
    /// Operation under way.
    pub want: Option<Mode>,
    pub flags: Flags,
    pub order: u64,
    pub valblk: bool,
    /// The holder's copy of the value, when it has one; `valid` false: it was flagged when read.
    pub lvb: Option<LvbCopy>,
    pub lvb_valid: bool,
}

/// What one member knows of a tree whose master is gone.
#[derive(Clone, PartialEq, Debug)]
pub struct Claim {
    pub root: ResName,
    pub records: Vec<Record>,
    pub ranges: Vec<PlockRange>,
}

/// Answer to a byte-range operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlockAnswer {
    Granted,
    /// Somebody else holds it and the request would not wait.
    Again,
    Cancelled,
    Deadlock,
    Tested(Option<PlockTest>),
    /// Only between nodes: queued at the master.
    Queued,
}

/// A search for a circle of waiting byte-range owners: started for `victim`, now at `owner`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The owner whose new wait started the search, and the ticket of that wait.
    pub victim: PlockKey,
    pub ticket: u64,
    /// Does this owner wait for something?
    pub owner: PlockKey,
    pub hops: u8,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Msg {
    /// Requester → directory. The operation is executed by whoever is or becomes master.
    Lookup {
        name: ResName,
        op: TreeOp,
    },
    /// Directory → master, on behalf of `origin`.
    Forward {
        origin: Proc,
        name: ResName,
        term: Term,
        op: TreeOp,
    },
    /// Directory → requester: the tree is yours. `masks`: dead procs that may hold anything in it.
    YouAreMaster {
        root: ResName,
        term: Term,
        masks: Vec<Proc>,
    },
    /// Directory or master → holder: who the master is.
    Assign {
        root: ResName,
        master: Proc,
        term: Term,
    },
    /// Master → directory: the tree is idle here, forget it.
    Drop {
        root: ResName,
        term: Term,
    },
    /// Directory → master: forgotten.
    Dropped {
        root: ResName,
        term: Term,
    },
    /// Holder → master.
    Op {
        name: ResName,
        term: Term,
        op: TreeOp,
    },
    /// I am not the master of that term: look it up again. `looked_up`: answers a forwarded operation.
    Redirect {
        root: ResName,
        term: Term,
        looked_up: bool,
    },
    /// Master → holder.
    Result {
        name: ResName,
        term: Term,
        id: LockId,
        op: u32,
        status: Status,
        mode: Option<Mode>,
        sb: SbFlags,
        lvb: Option<LvbCopy>,
    },
    Bast {
        id: LockId,
        mode: Mode,
    },
    PlockResult {
        name: ResName,
        term: Term,
        ticket: u64,
        answer: PlockAnswer,
    },
    /// Master → home of an owner that stands in the way of a waiting byte-range request, and on from there.
    Probe(Probe),
    /// → home of the victim: the wait of this ticket closes a circle.
    PlockVictim {
        ticket: u64,
    },
    /// Every member → owner of slices that it gained: trees that the sender masters there.
    Mastered {
        trees: Vec<(ResName, Term)>,
    },
    /// Every member → slice owner: trees whose master is gone.
    Claims {
        claims: Vec<Claim>,
    },
    /// End of the two above for this view. `fresh`: the sender has no state of earlier views, its gates count for nothing.
    SyncEnd {
        fresh: bool,
        gates: Vec<(Proc, bool)>,
    },
    /// The journal of this dead proc is replayed.
    Recovered {
        who: Proc,
    },
}
