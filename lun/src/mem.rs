//! A LUN in memory with a volatile write cache, a write log and power cuts.
//!
//! A write is visible to every handle at once, and durable after the next [`BlockDevice::flush`] through any
//! handle (the cache belongs to the device, not to the initiator). Everything that happened is in a log with
//! the label of the handle that did it. [`MemLun::crash_point`] and [`Trace`] give each state in which a power
//! cut could have left the medium: the durable part, plus any chosen subset of unflushed writes, the last of
//! them possibly torn at a sector.

use crate::image::Image;
use crate::{BlockDevice, LunError, Read, Result, Write, check_range};
use parking_lot::Mutex;
use std::sync::Arc;

/// One event at the device, in the order in which the device saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Position in the log.
    pub seq: u64,
    /// Label of the handle.
    pub who: Arc<str>,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// `batch` names the `write_batch` call: the writes of one batch are unordered among each other.
    Write {
        offset: u64,
        data: Arc<[u8]>,
        batch: u64,
    },
    Flush,
}

impl Logged {
    /// Offset and bytes when it is a write.
    pub fn write(&self) -> Option<(u64, &Arc<[u8]>)> {
        match &self.what {
            What::Write { offset, data, .. } => Some((*offset, data)),
            What::Flush => None,
        }
    }
}

struct State {
    /// What reads see.
    current: Image,
    /// What survives a power cut for sure.
    durable: Image,
    /// Content when the log began.
    base: Image,
    log: Vec<Logged>,
    /// First log position that is not covered by a flush.
    unflushed_from: usize,
    batches: u64,
}

struct Device {
    name: String,
    sector: u32,
    size: u64,
    state: Mutex<State>,
}

/// A handle on an in-memory LUN. Clones and [`MemLun::handle`]s share the device.
#[derive(Clone)]
pub struct MemLun {
    device: Arc<Device>,
    label: Arc<str>,
}

impl MemLun {
    pub fn new(size: u64, sector: u32) -> Self {
        Self::from_image(Image::new(size), sector)
    }

    /// Starts from a picture, for example a crash state. The log is empty, everything is durable.
    pub fn from_image(image: Image, sector: u32) -> Self {
        assert!(sector.is_power_of_two() && (512..=4096).contains(&sector), "sector size");
        assert!(image.size().is_multiple_of(u64::from(sector)), "size is a multiple of the sector");
        let state = State {
            current: image.clone(),
            durable: image.clone(),
            base: image.clone(),
            log: Vec::new(),
            unflushed_from: 0,
            batches: 0,
        };
        let device = Device { name: "mem".to_owned(), sector, size: image.size(), state: Mutex::new(state) };
        Self { device: Arc::new(device), label: Arc::from("") }
    }

    /// Another initiator on the same device: its writes carry `label` in the log.
    pub fn handle(&self, label: &str) -> Self {
        Self { device: Arc::clone(&self.device), label: Arc::from(label) }
    }

    /// What reads see now.
    pub fn current(&self) -> Image {
        self.device.state.lock().current.clone()
    }

    /// What survives a power cut for sure.
    pub fn durable(&self) -> Image {
        self.device.state.lock().durable.clone()
    }

    /// The write log so far.
    pub fn log(&self) -> Vec<Logged> {
        self.device.state.lock().log.clone()
    }

    /// Number of entries in the log; a cheap mark for "from here on".
    pub fn log_len(&self) -> usize {
        self.device.state.lock().log.len()
    }

    /// Log entries from position `from` on.
    pub fn log_since(&self, from: usize) -> Vec<Logged> {
        self.device.state.lock().log[from..].to_vec()
    }

    /// Base picture and log together, for walks over every crash state.
    pub fn trace(&self) -> Trace {
        let s = self.device.state.lock();
        Trace { base: s.base.clone(), sector: self.device.sector, log: s.log.clone() }
    }

    /// Forgets the log: the present durable content is the new base, unflushed writes stay unflushed.
    pub fn restart_log(&self) {
        let mut s = self.device.state.lock();
        s.base = s.durable.clone();
        let keep = s.unflushed_from;
        s.log.drain(..keep);
        for (i, entry) in s.log.iter_mut().enumerate() {
            entry.seq = i as u64;
        }
        s.unflushed_from = 0;
    }

    /// The state in which a power cut at this moment finds the device.
    pub fn crash_point(&self) -> CrashPoint {
        let s = self.device.state.lock();
        CrashPoint {
            sector: self.device.sector,
            durable: s.durable.clone(),
            unflushed: s.log[s.unflushed_from..].to_vec(),
        }
    }

    /// A power cut of the device itself: the content becomes what `choice` leaves, for every handle.
    pub fn power_cut(&self, choice: &Keep) {
        let image = self.crash_point().image(choice);
        let mut s = self.device.state.lock();
        s.current = image.clone();
        s.durable = image.clone();
        s.base = image;
        s.log.clear();
        s.unflushed_from = 0;
    }
}

impl BlockDevice for MemLun {
    fn sector_size(&self) -> u32 {
        self.device.sector
    }

    fn size(&self) -> u64 {
        self.device.size
    }

    fn name(&self) -> &str {
        &self.device.name
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        for r in batch.iter() {
            check_range(self, "read", r.offset, r.buf.len())?;
        }
        // Under the lock: for the blocks that are read one by one a clone of the picture costs more than the copy.
        let s = self.device.state.lock();
        for r in batch {
            s.current.read(r.offset, r.buf);
        }
        Ok(())
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        for w in batch {
            check_range(self, "write", w.offset, w.buf.len())?;
        }
        let mut s = self.device.state.lock();
        s.batches += 1;
        let no = s.batches;
        for w in batch {
            s.current.write(w.offset, w.buf);
            let seq = s.log.len() as u64;
            let what = What::Write { offset: w.offset, data: Arc::from(w.buf), batch: no };
            s.log.push(Logged { seq, who: Arc::clone(&self.label), what });
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), LunError> {
        let mut s = self.device.state.lock();
        let seq = s.log.len() as u64;
        s.log.push(Logged { seq, who: Arc::clone(&self.label), what: What::Flush });
        s.durable = s.current.clone();
        s.unflushed_from = s.log.len();
        Ok(())
    }
}

/// Which unflushed writes reached the medium before the power went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    Everything,
    /// The first `n` in device order.
    Prefix(usize),
    /// Exactly these (indices into [`CrashPoint::unflushed`]), applied in device order.
    Subset(Vec<usize>),
    /// The first `n` whole, and of write `n` only its first `sectors` sectors.
    Torn {
        whole: usize,
        sectors: usize,
    },
    /// Any subset, each element cut to its first so many sectors (`None`: whole), applied in device order.
    Pieces(Vec<(usize, Option<usize>)>),
}

/// A moment of a device's life: what is durable, and what may or may not be.
#[derive(Clone)]
pub struct CrashPoint {
    sector: u32,
    durable: Image,
    unflushed: Vec<Logged>,
}

impl CrashPoint {
    /// Writes that a power cut may lose, in device order.
    pub fn unflushed(&self) -> &[Logged] {
        &self.unflushed
    }

    /// The medium after the power cut. Indices outside the list panic: the choice comes from the test.
    pub fn image(&self, keep: &Keep) -> Image {
        let pieces: Vec<(usize, Option<usize>)> = match keep {
            Keep::Nothing => Vec::new(),
            Keep::Everything => (0..self.unflushed.len()).map(|i| (i, None)).collect(),
            Keep::Prefix(n) => (0..*n).map(|i| (i, None)).collect(),
            Keep::Subset(list) => list.iter().map(|&i| (i, None)).collect(),
            Keep::Torn { whole, sectors } => {
                let mut p: Vec<_> = (0..*whole).map(|i| (i, None)).collect();
                p.push((*whole, Some(*sectors)));
                p
            }
            Keep::Pieces(list) => list.clone(),
        };
        let mut order = pieces;
        order.sort_by_key(|&(i, _)| i);
        let mut image = self.durable.clone();
        for (i, cut) in order {
            let (offset, data) =
                self.unflushed[i].write().expect("invariant: no flush among unflushed entries");
            let len = cut.map_or(data.len(), |s| (s * self.sector as usize).min(data.len()));
            image.write(offset, &data[..len]);
        }
        image
    }
}

/// A base picture and everything that happened since: every crash state of a whole run.
#[derive(Clone)]
pub struct Trace {
    pub base: Image,
    pub sector: u32,
    pub log: Vec<Logged>,
}

impl Trace {
    /// Crash points before entry 0, after entry 0, …, after the last, in order; each step is incremental.
    pub fn points(&self) -> impl Iterator<Item = CrashPoint> + '_ {
        let mut current = self.base.clone();
        let mut point = CrashPoint { sector: self.sector, durable: self.base.clone(), unflushed: Vec::new() };
        (0..=self.log.len()).map(move |n| {
            if let Some(entry) = n.checked_sub(1).map(|i| &self.log[i]) {
                match &entry.what {
                    What::Write { offset, data, .. } => {
                        current.write(*offset, data);
                        point.unflushed.push(entry.clone());
                    }
                    What::Flush => {
                        point.durable = current.clone();
                        point.unflushed.clear();
                    }
                }
            }
            point.clone()
        })
    }

    /// The crash point after the first `n` entries.
    pub fn point(&self, n: usize) -> CrashPoint {
        let start = self.log[..n].iter().rposition(|e| e.what == What::Flush).map_or(0, |i| i + 1);
        let mut durable = self.base.clone();
        for (offset, data) in self.log[..start].iter().filter_map(Logged::write) {
            durable.write(offset, data);
        }
        CrashPoint { sector: self.sector, durable, unflushed: self.log[start..n].to_vec() }
    }
}

#[cfg(test)]
mod tests;
