//! A LUN that may be written only while a permit lasts.
//!
//! The permit is asked before every submission of a write or flush; reads are always allowed. It cannot close
//! the gap between the check and the submission (a pause may fall there), so it is a second line of defence,
//! never the proof that a node has stopped.

use crate::{BlockDevice, LunError, Read, Result, Write};
use std::sync::atomic::{AtomicU64, Ordering};

/// `permit` says `Err(why)` when nothing may be written now.
pub struct Guarded<D, P> {
    inner: D,
    permit: P,
    refused: AtomicU64,
}

impl<D: BlockDevice, P: Fn() -> Result<(), String> + Send + Sync> Guarded<D, P> {
    pub fn new(inner: D, permit: P) -> Self {
        Self { inner, permit, refused: AtomicU64::new(0) }
    }

    /// Submissions refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        (self.permit)().map_err(|why| {
            self.refused.fetch_add(1, Ordering::Relaxed);
            LunError::NotPermitted { name: self.inner.name().to_owned(), why }
        })
    }
}

impl<D: BlockDevice, P: Fn() -> Result<(), String> + Send + Sync> BlockDevice for Guarded<D, P> {
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
        self.inner.read_batch(batch)
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        self.check()?;
        self.inner.write_batch(batch)
    }

    fn flush(&self) -> Result<()> {
        self.check()?;
        self.inner.flush()
    }

    // Two submissions, so that the permit is asked again before the flush.
    fn write_durable(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, buf)?;
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemLun;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn without_a_permit_nothing_reaches_the_device_but_reads_go_on() {
        let mem = MemLun::new(1 << 20, 512);
        let ok = AtomicBool::new(true);
        let lun = Guarded::new(mem.clone(), || {
            if ok.load(Ordering::SeqCst) { Ok(()) } else { Err("not quorate".to_owned()) }
        });
        lun.write_at(0, &[1; 512]).unwrap();
        lun.flush().unwrap();
        ok.store(false, Ordering::SeqCst);
        let before = mem.log_len();
        let e = lun.write_at(512, &[2; 512]).unwrap_err();
        assert!(matches!(&e, LunError::NotPermitted { why, .. } if why == "not quorate"), "{e}");
        assert!(lun.flush().is_err() && lun.write_durable(0, &[2; 512]).is_err());
        lun.read_at(0, &mut [0; 512]).unwrap();
        assert_eq!((mem.log_len(), lun.refused()), (before, 3));
    }
}
