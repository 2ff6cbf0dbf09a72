//! Where journals and resource groups lie. Pure arithmetic.

use super::{MkfsError, MkfsOptions};
use crate::geometry::Geometry;
use crate::ondisk::rindex::RindexEntry;

pub(super) struct Plan {
    pub(super) geo: Geometry,
    pub(super) journals: u32,
    /// Log blocks of each journal.
    pub(super) jblks: u32,
    /// All blocks of a journal's file: dinode, indirect blocks, log blocks.
    pub(super) jfile: u64,
    /// The first `journals` groups hold one journal each.
    pub(super) groups: Vec<RindexEntry>,
}

fn ceil4(n: u64) -> u64 {
    n.next_multiple_of(4)
}

/// Header blocks that a group of `n` data blocks needs.
fn bitblocks_for(geo: Geometry, n: u64) -> u64 {
    let (rg, rb) = (u64::from(geo.blocks_per_rg_block()), u64::from(geo.blocks_per_rb_block()));
    1 + ceil4(n).saturating_sub(rg).div_ceil(rb)
}

/// Divide a group of `len` blocks at `addr` into header and data blocks; a few blocks at the end may be lost to rounding.
fn split_group(geo: Geometry, addr: u64, len: u64) -> RindexEntry {
    let (rg, rb) = (u64::from(geo.blocks_per_rg_block()), u64::from(geo.blocks_per_rb_block()));
    let mut b = 0;
    while rg + rb * b < ((len - b) & !3) {
        b += 1;
    }
    let mappable = if b > 0 { rg + rb * (b - 1) } else { 0 };
    let data = (len - (b + 1)) & !3;
    if mappable < data {
        b += 1;
    }
    RindexEntry { addr, length: b as u32, data0: addr + b, data: data as u32, bitbytes: (data / 4) as u32 }
}

/// Default journal size in blocks for `n` device blocks per journal; `None` when the device is too small.
fn default_journal_blocks(geo: Geometry, n: u64) -> Option<u64> {
    let min = (8 << 20) >> geo.shift;
    if n < 2 * min {
        return None;
    }
    let blocks = match n {
        0..131_072 => min,
        131_072..0x8_0000 => 4096,
        0x8_0000..0x20_0000 => 8192,
        0x20_0000..0x40_0000 => 16384,
        0x40_0000..0x1000_0000 => 32768,
        0x1000_0000..2_684_354_560 => 131_072,
        _ => 262_144,
    };
    Some(blocks.max(min))
}

/// Lengths of the groups that fill `space` blocks: how many of the longer and how many of the shorter length.
fn divide(space: u64, target: u64) -> (u64, u64, u64) {
    let mut len = target;
    let mut num = space / len;
    if space == num * len {
        return (len, num, 0);
    }
    num += 1;
    while (len - 1) * num >= space {
        len -= 1;
    }
    let (mut longer, mut shorter) = (num, 0);
    while longer > 0 && len * longer + (len - 1) * shorter >= space {
        longer -= 1;
        shorter += 1;
    }
    (len, longer, shorter)
}

impl Plan {
    pub(super) fn new(
        device: &str,
        geo: Geometry,
        device_blocks: u64,
        options: &MkfsOptions,
    ) -> Result<Self, MkfsError> {
        let journals = options.journals;
        let too_small = |jblks: u64| MkfsError::TooSmall {
            device: device.to_owned(),
            blocks: device_blocks,
            journals,
            journal_mb: ((jblks << geo.shift) >> 20) as u32,
        };
        let jblks = match options.journal_mb {
            Some(mb) => {
                let jblks = (u64::from(mb) << 20) >> geo.shift;
                if jblks * u64::from(journals) > device_blocks / 2 {
                    return Err(too_small(jblks));
                }
                jblks
            }
            None => default_journal_blocks(geo, device_blocks / u64::from(journals))
                .ok_or_else(|| too_small((8 << 20) >> geo.shift))?,
        };
        let jfile = 1 + geo.tree_blocks(jblks);
        let jrglen = bitblocks_for(geo, jfile) + ceil4(jfile);
        let mut addr = geo.sb_block() + 1;
        let mut groups = Vec::new();
        for _ in 0..journals {
            if addr + jrglen > device_blocks {
                return Err(too_small(jblks));
            }
            groups.push(split_group(geo, addr, jrglen));
            addr += jrglen;
        }
        let space = device_blocks - addr;
        let (len, longer, shorter) = divide(space, (u64::from(options.rgrp_mb) << 20) >> geo.shift);
        for (count, len) in [(longer, len), (shorter, len - 1)] {
            for _ in 0..count {
                // fewer blocks than one header and four data blocks make no group
                if len < 8 || addr + len > device_blocks {
                    break;
                }
                groups.push(split_group(geo, addr, len));
                addr += len;
            }
        }
        let plan = Self { geo, journals, jblks: jblks as u32, jfile, groups };
        if plan.small_inode_blocks(options) > plan.spare_blocks() {
            return Err(too_small(jblks));
        }
        Ok(plan)
    }

    /// Blocks for everything but the journals, with room for grown directories.
    fn small_inode_blocks(&self, options: &MkfsOptions) -> u64 {
        let qc = (u64::from(options.quota_change_mb) << 20) >> self.geo.shift;
        let per_journal = 3 + self.geo.tree_blocks(qc) + 16;
        let rindex = (96 * (self.groups.len() as u64 + 1)).div_ceil(self.geo.block_size.into());
        64 + per_journal * u64::from(self.journals) + self.geo.tree_blocks(rindex)
    }

    fn spare_blocks(&self) -> u64 {
        let all: u64 = self.groups.iter().map(|g| u64::from(g.data)).sum();
        all - self.jfile * u64::from(self.journals)
    }

    pub(super) fn journal_dinode(&self, jid: u32) -> u64 {
        self.groups[jid as usize].data0
    }

    pub(super) fn journal_first_block(&self, jid: u32) -> u64 {
        self.journal_dinode(jid) + self.jfile - u64::from(self.jblks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_never_pass_the_space_and_differ_by_one_block() {
        for space in (1000..200_000).step_by(997) {
            let (len, longer, shorter) = divide(space, 8192);
            assert!(len * longer + (len - 1) * shorter <= space, "{space}");
            assert!(space - (len * longer + (len - 1) * shorter) <= longer + shorter, "{space}");
        }
    }

    #[test]
    fn a_group_holds_its_own_bitmap() {
        for bsize in [512, 1024, 2048, 4096] {
            let geo = Geometry::new(bsize).unwrap();
            for len in (8..100_000).step_by(61) {
                let g = split_group(geo, 1000, len);
                assert!(g.end() <= 1000 + len, "{bsize} {len}");
                assert!(g.end() + 8 > 1000 + len, "{bsize} {len}");
                g.validate(&geo, 1000 + len).unwrap();
            }
        }
    }
}
