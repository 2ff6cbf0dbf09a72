//! The checker against fsck.gfs2: both are content with the same volumes, and a table of damages that each must find.

use crate::common::{as_lun, blank, fsck, has_tool, kernel_volume};
use gfs::check::{Fault, Report, Severity, check};
use gfs::geometry::Geometry;
use gfs::mkfs::{MkfsOptions, make};
use gfs::ondisk::bitmap::{self, BlockState};
use gfs::ondisk::dinode::{Dinode, Time};
use gfs::ondisk::dirent::Records;
use gfs::ondisk::leaf::Leaf;
use gfs::ondisk::rgrp::Rgrp;
use gfs::ondisk::{pointer_at, put_pointer, put_u16, put_u32, put_u64, u32_at, u64_at};
use gfs::reader::Reader;
use lun::image::Image;
use lun::mem::MemLun;

fn report(image: &Image) -> Report {
    check(&as_lun(&MemLun::from_image(image.clone(), 512))).unwrap()
}

fn fresh(block_size: u32, journals: u32, mib: u64) -> Image {
    let lun = blank(mib << 20);
    let options = MkfsOptions {
        lock_proto: "lock_nolock".into(),
        block_size,
        journals,
        journal_mb: Some(8),
        rgrp_mb: 32,
        ..MkfsOptions::default()
    };
    make(&as_lun(&lun), &options, &mut |_, _| {}).unwrap();
    lun.durable()
}

fn replayed(name: &str) -> Image {
    let lun = MemLun::from_image(kernel_volume(name), 512);
    Reader::open(&as_lun(&lun)).unwrap().replay_all(Time { sec: 1, nsec: 0 }).unwrap();
    lun.durable()
}

#[test]
fn new_volumes_have_no_faults() {
    for block_size in [512, 1024, 2048, 4096] {
        for (journals, mib) in [(1, 20), (3, 200), (20, 400)] {
            let r = report(&fresh(block_size, journals, mib));
            assert!(r.is_clean(), "{block_size} {journals}: {:?}", r.faults);
            assert_eq!(r.inodes, u64::from(4 * journals) + 8);
        }
    }
}

#[test]
fn volumes_of_crashed_kernels_are_dirty_before_and_consistent_after_replay() {
    for (name, journals) in [
        ("k1-metadata-bs4096-1802", 1),
        ("k2-jdata-bs4096-1802", 1),
        ("k3-wrap-exhash-bs512-1801", 1),
        ("k4-orphans-bs1024-1802", 1),
        ("k5-two-dirty-journals-bs4096-1802", 2),
        ("k6-quota-bs4096-1802", 1),
        ("k7-truncate-revokes-bs512-1802", 1),
        ("k8-truncate-in-progress-bs512-1802", 1),
    ] {
        let before = report(&kernel_volume(name));
        let dirty = before.faults.iter().filter(|f| matches!(f, Fault::JournalDirty { .. })).count();
        assert_eq!(dirty, journals, "{name}");
        let image = replayed(name);
        let after = report(&image);
        assert!(after.is_consistent(), "{name}: {:?}", after.faults);
        let orphans = after.faults.iter().filter(|f| matches!(f, Fault::Orphan { .. })).count();
        assert_eq!(orphans, if name.starts_with("k4") { 3 } else { 0 }, "{name}");
        let truncates = after.faults.iter().filter(|f| matches!(f, Fault::TruncateUnfinished { .. })).count();
        assert_eq!(truncates, usize::from(name.starts_with("k8")), "{name}");
        if has_tool("fsck.gfs2") {
            let theirs = fsck(&image);
            assert_eq!(after.is_clean(), theirs.is_clean(), "{name}: {:?}\n{}", after.faults, theirs.text);
        }
    }
}

/// An image that can be edited block by block.
struct Editor {
    image: Image,
    geo: Geometry,
}

impl Editor {
    fn new(image: Image) -> Self {
        let lun = MemLun::from_image(image.clone(), 512);
        let geo = Reader::open(&as_lun(&lun)).unwrap().geometry();
        Self { image, geo }
    }

    fn block(&self, at: u64) -> Vec<u8> {
        let mut b = vec![0; self.geo.block_size as usize];
        self.image.read(self.geo.byte(at).unwrap(), &mut b);
        b
    }

    fn edit(&mut self, at: u64, change: impl FnOnce(&mut [u8])) {
        let mut b = self.block(at);
        change(&mut b);
        self.image.write(self.geo.byte(at).unwrap(), &b);
    }

    fn reader(&self) -> Reader {
        Reader::open(&as_lun(&MemLun::from_image(self.image.clone(), 512))).unwrap()
    }

    fn path(&self, path: &str) -> u64 {
        self.reader().lookup(path).unwrap().addr.0
    }

    fn system(&self, name: &str) -> u64 {
        let reader = self.reader();
        let (dir, leaf) = name.rsplit_once('/').unwrap_or(("", name));
        let mut at = reader.superblock().master.addr;
        for part in dir.split('/').filter(|p| !p.is_empty()) {
            at = reader.entries(at).unwrap()[part.as_bytes()].addr;
        }
        reader.entries(at).unwrap()[leaf.as_bytes()].addr.0
    }

    fn root(&self) -> u64 {
        self.reader().superblock().root.addr.0
    }

    fn inode(&mut self, at: u64, change: impl FnOnce(&mut Dinode)) {
        self.edit(at, |b| {
            let mut di = Dinode::decode(b).unwrap();
            change(&mut di);
            di.encode(b);
        });
    }

    fn rgrp(&mut self, index: usize, change: impl FnOnce(&mut Rgrp)) {
        let at = self.reader().rindex().unwrap()[index].addr;
        self.edit(at, |b| {
            let mut rg = Rgrp::decode(b).unwrap();
            change(&mut rg);
            rg.encode(b);
        });
    }

    /// Set a block's state in its bitmap; the counters of the group follow.
    fn state(&mut self, block: u64, state: BlockState) {
        let entry = *self.reader().rindex().unwrap().iter().find(|e| e.contains(block)).unwrap();
        let (part, k) = entry.locate(&self.geo, (block - entry.data0) as u32);
        let part = entry.part(&self.geo, part);
        let mut old = BlockState::Free;
        self.edit(part.block, |b| {
            let bits = &mut b[part.offset..part.offset + part.bytes];
            old = bitmap::get(bits, k);
            bitmap::set(bits, k, state);
        });
        self.edit(entry.addr, |b| {
            let mut rg = Rgrp::decode(b).unwrap();
            let dinode = |s| matches!(s, BlockState::Dinode | BlockState::Unlinked);
            rg.free = rg.free + u32::from(state == BlockState::Free) - u32::from(old == BlockState::Free);
            rg.dinodes = rg.dinodes + u32::from(dinode(state)) - u32::from(dinode(old));
            rg.encode(b);
        });
    }

    fn free_block(&self) -> u64 {
        for e in self.reader().rindex().unwrap() {
            for part in e.parts(&self.geo) {
                let b = self.block(part.block);
                let bits = &b[part.offset..part.offset + part.bytes];
                if let Some(k) = bitmap::find(bits, 0, part.bytes * 4, BlockState::Free) {
                    return e.data0 + u64::from(part.first) + k as u64;
                }
            }
        }
        panic!("no free block");
    }

    /// Byte of an entry in its directory's block, and that block.
    fn entry(&self, dir: u64, name: &str) -> (u64, usize) {
        let b = self.block(dir);
        let di = Dinode::decode(&b).unwrap();
        let blocks: Vec<(u64, usize)> = if di.is_exhash() {
            self.leaves(dir).into_iter().map(|l| (l, Leaf::SIZE)).collect()
        } else {
            vec![(dir, Dinode::SIZE)]
        };
        blocks
            .into_iter()
            .find_map(|(at, start)| {
                let b = self.block(at);
                Records::new(&b, start).flatten().find(|r| r.name == name.as_bytes()).map(|r| (at, r.offset))
            })
            .unwrap()
    }

    /// Leaves of a hashed directory, from its table (in the dinode, or one level of blocks below).
    fn leaves(&self, dir: u64) -> Vec<u64> {
        let b = self.block(dir);
        let di = Dinode::decode(&b).unwrap();
        let slots = 1usize << di.depth;
        let mut table: Vec<u64> = if di.height == 0 {
            (0..slots).map(|i| pointer_at(&b, Dinode::SIZE, i)).collect()
        } else {
            assert_eq!(di.height, 1);
            (0..)
                .map(|i| pointer_at(&b, Dinode::SIZE, i))
                .take_while(|&p| p != 0)
                .flat_map(|p| {
                    let jd = self.block(p);
                    (0..self.geo.jbsize() / 8).map(|i| u64_at(&jd, 24 + 8 * i)).collect::<Vec<_>>()
                })
                .take(slots)
                .collect()
        };
        table.dedup();
        table
    }

    fn first_pointer(&self, inode: u64) -> u64 {
        pointer_at(&self.block(inode), Dinode::SIZE, 0)
    }
}

/// Who must find a damage.
enum Fsck {
    Finds,
    /// fsck.gfs2 does not look at it; the reason.
    Blind(&'static str),
}

struct Damage {
    what: &'static str,
    change: fn(&mut Editor),
    finds: fn(&Fault) -> bool,
    fsck: Fsck,
}

macro_rules! damage {
    ($what:literal, $fsck:expr, $finds:pat, $change:expr) => {
        Damage { what: $what, change: $change, finds: |f| matches!(f, $finds), fsck: $fsck }
    };
}

/// On a volume of 4096-byte blocks with files of several heights, links, attributes and linear directories.
const DAMAGES: &[Damage] = &[
    damage!("rg_free one too high", Fsck::Finds, Fault::RgrpFree { .. }, |e| e.rgrp(1, |rg| rg.free += 1)),
    damage!("rg_dinodes one too low", Fsck::Finds, Fault::RgrpDinodes { .. }, |e| e
        .rgrp(1, |rg| rg.dinodes -= 1)),
    damage!("stale rg_crc", Fsck::Finds, Fault::RgrpHeader { .. }, |e| {
        let at = e.reader().rindex().unwrap()[1].addr;
        e.edit(at, |b| put_u32(b, 64, u32_at(b, 64) ^ 1));
    }),
    damage!("resource group header without magic", Fsck::Finds, Fault::RgrpHeader { .. }, |e| {
        let at = e.reader().rindex().unwrap()[1].addr;
        e.edit(at, |b| put_u32(b, 0, 0));
    }),
    damage!(
        "rg_data0 differs from the index",
        Fsck::Blind("reads the index only"),
        Fault::RgrpCopy { .. },
        |e| e.rgrp(1, |rg| rg.data0 += 1)
    ),
    damage!("a leaked block", Fsck::Finds, Fault::Bitmap { .. }, |e| {
        let b = e.free_block();
        e.state(b, BlockState::Used);
    }),
    damage!("a used block called free", Fsck::Finds, Fault::Bitmap { .. }, |e| {
        let b = e.first_pointer(e.path("d/big"));
        e.state(b, BlockState::Free);
    }),
    damage!("a free block called unlinked dinode", Fsck::Finds, Fault::Dinode { .. }, |e| {
        let b = e.free_block();
        e.state(b, BlockState::Unlinked);
    }),
    damage!("a live inode called unlinked", Fsck::Finds, Fault::Dangling { .. }, |e| {
        let b = e.path("ack");
        e.state(b, BlockState::Unlinked);
    }),
    damage!("a live inode called free", Fsck::Finds, Fault::Dangling { .. }, |e| {
        let b = e.path("ack");
        e.state(b, BlockState::Free);
    }),
    damage!("dinode without magic", Fsck::Finds, Fault::Dinode { .. }, |e| {
        let b = e.path("ack");
        e.edit(b, |b| put_u32(b, 0, 0));
    }),
    damage!("wrong own address", Fsck::Finds, Fault::Dinode { .. }, |e| {
        let b = e.path("ack");
        e.inode(b, |di| di.num.addr.0 += 1);
    }),
    damage!("mode without a type", Fsck::Finds, Fault::Mode { .. }, |e| {
        let b = e.path("ack");
        e.inode(b, |di| di.mode = 0o644);
    }),
    damage!("goal 0", Fsck::Finds, Fault::Goal { .. }, |e| {
        let b = e.path("ack");
        e.inode(b, |di| di.goal_meta = 0);
    }),
    damage!("di_blocks too high", Fsck::Finds, Fault::BlockCount { .. }, |e| {
        let b = e.path("d/big");
        e.inode(b, |di| di.blocks += 1);
    }),
    damage!(
        "stuffed file longer than a dinode",
        Fsck::Blind("looks at no size"),
        Fault::Dinode { .. },
        |e| {
            let b = e.path("ack");
            e.inode(b, |di| di.size = 3865);
        }
    ),
    damage!("height beyond the maximum", Fsck::Finds, Fault::Dinode { .. }, |e| {
        let b = e.path("ack");
        e.inode(b, |di| di.height = 9);
    }),
    damage!("a pointer beyond the device", Fsck::Finds, Fault::Pointer { .. }, |e| {
        let b = e.path("d/big");
        e.edit(b, |b| put_pointer(b, Dinode::SIZE, 1, 1 << 40));
    }),
    damage!("a pointer to a resource group header", Fsck::Finds, Fault::Pointer { .. }, |e| {
        let rg = e.reader().rindex().unwrap()[1].addr;
        let b = e.path("d/big");
        e.edit(b, |b| put_pointer(b, Dinode::SIZE, 1, rg));
    }),
    damage!("two files share a block", Fsck::Finds, Fault::Duplicate { .. }, |e| {
        let shared = e.first_pointer(e.path("d/over"));
        let b = e.path("d/big");
        e.edit(b, |b| put_pointer(b, Dinode::SIZE, 1, shared));
    }),
    damage!("link count too high", Fsck::Finds, Fault::LinkCount { .. }, |e| {
        let b = e.path("e/hard");
        e.inode(b, |di| di.nlink += 1);
    }),
    damage!("directory link count too low", Fsck::Finds, Fault::LinkCount { .. }, |e| {
        let b = e.path("e");
        e.inode(b, |di| di.nlink -= 1);
    }),
    damage!("di_entries too low", Fsck::Finds, Fault::DirEntries { .. }, |e| {
        let b = e.path("d");
        e.inode(b, |di| di.entries -= 1);
    }),
    damage!("size of a linear directory", Fsck::Blind("looks at no size"), Fault::DirSize { .. }, |e| {
        let b = e.path("d");
        e.inode(b, |di| di.size = 17);
    }),
    damage!("wrong hash of a name", Fsck::Finds, Fault::EntryHash { .. }, |e| {
        let (b, o) = e.entry(e.path("d"), "full");
        e.edit(b, |b| put_u32(b, o + 16, u32_at(b, o + 16) ^ 0x100));
    }),
    damage!("entry type differs from the inode", Fsck::Finds, Fault::EntryType { .. }, |e| {
        let (b, o) = e.entry(e.path("d"), "full");
        e.edit(b, |b| put_u16(b, o + 24, 4));
    }),
    damage!("entry leads beyond the device", Fsck::Finds, Fault::Dangling { .. }, |e| {
        let (b, o) = e.entry(e.path("d"), "full");
        e.edit(b, |b| put_u64(b, o + 8, 1 << 40));
    }),
    damage!("wrong formal number of a directory's entry", Fsck::Finds, Fault::EntryFormal { .. }, |e| {
        let (b, o) = e.entry(e.path("e"), "moved");
        e.edit(b, |b| put_u64(b, o, u64_at(b, o) + 5));
    }),
    damage!(
        "wrong formal number of a file's entry",
        Fsck::Blind("compares it for directories and files of several names"),
        Fault::EntryFormal { .. },
        |e| {
            let (b, o) = e.entry(e.path("d"), "full");
            e.edit(b, |b| put_u64(b, o, u64_at(b, o) + 5));
        }
    ),
    damage!("record of length 0", Fsck::Finds, Fault::DirRecord { .. }, |e| {
        let (b, o) = e.entry(e.path("d"), "full");
        e.edit(b, |b| put_u16(b, o + 20, 0));
    }),
    damage!("empty record in the middle", Fsck::Finds, Fault::DirRecord { .. }, |e| {
        let (b, o) = e.entry(e.path("d"), "full");
        e.edit(b, |b| put_u64(b, o + 8, 0));
    }),
    damage!(
        "`..` leads elsewhere",
        Fsck::Blind("sees it, says so, and exits with 0"),
        Fault::DotDotTarget { .. },
        |e| {
            let other = e.path("d");
            let (b, o) = e.entry(e.path("e/moved"), "..");
            e.edit(b, |b| put_u64(b, o + 8, other));
        }
    ),
    damage!("`.` leads elsewhere", Fsck::Finds, Fault::DotTarget { .. }, |e| {
        let other = e.path("d");
        let (b, o) = e.entry(e.path("e/moved"), ".");
        e.edit(b, |b| put_u64(b, o + 8, other));
    }),
    damage!("an inode without a name", Fsck::Finds, Fault::Unreferenced { .. }, |e| {
        // the record before takes its room
        let dir = e.path("d");
        let (b, o) = e.entry(dir, "full");
        let block = e.block(b);
        let before =
            Records::new(&block, Dinode::SIZE).flatten().take_while(|r| r.offset < o).last().unwrap();
        let (at, len) = (before.offset, before.head.rec_len);
        e.edit(b, |b| {
            let more = gfs::ondisk::u16_at(b, o + 20);
            put_u16(b, at + 20, len + more);
        });
        e.inode(dir, |di| di.entries -= 1);
    }),
    damage!("attribute of unknown type", Fsck::Finds, Fault::ExtAttr { .. }, |e| {
        let b = e.path("d/big");
        let ea = Dinode::decode(&e.block(with_attributes(e).unwrap_or(b))).unwrap().eattr;
        e.edit(ea, |b| b[24 + 9] = 9);
    }),
    damage!("attribute record too long", Fsck::Finds, Fault::ExtAttr { .. }, |e| {
        let ea = Dinode::decode(&e.block(with_attributes(e).unwrap())).unwrap().eattr;
        e.edit(ea, |b| put_u32(b, 24, 1 << 20));
    }),
    damage!("attribute block outside the device", Fsck::Finds, Fault::Pointer { .. }, |e| {
        let inode = with_attributes(e).unwrap();
        e.inode(inode, |di| di.eattr = 1 << 40);
    }),
    damage!("master totals", Fsck::Finds, Fault::Statfs { .. }, |e| {
        let b = e.system("statfs");
        e.edit(b, |b| put_u64(b, Dinode::SIZE + 8, 5));
    }),
    damage!(
        "totals left in a statfs_change file",
        Fsck::Blind("ignores these files"),
        Fault::StatfsDelta { .. },
        |e| {
            let b = e.system("per_node/statfs_change0");
            e.edit(b, |b| put_u64(b, Dinode::SIZE + 8, 5));
        }
    ),
    damage!("quota_change block without header", Fsck::Finds, Fault::SystemFile { .. }, |e| {
        let b = e.first_pointer(e.system("per_node/quota_change0"));
        e.edit(b, |b| put_u32(b, 0, 0));
    }),
    damage!("rindex entry with impossible length", Fsck::Finds, Fault::Rindex { .. }, |e| {
        let b = e.system("rindex");
        e.edit(b, |b| put_u32(b, Dinode::SIZE + 96 + 8, 0));
    }),
    damage!("unfinished truncate", Fsck::Blind("ignores the flag"), Fault::TruncateUnfinished { .. }, |e| {
        let b = e.path("d/big");
        e.inode(b, |di| di.flags |= 0x2000_0000);
    }),
    damage!("superblock of an unknown format", Fsck::Finds, Fault::Superblock { .. }, |e| {
        let sb = e.geo.sb_block();
        e.edit(sb, |b| put_u32(b, 24, 1803));
    }),
    damage!("root directory is not there", Fsck::Finds, Fault::System { .. }, |e| {
        let root = e.root();
        e.edit(root, |b| put_u32(b, 4, 5));
    }),
];

fn with_attributes(e: &Editor) -> Option<u64> {
    let nodes = e.reader().tree().unwrap();
    nodes.iter().find(|n| n.dinode.eattr != 0 && n.dinode.flags & 8 == 0).map(|n| n.dinode.num.addr.0)
}

/// On a volume of 512-byte blocks with a hashed directory whose table has blocks of its own.
const HASHED_DAMAGES: &[Damage] = &[
    damage!("lf_entries too high", Fsck::Finds, Fault::LeafEntries { .. }, |e| {
        let leaf = e.leaves(e.path("many"))[3];
        e.edit(leaf, |b| put_u16(b, 26, gfs::ondisk::u16_at(b, 26) + 1));
    }),
    damage!("lf_depth too low", Fsck::Finds, Fault::LeafDepth { .. }, |e| {
        let leaf = e.leaves(e.path("many"))[3];
        e.edit(leaf, |b| put_u16(b, 24, gfs::ondisk::u16_at(b, 24) - 1));
    }),
    damage!("leaf without magic", Fsck::Finds, Fault::DirRecord { .. }, |e| {
        let leaf = e.leaves(e.path("many"))[3];
        e.edit(leaf, |b| put_u32(b, 0, 0));
    }),
    damage!("a chain that returns to its start", Fsck::Finds, Fault::Duplicate { .. }, |e| {
        let leaf = e.leaves(e.path("many"))[3];
        e.edit(leaf, |b| put_u64(b, 32, leaf));
    }),
    damage!(
        "a slot leads to another leaf",
        Fsck::Finds,
        Fault::HashTable { .. } | Fault::Duplicate { .. },
        |e| {
            let dir = e.path("many");
            let leaves = e.leaves(dir);
            let table = e.first_pointer(dir);
            e.edit(table, |b| put_u64(b, 24, leaves[5]));
        }
    ),
    damage!("hash table block without header", Fsck::Finds, Fault::TreeBlock { .. }, |e| {
        let table = e.first_pointer(e.path("many"));
        e.edit(table, |b| put_u32(b, 4, 5));
    }),
];

fn run(damages: &[Damage], image: &Image) {
    let clean = report(image);
    assert!(clean.is_clean(), "{:?}", clean.faults);
    let judge = has_tool("fsck.gfs2");
    let mut wrong = Vec::new();
    for d in damages {
        let mut editor = Editor::new(image.clone());
        (d.change)(&mut editor);
        let ours = report(&editor.image);
        if !ours.faults.iter().any(d.finds) {
            wrong.push(format!("{}: not found here: {:?}", d.what, ours.faults));
        }
        if !judge {
            continue;
        }
        let theirs = fsck(&editor.image);
        match d.fsck {
            Fsck::Finds if theirs.is_clean() => {
                wrong.push(format!("{}: not found by fsck.gfs2: {}", d.what, theirs.text));
            }
            Fsck::Blind(why) if !theirs.is_clean() => {
                wrong.push(format!("{}: fsck.gfs2 does find it ({why}?): {}", d.what, theirs.text));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn every_damage_of_the_table_is_found() {
    run(DAMAGES, &replayed("k1-metadata-bs4096-1802"));
}

#[test]
fn damage_to_hashed_directories_is_found() {
    run(HASHED_DAMAGES, &replayed("k3-wrap-exhash-bs512-1801"));
}

#[test]
fn reports_can_be_read_by_programs() {
    let mut editor = Editor::new(fresh(4096, 1, 20));
    editor.rgrp(1, |rg| rg.free += 1);
    let r = report(&editor.image);
    let json = serde_json::to_value(&r).unwrap();
    assert_eq!(json["faults"][0]["fault"], "RgrpFree");
    assert!(r.faults.iter().all(|f| !f.to_string().is_empty()));
    assert_eq!(r.faults[0].severity(), Severity::Damage);
}

#[test]
fn random_damage_to_volumes_never_panics_or_hangs() {
    let seed = std::env::var("CAIRN_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x63_6865_636b_u64);
    let rounds = std::env::var("CAIRN_FUZZ_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    eprintln!("CAIRN_SEED={seed}");
    let mut rng = cairn_base::Rng::new(seed);
    for name in ["k1-metadata-bs4096-1802", "k3-wrap-exhash-bs512-1801"] {
        let image = replayed(name);
        let editor = Editor::new(image.clone());
        // blocks with structure: those that begin with the magic number, journals left out
        let bsize = u64::from(editor.geo.block_size);
        let typed: Vec<u64> = (editor.geo.sb_block()..image.size() / bsize)
            .filter(|&b| {
                let mut head = [0; 8];
                image.read(b * bsize, &mut head);
                u32_at(&head, 0) == 0x0116_1970 && u32_at(&head, 4) != 8
            })
            .collect();
        for _ in 0..rounds {
            let mut image = image.clone();
            for _ in 0..=rng.below(6) {
                let block = typed[rng.below(typed.len() as u64) as usize];
                let at = if rng.chance(1, 2) { rng.below(300) } else { rng.below(bsize) };
                let n = (1 + rng.below(9)).min(bsize - at);
                let bytes: Vec<u8> = match rng.below(3) {
                    0 => vec![0; n as usize],
                    1 => vec![0xff; n as usize],
                    _ => (0..n).map(|_| rng.below(256) as u8).collect(),
                };
                image.write(block * bsize + at, &bytes);
            }
            let lun = as_lun(&MemLun::from_image(image, 512));
            let _ = check(&lun).unwrap();
            if let Ok(reader) = Reader::open(&lun) {
                let _ = (reader.tree(), reader.statfs(), reader.rindex());
            }
        }
    }
}
