//! Every structure against bytes that mkfs.gfs2, a kernel or an independent writer made, round trips, and random bytes.

use super::bitmap::{self, BlockState};
use super::checksum::{disk_hash, lh_crc, lh_hash, rg_crc};
use super::dinode::{DIF_EXHASH, DIF_JDATA, DIF_SYSTEM, Dinode, Time};
use super::dirent::{Dirent, Records, put_record, put_sentinel, rec_min};
use super::ea::{EATYPE_TRUSTED, EATYPE_USR, EaHead, EaRecords};
use super::header::{MAGIC, MetaHeader, MetaType, has_magic};
use super::leaf::Leaf;
use super::log::{LD_JDATA, LD_METADATA, LD_REVOKE, LogDescriptor, LogHeader};
use super::lvb::{InodeLvb, RgrpLvb};
use super::quota::{QuotaChange, QuotaEntry};
use super::rgrp::Rgrp;
use super::rindex::RindexEntry;
use super::sb::Superblock;
use super::statfs::{InumRange, StatfsChange};
use super::*;
use crate::geometry::Geometry;
use proptest::prelude::*;

macro_rules! vector {
    ($name:literal) => {
        include_bytes!(concat!("../../tests/vectors/", $name, ".bin")).as_slice()
    };
}

fn geo(bsize: u32) -> Geometry {
    Geometry::new(bsize).unwrap()
}

/// Decoding and encoding into a copy whose fixed part was wiped must give the same bytes again.
fn same_again(original: &[u8], size: usize, encode: impl FnOnce(&mut [u8])) {
    let mut copy = original.to_vec();
    copy[..size].fill(0xa5);
    encode(&mut copy);
    assert_eq!(copy, original);
}

#[test]
fn superblocks_of_mkfs_decode_and_encode_to_the_same_bytes() {
    let b = vector!("sb-bs2048-dlm-1802");
    let sb = Superblock::decode(b).unwrap();
    assert_eq!((sb.fs_format, sb.block_size), (1802, 2048));
    assert_eq!((sb.master.formal, sb.master.addr.0), (4, 4148));
    assert_eq!((sb.root.formal, sb.root.addr.0), (0x14, 0x3682));
    assert_eq!((sb.lock_proto.as_str(), sb.lock_table.as_str()), ("lock_dlm", "mycluster:myfs"));
    assert_eq!(sb.fs_name(), "myfs");
    assert_eq!(sb.uuid[..4], [0, 0x11, 0x22, 0x33]);
    same_again(b, Superblock::SIZE, |c| sb.encode(c));
    for b in [vector!("sb-bs512-nolock-1802"), vector!("sb-bs4096-nolock-1801")] {
        let sb = Superblock::decode(b).unwrap();
        assert_eq!(sb.block_size as usize, b.len());
        same_again(b, Superblock::SIZE, |c| sb.encode(c));
    }
}

#[test]
fn a_superblock_that_kernels_refuse_is_refused() {
    let good = vector!("sb-bs4096-nolock-1801");
    for (at, value) in [(0, 0), (4, 2), (24, 1800), (24, 1803), (28, 1901), (36, 8192), (36, 1000), (40, 11)]
    {
        let mut b = good.to_vec();
        put_u32(&mut b, at, value);
        assert!(Superblock::decode(&b).is_err(), "field at {at} set to {value}");
    }
    assert!(matches!(Superblock::decode(&good[..271]), Err(FormatError::Short { .. })));
}

#[test]
fn resource_groups_of_mkfs_decode_and_their_bitmaps_add_up() {
    let cases = [
        (vector!("rgrp-bs4096-journal"), 4096u32, 17u64, [0u64, 2053, 0, 3]),
        (vector!("rgrp-bs4096-data-4blocks"), 4096, 2074, [63191, 256, 0, 9]),
        (vector!("rgrp-bs512-journal-9blocks"), 512, 129, [0, 16658, 0, 2]),
    ];
    for (b, bsize, addr, states) in cases {
        let rg = Rgrp::decode(b).unwrap();
        Rgrp::verify_crc(b).unwrap();
        assert_eq!(u32_at(b, 64), rg_crc(b));
        same_again(b, Rgrp::SIZE, |c| rg.encode(c));
        let geo = geo(bsize);
        let length = (b.len() as u32) / bsize;
        let ri = RindexEntry { addr, length, data0: rg.data0, data: rg.data, bitbytes: rg.bitbytes };
        ri.validate(&geo, ri.end()).unwrap();
        let mut sum = [0u64; 4];
        for (i, part) in ri.parts(&geo).enumerate() {
            assert_eq!(part.block, addr + i as u64);
            let block = &b[i * bsize as usize..][..bsize as usize];
            if i > 0 {
                MetaHeader::expect(block, MetaType::RgrpBitmap).unwrap();
            }
            let n = bitmap::count(&block[part.offset..part.offset + part.bytes]);
            (0..4).for_each(|s| sum[s] += n[s]);
            assert!(block[part.offset + part.bytes..].iter().all(|&x| x == 0));
            assert_eq!(ri.locate(&geo, part.first), (i as u32, 0));
        }
        assert_eq!(sum, states);
        assert_eq!((sum[0], sum[2] + sum[3]), (rg.free.into(), rg.dinodes.into()));
    }
}

#[test]
fn a_stale_rgrp_checksum_is_noticed_and_zero_is_accepted() {
    let mut b = vector!("rgrp-bs4096-journal").to_vec();
    put_u32(&mut b, 28, 1);
    assert!(matches!(Rgrp::verify_crc(&b), Err(FormatError::Checksum { .. })));
    put_u32(&mut b, 64, 0);
    Rgrp::verify_crc(&b).unwrap();
}

#[test]
fn dinodes_of_mkfs_decode_and_encode_to_the_same_bytes() {
    let dinodes = [
        (vector!("dinode-root-bs4096"), 4096, 2342),
        (vector!("dinode-master-bs4096"), 4096, 2072),
        (vector!("dinode-statfs-bs4096"), 4096, 2339),
        (vector!("dinode-inum-bs4096"), 4096, 2338),
        (vector!("dinode-quota-bs4096"), 4096, 2341),
        (vector!("dinode-rindex-bs4096"), 4096, 2340),
        (vector!("dinode-journal0-bs4096"), 4096, 18),
        (vector!("dinode-per_node-exhash-bs512"), 512, 83473),
    ];
    for (b, bsize, addr) in dinodes {
        let di = Dinode::decode_at(b, &geo(bsize), BlockNo(addr)).unwrap();
        same_again(b, Dinode::SIZE, |c| di.encode(c));
    }
    let journal = vector!("dinode-journal0-bs4096");
    let di = Dinode::decode(journal).unwrap();
    assert_eq!((di.height, di.blocks, di.size, di.flags), (2, 2054, 8 << 20, DIF_SYSTEM));
    assert_eq!(di.mtime, Time { sec: 1795224413, nsec: 0 });
    let ptrs: Vec<u64> = (0..6).map(|i| pointer_at(journal, Dinode::SIZE, i)).collect();
    assert_eq!(ptrs, [19, 20, 21, 22, 23, 0]);
    let indirect = &journal[4096..];
    MetaHeader::expect(indirect, MetaType::Indirect).unwrap();
    assert_eq!(pointer_at(indirect, MetaHeader::SIZE, 508), 532);
    let pn = Dinode::decode(vector!("dinode-per_node-exhash-bs512")).unwrap();
    assert_eq!(pn.flags, DIF_SYSTEM | DIF_EXHASH | DIF_JDATA);
    assert_eq!((pn.depth, pn.entries, pn.size), (5, 26, 256));
}

#[test]
fn a_dinode_with_impossible_numbers_is_refused() {
    let geo = geo(4096);
    let good = Dinode::decode(vector!("dinode-statfs-bs4096")).unwrap();
    let addr = good.num.addr;
    assert!(good.validate(&geo, BlockNo(addr.0 + 1)).is_err());
    assert!(Dinode { height: 7, ..good.clone() }.validate(&geo, addr).is_err());
    assert!(Dinode { size: 3865, ..good.clone() }.validate(&geo, addr).is_err());
    assert!(Dinode { size: 3864, ..good.clone() }.validate(&geo, addr).is_ok());
    assert!(Dinode { height: 1, size: 1 << 63, ..good.clone() }.validate(&geo, addr).is_err());
    let dir =
        Dinode { mode: 0o40755, flags: DIF_EXHASH, depth: 18, size: 8 << 18, height: 2, ..good.clone() };
    assert!(dir.validate(&geo, addr).is_err());
    assert!(Dinode { depth: 17, size: 8 << 17, ..dir.clone() }.validate(&geo, addr).is_ok());
    assert!(Dinode { depth: 17, size: 8 << 16, ..dir }.validate(&geo, addr).is_err());
}

#[test]
fn directory_records_of_mkfs_are_walked_in_order() {
    let names = |b, start| -> Vec<(usize, u16, u16, u64, u64, String)> {
        Records::new(b, start)
            .map(|r| r.unwrap())
            .filter(|r| !r.head.is_empty())
            .inspect(|r| assert_eq!(r.head.hash, disk_hash(r.name)))
            .map(|r| {
                let n = String::from_utf8(r.name.to_vec()).unwrap();
                (r.offset, r.head.rec_len, r.head.ty, r.head.num.formal, r.head.num.addr.0, n)
            })
            .collect()
    };
    let master = names(vector!("dinode-master-bs4096"), Dinode::SIZE);
    assert_eq!(master.len(), 8);
    assert_eq!(master[2], (328, 48, 4, 3, 2073, "jindex".into()));
    assert_eq!(master[7], (568, 3528, 8, 11, 2341, "quota".into()));
    let leaves = vector!("leaves-per_node-bs512");
    let mut all = 0;
    for (b, entries) in leaves.chunks(512).zip([7, 6, 7, 6]) {
        let leaf = Leaf::decode(b).unwrap();
        assert_eq!((leaf.depth, leaf.entries, leaf.next, leaf.inode), (2, entries, 0, 83473));
        same_again(b, Leaf::SIZE, |c| leaf.encode(c));
        let found = names(b, Leaf::SIZE);
        assert_eq!(found.len(), usize::from(entries));
        all += found.len();
    }
    assert_eq!(all, 26);
    let b = vector!("leaf-split-bs4096");
    let leaf = Leaf::decode(b).unwrap();
    assert_eq!((leaf.depth, leaf.entries, leaf.dist), (6, 60, 1));
    assert_eq!(names(b, Leaf::SIZE).len(), 60);
}

#[test]
fn name_hashes_agree_with_the_table() {
    let x255 = [b'x'; 255];
    let table: [(&[u8], u32, usize); 9] = [
        (b".", 0x0ed4e242, 48),
        (b"..", 0x9608161c, 48),
        (b"journal0", 0xfc7745eb, 48),
        (b"lost+found", 0x6ab47928, 56),
        ("na\u{ef}ve".as_bytes(), 0xd50f8166, 48),
        (b"file-00001-abcdefgh", 0x4d1006e9, 64),
        (b"AAAAAAAAAAAAAAAAAAAAAAAAAAAA", 0x801cd1f5, 72),
        (&x255, 0x3d66e3d9, 296),
        (b"\x80\xff", 0x57586539, 48),
    ];
    for (name, hash, len) in table {
        assert_eq!(disk_hash(name), hash, "{name:?}");
        assert_eq!(rec_min(name.len()), len);
    }
}

#[test]
fn log_headers_of_mkfs_decode_and_encode_to_the_same_bytes() {
    for (b, at, addr) in [
        (vector!("logheader-mkfs-bs4096"), 5, 0x1d),
        (vector!("logheader-mkfs-bs512"), 7, 50427),
        (&vector!("journal-flush-bs512")[5632..], 2612, 3025),
    ] {
        let h = LogHeader::decode_at(b, at).unwrap();
        assert_eq!(h.addr, addr);
        assert_eq!((u32_at(b, 44), u32_at(b, 48)), (lh_hash(b), lh_crc(b)));
        same_again(b, b.len(), |c| h.encode(c));
        assert!(LogHeader::decode_at(b, at + 1).is_err());
    }
    let h = LogHeader::decode(&vector!("journal-flush-bs512")[5632..]).unwrap();
    assert_eq!((h.sequence, h.tail, h.local_free, h.local_dinodes), (16384, 2601, -3, 2));
    assert!(!h.is_clean());
    assert!(LogHeader::decode(vector!("logheader-mkfs-bs512")).unwrap().is_clean());
}

#[test]
fn a_torn_log_header_is_refused_wherever_a_byte_differs() {
    let good = vector!("logheader-mkfs-bs512");
    for i in 0..good.len() {
        let mut b = good.to_vec();
        b[i] ^= 0x10;
        assert!(LogHeader::decode(&b).is_err(), "byte {i}");
    }
    // a header of version 1 has no second checksum
    let mut b = good.to_vec();
    put_u32(&mut b, 48, 0);
    LogHeader::decode(&b).unwrap();
}

#[test]
fn descriptors_of_a_flush_decode() {
    let b = vector!("journal-flush-bs512");
    let geo = geo(512);
    let block = |i: usize| &b[512 * i..512 * (i + 1)];
    let d = LogDescriptor::decode(block(0), &geo).unwrap();
    assert_eq!(d, LogDescriptor { kind: LD_JDATA, length: 2, count: 1 });
    assert_eq!(LogDescriptor::jdata(block(0), 0), (18920, true));
    assert!(!has_magic(block(1)));
    let d = LogDescriptor::decode(block(2), &geo).unwrap();
    assert_eq!(d, LogDescriptor { kind: LD_METADATA, length: 7, count: 6 });
    assert_eq!(LogDescriptor::address(block(2), 5), 18919);
    let d = LogDescriptor::decode(block(9), &geo).unwrap();
    assert_eq!(d, LogDescriptor { kind: LD_REVOKE, length: 2, count: 60 });
    same_again(block(9), LogDescriptor::SIZE, |c| d.encode(c));
    MetaHeader::expect(block(10), MetaType::LogBlock).unwrap();
    for (at, value) in [(24, 303), (28, 0), (28, 1), (32, 61 + 56)] {
        let mut bad = block(9).to_vec();
        put_u32(&mut bad, at, value);
        assert!(LogDescriptor::decode(&bad, &geo).is_err(), "field at {at} set to {value}");
    }
}

#[test]
fn attribute_records_are_walked() {
    let b = vector!("eattr-bs4096");
    MetaHeader::expect(b, MetaType::ExtAttr).unwrap();
    let all: Vec<_> = EaRecords::new(b).map(|r| r.unwrap()).collect();
    assert_eq!(all.len(), 3);
    assert_eq!((all[0].name, all[0].body, all[0].head.ty), (&b"color"[..], &b"blue"[..], EATYPE_USR));
    assert_eq!((all[1].name, all[1].head.ty), (&b"trusted1"[..], EATYPE_TRUSTED));
    assert_eq!(all[2].pointers().collect::<Vec<_>>(), [2345, 2346, 2347]);
    assert_eq!((all[2].head.data_len, all[2].head.is_last()), (9000, true));
    assert_eq!(all[0].head.used(), 32);
    for r in &all {
        same_again(&b[r.offset..], EaHead::SIZE, |c| r.head.encode(c));
    }
}

#[test]
fn derived_constants_are_those_of_the_format() {
    // stuffed, diptrs, inptrs, ldptrs, jbsize, new hash pointers, depth, RG, RB, quota slots, height, directory blocks
    let table = [
        (512, [280, 35, 61, 55, 488, 32, 5, 1536, 1952, 30, 10, 2205]),
        (1024, [792, 99, 125, 119, 1000, 64, 6, 3584, 4000, 62, 8, 1077]),
        (2048, [1816, 227, 253, 247, 2024, 128, 7, 7680, 8096, 126, 7, 541]),
        (4096, [3864, 483, 509, 503, 4072, 256, 8, 15872, 16288, 254, 6, 277]),
    ];
    for (bsize, want) in table {
        let g = geo(bsize);
        let got = [
            g.stuffed(),
            g.diptrs(),
            g.inptrs(),
            g.ldptrs(),
            g.jbsize(),
            g.new_hash_ptrs(),
            g.new_hash_depth() as usize,
            g.blocks_per_rg_block() as usize,
            g.blocks_per_rb_block() as usize,
            g.qc_slots(),
            g.max_height() as usize,
            g.max_dirres() as usize,
        ];
        assert_eq!(got, want, "block size {bsize}");
    }
    assert!(Geometry::new(8192).is_err() && Geometry::new(0).is_err() && Geometry::new(1000).is_err());
}

#[test]
fn tree_paths_lead_through_every_level() {
    let g = geo(512);
    assert_eq!((g.height_for(0), g.height_for(1), g.height_for(35), g.height_for(36)), (0, 1, 1, 2));
    assert_eq!(g.path(0, 1), Some(vec![0]));
    assert_eq!(g.path(35, 1), None);
    assert_eq!(g.path(35, 2), Some(vec![0, 35]));
    assert_eq!(g.path(61 * 3 + 7, 2), Some(vec![3, 7]));
    assert_eq!(g.path(61 * 61 * 2 + 61 * 5 + 9, 3), Some(vec![2, 5, 9]));
    assert_eq!(g.path(u64::MAX, 10).map(|p| p.len()), g.path(u64::MAX - 1, 10).map(|p| p.len()));
    assert_eq!(g.tree_blocks(2149), 2149 + 37);
}

#[test]
fn small_structures_come_back() {
    let mut b = [0xffu8; 128];
    let q = QuotaEntry { limit: 1, warn: 2, value: 3 };
    q.encode(&mut b);
    assert_eq!(QuotaEntry::decode(&b), Ok(q));
    let c = QuotaChange { change: -5, flags: 1, id: 3000 };
    c.encode(&mut b);
    assert_eq!(QuotaChange::decode(&b), Ok(c));
    let s = StatfsChange { total: 1, free: -45, dinodes: 13 };
    s.encode(&mut b);
    assert_eq!(StatfsChange::decode(&b), Ok(s));
    let r = InumRange { start: 7, length: 8 };
    r.encode(&mut b);
    assert_eq!(InumRange::decode(&b), Ok(r));
    let l = RgrpLvb { flags: 8, free: 58549, dinodes: 18, igeneration: 8, unlinked: 1 };
    assert_eq!(RgrpLvb::decode(&l.encode()), Some(l));
    // as captured between two kernels
    assert_eq!(l.encode()[..16], [0x01, 0x16, 0x19, 0x70, 0, 0, 0, 8, 0, 0, 0xe4, 0xb5, 0, 0, 0, 0x12]);
    assert_eq!(RgrpLvb::decode(&[0; 32]), None);
    let i = InodeLvb { generation_deleted: 3 };
    assert_eq!(InodeLvb::decode(&i.encode()), Some(i));
}

#[test]
fn hostile_directory_blocks_end_the_walk_with_one_error() {
    let fresh = || {
        let mut b = vec![0u8; 512];
        let head =
            |rec_len| Dirent { num: InodeNo { addr: BlockNo(9), formal: 9 }, rec_len, ..Dirent::default() };
        put_record(&mut b, 104, head(48), b"one");
        put_record(&mut b, 152, head(360), b"two");
        b
    };
    assert_eq!(Records::new(&fresh(), 104).flatten().count(), 2);
    type Damage = fn(&mut [u8]);
    let damages: [Damage; 8] = [
        |b| put_u16(b, 104 + 20, 0),
        |b| put_u16(b, 104 + 20, 8),
        |b| put_u16(b, 104 + 20, 49),
        |b| put_u16(b, 104 + 20, 416),
        |b| put_u16(b, 152 + 20, 352),
        |b| put_u16(b, 152 + 22, 0),
        |b| put_u16(b, 152 + 22, 330),
        |b| put_sentinel(b, 152, 360),
    ];
    for (i, damage) in damages.iter().enumerate() {
        let mut b = fresh();
        damage(&mut b);
        assert_eq!(Records::new(&b, 104).filter(|r| r.is_err()).count(), 1, "damage {i}");
        assert!(Records::new(&b, 104).last().unwrap().is_err(), "damage {i}");
    }
}

/// A naive model of the bitmap functions.
fn naive(bits: &[u8]) -> Vec<BlockState> {
    (0..bits.len() * 4).map(|k| bitmap::get(bits, k)).collect()
}

proptest! {
    #[test]
    fn random_bytes_never_panic(mut b in proptest::collection::vec(any::<u8>(), 0..600), typed in 0u32..16) {
        for with_header in [false, true] {
            if with_header && b.len() >= 24 {
                put_u32(&mut b, 0, MAGIC);
                put_u32(&mut b, 4, typed);
            }
            let _ = (Superblock::decode(&b), Rgrp::decode(&b), Rgrp::verify_crc(&b), RindexEntry::decode(&b));
            let _ = (Leaf::decode(&b), LogHeader::decode(&b), MetaHeader::decode(&b), Dirent::decode(&b));
            let _ = (QuotaEntry::decode(&b), QuotaChange::decode(&b), StatfsChange::decode(&b));
            let _ = (InumRange::decode(&b), EaHead::decode(&b));
            if let Ok(di) = Dinode::decode(&b) {
                let _ = di.validate(&geo(512), di.num.addr);
            }
            let _ = LogDescriptor::decode(&b, &geo(512));
            if let Ok(ri) = RindexEntry::decode(&b) && ri.validate(&geo(512), u64::MAX).is_ok() {
                prop_assert!(ri.parts(&geo(512)).map(|p| p.bytes).sum::<usize>() == ri.bitbytes as usize);
            }
            for start in [0, 104, 232] {
                prop_assert!(Records::new(&b, start).count() <= b.len() / 48 + 1);
            }
            for r in EaRecords::new(&b).flatten() {
                let _ = (r.pointers().fold(0u64, u64::wrapping_add), r.head.used());
            }
        }
    }

    #[test]
    fn dinodes_come_back(
        (mode, uid, gid, nlink, flags, entries) in any::<(u32, u32, u32, u32, u32, u32)>(),
        (size, blocks, goal, generation, eattr) in any::<(u64, u64, u64, u64, u64)>(),
        (sec, nsec, height, depth, jid) in any::<(i64, u32, u16, u16, u32)>(),
    ) {
        let t = Time { sec, nsec };
        let di = Dinode {
            jid, num: InodeNo { addr: BlockNo(goal), formal: size }, mode, uid, gid, nlink, size, blocks, atime: t,
            mtime: Time { sec: -sec.saturating_abs(), nsec }, ctime: t, major: uid, minor: gid, goal_meta: goal, goal_data: blocks,
            generation, flags, payload_format: 1200, height, depth, entries, eattr,
        };
        let mut b = [0xeeu8; 512];
        di.encode(&mut b);
        prop_assert_eq!(Dinode::decode(&b).unwrap(), di);
        prop_assert!(b[Dinode::SIZE..].iter().all(|&x| x == 0xee));
    }

    #[test]
    fn log_headers_come_back(
        (sequence, addr, jinode) in any::<(u64, u64, u64)>(), (flags, tail, blkno, nsec, jid) in any::<(u32, u32, u32, u32, u32)>(),
        (sec, total, free, dinodes) in any::<(i64, i64, i64, i64)>(),
    ) {
        let h = LogHeader { jid, sequence, flags, tail, blkno, nsec, sec, addr, jinode, statfs_addr: addr, quota_addr: jinode,
            local_total: total, local_free: free, local_dinodes: dinodes };
        let mut b = [0xeeu8; 1024];
        h.encode(&mut b);
        prop_assert_eq!(LogHeader::decode_at(&b, blkno).unwrap(), h);
    }

    #[test]
    fn bitmap_searches_agree_with_a_plain_walk(
        bits in proptest::collection::vec(prop_oneof![Just(0u8), Just(0x55), Just(0xff), any::<u8>()], 0..40),
        from in 0usize..170, end in 0usize..170, state in 0u8..4,
    ) {
        let model = naive(&bits);
        let state = BlockState::from_bits(state);
        let stop = end.min(model.len());
        let expect = (from..stop).find(|&k| model[k] == state);
        prop_assert_eq!(bitmap::find(&bits, from, end, state), expect);
        let length = (from..stop).take_while(|&k| model[k] == state).count();
        prop_assert_eq!(bitmap::run(&bits, from, end, state), length);
        let n = bitmap::count(&bits);
        for (s, n) in n.into_iter().enumerate() {
            prop_assert_eq!(n, model.iter().filter(|&&m| m as usize == s).count() as u64);
        }
    }

    #[test]
    fn setting_a_block_changes_no_other(bits in proptest::collection::vec(any::<u8>(), 1..20), k in 0usize..80, s in 0u8..4) {
        prop_assume!(k < bits.len() * 4);
        let mut changed = bits.clone();
        bitmap::set(&mut changed, k, BlockState::from_bits(s));
        let (mut before, after) = (naive(&bits), naive(&changed));
        before[k] = BlockState::from_bits(s);
        prop_assert_eq!(before, after);
    }
}
