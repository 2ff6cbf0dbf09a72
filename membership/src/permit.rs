//! The permit to write: one shared page per node, `<run-dir>/permit`, written by cairnd, read before every submission.
//!
//! A seqlock over eight words. The permit is the *second* line: it makes a node that lost its quorum fall silent early and
//! harmlessly. It is never the proof that a node is silent, because a pause may fall between check and submission.

use crate::clock::boottime;
use cairn_base::{Boottime, Incarnation, ViewId};
use memmap2::{Mmap, MmapMut};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

const PAGE: u64 = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"CAIRNPM1");

// words of the page
const W_MAGIC: usize = 0;
const W_SEQ: usize = 1;
const W_UNTIL: usize = 2;
const W_VIEW: usize = 3;
const W_INCARNATION: usize = 4;
const W_GENERATION: usize = 5;
const W_GUARD: usize = 6;
const WORDS: usize = 7;

/// Reads of a page that is being written, before the reader gives up (a write takes some ten nanoseconds).
const RETRIES: u32 = 10_000;

/// Why nothing may be written now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PermitError {
    #[error("the permit of view {view} is over since {over_ms} ms")]
    Expired { view: ViewId, over_ms: u64 },
    #[error("the permit was withdrawn")]
    Withdrawn,
    #[error("the permit belongs to incarnation {theirs}, this process to {mine}")]
    OtherLife { mine: Incarnation, theirs: Incarnation },
    #[error("the permit page is damaged")]
    Damaged,
}

/// What the page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermitState {
    pub until: Boottime,
    pub view: ViewId,
    pub incarnation: Incarnation,
    /// Rises with each grant after a withdrawal.
    pub generation: u64,
    pub guard: Duration,
}

impl PermitState {
    /// What the page of a life says before its first grant.
    pub const fn withdrawn(incarnation: Incarnation, guard: Duration) -> Self {
        Self { until: Boottime::ZERO, view: ViewId(0), incarnation, generation: 0, guard }
    }

    /// May a process of life `mine` submit a write at `now`?
    pub fn check(&self, now: Boottime, mine: Incarnation) -> Result<(), PermitError> {
        if self.incarnation != mine {
            return Err(PermitError::OtherLife { mine, theirs: self.incarnation });
        }
        if self.until == Boottime::ZERO {
            return Err(PermitError::Withdrawn);
        }
        if now + self.guard >= self.until {
            let over_ms = (now + self.guard).since(self.until).as_millis() as u64;
            return Err(PermitError::Expired { view: self.view, over_ms });
        }
        Ok(())
    }

    /// Extends the permit, or grants it again. It never gets shorter by this call within one view. True when anything changed.
    pub fn grant(&mut self, until: Boottime, view: ViewId) -> bool {
        if self.until == Boottime::ZERO {
            self.generation += 1;
        } else if self.view == view && until <= self.until {
            return false;
        }
        self.until = until;
        self.view = view;
        true
    }

    /// Cuts the permit to at most `until` (a lease that ends earlier than thought). True when anything changed.
    pub fn cut(&mut self, until: Boottime) -> bool {
        let cuts = until < self.until;
        self.until = self.until.min(until);
        cuts
    }
}

#[allow(clippy::cast_ptr_alignment)] // a mapping starts at a page
fn words(base: *const u8) -> &'static [AtomicU64; WORDS] {
    // SAFETY: callers pass the start of a live, page-aligned mapping of at least PAGE bytes that they keep for as long as
    // they use the reference (`Permit` and `PermitWriter` own theirs); all access is atomic.
    unsafe { &*base.cast::<[AtomicU64; WORDS]>() }
}

/// Reader's side, one per mount process. Cheap to clone.
#[derive(Clone)]
pub struct Permit {
    map: Arc<Mmap>,
    mine: Incarnation,
}

impl Permit {
    pub fn open(run_dir: &Path, mine: Incarnation) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).open(run_dir.join("permit"))?;
        if file.metadata()?.len() < PAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "permit page is too short"));
        }
        // SAFETY: the file is the daemon's; it is never truncated, and is read through atomics only.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Arc::new(map), mine })
    }

    /// One consistent copy of the page.
    pub fn read(&self) -> Result<PermitState, PermitError> {
        let w = words(self.map.as_ptr());
        for _ in 0..RETRIES {
            let before = w[W_SEQ].load(Ordering::Acquire);
            if before % 2 == 1 {
                std::hint::spin_loop();
                continue;
            }
            let magic = w[W_MAGIC].load(Ordering::Relaxed);
            let state = PermitState {
                until: Boottime(w[W_UNTIL].load(Ordering::Relaxed)),
                view: ViewId(w[W_VIEW].load(Ordering::Relaxed)),
                incarnation: Incarnation(w[W_INCARNATION].load(Ordering::Relaxed)),
                generation: w[W_GENERATION].load(Ordering::Relaxed),
                guard: Duration::from_nanos(w[W_GUARD].load(Ordering::Relaxed)),
            };
            fence(Ordering::Acquire);
            if w[W_SEQ].load(Ordering::Relaxed) == before {
                return if magic == MAGIC { Ok(state) } else { Err(PermitError::Damaged) };
            }
        }
        Err(PermitError::Damaged)
    }

    /// May a write be submitted at `now`?
    pub fn check_at(&self, now: Boottime) -> Result<(), PermitError> {
        self.read()?.check(now, self.mine)
    }

    /// May a write be submitted now? A load and a clock read; no system call but the vDSO.
    pub fn check(&self) -> Result<(), PermitError> {
        self.check_at(boottime())
    }

    /// The check in the shape of the LUN's guard (`lun::Guarded`).
    pub fn into_guard(self) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
        move || self.check().map_err(|e| e.to_string())
    }
}

/// Writer's side: the daemon, one per life.
pub struct PermitWriter {
    map: MmapMut,
    state: PermitState,
}

impl PermitWriter {
    /// Opens or makes the page, withdrawn, for this life. Mounts of an earlier life that still map it are refused at once.
    pub fn create(run_dir: &Path, incarnation: Incarnation, guard: Duration) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(run_dir.join("permit"))?;
        if file.metadata()?.len() < PAGE {
            file.set_len(PAGE)?;
        }
        // SAFETY: this process is the only writer (it holds the node's daemon lock); access is atomic.
        let map = unsafe { MmapMut::map_mut(&file)? };
        let w = words(map.as_ptr());
        // a writer that died in the middle left an odd number
        let seq = w[W_SEQ].load(Ordering::Relaxed);
        w[W_SEQ].store(seq & !1, Ordering::Relaxed);
        let generation = w[W_GENERATION].load(Ordering::Relaxed);
        w[W_MAGIC].store(MAGIC, Ordering::Relaxed);
        let mut this =
            Self { map, state: PermitState { generation, ..PermitState::withdrawn(incarnation, guard) } };
        this.store();
        Ok(this)
    }

    /// Extends the permit, or grants it again. It never gets shorter by this call within one view.
    pub fn grant(&mut self, until: Boottime, view: ViewId) {
        if self.state.grant(until, view) {
            self.store();
        }
    }

    /// Cuts the permit to at most `until` (a lease that ends earlier than thought).
    pub fn cut(&mut self, until: Boottime) {
        if self.state.cut(until) {
            self.store();
        }
    }

    pub fn withdraw(&mut self) {
        if self.state.until != Boottime::ZERO {
            self.state.until = Boottime::ZERO;
            self.store();
        }
    }

    pub fn state(&self) -> PermitState {
        self.state
    }

    fn store(&mut self) {
        let w = words(self.map.as_ptr());
        let seq = w[W_SEQ].load(Ordering::Relaxed);
        assert!(seq.is_multiple_of(2), "one writer only");
        w[W_SEQ].store(seq + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        w[W_UNTIL].store(self.state.until.0, Ordering::Relaxed);
        w[W_VIEW].store(self.state.view.0, Ordering::Relaxed);
        w[W_INCARNATION].store(self.state.incarnation.0, Ordering::Relaxed);
        w[W_GENERATION].store(self.state.generation, Ordering::Relaxed);
        w[W_GUARD].store(self.state.guard.as_nanos() as u64, Ordering::Relaxed);
        w[W_SEQ].store(seq + 2, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_permit_is_good_for_its_life_and_its_time_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = PermitWriter::create(dir.path(), Incarnation(5), 10 * MS).unwrap();
        let permit = Permit::open(dir.path(), Incarnation(5)).unwrap();
        let t = Boottime::from_millis;
        assert_eq!(permit.check_at(t(1)), Err(PermitError::Withdrawn));
        writer.grant(t(1000), ViewId(8));
        assert_eq!(permit.check_at(t(989)), Ok(()));
        assert_eq!(permit.check_at(t(990)), Err(PermitError::Expired { view: ViewId(8), over_ms: 0 }));
        writer.grant(t(900), ViewId(8));
        assert_eq!(permit.check_at(t(980)), Ok(()), "a grant does not shorten");
        writer.cut(t(500));
        assert!(permit.check_at(t(600)).is_err());
        writer.withdraw();
        assert_eq!(permit.check_at(t(1)), Err(PermitError::Withdrawn));
        let generation = permit.read().unwrap().generation;
        writer.grant(t(2000), ViewId(12));
        assert_eq!(permit.read().unwrap().generation, generation + 1);
        let _next_life = PermitWriter::create(dir.path(), Incarnation(6), MS).unwrap();
        assert_eq!(
            permit.check_at(t(1)),
            Err(PermitError::OtherLife { mine: Incarnation(5), theirs: Incarnation(6) })
        );
    }

    #[test]
    fn a_reader_never_sees_half_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = PermitWriter::create(dir.path(), Incarnation(1), MS).unwrap();
        let permit = Permit::open(dir.path(), Incarnation(1)).unwrap();
        std::thread::scope(|s| {
            let reader = s.spawn(|| {
                let mut last = 0;
                while last < 20_000 {
                    let state = permit.read().unwrap();
                    assert_eq!(state.until.0, state.view.0 * 3, "words of two writes");
                    assert!(state.view.0 >= last);
                    last = state.view.0;
                }
            });
            for v in 1..=20_000 {
                writer.grant(Boottime(v * 3), ViewId(v));
            }
            reader.join().unwrap();
        });
    }
}
