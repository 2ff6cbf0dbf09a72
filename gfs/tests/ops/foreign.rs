//! Volumes that Linux kernels left behind when they crashed: mounted, compared with what the kernel itself saw, used, emptied.

use crate::model::Rng;
use crate::rig::{Node, Rig, done, fsck};
use gfs::InodeNo;
use gfs::ops::WriteMode;
use lun::image::Image;
use lun::mem::MemLun;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;

const VOLUMES: [&str; 8] = [
    "k1-metadata-bs4096-1802",
    "k2-jdata-bs4096-1802",
    "k3-wrap-exhash-bs512-1801",
    "k4-orphans-bs1024-1802",
    "k5-two-dirty-journals-bs4096-1802",
    "k6-quota-bs4096-1802",
    "k7-truncate-revokes-bs512-1802",
    "k8-truncate-in-progress-bs512-1802",
];

fn base(name: &str) -> String {
    format!("{}/tests/vectors/kernel/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn volume(name: &str) -> Rig {
    let packed = format!("{}.img", base(name));
    let out = if Path::new(&format!("{packed}.xz")).exists() {
        Command::new("xz").args(["-dc", &format!("{packed}.xz")]).output()
    } else {
        Command::new("zstd").args(["-dqc", "--long=27", &format!("{packed}.zst")]).output()
    };
    let out = out.expect("zstd or xz");
    assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
    let mut image = Image::new(out.stdout.len() as u64);
    for (i, chunk) in out.stdout.chunks(4096).enumerate() {
        if chunk.iter().any(|b| *b != 0) {
            image.write(i as u64 * 4096, chunk);
        }
    }
    Rig { lun: MemLun::from_image(image, 512) }
}

fn listing(node: &Node, dir: InodeNo, path: &str, lines: &mut Vec<String>) {
    for name in node.names(dir, 100) {
        if name == "." || name == ".." {
            continue;
        }
        let at = format!("{path}{name}");
        let attr = node.get(dir, &name).unwrap();
        let ino = attr.ino;
        match attr.mode & 0o170_000 {
            0o040_000 => {
                let entries = node.names(ino, 1000).len();
                lines.push(format!("{at}/ dir {:o} {} {entries}", attr.mode & 0o7777, attr.nlink));
                listing(node, ino, &format!("{at}/"), lines);
            }
            0o100_000 => {
                let data = node.read(ino, 0, attr.size as usize + 1);
                let sum = Sha256::digest(&data).iter().fold(String::new(), |s, b| s + &format!("{b:02x}"));
                lines.push(format!("{at} file {:o} {} {} {sum}", attr.mode & 0o7777, attr.nlink, data.len()));
            }
            0o120_000 => {
                let target = String::from_utf8(done(node.fs.readlink(ino).unwrap())).unwrap();
                lines.push(format!("{at} other {:o} {target}", attr.mode));
            }
            _ => lines.push(format!("{at} other {:o} {:?}", attr.mode, attr.rdev)),
        }
    }
}

fn all(node: &Node) -> Vec<String> {
    let mut lines = Vec::new();
    listing(node, node.root(), "", &mut lines);
    lines.sort();
    lines
}

#[test]
fn volumes_of_crashed_kernels_show_what_the_kernel_showed_and_end_clean() {
    for name in VOLUMES {
        let rig = volume(name);
        let node = rig.mount();
        let text = std::fs::read_to_string(format!("{}.tree", base(name))).unwrap();
        let mut want: Vec<&str> = text.lines().collect();
        want.sort_unstable();
        assert_eq!(all(&node), want, "{name}");
        node.fs.sweep_orphans().unwrap();
        node.unmount();
        if name.starts_with("k8") {
            // finishes with the first exclusive use
            let node = rig.mount();
            let d = node.get(node.root(), "d").unwrap().ino;
            let f = node.get(d, "large").unwrap();
            done(node.fs.write(f.ino, f.size, b"x", WriteMode::default()).unwrap());
            assert_eq!(node.attr(f.ino).blocks, 202);
            node.unmount();
        }
        fsck(&rig.lun.durable());
    }
}

#[test]
fn files_of_kernels_are_changed_and_removed_without_a_trace() {
    let mut rng = Rng::new(5);
    for name in VOLUMES {
        let rig = volume(name);
        let node = rig.mount();
        scribble(&node, node.root(), &mut rng);
        let changed = all(&node);
        node.unmount();
        fsck(&rig.lun.durable());
        let node = rig.mount();
        assert_eq!(all(&node), changed, "{name}");
        remove_all(&node, node.root());
        node.unmount();
        fsck(&rig.lun.durable());
    }
}

/// Writes and truncates every file somewhere, journaled ones too, and adds names to every directory.
fn scribble(node: &Node, dir: InodeNo, rng: &mut Rng) {
    for name in node.names(dir, 100) {
        if name == "." || name == ".." {
            continue;
        }
        let attr = node.get(dir, &name).unwrap();
        let ino = attr.ino;
        match attr.mode & 0o170_000 {
            0o040_000 => scribble(node, ino, rng),
            0o100_000 => {
                let mut data = node.read(ino, 0, attr.size as usize);
                for _ in 0..3 {
                    let at = rng.below(attr.size + 20_000) as usize;
                    let bytes = vec![rng.next() as u8; 1 + rng.below(30_000) as usize];
                    node.write(ino, at as u64, &bytes);
                    data.resize(data.len().max(at + bytes.len()), 0);
                    data[at..at + bytes.len()].copy_from_slice(&bytes);
                    let size = rng.below(data.len() as u64 + 100);
                    if rng.below(3) == 0 {
                        node.truncate(ino, size);
                        data.resize(size as usize, 0);
                    }
                }
                assert!(node.read(ino, 0, data.len() + 1) == data, "{name}");
            }
            _ => {}
        }
    }
    for i in 0..20 {
        node.file(dir, &format!("added{i}"));
    }
}

fn remove_all(node: &Node, dir: InodeNo) {
    for name in node.names(dir, 100) {
        if name == "." || name == ".." {
            continue;
        }
        let attr = node.get(dir, &name).unwrap();
        if attr.mode & 0o170_000 == 0o040_000 {
            remove_all(node, attr.ino);
            done(node.fs.rmdir(dir, name.as_bytes()).unwrap());
        } else {
            done(node.fs.unlink(dir, name.as_bytes()).unwrap());
        }
    }
}
