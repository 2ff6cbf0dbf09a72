//! Images, and the programs of gfs2-utils that judge them.

use gfs::BlockNo;
use gfs::reader::Reader;
use lun::Lun;
use lun::image::Image;
use lun::mem::MemLun;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// An empty in-memory LUN.
pub(crate) fn blank(size: u64) -> MemLun {
    MemLun::new(size, 512)
}

pub(crate) fn as_lun(lun: &MemLun) -> Lun {
    Arc::new(lun.clone())
}

/// Is the program there? Without it the test fails, unless `CAIRN_ORACLES=optional` says that this is fine.
pub(crate) fn has_tool(name: &str) -> bool {
    let found = Command::new(name).arg("-V").output().is_ok();
    if !found {
        let optional = std::env::var("CAIRN_ORACLES").is_ok_and(|v| v == "optional");
        assert!(optional, "{name} is missing (package gfs2-utils); CAIRN_ORACLES=optional skips");
        eprintln!("skipped: package gfs2-utils missing");
    }
    found
}

/// What `fsck.gfs2` said.
pub(crate) struct Fsck {
    pub(crate) code: Option<i32>,
    pub(crate) text: String,
}

impl Fsck {
    /// Exit code 0 and no complaint: the exit code alone says "clean" of a dirty journal.
    pub(crate) fn is_clean(&self) -> bool {
        self.code == Some(0) && !["dirty", "corrupt", "bitmap says"].iter().any(|w| self.text.contains(w))
    }
}

pub(crate) fn fsck_path(path: &Path, flag: &str) -> Fsck {
    // it loops forever on some damaged directories; a verdict that does not come is not "clean"
    let out = Command::new("timeout")
        .args(["-k", "1", "20", "fsck.gfs2", flag])
        .arg(path)
        .output()
        .expect("timeout fsck.gfs2");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    Fsck { code: out.status.code(), text }
}

/// `fsck.gfs2 -n` on a copy.
pub(crate) fn fsck(image: &Image) -> Fsck {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("volume");
    image.save(&path).expect("save image");
    fsck_path(&path, "-n")
}

/// A volume left by a crashed Linux 6.1 kernel: `tests/vectors/kernel/NAME.img.zst` or `.img.xz`.
pub(crate) fn kernel_volume(name: &str) -> Image {
    let base = format!("{}/tests/vectors/kernel/{name}.img", env!("CARGO_MANIFEST_DIR"));
    let out = if Path::new(&format!("{base}.xz")).exists() {
        Command::new("xz").args(["-dc", &format!("{base}.xz")]).output()
    } else {
        Command::new("zstd").args(["-dqc", "--long=27", &format!("{base}.zst")]).output()
    };
    let out = out.expect("zstd or xz (packages zstd, xz-utils)");
    assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
    let mut image = Image::new(out.stdout.len() as u64);
    for (i, chunk) in out.stdout.chunks(4096).enumerate() {
        if chunk.iter().any(|&b| b != 0) {
            image.write(i as u64 * 4096, chunk);
        }
    }
    image
}

/// The listing of a tree that belongs to a kernel volume after replay.
pub(crate) fn kernel_tree(name: &str) -> Vec<String> {
    let path = format!("{}/tests/vectors/kernel/{name}.tree", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect(&path);
    text.lines().map(str::to_owned).collect()
}

/// SHA-256 of a file, for listings.
pub(crate) fn sha256(reader: &Reader, addr: BlockNo) -> gfs::Result<String> {
    let mut hash = Sha256::new();
    reader.read(addr, &mut |piece| hash.update(piece))?;
    Ok(hash.finalize().iter().fold(String::new(), |s, b| s + &format!("{b:02x}")))
}

pub(crate) fn listing(lun: &MemLun) -> Vec<String> {
    let mut lines = Reader::open(&as_lun(lun)).unwrap().listing(&mut sha256).unwrap();
    lines.sort();
    lines
}
