//! Making a volume.
//!
//! The layout is that of mkfs.gfs2: first one resource group for each journal, then groups over the rest of the
//! device; small inodes take the first free blocks in a fixed order. [`plan`] computes where groups lie, [`build`] holds the
//! system inodes in memory, this module writes. Everything is on disk and flushed before the superblock is written,
//! and an old superblock is wiped first, so that a half-made volume never mounts.
//!
//! Source: observed images of mkfs.gfs2 3.5, which the tests compare with byte by byte.

mod build;
mod plan;

use crate::geometry::Geometry;
use crate::ondisk::FormatError;
use crate::ondisk::bitmap;
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::log::{LHF_UNMOUNT, LHF_USERSPACE, LogHeader};
use crate::ondisk::rgrp::Rgrp;
use crate::ondisk::sb::{FORMAT_1801, FORMAT_1802, SB_OFFSET, Superblock};
use build::Builder;
use lun::{Lun, Write, probe};
use plan::Plan;

/// Bytes gathered before they are handed to the device.
const BATCH: usize = 1 << 20;

/// What kind of volume to make. `Default` is what `mkfs.gfs DEVICE` without options means, apart from the lock table.
#[derive(Clone, Debug)]
pub struct MkfsOptions {
    pub lock_proto: String,
    /// `cluster:fsname`; may be empty for `lock_nolock` only.
    pub lock_table: String,
    pub journals: u32,
    /// 8 to 1024; chosen from the size of the device when absent.
    pub journal_mb: Option<u32>,
    /// Size of each node's quota_change file, 1 to 64.
    pub quota_change_mb: u32,
    pub block_size: u32,
    /// Target size of resource groups, 32 to 2048.
    pub rgrp_mb: u32,
    /// Random when absent.
    pub uuid: Option<[u8; 16]>,
    /// Use only so many blocks of the device.
    pub size_blocks: Option<u64>,
    /// 1801 or 1802.
    pub fs_format: u32,
    /// User and group of the root directory.
    pub root_owner: (u32, u32),
    /// Overwrite a file system or partition table found on the device.
    pub override_existing: bool,
    /// Times of the new inodes in seconds; now when absent.
    pub time: Option<i64>,
    /// Sequence number in the first block of each journal; random where absent. For images that must be reproducible.
    pub journal_starts: Vec<u32>,
}

impl Default for MkfsOptions {
    fn default() -> Self {
        Self {
            lock_proto: "lock_dlm".into(),
            lock_table: String::new(),
            journals: 1,
            journal_mb: None,
            quota_change_mb: 1,
            block_size: 4096,
            rgrp_mb: 256,
            uuid: None,
            size_blocks: None,
            fs_format: FORMAT_1802,
            root_owner: (0, 0),
            override_existing: false,
            time: None,
            journal_starts: Vec::new(),
        }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    pub device: String,
    pub block_size: u32,
    pub device_blocks: u64,
    /// First block behind the last resource group.
    pub fs_blocks: u64,
    pub journals: u32,
    pub journal_mb: u32,
    pub rgrps: u64,
    pub lock_proto: String,
    pub lock_table: String,
    pub uuid: [u8; 16],
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MkfsError {
    #[error("{0}")]
    Option(String),
    #[error("{device}: {blocks} blocks are too few for {journals} journal(s) of {journal_mb} MiB")]
    TooSmall { device: String, blocks: u64, journals: u32, journal_mb: u32 },
    #[error("{device}: appears to contain {what}; nothing was written (override with -O)")]
    InUse { device: String, what: String },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Lun(#[from] lun::LunError),
    #[error("no random numbers: {0}")]
    Random(String),
}

fn option<T>(text: impl Into<String>) -> Result<T, MkfsError> {
    Err(MkfsError::Option(text.into()))
}

/// `cluster:fsname`: letters, digits, `-`, `_`, one colon, 1 to 32 and 1 to 30 characters.
fn check_lock_table(proto: &str, table: &str) -> Result<(), MkfsError> {
    match proto {
        "lock_nolock" if table.is_empty() => return Ok(()),
        "lock_dlm" | "lock_nolock" => {}
        other => return option(format!("unknown locking protocol `{other}` (lock_dlm or lock_nolock)")),
    }
    if table.is_empty() {
        return option("lock_dlm needs a lock table, -t cluster:fsname");
    }
    let legal = |s: &str, max| {
        (1..=max).contains(&s.len()) && s.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
    };
    match table.split_once(':') {
        Some((cluster, fs)) if legal(cluster, 32) && legal(fs, 30) => Ok(()),
        _ => option(format!(
            "lock table `{table}` is not cluster:fsname (letters, digits, - and _; at most 32 and 30 characters)"
        )),
    }
}

fn check_options(o: &MkfsOptions) -> Result<(), MkfsError> {
    check_lock_table(&o.lock_proto, &o.lock_table)?;
    let range = |name: &str, value: u32, min: u32, max: u32| match value {
        v if (min..=max).contains(&v) => Ok(()),
        v => option(format!("{name} is {v}, allowed are {min} to {max}")),
    };
    range("number of journals", o.journals, 1, 1 << 16)?;
    range("journal size in MiB", o.journal_mb.unwrap_or(8), 8, 1024)?;
    range("quota change file size in MiB", o.quota_change_mb, 1, 64)?;
    range("resource group size in MiB", o.rgrp_mb, 32, 2048)?;
    range("format", o.fs_format, FORMAT_1801, FORMAT_1802)
}

/// Make a volume on `lun`. `progress` gets bytes written and bytes to write.
pub fn make(
    lun: &Lun,
    options: &MkfsOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, MkfsError> {
    check_options(options)?;
    let Ok(geo) = Geometry::new(options.block_size) else {
        return option(format!("block size {} is not 512, 1024, 2048 or 4096", options.block_size));
    };
    if options.block_size < lun.sector_size() {
        return option(format!(
            "block size {} is smaller than a sector of {} ({} bytes)",
            options.block_size,
            lun.name(),
            lun.sector_size()
        ));
    }
    let mut device_blocks = lun.size() / u64::from(geo.block_size);
    if let Some(wanted) = options.size_blocks {
        if wanted > device_blocks {
            return option(format!("{wanted} blocks wanted, but {} has {device_blocks}", lun.name()));
        }
        device_blocks = wanted;
    }
    let plan = Plan::new(lun.name(), geo, device_blocks, options)?;
    if !options.override_existing
        && let Some(found) = probe::probe(lun)?
    {
        return Err(MkfsError::InUse { device: lun.name().to_owned(), what: found.to_string() });
    }
    let uuid = match options.uuid {
        Some(uuid) => uuid,
        None => random_uuid()?,
    };
    let time = options.time.unwrap_or_else(now);
    let builder = Builder::new(&plan, options, time).build();

    let journal_bytes = u64::from(plan.jblks) * u64::from(plan.journals) * u64::from(geo.block_size);
    let header_blocks: u64 = plan.groups.iter().map(|g| u64::from(g.length)).sum();
    let total =
        journal_bytes + (header_blocks + builder.blocks.len() as u64) * u64::from(geo.block_size) + SB_OFFSET;
    let mut out = Writer { lun, geo, at: 0, batch: Vec::with_capacity(BATCH), done: 0, total, progress };

    for block in 0..=geo.sb_block() {
        out.block(block, |_| {})?;
    }
    out.send()?;
    lun.flush()?;
    for (block, bytes) in &builder.blocks {
        out.block(*block, |b| b.copy_from_slice(bytes))?;
    }
    for jid in 0..plan.journals {
        let start = match options.journal_starts.get(jid as usize) {
            Some(&s) => s % plan.jblks,
            None => random_u32()? % plan.jblks,
        };
        write_journal(&mut out, &plan, jid, start)?;
    }
    write_groups(&mut out, &plan, &builder)?;
    out.send()?;
    lun.flush()?;
    let sb = Superblock {
        fs_format: options.fs_format,
        block_size: geo.block_size,
        master: builder.master,
        root: builder.root,
        lock_proto: options.lock_proto.clone(),
        lock_table: options.lock_table.clone(),
        uuid,
    };
    out.block(geo.sb_block(), |b| sb.encode(b))?;
    out.send()?;
    lun.flush()?;
    (out.progress)(total, total);
    Ok(Summary {
        device: lun.name().to_owned(),
        block_size: geo.block_size,
        device_blocks,
        fs_blocks: plan.groups.last().map_or(0, |g| g.end()),
        journals: plan.journals,
        journal_mb: ((u64::from(plan.jblks) << geo.shift) >> 20) as u32,
        rgrps: plan.groups.len() as u64,
        lock_proto: options.lock_proto.clone(),
        lock_table: options.lock_table.clone(),
        uuid,
    })
}

/// Gathers blocks with ascending neighbours into large writes.
struct Writer<'a> {
    lun: &'a Lun,
    geo: Geometry,
    /// First block of the batch.
    at: u64,
    batch: Vec<u8>,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Writer<'_> {
    fn block(&mut self, block: u64, fill: impl FnOnce(&mut [u8])) -> Result<(), MkfsError> {
        let bsize = self.geo.block_size as usize;
        if self.batch.len() >= BATCH || block != self.at + (self.batch.len() / bsize) as u64 {
            self.send()?;
            self.at = block;
        }
        let from = self.batch.len();
        self.batch.resize(from + bsize, 0);
        fill(&mut self.batch[from..]);
        Ok(())
    }

    fn send(&mut self) -> Result<(), MkfsError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.lun.write_batch(&[Write { offset: self.at << self.geo.shift, buf: &self.batch }])?;
        self.done += self.batch.len() as u64;
        self.batch.clear();
        (self.progress)(self.done.min(self.total), self.total);
        Ok(())
    }
}

/// Every block of a new journal is a header that says "clean", with sequence numbers that wrap once, so that nothing older
/// on the device can be taken for a part of the log.
fn write_journal(out: &mut Writer<'_>, plan: &Plan, jid: u32, start: u32) -> Result<(), MkfsError> {
    let (jinode, first) = (plan.journal_dinode(jid), plan.journal_first_block(jid));
    for blkno in 0..plan.jblks {
        let addr = first + u64::from(blkno);
        let header = LogHeader {
            sequence: (u64::from(start) + u64::from(blkno)) % u64::from(plan.jblks),
            flags: LHF_UNMOUNT | LHF_USERSPACE,
            blkno,
            addr,
            jinode,
            ..LogHeader::default()
        };
        out.block(addr, |b| header.encode(b))?;
    }
    Ok(())
}

fn write_groups(out: &mut Writer<'_>, plan: &Plan, builder: &Builder<'_>) -> Result<(), MkfsError> {
    for (i, (entry, usage)) in plan.groups.iter().zip(&builder.usage).enumerate() {
        let mut bits = vec![0u8; entry.bitbytes as usize];
        let mut k = 0;
        for &(count, state) in &usage.runs {
            for _ in 0..count {
                bitmap::set(&mut bits, k, state);
                k += 1;
            }
        }
        let header = Rgrp {
            free: entry.data - usage.used,
            dinodes: usage.dinodes,
            skip: plan.groups.get(i + 1).map_or(0, |next| (next.addr - entry.addr) as u32),
            data0: entry.data0,
            data: entry.data,
            bitbytes: entry.bitbytes,
            ..Rgrp::default()
        };
        for part in entry.parts(&plan.geo) {
            let from = part.first as usize / 4;
            let bits = bits.get(from..from + part.bytes).unwrap_or_default();
            out.block(part.block, |b| {
                if part.first == 0 && part.block == entry.addr {
                    header.encode(b);
                } else {
                    MetaHeader::new(MetaType::RgrpBitmap).encode(b);
                }
                b[part.offset..part.offset + bits.len()].copy_from_slice(bits);
            })?;
        }
    }
    Ok(())
}

fn now() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

fn random(bytes: &mut [u8]) -> Result<(), MkfsError> {
    getrandom::fill(bytes).map_err(|e| MkfsError::Random(e.to_string()))
}

fn random_u32() -> Result<u32, MkfsError> {
    let mut b = [0; 4];
    random(&mut b)?;
    Ok(u32::from_be_bytes(b))
}

fn random_uuid() -> Result<[u8; 16], MkfsError> {
    let mut b = [0; 16];
    random(&mut b)?;
    b[6] = (b[6] & 0x0f) | 0x40; // version 4, random
    b[8] = (b[8] & 0x3f) | 0x80;
    Ok(b)
}
