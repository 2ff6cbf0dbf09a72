//! Mount and unmount.
//!
//! The order is the kernel's: superblock, mount lock, who is first, own journal, recovery, tables, log. The first mounter
//! replays every journal, waiting for each one's lock, and sets the totals right before anybody else may go on; the others replay the
//! journal they get, which no one can use any more once they hold its lock.
//!
//! First-mounter protocol (glock numbers as in lock_dlm): `control` EX and `mounted` EX by a try each; whoever gets both is the first,
//! keeps them until recovery is done, then leaves `mounted` SH and drops `control`. The others get `mounted` SH.
//!
//! What the dead had, or may have had, of these locks counts until their fence and not until their replay ([`AcquireFlags::RECOVERY`]): if nobody who is left
//! has it mounted, a replay comes only after a mount. Who then gets `control` and `mounted` is first, whatever the dead held; also who was not
//! first when it began, and waits for a replay while the last one who has it mounted dies or leaves.

use super::release::Ops;
use super::system::{Extents, Journal, SysReader, SystemInodes};
use super::{Volume, Writer, inode_glock, iopen_glock, recover, statfs};
use crate::cache::MetaCache;
use crate::disk::Disk;
use crate::geometry::Geometry;
use crate::glock::{AcquireFlags, Glocks, Holder};
use crate::journal::log::{JournalMap, Log, LogConfig};
use crate::lockspace::{GlockName, GlockType, LockSpace, LockState};
use crate::ondisk::dinode::Dinode;
use crate::ondisk::header::MetaType;
use crate::ondisk::log::LogHeader;
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::sb::Superblock;
use crate::ondisk::statfs::StatfsChange;
use crate::rgrp::Rgrps;
use crate::{Error, JournalId, Result};
use cairn_base::events;
use lun::Lun;
use lun::aligned::AlignedBuf;
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Numbers of the fixed NONDISK locks.
const MOUNT_LOCK: u64 = 0;
const LIVE_LOCK: u64 = 1;
const CONTROL_LOCK: u64 = 4;
const MOUNTED_LOCK: u64 = 5;

/// How often all journals are asked for, 100 ms apart, before the mount is refused.
const JOURNAL_TRIES: u32 = 5;
/// How long giving up all locks may take at an unmount.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub struct MountOptions {
    /// No operation changes anything. Journals are still replayed.
    pub read_only: bool,
    /// Uses no journal and writes nothing at all; cannot recover anybody.
    pub spectator: bool,
    /// `cluster:fsname` that the superblock must carry; `None` takes what is there.
    pub lock_table: Option<String>,
    /// Our journal; `None` takes the first free one.
    pub journal: Option<JournalId>,
    /// Greatest age of a change that is not durable.
    pub commit: Duration,
    /// How often local totals are moved to the master file.
    pub statfs_sync: Duration,
    /// Bound of the metadata cache, in bytes.
    pub cache_bytes: usize,
    /// How long to wait for a first mounter that has not finished.
    pub first_mounter_wait: Duration,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            spectator: false,
            lock_table: None,
            journal: None,
            commit: Duration::from_secs(30),
            statfs_sync: Duration::from_secs(30),
            cache_bytes: 64 << 20,
            first_mounter_wait: Duration::from_mins(2),
        }
    }
}

pub(super) fn nondisk(number: u64) -> GlockName {
    GlockName { ty: GlockType::NonDisk, number }
}

pub(super) fn journal_glock(jid: JournalId) -> GlockName {
    GlockName { ty: GlockType::Journal, number: jid.0.into() }
}

/// The first mounter replays every journal itself: no lock of a dead mount that is proved dead holds it up.
const fn past_the_dead(first: bool) -> AcquireFlags {
    if first { AcquireFlags::RECOVERY } else { AcquireFlags::NONE }
}

/// Reads and checks the superblock.
fn superblock(lun: &Lun, options: &MountOptions) -> Result<Superblock> {
    let name = lun.name();
    let sb = crate::reader::read_superblock(lun)?;
    if let Some(wanted) = &options.lock_table
        && *wanted != sb.lock_table
    {
        return Err(Error::Mount(format!(
            "{name}: the volume's lock table is \"{}\", this cluster wants \"{wanted}\": wrong cluster or wrong volume (mkfs.gfs -t, or tunegfs2 -o locktable={wanted} when it is unmounted everywhere)",
            sb.lock_table
        )));
    }
    Ok(sb)
}

/// A journal that this mount holds, mapped and clean.
struct OwnJournal {
    holder: Holder,
    index: usize,
    map: Extents,
    head: LogHeader,
}

impl Volume {
    pub fn mount(lun: Lun, space: Arc<dyn LockSpace>, options: MountOptions) -> Result<Arc<Self>> {
        let sb = superblock(&lun, &options)?;
        let geo = Geometry::new(sb.block_size).map_err(|e| Error::Mount(e.to_string()))?;
        let fs = if sb.fs_name().is_empty() { lun.name().to_owned() } else { sb.lock_table.clone() };
        let disk = Arc::new(Disk::new(lun, geo, &fs, options.spectator));
        let cache =
            Arc::new(MetaCache::new(Arc::clone(&disk), options.cache_bytes / geo.block_size as usize));
        let glocks = Glocks::new(space);
        {
            let glocks = Arc::downgrade(&glocks);
            disk.on_withdraw(Box::new(move |why| {
                if let Some(glocks) = glocks.upgrade() {
                    glocks.withdraw(why);
                }
            }));
        }
        let mounting = Mounting { disk: &disk, glocks: &glocks, options: &options, sb: &sb };
        mounting.run(cache).inspect_err(|e| {
            // a mount that failed must not leave locks in the way of others
            if !disk.is_withdrawn() && glocks.release_all(RELEASE_LIMIT).is_err() {
                tracing::warn!(fs = %disk.name(), err = %e, "locks left behind by a failed mount");
            }
        })
    }

    /// Re-reads the resource group index after another node has changed it.
    pub(super) fn reload_rindex(&self, rgrps: &Rgrps) -> Result<()> {
        let name = inode_glock(self.system.rindex);
        let _holder = self.glocks.acquire(name, LockState::Shared, AcquireFlags::NONE)?;
        rgrps.set_table(&SysReader(&self.disk).rindex(self.system.rindex)?)
    }

    /// Clean end: everything durable and in place, totals moved, the journal marked clean, all locks given up.
    /// The layers above have dropped their holders before. After an error the mount is withdrawn, and the journal is replayed by the
    /// next mounter.
    pub fn unmount(&self) -> Result<()> {
        self.stop_threads();
        let result = self.close_journal();
        if let Err(e) = &result {
            self.withdraw(&format!("unmount failed: {e}"));
            return result;
        }
        self.held.lock().clear();
        if let Err(left) = self.glocks.release_all(RELEASE_LIMIT) {
            let names = left.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::Lock { name: names, what: "still in use at unmount".to_owned() });
        }
        tracing::info!(name: "unmounted", event = events::UNMOUNTED, fs = %self.name(),
            jid = self.journal().map(|j| j.0), "unmounted");
        Ok(())
    }

    fn close_journal(&self) -> Result<()> {
        let Some(w) = &self.writer else { return Ok(()) };
        self.disk.check()?;
        w.log.set_read_only(false);
        self.statfs_sync()?;
        w.log.shutdown()
    }

    fn stop_threads(&self) {
        if let Some(w) = &self.writer {
            w.log.stop_background();
        }
        self.statfs.stop();
        for t in self.threads.lock().drain(..) {
            let _ = t.join();
        }
    }

    fn start_threads(self: &Arc<Self>) -> Result<()> {
        let Some(w) = &self.writer else { return Ok(()) };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(|e| Error::Mount(format!("cannot start thread {name}: {e}")))
        };
        let log = Arc::clone(&w.log);
        let mut threads = self.threads.lock();
        threads.push(spawn("gfs-log", Box::new(move || log.run_background()))?);
        let me = Arc::downgrade(self);
        let statfs = self.statfs.clone();
        threads.push(spawn("gfs-statfs", Box::new(move || statfs.run(&me)))?);
        Ok(())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // a mount that was not unmounted (an error, a test's crash) must not leave threads behind
        if let Some(w) = &self.writer {
            w.log.stop_background();
        }
        self.statfs.stop();
    }
}

struct Mounting<'a> {
    disk: &'a Arc<Disk>,
    glocks: &'a Arc<Glocks>,
    options: &'a MountOptions,
    sb: &'a Superblock,
}

impl Mounting<'_> {
    fn acquire(&self, name: GlockName, state: LockState, flags: AcquireFlags) -> Result<Holder> {
        self.glocks.acquire(name, state, flags)
    }

    fn run(&self, cache: Arc<MetaCache>) -> Result<Arc<Volume>> {
        let fs = self.disk.name().to_owned();
        let mut held = Vec::new();
        let flags = AcquireFlags::RECOVERY | AcquireFlags::NOCACHE;
        let mount_lock = self.acquire(nondisk(MOUNT_LOCK), LockState::Exclusive, flags)?;
        held.push(self.acquire(nondisk(LIVE_LOCK), LockState::Shared, AcquireFlags::RECOVERY)?);
        let first = self.first_mounter()?;
        let sb_name = GlockName { ty: GlockType::Meta, number: 0 };
        held.push(self.acquire(sb_name, LockState::Shared, AcquireFlags::RECOVERY)?);

        let reader = SysReader(self.disk);
        let (system, rindex) = self.read_system(&reader)?;
        let (first, own) = if self.options.spectator {
            (first, None)
        } else {
            let (first, own) = self.own_journal(&reader, &system, first)?;
            (first, Some(own))
        };
        let is_first = first.is_first();
        let own = self.recover(&reader, &system, own, is_first)?;
        if is_first && own.is_some() {
            self.repair_statfs(&reader, &system, &rindex)?;
        }
        held.push(first.done(self.glocks)?);

        let writer = match own {
            Some(own) => Some(self.open_log(own, &system, &rindex, &cache, &mut held)?),
            None => None,
        };
        let volume = Arc::new(Volume {
            disk: Arc::clone(self.disk),
            superblock: self.sb.clone(),
            glocks: Arc::clone(self.glocks),
            cache,
            writer,
            options: self.options.clone(),
            system,
            held: Mutex::new(held),
            threads: Mutex::default(),
            statfs: statfs::Sync::new(self.options.statfs_sync),
            on_recovered: Mutex::default(),
            on_iopen_wanted: OnceLock::new(),
        });
        self.glocks.set_ops(Arc::new(Ops(Arc::downgrade(&volume))));
        volume.start_threads()?;
        drop(mount_lock);
        tracing::info!(name: "mounted", event = events::MOUNTED, fs = %fs, jid = volume.journal().map(|j| j.0),
            first = is_first, "fsid={fs}: mounted");
        Ok(volume)
    }

    /// Reads the system tree with its inodes locked, as the kernel does, so that a jadd or grow elsewhere is not seen half done.
    fn read_system(&self, reader: &SysReader<'_>) -> Result<(SystemInodes, Vec<RindexEntry>)> {
        let shared = |addr| {
            self.acquire(inode_glock(addr), LockState::Shared, AcquireFlags::SKIP | AcquireFlags::RECOVERY)
        };
        let _master = shared(self.sb.master.addr)?;
        let names = reader.system_inodes(self.sb.master)?;
        let _held = [shared(names.jindex)?, shared(names.per_node)?, shared(names.rindex)?];
        let system = reader.system_inodes(self.sb.master)?;
        let rindex = reader.rindex(system.rindex)?;
        Ok((system, rindex))
    }

    fn first_mounter(&self) -> Result<First> {
        let deadline = Instant::now() + self.options.first_mounter_wait;
        loop {
            let flags = AcquireFlags::TRY | AcquireFlags::RECOVERY | AcquireFlags::NOCACHE;
            match self.acquire(nondisk(CONTROL_LOCK), LockState::Exclusive, flags) {
                Ok(control) => {
                    let mounted = nondisk(MOUNTED_LOCK);
                    match self.acquire(mounted, LockState::Exclusive, flags) {
                        Ok(mounted) => return Ok(First::Yes { control, mounted }),
                        Err(Error::Errno(libc::EAGAIN)) => {}
                        Err(e) => return Err(e),
                    }
                    match self.acquire(mounted, LockState::Shared, AcquireFlags::TRY) {
                        Ok(mounted) => return Ok(First::No { mounted }),
                        Err(Error::Errno(libc::EAGAIN)) => {}
                        Err(e) => return Err(e),
                    }
                }
                Err(Error::Errno(libc::EAGAIN)) => {}
                Err(e) => return Err(e),
            }
            if Instant::now() >= deadline {
                return Err(Error::Mount(format!(
                    "{}: another node mounts it for the first time and does not finish within {} s",
                    self.disk.name(),
                    self.options.first_mounter_wait.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Takes a journal nobody uses. One that a dead node has left dirty is the survivors' to replay, under the rules of fencing:
    /// only the first mounter, who has no survivors beside it, takes such a one. Whether there are any is asked again with every try.
    fn own_journal(
        &self,
        reader: &SysReader<'_>,
        system: &SystemInodes,
        mut first: First,
    ) -> Result<(First, (Holder, usize, Extents))> {
        let fs = self.disk.name();
        let n = system.journals.len();
        let wanted: Vec<&Journal> = match self.options.journal {
            Some(jid) => match system.journals.get(jid.0 as usize) {
                Some(j) => vec![j],
                None => {
                    return Err(Error::Mount(format!(
                        "{fs}: there is no journal {jid}: the volume has {n} (add some with gfs2_jadd)"
                    )));
                }
            },
            None => system.journals.iter().collect(),
        };
        let (mut tries, deadline) = (0, Instant::now() + self.options.first_mounter_wait);
        loop {
            tries += 1;
            let is_first = first.is_first();
            let mut dirty = None;
            for j in &wanted {
                tracing::info!("fsid={fs}: jid={}: Trying to acquire journal lock...", j.jid);
                let flags = AcquireFlags::TRY | past_the_dead(is_first);
                match self.acquire(journal_glock(j.jid), LockState::Exclusive, flags) {
                    Ok(holder) => {
                        let map = reader.journal(j)?;
                        if is_first || recover::is_clean(self.disk, j, &map)? {
                            return Ok((first, (holder, j.jid.0 as usize, map)));
                        }
                        dirty = Some(j.jid);
                        let glock = Arc::clone(holder.glock());
                        drop(holder);
                        glock.demote(LockState::Unlocked);
                    }
                    Err(Error::Errno(libc::EAGAIN)) => tracing::info!("fsid={fs}: jid={}: Busy", j.jid),
                    Err(e) => return Err(e),
                }
            }
            let waits = match dirty {
                Some(_) => Instant::now() < deadline,
                // a lock that its last user has just dropped takes a moment to be free everywhere
                None => tries < JOURNAL_TRIES,
            };
            if waits {
                std::thread::sleep(Duration::from_millis(100));
                if let First::No { mounted } = first {
                    drop(mounted);
                    first = self.first_mounter()?;
                }
                continue;
            }
            return Err(Error::Mount(match (dirty, self.options.journal) {
                (Some(jid), _) => format!(
                    "{fs}: journal {jid} was left by a node that died and no survivor has replayed it: is fencing stuck?"
                ),
                (None, Some(jid)) => format!("{fs}: journal {jid} is in use by another node"),
                (None, None) => format!(
                    "{fs}: all {n} journals are in use, so no further node can mount it: add one with gfs2_jadd -j 1 on a node that has it mounted"
                ),
            }));
        }
    }

    /// Replays what must be replayed; afterwards the own journal is clean.
    fn recover(
        &self,
        reader: &SysReader<'_>,
        system: &SystemInodes,
        own: Option<(Holder, usize, Extents)>,
        first: bool,
    ) -> Result<Option<OwnJournal>> {
        let Some((holder, index, map)) = own else {
            if first {
                self.refuse_dirty(reader, system)?;
            }
            return Ok(None);
        };
        let by = JournalId(index as u32);
        if first {
            for j in system.journals.iter().filter(|j| j.jid != by) {
                // Nobody mounts beside us, as `control` and `mounted` are ours. Who still has this lock is on its way out, or died
                // and is not proved dead yet; a journal passed over would be the past for everybody who mounts after us.
                let flags = AcquireFlags::RECOVERY | AcquireFlags::NOCACHE;
                let _holder = self.acquire(journal_glock(j.jid), LockState::Exclusive, flags)?;
                recover::recover(self.disk, j, &reader.journal(j)?, by)?;
            }
        }
        let (head, _) = recover::recover(self.disk, &system.journals[index], &map, by)?;
        Ok(Some(OwnJournal { holder, index, map, head }))
    }

    /// A spectator cannot replay, and without replay what it would read may be torn.
    fn refuse_dirty(&self, reader: &SysReader<'_>, system: &SystemInodes) -> Result<()> {
        for j in &system.journals {
            if !recover::is_clean(self.disk, j, &reader.journal(j)?)? {
                return Err(Error::Mount(format!(
                    "{}: journal {} needs recovery and a spectator cannot do it: mount it once on a node without the option spectator",
                    self.disk.name(),
                    j.jid
                )));
            }
        }
        Ok(())
    }

    /// First mounter, all journals clean: sets the master totals to the sums over all groups and every node's deltas to zero.
    fn repair_statfs(
        &self,
        reader: &SysReader<'_>,
        system: &SystemInodes,
        rindex: &[RindexEntry],
    ) -> Result<()> {
        let flags = AcquireFlags::RECOVERY | AcquireFlags::NOCACHE | AcquireFlags::SKIP;
        let _holder = self.acquire(inode_glock(system.statfs), LockState::Exclusive, flags)?;
        let sums = recover::sum_groups(self.disk, rindex)?;
        let mut dirty: Vec<(crate::BlockNo, AlignedBuf)> = Vec::new();
        let mut set = |addr, wanted: StatfsChange| -> Result<()> {
            let (_, mut buf) = reader.dinode(addr)?;
            let payload = &mut buf[Dinode::SIZE..];
            let found = StatfsChange::decode(payload).map_err(|e| e.at(addr))?;
            if found != wanted {
                tracing::info!(fs = %self.disk.name(), blk = addr.0, "totals {found:?} set to {wanted:?}");
                wanted.encode(payload);
                dirty.push((addr, buf));
            }
            Ok(())
        };
        set(system.statfs, sums)?;
        for j in &system.journals {
            set(j.statfs_change, StatfsChange::default())?;
        }
        if !dirty.is_empty() {
            let runs: Vec<(crate::BlockNo, &[u8])> = dirty.iter().map(|(b, buf)| (*b, &**buf)).collect();
            self.disk.write_blocks(&runs)?;
            self.disk.flush()?;
        }
        Ok(())
    }

    fn open_log(
        &self,
        own: OwnJournal,
        system: &SystemInodes,
        rindex: &[RindexEntry],
        cache: &Arc<MetaCache>,
        held: &mut Vec<Holder>,
    ) -> Result<Writer> {
        let j = &system.journals[own.index];
        // The journal's lock guards these, and the journal is clean. Its last user, or a master of these locks, may wait for a replay by us.
        let flags = AcquireFlags::SKIP | AcquireFlags::RECOVERY;
        held.push(own.holder);
        held.push(self.acquire(inode_glock(j.dinode), LockState::Shared, flags)?);
        held.push(self.acquire(iopen_glock(j.dinode), LockState::Shared, flags)?);
        held.push(self.acquire(inode_glock(j.quota_change), LockState::Exclusive, flags)?);
        let change = self.acquire(inode_glock(j.statfs_change), LockState::Exclusive, flags)?;
        let statfs_buf = cache.read(change.glock(), j.statfs_change, MetaType::Dinode)?;
        held.push(change);
        let local = statfs_buf
            .with(|b| StatfsChange::decode(&b[Dinode::SIZE..]))
            .map_err(|e| e.at(j.statfs_change))?;
        let next = (own.head.blkno + 1) % own.map.len();
        let log = Log::new(
            Arc::clone(self.disk),
            Arc::clone(cache),
            LogConfig {
                jid: j.jid,
                map: Box::new(own.map),
                jinode: j.dinode.0,
                statfs_addr: j.statfs_change.0,
                quota_addr: j.quota_change.0,
                next,
                sequence: own.head.sequence + 1,
                local,
                commit_interval: self.options.commit,
            },
        );
        log.set_statfs(statfs_buf);
        log.set_read_only(self.options.read_only);
        let rgrps = Rgrps::new(
            Arc::clone(self.disk),
            Arc::clone(cache),
            Arc::clone(self.glocks),
            Arc::clone(&log),
            system.journals.len() as u32,
            rindex,
        )?;
        Ok(Writer { log, rgrps })
    }
}

enum First {
    Yes { control: Holder, mounted: Holder },
    No { mounted: Holder },
}

impl First {
    fn is_first(&self) -> bool {
        matches!(self, Self::Yes { .. })
    }

    /// Lets the other nodes go on; returns the `mounted` lock, SH.
    fn done(self, glocks: &Glocks) -> Result<Holder> {
        match self {
            Self::No { mounted } => Ok(mounted),
            Self::Yes { control, mounted } => {
                drop(mounted);
                // EXACT: a holder that came in under the EX that is about to go would keep that EX
                let shared = glocks.acquire(
                    nondisk(MOUNTED_LOCK),
                    LockState::Shared,
                    AcquireFlags::EXACT | AcquireFlags::RECOVERY,
                )?;
                drop(control);
                Ok(shared)
            }
        }
    }
}
