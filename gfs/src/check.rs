//! The consistency checker: is this volume what the format says it must be?
//!
//! One walk over every dinode that the bitmaps name claims the blocks each inode owns; afterwards claims and bitmaps must be
//! the same, every name must lead to an inode and every inode must have its names, and the counters of groups and volume must be the
//! sums. One [`Fault`] variant for each kind of damage. The checker never writes, never trusts a number before it is
//! bounded, and descends into a block at most once, so hostile volumes cost no more than their size.
//!
//! A volume whose journals are dirty is checked as it lies on disk; replay it first to judge it.

mod dirs;
mod fault;
mod inodes;
mod links;
mod space;
mod system;

pub use fault::{Fault, Severity};

use crate::geometry::Geometry;
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::sb::Superblock;
use crate::ondisk::statfs::StatfsChange;
use crate::reader::Reader;
use crate::{BlockNo, Error, Result};
use lun::Lun;
use lun::aligned::AlignedBuf;
use space::Space;
use std::collections::BTreeMap;

/// Faults listed before the checker only counts.
const MAX_FAULTS: usize = 10_000;

/// What the checker found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    pub faults: Vec<Fault>,
    /// Faults beyond those listed.
    pub unlisted: u64,
    /// Inodes walked, and blocks they own.
    pub inodes: u64,
    pub blocks: u64,
    /// Sums over all resource groups.
    pub totals: StatfsChange,
}

impl Report {
    /// Nothing at all to say.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    /// Nothing but work that a mount finishes: dirty journals, orphans, a truncate in progress, totals not synced.
    pub fn is_consistent(&self) -> bool {
        self.unlisted == 0 && self.faults.iter().all(|f| f.severity() == Severity::Unfinished)
    }

    fn add(&mut self, fault: Fault) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        } else {
            self.unlisted += 1;
        }
    }
}

/// What later passes need of an inode.
#[derive(Clone, Copy)]
struct InodeInfo {
    formal: u64,
    mode: u32,
    nlink: u32,
    unlinked: bool,
}

/// One used dirent.
struct Entry {
    dir: u64,
    /// Block and byte of the record, to find its name again.
    block: u64,
    offset: u16,
    ty: u16,
    target: u64,
    formal: u64,
    kind: EntryKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EntryKind {
    Dot,
    DotDot,
    Name,
}

struct Checker<'a> {
    reader: &'a Reader,
    sb: Superblock,
    geo: Geometry,
    report: Report,
    space: Space,
    inodes: BTreeMap<u64, InodeInfo>,
    entries: Vec<Entry>,
}

/// Check a volume that nobody has mounted. `Err` when the LUN itself fails; everything else is in the report.
pub fn check(lun: &Lun) -> Result<Report> {
    let reader = match Reader::open(lun) {
        Ok(reader) => reader,
        Err(e @ Error::Lun(_)) => return Err(e),
        Err(e) => {
            let mut report = Report::default();
            report.add(Fault::Superblock { why: e.to_string() });
            return Ok(report);
        }
    };
    let mut report = Report::default();
    let (sb, geo) = (reader.superblock().clone(), reader.geometry());
    let Some(space) = Space::load(&reader, &mut report)? else {
        return Ok(report); // without resource groups there is nothing to compare with
    };
    let mut c =
        Checker { reader: &reader, sb, geo, report, space, inodes: BTreeMap::new(), entries: Vec::new() };
    c.walk_inodes()?;
    c.check_links();
    c.check_system()?;
    c.space.compare(&mut c.report);
    c.report.totals = c.space.totals();
    Ok(c.report)
}

impl Checker<'_> {
    fn read(&self, block: u64, buf: &mut AlignedBuf) -> Result<()> {
        self.reader.disk().read(BlockNo(block), buf)
    }

    fn buffer(&self) -> AlignedBuf {
        AlignedBuf::zeroed(self.geo.block_size as usize)
    }

    /// Takes a block for an inode. False, with a fault, when it is no data block or has an owner already.
    fn claim(&mut self, inode: u64, block: u64, state: BlockState) -> bool {
        match self.space.claim(block, state) {
            space::Claim::Taken => {
                self.report.blocks += 1;
                true
            }
            space::Claim::Outside => {
                self.report.add(Fault::Pointer { inode, pointer: block });
                false
            }
            space::Claim::Twice => {
                self.report.add(Fault::Duplicate { inode, block });
                false
            }
        }
    }
}

/// A damaged structure becomes a fault, a failing LUN stays an error.
fn damage<T>(result: Result<T>) -> Result<std::result::Result<T, String>> {
    match result {
        Ok(v) => Ok(Ok(v)),
        Err(e @ (Error::Lun(_) | Error::Withdrawn(_))) => Err(e),
        Err(e) => Ok(Err(e.to_string())),
    }
}
