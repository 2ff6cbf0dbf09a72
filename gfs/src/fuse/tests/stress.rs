//! Everything on everything on two and three mounts of one volume, with checks that notice a single stale byte, size or name.
//!
//! A *record* is one counter repeated over 512 bytes, eight of them to a page, or over a page and a half; each is written through one mount only. *started* and *done* are
//! kept in shared memory around each write, so a read that begins later must lie in [done before, started after]. The false sharing is the point.
//! `CAIRN_STRESS_SECONDS` makes the runs longer; the seed is printed, `CAIRN_STRESS_SEED` repeats it.

use super::rig::{CLIENT, Rig, WRONG, can_mount, client};
use crate::fuse::coherence::Part;
use crate::fuse::node::MAX_BLOCKS;
use cairn_base::Rng;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const RECORD: usize = 512;
/// A page and a half: a buffered WRITE of it has several pages, of which it may have the last one locked.
const WIDE: usize = 12 * RECORD;
const RECORDS: usize = 64;
const FILES: usize = 4;
const APPEND: usize = 16;
/// An operation of a user that waits so long for the others is starving.
const TOO_SLOW: Duration = Duration::from_secs(10);

/// Which parts of the load run. Written as words.
#[derive(Clone, Copy, Default)]
struct Load {
    buffered: bool,
    /// Buffered, records of more than a page.
    wide: bool,
    mapped: bool,
    direct: bool,
    append: bool,
    truncate: bool,
    names: bool,
    chaos: bool,
    /// The kernel lets go of pages by itself, as it does when memory is short.
    forget: bool,
}

impl From<&str> for Load {
    fn from(words: &str) -> Self {
        let on = |word: &str| words.split(' ').any(|w| w == word || w == "all");
        Self {
            buffered: on("buffered"),
            wide: on("wide"),
            mapped: on("mapped"),
            direct: on("direct"),
            append: on("append"),
            truncate: on("truncate"),
            names: on("names"),
            chaos: on("chaos"),
            forget: on("forget"),
        }
    }
}

struct Counter {
    started: AtomicU64,
    done: AtomicU64,
    /// One writer at a time.
    writer: Mutex<()>,
}

struct Shared {
    paths: Vec<PathBuf>,
    load: Load,
    seed: u64,
    stop: AtomicBool,
    records: Vec<Vec<Counter>>,
    appended: Counter,
    truncated: Mutex<Vec<u8>>,
    model: Mutex<Model>,
    operations: AtomicU64,
    slowest: AtomicU64,
    born: Instant,
    wrong: Mutex<Vec<String>>,
}

/// What the two directories of the name test must hold: name → file id.
#[derive(Default)]
struct Model {
    names: BTreeMap<(usize, String), u64>,
    next: u64,
}

impl Shared {
    fn new(paths: Vec<PathBuf>, load: Load, seed: u64) -> Arc<Self> {
        let counter =
            || Counter { started: AtomicU64::new(0), done: AtomicU64::new(0), writer: Mutex::new(()) };
        Arc::new(Self {
            paths,
            load,
            seed,
            stop: AtomicBool::new(false),
            records: (0..FILES).map(|file| (0..count(file)).map(|_| counter()).collect()).collect(),
            appended: counter(),
            truncated: Mutex::default(),
            model: Mutex::default(),
            operations: AtomicU64::new(0),
            slowest: AtomicU64::new(0),
            born: Instant::now(),
            wrong: Mutex::default(),
        })
    }

    /// Said at once, so that the process that serves the mounts can add what it knows.
    fn wrong(&self, what: String) {
        let mut wrong = self.wrong.lock();
        if wrong.len() < 50 {
            println!("{WRONG}{:.3} s: {what}", self.born.elapsed().as_secs_f64());
            wrong.push(what);
        }
    }

    fn is_wrong(&self) -> bool {
        !self.wrong.lock().is_empty()
    }

    /// One operation: counted, timed, and an error is a finding.
    fn step<T>(&self, what: &str, op: impl FnOnce() -> std::io::Result<T>) -> Option<T> {
        let started = Instant::now();
        let result = op();
        let took = started.elapsed();
        self.slowest.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
        if took > TOO_SLOW {
            self.wrong(format!("{what} took {took:?}"));
        }
        self.operations.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                self.wrong(format!("{what}: {e}"));
                None
            }
        }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// Bytes of a record.
fn width(file: usize) -> usize {
    if file == 3 { WIDE } else { RECORD }
}

/// Few wide ones, so that they are read while they are written.
fn count(file: usize) -> usize {
    if file == 3 { 6 } else { RECORDS }
}

fn filled(value: u64, width: usize) -> Vec<u8> {
    let mut bytes = vec![0; width];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Buffered,
    WriteOnly,
    Direct,
    Mapped,
}

/// Pages that O_DIRECT writes and mapped stores of one node share are undefined on any file system, so each file has its ways.
fn ways(load: Load, file: usize) -> Vec<Way> {
    let all = match file {
        0 => [Way::Buffered, Way::Mapped],
        1 => [Way::WriteOnly, Way::Direct],
        _ => [Way::Buffered, Way::WriteOnly],
    };
    let on = |way: &Way| match way {
        Way::Buffered | Way::WriteOnly => {
            if file == 3 {
                load.wide
            } else {
                load.buffered
            }
        }
        Way::Mapped => load.mapped,
        Way::Direct => load.direct,
    };
    all.into_iter().filter(on).collect()
}

struct Handles {
    /// With the address of the inode in hexadecimal, as in the names of glocks.
    name: String,
    width: usize,
    read: File,
    direct: File,
    write_only: File,
    write_direct: File,
    read_write: Option<File>,
    map: Option<memmap2::MmapRaw>,
}

impl Handles {
    fn open(path: &Path, load: Load, file: usize) -> std::io::Result<Self> {
        let ways = ways(load, file);
        let read_write = if ways.iter().any(|w| matches!(w, Way::Buffered | Way::Mapped)) {
            Some(OpenOptions::new().read(true).write(true).open(path)?)
        } else {
            None
        };
        let map = match &read_write {
            Some(f) if ways.contains(&Way::Mapped) => Some(memmap2::MmapRaw::map_raw(f)?),
            _ => None,
        };
        let read = File::open(path)?;
        Ok(Self {
            name: format!("records{file} (glock 2/{:x})", read.metadata()?.ino() & (MAX_BLOCKS - 1)),
            width: width(file),
            read,
            direct: OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?,
            write_only: OpenOptions::new().write(true).open(path)?,
            write_direct: OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path)?,
            read_write,
            map,
        })
    }

    fn forget(&self) {
        // SAFETY: a valid descriptor.
        unsafe { libc::posix_fadvise(self.read.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    fn word(&self, record: usize, word: usize) -> Option<*mut u64> {
        let map = self.map.as_ref()?;
        // SAFETY: the file has all its records for as long as the test runs, and the map covers them.
        Some(unsafe { map.as_mut_ptr().add(record * self.width + word * 8) }.cast())
    }

    fn write(&self, way: Way, record: usize, value: u64) -> std::io::Result<()> {
        let (bytes, at) = (filled(value, self.width), (record * self.width) as u64);
        match way {
            Way::Buffered => self.read_write.as_ref().expect("opened for it").write_all_at(&bytes, at),
            Way::WriteOnly => self.write_only.write_all_at(&bytes, at),
            Way::Direct => self.write_direct.write_all_at(&bytes, at),
            Way::Mapped => {
                for word in 0..self.width / 8 {
                    let to = self.word(record, word).expect("mapped for it");
                    // SAFETY: inside the map; other nodes' view of it is what is being tested.
                    unsafe { to.write_volatile(value.to_le()) };
                }
                Ok(())
            }
        }
    }

    fn read(&self, way: u64, record: usize) -> std::io::Result<(&'static str, Vec<u64>)> {
        let mut bytes = vec![0; self.width];
        let at = (record * self.width) as u64;
        let how = match (way, &self.map) {
            (0, Some(_)) => {
                let words = (0..self.width / 8).filter_map(|w| self.word(record, w));
                // SAFETY: inside the map.
                return Ok(("map", words.map(|p| u64::from_le(unsafe { p.read_volatile() })).collect()));
            }
            (1, _) => {
                self.direct.read_exact_at(&mut bytes, at)?;
                "O_DIRECT"
            }
            _ => {
                self.read.read_exact_at(&mut bytes, at)?;
                "pread"
            }
        };
        let words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes")));
        Ok((how, words.collect()))
    }
}

fn record_path(root: &Path, file: usize) -> PathBuf {
    root.join(format!("records{file}"))
}

fn records(s: &Shared, mount: usize, rng: &mut Rng) {
    let open = |file| Handles::open(&record_path(&s.paths[mount], file), s.load, file);
    let handles: Vec<_> = (0..FILES).map_while(|file| s.step("open", || open(file))).collect();
    if handles.len() < FILES {
        return;
    }
    let mounts = s.paths.len();
    while s.goes_on() {
        let file = rng.below(FILES as u64) as usize;
        let ways = ways(s.load, file);
        if ways.is_empty() {
            continue;
        }
        if s.load.forget && rng.below(8) == 0 {
            handles[file].forget();
        }
        let record = rng.below(count(file) as u64) as usize;
        let counter = &s.records[file][record];
        if record % mounts == mount && rng.below(2) == 0 {
            let way = ways[rng.below(ways.len() as u64) as usize];
            let _one = counter.writer.lock();
            let value = counter.started.load(Ordering::SeqCst) + 1;
            counter.started.store(value, Ordering::SeqCst);
            if s.step("write", || handles[file].write(way, record, value)).is_some() {
                counter.done.store(value, Ordering::SeqCst);
            }
            continue;
        }
        let least = counter.done.load(Ordering::SeqCst);
        let way = rng.below(3);
        let Some((how, words)) = s.step("read", || handles[file].read(way, record)) else { continue };
        let most = counter.started.load(Ordering::SeqCst);
        if let Some(word) = words.iter().find(|w| **w < least || **w > most) {
            let at = words.iter().position(|w| w == word).unwrap_or(0);
            let all: BTreeSet<_> = words.iter().collect();
            s.wrong(format!(
                "mount {mount} read record {record} of {} by {how}: {word} in word {at} (all its values: {all:?}), allowed is {least}..={most}; written by mount {}",
                handles[file].name, record % mounts
            ));
        }
    }
}

/// What is acknowledged can be read at once, at the end of the file too, whatever other threads do with it on the same node meanwhile.
fn append(s: &Shared, mount: usize, id: u64, rng: &mut Rng) {
    let path = s.paths[mount].join("append");
    let open = |append, write| OpenOptions::new().read(true).append(append).write(write).open(&path);
    let Some(mut file) = s.step("open to append", || open(true, false)) else { return };
    let Some(mut read) = s.step("open", || open(false, false)) else { return };
    let mut sequence = 1_u64;
    while s.goes_on() {
        if rng.below(3) == 0 {
            s.appended.started.fetch_add(1, Ordering::SeqCst);
            let mut bytes = [0; APPEND];
            bytes[..8].copy_from_slice(&id.to_le_bytes());
            bytes[8..].copy_from_slice(&sequence.to_le_bytes());
            sequence += 1;
            if s.step("append", || file.write_all(&bytes)).is_some() {
                s.appended.done.fetch_add(1, Ordering::SeqCst);
            }
            continue;
        }
        if rng.below(200) == 0 {
            let write = rng.below(4) == 0;
            let Some(again) = s.step("open", || open(false, write)) else { return };
            read = again;
        }
        let least = s.appended.done.load(Ordering::SeqCst) * APPEND as u64;
        if least > 0 && rng.below(2) == 0 {
            let mut bytes = [0; 2 * APPEND];
            let at = least - APPEND as u64;
            let Some(n) = s.step("pread", || read.read_at(&mut bytes, at)) else { continue };
            if n < APPEND {
                s.wrong(format!("mount {mount}: {n} bytes read at {at} of {least} and more"));
            } else if bytes[..APPEND].iter().all(|b| *b == 0) {
                s.wrong(format!("mount {mount}: nothing in the record read at {at} of {least} and more"));
            }
            continue;
        }
        if rng.below(8) == 0 {
            let Some(end) = s.step("seek", || read.seek(SeekFrom::End(0))) else { continue };
            if end < least {
                s.wrong(format!("mount {mount}: the end is at {end}, at least {least} was written"));
            }
            continue;
        }
        let by_path = rng.below(2) == 0;
        let size = s.step("stat", || if by_path { fs::metadata(&path) } else { read.metadata() });
        let Some(size) = size.map(|m| m.size()) else { continue };
        let most = s.appended.started.load(Ordering::SeqCst) * APPEND as u64;
        if size < least || size > most {
            s.wrong(format!(
                "mount {mount}: append file has {size} bytes (by path: {by_path}), not {least}..={most}"
            ));
        }
    }
}

fn check_appended(s: &Shared) {
    let done = s.appended.done.load(Ordering::SeqCst);
    for path in &s.paths {
        let Some(bytes) = s.step("read", || fs::read(path.join("append"))) else { continue };
        let seen: BTreeSet<&[u8]> = bytes.chunks(APPEND).collect();
        if bytes.len() as u64 != done * APPEND as u64 || seen.len() as u64 != done {
            s.wrong(format!(
                "{}: {} bytes, {} different of {done} appends",
                path.display(),
                bytes.len(),
                seen.len()
            ));
        }
    }
}

/// Under an outside lock, so that what each node sees is known exactly.
fn truncate(s: &Shared, mount: usize, rng: &mut Rng) {
    let path = s.paths[mount].join("truncate");
    let open = |write| OpenOptions::new().read(true).write(write).open(&path);
    let Some(file) = s.step("open", || open(true)) else { return };
    let Some(mut read_only) = s.step("open", || open(false)) else { return };
    while s.goes_on() {
        let mut want = s.truncated.lock();
        if rng.below(2) == 0 {
            let Some(size) = s.step("fstat", || file.metadata()).map(|m| m.size()) else { return };
            if size != want.len() as u64 {
                s.wrong(format!("mount {mount}: truncate file has {size} bytes, not {}", want.len()));
            }
        }
        if rng.below(4) == 0 {
            let Some(end) = s.step("seek", || read_only.seek(SeekFrom::End(0))) else { return };
            if end != want.len() as u64 {
                s.wrong(format!("mount {mount}: truncate file ends at {end}, not {}", want.len()));
            }
        }
        // From anywhere to behind the end, or in the middle of what once was there.
        let at = rng.below(2) * rng.below(30_000);
        let len = if rng.below(2) == 0 { want.len() + 100 } else { 1 + rng.below(8192) as usize };
        let mut bytes = vec![0; len];
        let from = if rng.below(2) == 0 { &file } else { &read_only };
        let Some(n) = s.step("pread", || from.read_at(&mut bytes, at)) else { return };
        let there = &want[want.len().min(at as usize)..];
        let there = &there[..there.len().min(len)];
        if n > there.len() && bytes[..there.len()] == *there && bytes[there.len()..n].iter().all(|b| *b == 0)
        {
            s.wrong(format!("{}, {} bytes, read {len} at {at}: {n}", zeros(mount), want.len()));
        } else if bytes[..n] != *there {
            let differs: Vec<_> = (0..n.min(there.len())).filter(|i| bytes[*i] != there[*i]).collect();
            let found = differs.first().map(|i| (at + *i as u64, bytes[*i], there[*i]));
            let last = differs.last().map(|i| at + *i as u64);
            s.wrong(format!(
                "mount {mount}: truncate file, {} bytes, read {len} at {at}: {n}, not {}; {} bytes differ, the first (offset, found, right) {found:?}, the last at {last:?}; read again: {}",
                want.len(),
                there.len(),
                differs.len(),
                if from.read_at(&mut bytes, at).is_ok_and(|n| bytes[..n] == *there) { "right" } else { "wrong" }
            ));
            return;
        }
        if rng.below(2) == 0 {
            let len = rng.below(30_000) as usize;
            if s.step("ftruncate", || file.set_len(len as u64)).is_some() {
                want.resize(len, 0);
            }
        } else {
            let at = rng.below(30_000) as usize;
            let bytes = vec![rng.below(255) as u8 + 1; 1 + rng.below(6000) as usize];
            if s.step("pwrite", || file.write_all_at(&bytes, at as u64)).is_some() {
                let end = want.len().max(at + bytes.len());
                want.resize(end, 0);
                want[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
    }
}

/// What a READ may bring that could not wait for the kernel's size (docs/semantics.md), on a mount that has counted one.
fn zeros(mount: usize) -> String {
    format!("mount {mount}: zeros behind the end of the truncate file")
}

/// Other users of the truncated file, whose answers the kernel takes in at any time.
fn look_on(s: &Shared, mount: usize, rng: &mut Rng) {
    let path = s.paths[mount].join("truncate");
    let Some(file) = s.step("open", || File::open(&path)) else { return };
    let mut bytes = vec![0; 8192];
    while s.goes_on() {
        match rng.below(3) {
            0 => drop(s.step("stat", || fs::metadata(&path))),
            1 => drop(s.step("fstat", || file.metadata())),
            _ => drop(s.step("pread", || file.read_at(&mut bytes, rng.below(30_000)))),
        }
    }
}

fn name_path(root: &Path, key: &(usize, String)) -> PathBuf {
    root.join(format!("names{}", key.0)).join(&key.1)
}

/// Directory operations against a model; under an outside lock.
fn names(s: &Shared, mount: usize, rng: &mut Rng) {
    let root = &s.paths[mount];
    let pick = |rng: &mut Rng| (rng.below(2) as usize, format!("n{}", rng.below(6)));
    while s.goes_on() {
        let mut model = s.model.lock();
        let (a, b) = (pick(rng), pick(rng));
        let (from, to) = (name_path(root, &a), name_path(root, &b));
        let (has_a, has_b) = (model.names.get(&a).copied(), model.names.get(&b).copied());
        let code = |e: std::io::Error| e.raw_os_error().unwrap_or(-1);
        let kind = rng.below(7);
        let expect = |what: &str, got: Result<(), i32>, want: Result<(), i32>| {
            s.step(what, || Ok(()));
            if got != want {
                s.wrong(format!("mount {mount}: {what} {a:?} {b:?}: {got:?}, not {want:?}"));
            }
            got.is_ok() && want.is_ok()
        };
        match kind {
            0 => {
                let id = model.next;
                let got = OpenOptions::new().write(true).create_new(true).open(&from).map_err(code);
                let got = got.and_then(|f| f.write_all_at(&id.to_le_bytes(), 0).map_err(code));
                if expect("create", got, if has_a.is_some() { Err(libc::EEXIST) } else { Ok(()) }) {
                    model.next += 1;
                    model.names.insert(a, id);
                }
            }
            1 => {
                let got = fs::remove_file(&from).map_err(code);
                if expect("unlink", got, has_a.map(|_| ()).ok_or(libc::ENOENT)) {
                    model.names.remove(&a);
                }
            }
            2 => {
                let got = fs::rename(&from, &to).map_err(code);
                if expect("rename", got, has_a.map(|_| ()).ok_or(libc::ENOENT))
                    && has_a != has_b
                    && let Some(id) = model.names.remove(&a)
                {
                    model.names.insert(b, id);
                }
            }
            3 => {
                let want = match (has_a, has_b) {
                    (None, _) => Err(libc::ENOENT),
                    (_, Some(_)) => Err(libc::EEXIST),
                    _ => Ok(()),
                };
                let got = fs::hard_link(&from, &to).map_err(code);
                if expect("link", got, want) {
                    model.names.extend(has_a.map(|id| (b, id)));
                }
            }
            4 => {
                let mut seen: Vec<_> = match fs::read_dir(root.join(format!("names{}", a.0))) {
                    Ok(list) => {
                        list.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
                    }
                    Err(e) => vec![e.to_string()],
                };
                seen.sort();
                let want: Vec<_> = model.names.keys().filter(|k| k.0 == a.0).map(|k| k.1.clone()).collect();
                s.step("readdir", || Ok(()));
                if seen != want {
                    s.wrong(format!("mount {mount}: readdir {}: {seen:?}, not {want:?}", a.0));
                }
            }
            _ => {
                let got = fs::metadata(&from).map_err(code);
                let links = got.as_ref().map(|m| m.nlink()).unwrap_or_default();
                if expect("stat", got.map(|_| ()), has_a.map(|_| ()).ok_or(libc::ENOENT)) {
                    let want = model.names.values().filter(|id| Some(**id) == has_a).count() as u64;
                    if links != want {
                        s.wrong(format!("mount {mount}: stat {a:?}: {links} links, not {want}"));
                    }
                    let mut id = [0; 8];
                    let read = File::open(&from).and_then(|f| f.read_exact_at(&mut id, 0));
                    if read.is_err() || Some(u64::from_le_bytes(id)) != has_a {
                        s.wrong(format!("mount {mount}: content of {a:?}: {id:?} ({read:?}), not {has_a:?}"));
                    }
                }
            }
        }
    }
}

/// No lock, no checks: only deadlocks and errors that cannot be.
fn chaos(s: &Shared, mount: usize, rng: &mut Rng) {
    let root = s.paths[mount].join("chaos");
    let pick = |rng: &mut Rng| {
        let path = root.join(format!("d{}", rng.below(3)));
        if rng.below(4) == 0 { path } else { path.join(format!("f{}", rng.below(4))) }
    };
    while s.goes_on() {
        let (a, b) = (pick(rng), pick(rng));
        let result = match rng.below(9) {
            0 => fs::create_dir(&a),
            1 => fs::remove_dir(&a),
            2 => fs::remove_file(&a),
            3 => fs::rename(&a, &b),
            4 => fs::hard_link(&a, &b),
            5 => fs::write(&a, vec![1; rng.below(9000) as usize]),
            6 => fs::read_dir(&a).map(|list| list.for_each(|e| drop(e.and_then(|e| e.metadata())))),
            7 => std::os::unix::fs::symlink("nowhere", &a),
            _ => fs::symlink_metadata(&a).map(drop),
        };
        let harmless = [
            libc::ENOENT,
            libc::EEXIST,
            libc::ENOTDIR,
            libc::EISDIR,
            libc::ENOTEMPTY,
            libc::EINVAL,
            libc::ESTALE,
            libc::EPERM,
            libc::ELOOP,
            libc::EBUSY,
        ];
        s.step("chaos", || match result {
            Err(e) if !e.raw_os_error().is_some_and(|c| harmless.contains(&c)) => Err(e),
            _ => Ok(()),
        });
    }
}

pub(super) fn seed() -> u64 {
    std::env::var("CAIRN_STRESS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64)
    })
}

pub(super) fn seconds(default: u64) -> Duration {
    let scale = std::env::var("CAIRN_STRESS_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(scale.unwrap_or(default))
}

/// The users of all mounts: a process of its own (see [`client`]). Prints what is wrong.
#[test]
fn client_of_stress() {
    let Ok(words) = std::env::var(CLIENT) else { return };
    let mut words = words.split(';');
    let mut next = || words.next().expect("as `run` wrote it");
    let load = Load::from(next());
    let mut number = || next().parse::<u64>().expect("as `run` wrote it");
    let (seed, time, threads, until_wrong) =
        (number(), Duration::from_millis(number()), number(), number() == 1);
    let s = Shared::new(next().split(' ').map(PathBuf::from).collect(), load, seed);
    let workers = start(&s, threads as usize);
    // Until the process ends: the last operations and the checks can hang as well, and can take their time.
    let beating = Arc::clone(&s);
    std::thread::spawn(move || {
        loop {
            println!("beat {}", beating.operations.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let deadline = Instant::now() + time;
    while Instant::now() < deadline && !(until_wrong && s.is_wrong()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    s.stop.store(true, Ordering::SeqCst);
    for worker in workers {
        if worker.join().is_err() {
            s.wrong("a thread of the test panicked".into());
        }
    }
    check_records(&s);
    if load.append {
        check_appended(&s);
    }
    let slowest = Duration::from_micros(s.slowest.load(Ordering::Relaxed));
    println!("{} operations, slowest {slowest:?}", s.operations.load(Ordering::Relaxed));
}

fn start(s: &Arc<Shared>, threads: usize) -> Vec<std::thread::JoinHandle<()>> {
    let load = s.load;
    let mut workers = Vec::new();
    for mount in 0..s.paths.len() {
        for thread in 0..threads {
            let mut start = |number: u64, work: fn(&Shared, usize, u64, &mut Rng)| {
                let s = Arc::clone(s);
                let id = (mount * 1000 + thread) as u64 * 10 + number;
                workers.push(std::thread::spawn(move || {
                    let mut rng = Rng::new(s.seed ^ id.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                    work(&s, mount, id, &mut rng);
                }));
            };
            if load.buffered || load.wide || load.mapped || load.direct {
                start(0, |s, mount, _, rng| records(s, mount, rng));
            }
            if load.append {
                start(1, append);
            }
            if load.truncate && thread == 0 {
                start(2, |s, mount, _, rng| truncate(s, mount, rng));
                start(5, |s, mount, _, rng| look_on(s, mount, rng));
            }
            if load.names && thread == 0 {
                start(3, |s, mount, _, rng| names(s, mount, rng));
            }
            if load.chaos && thread == 0 {
                start(4, |s, mount, _, rng| chaos(s, mount, rng));
            }
        }
    }
    workers
}

fn check_records(s: &Shared) {
    for mount in 0..s.paths.len() {
        for file in 0..FILES {
            let Some(bytes) = s.step("read", || fs::read(record_path(&s.paths[mount], file))) else {
                continue;
            };
            for (record, counter) in s.records[file].iter().enumerate() {
                let done = counter.done.load(Ordering::SeqCst);
                let width = width(file);
                if bytes[record * width..][..width] != filled(done, width) {
                    let got = u64::from_le_bytes(bytes[record * width..][..8].try_into().expect("8 bytes"));
                    let started = counter.started.load(Ordering::SeqCst);
                    s.wrong(format!(
                        "at the end mount {mount} shows {got} in record {record} of records{file}, {done} was written (begun: {started}) by mount {}",
                        record % s.paths.len()
                    ));
                }
            }
        }
    }
}

/// Runs the load for `time`, or until something is wrong; what is wrong.
fn run(rig: &Rig, load: &str, time: Duration, threads: usize, until_wrong: bool) -> Vec<String> {
    let root = rig.path(0);
    for file in 0..FILES {
        fs::write(record_path(&root, file), vec![0; width(file) * count(file)]).unwrap();
    }
    for file in ["append", "truncate"] {
        fs::write(root.join(file), b"").unwrap();
    }
    for dir in ["names0", "names1", "chaos"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let load = std::env::var("CAIRN_STRESS_LOAD").unwrap_or_else(|_| load.to_owned());
    let seed = seed();
    eprintln!("CAIRN_STRESS_SEED={seed}");
    let paths =
        (0..rig.mounts.len()).map(|n| rig.path(n).display().to_string()).collect::<Vec<_>>().join(" ");
    let until_wrong = u8::from(until_wrong);
    let words = format!("{load};{seed};{};{threads};{until_wrong};{paths}", time.as_millis());
    let name = "fuse::tests::stress::client_of_stress";
    let (well, said) = client(rig, name, &words, Duration::from_secs(15));
    said.iter().filter(|l| l.contains("operations")).for_each(|l| eprintln!("{l}"));
    for (n, mounted) in rig.mounts.iter().enumerate() {
        eprintln!("mount {n}: {:?}", mounted.coherence().stats);
    }
    let mut wrong: Vec<_> = said.iter().filter_map(|l| l.strip_prefix(WRONG)).map(str::to_owned).collect();
    for (n, mounted) in rig.mounts.iter().enumerate() {
        if mounted.coherence().stats.zeros.load(Ordering::Relaxed) > 0 {
            wrong.retain(|w| !w.contains(&zeros(n)));
        }
    }
    if !well {
        wrong.push(format!("hang or crash: {}", said.join("\n")));
    }
    wrong
}

pub(super) fn must_be_right(rig: Rig, load: &str, time: Duration, threads: usize) {
    let wrong = run(&rig, load, time, threads, false);
    let stats: Vec<_> = rig.mounts.iter().map(|m| format!("{:?}", m.coherence().stats)).collect();
    assert!(wrong.is_empty(), "{} wrong:\n{}\n{}", wrong.len(), wrong.join("\n"), stats.join("\n"));
    let late: u64 =
        rig.mounts.iter().map(|m| m.coherence().stats.late_write_back.load(Ordering::Relaxed)).sum();
    assert_eq!(late, 0, "mapped pages were written back without EX");
    assert!(rig.space.violations().is_empty());
    rig.end();
}

pub(super) fn shared_rig(mounts: u32) -> Option<Rig> {
    can_mount().then(|| {
        let mut rig = Rig::new(mounts, 512);
        rig.mount_shared(mounts as usize);
        rig
    })
}

#[test]
fn two_mounts_agree_under_every_load() {
    if let Some(rig) = shared_rig(2) {
        must_be_right(rig, "all", seconds(8), 2);
    }
}

#[test]
fn a_lone_mount_agrees() {
    if can_mount() {
        let mut rig = Rig::new(1, 512);
        rig.mount_alone();
        must_be_right(rig, "append truncate names chaos", seconds(2), 2);
    }
}

/// Nothing is spared because it is contended: all lifetimes are long.
#[test]
fn two_mounts_agree_with_long_lifetimes() {
    if let Some(rig) = shared_rig(2) {
        rig.mounts.iter().for_each(|m| m.coherence().set_contended(Duration::ZERO));
        must_be_right(rig, "all", seconds(8), 2);
    }
}

#[test]
fn two_mounts_agree_when_the_kernel_lets_pages_go() {
    if let Some(rig) = shared_rig(2) {
        must_be_right(rig, "buffered mapped forget", seconds(3), 2);
    }
}

/// As files are used whose size in the kernel could not be made right in time.
#[test]
fn two_mounts_agree_with_direct_reads() {
    if let Some(rig) = shared_rig(2) {
        rig.mounts.iter().for_each(|m| m.core.probe.reads_direct.store(true, Ordering::Relaxed));
        must_be_right(rig, "all", seconds(3), 2);
    }
}

#[test]
fn three_mounts_agree() {
    if let Some(rig) = shared_rig(3) {
        must_be_right(rig, "all", seconds(6), 1);
    }
}

fn must_notice(part: Part, load: &str) {
    let Some(rig) = shared_rig(2) else { return };
    for mounted in &rig.mounts {
        mounted.coherence().set_contended(Duration::ZERO);
        mounted.coherence().sabotage.skip(part);
    }
    // Ends with the first finding; the limit is for machines that do many other things.
    let wrong = run(&rig, load, Duration::from_secs(60), 2, true);
    assert!(!wrong.is_empty(), "{part:?} was switched off and nothing noticed");
}

#[test]
fn missing_page_invalidation_is_noticed() {
    must_notice(Part::Pages, "buffered");
}

#[test]
fn missing_name_invalidation_is_noticed() {
    must_notice(Part::Names, "names");
}

#[test]
fn mapped_stores_without_exclusive_reads_are_noticed() {
    must_notice(Part::WriterTakesExclusive, "mapped buffered");
}

#[test]
fn sizes_that_the_kernel_did_not_take_in_are_noticed() {
    must_notice(Part::Sizes, "append truncate");
}

#[test]
fn writes_out_of_order_with_passes_are_noticed() {
    must_notice(Part::WriteOrder, "mapped buffered");
}
