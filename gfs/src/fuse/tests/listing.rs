//! Listings: positions, attributes, counts of references; alone and among nodes.

use super::rig::{CLIENT, Rig, WRONG, can_mount, client};
use super::stress::{seconds, seed};
use crate::fuse::Mounted;
use crate::glock::{AcquireFlags, LockState};
use crate::volume::inode_glock;
use cairn_base::Rng;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

/// References to an inode as the adapter and the file system count them.
fn references(mounted: &Mounted, ino: u64) -> (u64, u64) {
    let no = mounted.core.kernel.nodes.no(ino);
    let of_adapter = mounted.core.kernel.nodes.find(no).map_or(0, |node| node.lookups());
    let of_fs = mounted.fs().inodes.get(no.addr).map_or(0, |inode| inode.uses.lock().lookups);
    (of_adapter, of_fs)
}

/// FORGETs arrive some time after what causes them.
fn must_be_forgotten(mounted: &Mounted, inos: &[u64]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    for ino in inos {
        while references(mounted, *ino) != (0, 0) {
            assert!(Instant::now() < deadline, "inode {ino}: references {:?}", references(mounted, *ino));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn a_traversal_of_a_lone_mount_asks_for_no_single_file() {
    const FILES: usize = 1500;
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(1, 256);
    let dir = rig.mount_alone().join("dir");
    let name = |n: usize| format!("{n}-{}", "x".repeat(n % 60));
    fs::create_dir(&dir).unwrap();
    (0..FILES).for_each(|n| fs::write(dir.join(name(n)), vec![1; n]).unwrap());
    rig.remount_alone();
    let mounted = &rig.mounts[0];
    let traverse = || {
        let mut inos = Vec::new();
        for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let about = entry.metadata().unwrap();
            let known = entry.file_name().into_string().unwrap();
            assert_eq!(known, name(about.size() as usize), "size of another file");
            inos.push(about.ino());
        }
        inos.sort_unstable();
        inos.dedup();
        assert_eq!(inos.len(), FILES);
        inos
    };
    let mut inos = traverse();
    let asked = &mounted.core.probe.asked;
    // The directory itself, and a file that happened to be in use.
    assert!(asked.single.load(Relaxed) < 20, "{} LOOKUPs and GETATTRs", asked.single.load(Relaxed));
    assert!(asked.listings.load(Relaxed) > 0);
    // What the kernel keeps of the listing is void after a change; then the same inodes are told again.
    fs::write(dir.join("another"), b"").unwrap();
    fs::remove_file(dir.join("another")).unwrap();
    traverse();
    assert!(asked.single.load(Relaxed) < 40, "{} LOOKUPs and GETATTRs", asked.single.load(Relaxed));
    let counts: Vec<_> = inos.iter().map(|ino| references(mounted, *ino)).collect();
    assert!(counts.iter().all(|(adapter, fs)| adapter == fs && *fs > 0), "{counts:?}");
    assert!(counts.iter().any(|(_, fs)| *fs > 1), "nothing was told twice");
    (0..FILES).for_each(|n| fs::remove_file(dir.join(name(n))).unwrap());
    inos.push(fs::metadata(&dir).unwrap().ino());
    fs::remove_dir(&dir).unwrap();
    must_be_forgotten(mounted, &inos);
    rig.end();
}

/// The C library's directory stream.
struct Stream(*mut libc::DIR);

impl Stream {
    fn open(path: &Path) -> Self {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a valid C string.
        let stream = unsafe { libc::opendir(path.as_ptr()) };
        assert!(!stream.is_null(), "{}", std::io::Error::last_os_error());
        Self(stream)
    }

    /// Name, number, type, and position behind it.
    fn next(&self) -> Option<(String, u64, u8, i64)> {
        // SAFETY: the stream is open, and the entry is used before the next call.
        unsafe {
            let entry = libc::readdir64(self.0);
            if entry.is_null() {
                return None;
            }
            let name = CStr::from_ptr((&raw const (*entry).d_name).cast()).to_str().unwrap().to_owned();
            Some((name, (*entry).d_ino, (*entry).d_type, (*entry).d_off))
        }
    }

    fn seek(&self, position: i64) {
        // SAFETY: the stream is open.
        unsafe { libc::seekdir(self.0, position) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once.
        unsafe { libc::closedir(self.0) };
    }
}

/// Reads the directory at `reader` while entries come and go through `changer`.
fn positions_hold(reader: &Path, changer: &Path) {
    const KEPT: usize = 2500;
    const PASSING: usize = 400;
    fs::create_dir(changer.join("dir")).unwrap();
    let (reader, changer) = (reader.join("dir"), changer.join("dir"));
    let make = |name: String| fs::write(changer.join(name), b"").unwrap();
    (0..KEPT).for_each(|n| make(format!("keep{n}")));
    (0..PASSING).for_each(|n| make(format!("go{n}")));
    let stream = Stream::open(&reader);
    let (mut seen, mut order, mut position) = (BTreeMap::<String, u32>::new(), Vec::new(), 0);
    let note = |(name, _, _, next): (String, u64, u8, i64), order: &mut Vec<_>, position: &mut i64| {
        if name.starts_with("keep") {
            order.push((*position, name.clone()));
        }
        *position = next;
        name
    };
    for _ in 0..KEPT / 3 {
        let name = note(stream.next().unwrap(), &mut order, &mut position);
        *seen.entry(name).or_default() += 1;
    }
    for n in 0..PASSING {
        fs::remove_file(changer.join(format!("go{n}"))).unwrap();
        make(format!("new{n}"));
    }
    while let Some(entry) = stream.next() {
        let name = note(entry, &mut order, &mut position);
        *seen.entry(name).or_default() += 1;
    }
    let twice: Vec<_> = seen.iter().filter(|(_, times)| **times != 1).collect();
    assert!(twice.is_empty(), "seen more than once: {twice:?}");
    let kept = seen.keys().filter(|name| name.starts_with("keep")).count();
    assert_eq!((kept, order.len()), (KEPT, KEPT), "an entry that was there all the time");
    let others = [&stream, &Stream::open(&reader), &Stream::open(&changer)];
    for (n, (position, name)) in order.iter().enumerate().step_by(97).rev() {
        for stream in others {
            stream.seek(*position);
            let next = std::iter::from_fn(|| stream.next()).find(|e| e.0.starts_with("keep"));
            assert_eq!(next.map(|e| e.0).as_ref(), Some(name), "entry {n} at {position}");
        }
    }
}

#[test]
fn positions_stay_true_while_entries_come_and_go() {
    if can_mount() {
        let mut rig = Rig::new(1, 256);
        let root = rig.mount_alone();
        positions_hold(&root, &root);
        rig.end();
    }
}

#[test]
fn positions_stay_true_while_another_node_changes_entries() {
    if can_mount() {
        let mut rig = Rig::new(2, 256);
        rig.mount_shared(2);
        positions_hold(&rig.path(0), &rig.path(1));
        rig.end();
    }
}

#[test]
fn an_inode_in_use_is_listed_by_name_and_not_counted() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(1, 256);
    let root = rig.mount_alone();
    fs::write(root.join("busy"), b"12345").unwrap();
    fs::create_dir(root.join("dir")).unwrap();
    rig.remount_alone();
    let mounted = &rig.mounts[0];
    let ino = fs::metadata(root.join("busy")).unwrap().ino();
    assert_eq!(references(mounted, ino), (1, 1));
    let glocks = mounted.fs().volume().glocks();
    let busy = glocks
        .acquire(
            inode_glock(mounted.core.kernel.nodes.no(ino).addr),
            LockState::Exclusive,
            AcquireFlags::SKIP,
        )
        .unwrap();
    let asked = &mounted.core.probe.asked;
    let before = asked.forgets.load(SeqCst);
    let stream = Stream::open(&root);
    let listed: Vec<_> = std::iter::from_fn(|| stream.next()).map(|e| (e.0, e.1, e.2)).collect();
    assert!(listed.contains(&("busy".to_owned(), ino, libc::DT_REG)), "{listed:?}");
    assert!(listed.iter().any(|e| e.0 == "dir" && e.2 == libc::DT_DIR), "{listed:?}");
    assert_eq!(listed.len(), 4);
    assert!(asked.listings.load(Relaxed) > 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    while asked.forgets.load(SeqCst) == before {
        assert!(Instant::now() < deadline, "the kernel has taken the name with its attributes");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(references(mounted, ino), (1, 1));
    drop((busy, stream));
    assert_eq!(fs::metadata(root.join("busy")).unwrap().size(), 5);
    fs::remove_file(root.join("busy")).unwrap();
    must_be_forgotten(mounted, &[ino]);
    rig.end();
}

#[test]
fn what_is_about_to_be_told_is_not_pruned() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(1, 256);
    let root = rig.mount_alone();
    fs::write(root.join("file"), b"12345").unwrap();
    rig.remount_alone();
    let fs = rig.mounts[0].fs();
    let mut found = None;
    let held = fs.readdirplus(fs.root(), 0, |e, attr| {
        found = attr.map(|a| a.ino).or(found);
        e.name != b"file"
    });
    let (held, ino) = (held.unwrap(), found.unwrap());
    fs.inodes.prune(|_| true);
    fs.remember(ino, 1);
    drop(held);
    fs.inodes.prune(|_| true);
    assert_eq!(fs.getattr(ino).unwrap().value.size, 5);
    fs.forget(ino, 1);
    rig.end();
}

/// One name of the model. It belongs to one changer; `turn` is odd while a change is under way.
#[derive(Default)]
struct Name {
    turn: AtomicU64,
    /// Size, where there is a file.
    file: Mutex<Option<u64>>,
}

struct Shared {
    dirs: Vec<PathBuf>,
    names: Vec<Name>,
    stop: AtomicBool,
    beats: AtomicU64,
    judged: AtomicU64,
}

const NAMES_EACH: usize = 12;

impl Shared {
    fn path(&self, mount: usize, n: usize) -> PathBuf {
        self.dirs[mount].join(format!("n{n}"))
    }

    fn turns(&self) -> Vec<u64> {
        self.names.iter().map(|n| n.turn.load(SeqCst)).collect()
    }

    fn change(&self, names: &[usize], op: impl FnOnce() -> std::io::Result<()>, then: impl FnOnce()) {
        self.beats.fetch_add(1, Relaxed);
        for n in names {
            self.names[*n].turn.fetch_add(1, SeqCst);
        }
        match op() {
            Ok(()) => then(),
            Err(e) => println!("{WRONG}change of {names:?}: {e}"),
        }
        for n in names {
            self.names[*n].turn.fetch_add(1, SeqCst);
        }
    }

    /// Changes its names one after the other; the mount is another one each time.
    fn changer(&self, id: usize, rng: &mut Rng) {
        let pick = |rng: &mut Rng| id * NAMES_EACH + rng.below(NAMES_EACH as u64) as usize;
        while !self.stop.load(Relaxed) {
            let (a, b) = (pick(rng), pick(rng));
            let mount = rng.below(self.dirs.len() as u64) as usize;
            let (from, to) = (self.path(mount, a), self.path(mount, b));
            let set = |n: usize, file: Option<u64>| *self.names[n].file.lock() = file;
            let size = rng.below(9000);
            let has = *self.names[a].file.lock();
            let length = |file: fs::File| file.set_len(size);
            match (has, rng.below(3)) {
                (None, _) => {
                    let make = || OpenOptions::new().write(true).create_new(true).open(&from);
                    self.change(&[a], || make().and_then(length), || set(a, Some(size)));
                }
                (Some(_), 0) => self.change(&[a], || fs::remove_file(&from), || set(a, None)),
                (Some(was), 1) if a != b => self.change(
                    &[a, b],
                    || fs::rename(&from, &to),
                    || {
                        set(a, None);
                        set(b, Some(was));
                    },
                ),
                (Some(_), _) => {
                    let open = || OpenOptions::new().write(true).open(&from);
                    self.change(&[a], || open().and_then(length), || set(a, Some(size)));
                }
            }
            std::thread::sleep(Duration::from_micros(rng.below(1500)));
        }
    }

    /// Lists, and looks at what was listed; judges what nobody changed meanwhile.
    fn lister(&self, mount: usize) {
        while !self.stop.load(Relaxed) {
            self.beats.fetch_add(1, Relaxed);
            let before = self.turns();
            let mut listed = BTreeMap::<String, u32>::new();
            for entry in fs::read_dir(&self.dirs[mount]).unwrap() {
                match entry {
                    Ok(entry) => {
                        let name = entry.file_name().into_string().unwrap();
                        if let Some(n) = name.strip_prefix('n').and_then(|n| n.parse().ok()) {
                            self.look(mount, n, "listed", || entry.metadata().map(|m| m.size()));
                        }
                        *listed.entry(name).or_default() += 1;
                    }
                    Err(e) => println!("{WRONG}mount {mount}: readdir: {e}"),
                }
            }
            for (n, turn) in before.into_iter().enumerate() {
                let expected = u32::from(self.names[n].file.lock().is_some());
                if turn.is_multiple_of(2) && self.names[n].turn.load(SeqCst) == turn {
                    self.judged.fetch_add(1, Relaxed);
                    let times = listed.get(&format!("n{n}")).copied().unwrap_or_default();
                    if times != expected {
                        println!("{WRONG}mount {mount}: n{n} listed {times} times, not {expected}");
                    }
                }
                let path = self.path(mount, n);
                self.look(mount, n, "by path", || fs::symlink_metadata(&path).map(|m| m.size()));
            }
        }
    }

    fn look(&self, mount: usize, n: usize, how: &str, size: impl FnOnce() -> std::io::Result<u64>) {
        let name = &self.names[n];
        let turn = name.turn.load(SeqCst);
        let expected = *name.file.lock();
        let found = match size() {
            Ok(size) => Ok(Some(size)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e.to_string()),
        };
        if turn.is_multiple_of(2) && name.turn.load(SeqCst) == turn {
            self.judged.fetch_add(1, Relaxed);
            if found != Ok(expected) {
                println!("{WRONG}mount {mount}: n{n} {how}: {found:?}, not {expected:?}");
            }
        }
    }
}

/// Users of the mounts, in a process of their own (see [`client`]).
#[test]
fn client_of_listings() {
    let Ok(words) = std::env::var(CLIENT) else { return };
    let mut words = words.split(' ');
    let mut number = || words.next().unwrap().parse::<u64>().unwrap();
    let (seed, time) = (number(), Duration::from_millis(number()));
    let dirs: Vec<_> = words.map(PathBuf::from).collect();
    let names = (0..2 * NAMES_EACH).map(|_| Name::default()).collect();
    let s = Shared {
        dirs,
        names,
        stop: AtomicBool::new(false),
        beats: AtomicU64::new(0),
        judged: AtomicU64::new(0),
    };
    let deadline = Instant::now() + time;
    std::thread::scope(|scope| {
        for id in 0..2 {
            let s = &s;
            scope.spawn(move || s.changer(id, &mut Rng::new(seed ^ id as u64)));
        }
        let listers: Vec<_> = (0..4)
            .map(|n| {
                scope.spawn({
                    let s = &s;
                    move || s.lister(n % s.dirs.len())
                })
            })
            .collect();
        while listers.iter().any(|l| !l.is_finished()) {
            println!("beat {}", s.beats.load(Relaxed));
            std::thread::sleep(Duration::from_millis(20));
            if Instant::now() > deadline {
                s.stop.store(true, SeqCst);
            }
        }
    });
    println!("{} judged", s.judged.load(Relaxed));
}

fn listings_agree(rig: &Rig, time: Duration) {
    fs::create_dir(rig.path(0).join("dir")).unwrap();
    let dirs: Vec<_> = (0..rig.mounts.len()).map(|n| rig.path(n).join("dir").display().to_string()).collect();
    let seed = seed();
    eprintln!("CAIRN_STRESS_SEED={seed}");
    let words = format!("{seed} {} {}", time.as_millis(), dirs.join(" "));
    let name = "fuse::tests::listing::client_of_listings";
    let (well, said) = client(rig, name, &words, Duration::from_secs(15));
    let wrong: Vec<_> = said.iter().filter(|l| l.starts_with(WRONG)).collect();
    let judged = said.iter().find_map(|l| l.strip_suffix(" judged")).and_then(|n| n.parse::<u64>().ok());
    eprintln!("{judged:?} judged");
    assert!(well && wrong.is_empty(), "{} wrong: {wrong:#?}\n{said:?}", wrong.len());
    assert!(judged.is_some_and(|n| n > 100), "{judged:?} judged");
}

#[test]
fn listings_of_a_lone_mount_agree_with_what_is_there() {
    if can_mount() {
        let mut rig = Rig::new(1, 256);
        rig.mount_alone();
        listings_agree(&rig, seconds(2));
        assert!(rig.mounts[0].core.probe.asked.listings.load(Relaxed) > 0);
        rig.end();
    }
}

/// Nothing is spared because it is contended: all lifetimes are long.
#[test]
fn listings_of_two_mounts_with_long_lifetimes_agree_with_what_is_there() {
    if can_mount() {
        let mut rig = Rig::new(2, 256);
        rig.mount_shared(2);
        rig.mounts.iter().for_each(|m| m.coherence().set_contended(Duration::ZERO));
        listings_agree(&rig, seconds(2));
        rig.end();
    }
}

#[test]
fn listings_of_two_mounts_agree_with_what_is_there() {
    if can_mount() {
        let mut rig = Rig::new(2, 256);
        rig.mount_shared(2);
        listings_agree(&rig, seconds(2));
        rig.end();
    }
}
