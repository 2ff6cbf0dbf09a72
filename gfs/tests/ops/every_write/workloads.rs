//! The workloads, by name. Small, so that every place in them can be tried; each about one thing.

use super::engine::Workload;
use super::run::{Run, bytes};
use gfs::BlockNo;
use gfs::JournalId;
use gfs::ops::{Fallocate, RenameMode, WriteMode};
use gfs::reader::Reader;
use lun::Lun;
use std::collections::BTreeSet;
use std::sync::Arc;

type Part = fn(&mut Run<'_>);

fn workload(name: &'static str, bsize: u32, setup: Part, body: Part) -> Workload {
    Workload { name, bsize, mib: 24, journaled: false, setup, body }
}

fn nothing(_: &mut Run<'_>) {}

fn sync_write() -> WriteMode {
    WriteMode { sync: true, ..WriteMode::default() }
}

// ---- files

pub(crate) fn create(bsize: u32) -> Workload {
    workload("create", bsize, nothing, |r| {
        r.create("a");
        r.create("b");
        r.fsync("a");
        r.create("c");
        r.checkpoint();
        r.create("d");
        r.fsync("d");
    })
}

pub(crate) fn create_write_fsync(bsize: u32) -> Workload {
    workload("create_write_fsync", bsize, nothing, |r| {
        for (name, len) in [("small", 100), ("medium", 5000), ("large", 40_000)] {
            r.create(name);
            r.write(name, 0, &bytes(len as u64, len));
            r.fsync(name);
        }
    })
}

pub(crate) fn write_without_fsync(bsize: u32) -> Workload {
    workload("write_without_fsync", bsize, nothing, |r| {
        r.create("a");
        r.write("a", 0, &bytes(1, 9000));
        r.create("b");
        r.write("b", 3000, &bytes(2, 7000));
        r.checkpoint();
        r.write("a", 9000, &bytes(3, 4000));
        r.checkpoint();
    })
}

pub(crate) fn overwrite_in_place(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 30_000));
    };
    workload("overwrite_in_place", bsize, setup, |r| {
        r.write("f", 4096, &bytes(2, 8192));
        r.fsync("f");
        r.write("f", 777, &bytes(3, 5000));
        r.create("other");
        r.write("f", 20_000, &bytes(4, 3000));
        r.fdatasync("f");
        r.write("f", 0, &bytes(5, 30_000));
        r.checkpoint();
    })
}

pub(crate) fn append_small_pieces(bsize: u32) -> Workload {
    workload(
        "append_small_pieces",
        bsize,
        |r| r.create("log"),
        |r| {
            let append = WriteMode { append: true, ..WriteMode::default() };
            for i in 0..14 {
                r.write_as("log", 0, &bytes(i, 700), append);
                match i % 4 {
                    1 => r.fsync("log"),
                    3 => r.checkpoint(),
                    _ => {}
                }
            }
        },
    )
}

/// Stuffed, then every height up to the one that 60 MB need.
pub(crate) fn tree_grows_in_height(bsize: u32) -> Workload {
    workload(
        "tree_grows_in_height",
        bsize,
        |r| r.create("f"),
        |r| {
            for (i, at) in [0usize, 200, 5000, 60_000, 3_000_000].into_iter().enumerate() {
                r.write("f", at, &bytes(i as u64, 150));
                if i % 2 == 1 {
                    r.fsync("f");
                }
            }
            r.checkpoint();
        },
    )
}

pub(crate) fn holes_filled_in_the_middle(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 300_000, &bytes(1, 1000));
    };
    workload("holes_filled_in_the_middle", bsize, setup, |r| {
        r.write("f", 100_000, &bytes(2, 10_000));
        r.fsync("f");
        r.write("f", 200_001, &bytes(3, 3000));
        r.write("f", 0, &bytes(4, 10));
        r.fsync("f");
    })
}

pub(crate) fn truncate_to_nothing(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 200_000));
        r.create("g");
        r.write("g", 0, &bytes(2, 90));
    };
    workload("truncate_to_nothing", bsize, setup, |r| {
        r.truncate("f", 0);
        r.fsync("f");
        r.truncate("g", 0);
        r.write("f", 0, &bytes(3, 3000));
        r.fsync("f");
    })
}

pub(crate) fn truncate_in_the_middle_of_the_tree(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 250_000));
        r.write("f", 2_000_000, &bytes(2, 20_000));
    };
    workload("truncate_in_the_middle_of_the_tree", bsize, setup, |r| {
        r.truncate("f", 1_000_000);
        r.fsync("f");
        r.truncate("f", 123_457);
        r.checkpoint();
        r.truncate("f", 33_000);
        r.fsync("f");
    })
}

pub(crate) fn truncate_up(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("empty");
        r.create("small");
        r.write("small", 0, &bytes(1, 60));
        r.create("large");
        r.write("large", 0, &bytes(2, 9001));
    };
    workload("truncate_up", bsize, setup, |r| {
        r.truncate("small", 150);
        r.truncate("small", 20_000);
        r.fsync("small");
        r.truncate("large", 500_000);
        r.truncate("empty", 3_000_000);
        r.fsync("empty");
        r.write("empty", 1_000_000, &bytes(3, 100));
        r.checkpoint();
    })
}

/// Shrinks and grows again: nothing of what was cut off comes back.
pub(crate) fn truncate_down_and_up(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 20_000));
    };
    workload("truncate_down_and_up", bsize, setup, |r| {
        r.truncate("f", 10_001);
        r.truncate("f", 18_000);
        r.fsync("f");
        r.truncate("f", 5);
        r.write("f", 9000, &bytes(2, 500));
        r.fsync("f");
    })
}

pub(crate) fn punch_holes(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 220_000));
        r.create("small");
        r.write("small", 0, &bytes(2, 100));
    };
    workload("punch_holes", bsize, setup, |r| {
        r.fallocate("f", Fallocate::PunchHole, 10_000, 30_000);
        r.fsync("f");
        r.fallocate("small", Fallocate::PunchHole, 10, 20);
        r.fallocate("f", Fallocate::PunchHole, 40_000, 150_001);
        r.write("f", 50_000, &bytes(3, 6000));
        r.fsync("f");
    })
}

pub(crate) fn allocate_ahead(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 100));
        r.create("g");
    };
    workload("allocate_ahead", bsize, setup, |r| {
        r.fallocate("f", Fallocate::Allocate, 0, 50_000);
        r.fsync("f");
        r.fallocate("g", Fallocate::KeepSize, 8192, 30_000);
        r.write("g", 9000, &bytes(2, 5000));
        r.fsync("g");
    })
}

pub(crate) fn sync_writes(bsize: u32) -> Workload {
    workload(
        "sync_writes",
        bsize,
        |r| r.create("f"),
        |r| {
            r.create("not synced itself");
            r.write_as("f", 0, &bytes(1, 3000), sync_write());
            r.write_as("f", 1000, &bytes(2, 3000), sync_write());
            r.write_as("f", 100_000, &bytes(3, 30), sync_write());
        },
    )
}

pub(crate) fn fdatasync_of_size_and_of_bytes(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 10_000));
    };
    workload("fdatasync_of_size_and_of_bytes", bsize, setup, |r| {
        r.write("f", 2000, &bytes(2, 3000));
        r.fdatasync("f");
        r.write("f", 10_000, &bytes(3, 5000));
        r.fdatasync("f");
        r.attributes("f", Some(0o600), None, Some(1_000_000_000));
        r.fdatasync("f");
    })
}

/// The way in which programs save: a new file, synced, over the old one.
pub(crate) fn write_new_and_rename_over(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        r.create("d/config");
        r.write("d/config", 0, &bytes(1, 6000));
    };
    workload("write_new_and_rename_over", bsize, setup, |r| {
        for i in 2..5 {
            r.create("d/new");
            r.write("d/new", 0, &bytes(i, 5000 + i as usize * 1000));
            r.fsync("d/new");
            r.rename("d/new", "d/config", RenameMode::Replace);
        }
        r.fsync("d");
    })
}

/// JDATA: the contents go through the log, so that every write is atomic too.
pub(crate) fn journaled_data(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 20_000));
    };
    let body: Part = |r| {
        // blocks that look like metadata, which the log must escape
        let fake = |salt, len| [&0x0116_1970u32.to_be_bytes()[..], &bytes(salt, len)].concat();
        r.write("f", 3000, &bytes(2, 6000));
        r.write("f", 8192, &fake(3, 5000));
        r.fsync("f");
        r.write("f", 512 * 9, &fake(4, 900));
        r.truncate("f", 4000);
        r.checkpoint();
        r.unlink("f");
        r.reclaim();
        r.create("g");
        r.write("g", 0, &bytes(5, 20_000));
        r.fsync("g");
    };
    Workload { journaled: true, ..workload("journaled_data", bsize, setup, body) }
}

// ---- names

pub(crate) fn unlink(bsize: u32) -> Workload {
    let setup: Part = |r| {
        for (name, len) in [("empty", 0), ("small", 50), ("large", 150_000), ("stays", 10_000)] {
            r.create(name);
            r.write(name, 0, &bytes(len as u64, len));
        }
    };
    workload("unlink", bsize, setup, |r| {
        r.unlink("empty");
        r.unlink("large");
        r.fsync("stays");
        r.reclaim();
        r.unlink("small");
        r.syncfs();
    })
}

pub(crate) fn unlink_while_open(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.write("f", 0, &bytes(1, 60_000));
        r.create("g");
    };
    workload("unlink_while_open", bsize, setup, |r| {
        let f = r.at("f");
        r.node.open(f);
        r.unlink("f");
        r.syncfs();
        r.node.write(f, 70_000, &bytes(2, 100));
        r.fsync("g");
        r.node.fs.release(f);
        r.reclaim();
        r.syncfs();
    })
}

/// What a crash left: inodes without names, freed by the sweep after the mount.
pub(crate) fn orphans_swept(bsize: u32) -> Workload {
    let setup: Part = |r| {
        for i in 0..3 {
            let name = format!("f{i}");
            r.create(&name);
            r.write(&name, 0, &bytes(i, 30_000));
            r.node.open(r.at(&name));
            r.unlink(&name);
        }
        r.create("stays");
    };
    workload("orphans_swept", bsize, setup, |r| {
        for addr in r.open_without_name() {
            r.node.fs.release(addr);
        }
        r.node.fs.sweep_orphans().unwrap();
        r.fsync("stays");
    })
}

pub(crate) fn hard_links(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        r.create("f");
        r.write("f", 0, &bytes(1, 3000));
    };
    workload("hard_links", bsize, setup, |r| {
        r.link("f", "d/g");
        r.link("f", "h");
        r.fsync("f");
        r.unlink("f");
        r.write("h", 3000, &bytes(2, 2000));
        r.fsync("d/g");
        r.unlink("d/g");
        r.unlink("h");
        r.syncfs();
    })
}

pub(crate) fn symbolic_links(bsize: u32) -> Workload {
    workload(
        "symbolic_links",
        bsize,
        |r| r.mkdir("d"),
        |r| {
            r.symlink("short", b"d");
            r.symlink("d/long", &[b'x'; 200]);
            r.fsync("d");
            r.rename("short", "d/short", RenameMode::Replace);
            r.unlink("d/long");
            r.syncfs();
        },
    )
}

pub(crate) fn device_nodes(bsize: u32) -> Workload {
    workload("device_nodes", bsize, nothing, |r| {
        r.device("null", 0o020_000, (1, 3));
        r.device("disk", 0o060_000, (253, 70_000));
        r.syncfs();
        r.device("fifo", 0o010_000, (0, 0));
        r.device("socket", 0o140_000, (0, 0));
        r.unlink("disk");
        r.syncfs();
    })
}

pub(crate) fn make_and_remove_directories(bsize: u32) -> Workload {
    workload("make_and_remove_directories", bsize, nothing, |r| {
        r.mkdir("a");
        r.mkdir("a/b");
        r.create("a/b/f");
        r.fsync("a/b");
        r.mkdir("a/c");
        r.unlink("a/b/f");
        r.rmdir("a/b");
        r.syncfs();
        r.rmdir("a/c");
        r.rmdir("a");
        r.syncfs();
    })
}

pub(crate) fn attributes(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.mkdir("d");
    };
    workload("attributes", bsize, setup, |r| {
        r.attributes("f", Some(0o4711), None, None);
        r.attributes("d", None, Some((7, 8)), Some(1_234_567_890));
        r.fsync("d");
        r.attributes("f", None, Some((1, 2)), None);
        // a change of owner takes the privileges away
        r.attributes("f", Some(0o711), None, Some(-5));
        r.attributes("d", Some(0o1777), None, None);
        r.syncfs();
    })
}

pub(crate) fn rename_in_a_directory(bsize: u32) -> Workload {
    let setup: Part = |r| {
        for name in ["a", "b", "c"] {
            r.create(name);
        }
    };
    workload("rename_in_a_directory", bsize, setup, |r| {
        r.rename("a", "a longer name than before, which needs a place of its own", RenameMode::Replace);
        r.rename("b", "a", RenameMode::NoReplace);
        r.syncfs();
        r.rename("c", "b", RenameMode::Replace);
        r.checkpoint();
    })
}

pub(crate) fn rename_across_directories(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("x");
        r.mkdir("y");
        r.create("x/f");
        r.write("x/f", 0, &bytes(1, 5000));
        r.mkdir("x/sub");
        r.create("x/sub/in");
    };
    workload("rename_across_directories", bsize, setup, |r| {
        r.rename("x/f", "y/g", RenameMode::Replace);
        r.fsync("y");
        r.rename("x/sub", "y/sub", RenameMode::Replace);
        r.rename("y/g", "y/sub/g", RenameMode::Replace);
        r.syncfs();
        r.rename("y/sub", "sub", RenameMode::Replace);
        r.checkpoint();
    })
}

pub(crate) fn rename_over_a_target(bsize: u32) -> Workload {
    let setup: Part = |r| {
        for name in ["a", "b", "c"] {
            r.create(name);
            r.write(name, 0, &bytes(name.len() as u64, 20_000));
        }
        r.link("c", "c2");
        r.mkdir("full");
        r.create("full/x");
        r.mkdir("empty");
    };
    workload("rename_over_a_target", bsize, setup, |r| {
        r.rename("a", "b", RenameMode::Replace);
        r.syncfs();
        r.rename("b", "c", RenameMode::Replace);
        r.rename_fails("empty", "full", RenameMode::Replace, libc::ENOTEMPTY);
        r.rename("full", "empty", RenameMode::Replace);
        r.reclaim();
        r.syncfs();
    })
}

pub(crate) fn rename_noreplace(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("a");
        r.create("b");
        r.mkdir("d");
    };
    workload("rename_noreplace", bsize, setup, |r| {
        r.rename_fails("a", "b", RenameMode::NoReplace, libc::EEXIST);
        r.rename("a", "d/a", RenameMode::NoReplace);
        r.syncfs();
        r.rename_fails("b", "d/a", RenameMode::NoReplace, libc::EEXIST);
        r.rename("b", "c", RenameMode::NoReplace);
        r.checkpoint();
    })
}

pub(crate) fn rename_exchange(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("x");
        r.mkdir("y");
        r.create("x/f");
        r.write("x/f", 0, &bytes(1, 4000));
        r.symlink("y/l", b"somewhere");
        r.mkdir("x/d");
        r.create("x/d/in");
    };
    workload("rename_exchange", bsize, setup, |r| {
        r.rename("x/f", "y/l", RenameMode::Exchange);
        r.syncfs();
        r.rename("x/d", "y/l", RenameMode::Exchange);
        r.rename_fails("x", "x/nothing", RenameMode::Exchange, libc::ENOENT);
        r.fsync("x");
        r.rename("x", "y", RenameMode::Exchange);
        r.checkpoint();
    })
}

// ---- directories that grow

/// So long that a leaf holds few.
fn name_of(r: &Run<'_>, i: usize) -> String {
    format!("d/{i:0len$}", len = (r.bsize() as usize / 16).min(200))
}

fn fill(r: &mut Run<'_>, numbers: std::ops::Range<usize>) {
    for i in numbers {
        let name = name_of(r, i);
        r.create(&name);
    }
}

/// Enters names until the directory has this depth and the next one changes its shape again.
fn fill_until(r: &mut Run<'_>, reached: impl Fn(&Run<'_>) -> bool) -> usize {
    for i in 0.. {
        fill(r, i..i + 1);
        if reached(r) {
            return i + 1;
        }
    }
    unreachable!("the directory never gets there")
}

pub(crate) fn directory_becomes_hashed(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        let blocks = r.blocks("d");
        let n = fill_until(r, |r| r.blocks("d") > blocks);
        // back to the last linear moment: empty it, and fill a new one just not enough
        for i in 0..n {
            let name = name_of(r, i);
            r.unlink(&name);
        }
        r.rmdir("d");
        r.mkdir("d");
        fill(r, 0..n - 2);
    };
    workload("directory_becomes_hashed", bsize, setup, |r| {
        let first = r.tree().names.len() - 1;
        fill(r, first..first + 2);
        r.fsync("d");
        fill(r, first + 2..first + 4);
        r.checkpoint();
    })
}

pub(crate) fn leaf_splits(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        let blocks = r.blocks("d");
        fill_until(r, |r| r.blocks("d") > blocks + 1);
    };
    workload("leaf_splits", bsize, setup, |r| {
        let first = r.tree().names.len() - 1;
        let blocks = r.blocks("d");
        let mut i = first;
        while r.blocks("d") == blocks {
            fill(r, i..i + 1);
            i += 1;
        }
        r.fsync("d");
        fill(r, i..i + 2);
        r.checkpoint();
    })
}

/// Names whose hashes agree in their first bits.
fn colliding(bits: u32, count: usize) -> Vec<String> {
    let hash = |i: u64| crc32fast::hash(format!("c{i}").as_bytes()) >> (32 - bits);
    let want = hash(0);
    (0..).filter(|i| hash(*i) == want).map(|i| format!("d/c{i}")).take(count).collect()
}

/// Names that fit into one leaf.
fn names_per_leaf(r: &Run<'_>) -> usize {
    (r.bsize() as usize - 104) / 48
}

/// Out of the dinode too: a new table fills it.
pub(crate) fn hash_table_doubles(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        for name in &doubling_names(r)[..names_per_leaf(r)] {
            r.create(name);
        }
    };
    workload("hash_table_doubles", bsize, setup, |r| {
        let size = r.node.size(r.at("d"));
        let names = doubling_names(r);
        for name in &names[names_per_leaf(r)..] {
            r.create(name);
        }
        assert!(r.node.size(r.at("d")) >= 2 * size, "the table has not been doubled");
        r.fsync("d");
        r.unlink(&names[1]);
        r.checkpoint();
    })
}

fn doubling_names(r: &Run<'_>) -> Vec<String> {
    let depth = r.node.fs.volume().geometry().new_hash_depth();
    colliding(u32::from(depth) + 1, names_per_leaf(r) + 3)
}

pub(crate) fn chain_of_leaves(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        for name in colliding(17, 2 * names_per_leaf(r) - 1) {
            r.create(&name);
        }
    };
    // the table of greatest depth is the same in every block size, and large
    let bsize = bsize.min(512);
    let body: Part = |r| {
        let known = r.tree().names.len() - 1;
        let names = colliding(17, known + 3);
        let blocks = r.blocks("d");
        for name in &names[known..] {
            r.create(name);
        }
        assert_eq!(r.blocks("d"), blocks + 1, "one leaf more");
        r.fsync("d");
        r.unlink(&names[0]);
        r.unlink(&names[known]);
    };
    workload("chain_of_leaves", bsize, setup, body)
}

pub(crate) fn directory_emptied_and_removed(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        r.create("other");
        let blocks = r.blocks("d");
        fill_until(r, |r| r.blocks("d") > blocks + 2);
        let all: Vec<String> = r.tree().names.keys().filter(|n| n.starts_with("d/")).cloned().collect();
        for name in &all[3..] {
            r.unlink(name);
        }
    };
    workload("directory_emptied_and_removed", bsize, setup, |r| {
        let rest: Vec<String> = r.tree().names.keys().filter(|n| n.starts_with("d/")).cloned().collect();
        for name in &rest {
            r.unlink(name);
        }
        r.fsync("other");
        r.rmdir("d");
        r.reclaim();
        r.fsync("other");
        r.create("d2");
        r.checkpoint();
    })
}

// ---- space

/// Metadata blocks are freed and become data: their copies in the journal must never be replayed over it.
pub(crate) fn freed_metadata_becomes_data(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        let blocks = r.blocks("d");
        fill_until(r, |r| r.blocks("d") > blocks + 2);
        r.create("f");
    };
    workload("freed_metadata_becomes_data", bsize, setup, |r| {
        // all its blocks are in the journal now
        let names: Vec<String> = r.tree().names.keys().filter(|n| n.starts_with("d/")).cloned().collect();
        for name in &names {
            r.unlink(name);
        }
        r.syncfs();
        r.rmdir("d");
        r.reclaim();
        r.fsync("f");
        // the freed blocks lie below the goal of a file made now
        for i in 0..4 {
            let name = format!("g{i}");
            r.create(&name);
            r.write(&name, 0, &bytes(i, 30 * r.bsize() as usize));
        }
        r.syncfs();
        r.fsync("f");
    })
}

pub(crate) fn indirect_blocks_freed_and_reused(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        r.create("g");
    };
    workload("indirect_blocks_freed_and_reused", bsize, setup, |r| {
        for i in 0..3 {
            r.write("f", 0, &bytes(i, 40_000));
            r.fsync("f");
            r.truncate("f", 0);
            r.fsync("f");
            r.write("g", i as usize * 30_000, &bytes(i + 10, 30_000));
        }
        r.fsync("g");
    })
}

pub(crate) fn free_and_allocate_again(bsize: u32) -> Workload {
    let setup: Part = |r| {
        // little room: what is freed is what is given out next
        r.create("filler");
        let free = r.node.fs.statfs().unwrap().free as usize;
        let keep = 150;
        r.fallocate("filler", Fallocate::KeepSize, 0, (free - keep - free / 50) * r.bsize() as usize);
        r.create("a");
        r.write("a", 0, &bytes(1, 60 * r.bsize() as usize));
    };
    // a nearly full volume of small blocks takes a checker long
    let bsize = bsize.max(4096);
    workload("free_and_allocate_again", bsize, setup, |r| {
        for i in 2..4 {
            r.unlink("a");
            r.create("a");
            r.write("a", 0, &bytes(i, 60 * r.bsize() as usize));
        }
        r.fsync("a");
        r.checkpoint();
    })
}

/// Counters of the volume move between the deltas of the node and the master file.
pub(crate) fn totals_change(bsize: u32) -> Workload {
    workload(
        "totals_change",
        bsize,
        |r| r.create("keep"),
        |r| {
            for i in 0..3 {
                let name = format!("f{i}");
                r.create(&name);
                r.write(&name, 0, &bytes(i, 20_000));
                r.node.fs.volume().statfs_sync().unwrap();
                r.fsync(&name);
            }
            r.unlink("f1");
            r.reclaim();
            r.node.fs.volume().statfs_sync().unwrap();
            r.fsync("keep");
        },
    )
}

pub(crate) fn many_files_in_several_groups(bsize: u32) -> Workload {
    let part: Part = |r| {
        for d in 0..4 {
            r.mkdir(&format!("dir{d}"));
            for f in 0..3 {
                let name = format!("dir{d}/f{f}");
                r.create(&name);
                r.write(&name, 0, &bytes(d * 10 + f, 2000));
            }
            if d % 2 == 0 {
                r.syncfs();
            }
        }
        r.unlink("dir1/f1");
        r.rename("dir3/f0", "dir0/f9", RenameMode::Replace);
        r.syncfs();
    };
    Workload { mib: 100, ..workload("many_files_in_several_groups", bsize, nothing, part) }
}

pub(crate) fn big_file_over_several_groups(bsize: u32) -> Workload {
    let setup: Part = |r| {
        // the volume is full, but for a little in every group: the file must go from one to the next
        let mut made = 0;
        while r.node.fs.statfs().unwrap().free * u64::from(r.bsize()) > 3 << 19 {
            let name = format!("f{made}");
            r.create(&name);
            r.fallocate(&name, Fallocate::KeepSize, 0, 1 << 20);
            made += 1;
        }
        for i in (0..made).step_by(made / 6) {
            r.unlink(&format!("f{i}"));
        }
        r.create("big");
    };
    let body: Part = |r| {
        let piece = 256 << 10;
        for i in 0..14 {
            r.write("big", i * piece, &bytes(i as u64, piece));
            if i % 4 == 3 {
                r.fsync("big");
            }
        }
        let groups = r.groups_of_blocks("big");
        assert!(groups > 1, "the file lies in {groups} group");
        r.truncate("big", piece + 17);
        r.fsync("big");
    };
    // a nearly full volume of small blocks takes a checker long
    Workload { mib: 100, ..workload("big_file_over_several_groups", bsize.max(4096), setup, body) }
}

/// The journal's end is reached and its beginning overwritten.
pub(crate) fn journal_wraps(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.mkdir("d");
        r.create("d/f");
        r.write("d/f", 0, &bytes(1, 3000));
        r.advance_journal_to_its_end(14);
    };
    workload("journal_wraps", bsize, setup, |r| {
        for i in 0..8 {
            let name = format!("d/n{i}");
            r.create(&name);
            r.write(&name, 0, &bytes(i, 1500));
            r.fsync(&name);
            if i % 3 == 2 {
                r.unlink(&format!("d/n{}", i - 1));
            }
        }
        r.checkpoint();
    })
}

/// As much as one flush can hold: descriptors with many blocks, and revokes in blocks of their own.
pub(crate) fn one_large_flush(bsize: u32) -> Workload {
    let setup: Part = |r| {
        r.create("f");
        let blocks = 80;
        for i in 0..blocks {
            // every indirect block has one block of data
            r.write("f", i * 60 * r.bsize() as usize, &bytes(i as u64, 100));
        }
        r.create("g");
    };
    workload("one_large_flush", bsize, setup, |r| {
        for i in 0..40 {
            r.create(&format!("n{i}"));
        }
        r.truncate("f", 100);
        r.fsync("g");
    })
}

/// Two files, of which one is synced: the names made before are durable with it.
pub(crate) fn sync_of_one_file_orders_all_names(bsize: u32) -> Workload {
    workload(
        "sync_of_one_file_orders_all_names",
        bsize,
        |r| r.mkdir("d"),
        |r| {
            r.create("d/a");
            r.write("d/a", 0, &bytes(1, 10_000));
            r.create("b");
            r.write("b", 0, &bytes(2, 3000));
            r.fsync("b");
            r.rename("b", "d/b", RenameMode::Replace);
            r.link("d/a", "a2");
            r.fsync("d/a");
            r.unlink("d/a");
            r.checkpoint();
        },
    )
}

// ---- what workloads need besides

impl Run<'_> {
    pub(crate) fn bsize(&self) -> u32 {
        self.node.fs.volume().geometry().block_size
    }

    /// Blocks of the volume that an inode owns.
    fn blocks(&self, path: &str) -> u64 {
        self.node.attr(self.at(path)).blocks * 512 / u64::from(self.bsize())
    }

    /// In how many resource groups a file has blocks.
    fn groups_of_blocks(&self, path: &str) -> usize {
        let lun: Lun = Arc::new(self.lun());
        self.checkpoint();
        let reader = Reader::open(&lun).unwrap();
        let blocks = reader.file_blocks(self.at(path).addr).unwrap();
        let rgrps = self.node.fs.volume().rgrps().unwrap();
        let groups: BTreeSet<u64> =
            blocks.into_iter().filter_map(|b| rgrps.group_of(BlockNo(b))).map(|g| g.entry().addr).collect();
        groups.len()
    }

    fn reclaim(&self) {
        self.node.fs.reclaim();
    }

    /// Flushes until the head of the log is so many blocks from the journal's end.
    fn advance_journal_to_its_end(&mut self, rest: u32) {
        let lun: Lun = Arc::new(self.lun());
        let map = Reader::open(&lun).unwrap().journal_map(JournalId(0)).unwrap();
        let bsize = u64::from(self.bsize());
        let last: Vec<BlockNo> = (map.len() - rest..map.len()).map(|i| map.block(i)).collect();
        let mut mode = 0;
        loop {
            let from = self.events();
            mode = (mode + 1) & 0o777;
            self.attributes("d/f", Some(mode), None, None);
            self.fsync("d/f");
            let there = self.lun().log_since(from).iter().filter_map(|e| e.write()).any(|(offset, data)| {
                let blocks = offset / bsize..(offset + data.len() as u64) / bsize;
                last.iter().any(|b| blocks.contains(&b.0))
            });
            if there {
                return;
            }
        }
    }
}
