//! Does the enumeration see anything? A flush or the revokes are left out below the mount, and it must find a state that is wrong.

use super::engine::{Effort, Workload, enumerate, record};
use super::workloads;
use gfs::geometry::Geometry;
use gfs::ondisk::header::{MetaHeader, MetaType};
use gfs::ondisk::log::{LD_REVOKE, LogDescriptor};
use lun::mem::MemLun;
use lun::{BlockDevice, Read, Result, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is left out, once the body of the workload has begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Left {
    /// The flush of this number, counted from 0.
    Flush(u64),
    Revokes,
}

/// Set while the setup runs.
const NOT_YET: u64 = u64::MAX / 2;

struct Sabotaged {
    lun: MemLun,
    left: Left,
    bsize: u32,
    /// Flushes since the body began.
    flushes: Arc<AtomicU64>,
}

impl Sabotaged {
    fn has_begun(&self) -> bool {
        self.flushes.load(Ordering::SeqCst) < NOT_YET
    }

    /// The same block, its revokes counted as none.
    fn without_revokes(&self, block: &mut [u8]) {
        let geo = Geometry::new(self.bsize).unwrap();
        if MetaHeader::expect(block, MetaType::LogDescriptor).is_err() {
            return;
        }
        let Ok(mut descriptor) = LogDescriptor::decode(block, &geo) else { return };
        if descriptor.kind == LD_REVOKE {
            descriptor.count = 0;
            descriptor.encode(block);
        }
    }
}

impl BlockDevice for Sabotaged {
    fn sector_size(&self) -> u32 {
        self.lun.sector_size()
    }

    fn size(&self) -> u64 {
        self.lun.size()
    }

    fn name(&self) -> &str {
        self.lun.name()
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        self.lun.read_batch(batch)
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        if self.left != Left::Revokes || !self.has_begun() {
            return self.lun.write_batch(batch);
        }
        let mut copies: Vec<(u64, Vec<u8>)> = batch.iter().map(|w| (w.offset, w.buf.to_vec())).collect();
        for block in copies.iter_mut().flat_map(|(_, buf)| buf.chunks_exact_mut(self.bsize as usize)) {
            self.without_revokes(block);
        }
        let batch: Vec<Write<'_>> =
            copies.iter().map(|(offset, buf)| Write { offset: *offset, buf }).collect();
        self.lun.write_batch(&batch)
    }

    fn flush(&self) -> Result<()> {
        let number = self.flushes.fetch_add(1, Ordering::SeqCst);
        if self.left == Left::Flush(number) { Ok(()) } else { self.lun.flush() }
    }
}

/// Whether the enumeration finds a wrong state.
fn finds(w: &Workload, left: Left) -> bool {
    let flushes = Arc::new(AtomicU64::new(NOT_YET));
    let device = |lun| -> lun::Lun {
        Arc::new(Sabotaged { lun, left, bsize: w.bsize, flushes: Arc::clone(&flushes) })
    };
    let history = record(w, device, || flushes.store(0, Ordering::SeqCst));
    let result = enumerate(w, &history, 1, Effort { subsets: 40, samples: false });
    if let Err(v) = &result {
        let why = v.why.lines().next().unwrap_or_default();
        println!("{} ({}) without {left:?}: event {}, {:?}: {why}", w.name, w.bsize, v.event, v.keep);
    }
    result.is_err()
}

/// Three times fsync, each with a flush before the commit header and one after it; what follows brings the metadata into place.
#[test]
fn a_flush_left_out_is_found() {
    let w = workloads::create_write_fsync(512);
    assert!(!finds(&w, Left::Flush(u64::MAX)), "nothing is left out");
    let found: Vec<u64> = (0..6).filter(|k| finds(&w, Left::Flush(*k))).collect();
    println!("{} ({}): found when left out: {found:?}", w.name, w.bsize);
    assert!(found.len() >= 5, "of the flushes of three fsyncs only {found:?} are missed");
}

#[test]
fn revokes_left_out_are_found() {
    for w in [workloads::freed_metadata_becomes_data(512), workloads::indirect_blocks_freed_and_reused(512)] {
        assert!(finds(&w, Left::Revokes), "{}: nobody misses the revokes", w.name);
    }
}
