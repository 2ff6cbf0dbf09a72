//! The boundary between glocks and a lock manager.
//!
//! One lock per glock name and mount; modes and names are those of the kernel's lock_dlm, so that what a lock tool
//! shows is what a GFS2 expert expects. Implementations: `lockspace::local` (lock_nolock, and an in-memory manager that
//! several mounts of one process share, for tests) and `lockdlm` (on the `dlm` crate).

pub mod local;
mod plock;
pub mod shared;

use crate::Result;
use std::fmt;
use std::sync::Arc;

/// Glock types with their on-disk-protocol numbers (GFS2 lock_dlm).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum GlockType {
    NonDisk = 1,
    Inode = 2,
    Rgrp = 3,
    Meta = 4,
    Iopen = 5,
    Flock = 6,
    Plock = 7,
    Quota = 8,
    Journal = 9,
}

/// (type, number): number is a block address, a journal id, or one of the fixed non-disk numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GlockName {
    pub ty: GlockType,
    pub number: u64,
}

impl GlockName {
    /// The 24 bytes used as DLM resource name: type in 8 and number in 16 columns, lower-case hex, right aligned.
    pub fn dlm_name(&self) -> [u8; 24] {
        let text = format!("{:>8x}{:>16x}", self.ty as u8, self.number);
        let mut name = [b' '; 24];
        name.copy_from_slice(&text.as_bytes()[..24]);
        name
    }

    /// Protects nothing that a replay could change: what a dead node held is free once it is fenced.
    pub const fn is_released_at_fence(self) -> bool {
        matches!(self.ty, GlockType::NonDisk | GlockType::Flock | GlockType::Journal)
    }
}

impl fmt::Display for GlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:x}", self.ty as u8, self.number)
    }
}

/// State of a glock. DLM modes: NL, PR, CW, EX.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum LockState {
    #[default]
    Unlocked,
    Shared,
    Deferred,
    Exclusive,
}

/// Value block of a lock; `None` where the resource never had one or it was lost with its writer.
pub type Lvb = [u8; 32];

/// How a request is made. All false: an ordinary queued request.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct RequestFlags {
    /// Fail with `Errno(EAGAIN)` rather than wait.
    pub try_lock: bool,
    /// With `try_lock`: the holders get one blocking callback.
    pub try_1cb: bool,
    /// May pass the gate of nodes that are fenced but whose journals are not replayed (DLM R-12).
    pub recovery: bool,
    /// The ghost of this lock goes when its node is fenced (flock, journal, non-disk locks).
    pub release_at_fence: bool,
    /// The value block takes part (types inode, rgrp, quota, and the control lock).
    pub lvb: bool,
}

/// A granted request.
#[derive(Clone, Copy, Debug)]
pub struct Granted {
    pub state: LockState,
    /// Present when `flags.lvb` was set, the grant could read it, and it is valid.
    pub lvb: Option<Lvb>,
}

/// One byte-range lock operation (fcntl). `end` is inclusive; `u64::MAX` means to the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlockRequest {
    pub ino: u64,
    /// FUSE lock owner: one per file-table of a process, unique on this mount.
    pub owner: u64,
    pub pid: u32,
    pub start: u64,
    pub end: u64,
    pub kind: PlockKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlockKind {
    Read,
    Write,
    Unlock,
}

/// Who stands in the way of a byte-range lock (answer to F_GETLK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlockConflict {
    pub start: u64,
    pub end: u64,
    pub kind: PlockKind,
    /// Process on this node, or 0 when it runs elsewhere.
    pub pid: u32,
}

/// Answers of a lock manager. Called on its threads, never while it holds a lock of its own; must not block.
pub trait LockEvents: Send + Sync {
    /// The one answer to a `request` of this name.
    fn completed(&self, name: GlockName, result: Result<Granted>);
    /// Another member asks for `wanted`, and our granted state is in its way.
    fn blocked(&self, name: GlockName, wanted: LockState);
}

/// What a mount needs from a lock manager.
pub trait LockSpace: Send + Sync {
    /// Where answers go. Called once, before the first request.
    fn attach(&self, events: Arc<dyn LockEvents>);

    /// True when other nodes may be members: then caches must be given up on demand.
    fn is_clustered(&self) -> bool;

    /// Ask for `want` as a new lock or as a conversion of the one held. At most one request per name is outstanding;
    /// exactly one `completed` follows. Going down is always granted. `Unlocked` drops the lock.
    /// `lvb` is stored when the conversion leaves `Exclusive` and `flags.lvb` is set.
    fn request(&self, name: GlockName, want: LockState, flags: RequestFlags, lvb: Option<&Lvb>);

    /// Give up a waiting request; `completed` still follows, with the grant or with `Interrupted`.
    fn cancel(&self, name: GlockName);

    /// Byte-range lock or unlock, cluster-wide. `done` is called once: `Ok`, `Errno(EAGAIN)` (when `wait` is false),
    /// `Errno(EDEADLK)`, or `Interrupted` after `plock_cancel`.
    fn plock(
        &self,
        request: PlockRequest,
        wait: bool,
        done: Box<dyn FnOnce(Result<()>) + Send>,
    ) -> PlockTicket;

    fn plock_cancel(&self, ticket: PlockTicket);

    /// First conflicting byte-range lock, if any.
    fn plock_test(&self, request: PlockRequest, done: Box<dyn FnOnce(Result<Option<PlockConflict>>) + Send>);
}

/// Names a waiting byte-range request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlockTicket(pub u64);
