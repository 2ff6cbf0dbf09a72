//! Faults on demand, on top of any device: for tests of everything that stands above a LUN.
//!
//! | fault | the device sees | the caller sees |
//! |---|---|---|
//! | `Fail` | nothing | an error |
//! | `LostAnswer` | the whole request | an error |
//! | `Torn` | the first sectors of the batch's first write | an error |
//! | `Lose` | nothing | success |
//! | `Slow` | the request, later | its answer, later |
//! | `Hang` | the request, once released (or never) | its answer then |
//!
//! Beside these a volatile cache ([`Faults::cache_writes`]): writes are kept here until a flush, and
//! [`Faults::drop_unflushed`] is the power cut. (The in-memory LUN has a finer one of its own.)

use crate::{BlockDevice, LunError, Read, Result, Write, check_range};
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Read,
    Write,
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Error with this errno.
    Fail(i32),
    LostAnswer(i32),
    Torn {
        sectors: usize,
    },
    Lose,
    Slow(Duration),
    Hang,
}

#[derive(Default)]
struct State {
    /// Calls so far, by kind.
    calls: BTreeMap<Op, u64>,
    /// Fault of one numbered call.
    at: BTreeMap<(Op, u64), Fault>,
    /// Fault of every call of a kind.
    always: BTreeMap<Op, Fault>,
    hanging: usize,
    /// Each release lets go of everything that hung before it; `Some` is the errno that they get.
    releases: u64,
    release_error: Option<i32>,
    /// Sectors not yet flushed, by sector number, when caching.
    cache: Option<BTreeMap<u64, Vec<u8>>>,
}

/// The switchboard of a [`FaultLun`].
#[derive(Clone, Default)]
pub struct Faults {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Faults {
    /// The `k`-th call of this kind from now on (1 is the next) gets `fault`.
    pub fn at(&self, op: Op, k: u64, fault: Fault) {
        let mut s = self.shared.0.lock();
        let no = s.calls.get(&op).copied().unwrap_or(0) + k;
        s.at.insert((op, no), fault);
    }

    /// Every call of this kind gets `fault`, until [`Faults::clear`].
    pub fn always(&self, op: Op, fault: Fault) {
        self.shared.0.lock().always.insert(op, fault);
    }

    /// No more faults for new calls. What hangs goes on hanging until released.
    pub fn clear(&self) {
        let mut s = self.shared.0.lock();
        s.at.clear();
        s.always.clear();
    }

    /// Lets every hanging call go on to the device.
    pub fn release(&self) {
        self.let_go(None);
    }

    /// Lets every hanging call end with an error; the device never sees it.
    pub fn release_with_error(&self, errno: i32) {
        self.let_go(Some(errno));
    }

    fn let_go(&self, error: Option<i32>) {
        let mut s = self.shared.0.lock();
        s.releases += 1;
        s.release_error = error;
        self.shared.1.notify_all();
    }

    pub fn hanging(&self) -> usize {
        self.shared.0.lock().hanging
    }

    /// Waits until at least `n` calls hang; false when that did not happen in time.
    pub fn wait_hanging(&self, n: usize, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut s = self.shared.0.lock();
        while s.hanging < n {
            if self.shared.1.wait_until(&mut s, deadline).timed_out() {
                return s.hanging >= n;
            }
        }
        true
    }

    /// Calls of a kind so far.
    pub fn calls(&self, op: Op) -> u64 {
        self.shared.0.lock().calls.get(&op).copied().unwrap_or(0)
    }

    /// From now on writes are volatile until the next flush.
    pub fn cache_writes(&self) {
        self.shared.0.lock().cache.get_or_insert_default();
    }

    /// Power cut: unflushed writes are gone. Returns the number of sectors lost.
    pub fn drop_unflushed(&self) -> usize {
        self.shared.0.lock().cache.as_mut().map_or(0, |c| std::mem::take(c).len())
    }
}

enum Verdict {
    Go,
    Lose,
    Torn(usize),
    GoThenError(i32),
}

/// Any device, with [`Faults`].
pub struct FaultLun<D> {
    inner: D,
    faults: Faults,
}

impl<D: BlockDevice> FaultLun<D> {
    pub fn new(inner: D) -> (Self, Faults) {
        let faults = Faults::default();
        (Self { inner, faults: faults.clone() }, faults)
    }

    fn error(&self, op: Op, offset: u64, len: u64, errno: i32) -> LunError {
        let name = self.inner.name().to_owned();
        let source = io::Error::from_raw_os_error(errno);
        match op {
            Op::Read => LunError::Io { name, op: "read", offset, len, source },
            Op::Write => LunError::Io { name, op: "write", offset, len, source },
            Op::Flush => LunError::Flush { name, source },
        }
    }

    fn verdict(&self, op: Op, offset: u64, len: u64) -> Result<Verdict> {
        let (lock, signal) = &*self.faults.shared;
        let mut s = lock.lock();
        let no = s.calls.get(&op).copied().unwrap_or(0) + 1;
        s.calls.insert(op, no);
        let Some(fault) = s.at.remove(&(op, no)).or_else(|| s.always.get(&op).copied()) else {
            return Ok(Verdict::Go);
        };
        match fault {
            Fault::Fail(errno) => Err(self.error(op, offset, len, errno)),
            Fault::LostAnswer(errno) => Ok(Verdict::GoThenError(errno)),
            Fault::Torn { sectors } => Ok(Verdict::Torn(sectors)),
            Fault::Lose => Ok(Verdict::Lose),
            Fault::Slow(time) => {
                drop(s);
                std::thread::sleep(time);
                Ok(Verdict::Go)
            }
            Fault::Hang => {
                let seen = s.releases;
                s.hanging += 1;
                signal.notify_all();
                while s.releases == seen {
                    signal.wait(&mut s);
                }
                s.hanging -= 1;
                match s.release_error {
                    Some(errno) => Err(self.error(op, offset, len, errno)),
                    None => Ok(Verdict::Go),
                }
            }
        }
    }

    fn pass_writes(&self, batch: &[Write<'_>]) -> Result<()> {
        let sector = u64::from(self.inner.sector_size());
        for w in batch {
            check_range(self, "write", w.offset, w.buf.len())?;
        }
        let mut s = self.faults.shared.0.lock();
        let Some(cache) = &mut s.cache else {
            drop(s);
            return self.inner.write_batch(batch);
        };
        for w in batch {
            for (i, piece) in w.buf.chunks(sector as usize).enumerate() {
                cache.insert(w.offset / sector + i as u64, piece.to_vec());
            }
        }
        Ok(())
    }
}

impl<D: BlockDevice> BlockDevice for FaultLun<D> {
    fn sector_size(&self) -> u32 {
        self.inner.sector_size()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        let (offset, len) = batch.first().map_or((0, 0), |r| (r.offset, r.buf.len() as u64));
        let verdict = self.verdict(Op::Read, offset, len)?;
        self.inner.read_batch(batch)?;
        let sector = u64::from(self.inner.sector_size());
        if let Some(cache) = &self.faults.shared.0.lock().cache {
            for r in batch {
                for (i, piece) in r.buf.chunks_mut(sector as usize).enumerate() {
                    if let Some(newer) = cache.get(&(r.offset / sector + i as u64)) {
                        piece.copy_from_slice(newer);
                    }
                }
            }
        }
        match verdict {
            Verdict::Go | Verdict::Lose | Verdict::Torn(_) => Ok(()),
            Verdict::GoThenError(errno) => Err(self.error(Op::Read, offset, len, errno)),
        }
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        let (offset, len) = batch.first().map_or((0, 0), |w| (w.offset, w.buf.len() as u64));
        match self.verdict(Op::Write, offset, len)? {
            Verdict::Go => self.pass_writes(batch),
            Verdict::Lose => Ok(()),
            Verdict::Torn(sectors) => {
                if let Some(w) = batch.first() {
                    let n = (sectors * self.inner.sector_size() as usize).min(w.buf.len());
                    self.pass_writes(&[Write { offset: w.offset, buf: &w.buf[..n] }])?;
                }
                Err(self.error(Op::Write, offset, len, libc::EIO))
            }
            Verdict::GoThenError(errno) => {
                self.pass_writes(batch)?;
                Err(self.error(Op::Write, offset, len, errno))
            }
        }
    }

    fn flush(&self) -> Result<()> {
        let verdict = self.verdict(Op::Flush, 0, 0)?;
        if matches!(verdict, Verdict::Lose) {
            return Ok(());
        }
        let held = self.faults.shared.0.lock().cache.as_mut().map(std::mem::take);
        if let Some(held) = held {
            let sector = u64::from(self.inner.sector_size());
            let batch: Vec<Write<'_>> =
                held.iter().map(|(no, b)| Write { offset: no * sector, buf: b }).collect();
            self.inner.write_batch(&batch)?;
        }
        self.inner.flush()?;
        match verdict {
            Verdict::GoThenError(errno) => Err(self.error(Op::Flush, 0, 0, errno)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemLun;

    fn setup() -> (MemLun, FaultLun<MemLun>, Faults) {
        let mem = MemLun::new(1 << 20, 512);
        let (lun, faults) = FaultLun::new(mem.clone());
        (mem, lun, faults)
    }

    #[test]
    fn the_kth_call_fails_and_only_that() {
        let (mem, lun, faults) = setup();
        lun.write_at(0, &[1; 512]).unwrap();
        faults.at(Op::Write, 2, Fault::Fail(libc::EIO));
        lun.write_at(0, &[2; 512]).unwrap();
        assert!(lun.write_at(0, &[3; 512]).is_err());
        lun.write_at(512, &[4; 512]).unwrap();
        assert_eq!(mem.log().len(), 3);
        assert_eq!(faults.calls(Op::Write), 4);
    }

    #[test]
    fn torn_lost_and_unanswered_writes_leave_what_they_say() {
        let (mem, lun, faults) = setup();
        faults.at(Op::Write, 1, Fault::Torn { sectors: 2 });
        assert!(lun.write_at(0, &[1; 2048]).is_err());
        faults.at(Op::Write, 1, Fault::LostAnswer(libc::ETIMEDOUT));
        assert!(lun.write_at(4096, &[2; 512]).is_err());
        faults.at(Op::Write, 1, Fault::Lose);
        lun.write_at(8192, &[3; 512]).unwrap();
        let mut got = [9u8; 2048];
        mem.read_at(0, &mut got).unwrap();
        assert!(got[..1024].iter().all(|&b| b == 1) && got[1024..].iter().all(|&b| b == 0));
        mem.read_at(4096, &mut got[..512]).unwrap();
        assert_eq!(got[..512], [2; 512]);
        mem.read_at(8192, &mut got[..512]).unwrap();
        assert_eq!(got[..512], [0; 512]);
    }

    #[test]
    fn hung_calls_reach_the_device_only_after_release() {
        let (mem, lun, faults) = setup();
        faults.always(Op::Write, Fault::Hang);
        std::thread::scope(|s| {
            let a = s.spawn(|| lun.write_at(0, &[1; 512]));
            assert!(faults.wait_hanging(1, Duration::from_secs(10)));
            assert_eq!(mem.log_len(), 0);
            faults.release();
            a.join().unwrap().unwrap();
            assert_eq!(mem.log_len(), 1);
            let b = s.spawn(|| lun.write_at(0, &[2; 512]));
            assert!(faults.wait_hanging(1, Duration::from_secs(10)));
            faults.clear();
            faults.release_with_error(libc::EIO);
            assert!(b.join().unwrap().is_err());
            assert_eq!(mem.log_len(), 1);
            lun.write_at(0, &[3; 512]).unwrap();
        });
    }

    #[test]
    fn cached_writes_are_seen_by_reads_and_lost_without_flush() {
        let (mem, lun, faults) = setup();
        faults.cache_writes();
        lun.write_at(0, &[1; 1024]).unwrap();
        lun.flush().unwrap();
        lun.write_at(512, &[2; 512]).unwrap();
        let mut got = [0u8; 1024];
        lun.read_at(0, &mut got).unwrap();
        assert!(got[..512] == [1; 512] && got[512..] == [2; 512]);
        assert_eq!(faults.drop_unflushed(), 1);
        lun.read_at(0, &mut got).unwrap();
        assert_eq!(got, [1; 1024]);
        mem.read_at(0, &mut got).unwrap();
        assert_eq!(got, [1; 1024]);
    }
}
