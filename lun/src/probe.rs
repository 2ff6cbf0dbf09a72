//! What is already on a device: a table of the magic numbers that a person would be sorry to lose.

use crate::{Lun, Result};
use std::fmt;

/// Something found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Human name, for example "an ext2/3/4 file system".
    pub kind: &'static str,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind)
    }
}

/// Kind of a quorum disk.
pub const QDISK: &str = "a quorum disk";

/// How much of the start of a device is looked at.
const SPAN: usize = 132 << 10;

/// (byte offset, bytes there, what it is). The first match names the content, so containers of others come first.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (65536, &[0x01, 0x16, 0x19, 0x70, 0, 0, 0, 1], "a GFS2 (or GFS) file system"),
    (0, b"LUKS\xba\xbe", "an encrypted LUKS volume"),
    (24, b"LVM2 001", "an LVM2 physical volume"),
    (536, b"LVM2 001", "an LVM2 physical volume"),
    (1048, b"LVM2 001", "an LVM2 physical volume"),
    (1560, b"LVM2 001", "an LVM2 physical volume"),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of a RAID array (md)"),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of a RAID array (md)"),
    (32, &[0xeb, 0x7a, 0x62, 0xc2], QDISK),
    (32, &[0x39, 0x11, 0x9f, 0xcd], QDISK),
    (1080, &[0x53, 0xef], "an ext2/3/4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    (4096, &[0xc6, 0x85, 0x73, 0xf6], "a bcachefs file system"),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS file system"),
    (65588, b"ReIsErFs", "a ReiserFS file system"),
    (65588, b"ReIsEr2Fs", "a ReiserFS file system"),
    (65588, b"ReIsEr3Fs", "a ReiserFS file system"),
    (32768, b"JFS1", "a JFS file system"),
    (1024, b"OCFSV2", "an OCFS2 file system"),
    (2048, b"OCFSV2", "an OCFS2 file system"),
    (4096, b"OCFSV2", "an OCFS2 file system"),
    (1024, b"H+", "an HFS+ file system"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (54, b"FAT", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (32769, b"CD001", "an ISO 9660 file system"),
    (0, b"hsqs", "a squashfs file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (131072, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0], "a ZFS pool"),
    (131072, &[0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c], "a ZFS pool"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
];

/// A boot record whose four slots look like partitions.
fn is_mbr(start: &[u8]) -> bool {
    let Some(table) = start.get(446..510) else { return false };
    start.get(510..512) == Some(&[0x55, 0xaa])
        && table.chunks(16).all(|p| matches!(p[0], 0 | 0x80))
        && table.chunks(16).any(|p| p[4] != 0)
}

/// Look at the start of the device.
pub fn probe(lun: &Lun) -> Result<Option<Content>> {
    let sector = u64::from(lun.sector_size());
    let len = (SPAN as u64).min(lun.size()) / sector * sector;
    let mut start = vec![0; len as usize];
    lun.read_at(0, &mut start)?;
    Ok(look(&start))
}

fn look(start: &[u8]) -> Option<Content> {
    let found = MAGICS.iter().find(|(at, magic, _)| start.get(*at..at + magic.len()) == Some(*magic));
    match found {
        Some((_, _, kind)) => Some(Content { kind }),
        None if is_mbr(start) => Some(Content { kind: "a partition table" }),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_magic_is_found_and_zeros_are_nothing() {
        assert_eq!(look(&vec![0; SPAN]), None);
        for (at, magic, kind) in MAGICS {
            let mut b = vec![0; SPAN];
            b[*at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(look(&b).unwrap().kind, *kind);
        }
        let mut b = vec![0; 4096];
        b[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(look(&b), None);
        b[446 + 4] = 0x83;
        assert_eq!(look(&b).unwrap().kind, "a partition table");
        assert_eq!(look(&[]), None);
    }
}
