//! The system inodes of a new volume, built in memory.
//!
//! Groups are filled from their first block, so what a group's bitmap holds is a list of runs. Directories take entries by the
//! ordinary insert rules (first fit, hash table, split, doubling), but a hash table stays in memory until the end.

use super::MkfsOptions;
use super::plan::Plan;
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::checksum::disk_hash;
use crate::ondisk::dinode::{DIF_EXHASH, DIF_JDATA, DIF_SYSTEM, Dinode, S_IFDIR, S_IFREG, Time};
use crate::ondisk::dirent::{
    Dirent, Record, Records, clear_target, put_rec_len, put_record, put_sentinel, rec_min,
};
use crate::ondisk::header::{FORMAT_DIRENT, FORMAT_QUOTA, FORMAT_RINDEX, MetaHeader, MetaType};
use crate::ondisk::leaf::Leaf;
use crate::ondisk::quota::QuotaEntry;
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::statfs::{InumRange, StatfsChange};
use crate::ondisk::{pointer_at, put_pointer, put_u64};
use crate::{BlockNo, InodeNo};
use std::collections::BTreeMap;

/// Allocated blocks of a group, from its first data block on.
#[derive(Default)]
pub(super) struct Usage {
    pub(super) runs: Vec<(u32, BlockState)>,
    pub(super) used: u32,
    pub(super) dinodes: u32,
}

impl Usage {
    fn push(&mut self, count: u32, state: BlockState) {
        match self.runs.last_mut() {
            Some((n, last)) if *last == state => *n += count,
            _ => self.runs.push((count, state)),
        }
        self.used += count;
        if state == BlockState::Dinode {
            self.dinodes += count;
        }
    }
}

pub(super) struct Builder<'a> {
    plan: &'a Plan,
    quota_change_blocks: u64,
    time: Time,
    pub(super) usage: Vec<Usage>,
    /// First group that may have a free block.
    cursor: usize,
    next_formal: u64,
    /// All blocks except those of the logs.
    pub(super) blocks: BTreeMap<u64, Vec<u8>>,
    inodes: BTreeMap<u64, Dinode>,
    tables: BTreeMap<u64, Vec<u64>>,
    pub(super) master: InodeNo,
    pub(super) root: InodeNo,
    /// User and group of the root directory.
    root_owner: (u32, u32),
}

/// What the blocks of a file begin with.
#[derive(Clone, Copy)]
enum Content {
    Plain,
    Typed(MetaType),
}

impl<'a> Builder<'a> {
    pub(super) fn new(plan: &'a Plan, options: &MkfsOptions, time: i64) -> Self {
        Self {
            plan,
            quota_change_blocks: (u64::from(options.quota_change_mb) << 20) >> plan.geo.shift,
            time: Time { sec: time, nsec: 0 },
            usage: plan.groups.iter().map(|_| Usage::default()).collect(),
            cursor: 0,
            next_formal: 1,
            blocks: BTreeMap::new(),
            inodes: BTreeMap::new(),
            tables: BTreeMap::new(),
            master: InodeNo::default(),
            root: InodeNo::default(),
            root_owner: options.root_owner,
        }
    }

    pub(super) fn build(mut self) -> Self {
        let journals: Vec<InodeNo> = (0..self.plan.journals).map(|jid| self.journal(jid)).collect();
        self.master = self.directory(None, "", 0o755, DIF_SYSTEM);
        let master = self.master;
        let jindex = self.directory(Some(master), "jindex", 0o700, DIF_SYSTEM);
        for (jid, num) in journals.iter().enumerate() {
            self.dir_add(jindex.addr.0, &format!("journal{jid}"), *num, (S_IFREG >> 12) as u16);
        }
        let per_node = self.directory(Some(master), "per_node", 0o700, DIF_SYSTEM);
        for jid in 0..self.plan.journals {
            let f = self.file(per_node, &format!("inum_range{jid}"), DIF_SYSTEM | DIF_JDATA);
            self.stuffed(f, InumRange::SIZE);
            let f = self.file(per_node, &format!("statfs_change{jid}"), DIF_SYSTEM | DIF_JDATA);
            self.stuffed(f, StatfsChange::SIZE);
            let f = self.file(per_node, &format!("quota_change{jid}"), DIF_SYSTEM);
            self.quota_change(f);
        }
        let inum = self.file(master, "inum", DIF_SYSTEM | DIF_JDATA);
        let statfs = self.file(master, "statfs", DIF_SYSTEM | DIF_JDATA);
        let rindex = self.file(master, "rindex", DIF_SYSTEM | DIF_JDATA);
        self.rindex(rindex);
        let quota = self.file(master, "quota", DIF_SYSTEM | DIF_JDATA);
        self.quota(quota);
        self.root = self.directory(None, "", 0o755, 0);
        let (root, owner) = (self.root.addr.0, self.root_owner);
        (self.inode(root).uid, self.inode(root).gid) = owner;

        // from here on nothing is allocated but what `finish_tables` needs; the totals come last
        self.finish_tables();
        let next = self.next_formal;
        put_u64(&mut self.stuffed(inum, 8)[Dinode::SIZE..], 0, next);
        let totals = self.totals();
        totals.encode(&mut self.stuffed(statfs, StatfsChange::SIZE)[Dinode::SIZE..]);
        for (addr, di) in &self.inodes {
            di.encode(self.blocks.get_mut(addr).expect("every inode has its block"));
        }
        self
    }

    fn totals(&self) -> StatfsChange {
        let mut t = StatfsChange::default();
        for (group, usage) in self.plan.groups.iter().zip(&self.usage) {
            t.total += i64::from(group.data);
            t.free += i64::from(group.data - usage.used);
            t.dinodes += i64::from(usage.dinodes);
        }
        t
    }

    fn new_block(&mut self, addr: u64) -> &mut Vec<u8> {
        let bsize = self.plan.geo.block_size as usize;
        self.blocks.entry(addr).insert_entry(vec![0; bsize]).into_mut()
    }

    fn alloc(&mut self, state: BlockState) -> u64 {
        while self.usage[self.cursor].used == self.plan.groups[self.cursor].data {
            self.cursor += 1; // the plan has checked that there is room
        }
        let usage = &mut self.usage[self.cursor];
        let addr = self.plan.groups[self.cursor].data0 + u64::from(usage.used);
        usage.push(1, state);
        addr
    }

    fn new_inode(&mut self, addr: u64, mode: u32, flags: u32) -> InodeNo {
        let num = InodeNo { addr: BlockNo(addr), formal: self.next_formal };
        self.next_formal += 1;
        self.new_block(addr);
        let t = self.time;
        let di = Dinode {
            num,
            mode,
            nlink: 1,
            blocks: 1,
            atime: t,
            mtime: t,
            ctime: t,
            goal_meta: addr,
            goal_data: addr,
            flags,
            ..Dinode::default()
        };
        self.inodes.insert(addr, di);
        num
    }

    fn inode(&mut self, addr: u64) -> &mut Dinode {
        self.inodes.get_mut(&addr).expect("built before")
    }

    /// One contiguous file at the start of its group: dinode, indirect blocks level by level, log blocks.
    fn journal(&mut self, jid: u32) -> InodeNo {
        let plan = self.plan;
        let (geo, addr) = (plan.geo, plan.journal_dinode(jid));
        let usage = &mut self.usage[jid as usize];
        usage.push(1, BlockState::Dinode);
        usage.push(plan.jfile as u32 - 1, BlockState::Used);
        let num = self.new_inode(addr, S_IFREG | 0o600, DIF_SYSTEM);
        let mut levels = vec![u64::from(plan.jblks)];
        while *levels.last().unwrap_or(&0) > geo.diptrs() as u64 {
            levels.push(levels[levels.len() - 1].div_ceil(geo.inptrs() as u64));
        }
        levels.reverse();
        // the blocks of one level point at the blocks of the next, which begins right behind it
        let (mut parents, mut per_parent, mut base) = (vec![addr], geo.diptrs(), Dinode::SIZE);
        let mut next = addr + 1;
        for (i, &count) in levels.iter().enumerate() {
            for k in 0..count {
                let parent = parents[(k / per_parent as u64) as usize];
                let block = self.blocks.get_mut(&parent).expect("the level above was built");
                put_pointer(block, base, (k % per_parent as u64) as usize, next + k);
            }
            if i + 1 < levels.len() {
                parents = (next..next + count).collect();
                for &p in &parents {
                    MetaHeader::new(MetaType::Indirect).encode(self.new_block(p));
                }
                (per_parent, base) = (geo.inptrs(), MetaHeader::SIZE);
            }
            next += count;
        }
        let last = next - 1;
        let di = self.inode(addr);
        di.height = levels.len() as u16;
        di.size = u64::from(plan.jblks) << geo.shift;
        di.blocks = plan.jfile;
        di.goal_data = last;
        di.goal_meta = last - u64::from(plan.jblks);
        num
    }

    fn directory(&mut self, parent: Option<InodeNo>, name: &str, mode: u32, flags: u32) -> InodeNo {
        let addr = self.alloc(BlockState::Dinode);
        let num = self.new_inode(addr, S_IFDIR | mode, flags | DIF_JDATA);
        if let Some(parent) = parent {
            self.dir_add(parent.addr.0, name, num, (S_IFDIR >> 12) as u16);
            self.inode(parent.addr.0).nlink += 1;
        }
        let size = self.plan.geo.stuffed();
        let di = self.inode(addr);
        di.nlink = 2;
        di.size = size as u64;
        di.payload_format = FORMAT_DIRENT;
        let block = self.blocks.get_mut(&addr).expect("just made");
        put_sentinel(block, Dinode::SIZE, size as u16);
        self.dir_add(addr, ".", num, (S_IFDIR >> 12) as u16);
        self.dir_add(addr, "..", parent.unwrap_or(num), (S_IFDIR >> 12) as u16);
        num
    }

    fn file(&mut self, parent: InodeNo, name: &str, flags: u32) -> InodeNo {
        let addr = self.alloc(BlockState::Dinode);
        let num = self.new_inode(addr, S_IFREG | 0o600, flags);
        self.dir_add(parent.addr.0, name, num, (S_IFREG >> 12) as u16);
        num
    }

    /// Give the file `size` bytes inside its dinode; returns the dinode's block.
    fn stuffed(&mut self, num: InodeNo, size: usize) -> &mut [u8] {
        self.inode(num.addr.0).size = size as u64;
        self.blocks.get_mut(&num.addr.0).expect("just made")
    }

    /// Block number `l` of the file, whose height is set: missing indirect blocks first, from the top, then itself.
    fn map(&mut self, addr: u64, l: u64, content: Content) -> u64 {
        let height = u32::from(self.inode(addr).height);
        let path = self.plan.geo.path(l, height).expect("the height fits the file");
        let (mut at, mut base) = (addr, Dinode::SIZE);
        for (level, &i) in path.iter().enumerate() {
            let mut next = pointer_at(&self.blocks[&at], base, i);
            if next == 0 {
                next = self.alloc(BlockState::Used);
                let leaf = level + 1 == path.len();
                let block = self.new_block(next);
                match (leaf, content) {
                    (true, Content::Plain) => {}
                    (true, Content::Typed(ty)) => MetaHeader::new(ty).encode(block),
                    (false, _) => MetaHeader::new(MetaType::Indirect).encode(block),
                }
                put_pointer(self.blocks.get_mut(&at).expect("walked through"), base, i, next);
                let di = self.inode(addr);
                di.blocks += 1;
                di.goal_meta = next;
            }
            (at, base) = (next, MetaHeader::SIZE);
        }
        at
    }

    fn quota_change(&mut self, num: InodeNo) {
        let (geo, n) = (self.plan.geo, self.quota_change_blocks);
        let di = self.inode(num.addr.0);
        // mkfs.gfs2 chooses the height for one block more than there are
        di.height = geo.height_for(n + 1) as u16;
        di.size = n << geo.shift;
        for l in 0..n {
            self.map(num.addr.0, l, Content::Typed(MetaType::QuotaChange));
        }
    }

    /// Bytes of a file that is stuffed while they fit.
    fn write_file(&mut self, num: InodeNo, bytes: &[u8]) {
        let geo = self.plan.geo;
        if bytes.len() <= geo.stuffed() {
            self.stuffed(num, bytes.len())[Dinode::SIZE..][..bytes.len()].copy_from_slice(bytes);
            return;
        }
        let bsize = geo.block_size as usize;
        let n = bytes.len().div_ceil(bsize) as u64;
        self.inode(num.addr.0).height = geo.height_for(n) as u16;
        self.inode(num.addr.0).size = bytes.len() as u64;
        for (l, chunk) in bytes.chunks(bsize).enumerate() {
            let at = self.map(num.addr.0, l as u64, Content::Plain);
            self.blocks.get_mut(&at).expect("just mapped")[..chunk.len()].copy_from_slice(chunk);
        }
    }

    fn rindex(&mut self, num: InodeNo) {
        // one empty slot behind the end, so that growing need not allocate for its first entry
        let mut bytes = vec![0; (self.plan.groups.len() + 1) * RindexEntry::SIZE];
        for (entry, slot) in self.plan.groups.iter().zip(bytes.chunks_mut(RindexEntry::SIZE)) {
            entry.encode(slot);
        }
        self.write_file(num, &bytes);
        let di = self.inode(num.addr.0);
        di.size -= RindexEntry::SIZE as u64;
        di.payload_format = FORMAT_RINDEX;
    }

    fn quota(&mut self, num: InodeNo) {
        let mut bytes = [0; 2 * QuotaEntry::SIZE];
        for slot in bytes.chunks_mut(QuotaEntry::SIZE) {
            QuotaEntry { value: 1, ..QuotaEntry::default() }.encode(slot);
        }
        self.write_file(num, &bytes);
        self.inode(num.addr.0).payload_format = FORMAT_QUOTA;
    }

    fn dir_add(&mut self, dir: u64, name: &str, num: InodeNo, ty: u16) {
        let hash = disk_hash(name.as_bytes());
        let head = Dirent { num, hash, ty, ..Dirent::default() };
        loop {
            let depth = u32::from(self.inode(dir).depth);
            if !self.inode(dir).is_exhash() {
                if place(self.blocks.get_mut(&dir).expect("a directory"), Dinode::SIZE, head, name.as_bytes())
                {
                    break;
                }
                self.make_exhash(dir);
                continue;
            }
            let index = (hash >> (32 - depth)) as usize;
            let leaf = self.tables[&dir][index];
            if self.leaf_add(leaf, head, name.as_bytes()) {
                break;
            }
            if u32::from(self.leaf(leaf).depth) < depth {
                self.split(dir, index);
            } else {
                self.double(dir);
            }
        }
        self.inode(dir).entries += 1;
    }

    fn leaf(&self, addr: u64) -> Leaf {
        Leaf::decode(&self.blocks[&addr]).expect("built here")
    }

    fn leaf_add(&mut self, addr: u64, head: Dirent, name: &[u8]) -> bool {
        let mut leaf = self.leaf(addr);
        let block = self.blocks.get_mut(&addr).expect("a leaf");
        let placed = place(block, Leaf::SIZE, head, name);
        if placed {
            leaf.entries += 1;
            leaf.encode(block);
        }
        placed
    }

    fn new_leaf(&mut self, dir: u64, depth: u16) -> u64 {
        let addr = self.alloc(BlockState::Used);
        let bsize = self.plan.geo.block_size as usize;
        let block = self.new_block(addr);
        Leaf { depth, inode: dir, ..Leaf::default() }.encode(block);
        put_sentinel(block, Leaf::SIZE, (bsize - Leaf::SIZE) as u16);
        let di = self.inode(dir);
        di.blocks += 1;
        di.goal_meta = addr;
        addr
    }

    fn make_exhash(&mut self, dir: u64) {
        let geo = self.plan.geo;
        let leaf = self.new_leaf(dir, 0);
        let entries = self.inode(dir).entries as u16;
        let payload = self.blocks[&dir][Dinode::SIZE..].to_vec();
        let last = records(&self.blocks[&dir], Dinode::SIZE).last().map(|r| (r.offset, r.head.rec_len));
        let block = self.blocks.get_mut(&leaf).expect("just made");
        Leaf { entries, inode: dir, ..Leaf::default() }.encode(block);
        block[Leaf::SIZE..Leaf::SIZE + payload.len()].copy_from_slice(&payload);
        // the last record now reaches the end of a block whose header is shorter
        if let Some((at, rec_len)) = last {
            let shift = Dinode::SIZE - Leaf::SIZE;
            put_rec_len(block, at - shift, rec_len + shift as u16);
        }
        self.blocks.get_mut(&dir).expect("a directory")[Dinode::SIZE..].fill(0);
        self.tables.insert(dir, vec![leaf; geo.new_hash_ptrs()]);
        let di = self.inode(dir);
        di.size = 8 * geo.new_hash_ptrs() as u64;
        di.depth = geo.new_hash_depth();
        di.flags |= DIF_EXHASH;
        di.payload_format = 0;
    }

    /// Records whose hash lies in the lower half of the leaf's slots move to a new leaf.
    fn split(&mut self, dir: u64, index: usize) {
        let depth = u32::from(self.inode(dir).depth);
        let old = self.tables[&dir][index];
        let old_depth = self.leaf(old).depth;
        let len = 1usize << (depth - u32::from(old_depth));
        let start = index & !(len - 1);
        let new = self.new_leaf(dir, old_depth + 1);
        let divider = ((start + len / 2) as u64) << (32 - depth);
        let content = self.blocks[&old].clone();
        let mut left = Leaf { depth: old_depth + 1, ..self.leaf(old) };
        let mut before = None;
        for r in Records::new(&content, Leaf::SIZE).filter_map(Result::ok) {
            if r.head.is_empty() || u64::from(r.head.hash) >= divider {
                before = Some((r.offset, r.head.rec_len));
                continue;
            }
            self.leaf_add(new, r.head, r.name);
            left.entries -= 1;
            let block = self.blocks.get_mut(&old).expect("a leaf");
            // the record that stays before a removed one takes its room; a removed first one stays as an empty record
            match &mut before {
                Some((at, rec_len)) => {
                    *rec_len += r.head.rec_len;
                    put_rec_len(block, *at, *rec_len);
                }
                None => {
                    clear_target(block, r.offset);
                    before = Some((r.offset, r.head.rec_len));
                }
            }
        }
        left.encode(self.blocks.get_mut(&old).expect("a leaf"));
        self.tables.get_mut(&dir).expect("hashed")[start..start + len / 2].fill(new);
    }

    fn double(&mut self, dir: u64) {
        let table = self.tables.get_mut(&dir).expect("hashed");
        *table = table.iter().flat_map(|&leaf| [leaf, leaf]).collect();
        let di = self.inode(dir);
        di.depth += 1;
        di.size *= 2;
    }

    /// Write the hash tables: into the dinode while they fit, else into blocks of their own.
    fn finish_tables(&mut self) {
        let geo = self.plan.geo;
        for (dir, table) in std::mem::take(&mut self.tables) {
            let bytes: Vec<u8> = table.iter().flat_map(|p| p.to_be_bytes()).collect();
            if bytes.len() <= geo.stuffed() {
                self.blocks.get_mut(&dir).expect("a directory")[Dinode::SIZE..][..bytes.len()]
                    .copy_from_slice(&bytes);
                continue;
            }
            let n = bytes.len().div_ceil(geo.jbsize()) as u64;
            self.inode(dir).height = geo.height_for(n) as u16;
            for (l, chunk) in bytes.chunks(geo.jbsize()).enumerate() {
                let at = self.map(dir, l as u64, Content::Typed(MetaType::JournaledData));
                self.blocks.get_mut(&at).expect("just mapped")[MetaHeader::SIZE..][..chunk.len()]
                    .copy_from_slice(chunk);
            }
        }
    }
}

/// The used records of a block that was built here.
fn records(block: &[u8], start: usize) -> impl Iterator<Item = Record<'_>> {
    Records::new(block, start).filter_map(Result::ok).filter(|r| !r.head.is_empty())
}

/// First fit: into an empty record as it is, or into the slack behind a used one.
fn place(block: &mut [u8], start: usize, mut head: Dirent, name: &[u8]) -> bool {
    let found =
        Records::new(block, start).filter_map(Result::ok).find(|r| r.head.slack() >= rec_min(name.len()));
    let Some((offset, old)) = found.map(|r| (r.offset, r.head)) else {
        return false;
    };
    if old.is_empty() {
        head.rec_len = old.rec_len;
        put_record(block, offset, head, name);
    } else {
        let own = rec_min(old.name_len as usize);
        head.rec_len = old.rec_len - own as u16;
        put_rec_len(block, offset, own as u16);
        put_record(block, offset + own, head, name);
    }
    true
}
