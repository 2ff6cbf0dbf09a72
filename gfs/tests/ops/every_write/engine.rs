//! Every place where a power cut can stop a workload, and what is demanded of the volume that it leaves.
//!
//! * Every prefix of the device's writes, in the order in which they were sent, down to the single block of a write of many.
//! * Between two flushes also random subsets of the writes, each of them whole or torn at a sector: a cache keeps what it wants.
//!
//! Each such state is replayed by our replay and checked by our checker, and the tree must be one version of the model: not older than
//! what was acknowledged, in whole operations. A sample is mounted, used and unmounted; a sample is crashed again while it is replayed; a
//! sample is judged by `fsck.gfs2 -n`, another one is replayed by `fsck.gfs2 -y` itself and must show the same version.

use super::judge::Seen;
use super::run::{History, Run};
use crate::model::Rng;
use crate::rig::{Node, Rig, scratch, volume_image_with};
use gfs::lockspace::local::LocalSpace;
use gfs::ondisk::dinode::{DIF_INHERIT_JDATA, Dinode, Time};
use gfs::ops::{Atime, Fs, FsOptions};
use gfs::reader::Reader;
use gfs::volume::{MountOptions, Volume};
use lun::image::Image;
use lun::mem::{CrashPoint, Keep, Logged, MemLun};
use lun::{BlockDevice, Lun};
use std::collections::BTreeMap;
use std::io::Write;
use std::process::Command;
use std::sync::{Arc, Mutex};

pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) bsize: u32,
    pub(crate) mib: u64,
    /// Contents of all files go through the log. Only other systems set the flag: it is written into the root directory before the mount.
    pub(crate) journaled: bool,
    /// Not part of what is crashed.
    pub(crate) setup: fn(&mut Run<'_>),
    pub(crate) body: fn(&mut Run<'_>),
}

/// How many states got which treatment.
#[derive(Default, Debug)]
pub(crate) struct Counts {
    pub(crate) states: usize,
    pub(crate) mounted: usize,
    pub(crate) crashed_again: usize,
    pub(crate) fsck: usize,
    pub(crate) fsck_replayed: usize,
}

/// Crash states that are wrong.
#[derive(Debug)]
pub(crate) struct Violation {
    pub(crate) event: usize,
    pub(crate) keep: Keep,
    pub(crate) why: String,
}

/// `CAIRN_CRASH_DEPTH`: so many times the usual subsets, mounts and runs of fsck.
fn depth() -> usize {
    std::env::var("CAIRN_CRASH_DEPTH").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// Epochs (what lies between two flushes) of so many writes are crashed at every event.
const WHOLE_EPOCH: usize = 128;

/// The events at which to crash, each with the writes of its epoch: all of them; but of an epoch of more than [`WHOLE_EPOCH`] writes (blocks
/// of a large structure going to their places in the order in which they lie on disk) its first and last quarter of so many, and as many
/// evenly spread in between.
fn events(log: &[Logged], depth: usize) -> Vec<bool> {
    let most = WHOLE_EPOCH * depth;
    let mut chosen = vec![true; log.len() + 1];
    let mut from = 0;
    for at in 0..=log.len() {
        if log.get(at).is_some_and(|e| e.write().is_some()) {
            continue;
        }
        // Event n is the moment after n entries: this epoch's are from + 1 to at.
        let len = at - from;
        if len > most {
            let (edge, step) = (most / 4, len.div_ceil(most / 2));
            for n in 1..=len {
                chosen[from + n] = n <= edge || n > len - edge || n % step == 0;
            }
        }
        from = at + 1;
    }
    chosen
}

/// Fresh volumes, made once.
pub(crate) fn fresh(bsize: u32, mib: u64) -> Image {
    static MADE: Mutex<BTreeMap<(u32, u64), Image>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap();
    made.entry((bsize, mib)).or_insert_with(|| volume_image_with(bsize, mib, 1, &["-r", "32"])).clone()
}

fn mount(lun: Lun) -> Node {
    let vol = Volume::mount(lun, LocalSpace::new(), MountOptions::default()).unwrap();
    // Reading must not change anything: the model would not know of it.
    Node { fs: Fs::new(vol, FsOptions { atime: Atime::Never, ..FsOptions::default() }) }
}

/// Sets flags of the root directory's dinode.
fn with_root_flags(image: Image, flags: u32) -> Image {
    let lun = MemLun::from_image(image, 512);
    let reader = Reader::open(&(Arc::new(lun.clone()) as Lun)).unwrap();
    let (root, bsize) = (reader.superblock().root.addr, u64::from(reader.geometry().block_size));
    let mut block = vec![0; bsize as usize];
    lun.read_at(root.0 * bsize, &mut block).unwrap();
    let mut dinode = Dinode::decode(&block).unwrap();
    dinode.flags |= flags;
    dinode.encode(&mut block);
    lun.write_at(root.0 * bsize, &block).unwrap();
    lun.current()
}

/// Runs a workload on a fresh volume; `device` is what the mount writes through, on top of the logging LUN. `begin` is called between
/// setup and body.
pub(crate) fn record(w: &Workload, device: impl FnOnce(MemLun) -> Lun, begin: impl FnOnce()) -> History {
    let mut image = fresh(w.bsize, w.mib);
    if w.journaled {
        image = with_root_flags(image, DIF_INHERIT_JDATA);
    }
    let rig = Rig { lun: MemLun::from_image(image, 512) };
    let node = mount(device(rig.lun.clone()));
    let mut run = Run::new(&rig, &node);
    (w.setup)(&mut run);
    run.begin();
    begin();
    (w.body)(&mut run);
    run.check_live();
    // What follows promises nothing: the crash may also come while everything is brought into place.
    let (at, mut history) = (run.events(), run.end(rig.lun.trace()));
    node.unmount();
    history.trace = rig.lun.trace();
    assert!(history.trace.log.len() > at, "an unmount writes");
    history.synced.push((history.trace.log.len(), history.versions.len() - 1));
    history
}

struct Engine<'a> {
    h: &'a History,
    rng: Rng,
    effort: Effort,
    counts: Counts,
}

/// How thoroughly one state is looked at.
#[derive(Clone, Copy, Default)]
struct Look {
    mount: bool,
    again: bool,
    fsck: bool,
    fsck_replays: bool,
}

/// What is tried beside the prefixes.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    /// Random subsets of the writes of an epoch, for each write of it.
    pub(crate) subsets: usize,
    /// Mounts, crashes in the replay and runs of fsck.gfs2 for a sample.
    pub(crate) samples: bool,
}

impl Effort {
    pub(crate) const USUAL: Self = Self { subsets: 2, samples: true };
}

/// All crash states of a history. Ends at the first that is wrong.
pub(crate) fn enumerate(
    w: &Workload,
    h: &History,
    seed: u64,
    effort: Effort,
) -> Result<Counts, Box<Violation>> {
    let mut e = Engine { h, rng: Rng::new(seed), effort, counts: Counts::default() };
    let bsize = w.bsize as usize;
    let depth = depth();
    let chosen = events(&h.trace.log, depth);
    for (event, point) in h.trace.points().enumerate().filter(|(event, _)| chosen[*event]) {
        let open = point.unflushed();
        if open.is_empty() {
            // The medium is as it was before the flush; only more may have been promised.
            if event == 0 || h.floor(event) != h.floor(event - 1) {
                e.state(event, &point, Keep::Everything)?;
            }
            continue;
        }
        let last = open.len() - 1;
        let len = open[last].write().expect("invariant: no flush among unflushed writes").1.len();
        // Inside the write that came last: between its blocks, all of them when they are few.
        let blocks = len / bsize;
        let inside: Vec<usize> = match blocks {
            0..=8 => (1..blocks).collect(),
            _ => (0..4 * depth).map(|_| 1 + e.rng.below(blocks as u64 - 1) as usize).collect(),
        };
        for n in inside {
            e.state(event, &point, Keep::Torn { whole: last, sectors: n * bsize / 512 })?;
        }
        e.state(event, &point, Keep::Everything)?;
        if last > 0 {
            for _ in 0..effort.subsets * depth {
                let keep = e.pieces(&point);
                e.state(event, &point, keep)?;
            }
        }
    }
    Ok(e.counts)
}

impl Engine<'_> {
    /// Any subset of the unflushed writes, some of them torn.
    fn pieces(&mut self, point: &CrashPoint) -> Keep {
        let lost = 1 + self.rng.below(3);
        let mut pieces = Vec::new();
        for (i, write) in point.unflushed().iter().enumerate() {
            if self.rng.below(4) < lost {
                continue;
            }
            let sectors = write.write().map_or(0, |(_, data)| data.len() / 512) as u64;
            let torn = sectors > 1 && self.rng.below(3) == 0;
            pieces.push((i, torn.then(|| 1 + self.rng.below(sectors - 1) as usize)));
        }
        Keep::Pieces(pieces)
    }

    fn state(&mut self, event: usize, point: &CrashPoint, keep: Keep) -> Result<(), Box<Violation>> {
        let image = point.image(&keep);
        let samples = self.effort.samples;
        // One of so many, and at the latest the 16th, so that no workload goes without.
        let by_now = self.counts.states == 15;
        let one_in = |rng: &mut Rng, n: u64, so_far: usize| {
            let drawn = rng.below((n / depth() as u64).max(1)) == 0;
            samples && (drawn || by_now && so_far == 0)
        };
        let fsck = one_in(&mut self.rng, 60, self.counts.fsck);
        let look = Look {
            mount: fsck || one_in(&mut self.rng, 12, self.counts.mounted),
            again: one_in(&mut self.rng, 25, self.counts.crashed_again),
            fsck,
            fsck_replays: one_in(&mut self.rng, 80, self.counts.fsck_replayed),
        };
        self.counts.states += 1;
        self.counts.mounted += usize::from(look.mount);
        self.counts.crashed_again += usize::from(look.again);
        self.counts.fsck += usize::from(look.fsck);
        self.counts.fsck_replayed += usize::from(look.fsck_replays);
        self.judge(event, &image, look).map_err(|why| {
            if let Ok(path) = std::env::var("KEEP_IMAGE") {
                image.save(path.as_ref()).unwrap();
            }
            Box::new(Violation { event, keep, why })
        })
    }

    fn judge(&mut self, event: usize, image: &Image, look: Look) -> Result<(), String> {
        let crashed = MemLun::from_image(image.clone(), 512);
        let version = self.replay_and_check(event, &crashed)?;
        if look.again {
            let trace = crashed.trace();
            let at = self.rng.below(trace.log.len() as u64 + 1) as usize;
            let point = trace.point(at);
            let keep = self.pieces(&point);
            let again = self.replay_and_check(event, &MemLun::from_image(point.image(&keep), 512));
            let again =
                again.map_err(|e| format!("crash in the replay, after event {at} of it, {keep:?}: {e}"))?;
            if again != version {
                return Err(format!("crash in the replay: version {again} instead of {version}"));
            }
        }
        if look.mount {
            let after = self.use_it(event, image, version).map_err(|e| format!("mounted: {e}"))?;
            if look.fsck {
                fsck(&after, "-n")
                    .map_err(|e| format!("mounted, used, unmounted, then fsck.gfs2 -n: {e}"))?;
            }
        }
        if look.fsck_replays {
            let theirs = fsck(image, "-y").map_err(|e| format!("fsck.gfs2 -y: {e}"))?;
            let lun: Lun = Arc::new(MemLun::from_image(theirs.clone(), 512));
            let seen = Seen::read(&lun).map_err(|e| format!("after fsck.gfs2 -y: {e}"))?;
            let again = seen.version(self.h, event).map_err(|e| format!("after fsck.gfs2 -y: {e}"))?;
            if again != version {
                return Err(format!("fsck.gfs2 -y replays to version {again}, we to {version}"));
            }
            fsck(&theirs, "-n").map_err(|e| format!("fsck.gfs2 -y, then -n: {e}"))?;
        }
        Ok(())
    }

    /// Our replay, our checker, the model. Returns the version that is there.
    fn replay_and_check(&self, event: usize, lun: &MemLun) -> Result<usize, String> {
        let lun: Lun = Arc::new(lun.clone());
        let reader = Reader::open(&lun).map_err(|e| format!("open: {e}"))?;
        reader.replay_all(Time { sec: 1_800_000_000, nsec: 0 }).map_err(|e| format!("replay: {e}"))?;
        let report = gfs::check::check(&lun).map_err(|e| format!("check: {e}"))?;
        if !report.is_consistent() {
            return Err(format!("check after replay: {:#?}", report.faults));
        }
        Seen::read(&lun).map_err(|e| e.to_string())?.version(self.h, event)
    }

    /// A mount finishes what was left unfinished, and the volume is fully usable.
    fn use_it(&self, event: usize, image: &Image, version: usize) -> Result<Image, String> {
        let lun = MemLun::from_image(image.clone(), 512);
        let shared: Lun = Arc::new(lun.clone());
        let node = mount(Arc::clone(&shared));
        node.fs.sweep_orphans().map_err(|e| format!("sweep: {e}"))?;
        node.fs.syncfs().map_err(|e| format!("sync: {e}"))?;
        let seen = Seen::read(&shared).map_err(|e| e.to_string())?;
        let now = seen.version(self.h, event)?;
        if now != version {
            return Err(format!("shows version {now}, the replay alone shows {version}"));
        }
        // Growing a file shows zeros, whatever a lost write has left behind its end.
        for (path, _, data) in seen.files() {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let mut at = node.root();
            for part in dir.split('/').filter(|part| !part.is_empty()) {
                at = node.get(at, part).expect("was there a moment ago").ino;
            }
            let file = node.get(at, name).expect("was there a moment ago").ino;
            node.truncate(file, data.len() as u64 + 3000);
            let after = node.read(file, 0, data.len() + 3000);
            if after[..data.len()] != data[..] || after[data.len()..].iter().any(|b| *b != 0) {
                return Err(format!("{path}: what was behind the end shows when it grows"));
            }
        }
        let new = node.file(node.root(), "made after the crash");
        node.write(new, 0, &[9; 20_000]);
        node.unmount();
        let report = gfs::check::check(&shared).map_err(|e| format!("check: {e}"))?;
        if !report.is_clean() {
            return Err(format!("check after unmount: {:#?}", report.faults));
        }
        Ok(lun.durable())
    }
}

/// `fsck.gfs2` on a copy, which is returned. With `-n` anything but a clean volume is an error, with `-y` what it could not repair.
fn fsck(image: &Image, flag: &str) -> Result<Image, String> {
    let dir = scratch();
    let path = dir.path().join("lun");
    image.save(&path).unwrap();
    let out = Command::new("timeout").args(["-k", "1", "60", "fsck.gfs2", flag]).arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let bad = flag == "-n" && ["dirty", "corrupt", "bitmap says", "wrong"].iter().any(|w| text.contains(w));
    if bad || !matches!((flag, out.status.code()), (_, Some(0)) | ("-y", Some(1))) {
        return Err(format!("{}\n{text}", out.status));
    }
    Ok(Image::load(&path).unwrap())
}

/// Runs a workload and enumerates. Panics at the first wrong state, with everything that repeats it.
pub(crate) fn crash_at_every_write(w: &Workload) {
    let seed = std::env::var("CAIRN_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let h = record(w, |lun| Arc::new(lun), || ());
    let writes = h.trace.log.iter().filter(|e| e.write().is_some()).count();
    let began = std::time::Instant::now();
    match enumerate(w, &h, seed, Effort::USUAL) {
        Ok(c) => {
            // Past the capture of the test harness: what was really done belongs into the log of every run.
            let _ = writeln!(
                std::io::stderr(),
                "{} ({}): CAIRN_SEED={seed}, {writes} writes, {} flushes, {} versions: {} crash states, {} of them mounted and used, \
                 {} crashed again in the replay, {} judged and {} replayed by fsck.gfs2, {:.1} s",
                w.name,
                w.bsize,
                h.trace.log.len() - writes,
                h.versions.len(),
                c.states,
                c.mounted,
                c.crashed_again,
                c.fsck,
                c.fsck_replayed,
                began.elapsed().as_secs_f64()
            );
            assert!(
                c.states >= writes.min(WHOLE_EPOCH),
                "{}: {} states of {writes} writes",
                w.name,
                c.states
            );
            let all = [c.mounted, c.crashed_again, c.fsck, c.fsck_replayed];
            assert!(all.iter().all(|n| *n > 0), "{}: a treatment was left out: {c:?}", w.name);
        }
        Err(v) => panic!(
            "{} ({}), CAIRN_SEED={seed}: crash at event {} of {}, {:?}: {}",
            w.name,
            w.bsize,
            v.event,
            h.trace.log.len(),
            v.keep,
            v.why
        ),
    }
}
