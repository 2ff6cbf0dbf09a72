//! The device as one mount sees it: block addresses instead of bytes, and the switch that stops every write.
//!
//! Two ideas. *Withdraw*: once [`Disk::withdraw`] was called nothing of this mount reaches the device any more, and
//! every call answers the reason. *Flush marks*: a write that returned is durable when a device flush that began after
//! it has ended; [`Disk::write_blocks`] hands out a mark, [`Disk::is_durable`] answers for it, and threads that need a
//! flush at the same time share one.

use crate::geometry::Geometry;
use crate::{BlockNo, Error, Result};
use lun::{Lun, Read, Write};
use parking_lot::{Condvar, Mutex};
use std::sync::OnceLock;

/// Names the first device flush that makes a finished write durable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FlushMark(u64);

struct Flushes {
    /// Flushes begun so far, and whether one is running.
    started: u64,
    running: bool,
    /// Number of the latest flush that ended well.
    done: u64,
    /// Writes may have returned since the latest flush began.
    dirty: bool,
}

type WithdrawHook = Box<dyn Fn(&str) + Send + Sync>;

pub struct Disk {
    lun: Lun,
    geo: Geometry,
    /// File system name in messages.
    name: String,
    read_only: bool,
    withdrawn: OnceLock<String>,
    on_withdraw: OnceLock<WithdrawHook>,
    flushes: Mutex<Flushes>,
    flush_ended: Condvar,
}

impl Disk {
    pub fn new(lun: Lun, geo: Geometry, name: &str, read_only: bool) -> Self {
        Self {
            lun,
            geo,
            name: name.to_owned(),
            read_only,
            withdrawn: OnceLock::new(),
            on_withdraw: OnceLock::new(),
            // What was on the device before us may not be durable.
            flushes: Mutex::new(Flushes { started: 0, running: false, done: 0, dirty: true }),
            flush_ended: Condvar::new(),
        }
    }

    pub fn lun(&self) -> &Lun {
        &self.lun
    }

    pub fn geometry(&self) -> Geometry {
        self.geo
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whole blocks on the device.
    pub fn blocks(&self) -> u64 {
        self.lun.size() >> self.geo.shift
    }

    /// `Err` once the mount has withdrawn.
    pub fn check(&self) -> Result<()> {
        match self.withdrawn.get() {
            Some(why) => Err(Error::Withdrawn(why.clone())),
            None => Ok(()),
        }
    }

    pub fn is_withdrawn(&self) -> bool {
        self.withdrawn.get().is_some()
    }

    /// Called once, with the reason, by the thread that withdraws. Must not wait.
    pub fn on_withdraw(&self, hook: WithdrawHook) {
        assert!(self.on_withdraw.set(hook).is_ok(), "one withdraw hook for each mount");
    }

    /// Stops every write of this mount for good. Safe from any thread, any number of times: the first reason stays.
    pub fn withdraw(&self, why: &str) -> Error {
        let mut first = false;
        let reason = self.withdrawn.get_or_init(|| {
            first = true;
            why.to_owned()
        });
        if first {
            tracing::error!(name: "withdrawn", event = cairn_base::events::WITHDRAWN, fs = %self.name, err = %why,
                "fsid={}: about to withdraw this file system: {why}", self.name);
            if let Some(hook) = self.on_withdraw.get() {
                hook(why);
            }
            let _guard = self.flushes.lock();
            self.flush_ended.notify_all();
        }
        Error::Withdrawn(reason.clone())
    }

    fn byte(&self, block: BlockNo, len: usize) -> Result<u64> {
        let end = block.0.checked_add((len as u64).div_ceil(self.geo.block_size.into()));
        match (self.geo.byte(block.0), end) {
            (Some(byte), Some(end)) if end <= self.blocks() => Ok(byte),
            _ => Err(Error::Corrupt { block, what: "address beyond the end of the device".to_owned() }),
        }
    }

    /// Reads whole blocks from `block` on.
    pub fn read(&self, block: BlockNo, buf: &mut [u8]) -> Result<()> {
        self.check()?;
        let byte = self.byte(block, buf.len())?;
        Ok(self.lun.read_at(byte, buf)?)
    }

    /// Reads many runs of blocks in one batch.
    pub fn read_blocks(&self, runs: &mut [(BlockNo, &mut [u8])]) -> Result<()> {
        self.check()?;
        let mut batch = Vec::with_capacity(runs.len());
        for (block, buf) in runs {
            batch.push(Read { offset: self.byte(*block, buf.len())?, buf });
        }
        Ok(self.lun.read_batch(&mut batch)?)
    }

    fn may_write(&self) -> Result<()> {
        self.check()?;
        if self.read_only { Err(Error::Errno(libc::EROFS)) } else { Ok(()) }
    }

    /// Writes many runs of blocks in one batch, in any order. A failure is the caller's to judge: for the log and for
    /// metadata it means [`Disk::withdraw`].
    pub fn write_blocks(&self, runs: &[(BlockNo, &[u8])]) -> Result<FlushMark> {
        self.may_write()?;
        let mut batch = Vec::with_capacity(runs.len());
        for (block, buf) in runs {
            batch.push(Write { offset: self.byte(*block, buf.len())?, buf });
        }
        let written = if batch.is_empty() { Ok(()) } else { self.lun.write_batch(&batch) };
        let mark = self.mark();
        written?;
        Ok(mark)
    }

    /// Writes one run and makes it durable, and with it nothing else for certain.
    pub fn write_durable(&self, block: BlockNo, buf: &[u8]) -> Result<()> {
        self.may_write()?;
        let byte = self.byte(block, buf.len())?;
        Ok(self.lun.write_durable(byte, buf)?)
    }

    /// The mark of every write that has returned by now.
    pub fn mark(&self) -> FlushMark {
        let mut f = self.flushes.lock();
        f.dirty = true;
        FlushMark(f.started + 1)
    }

    /// Writes with this mark or an earlier one are durable.
    pub fn durable(&self) -> FlushMark {
        FlushMark(self.flushes.lock().done)
    }

    pub fn is_durable(&self, mark: FlushMark) -> bool {
        mark <= self.durable()
    }

    /// Everything whose write returned before this call is durable afterwards. Callers at the same time share flushes, and where nothing was
    /// written since the last one that one will do.
    /// A device that fails a flush has lost our trust for good: the mount withdraws.
    pub fn flush(&self) -> Result<()> {
        self.may_write()?;
        let mut f = self.flushes.lock();
        let need = f.started + u64::from(f.dirty);
        while f.done < need {
            self.check()?;
            if f.running {
                self.flush_ended.wait(&mut f);
                continue;
            }
            f.started += 1;
            f.running = true;
            f.dirty = false;
            let mine = f.started;
            parking_lot::MutexGuard::unlocked(&mut f, || match self.lun.flush() {
                Ok(()) => Ok(()),
                Err(e) => Err(self.withdraw(&format!("device flush failed: {e}"))),
            })
            .inspect_err(|_| {
                self.flush_ended.notify_all();
            })?;
            f.running = false;
            f.done = f.done.max(mine);
            self.flush_ended.notify_all();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lun::mem::MemLun;
    use std::sync::Arc;

    fn disk() -> Disk {
        Disk::new(Arc::new(MemLun::new(1 << 20, 512)), Geometry::new(4096).unwrap(), "t", false)
    }

    #[test]
    fn a_mark_becomes_durable_with_the_next_flush_only() {
        let d = disk();
        d.flush().unwrap();
        let mark = d.write_blocks(&[(BlockNo(3), &[7u8; 4096])]).unwrap();
        assert!(!d.is_durable(mark));
        d.flush().unwrap();
        assert!(d.is_durable(mark));
    }

    #[test]
    fn the_device_is_flushed_when_something_was_written() {
        let lun = MemLun::new(1 << 20, 512);
        let d = Disk::new(Arc::new(lun.clone()), Geometry::new(4096).unwrap(), "t", false);
        let flushes = || lun.log().iter().filter(|e| matches!(e.what, lun::mem::What::Flush)).count();
        d.flush().unwrap();
        assert_eq!(flushes(), 1, "what was there before");
        d.flush().unwrap();
        assert_eq!(flushes(), 1);
        for n in 2..4 {
            d.write_blocks(&[(BlockNo(3), &[7u8; 4096])]).unwrap();
            d.flush().unwrap();
            d.flush().unwrap();
            assert_eq!(flushes(), n);
        }
    }

    #[test]
    fn nothing_is_written_after_a_withdraw_and_the_first_reason_stays() {
        let d = disk();
        d.withdraw("first");
        d.withdraw("second");
        let e = d.write_blocks(&[(BlockNo(3), &[7u8; 4096])]).unwrap_err();
        assert_eq!(e.to_string(), "withdrawn: first");
        assert!(d.flush().is_err() && d.read(BlockNo(0), &mut [0; 4096]).is_err());
    }

    #[test]
    fn an_address_beyond_the_device_is_corruption_not_io() {
        let d = disk();
        for b in [256, u64::MAX, u64::MAX >> 12] {
            let e = d.read(BlockNo(b), &mut [0; 4096]).unwrap_err();
            assert!(matches!(e, Error::Corrupt { block, .. } if block.0 == b), "{e}");
        }
    }
}
