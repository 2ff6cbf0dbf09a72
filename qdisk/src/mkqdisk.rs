//! Making, listing and finding quorum disks.

use crate::ondisk::{
    CLASSIC_MIN_SIZE, ClassicError, EXTENSION, ExtHeader, LABEL_MAGIC, Label, MIN_SIZE, NodeState, SLOT,
    StatusBlock, classic_offset, decode_label, decode_status, encode_label, encode_status, ext_offset,
};
use crate::{MAX_NODES, ondisk::AREA};
use lun::{BlockDevice, LunError, OpenOptions, Share, Write, probe};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Characters of a label that fit on the disk.
pub const LABEL_LIMIT: usize = 118;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MkError {
    #[error(transparent)]
    Lun(#[from] LunError),
    #[error("Partition {device} too small: {size} bytes, at least {MIN_SIZE} are needed")]
    TooSmall { device: String, size: u64 },
    #[error("{device}: appears to contain {what}; nothing was written (override with -O)")]
    Foreign { device: String, what: &'static str },
    #[error("the label is empty, longer than {LABEL_LIMIT} bytes, or has control characters")]
    Label,
    #[error("no randomness for the disk's id: {0}")]
    Random(std::io::Error),
}

/// What a device says about itself.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Found {
    pub device: String,
    pub magic: u32,
    pub label: String,
    /// Seconds since 1970.
    pub created: u64,
    pub host: String,
    pub kernel_sector_size: u32,
    pub recorded_sector_size: u32,
    /// Has the extension area that our daemons need.
    pub extension: bool,
    pub nodes: Vec<FoundNode>,
}

/// A status block whose state is not None.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct FoundNode {
    pub node: u16,
    pub updated_by: u32,
    pub updated: u64,
    pub state: &'static str,
    pub flags: u16,
    pub score: u16,
    pub score_max: u16,
    pub average_cycle_us: u64,
    pub last_cycle_us: u64,
    pub incarnation: u64,
}

/// What will be overwritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    pub label: Option<String>,
    /// E-blocks are there: nodes have used this disk.
    pub used: bool,
    /// Something that is no quorum disk, for example "an XFS file system".
    pub foreign: Option<&'static str>,
}

pub fn check_label(label: &str) -> Result<(), MkError> {
    let good = !label.is_empty() && label.len() <= LABEL_LIMIT && !label.chars().any(char::is_control);
    if good { Ok(()) } else { Err(MkError::Label) }
}

/// What the device holds now.
pub fn present(device: &str) -> Result<Present, MkError> {
    let lun = lun::open(device, &OpenOptions::read_only())?;
    let mut b = vec![0u8; SLOT];
    if lun.size() < CLASSIC_MIN_SIZE {
        return Ok(Present { label: None, used: false, foreign: None });
    }
    lun.read_at(0, &mut b)?;
    let label = decode_label(&b).ok().map(|l| l.label);
    let mut used = false;
    if lun.size() >= MIN_SIZE {
        let mut area = vec![0u8; AREA];
        lun.read_at(EXTENSION, &mut area)?;
        used = ExtHeader::decode(&area).is_ok() && area[SLOT..].iter().any(|&x| x != 0);
    }
    let foreign = if label.is_some() {
        None
    } else {
        probe::probe(&lun)?.map(|c| c.kind).filter(|k| *k != probe::QDISK)
    };
    Ok(Present { label, used, foreign })
}

fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".into(), |h| h.trim().to_owned())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Writes a new quorum disk over whatever the device holds. `progress` hears the number of each status block before it
/// is written. The label goes last, so that a half-made disk is none.
pub fn create(device: &str, label: &str, mut progress: impl FnMut(u16)) -> Result<(), MkError> {
    check_label(label)?;
    let lun = lun::open(device, &OpenOptions::default().share(Share::Exclusive))?;
    let (size, block_size) = (lun.size(), lun.sector_size());
    if size < MIN_SIZE {
        return Err(MkError::TooSmall { device: device.to_owned(), size });
    }
    let sector = block_size as usize;
    let mut uuid = [0u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut uuid))
        .map_err(MkError::Random)?;
    // The old label first: nobody takes a disk for whole that we began to overwrite.
    lun.write_at(0, &vec![0u8; SLOT])?;
    lun.flush()?;
    let created = now();
    for n in 1..=MAX_NODES as u16 {
        progress(n);
        let status = StatusBlock {
            node: u32::from(n),
            update_node: u32::from(n),
            timestamp: created,
            ..StatusBlock::default()
        };
        let mut b = vec![0u8; SLOT];
        encode_status(&status, &mut b[..sector]);
        lun.write_at(classic_offset(n), &b)?;
    }
    let header = ExtHeader { uuid, label: label.to_owned(), block_size }.encode();
    let empty = vec![0u8; SLOT];
    let mut batch: Vec<Write<'_>> =
        (1..=MAX_NODES as u16).map(|n| Write { offset: ext_offset(n), buf: &empty }).collect();
    batch.push(Write { offset: EXTENSION, buf: &header });
    lun.write_batch(&batch)?;
    lun.flush()?;
    let mut first = vec![0u8; SLOT];
    let text = Label { magic: LABEL_MAGIC, created, host: host(), label: label.to_owned(), block_size };
    encode_label(&text, &mut first[..sector]);
    lun.write_durable(0, &first)?;
    Ok(())
}

/// The quorum disk on a device; `Ok(None)` when it carries none.
pub fn examine(device: &str) -> Result<Option<Found>, MkError> {
    let lun = lun::open(device, &OpenOptions::read_only())?;
    if lun.size() < CLASSIC_MIN_SIZE {
        return Ok(None);
    }
    let mut area = vec![0u8; AREA];
    lun.read_at(0, &mut area)?;
    let label = match decode_label(&area[..SLOT]) {
        Ok(l) => l,
        Err(ClassicError::DataCrc | ClassicError::HeaderCrc) => {
            tracing::debug!(device, "bad CRC32");
            return Ok(None);
        }
        Err(_) => return Ok(None),
    };
    let us = |(s, u): (u32, u32)| u64::from(s) * 1_000_000 + u64::from(u);
    let nodes = (1..=MAX_NODES)
        .filter_map(|n| {
            let s = decode_status(&area[n * SLOT..(n + 1) * SLOT]).ok()?;
            (s.state != NodeState::None).then(|| FoundNode {
                node: n as u16,
                updated_by: s.update_node,
                updated: s.timestamp,
                state: s.state.name(),
                flags: s.flags,
                score: s.score,
                score_max: s.score_max,
                average_cycle_us: us(s.average),
                last_cycle_us: us(s.last),
                incarnation: s.incarnation,
            })
        })
        .collect();
    let extension = lun.size() >= MIN_SIZE && {
        let mut b = vec![0u8; SLOT];
        lun.read_at(EXTENSION, &mut b)?;
        ExtHeader::decode(&b).is_ok()
    };
    Ok(Some(Found {
        device: device.to_owned(),
        magic: label.magic,
        label: label.label,
        created: label.created,
        host: label.host,
        kernel_sector_size: lun.sector_size(),
        recorded_sector_size: label.block_size,
        extension,
        nodes,
    }))
}

/// Block devices of this host that may carry a quorum disk: not those that something is built upon.
pub fn candidates() -> Vec<PathBuf> {
    let Ok(text) = std::fs::read_to_string("/proc/partitions") else { return Vec::new() };
    text.lines()
        .filter_map(|l| l.split_whitespace().nth(3))
        .filter(|name| {
            let holders = Path::new("/sys/class/block").join(name).join("holders");
            !std::fs::read_dir(holders).is_ok_and(|mut d| d.next().is_some())
        })
        .map(|name| Path::new("/dev").join(name))
        .filter(|p| p.exists())
        .collect()
}

/// All quorum disks among `devices` (the host's own when empty), with the errors of those that cannot be read.
pub fn scan(devices: &[String]) -> (Vec<Found>, Vec<String>) {
    let own: Vec<String> = if devices.is_empty() {
        candidates().iter().map(|p| p.display().to_string()).collect()
    } else {
        devices.to_vec()
    };
    let unique: BTreeSet<String> = own.into_iter().collect();
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    for d in unique {
        match examine(&d) {
            Ok(Some(f)) if f.recorded_sector_size == f.kernel_sector_size => found.push(f),
            Ok(Some(f)) => errors.push(format!(
                "{d}: made with sectors of {} bytes, now {}: skipped",
                f.recorded_sector_size, f.kernel_sector_size
            )),
            Ok(None) => {}
            // A whole-host scan meets drives without media and the like.
            Err(e) if devices.is_empty() => tracing::debug!(err = %e, "not examined"),
            Err(e) => errors.push(e.to_string()),
        }
    }
    (found, errors)
}

/// `Www Mmm dd hh:mm:ss yyyy`, local time, as the historic tools print times.
pub fn ctime(t: SystemTime) -> String {
    let secs = t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    local_time::format(secs)
}

/// libc's calendar, which needs `unsafe`.
#[allow(unsafe_code)]
mod local_time {
    pub(super) fn format(secs: u64) -> String {
        let t = secs as libc::time_t;
        // SAFETY: `tm` is plain data for which zero is valid.
        let mut tm: libc::tm = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are valid for the call.
        if unsafe { libc::localtime_r(&raw const t, &raw mut tm) }.is_null() {
            return secs.to_string();
        }
        let day = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"][tm.tm_wday.clamp(0, 6) as usize];
        let month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
            [tm.tm_mon.clamp(0, 11) as usize];
        let (h, m, s, year) = (tm.tm_hour, tm.tm_min, tm.tm_sec, tm.tm_year + 1900);
        format!("{day} {month} {:2} {h:02}:{m:02}:{s:02} {year}", tm.tm_mday)
    }
}
