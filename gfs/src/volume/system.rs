//! Finding and reading the system inodes at mount, straight from the device.
//!
//! Nothing here is cached: it runs before there is a cache, under the glocks that the mount holds meanwhile. Every number is
//! bounded before it is used; a wrong one names its block.

use crate::disk::Disk;
use crate::journal::log::JournalMap;
use crate::ondisk::dinode::{Dinode, S_IFDIR, S_IFMT};
use crate::ondisk::dirent::Records;
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::leaf::Leaf;
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::{pointer_at, u64_at};
use crate::{BlockNo, Error, InodeNo, JournalId, Result};
use lun::aligned::AlignedBuf;
use std::collections::{BTreeMap, BTreeSet};

const MIN_JOURNAL: u64 = 8 << 20;
const MAX_JOURNAL: u64 = 1 << 30;
/// More journals than any cluster has nodes for.
const MAX_JOURNALS: usize = 4096;
/// Blocks read in one batch.
const BATCH: usize = 256;
/// Largest system file that is read whole (a rindex of more than 10^6 groups).
const MAX_FILE: u64 = 128 << 20;

pub(crate) struct Journal {
    pub(crate) jid: JournalId,
    pub(crate) dinode: BlockNo,
    pub(crate) statfs_change: BlockNo,
    pub(crate) quota_change: BlockNo,
}

pub(crate) struct SystemInodes {
    pub(crate) jindex: BlockNo,
    pub(crate) per_node: BlockNo,
    pub(crate) statfs: BlockNo,
    pub(crate) rindex: BlockNo,
    pub(crate) journals: Vec<Journal>,
}

pub(crate) struct SysReader<'a>(pub(crate) &'a Disk);

type Names = BTreeMap<Vec<u8>, InodeNo>;

impl SysReader<'_> {
    fn block(&self, block: BlockNo) -> Result<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(self.0.geometry().block_size as usize);
        self.0.read(block, &mut buf)?;
        Ok(buf)
    }

    /// A dinode and its whole block.
    pub(crate) fn dinode(&self, addr: BlockNo) -> Result<(Dinode, AlignedBuf)> {
        let buf = self.block(addr)?;
        let di = Dinode::decode_at(&buf, &self.0.geometry(), addr).map_err(|e| e.at(addr))?;
        Ok((di, buf))
    }

    fn expect(b: &[u8], block: BlockNo, ty: MetaType) -> Result<()> {
        MetaHeader::expect(b, ty).map(drop).map_err(|e| e.at(block))
    }

    /// Addresses of the first `count` blocks of a file that is not stuffed; 0 is a hole.
    pub(crate) fn tree(&self, di: &Dinode, dinode: &[u8], count: u64) -> Result<Vec<u64>> {
        let geo = self.0.geometry();
        let addr = di.num.addr;
        if count > geo.tree_capacity(u32::from(di.height)) {
            return Err(Error::Corrupt {
                block: addr,
                what: format!("{count} blocks in a tree of height {}", di.height),
            });
        }
        let mut level: Vec<u64> = (0..geo.diptrs()).map(|i| pointer_at(dinode, Dinode::SIZE, i)).collect();
        for below in (0..di.height.saturating_sub(1)).rev() {
            // blocks that one pointer of this level covers, so that only those needed are read
            let covers = (0..below).fold(geo.inptrs() as u64, |n, _| n.saturating_mul(geo.inptrs() as u64));
            level.truncate(usize::try_from(count.div_ceil(covers)).unwrap_or(usize::MAX));
            let mut next = Vec::with_capacity(level.len() * geo.inptrs());
            for chunk in level.chunks(BATCH) {
                let mut bufs: Vec<AlignedBuf> =
                    chunk.iter().map(|_| AlignedBuf::zeroed(geo.block_size as usize)).collect();
                let mut runs: Vec<(BlockNo, &mut [u8])> = Vec::with_capacity(chunk.len());
                for (&b, buf) in chunk.iter().zip(&mut bufs) {
                    if b != 0 {
                        runs.push((BlockNo(b), &mut **buf));
                    }
                }
                self.0.read_blocks(&mut runs)?;
                for (&b, buf) in chunk.iter().zip(&bufs) {
                    if b != 0 {
                        Self::expect(buf, BlockNo(b), MetaType::Indirect)?;
                    }
                    next.extend((0..geo.inptrs()).map(|i| pointer_at(buf, MetaHeader::SIZE, i)));
                }
            }
            level = next;
        }
        level.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        Ok(level)
    }

    /// Whole contents of a small file (or of a directory's hash table).
    pub(crate) fn contents(&self, addr: BlockNo) -> Result<Vec<u8>> {
        let (di, buf) = self.dinode(addr)?;
        self.contents_of(&di, &buf)
    }

    fn contents_of(&self, di: &Dinode, dinode: &[u8]) -> Result<Vec<u8>> {
        let geo = self.0.geometry();
        let size = di.size as usize;
        if di.is_stuffed() {
            return Ok(dinode[Dinode::SIZE..Dinode::SIZE + size].to_vec());
        }
        if di.size > MAX_FILE {
            return Err(Error::Corrupt { block: di.num.addr, what: format!("system file of {size} bytes") });
        }
        let header = if di.is_dir() { MetaHeader::SIZE } else { 0 };
        let per = geo.block_size as usize - header;
        let mut out = Vec::with_capacity(size);
        for b in self.tree(di, dinode, size.div_ceil(per) as u64)? {
            let n = per.min(size - out.len());
            if b == 0 {
                out.resize(out.len() + n, 0);
                continue;
            }
            let buf = self.block(BlockNo(b))?;
            if header > 0 {
                Self::expect(&buf, BlockNo(b), MetaType::JournaledData)?;
            }
            out.extend_from_slice(&buf[header..header + n]);
        }
        Ok(out)
    }

    /// All entries of a directory.
    pub(crate) fn directory(&self, addr: BlockNo) -> Result<Names> {
        let (di, buf) = self.dinode(addr)?;
        if di.mode & S_IFMT != S_IFDIR {
            return Err(Error::Corrupt {
                block: addr,
                what: "system directory is not a directory".to_owned(),
            });
        }
        let mut names = Names::new();
        let mut take = |block: BlockNo, b: &[u8], start: usize| -> Result<()> {
            for record in Records::new(b, start) {
                let record = record.map_err(|e| e.at(block))?;
                if !record.head.is_empty() {
                    names.insert(record.name.to_vec(), record.head.num);
                }
            }
            Ok(())
        };
        if !di.is_exhash() {
            take(addr, &buf, Dinode::SIZE)?;
            return Ok(names);
        }
        let table = self.contents_of(&di, &buf)?;
        let mut leaves: Vec<u64> = (0..table.len() / 8).map(|i| u64_at(&table, 8 * i)).collect();
        leaves.dedup();
        // a chain that returns to itself must end
        let mut seen = BTreeSet::new();
        for first in leaves {
            let mut at = first;
            while at != 0 {
                if !seen.insert(at) {
                    let what = format!("directory leaf {at} stands in two places");
                    return Err(Error::Corrupt { block: addr, what });
                }
                let leaf = self.block(BlockNo(at))?;
                let head = Leaf::decode(&leaf).map_err(|e| e.at(BlockNo(at)))?;
                take(BlockNo(at), &leaf, Leaf::SIZE)?;
                at = head.next;
            }
        }
        Ok(names)
    }

    /// Every system inode of the volume, by name from the master directory.
    pub(crate) fn system_inodes(&self, master: InodeNo) -> Result<SystemInodes> {
        let names = self.directory(master.addr)?;
        let find = |names: &Names, dir: BlockNo, name: &str| {
            names.get(name.as_bytes()).map(|n| n.addr).ok_or_else(|| Error::Corrupt {
                block: dir,
                what: format!("the system directory has no entry {name}: run fsck.gfs2"),
            })
        };
        let jindex = find(&names, master.addr, "jindex")?;
        let per_node = find(&names, master.addr, "per_node")?;
        let (jnames, pnames) = (self.directory(jindex)?, self.directory(per_node)?);
        let mut journals = Vec::new();
        while let Some(dinode) = jnames.get(format!("journal{}", journals.len()).as_bytes()) {
            let j = journals.len();
            if j == MAX_JOURNALS {
                return Err(Error::Corrupt { block: jindex, what: format!("more than {j} journals") });
            }
            journals.push(Journal {
                jid: JournalId(j as u32),
                dinode: dinode.addr,
                statfs_change: find(&pnames, per_node, &format!("statfs_change{j}"))?,
                quota_change: find(&pnames, per_node, &format!("quota_change{j}"))?,
            });
        }
        if journals.is_empty() {
            return Err(Error::Corrupt { block: jindex, what: "the volume has no journal".to_owned() });
        }
        Ok(SystemInodes {
            jindex,
            per_node,
            statfs: find(&names, master.addr, "statfs")?,
            rindex: find(&names, master.addr, "rindex")?,
            journals,
        })
    }

    /// Maps a journal. Refuses sizes and holes that a journal cannot have.
    pub(crate) fn journal(&self, journal: &Journal) -> Result<Extents> {
        let (di, buf) = self.dinode(journal.dinode)?;
        let bad = |what: String| Error::Journal { jid: journal.jid, at: 0, what };
        let bsize = u64::from(self.0.geometry().block_size);
        if !(MIN_JOURNAL..=MAX_JOURNAL).contains(&di.size)
            || !di.size.is_multiple_of(bsize)
            || di.is_stuffed()
        {
            return Err(bad(format!("a journal of {} bytes in a tree of height {}", di.size, di.height)));
        }
        let blocks = self.tree(&di, &buf, di.size / bsize)?;
        if let Some(hole) = blocks.iter().position(|&b| b == 0) {
            return Err(bad(format!("journal block {hole} is a hole")));
        }
        let mut extents: Vec<(u32, u64)> = Vec::new();
        for (i, &b) in blocks.iter().enumerate() {
            if b >= self.0.blocks() {
                return Err(bad(format!("journal block {i} lies at {b}, beyond the device")));
            }
            let follows = extents.last().is_some_and(|&(at, start)| start + (i as u64 - u64::from(at)) == b);
            if !follows {
                extents.push((i as u32, b));
            }
        }
        Ok(Extents { extents, len: blocks.len() as u32 })
    }

    /// The resource group index, checked: entries valid, ascending, without overlap.
    pub(crate) fn rindex(&self, addr: BlockNo) -> Result<Vec<RindexEntry>> {
        let bytes = self.contents(addr)?;
        let bad = |what: String| Error::Corrupt { block: addr, what };
        if bytes.is_empty() || !bytes.len().is_multiple_of(RindexEntry::SIZE) {
            return Err(bad(format!("rindex of {} bytes", bytes.len())));
        }
        let mut entries: Vec<RindexEntry> = Vec::with_capacity(bytes.len() / RindexEntry::SIZE);
        for chunk in bytes.chunks(RindexEntry::SIZE) {
            let e = RindexEntry::decode(chunk).map_err(|e| e.at(addr))?;
            if e.end() > self.0.blocks() {
                return Err(bad(format!(
                    "rindex entry: resource group {} ends at block {}, the device at {}: the device or partition is smaller than the volume",
                    e.addr,
                    e.end(),
                    self.0.blocks()
                )));
            }
            e.validate(&self.0.geometry(), self.0.blocks()).map_err(|e| e.at(addr))?;
            if let Some(before) = entries.last()
                && e.addr < before.end()
            {
                return Err(bad(format!("resource group {} overlaps the one at {}", e.addr, before.addr)));
            }
            entries.push(e);
        }
        Ok(entries)
    }
}

/// The ring of a journal on the device.
#[derive(Clone, Debug)]
pub(crate) struct Extents {
    /// (first journal block, its device block), ascending.
    extents: Vec<(u32, u64)>,
    len: u32,
}

impl JournalMap for Extents {
    fn len(&self) -> u32 {
        self.len
    }

    fn block(&self, at: u32) -> BlockNo {
        assert!(at < self.len, "journal block {at} of {}", self.len);
        let i = self.extents.partition_point(|&(first, _)| first <= at) - 1;
        let (first, start) = self.extents[i];
        BlockNo(start + u64::from(at - first))
    }
}
