//! Where the workload runs, and the workload.
//!
//! Reads of the second half come after a fresh mount, so that they ask the file system and not the kernel's pages; the bytes of a LUN
//! file may still be in the host's memory, for the mounts as for the LUN itself (both go past this host's page cache with O_DIRECT).

use crate::Result;
use crate::figures::Figures;
use crate::passthrough::Passthrough;
use gfs::driver::{self, Alone, Options, Running};
use gfs::lockspace::LockSpace;
use gfs::lockspace::local::LocalSpace;
use gfs::lockspace::shared::SharedSpace;
use gfs::mkfs::{self, MkfsOptions};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Place {
    Passthrough,
    Lun,
    OneMount,
    TwoMounts,
    Contended,
}

pub(crate) struct Dirs<'a> {
    pub(crate) work: &'a Path,
    pub(crate) tmpfs: &'a Path,
}

impl Place {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Passthrough => "passthrough",
            Self::Lun => "lun",
            Self::OneMount => "one_mount",
            Self::TwoMounts => "each_of_two_mounts",
            Self::Contended => "contended",
        }
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Passthrough => "pass-through over tmpfs",
            Self::Lun => "the LUN itself",
            Self::OneMount => "one mount",
            Self::TwoMounts => "two mounts, own directories",
            Self::Contended => "two mounts, one directory",
        }
    }

    pub(crate) fn measure(self, files: u32, mib: usize, dirs: &Dirs<'_>) -> Result<Figures> {
        match self {
            Self::Passthrough => on_passthrough(files, mib, dirs),
            Self::Lun => on_lun(mib, dirs.work),
            Self::OneMount => on_one(files, mib, dirs.work),
            Self::TwoMounts => on_two(files, mib, dirs.work),
            Self::Contended => contended(files, dirs.work),
        }
    }
}

fn name(dir: &Path, i: u32) -> PathBuf {
    dir.join(format!("file-{i:06}"))
}

/// First half: fills `dir`, which must exist.
fn fill(files: u32, mib: usize, dir: &Path) -> Result<Figures> {
    let mut out = Figures::default();
    let n = f64::from(files);
    let t = Instant::now();
    for i in 0..files {
        File::create(name(dir, i))?;
    }
    out.rate("create", n, t);
    for what in ["stat_after_create", "stat"] {
        let t = Instant::now();
        for i in 0..files {
            fs::metadata(name(dir, i))?;
        }
        out.rate(what, n, t);
    }
    let block = vec![7_u8; 4096];
    let t = Instant::now();
    for i in 0..files {
        OpenOptions::new().write(true).open(name(dir, i))?.write_all(&block)?;
    }
    out.rate("write_4k", n, t);
    let t = Instant::now();
    let chunk = vec![3_u8; 1 << 20];
    let mut f = File::create(dir.join("sequential"))?;
    for _ in 0..mib {
        f.write_all(&chunk)?;
    }
    out.rate("seq_write_to_memory", mib as f64, t);
    f.sync_data()?;
    out.rate("seq_write", mib as f64, t);
    Ok(out)
}

/// Second half, after a fresh mount: reads everything, and removes it.
fn drain(files: u32, mib: usize, dir: &Path) -> Result<Figures> {
    let mut out = Figures::default();
    let n = f64::from(files);
    let mut buf = vec![0_u8; 4096];
    let t = Instant::now();
    for i in 0..files {
        fs::metadata(name(dir, i))?;
    }
    out.rate("stat_cold", n, t);
    for what in ["read_4k_cold", "read_4k"] {
        let t = Instant::now();
        for i in 0..files {
            File::open(name(dir, i))?.read_exact(&mut buf)?;
        }
        out.rate(what, n, t);
    }
    let mut buf = vec![0_u8; 1 << 20];
    let t = Instant::now();
    let mut f = File::open(dir.join("sequential"))?;
    for _ in 0..mib {
        f.read_exact(&mut buf)?;
    }
    out.rate("seq_read", mib as f64, t);
    drop(f);
    let t = Instant::now();
    for i in 0..files {
        fs::remove_file(name(dir, i))?;
    }
    out.rate("unlink", n, t);
    fs::remove_file(dir.join("sequential"))?;
    Ok(out)
}

fn made(path: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn on_passthrough(files: u32, mib: usize, dirs: &Dirs<'_>) -> Result<Figures> {
    let at = made(dirs.work.join("passthrough"))?;
    let mount = || {
        let mut config = fuser::Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("bench".into())];
        config.n_threads = Some(std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(2, 8));
        config.clone_fd = true;
        fuser::Session::new(Passthrough::new(dirs.tmpfs), &at, &config)?.spawn()
    };
    let mut out = Figures::default();
    for half in [fill, drain] {
        let session = mount()?;
        let done = half(files, mib, &at);
        session.umount_and_join()?;
        out.extend(done?);
    }
    Ok(out)
}

/// Sequential transfer through the block layer that the file system uses, durable at the end.
fn on_lun(mib: usize, work: &Path) -> Result<Figures> {
    let path = image(work, "raw", mib as u64)?;
    let dev = lun::open(&format!("file:{}", path.display()), &lun::OpenOptions::default())?;
    let mut buf = lun::aligned::AlignedBuf::zeroed(1 << 20);
    let mut out = Figures::default();
    let t = Instant::now();
    for i in 0..mib {
        dev.write_at((i as u64) << 20, &buf)?;
    }
    dev.flush()?;
    out.rate("seq_write", mib as f64, t);
    let t = Instant::now();
    for i in 0..mib {
        dev.read_at((i as u64) << 20, &mut buf)?;
    }
    out.rate("seq_read", mib as f64, t);
    Ok(out)
}

/// A file of so many MiB whose blocks are allocated; the one of an earlier round if it is there.
fn image(work: &Path, name: &str, mib: u64) -> Result<PathBuf> {
    let path = work.join(name);
    if !path.exists() {
        let mut f = File::create(&path)?;
        io::copy(&mut io::repeat(0).take(mib << 20), &mut f)?;
        f.sync_all()?;
    }
    Ok(path)
}

fn volume(files: u32, mib: usize, work: &Path, journals: u32) -> Result<String> {
    // A file takes its dinode and a block of data, for each journal's mount.
    let each = mib as u64 + u64::from(files) / 64 + 64;
    let path = image(work, &format!("volume-{journals}"), u64::from(journals) * each + 128)?;
    let url = format!("file:{}", path.display());
    let dev = lun::open(&url, &lun::OpenOptions::default())?;
    let options = MkfsOptions {
        lock_table: "bench:vol".into(),
        journals,
        journal_mb: Some(32),
        override_existing: true,
        ..MkfsOptions::default()
    };
    mkfs::make(&dev, &options, &mut |_, _| {})?;
    Ok(url)
}

fn mount(url: &str, at: &Path, space: Arc<dyn LockSpace>) -> Result<Running> {
    Ok(driver::mount(url, at, &Options::default(), space, Arc::new(Alone))?)
}

fn on_one(files: u32, mib: usize, work: &Path) -> Result<Figures> {
    let url = volume(files, mib, work, 1)?;
    let at = made(work.join("one"))?;
    let mut out = Figures::default();
    for half in [fill, drain] {
        let running = mount(&url, &at, LocalSpace::new())?;
        let done = half(files, mib, &at);
        running.unmount()?;
        out.extend(done?);
    }
    Ok(out)
}

/// Two mounts of one volume in this process, each working in a directory of its own at the same time; the slower one's rates.
fn on_two(files: u32, mib: usize, work: &Path) -> Result<Figures> {
    let url = volume(files, mib, work, 2)?;
    let ats = [made(work.join("two-a"))?, made(work.join("two-b"))?];
    let mut out = Figures::default();
    for half in [fill, drain] {
        let space = SharedSpace::new();
        let mut running = Vec::new();
        for at in &ats {
            running.push(mount(&url, at, space.join().1)?);
            made(at.join(at.file_name().expect("invariant: made above")))?;
        }
        let results: Vec<Result<Figures>> = std::thread::scope(|s| {
            let workers = ats.clone().map(|at| {
                s.spawn(move || half(files, mib, &at.join(at.file_name().expect("invariant: made above"))))
            });
            workers.map(|h| h.join().unwrap_or_else(|_| Err("the workload panicked".into()))).into()
        });
        for r in running {
            r.unmount()?;
        }
        let mut slower = Figures::default();
        for r in results {
            slower = slower.least(&r?);
        }
        out.extend(slower);
    }
    Ok(out)
}

/// How often each mount adds to the number that both count with.
const COUNTS: u32 = 300;

/// Rows of the contended place, and what one mount alone has for the same work.
pub(crate) const UNCONTENDED: [(&str, &str); 5] = [
    ("create_shared", "create"),
    ("stat_others", "stat_cold"),
    ("read_4k_others", "read_4k_cold"),
    ("unlink_shared", "unlink"),
    ("unlink_beside_lister", "unlink"),
];

/// Does `work` for both at the same time; the slower one's rate.
fn both(
    out: &mut Figures,
    row: &'static str,
    n: u32,
    work: impl Fn(usize) -> io::Result<()> + Sync,
) -> Result<()> {
    let t = Instant::now();
    let done: Vec<_> = std::thread::scope(|s| {
        let workers = [0, 1].map(|who| {
            s.spawn({
                let work = &work;
                move || work(who)
            })
        });
        workers.map(|h| h.join().unwrap_or_else(|_| Err(io::Error::other("the workload panicked")))).into()
    });
    out.rate(row, n.into(), t);
    done.into_iter().collect::<io::Result<()>>()?;
    Ok(())
}

/// Two mounts of one volume in this process that want the same directory or the same files.
fn contended(files: u32, work: &Path) -> Result<Figures> {
    let url = volume(files * 3, 64, work, 2)?;
    let ats = [made(work.join("both-a"))?, made(work.join("both-b"))?];
    let space = SharedSpace::new();
    let mut running = Vec::new();
    for at in &ats {
        running.push(mount(&url, at, space.join().1)?);
    }
    let dirs = ats.clone().map(|at| at.join("shared"));
    fs::create_dir(&dirs[0])?;
    let figures = contend(files, &dirs);
    for r in running {
        r.unmount()?;
    }
    figures
}

fn contend(files: u32, dirs: &[PathBuf; 2]) -> Result<Figures> {
    let mut out = Figures::default();
    let n = f64::from(files);
    let own = |who: usize, i: u32| dirs[who].join(format!("{who}-{i:06}"));
    // Each adds to a number in one file, in turn or not.
    let record = dirs.clone().map(|d| d.join("record"));
    fs::write(&record[0], 0_u64.to_le_bytes())?;
    both(&mut out, "count_under_lock", COUNTS, |who| {
        let file = OpenOptions::new().read(true).write(true).open(&record[who])?;
        for _ in 0..COUNTS {
            file.lock()?;
            let mut word = [0; 8];
            file.read_exact_at(&mut word, 0)?;
            file.write_all_at(&(u64::from_le_bytes(word) + 1).to_le_bytes(), 0)?;
            file.unlock()?;
        }
        Ok(())
    })?;
    let counted = u64::from_le_bytes(fs::read(&record[1])?.as_slice().try_into()?);
    if counted != u64::from(COUNTS) * 2 {
        return Err(format!("{counted} counted of {}", COUNTS * 2).into());
    }
    both(&mut out, "create_shared", files, |who| {
        (0..files).try_for_each(|i| File::create(own(who, i)).map(drop))
    })?;
    // What the other mount has made.
    let t = Instant::now();
    for i in 0..files {
        fs::metadata(dirs[1].join(format!("0-{i:06}")))?;
    }
    out.rate("stat_others", n, t);
    let block = vec![7_u8; 4096];
    for i in 0..files {
        OpenOptions::new().write(true).open(own(0, i))?.write_all(&block)?;
    }
    let mut buf = vec![0_u8; 4096];
    let t = Instant::now();
    for i in 0..files {
        File::open(dirs[1].join(format!("0-{i:06}")))?.read_exact(&mut buf)?;
    }
    out.rate("read_4k_others", n, t);
    both(&mut out, "unlink_shared", files, |who| (0..files).try_for_each(|i| fs::remove_file(own(who, i))))?;
    for i in 0..files {
        File::create(own(0, i))?;
    }
    // One removes, the other lists.
    let (ended, lists) = (AtomicBool::new(false), AtomicU32::new(0));
    let t = Instant::now();
    std::thread::scope(|s| {
        let lister = s.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                fs::read_dir(&dirs[1])?.try_for_each(|e| e.map(drop))?;
                lists.fetch_add(1, Ordering::Relaxed);
            }
            io::Result::Ok(())
        });
        let removed = (0..files).try_for_each(|i| fs::remove_file(own(0, i)));
        out.rate("unlink_beside_lister", n, t);
        out.rate("list_beside_unlink", lists.load(Ordering::Relaxed).into(), t);
        ended.store(true, Ordering::Relaxed);
        removed.and(lister.join().unwrap_or_else(|_| Err(io::Error::other("the lister panicked"))))
    })?;
    Ok(out)
}
