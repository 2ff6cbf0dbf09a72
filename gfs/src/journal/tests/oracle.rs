//! A second, independent reading of the journal rules: as small as it can be, for judging what the writer leaves behind.

use crate::ondisk::log::{LD_METADATA, LD_REVOKE, LogHeader};
use crate::ondisk::{u32_at, u64_at};
use lun::image::Image;
use std::collections::BTreeMap;

pub(super) struct Journal<'a> {
    pub(super) bsize: usize,
    /// Device block of each journal block.
    pub(super) ring: &'a [u64],
}

impl Journal<'_> {
    fn block(&self, image: &Image, block: u64) -> Vec<u8> {
        let mut b = vec![0; self.bsize];
        image.read(block * self.bsize as u64, &mut b);
        b
    }

    pub(super) fn head(&self, image: &Image) -> LogHeader {
        let headers = self.ring.iter().enumerate();
        headers
            .filter_map(|(at, &b)| LogHeader::decode_at(&self.block(image, b), at as u32).ok())
            .max_by_key(|h| h.sequence)
            .expect("a header")
    }

    /// Replays in place; the journal itself stays dirty. Returns (copies replayed, copies revoked).
    pub(super) fn replay(&self, image: &mut Image) -> (usize, usize) {
        let head = self.head(image);
        let n = self.ring.len();
        if head.is_clean() {
            return (0, 0);
        }
        let age = |at: usize| (at + n - head.tail as usize) % n;
        let mut at = head.tail as usize;
        let mut chunks = Vec::new();
        while at != head.blkno as usize {
            let b = self.block(image, self.ring[at]);
            match u32_at(&b, 4) {
                8 => at = (at + 1) % n,
                9 => {
                    let len = u32_at(&b, 28) as usize;
                    assert!(age(at) + len <= age(head.blkno as usize), "chunk at {at} runs over the head");
                    chunks.push((at, b));
                    at = (at + len) % n;
                }
                other => panic!("block of type {other} at {at} of the live log"),
            }
        }
        let mut revoked: BTreeMap<u64, usize> = BTreeMap::new();
        for (at, b) in chunks.iter().filter(|c| u32_at(&c.1, 24) == LD_REVOKE) {
            let count = u32_at(b, 32) as usize;
            let (first, more) = ((self.bsize - 72) / 8, (self.bsize - 24) / 8);
            for i in 0..count {
                let (pos, addr) = if i < first {
                    (*at, u64_at(b, 72 + 8 * i))
                } else {
                    let k = i - first;
                    let pos = (at + 1 + k / more) % n;
                    let cont = self.block(image, self.ring[pos]);
                    assert_eq!(u32_at(&cont, 4), 12, "revoke continuation");
                    (pos, u64_at(&cont, 24 + 8 * (k % more)))
                };
                revoked.insert(addr, age(pos));
            }
        }
        let (mut replayed, mut skipped) = (0, 0);
        for (at, b) in chunks.iter().filter(|c| u32_at(&c.1, 24) != LD_REVOKE) {
            let meta = u32_at(b, 24) == LD_METADATA;
            for i in 0..u32_at(b, 32) as usize {
                let pos = (at + 1 + i) % n;
                let stride = if meta { 8 } else { 16 };
                let addr = u64_at(b, 72 + stride * i);
                if revoked.get(&addr).is_some_and(|&r| r > age(pos)) {
                    skipped += 1;
                    continue;
                }
                let mut copy = self.block(image, self.ring[pos]);
                if !meta && u64_at(b, 72 + stride * i + 8) != 0 {
                    copy[..4].copy_from_slice(&0x0116_1970u32.to_be_bytes());
                }
                assert!(!meta || u32_at(&copy, 0) == 0x0116_1970, "metadata copy without magic");
                image.write(addr * self.bsize as u64, &copy);
                replayed += 1;
            }
        }
        (replayed, skipped)
    }
}
