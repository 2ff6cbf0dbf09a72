//! The lock manager of a clustered mount: [`LockSpace`] over a `dlm` node.
//!
//! One DLM lock per glock name, converted up and down and dropped with `Unlocked`. Names are lock_dlm's 24 bytes, modes NL, PR, CW,
//! EX. Flags as the kernel uses them: VALBLK on names with a value block, QUECVT on conversions that may wait, NOQUEUE and NOQUEUEBAST
//! for the try forms. Byte-range locks live in the tree of the file's plock name (type 7).
//!
//! The table's mutex is never held while the node is called: its answers may come on the calling thread.

use crate::cluster::{LockMembers, Prepared};
use crate::lockspace::{
    GlockName, GlockType, Granted, LockEvents, LockSpace, LockState, Lvb, PlockConflict, PlockKind,
    PlockRequest, PlockTicket, RequestFlags,
};
use crate::{Error, Result};
use cairn_base::{Proc, ViewId};
use dlm::{
    Callbacks, Completion, Config, Flags, LockError, LockId, Mode, Node, NodeConfig, PlockAnswer, PlockRange,
    ResName, SbFlags, Status, View,
};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

/// How long leaving waits until the last releases have arrived.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// How long a new member waits for the lock space to be whole.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// A member of the file system's lock space.
pub struct Dlm(Arc<Space>);

impl Dlm {
    /// Listens on the node's address. Nothing is granted before the first view.
    pub fn start(prepared: &Prepared) -> Result<Self> {
        let node = Node::start(NodeConfig {
            core: Config::new(prepared.me()),
            bind: SocketAddr::new(prepared.address()?, 0),
            cluster: prepared.cluster_name().to_owned(),
            lockspace: prepared.fs().to_owned(),
            key: prepared.key().to_vec(),
        })
        .map_err(|e| Error::Mount(e.to_string()))?;
        Ok(Self::over(node))
    }

    fn over(node: Arc<Node>) -> Self {
        let space = Arc::new(Space { node, events: OnceLock::new(), table: Mutex::default() });
        space.node.set_callbacks(Arc::new(Answers(Arc::downgrade(&space))));
        Self(space)
    }

    pub fn members(&self) -> Arc<dyn LockMembers> {
        Arc::clone(&self.0) as Arc<dyn LockMembers>
    }

    pub fn space(&self) -> Arc<dyn LockSpace> {
        Arc::clone(&self.0) as Arc<dyn LockSpace>
    }

    /// Where the links of other mounts arrive.
    pub fn address(&self) -> SocketAddr {
        self.0.node.address()
    }

    /// Waits until this member knows who masters what.
    pub fn settle(&self) -> Result<()> {
        if self.0.node.wait_settled(SETTLE_LIMIT) {
            return Ok(());
        }
        Err(Error::Mount(format!(
            "the lock space does not settle within {SETTLE_LIMIT:?}; is a mount of it hanging?"
        )))
    }

    /// Nobody was there who knows which mounts died before: every journal may be dirty, and its user alive.
    pub fn is_founder(&self) -> bool {
        self.0.node.founder()
    }

    /// All locks are given up; the links may go once that has arrived.
    pub fn leave(&self) {
        if let Err(e) = self.0.node.leave(LEAVE_LIMIT) {
            tracing::warn!(err = %e, "leaving the lock space");
        }
    }
}

/// One DLM lock and the request under way.
struct Lock {
    id: LockId,
    granted: LockState,
}

#[derive(Default)]
struct Table {
    locks: FxHashMap<GlockName, Lock>,
    /// Requests under way, by name: what was asked, whether the value takes part, and the lock once it is known.
    pending: FxHashMap<GlockName, Pending>,
    /// Names by the word that the node repeats in its answers.
    names: FxHashMap<u64, GlockName>,
    users: FxHashMap<GlockName, u64>,
    next_user: u64,
    plocks: FxHashMap<u64, PlockWait>,
    /// Our tickets → the node's.
    tickets: FxHashMap<u64, u64>,
    next_ticket: u64,
}

#[derive(Clone, Copy)]
struct Pending {
    want: LockState,
    lvb: bool,
    id: Option<LockId>,
    is_cancelled: bool,
}

enum PlockWait {
    Lock(u64, Box<dyn FnOnce(Result<()>) + Send>),
    Test(Box<dyn FnOnce(Result<Option<PlockConflict>>) + Send>),
}

struct Space {
    node: Arc<Node>,
    events: OnceLock<Arc<dyn LockEvents>>,
    table: Mutex<Table>,
}

/// What the node calls; weak, since the node is ours.
struct Answers(Weak<Space>);

const fn mode_of(state: LockState) -> Mode {
    match state {
        LockState::Unlocked => Mode::NL,
        LockState::Shared => Mode::PR,
        LockState::Deferred => Mode::CW,
        LockState::Exclusive => Mode::EX,
    }
}

/// CR and PW are never asked for; a master that grants them is wrong.
fn state_of(mode: Option<Mode>) -> LockState {
    match mode {
        None | Some(Mode::NL) => LockState::Unlocked,
        Some(Mode::PR) => LockState::Shared,
        Some(Mode::CW) => LockState::Deferred,
        Some(Mode::EX) => LockState::Exclusive,
        Some(other @ (Mode::CR | Mode::PW)) => {
            panic!("invariant: nobody asked for mode {other:?}")
        }
    }
}

fn failed(name: GlockName, e: &LockError) -> Error {
    Error::Lock { name: name.to_string(), what: e.to_string() }
}

fn res_name(name: GlockName) -> ResName {
    ResName::root_of(&name.dlm_name()).expect("invariant: 24 bytes are a legal component")
}

/// Going to a mode that is compatible with everything that the present one is compatible with.
const fn is_down(from: LockState, to: LockState) -> bool {
    matches!(
        (from, to),
        (_, LockState::Unlocked) | (LockState::Exclusive, LockState::Shared | LockState::Deferred)
    )
}

impl Space {
    fn finish(&self, name: GlockName, result: Result<Granted>) {
        if let Some(events) = self.events.get() {
            events.completed(name, result);
        }
    }

    fn user_of(t: &mut Table, name: GlockName) -> u64 {
        if let Some(user) = t.users.get(&name) {
            return *user;
        }
        t.next_user += 1;
        let user = t.next_user;
        t.users.insert(name, user);
        t.names.insert(user, name);
        user
    }

    fn forget(t: &mut Table, name: GlockName) {
        t.locks.remove(&name);
        if let Some(user) = t.users.remove(&name) {
            t.names.remove(&user);
        }
    }

    fn done(&self, c: &Completion) {
        let mut t = self.table.lock();
        let Some(&name) = t.names.get(&c.user) else { return };
        let Some(p) = t.pending.remove(&name) else { return };
        let before = t.locks.get(&name).map(|l| l.granted);
        match c.mode {
            Some(mode) => {
                t.locks.insert(name, Lock { id: c.lock, granted: state_of(Some(mode)) });
            }
            None => Self::forget(&mut t, name),
        }
        drop(t);
        let state = state_of(c.mode);
        let lvb = c.lvb.filter(|_| p.lvb && c.sb.0 & SbFlags::VALNOTVALID == 0);
        let result = match c.status {
            Status::Granted | Status::Unlocked => Ok(Granted { state, lvb }),
            Status::Again => Err(Error::Errno(libc::EAGAIN)),
            Status::Cancelled | Status::TimedOut => Err(Error::Interrupted),
            Status::Deadlock => Err(Error::Errno(libc::EDEADLK)),
            Status::Queued => return,
        };
        tracing::trace!(glock = %name, ?before, want = ?p.want, ?result, "lock manager");
        self.finish(name, result);
    }

    fn plock_failed(&self, key: u64, e: &LockError) {
        let wait = self.table.lock().plocks.remove(&key);
        let error = Error::Lock { name: "plock".into(), what: e.to_string() };
        match wait {
            Some(PlockWait::Lock(_, done)) => done(Err(error)),
            Some(PlockWait::Test(done)) => done(Err(error)),
            None => {}
        }
    }
}

impl Callbacks for Answers {
    fn completed(&self, done: Completion) {
        if let Some(space) = self.0.upgrade() {
            space.done(&done);
        }
    }

    fn blocked(&self, _lock: LockId, user: u64, mode: Mode) {
        let Some(space) = self.0.upgrade() else { return };
        let name = space.table.lock().names.get(&user).copied();
        if let (Some(name), Some(events)) = (name, space.events.get()) {
            events.blocked(name, state_of(Some(mode)));
        }
    }

    fn plock_done(&self, ticket: u64, answer: PlockAnswer) {
        let Some(space) = self.0.upgrade() else { return };
        let wait = {
            let mut t = space.table.lock();
            let wait = t.plocks.remove(&ticket);
            if let Some(PlockWait::Lock(ours, _)) = &wait {
                t.tickets.remove(ours);
            }
            wait
        };
        let me = space.node.me();
        match (wait, answer) {
            (Some(PlockWait::Lock(_, done)), answer) => done(match answer {
                PlockAnswer::Granted => Ok(()),
                PlockAnswer::Again => Err(Error::Errno(libc::EAGAIN)),
                PlockAnswer::Deadlock => Err(Error::Errno(libc::EDEADLK)),
                PlockAnswer::Cancelled => Err(Error::Interrupted),
                PlockAnswer::Tested(_) | PlockAnswer::Queued => {
                    Err(Error::Lock { name: "plock".into(), what: format!("answer {answer:?} to a lock") })
                }
            }),
            (Some(PlockWait::Test(done)), PlockAnswer::Tested(found)) => {
                done(Ok(found.map(|f| PlockConflict {
                    start: f.range.start,
                    end: f.range.end,
                    kind: if f.range.write { PlockKind::Write } else { PlockKind::Read },
                    pid: if f.who == me { f.range.pid } else { 0 },
                })))
            }
            (Some(PlockWait::Test(done)), _) => done(Err(Error::Interrupted)),
            (None, _) => {}
        }
    }
}

impl LockSpace for Space {
    fn attach(&self, events: Arc<dyn LockEvents>) {
        assert!(self.events.set(events).is_ok(), "a lock space has one user");
    }

    fn is_clustered(&self) -> bool {
        true
    }

    fn request(&self, name: GlockName, want: LockState, flags: RequestFlags, lvb: Option<&Lvb>) {
        let mut f = Flags::NONE;
        if flags.lvb {
            f |= Flags::VALBLK;
        }
        if flags.release_at_fence {
            f |= Flags::RELEASE_AT_FENCE;
        }
        if flags.recovery {
            f |= Flags::RECOVERY;
        }
        let (user, held) = {
            let mut t = self.table.lock();
            let held = t.locks.get(&name).map(|l| (l.id, l.granted));
            if want == LockState::Unlocked && held.is_none() {
                drop(t);
                self.finish(name, Ok(Granted { state: LockState::Unlocked, lvb: None }));
                return;
            }
            let pending = Pending { want, lvb: flags.lvb, id: held.map(|(id, _)| id), is_cancelled: false };
            let old = t.pending.insert(name, pending);
            assert!(old.is_none(), "invariant: one request per name ({name}) is outstanding");
            (Self::user_of(&mut t, name), held)
        };
        let asked = match held {
            Some((id, _)) if want == LockState::Unlocked => {
                self.node.unlock(id, f, lvb.filter(|_| flags.lvb))
            }
            Some((id, from)) => {
                if flags.try_lock {
                    f |= Flags::NOQUEUE;
                } else if !is_down(from, want) && from != want {
                    f |= Flags::QUECVT;
                }
                if flags.try_lock && flags.try_1cb {
                    f |= Flags::NOQUEUEBAST;
                }
                self.node.convert(id, mode_of(want), f, lvb.filter(|_| flags.lvb), None)
            }
            None => {
                if flags.try_lock {
                    f |= Flags::NOQUEUE;
                    if flags.try_1cb {
                        f |= Flags::NOQUEUEBAST;
                    }
                }
                self.node.request(&res_name(name), mode_of(want), f, user, None).map(|id| {
                    let mut t = self.table.lock();
                    // The answer may have come already.
                    if let Some(p) = t.pending.get_mut(&name) {
                        p.id = Some(id);
                        if p.is_cancelled {
                            drop(t);
                            let _ = self.node.cancel(id);
                        }
                    }
                })
            }
        };
        if let Err(e) = asked {
            let mut t = self.table.lock();
            t.pending.remove(&name);
            if !t.locks.contains_key(&name) {
                Self::forget(&mut t, name);
            }
            drop(t);
            self.finish(name, Err(failed(name, &e)));
        }
    }

    fn cancel(&self, name: GlockName) {
        let id = {
            let mut t = self.table.lock();
            let Some(p) = t.pending.get_mut(&name) else { return };
            p.is_cancelled = true;
            p.id
        };
        if let Some(id) = id {
            let _ = self.node.cancel(id);
        }
    }

    fn plock(
        &self,
        request: PlockRequest,
        wait: bool,
        done: Box<dyn FnOnce(Result<()>) + Send>,
    ) -> PlockTicket {
        let root = plock_root(request.ino);
        let range = range_of(&request);
        let mut done = Some(done);
        let mut ours = 0;
        let mut noted = |ticket: u64| {
            let mut t = self.table.lock();
            t.next_ticket += 1;
            ours = t.next_ticket;
            t.tickets.insert(ours, ticket);
            if let Some(done) = done.take() {
                t.plocks.insert(ticket, PlockWait::Lock(ours, done));
            }
        };
        let asked = if request.kind == PlockKind::Unlock {
            self.node.plock_unlock(&root, range, &mut noted)
        } else {
            self.node.plock_lock(&root, range, wait, &mut noted)
        };
        if let Err(e) = asked
            && let Some(done) = done.take()
        {
            done(Err(Error::Lock { name: format!("plock {}", request.ino), what: e.to_string() }));
        }
        PlockTicket(ours)
    }

    fn plock_cancel(&self, ticket: PlockTicket) {
        let theirs = self.table.lock().tickets.get(&ticket.0).copied();
        if let Some(theirs) = theirs {
            self.node.plock_cancel(theirs);
        }
    }

    fn plock_test(&self, request: PlockRequest, done: Box<dyn FnOnce(Result<Option<PlockConflict>>) + Send>) {
        let mut key = None;
        let asked = self.node.plock_test(&plock_root(request.ino), range_of(&request), |ticket| {
            key = Some(ticket);
            self.table.lock().plocks.insert(ticket, PlockWait::Test(done));
        });
        if let (Err(e), Some(key)) = (asked, key) {
            self.plock_failed(key, &e);
        }
    }
}

fn plock_root(ino: u64) -> ResName {
    res_name(GlockName { ty: GlockType::Plock, number: ino })
}

const fn range_of(r: &PlockRequest) -> PlockRange {
    PlockRange {
        owner: r.owner,
        pid: r.pid,
        start: r.start,
        end: r.end,
        write: matches!(r.kind, PlockKind::Write),
    }
}

impl LockMembers for Space {
    fn set_view(&self, view: ViewId, members: &[(Proc, SocketAddr)], left_clean: &[Proc]) {
        let view = View { id: view, members: members.to_vec(), left_clean: left_clean.to_vec() };
        if let Err(e) = self.node.set_view(view) {
            tracing::error!(err = %e, "the lock manager refuses a view");
        }
    }

    fn fenced(&self, who: Proc) {
        self.node.fenced(who);
    }

    fn recovered(&self, who: Proc) {
        self.node.recovered(who);
    }

    fn suspend(&self) {
        self.node.suspend();
    }

    fn resume(&self) {
        self.node.resume();
    }

    fn gates(&self) -> Vec<(Proc, bool)> {
        self.node.gates()
    }
}

#[cfg(test)]
mod tests;
