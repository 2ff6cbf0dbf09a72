//! GPT partitions: finding one (primary table, then backup), and writing a simple table.
//!
//! ```text
//! LBA 0   protective MBR     LBA 1   primary header     LBA 2…    entries (128 × 128 bytes)
//!                            last    backup header      before it backup entries
//! ```
//!
//! Everything is little-endian. A table is believed only when the header's CRC, the entries' CRC and the
//! bounds agree; the content of the medium is hostile until then.
//! Source: UEFI specification, chapter "GUID Partition Table (GPT) Disk Layout".

use crate::{BlockDevice, Lun, LunError, Read, Result, Write, check_range};
use crc32fast::hash as crc32;
use std::sync::Arc;

const SIGNATURE: &[u8; 8] = b"EFI PART";
const REVISION: u32 = 0x0001_0000;
const HEADER_SIZE: usize = 92;
const ENTRY_SIZE: usize = 128;
const ENTRIES: usize = 128;
/// Larger tables are refused (the specification sets no bound; 1024 entries are beyond any real disk).
const MAX_ENTRIES: u32 = 1024;
/// Partitions are aligned to 1 MiB, as every current tool does.
const ALIGN_BYTES: u64 = 1 << 20;

/// "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, in GPT byte order.
pub const TYPE_LINUX_DATA: [u8; 16] =
    [0xAF, 0x3D, 0xC6, 0x0F, 0x83, 0x84, 0x72, 0x47, 0x8E, 0x79, 0x3D, 0x69, 0xD8, 0x47, 0x7D, 0xE4];

/// A partition as found in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Number from 1: its place in the table.
    pub number: u32,
    /// Byte offset on the device.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    pub name: String,
    pub type_guid: [u8; 16],
}

/// A partition to be made by [`create`].
#[derive(Clone, Debug)]
pub struct PartSpec {
    /// At most 36 UTF-16 units.
    pub name: String,
    /// Bytes, rounded up to 1 MiB; `None` takes the rest (last one only).
    pub size: Option<u64>,
    pub type_guid: [u8; 16],
    /// Must differ for each partition of the world; the caller has the source of randomness.
    pub guid: [u8; 16],
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("invariant: four bytes"))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("invariant: eight bytes"))
}

fn put32(b: &mut [u8], at: usize, v: u32) {
    b[at..at + 4].copy_from_slice(&v.to_le_bytes());
}

fn put64(b: &mut [u8], at: usize, v: u64) {
    b[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

/// Reads the table at one of its two places. The reason why it is not usable is for people.
fn read_table(dev: &dyn BlockDevice, lba: u64) -> Result<Result<Vec<Partition>, String>> {
    let sector = dev.sector_size() as usize;
    let lbas = dev.size() / sector as u64;
    let mut block = vec![0u8; sector];
    dev.read_at(lba * sector as u64, &mut block)?;
    if &block[..8] != SIGNATURE {
        return Ok(Err("no GPT signature".to_owned()));
    }
    let size = u32_at(&block, 12) as usize;
    if !(HEADER_SIZE..=sector).contains(&size) {
        return Ok(Err(format!("header size {size}")));
    }
    let crc = u32_at(&block, 16);
    put32(&mut block, 16, 0);
    if crc32(&block[..size]) != crc {
        return Ok(Err("header checksum is wrong".to_owned()));
    }
    if u64_at(&block, 24) != lba {
        return Ok(Err(format!("header names itself as block {}", u64_at(&block, 24))));
    }
    let (first, last) = (u64_at(&block, 40), u64_at(&block, 48));
    let (table, count, entry) = (u64_at(&block, 72), u32_at(&block, 80), u32_at(&block, 84));
    if count > MAX_ENTRIES || entry < ENTRY_SIZE as u32 || entry > 4096 || !entry.is_power_of_two() {
        return Ok(Err(format!("{count} entries of {entry} bytes")));
    }
    let bytes = count as usize * entry as usize;
    let whole = bytes.next_multiple_of(sector);
    let fits = table.checked_mul(sector as u64).and_then(|at| at.checked_add(whole as u64));
    if fits.is_none_or(|end| end > dev.size()) || table == 0 {
        return Ok(Err(format!("entries at block {table} are outside the device")));
    }
    let mut entries = vec![0u8; whole];
    if whole > 0 {
        dev.read_at(table * sector as u64, &mut entries)?;
    }
    if crc32(&entries[..bytes]) != u32_at(&block, 88) {
        return Ok(Err("checksum of the entries is wrong".to_owned()));
    }
    let mut found: Vec<Partition> = Vec::new();
    for (i, e) in entries[..bytes].chunks(entry as usize).enumerate() {
        if e[..16] == [0; 16] {
            continue;
        }
        let (start, end) = (u64_at(e, 32), u64_at(e, 40));
        let number = i as u32 + 1;
        if start < first || end < start || end > last || end >= lbas {
            return Ok(Err(format!("partition {number} has blocks {start}…{end} of {lbas}")));
        }
        let units: Vec<u16> =
            e[56..128].chunks(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|&u| u != 0).collect();
        found.push(Partition {
            number,
            start: start * sector as u64,
            len: (end - start + 1) * sector as u64,
            name: String::from_utf16_lossy(&units),
            type_guid: e[..16].try_into().expect("invariant: sixteen bytes"),
        });
    }
    let mut by_start: Vec<&Partition> = found.iter().collect();
    by_start.sort_by_key(|p| p.start);
    if let Some(w) = by_start.windows(2).find(|w| w[0].start + w[0].len > w[1].start) {
        return Ok(Err(format!("partitions {} and {} overlap", w[0].number, w[1].number)));
    }
    Ok(Ok(found))
}

/// The partitions of a device: from the primary table, or from the backup when the primary is damaged.
pub fn list(dev: &dyn BlockDevice) -> Result<Vec<Partition>> {
    let none = |reason: String| LunError::Partition { name: dev.name().to_owned(), part: 0, reason };
    let lbas = dev.size() / u64::from(dev.sector_size());
    if lbas < 3 {
        return Err(none("the device is too small for a partition table".to_owned()));
    }
    let primary = match read_table(dev, 1)? {
        Ok(list) => return Ok(list),
        Err(why) => why,
    };
    match read_table(dev, lbas - 1)? {
        Ok(list) => {
            tracing::warn!(lun = dev.name(), why = primary, "primary GPT is damaged, using the backup");
            Ok(list)
        }
        Err(backup) => Err(none(format!("primary table: {primary}; backup table: {backup}"))),
    }
}

/// A partition as a LUN of its own.
pub struct Part {
    inner: Lun,
    name: String,
    start: u64,
    len: u64,
}

impl Part {
    /// `name` is what messages show.
    pub fn open(inner: Lun, number: u32, name: &str) -> Result<Self> {
        let err = |reason| LunError::Partition { name: name.to_owned(), part: number, reason };
        let list = list(&*inner).map_err(|e| match e {
            LunError::Partition { reason, .. } => err(reason),
            other => other,
        })?;
        let found = list.into_iter().find(|p| p.number == number);
        let p = found.ok_or_else(|| err("it is not in the table".to_owned()))?;
        Ok(Self { inner, name: name.to_owned(), start: p.start, len: p.len })
    }

    pub fn start(&self) -> u64 {
        self.start
    }
}

impl BlockDevice for Part {
    fn sector_size(&self) -> u32 {
        self.inner.sector_size()
    }

    fn size(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        for r in batch.iter() {
            check_range(self, "read", r.offset, r.buf.len())?;
        }
        let mut moved: Vec<Read<'_>> =
            batch.iter_mut().map(|r| Read { offset: r.offset + self.start, buf: r.buf }).collect();
        self.inner.read_batch(&mut moved)
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        for w in batch {
            check_range(self, "write", w.offset, w.buf.len())?;
        }
        let moved: Vec<Write<'_>> =
            batch.iter().map(|w| Write { offset: w.offset + self.start, buf: w.buf }).collect();
        self.inner.write_batch(&moved)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn write_durable(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(self, "write", offset, buf.len())?;
        self.inner.write_durable(offset + self.start, buf)
    }
}

/// Writes a new table over whatever the device held. Returns what [`list`] will find.
pub fn create(dev: &dyn BlockDevice, disk_guid: [u8; 16], parts: &[PartSpec]) -> Result<Vec<Partition>> {
    let err = |part: usize, reason: &str| LunError::Partition {
        name: dev.name().to_owned(),
        part: part as u32,
        reason: reason.to_owned(),
    };
    if parts.len() > ENTRIES {
        return Err(err(parts.len(), "too many partitions"));
    }
    let sector = dev.sector_size() as usize;
    let lbas = dev.size() / sector as u64;
    let table_lbas = ((ENTRIES * ENTRY_SIZE) / sector) as u64;
    let align = ALIGN_BYTES / sector as u64;
    // MBR, header and entries in front; entries and header behind.
    let first_usable = 2 + table_lbas;
    let Some(last_usable) = lbas.checked_sub(table_lbas + 2).filter(|&l| l > first_usable.max(align)) else {
        return Err(err(0, "the device is too small for a partition table"));
    };
    let mut entries = vec![0u8; ENTRIES * ENTRY_SIZE];
    let mut made = Vec::new();
    let mut at = align.max(first_usable.next_multiple_of(align));
    for (i, spec) in parts.iter().enumerate() {
        let number = i + 1;
        let end = match spec.size {
            None if number == parts.len() => (last_usable + 1) / align * align,
            None => return Err(err(number, "only the last partition may take the rest")),
            Some(bytes) => at.saturating_add((bytes / sector as u64).next_multiple_of(align)),
        };
        if end <= at || end > last_usable + 1 {
            return Err(err(number, "it does not fit"));
        }
        let units: Vec<u16> = spec.name.encode_utf16().collect();
        if units.len() > 36 {
            return Err(err(number, "its name is longer than 36 characters"));
        }
        let e = &mut entries[i * ENTRY_SIZE..(i + 1) * ENTRY_SIZE];
        e[..16].copy_from_slice(&spec.type_guid);
        e[16..32].copy_from_slice(&spec.guid);
        put64(e, 32, at);
        put64(e, 40, end - 1);
        for (u, out) in units.iter().zip(e[56..].chunks_mut(2)) {
            out.copy_from_slice(&u.to_le_bytes());
        }
        made.push(Partition {
            number: number as u32,
            start: at * sector as u64,
            len: (end - at) * sector as u64,
            name: spec.name.clone(),
            type_guid: spec.type_guid,
        });
        at = end;
    }
    let header = |own: u64, other: u64, table: u64| {
        let mut h = vec![0u8; sector];
        h[..8].copy_from_slice(SIGNATURE);
        put32(&mut h, 8, REVISION);
        put32(&mut h, 12, HEADER_SIZE as u32);
        put64(&mut h, 24, own);
        put64(&mut h, 32, other);
        put64(&mut h, 40, first_usable);
        put64(&mut h, 48, last_usable);
        h[56..72].copy_from_slice(&disk_guid);
        put64(&mut h, 72, table);
        put32(&mut h, 80, ENTRIES as u32);
        put32(&mut h, 84, ENTRY_SIZE as u32);
        put32(&mut h, 88, crc32(&entries));
        let crc = crc32(&h[..HEADER_SIZE]);
        put32(&mut h, 16, crc);
        h
    };
    let backup_table = lbas - 1 - table_lbas;
    let (primary, backup) = (header(1, lbas - 1, 2), header(lbas - 1, 1, backup_table));
    let mut mbr = vec![0u8; sector];
    // One entry of type 0xEE over the whole disk, from block 1, with the conventional CHS values.
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0, 0, 0, 0, 0]);
    put32(&mut mbr, 458, u32::try_from(lbas - 1).unwrap_or(u32::MAX));
    mbr[510..512].copy_from_slice(&[0x55, 0xAA]);
    let s = sector as u64;
    dev.write_batch(&[
        Write { offset: backup_table * s, buf: &entries },
        Write { offset: (lbas - 1) * s, buf: &backup },
        Write { offset: 2 * s, buf: &entries },
        Write { offset: s, buf: &primary },
        Write { offset: 0, buf: &mbr },
    ])?;
    dev.flush()?;
    Ok(made)
}

/// [`Part::open`] behind the shared pointer that everyone uses.
pub fn open_part(inner: Lun, number: u32, name: &str) -> Result<Lun> {
    Ok(Arc::new(Part::open(inner, number, name)?))
}

#[cfg(test)]
mod tests;
