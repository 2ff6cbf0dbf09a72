//! The walk over all dinodes: attributes, metadata trees, extended attributes.

use super::{Checker, Fault, InodeInfo};
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::dinode::{
    DIF_EA_INDIRECT, DIF_TRUNC_IN_PROG, Dinode, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG,
    S_IFSOCK,
};
use crate::ondisk::ea::{EATYPE_TRUSTED, EaRecords};
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::pointer_at;
use crate::ondisk::sb::FORMAT_1802;
use crate::{BlockNo, Result};
use lun::aligned::AlignedBuf;

impl Checker<'_> {
    /// Every block that the bitmaps call DINODE or UNLINKED.
    pub(super) fn walk_inodes(&mut self) -> Result<()> {
        for state in [BlockState::Dinode, BlockState::Unlinked] {
            let mut from = 0;
            while let Some(addr) = self.space.next(from, state) {
                self.inode(addr, state == BlockState::Unlinked)?;
                from = addr + 1;
            }
        }
        Ok(())
    }

    fn inode(&mut self, addr: u64, unlinked: bool) -> Result<()> {
        let mut buf = self.buffer();
        self.read(addr, &mut buf)?;
        let di = match Dinode::decode_at(&buf, &self.geo, BlockNo(addr)) {
            Ok(di) => di,
            Err(e) => {
                self.report.add(Fault::Dinode { inode: addr, why: e.to_string() });
                return Ok(());
            }
        };
        if di.num.formal == 0 {
            self.report.add(Fault::Dinode { inode: addr, why: "no_formal_ino is 0".to_owned() });
        }
        if !matches!(di.mode & S_IFMT, S_IFIFO | S_IFCHR | S_IFDIR | S_IFBLK | S_IFREG | S_IFLNK | S_IFSOCK) {
            self.report.add(Fault::Mode { inode: addr, mode: di.mode });
            return Ok(());
        }
        self.report.inodes += 1;
        let state = if unlinked { BlockState::Unlinked } else { BlockState::Dinode };
        if !self.claim(addr, addr, state) {
            return Ok(());
        }
        let info = InodeInfo { formal: di.num.formal, mode: di.mode, nlink: di.nlink, unlinked };
        self.inodes.insert(addr, info);
        if unlinked {
            self.report.add(Fault::Orphan { inode: addr });
            if di.nlink != 0 {
                self.report.add(Fault::LinkCount { inode: addr, found: di.nlink.into(), counted: 0 });
            }
        }
        if di.flags & DIF_TRUNC_IN_PROG != 0 {
            self.report.add(Fault::TruncateUnfinished { inode: addr });
        }
        // mkfs leaves nothing wrong here, but tools do not care about the goals of system files
        if !di.is_system() && di.goal_meta != addr && !self.space.contains(di.goal_meta) {
            self.report.add(Fault::Goal { inode: addr, goal: di.goal_meta });
        }
        let mut owned = 1;
        let mut table = Vec::new();
        if di.height > 0 {
            // a directory in the middle of its deallocation has become a regular file: only the type decides
            let leaf = di.is_dir().then_some(MetaType::JournaledData);
            let pointers: Vec<u64> =
                (0..self.geo.diptrs()).map(|i| pointer_at(&buf, Dinode::SIZE, i)).collect();
            owned += self.tree(addr, &pointers, di.height, leaf, &mut table)?;
        } else if di.is_dir() && di.is_exhash() {
            table.push((0, buf[Dinode::SIZE..Dinode::SIZE + di.size as usize].to_vec()));
        }
        if di.is_dir() {
            owned += self.directory(&di, &buf, table, unlinked)?;
        }
        if di.eattr != 0 {
            owned += self.attributes(&di)?;
        }
        if owned != di.blocks {
            self.report.add(Fault::BlockCount { inode: addr, found: di.blocks, counted: owned });
        }
        Ok(())
    }

    /// Claims everything below `pointers`. With `leaf`, the lowest blocks have that type and their payload is kept with its
    /// logical block number. Returns the number of blocks.
    fn tree(
        &mut self,
        inode: u64,
        pointers: &[u64],
        height: u16,
        leaf: Option<MetaType>,
        payload: &mut Vec<(u64, Vec<u8>)>,
    ) -> Result<u64> {
        // (pointers of a block, levels below it, logical number of what its first pointer covers)
        let mut todo: Vec<(Vec<u64>, u16, u64)> = vec![(pointers.to_vec(), height - 1, 0)];
        let mut owned = 0;
        let mut buf = self.buffer();
        while let Some((pointers, below, first)) = todo.pop() {
            let covers = (0..below).fold(1u64, |n, _| n.saturating_mul(self.geo.inptrs() as u64));
            for (i, &p) in pointers.iter().enumerate() {
                if p == 0 || !self.claim(inode, p, BlockState::Used) {
                    continue;
                }
                owned += 1;
                let ty = match (below, leaf) {
                    (0, None) => continue, // data has no header
                    (0, Some(ty)) => ty,
                    _ => MetaType::Indirect,
                };
                self.read(p, &mut buf)?;
                if let Err(e) = MetaHeader::expect(&buf, ty) {
                    self.report.add(Fault::TreeBlock { inode, block: p, why: e.to_string() });
                    continue;
                }
                let logical = first.saturating_add((i as u64).saturating_mul(covers));
                if below == 0 {
                    payload.push((logical, buf[MetaHeader::SIZE..].to_vec()));
                } else {
                    let inner =
                        (0..self.geo.inptrs()).map(|k| pointer_at(&buf, MetaHeader::SIZE, k)).collect();
                    todo.push((inner, below - 1, logical));
                }
            }
        }
        payload.sort_by_key(|&(l, _)| l);
        Ok(owned)
    }

    fn attributes(&mut self, di: &Dinode) -> Result<u64> {
        let inode = di.num.addr.0;
        let mut owned = 0;
        let mut buf = self.buffer();
        let mut blocks = vec![di.eattr];
        if di.flags & DIF_EA_INDIRECT != 0 {
            if !self.claim(inode, di.eattr, BlockState::Used) {
                return Ok(0);
            }
            owned += 1;
            if !self.ea_block(inode, di.eattr, MetaType::Indirect, &mut buf)? {
                return Ok(owned);
            }
            blocks = (0..self.geo.inptrs())
                .map(|i| pointer_at(&buf, MetaHeader::SIZE, i))
                .take_while(|&p| p != 0)
                .collect();
        }
        let mut data = self.buffer();
        for block in blocks {
            if !self.claim(inode, block, BlockState::Used) {
                continue;
            }
            owned += 1;
            if !self.ea_block(inode, block, MetaType::ExtAttr, &mut buf)? {
                continue;
            }
            for record in EaRecords::new(&buf) {
                let r = match record {
                    Ok(r) => r,
                    Err(e) => {
                        self.report.add(Fault::ExtAttr { inode, block, why: e.to_string() });
                        break;
                    }
                };
                if r.head.ty == EATYPE_TRUSTED && self.sb.fs_format < FORMAT_1802 {
                    let why = "a trusted attribute on a volume of format 1801".to_owned();
                    self.report.add(Fault::ExtAttr { inode, block, why });
                }
                let pointers: Vec<u64> = r.pointers().collect();
                if !self.space.in_one_group(&pointers) {
                    let why = "the blocks of one value lie in several resource groups".to_owned();
                    self.report.add(Fault::ExtAttr { inode, block, why });
                }
                for p in pointers {
                    if self.claim(inode, p, BlockState::Used) {
                        owned += 1;
                        self.ea_block(inode, p, MetaType::ExtAttrData, &mut data)?;
                    }
                }
            }
        }
        Ok(owned)
    }

    fn ea_block(&mut self, inode: u64, block: u64, ty: MetaType, buf: &mut AlignedBuf) -> Result<bool> {
        self.read(block, buf)?;
        if let Err(e) = MetaHeader::expect(buf, ty) {
            self.report.add(Fault::ExtAttr { inode, block, why: e.to_string() });
            return Ok(false);
        }
        Ok(true)
    }
}
