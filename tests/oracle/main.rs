//! The outside judges, asked: volumes and journals of ours given to Linux's gfs2 and to fsck.gfs2, and theirs given to us.

use cairn_tests::oracle::kernel::{self, KernelOptions, KernelRun, Outcome, kernel_run};
use cairn_tests::oracle::{
    TREE_SCRIPT, fsck_gfs2, fsck_gfs2_repair, missing_utils, present, tree_digest, tree_lines,
};
use gfs::InodeNo;
use gfs::check::check;
use gfs::lockspace::local::LocalSpace;
use gfs::mkfs::{MkfsOptions, make};
use gfs::ondisk::dinode::Time;
use gfs::ops::{Caller, Fs, FsOptions, NewNode, RenameMode, SyncKind, WriteMode};
use gfs::reader::Reader;
use gfs::volume::{MountOptions, Volume};
use lun::Lun;
use lun::image::Image;
use lun::mem::{Keep, MemLun};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const NOW: Time = Time { sec: 1_800_000_000, nsec: 0 };
const ME: Caller = Caller { uid: 0, gid: 0 };

fn judges() -> bool {
    present(missing_utils().or_else(kernel::missing))
}

fn fresh(block_size: u32, journals: u32, mib: u64) -> Image {
    let lun = MemLun::new(mib << 20, 512);
    let options = MkfsOptions {
        lock_table: "oracle:volume".into(),
        journals,
        journal_mb: Some(8),
        block_size,
        ..MkfsOptions::default()
    };
    make(&as_lun(&lun), &options, &mut |_, _| {}).unwrap();
    lun.durable()
}

fn as_lun(lun: &MemLun) -> Lun {
    Arc::new(lun.clone())
}

/// An image as a file in a directory of its own.
struct Volumes(TempDir);

impl Volumes {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn save(&self, name: &str, image: &Image) -> PathBuf {
        let path = self.0.path().join(name);
        image.save(&path).unwrap();
        path
    }
}

fn run(image: &Path, script: &str) -> KernelRun {
    kernel_run(image, script, &KernelOptions::default()).unwrap()
}

/// The tree as our reader sees it in an image file.
fn our_tree(path: &Path) -> Vec<String> {
    let lun = as_lun(&MemLun::from_image(Image::load(path).unwrap(), 512));
    tree_digest(&Reader::open(&lun).unwrap()).unwrap()
}

fn assert_same(found: &[String], wanted: &[String], what: &str) {
    let not_in = |a: &[String], b: &[String]| -> Vec<String> {
        a.iter().filter(|l| !b.contains(l)).take(5).cloned().collect()
    };
    assert_eq!(not_in(found, wanted), not_in(wanted, found), "{what}: differing lines");
    assert_eq!(found.len(), wanted.len(), "{what}");
}

fn assert_clean(path: &Path, what: &str) {
    let verdict = fsck_gfs2(path);
    assert!(verdict.is_clean(), "{what}: fsck.gfs2 {:?}\n{}", verdict.code, verdict.text);
    let ours = check(&as_lun(&MemLun::from_image(Image::load(path).unwrap(), 512))).unwrap();
    assert!(ours.is_clean(), "{what}: {:?}", ours.faults);
}

/// Work with most kinds of operation, done by the kernel.
const WORK: &str = r"
set -e
mkdir -p d/sub e
echo stuffed > d/small
head -c 200000 /dev/zero | tr '\0' x > d/big
truncate -s 5000000 d/sparse; echo end >> d/sparse
ln d/big e/hard; ln -s /some/where d/link; mkfifo d/fifo; mknod d/null c 1 3
for i in $(seq 300); do echo $i > e/file-with-a-longer-name-$i; done
for i in $(seq 3 7 300); do rm e/file-with-a-longer-name-$i; done
mv d/sub e/moved; mv e/file-with-a-longer-name-1 d/small
truncate -s 100000 d/big; chmod 4750 d/small; chown 5:6 d/small
";

#[test]
fn the_kernel_uses_volumes_made_here() {
    if !judges() {
        return;
    }
    let volumes = Volumes::new();
    for block_size in [512, 1024, 2048, 4096] {
        let path = volumes.save("volume", &fresh(block_size, 2, 64));
        let script = format!("{WORK}\n{TREE_SCRIPT}");
        let theirs = run(&path, &script).expect_ok();
        let lines = tree_lines(&theirs.output);
        assert!(lines.len() > 250, "{}", theirs.output);
        assert_same(&our_tree(&path), &lines, &format!("block size {block_size}"));
        assert_clean(&path, &format!("block size {block_size}, after the kernel"));
    }
}

#[test]
fn three_judges_replay_a_crashed_kernels_journal_to_the_same_tree() {
    if !judges() {
        return;
    }
    let volumes = Volumes::new();
    for block_size in [512, 4096] {
        let path = volumes.save("crashed", &fresh(block_size, 1, 64));
        let crashed = run(&path, &format!("{WORK}\nsync d/big e/file-with-a-longer-name-2; crash-now"));
        assert_eq!(crashed.outcome, Outcome::Crashed, "{}{}", crashed.output, crashed.log);
        assert!(!fsck_gfs2(&path).is_clean(), "the journal must be dirty");
        let image = Image::load(&path).unwrap();

        let lun = MemLun::from_image(image.clone(), 512);
        let done = Reader::open(&as_lun(&lun)).unwrap().replay_all(NOW).unwrap();
        assert!(done[0].is_some_and(|d| d.metadata_replayed > 0), "{done:?}");
        let ours = volumes.save("ours", &lun.durable());

        let fsck = volumes.save("fsck", &image);
        fsck_gfs2_repair(&fsck);

        let kernel = volumes.save("kernel", &image);
        let lines = tree_lines(&run(&kernel, TREE_SCRIPT).expect_ok().output);
        assert!(lines.len() > 250, "{lines:?}");

        assert_same(&our_tree(&ours), &lines, &format!("block size {block_size}: ours"));
        assert_same(&our_tree(&fsck), &lines, &format!("block size {block_size}: fsck.gfs2"));
        assert_same(&our_tree(&kernel), &lines, &format!("block size {block_size}: kernel"));
        assert_clean(&ours, "replayed here");
        assert_clean(&kernel, "replayed by the kernel");
        // the kernel goes on where our replay ended
        run(&ours, "echo more > after; rm -r e; sync").expect_ok();
        assert_clean(&ours, "used by the kernel after our replay");
    }
}

/// Work with most kinds of operation, done by our file system. Everything before the last fsync is acknowledged.
fn work(fs: &Fs) {
    let root = fs.root();
    let file = |dir: InodeNo, name: &str| {
        fs.mknod(ME, dir, name.as_bytes(), 0o644, NewNode::File).unwrap().value.ino
    };
    let write = |ino: InodeNo, at: u64, data: &[u8]| {
        drop(fs.write(ino, at, data, WriteMode::default()).unwrap());
    };
    let d = fs.mkdir(ME, root, b"d", 0o755).unwrap().value.ino;
    let e = fs.mkdir(ME, root, b"e", 0o700).unwrap().value.ino;
    write(file(d, "small"), 0, b"stuffed\n");
    let big = file(d, "big");
    write(big, 0, &vec![b'x'; 200_000]);
    write(file(d, "sparse"), 4_999_999, b"end");
    drop(fs.symlink(ME, d, b"link", b"/some/where").unwrap());
    drop(fs.link(big, e, b"hard").unwrap());
    for i in 0..300 {
        write(file(e, &format!("file-with-a-longer-name-{i}")), 0, format!("{i}\n").as_bytes());
    }
    for i in (3..300).step_by(7) {
        drop(fs.unlink(e, format!("file-with-a-longer-name-{i}").as_bytes()).unwrap());
    }
    let (old, new) = (b"file-with-a-longer-name-1", b"small");
    drop(fs.rename(e, old, d, new, RenameMode::Replace).unwrap());
    fs.fsync(big, SyncKind::All).unwrap();
}

fn mount(lun: &MemLun) -> Arc<Fs> {
    let volume = Volume::mount(as_lun(lun), LocalSpace::new(), MountOptions::default()).unwrap();
    Fs::new(volume, FsOptions::default())
}

#[test]
fn kernel_and_fsck_replay_journals_written_here() {
    if !judges() {
        return;
    }
    let volumes = Volumes::new();
    for block_size in [1024, 4096] {
        let lun = MemLun::from_image(fresh(block_size, 1, 64), 512);
        let fs = mount(&lun);
        work(&fs);
        // power is cut: once with everything that was not flushed lost, once with all of it on the disk
        let point = lun.crash_point();
        let images = [Keep::Nothing, Keep::Everything].map(|keep| point.image(&keep));
        fs.stop().unwrap();
        fs.volume().unmount().unwrap();
        for (i, image) in images.iter().enumerate() {
            let what = format!("block size {block_size}, crash {i}");
            let again = MemLun::from_image(image.clone(), 512);
            let done = Reader::open(&as_lun(&again)).unwrap().replay_all(NOW).unwrap();
            assert!(done[0].is_some(), "{what}: the journal must be dirty");
            let ours = volumes.save("ours", &again.durable());
            let fsck = volumes.save("fsck", image);
            fsck_gfs2_repair(&fsck);
            let kernel = volumes.save("kernel", image);
            let lines = tree_lines(&run(&kernel, TREE_SCRIPT).expect_ok().output);
            assert!(lines.len() > 250, "{what}: {lines:?}");
            assert_same(&our_tree(&ours), &lines, &format!("{what}: ours"));
            assert_same(&our_tree(&fsck), &lines, &format!("{what}: fsck.gfs2"));
            // unlinked files that the crash caught before they were freed are all that may be left to do
            for path in [&ours, &kernel] {
                let lun = MemLun::from_image(Image::load(path).unwrap(), 512);
                let report = check(&as_lun(&lun)).unwrap();
                assert!(report.is_consistent(), "{what}: {:?}", report.faults);
                let fs = mount(&lun);
                fs.stop().unwrap();
                fs.volume().unmount().unwrap();
                let swept = volumes.save("swept", &lun.durable());
                assert_clean(&swept, &what);
                assert_same(&our_tree(&swept), &lines, &format!("{what}: swept"));
            }
            assert!(fsck_gfs2(&fsck).is_clean(), "{what}: repaired by fsck.gfs2");
        }
    }
}

#[test]
fn the_kernel_goes_on_with_a_volume_used_here_and_we_after_it() {
    if !judges() {
        return;
    }
    let volumes = Volumes::new();
    let lun = MemLun::from_image(fresh(4096, 1, 64), 512);
    let fs = mount(&lun);
    work(&fs);
    fs.stop().unwrap();
    fs.volume().unmount().unwrap();
    let path = volumes.save("volume", &lun.durable());
    assert_clean(&path, "after our unmount");
    let before = our_tree(&path);
    let script = format!("{TREE_SCRIPT}\nrm -r d; mv e f; echo kernel > f/k");
    assert_same(&tree_lines(&run(&path, &script).expect_ok().output), &before, "seen by the kernel");
    assert_clean(&path, "after the kernel");

    let lun = MemLun::from_image(Image::load(&path).unwrap(), 512);
    let fs = mount(&lun);
    let f = fs.lookup(fs.root(), b"f").unwrap().value.unwrap().ino;
    let k = fs.lookup(f, b"k").unwrap().value.unwrap().ino;
    let mut text = [0; 16];
    let n = fs.read(k, 0, &mut text, false).unwrap().value;
    assert_eq!(&text[..n], b"kernel\n");
    drop(fs.unlink(f, b"k").unwrap());
    fs.stop().unwrap();
    fs.volume().unmount().unwrap();
    assert_clean(&volumes.save("again", &lun.durable()), "after us again");
}

#[test]
fn a_script_that_fails_and_a_volume_that_does_not_mount_are_told_apart() {
    if !judges() {
        return;
    }
    let volumes = Volumes::new();
    let path = volumes.save("volume", &fresh(4096, 1, 20));
    assert_eq!(run(&path, "exit 7").outcome, Outcome::Exit(7));
    let options = KernelOptions {
        crash_after: Some(std::time::Duration::from_millis(300)),
        ..KernelOptions::default()
    };
    assert_eq!(kernel_run(&path, "sleep 60", &options).unwrap().outcome, Outcome::Crashed);
    let blank = volumes.save("blank", &Image::new(20 << 20));
    assert_eq!(run(&blank, "true").outcome, Outcome::MountFailed);
}
