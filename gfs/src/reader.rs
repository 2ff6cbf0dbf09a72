//! Reading a volume that nobody has mounted: no glocks, no cache, no writes but replay.
//!
//! For the checker, for tools, and for tests that compare what different writers and different replays made of a volume.
//! Every loop is bounded by what the device can hold; a fault names its block.

use crate::disk::Disk;
use crate::geometry::Geometry;
use crate::journal::log::JournalMap;
use crate::journal::replay::{self, Replayed};
use crate::ondisk::FormatError;
use crate::ondisk::dinode::{Dinode, S_IFMT, S_IFREG, Time};
use crate::ondisk::ea::EaRecords;
use crate::ondisk::header::{MetaHeader, MetaType, has_magic};
use crate::ondisk::log::LogHeader;
use crate::ondisk::pointer_at;
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::sb::{FORMAT_1801, FORMAT_1802, MULTIHOST_FORMAT, SB_OFFSET, Superblock};
use crate::ondisk::statfs::StatfsChange;
use crate::volume::system::{SysReader, SystemInodes};
use crate::{BlockNo, Error, InodeNo, JournalId, Result};
use lun::Lun;
use lun::aligned::AlignedBuf;
use std::collections::{BTreeMap, BTreeSet};

/// Longest file that is read whole, in blocks.
const MAX_FILE_BLOCKS: u64 = 1 << 24;
/// Deepest directory that a walk follows.
const MAX_DEPTH: usize = 4096;

/// Reads the superblock from a LUN. The error names the LUN, tells what is there instead, and the cure.
pub fn read_superblock(lun: &Lun) -> Result<Superblock> {
    let name = lun.name();
    let refuse = |why: String| Err(Error::Mount(format!("{name}: {why}")));
    let sector = lun.sector_size() as usize;
    let mut buf = AlignedBuf::zeroed(Superblock::SIZE.next_multiple_of(sector));
    if lun.size() < SB_OFFSET + buf.len() as u64 {
        let size = lun.size();
        return refuse(format!(
            "only {size} bytes, too small for a GFS2 volume; name another device, or a partition with #part=N"
        ));
    }
    lun.read_at(SB_OFFSET, &mut buf)?;
    if !has_magic(&buf) {
        let there = lun::probe::probe(lun)?.map_or(String::new(), |c| format!(", but {c}"));
        return refuse(format!(
            "not a GFS2 volume: no superblock at byte {SB_OFFSET}{there}; name the right device, or the partition with #part=N"
        ));
    }
    let sb = match Superblock::decode(&buf) {
        Ok(sb) => sb,
        Err(FormatError::Field { field: "sb_fs_format" | "sb_multihost_format", value, .. }) => {
            return refuse(format!(
                "GFS2 format {value} is not supported ({FORMAT_1801} and {FORMAT_1802} with multi-host format {MULTIHOST_FORMAT} are): mount it where it was made, or mend the superblock with fsck.gfs2 if it is damaged"
            ));
        }
        Err(FormatError::Field { field: "sb_bsize", value, .. }) => {
            return refuse(format!(
                "blocks of {value} bytes are not supported (512, 1024, 2048 and 4096 are); mend the superblock with fsck.gfs2 if it is damaged"
            ));
        }
        Err(e) => return refuse(format!("the superblock is damaged ({e}); fsck.gfs2 mends it")),
    };
    if sb.block_size < lun.sector_size() {
        let bsize = sb.block_size;
        return refuse(format!(
            "blocks of {bsize} bytes on a device with sectors of {sector} cannot be written safely; copy it to a device with sectors of {bsize} or less"
        ));
    }
    Ok(sb)
}

/// A volume, opened for reading.
pub struct Reader {
    disk: Disk,
    sb: Superblock,
}

/// One inode in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Path from the root, without a leading slash; empty for the root itself. Bytes, as names are.
    pub path: Vec<u8>,
    pub dinode: Dinode,
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// `EATYPE_*` of [`crate::ondisk::ea`].
    pub ty: u8,
    pub name: Vec<u8>,
    pub value: Vec<u8>,
}

impl Reader {
    pub fn open(lun: &Lun) -> Result<Self> {
        let sb = read_superblock(lun)?;
        let geo = Geometry::new(sb.block_size).map_err(|e| e.at(BlockNo(0)))?;
        let disk = Disk::new(lun.clone(), geo, lun.name(), false);
        Ok(Self { disk, sb })
    }

    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    pub fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.disk
    }

    fn sys(&self) -> SysReader<'_> {
        SysReader(&self.disk)
    }

    fn system(&self) -> Result<SystemInodes> {
        self.sys().system_inodes(self.sb.master)
    }

    /// Number of journals.
    pub fn journals(&self) -> Result<u32> {
        Ok(self.system()?.journals.len() as u32)
    }

    /// Resource group index.
    pub fn rindex(&self) -> Result<Vec<RindexEntry>> {
        self.sys().rindex(self.system()?.rindex)
    }

    fn stuffed_statfs(&self, addr: BlockNo) -> Result<StatfsChange> {
        let (_, buf) = self.sys().dinode(addr)?;
        StatfsChange::decode(&buf[Dinode::SIZE..]).map_err(|e| e.at(addr))
    }

    /// Master totals, and each node's unsynced deltas.
    pub fn statfs(&self) -> Result<(StatfsChange, Vec<StatfsChange>)> {
        let system = self.system()?;
        let changes = system.journals.iter().map(|j| self.stuffed_statfs(j.statfs_change));
        Ok((self.stuffed_statfs(system.statfs)?, changes.collect::<Result<_>>()?))
    }

    /// Sums of the counters of all groups.
    pub fn rgrp_totals(&self) -> Result<StatfsChange> {
        let mut sums = StatfsChange::default();
        let mut buf = AlignedBuf::zeroed(self.geometry().block_size as usize);
        for e in self.rindex()? {
            self.disk.read(BlockNo(e.addr), &mut buf)?;
            let h = crate::ondisk::rgrp::Rgrp::decode(&buf).map_err(|err| err.at(BlockNo(e.addr)))?;
            sums.total += i64::from(e.data);
            sums.free += i64::from(h.free);
            sums.dinodes += i64::from(h.dinodes);
        }
        Ok(sums)
    }

    /// Where a journal lies.
    pub fn journal_map(&self, jid: JournalId) -> Result<Box<dyn JournalMap>> {
        let system = self.system()?;
        let journal = system.journals.get(jid.0 as usize).ok_or_else(|| Error::Journal {
            jid,
            at: 0,
            what: "there is no such journal".to_owned(),
        })?;
        Ok(Box::new(self.sys().journal(journal)?))
    }

    /// Head of a journal's log.
    pub fn journal_head(&self, jid: JournalId) -> Result<LogHeader> {
        replay::find_head(&self.disk, jid, &*self.journal_map(jid)?)
    }

    /// Replays every dirty journal, folds its totals and marks it clean. Nobody may have the volume mounted. `None` stands for a
    /// journal that was clean.
    pub fn replay_all(&self, now: Time) -> Result<Vec<Option<Replayed>>> {
        let system = self.system()?;
        let mut done = Vec::new();
        for j in &system.journals {
            let map = self.sys().journal(j)?;
            let head = replay::find_head(&self.disk, j.jid, &map)?;
            if head.is_clean() {
                done.push(None);
                continue;
            }
            done.push(Some(replay::replay(&self.disk, j.jid, &map, &head)?));
            replay::fold_statfs(&self.disk, &head, system.statfs, j.statfs_change)?;
            replay::write_clean_header(&self.disk, &map, &head, j.dinode, j.jid, now)?;
        }
        Ok(done)
    }

    /// One dinode.
    pub fn dinode(&self, addr: BlockNo) -> Result<Dinode> {
        Ok(self.sys().dinode(addr)?.0)
    }

    /// Entries of a directory, `.` and `..` included, by name.
    pub fn entries(&self, dir: BlockNo) -> Result<BTreeMap<Vec<u8>, InodeNo>> {
        self.sys().directory(dir)
    }

    /// The inode at a path from the root (slashes between names).
    pub fn lookup(&self, path: &str) -> Result<InodeNo> {
        let mut at = self.sb.root;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            at = *self.entries(at.addr)?.get(name.as_bytes()).ok_or(Error::Errno(libc::ENOENT))?;
        }
        Ok(at)
    }

    /// Contents of a regular file, or target of a symbolic link, handed on piece by piece.
    pub fn read(&self, addr: BlockNo, take: &mut dyn FnMut(&[u8])) -> Result<()> {
        let (di, buf) = self.sys().dinode(addr)?;
        if di.is_stuffed() {
            take(&buf[Dinode::SIZE..Dinode::SIZE + di.size as usize]);
            return Ok(());
        }
        let bsize = u64::from(self.geometry().block_size);
        let mut block = AlignedBuf::zeroed(bsize as usize);
        let mut left = di.size;
        for b in self.blocks_of(&di, &buf)? {
            match b {
                0 => block.fill(0),
                b => self.disk.read(BlockNo(b), &mut block)?,
            }
            let n = left.min(bsize);
            take(&block[..n as usize]);
            left -= n;
        }
        Ok(())
    }

    /// Where the contents lie, block by block from the first; 0 is a hole. Empty when they stand in the dinode.
    pub fn file_blocks(&self, addr: BlockNo) -> Result<Vec<u64>> {
        let (di, buf) = self.sys().dinode(addr)?;
        if di.is_stuffed() {
            return Ok(Vec::new());
        }
        self.blocks_of(&di, &buf)
    }

    /// A file may be longer than its tree reaches: the rest is a hole.
    fn blocks_of(&self, di: &Dinode, buf: &[u8]) -> Result<Vec<u64>> {
        let count = di.size.div_ceil(u64::from(self.geometry().block_size));
        if count > MAX_FILE_BLOCKS {
            return Err(Error::Corrupt { block: di.num.addr, what: format!("a file of {} bytes", di.size) });
        }
        let reach = count.min(self.geometry().tree_capacity(u32::from(di.height)));
        let mut blocks = self.sys().tree(di, buf, reach)?;
        blocks.resize(count as usize, 0);
        Ok(blocks)
    }

    /// Whole contents.
    pub fn read_all(&self, addr: BlockNo) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.read(addr, &mut |piece| out.extend_from_slice(piece))?;
        Ok(out)
    }

    /// Extended attributes, sorted.
    pub fn xattrs(&self, addr: BlockNo) -> Result<Vec<Xattr>> {
        let di = self.dinode(addr)?;
        let geo = self.geometry();
        let mut out = Vec::new();
        if di.eattr == 0 {
            return Ok(out);
        }
        let mut buf = AlignedBuf::zeroed(geo.block_size as usize);
        let read = |b: u64, ty: MetaType, buf: &mut AlignedBuf| -> Result<()> {
            self.disk.read(BlockNo(b), buf)?;
            MetaHeader::expect(buf, ty).map(drop).map_err(|e| e.at(BlockNo(b)))
        };
        let blocks: Vec<u64> = if di.flags & crate::ondisk::dinode::DIF_EA_INDIRECT != 0 {
            read(di.eattr, MetaType::Indirect, &mut buf)?;
            (0..geo.inptrs()).map(|i| pointer_at(&buf, MetaHeader::SIZE, i)).take_while(|&b| b != 0).collect()
        } else {
            vec![di.eattr]
        };
        let mut data = AlignedBuf::zeroed(geo.block_size as usize);
        for b in blocks {
            read(b, MetaType::ExtAttr, &mut buf)?;
            for record in EaRecords::new(&buf) {
                let r = record.map_err(|e| e.at(BlockNo(b)))?;
                if r.head.is_unused() {
                    continue;
                }
                let mut value = Vec::new();
                if r.head.num_ptrs == 0 {
                    value.extend_from_slice(r.body);
                }
                for p in r.pointers() {
                    read(p, MetaType::ExtAttrData, &mut data)?;
                    value.extend_from_slice(&data[MetaHeader::SIZE..]);
                }
                value.truncate(r.head.data_len as usize);
                out.push(Xattr { ty: r.head.ty, name: r.name.to_vec(), value });
            }
        }
        out.sort();
        Ok(out)
    }

    /// Every inode below the root, in order of paths (a file of several names appears once for each). The root comes first.
    pub fn tree(&self) -> Result<Vec<Node>> {
        let mut nodes = Vec::new();
        let mut seen = BTreeSet::new();
        let root = self.dinode(self.sb.root.addr)?;
        nodes.push(Node { path: Vec::new(), dinode: root });
        self.subtree(self.sb.root.addr, &[], 0, &mut seen, &mut nodes)?;
        nodes.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(nodes)
    }

    fn subtree(
        &self,
        dir: BlockNo,
        prefix: &[u8],
        depth: usize,
        seen: &mut BTreeSet<BlockNo>,
        nodes: &mut Vec<Node>,
    ) -> Result<()> {
        if !seen.insert(dir) || depth > MAX_DEPTH {
            return Err(Error::Corrupt { block: dir, what: "a directory that is reached twice".to_owned() });
        }
        for (name, num) in self.entries(dir)? {
            if name == b"." || name == b".." {
                continue;
            }
            let dinode = self.dinode(num.addr)?;
            let mut path = prefix.to_vec();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            let is_dir = dinode.is_dir();
            nodes.push(Node { path: path.clone(), dinode });
            if is_dir {
                self.subtree(num.addr, &path, depth + 1, seen, nodes)?;
            }
        }
        Ok(())
    }

    /// One line for each inode of the tree: what two correct readers of a volume must agree on. `digest` condenses contents.
    ///
    /// `path/ dir PERM NLINK ENTRIES`, `path file PERM NLINK SIZE DIGEST`, `path other MODE target` or `(major, minor)`.
    pub fn listing(&self, digest: &mut dyn FnMut(&Self, BlockNo) -> Result<String>) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for node in self.tree()? {
            if node.path.is_empty() {
                continue;
            }
            let (di, path) = (&node.dinode, String::from_utf8_lossy(&node.path).into_owned());
            let perm = di.mode & 0o7777;
            let addr = di.num.addr;
            lines.push(match di.mode & S_IFMT {
                _ if di.is_dir() => format!("{path}/ dir {perm:o} {} {}", di.nlink, di.entries),
                S_IFREG => {
                    let sum = digest(self, addr)?;
                    format!("{path} file {perm:o} {} {} {sum}", di.nlink, di.size)
                }
                _ if di.is_symlink() => {
                    let target = String::from_utf8_lossy(&self.read_all(addr)?).into_owned();
                    format!("{path} other {:o} {target}", di.mode)
                }
                _ => format!("{path} other {:o} ({}, {})", di.mode, di.major, di.minor),
            });
        }
        Ok(lines)
    }
}
