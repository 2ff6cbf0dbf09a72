//! A mount among the mounts of its file system: membership, the permit, recovery after a death.
//!
//! ```text
//!   cairnd ── events in one total order ──► members (pure) ──► lock manager: view, fenced, recovered
//!                                             │
//!                                             └──► recovery thread: journal of a fenced mount ─► Volume::recover_journal
//! ```
//!
//! The mounts of a file system are the process group `gfs:<name>`. A mount's identity in the lock space is its node and a *mount
//! incarnation* of its own, strictly rising per node, carried in the join payload with the address of its lock manager. Mounts say in the
//! group which journal they use, and which dead mounts are not recovered yet, so that every member, also one that joined
//! later, knows for whom it has to wait.
//!
//! * A dead mount's gates stay shut until `Fenced` and a replay; the replay starts after `Fenced` only (I8).
//! * The device is behind the node's permit: a node without one freezes before its next submission (I10), and goes on when it gets
//!   one again in the same life. When this life is over, submissions fail and the mount ends.

mod control;
mod hooks;
pub mod members;
#[cfg(test)]
mod tests;

pub use control::wait_replayed;
pub use hooks::join;

use crate::volume::Volume;
use crate::{Error, Result};
use cairn_base::{Incarnation, Proc, ViewId, events};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use lun::guard::Guarded;
use lun::{BlockDevice, Lun};
use members::{Action, Dead, Members, Note, Payload, encode};
use membership::alive;
use membership::client::Client;
use membership::ipc::{ClientKind, ClusterEvent};
use parking_lot::{Condvar, Mutex};
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two looks at a permit that has run out.
const FREEZE_POLL: Duration = Duration::from_millis(5);
/// Between two attempts to recover a journal that somebody else holds.
const RETRY: Duration = Duration::from_millis(200);
/// How long a mount waits for a quorate view that contains it.
const JOIN_LIMIT: Duration = Duration::from_secs(120);

/// What the lock manager of this mount is told. Implemented by `lockdlm`.
pub trait LockMembers: Send + Sync {
    /// A totally ordered, quorate view of the mounts. `left_clean`: since the last view, with all locks released.
    fn set_view(&self, view: ViewId, members: &[(Proc, SocketAddr)], left_clean: &[Proc]);
    fn fenced(&self, who: Proc);
    /// The journal of this dead mount is replayed; told to all members.
    fn recovered(&self, who: Proc);
    /// Quorum is lost: decide nothing.
    fn suspend(&self);
    fn resume(&self);
    /// Dead mounts whose gates are shut, with "fenced already".
    fn gates(&self) -> Vec<(Proc, bool)>;
}

/// What a mount that ended itself or was told to stop has to do.
pub type OnStop = Box<dyn Fn(&str) + Send + Sync>;

/// Connected to cairnd, not yet a member.
pub struct Prepared {
    client: Arc<Client>,
    fs: String,
    me: Proc,
    gate: Arc<Gate>,
    run_dir: PathBuf,
}

/// Blocks submissions while the node has no permit, refuses them once this life is over.
pub(crate) struct Gate {
    permit: membership::permit::Permit,
    over: AtomicBool,
    frozen: AtomicBool,
}

impl Gate {
    /// The device behind the node's permit.
    pub(crate) fn guard(self: &Arc<Self>, dev: Lun) -> Lun {
        let gate = Arc::clone(self);
        Arc::new(Guarded::new(Shared(dev), move || gate.pass()))
    }

    fn pass(&self) -> std::result::Result<(), String> {
        loop {
            if self.over.load(Ordering::Acquire) {
                return Err("this life of the node is over".into());
            }
            match self.permit.check() {
                Ok(()) => {
                    if self.frozen.swap(false, Ordering::AcqRel) {
                        tracing::info!("permit granted again, writes go on");
                    }
                    return Ok(());
                }
                Err(why) => {
                    if !self.frozen.swap(true, Ordering::AcqRel) {
                        tracing::warn!(name: "permit_lost", event = events::PERMIT_LOST, why = %why, "writes are frozen: {why}");
                    }
                    std::thread::sleep(FREEZE_POLL);
                }
            }
        }
    }
}

impl Prepared {
    /// Connect as a mount of `lock_table` (`cluster:fs`). Refuses a volume of another cluster.
    pub fn connect(run_dir: &Path, lock_table: &str) -> Result<Self> {
        let Some((cluster, fs)) = lock_table.split_once(':').filter(|(c, f)| !c.is_empty() && !f.is_empty())
        else {
            return Err(Error::Mount(format!(
                "lock table \"{lock_table}\" is not CLUSTER:NAME; make the volume with mkfs.gfs -t, or mount with -o locktable="
            )));
        };
        let client = Client::connect(run_dir, ClientKind::Mount { fs: fs.to_owned() })
            .map_err(|e| Error::Mount(format!("lock table \"{lock_table}\" needs its cluster: {e} On a single node: -o lockproto=lock_nolock")))?;
        let welcome = client.welcome();
        if welcome.cluster_name != cluster {
            return Err(Error::Mount(format!(
                "the volume belongs to cluster \"{cluster}\", this node to \"{}\"; mount it in its own cluster",
                welcome.cluster_name
            )));
        }
        let permit = client.permit().map_err(|e| Error::Mount(format!("permit page: {e}")))?;
        let me = Proc { node: welcome.proc.node, incarnation: mount_incarnation(run_dir)? };
        Ok(Self {
            client: Arc::new(client),
            fs: fs.to_owned(),
            me,
            gate: Arc::new(Gate { permit, over: AtomicBool::new(false), frozen: AtomicBool::new(false) }),
            run_dir: run_dir.to_owned(),
        })
    }

    /// Identity of this mount in the lock space.
    pub fn me(&self) -> Proc {
        self.me
    }

    pub fn fs(&self) -> &str {
        &self.fs
    }

    pub(crate) fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// Key for the lock manager's links.
    pub fn key(&self) -> &[u8] {
        &self.client.welcome().lock_key.0
    }

    pub fn cluster_name(&self) -> &str {
        &self.client.welcome().cluster_name
    }

    /// Address on which the lock manager should listen: the node's first one.
    pub fn address(&self) -> Result<IpAddr> {
        let status = self.client.status().map_err(|e| Error::Mount(e.to_string()))?;
        let text = status.addresses.first().cloned().unwrap_or_default();
        let host = text
            .rsplit_once(':')
            .map_or(text.as_str(), |(h, p)| if p.parse::<u16>().is_ok() { h } else { &text });
        host.trim_matches(['[', ']'])
            .parse()
            .map_err(|_| Error::Mount(format!("the node's address \"{text}\" is no IP address")))
    }

    /// Become a member; returns once a quorate view contains this mount and the lock manager has it.
    pub fn join(
        self,
        locks: Arc<dyn LockMembers>,
        address: SocketAddr,
        on_stop: OnStop,
    ) -> Result<Arc<Cluster>> {
        let group = format!("gfs:{}", self.fs);
        let payload = Payload { incarnation: self.me.incarnation.0, address };
        let (work_tx, work_rx) = unbounded();
        let cluster = Arc::new(Cluster {
            client: self.client,
            group: group.clone(),
            me: self.me,
            gate: self.gate,
            run_dir: self.run_dir,
            state: Mutex::new(State {
                members: Members::new(self.me),
                volume: None,
                busy: false,
                joined: false,
            }),
            changed: Condvar::new(),
            locks,
            work: work_tx,
            on_stop,
        });
        let events = cluster.client.events().clone();
        let (ready_tx, ready) = bounded(1);
        let for_events = Arc::clone(&cluster);
        spawn("gfs-cluster", move || for_events.event_loop(&events, &ready_tx))?;
        let for_work = Arc::clone(&cluster);
        spawn("gfs-recovery", move || for_work.recovery_loop(&work_rx))?;
        let bytes = encode(&payload);
        cluster
            .client
            .join_group(&group, &bytes)
            .map_err(|e| Error::Mount(format!("cannot join {group}: {e}")))?;
        match ready.recv_timeout(JOIN_LIMIT) {
            Ok(()) => Ok(cluster),
            Err(_) => Err(Error::Mount(format!(
                "no quorate view contains this mount after {JOIN_LIMIT:?}; see cman_tool status"
            ))),
        }
    }
}

/// `Guarded` wants a device by value.
struct Shared(Lun);

impl BlockDevice for Shared {
    fn sector_size(&self) -> u32 {
        self.0.sector_size()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn name(&self) -> &str {
        self.0.name()
    }
    fn read_batch(&self, batch: &mut [lun::Read<'_>]) -> lun::Result<()> {
        self.0.read_batch(batch)
    }
    fn write_batch(&self, batch: &[lun::Write<'_>]) -> lun::Result<()> {
        self.0.write_batch(batch)
    }
    fn flush(&self) -> lun::Result<()> {
        self.0.flush()
    }
    fn write_durable(&self, offset: u64, buf: &[u8]) -> lun::Result<()> {
        self.0.write_durable(offset, buf)
    }
}

/// Next mount incarnation of this node: above the last one and not below the wall clock in microseconds, durable before use.
fn mount_incarnation(run_dir: &Path) -> Result<Incarnation> {
    let fail =
        |e: std::io::Error| Error::Mount(format!("{}: {e}", run_dir.join("mount-incarnation").display()));
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(run_dir.join("mount-incarnation.lock"))
        .map_err(fail)?;
    // SAFETY: plain system call on an open descriptor; released when the file is closed.
    if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(fail(std::io::Error::last_os_error()));
    }
    let path = run_dir.join("mount-incarnation");
    let last = std::fs::read_to_string(&path).ok().and_then(|t| t.trim().parse::<u64>().ok()).unwrap_or(0);
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64);
    let next = wall.max(last + 1);
    alive::write_durable(&path, &format!("{next}\n")).map_err(fail)?;
    Ok(Incarnation(next))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::Mount(format!("cannot start a thread: {e}")))
}

struct State {
    members: Members,
    volume: Option<Arc<Volume>>,
    /// The event thread is working on an event.
    busy: bool,
    joined: bool,
}

/// A member of the file system's group.
pub struct Cluster {
    client: Arc<Client>,
    group: String,
    me: Proc,
    gate: Arc<Gate>,
    run_dir: PathBuf,
    state: Mutex<State>,
    /// Signalled after every event and every recovery.
    changed: Condvar,
    locks: Arc<dyn LockMembers>,
    /// Dead mounts to recover.
    work: Sender<Dead>,
    on_stop: OnStop,
}

impl Cluster {
    /// The volume is mounted: say which journal it uses, recover what waits, answer on the control socket.
    pub fn attach(self: &Arc<Self>, volume: Arc<Volume>, mountpoint: &Path) -> Result<()> {
        let jid = volume.journal();
        let waiting = {
            let mut s = self.state.lock();
            s.volume = Some(volume);
            s.members.set_own_journal(jid)
        };
        self.say(&[waiting.0]);
        for dead in waiting.1 {
            let _ = self.work.send(dead);
        }
        control::serve(self, mountpoint)
    }

    /// Before the volume goes: no recovery runs any more when this returns.
    pub fn detach(&self) {
        self.state.lock().volume = None;
        control::remove(&self.run_dir);
    }

    /// After the unmount, with all locks released: leave the group in good order.
    pub fn leave(&self) -> Result<()> {
        self.client.leave_group(&self.group).map_err(|e| Error::Mount(e.to_string()))
    }

    fn event_loop(self: &Arc<Self>, events: &Receiver<ClusterEvent>, ready: &Sender<()>) {
        loop {
            // Busy before it is taken out: who finds the queue empty and nobody busy knows that all is worked off.
            let mut wait = crossbeam_channel::Select::new();
            wait.recv(events);
            wait.ready();
            self.state.lock().busy = true;
            let event = match events.try_recv() {
                Ok(event) => event,
                Err(crossbeam_channel::TryRecvError::Empty) => {
                    self.state.lock().busy = false;
                    continue;
                }
                Err(crossbeam_channel::TryRecvError::Disconnected) => return,
            };
            let goes_on = self.on_event(event, ready);
            self.state.lock().busy = false;
            self.changed.notify_all();
            if !goes_on {
                return;
            }
        }
    }

    fn on_event(self: &Arc<Self>, event: ClusterEvent, ready: &Sender<()>) -> bool {
        match &event {
            ClusterEvent::Stop { why, .. } => return self.end(&format!("the node stops: {why}")),
            ClusterEvent::Disconnected { why } => return self.end(&format!("cairnd is gone: {why}")),
            _ => {}
        }
        let actions = self.state.lock().members.event(&self.group, &event);
        for action in actions {
            self.carry_out(action, Some(ready));
        }
        true
    }

    fn carry_out(&self, action: Action, ready: Option<&Sender<()>>) {
        match action {
            Action::LockView { view, members, left_clean } => {
                let contains_me = members.iter().any(|(p, _)| *p == self.me);
                self.locks.set_view(ViewId(view), &members, &left_clean);
                if contains_me
                    && !std::mem::replace(&mut self.state.lock().joined, true)
                    && let Some(ready) = ready
                {
                    let _ = ready.send(());
                }
            }
            Action::LockFenced(who) => self.locks.fenced(who),
            Action::LockRecovered(who) => self.locks.recovered(who),
            Action::Suspend => self.locks.suspend(),
            Action::Resume => self.locks.resume(),
            Action::Recover(dead) => {
                let _ = self.work.send(dead);
            }
            Action::Say(note) => self.say(&[note]),
        }
    }

    /// This life is over: nothing is submitted any more, and the process must end.
    fn end(&self, why: &str) -> bool {
        self.gate.over.store(true, Ordering::Release);
        if let Some(v) = self.state.lock().volume.clone() {
            v.withdraw(why);
        }
        (self.on_stop)(why);
        false
    }

    fn say(&self, notes: &[Note]) {
        for note in notes {
            if let Err(e) = self.client.send(&self.group, true, &encode(note)) {
                tracing::warn!(err = %e, "cannot send to the other mounts");
            }
        }
    }

    /// Recover dead mounts one after the other. A mount that is not mounted yet leaves it to the others, or does it after
    /// `attach`.
    fn recovery_loop(&self, work: &Receiver<Dead>) {
        for dead in work {
            while self.state.lock().members.needs_recovery(dead.who) {
                let Some(volume) = self.state.lock().volume.clone() else { break };
                match self.recover(&volume, dead) {
                    Ok(true) => {
                        self.locks.recovered(dead.who);
                        self.say(&[Note::Recovered {
                            node: dead.who.node.0,
                            incarnation: dead.who.incarnation.0,
                        }]);
                        tracing::info!(
                            node = dead.who.node.0,
                            "recovered the mount of node {}",
                            dead.who.node
                        );
                        self.wait_change(|s| !s.members.needs_recovery(dead.who), RETRY);
                    }
                    Ok(false) => self.wait_change(|s| !s.members.needs_recovery(dead.who), RETRY),
                    Err(Error::Withdrawn(_)) => return,
                    Err(e) => {
                        tracing::error!(jid = dead.jid.map(|j| j.0), err = %e, "journal recovery failed; its locks stay blocked");
                        self.wait_change(|s| !s.members.needs_recovery(dead.who), RETRY * 10);
                    }
                }
            }
        }
    }

    fn recover(&self, volume: &Volume, dead: Dead) -> Result<bool> {
        let jids = self.state.lock().members.journals_of(dead, volume.journals());
        let mut all = true;
        for jid in jids {
            all &= volume.recover_journal(jid)?.is_some();
        }
        Ok(all)
    }

    fn wait_change(&self, is_done: impl Fn(&State) -> bool, limit: Duration) {
        let until = Instant::now() + limit;
        let mut s = self.state.lock();
        while !is_done(&s) {
            if self.changed.wait_until(&mut s, until).timed_out() {
                return;
            }
        }
    }

    /// Waits until whoever may have written to the volume before is proved dead; then the first mounter may replay every journal (I8).
    /// The first member of a lock space has no gate that holds it back, and neither has one that joins while the first still waits
    /// here: the wait ends early only when somebody has the volume mounted.
    ///
    /// That nobody is left to fence may be so because somebody who was missed is back, with its locks. So it counts only once the
    /// lock manager has the view in which it was so: the reply comes behind that view, and everything before the reply is worked off. And only when all who
    /// are here have spoken: one that has the volume mounted, and that was not heard yet, may know of a mount that is lost and lives.
    fn wait_all_fenced(&self, founder: bool) -> Result<()> {
        let until = Instant::now() + JOIN_LIMIT;
        loop {
            let fence = self.client.status().map_err(|e| Error::Mount(e.to_string()))?.fence;
            let (lost, led, current) = {
                let s = self.state.lock();
                let worked_off = !s.busy && self.client.events().is_empty();
                let current = worked_off && s.members.is_current() && s.members.is_informed();
                (s.members.unfenced(), s.members.is_led(), current)
            };
            if led && !founder {
                return Ok(());
            }
            if fence.in_domain && fence.victims.is_empty() && lost.is_empty() && current {
                let gates = self.locks.gates();
                let actions = self.state.lock().members.adopt(gates.into_iter());
                for action in actions {
                    self.carry_out(action, None);
                }
                return Ok(());
            }
            if Instant::now() >= until {
                let who: Vec<String> =
                    fence.victims.iter().map(|v| format!("{} ({})", v.name, v.last_error)).collect();
                return Err(Error::Mount(if !fence.in_domain {
                    format!("this node is not in the fence domain after {JOIN_LIMIT:?}; see cman_tool nodes")
                } else if who.is_empty() && lost.is_empty() {
                    format!(
                        "the other mounts of the volume have not answered after {JOIN_LIMIT:?}; see dlm_tool ls on their nodes"
                    )
                } else if who.is_empty() {
                    format!("the mounts {lost:?} are not fenced after {JOIN_LIMIT:?}")
                } else {
                    format!(
                        "not fenced after {JOIN_LIMIT:?}: {}; mend the fence device, or use fence_ack_manual for a node that is surely off",
                        who.join(", ")
                    )
                }));
            }
            std::thread::sleep(FREEZE_POLL * 4);
        }
    }

    /// True once every event that the daemon had for us is worked off and no dead mount waits for its replay.
    fn is_settled(&self, s: &State) -> bool {
        !s.busy && self.client.events().is_empty() && s.members.is_settled() && s.volume.is_some()
    }

    /// Events of the daemon up to now, and every replay they ask for, are done; or the time is up.
    fn wait_settled(&self, limit: Duration) -> std::result::Result<(), String> {
        // The reply comes behind every event that the daemon had sent before it.
        self.client.status().map_err(|e| e.to_string())?;
        let until = Instant::now() + limit;
        let mut s = self.state.lock();
        while !self.is_settled(&s) {
            let slice = until.min(Instant::now() + FREEZE_POLL);
            let _ = self.changed.wait_until(&mut s, slice);
            if Instant::now() >= until {
                return Err(format!("journals of {:?} are not replayed yet", s.members.waiting()));
            }
        }
        Ok(())
    }
}
