//! Everything that follows from the block size.

use crate::ondisk::FormatError;
use crate::ondisk::dinode::Dinode;
use crate::ondisk::header::MetaHeader;
use crate::ondisk::log::LogDescriptor;
use crate::ondisk::rgrp::Rgrp;
use crate::ondisk::sb::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, SB_OFFSET};

/// Largest resource group that the tools make, in bytes.
const MAX_RGRP_BYTES: u64 = 2048 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes; a power of two, 512 to 4096.
    pub block_size: u32,
    /// log2 of it.
    pub shift: u32,
}

impl Geometry {
    pub fn new(block_size: u32) -> Result<Self, FormatError> {
        if !block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size) {
            let value = block_size.into();
            return Err(FormatError::Field { what: "superblock", field: "sb_bsize", value });
        }
        Ok(Self { block_size, shift: block_size.trailing_zeros() })
    }

    fn bsize(&self) -> usize {
        self.block_size as usize
    }
    /// Bytes of contents that fit into a dinode.
    pub fn stuffed(&self) -> usize {
        self.bsize() - Dinode::SIZE
    }
    /// Pointers in a dinode.
    pub fn diptrs(&self) -> usize {
        self.stuffed() / 8
    }
    /// Pointers in an indirect block; also revoke entries in a log continuation block.
    pub fn inptrs(&self) -> usize {
        self.jbsize() / 8
    }
    /// Entries in a log descriptor.
    pub fn ldptrs(&self) -> usize {
        (self.bsize() - LogDescriptor::SIZE) / 8
    }
    /// Payload of a block with a metadata header (hash table, attribute data).
    pub fn jbsize(&self) -> usize {
        self.bsize() - MetaHeader::SIZE
    }
    /// Leaf pointers of a directory that has just become hashed, and its depth.
    pub fn new_hash_ptrs(&self) -> usize {
        self.bsize() / 16
    }
    pub fn new_hash_depth(&self) -> u16 {
        (self.shift - 4) as u16
    }
    /// Data blocks described by an RG block, and by an RB block.
    pub fn blocks_per_rg_block(&self) -> u32 {
        4 * (self.block_size - Rgrp::SIZE as u32)
    }
    pub fn blocks_per_rb_block(&self) -> u32 {
        4 * (self.block_size - MetaHeader::SIZE as u32)
    }
    pub fn qc_slots(&self) -> usize {
        self.jbsize() / 16
    }
    /// Block of the superblock.
    pub fn sb_block(&self) -> u64 {
        SB_OFFSET >> self.shift
    }
    /// Byte address of a block. `None` when it does not fit.
    pub fn byte(&self, block: u64) -> Option<u64> {
        block.checked_mul(self.block_size.into())
    }
    /// More header blocks than the largest legal resource group needs: a bound for hostile values.
    pub fn max_rgrp_length(&self) -> u32 {
        let blocks = MAX_RGRP_BYTES >> self.shift;
        2 + (blocks / u64::from(self.blocks_per_rb_block())) as u32 + 1
    }

    /// Blocks of `bytes_per_block` bytes that a tree of height `h >= 1` can map; saturates.
    pub fn tree_capacity(&self, h: u32) -> u64 {
        let mut n = self.diptrs() as u64;
        for _ in 1..h {
            n = n.saturating_mul(self.inptrs() as u64);
        }
        n
    }

    /// Greatest legal `di_height`: the first whose size in bytes overflows 64 bits.
    pub fn max_height(&self) -> u32 {
        let mut h = 1;
        let mut bytes = self.diptrs() as u64 * u64::from(self.block_size);
        while let Some(more) = bytes.checked_mul(self.inptrs() as u64) {
            bytes = more;
            h += 1;
        }
        h + 1
    }

    /// Least height of a tree that maps `blocks` blocks (0 for none).
    pub fn height_for(&self, blocks: u64) -> u32 {
        if blocks == 0 {
            return 0;
        }
        let mut h = 1;
        while self.tree_capacity(h) < blocks {
            h += 1;
        }
        h
    }

    /// Where logical block `lblock` hangs in a tree of height `h >= 1`: the index at each level, from the dinode down.
    /// `None` when the tree is too low.
    pub fn path(&self, lblock: u64, h: u32) -> Option<Vec<usize>> {
        if lblock >= self.tree_capacity(h) {
            return None;
        }
        let inptrs = self.inptrs() as u64;
        let mut path = vec![0; h as usize];
        let mut rest = lblock;
        for i in (1..h as usize).rev() {
            path[i] = (rest % inptrs) as usize;
            rest /= inptrs;
        }
        path[0] = rest as usize;
        Some(path)
    }

    /// Blocks of all heights that a file of `data` data blocks without holes has, dinode not counted.
    pub fn tree_blocks(&self, data: u64) -> u64 {
        let (mut level, mut all) = (data, data);
        while level > self.diptrs() as u64 {
            level = level.div_ceil(self.inptrs() as u64);
            all += level;
        }
        all
    }

    /// Most blocks that one directory insert may have to allocate: the hash table of greatest depth with its indirect
    /// blocks, and the leaves of a split at every depth.
    pub fn max_dirres(&self) -> u64 {
        let table = (8u64 << crate::ondisk::dinode::DIR_MAX_DEPTH).div_ceil(self.jbsize() as u64);
        self.tree_blocks(table) + u64::from(crate::ondisk::dinode::DIR_MAX_DEPTH) + 2
    }
}
