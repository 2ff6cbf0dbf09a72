//! Writing one flush to the journal.
//!
//! ```text
//!   [302 descriptor, data copies]*  [300 descriptor, metadata copies]*  [301 descriptor, LB*]   device flush   header (durable)
//! ```
//!
//! Only the header commits; until it is durable nothing of the flush may reach its place. A failed write or flush ends the
//! mount ([`crate::disk::Disk::withdraw`]): what the device then holds is unknown, so nothing is tried again.

use super::ail::Committed;
use super::log::Log;
use crate::disk::Disk;
use crate::ondisk::header::{MAGIC, MetaHeader, MetaType, has_magic, stamp_for_log};
use crate::ondisk::log::{
    LD_JDATA, LD_METADATA, LD_REVOKE, LHC_SHUTDOWN, LHF_UNMOUNT, LogDescriptor, LogHeader,
};
use crate::ondisk::statfs::StatfsChange;
use crate::ondisk::{put_u32, put_u64};
use crate::trans::OrderedData;
use crate::{BlockNo, Result};
use lun::aligned::AlignedBuf;
use std::sync::Arc;

/// Log blocks collected before they go to the device together.
const CHUNK: usize = 1 << 20;

/// Where the next log block goes, and the number of the next header.
pub(super) struct Head {
    pub(super) next: u32,
    pub(super) sequence: u64,
}

struct Snapshot {
    epoch: u64,
    cost: u32,
    meta: Vec<Committed>,
    data: Vec<Committed>,
    revokes: Vec<u64>,
    ordered: Vec<Arc<dyn OrderedData>>,
    on_durable: Vec<Box<dyn FnOnce() + Send>>,
    local: StatfsChange,
}

impl Log {
    /// One flush. Without `force` nothing happens when the current set is empty.
    pub(super) fn flush_locked(&self, head: &mut Head, flags: u32, force: bool) -> Result<()> {
        self.disk.check()?;
        let st = self.state.lock();
        if st.closed {
            // A glock given up beside the clean end has nothing left to write.
            return if st.current.is_empty() {
                Ok(())
            } else {
                drop(st);
                Err(self.disk.withdraw("changes behind the clean end of the journal"))
            };
        }
        drop(st);
        let Some(snap) = self.snapshot(head, force)? else { return Ok(()) };
        self.write_flush(head, flags, snap).inspect_err(|e| {
            // whatever failed: the flush is torn, and its blocks are neither here nor there
            self.disk.withdraw(&format!("log flush failed: {e}"));
            self.changed.notify_all();
        })
    }

    fn snapshot(&self, head: &Head, force: bool) -> Result<Option<Snapshot>> {
        let mut st = self.state.lock();
        st.closing = true;
        while st.active > 0 {
            self.changed.wait(&mut st);
        }
        if st.current.is_empty() && !force {
            st.closing = false;
            self.changed.notify_all();
            return Ok(None);
        }
        let current = std::mem::take(&mut st.current);
        let jid = self.config.jid.0;
        let (mut meta, mut data) = (Vec::with_capacity(current.blocks.len()), Vec::new());
        let mut bad = None;
        for buf in current.blocks.into_values() {
            if !buf.is_data() {
                match buf.with(MetaHeader::decode) {
                    Ok(h) if h.jid == jid && buf.with(|b| b[8..16] == [0; 8]) => {}
                    Ok(_) => stamp_for_log(&mut buf.write(), jid),
                    Err(e) => bad = Some((buf.block(), e)),
                }
            }
            buf.unpin();
            self.cache.note_logged(buf.block(), head.sequence);
            let content = buf.read();
            if buf.is_data() { &mut data } else { &mut meta }.push(Committed { buf, content });
        }
        let mut revokes: Vec<u64> = current.revokes.into_keys().collect();
        meta.sort_unstable_by_key(|c| c.buf.block());
        data.sort_unstable_by_key(|c| c.buf.block());
        revokes.sort_unstable();
        let cost = self.flush_cost(meta.len() as u32, data.len() as u32, revokes.len() as u32);
        let snap = Snapshot {
            epoch: st.epoch,
            cost,
            meta,
            data,
            revokes,
            ordered: current.ordered.into_values().collect(),
            on_durable: current.on_durable,
            local: st.local,
        };
        st.epoch += 1;
        st.in_flight = cost;
        st.ordered_phase = true;
        st.closing = false;
        self.changed.notify_all();
        let fits = st.used + cost < self.len();
        drop(st);
        if let Some((block, e)) = bad {
            return Err(self.disk.withdraw(&format!("block {block} would be logged without a header: {e}")));
        }
        if !fits {
            return Err(self
                .disk
                .withdraw(&format!("a flush of {cost} blocks would overwrite the log's tail")));
        }
        Ok(Some(snap))
    }

    fn write_flush(&self, head: &mut Head, flags: u32, snap: Snapshot) -> Result<()> {
        let ordered = snap.ordered.iter().try_for_each(|o| o.write_out());
        self.state.lock().ordered_phase = false;
        self.changed.notify_all();
        ordered?;
        // freed blocks: no in-place write of them may be under way once the flush that frees them is durable
        self.ail.revoke(&snap.revokes);

        let first = head.next;
        let mut w = LogWriter::new(self, first, snap.cost);
        w.copies(LD_JDATA, &snap.data)?;
        w.copies(LD_METADATA, &snap.meta)?;
        w.revokes(&snap.revokes)?;
        w.write_out()?;
        let (at, written) = (w.next, w.count);
        assert_eq!(written + 1, snap.cost, "the cost of a flush is computed exactly");
        self.disk.flush()?;

        self.ail.reap(&self.disk);
        let (tail_sequence, tail) = self.ail.oldest().unwrap_or((head.sequence, first));
        self.write_header(head.sequence, at, tail, flags, snap.local)?;

        let blocks: Vec<Committed> = snap.meta.into_iter().chain(snap.data).collect();
        self.ail.commit(head.sequence, first, blocks);
        self.cache.tail_moved(tail_sequence);
        head.sequence += 1;
        head.next = self.after(at);
        let mut st = self.state.lock();
        st.durable_epoch = snap.epoch;
        st.in_flight = 0;
        st.used = self.distance(tail, head.next);
        st.tail_sequence = tail_sequence;
        drop(st);
        self.changed.notify_all();
        for f in snap.on_durable {
            f();
        }
        if self.holds_much() {
            self.kick();
        }
        Ok(())
    }

    /// The last header of a mount: nothing is live any more.
    pub(super) fn write_unmount_header(&self, head: &mut Head) -> Result<()> {
        self.disk.flush()?;
        self.ail.reap(&self.disk);
        let mut st = self.state.lock();
        let clean = st.current.is_empty() && st.active == 0 && self.ail.len() == 0;
        st.ended = clean;
        let local = st.local;
        drop(st);
        if !clean {
            return Err(self.disk.withdraw("the log is not empty at its clean end"));
        }
        self.write_header(head.sequence, head.next, head.next, LHF_UNMOUNT | LHC_SHUTDOWN, local)
            .inspect_err(|e| drop(self.disk.withdraw(&format!("log write failed: {e}"))))?;
        head.sequence += 1;
        head.next = self.after(head.next);
        self.state.lock().closed = true;
        Ok(())
    }

    fn after(&self, at: u32) -> u32 {
        if at + 1 == self.len() { 0 } else { at + 1 }
    }

    /// Blocks from `from` up to but not including `to`, round the ring.
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.len() - from }
    }

    fn write_header(&self, sequence: u64, at: u32, tail: u32, flags: u32, local: StatfsChange) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let c = &self.config;
        let block = c.map.block(at);
        let header = LogHeader {
            jid: c.jid.0,
            sequence,
            flags,
            tail,
            blkno: at,
            nsec: now.subsec_nanos(),
            sec: now.as_secs() as i64,
            addr: block.0,
            jinode: c.jinode,
            statfs_addr: c.statfs_addr,
            quota_addr: c.quota_addr,
            local_total: local.total,
            local_free: local.free,
            local_dinodes: local.dinodes,
        };
        let mut buf = AlignedBuf::zeroed(self.disk.geometry().block_size as usize);
        header.encode(&mut buf);
        self.disk.write_durable(block, &buf)
    }
}

/// Lays log blocks out round the ring and hands them to the device in large pieces.
struct LogWriter<'a> {
    log: &'a Log,
    disk: &'a Disk,
    bsize: usize,
    next: u32,
    /// Blocks laid out so far.
    count: u32,
    chunk: AlignedBuf,
    /// Device runs of the chunk: first block, number of blocks.
    runs: Vec<(u64, usize)>,
    filled: usize,
}

impl<'a> LogWriter<'a> {
    /// For a flush of `cost` blocks.
    fn new(log: &'a Log, next: u32, cost: u32) -> Self {
        let disk: &Disk = &log.disk;
        let bsize = disk.geometry().block_size as usize;
        let chunk = AlignedBuf::zeroed(CHUNK.min(cost as usize * bsize));
        Self { log, disk, bsize, next, count: 0, chunk, runs: Vec::new(), filled: 0 }
    }

    fn write_out(&mut self) -> Result<()> {
        let mut at = 0;
        let mut runs = Vec::with_capacity(self.runs.len());
        for &(block, n) in &self.runs {
            runs.push((BlockNo(block), &self.chunk[at..at + n * self.bsize]));
            at += n * self.bsize;
        }
        if !runs.is_empty() {
            self.disk.write_blocks(&runs)?;
        }
        self.runs.clear();
        self.filled = 0;
        Ok(())
    }

    /// Room for the next log block, with whatever bytes were there before.
    fn slot(&mut self) -> Result<&mut [u8]> {
        if self.filled + self.bsize > self.chunk.len() {
            self.write_out()?;
        }
        let block = self.log.config.map.block(self.next).0;
        match self.runs.last_mut() {
            Some((first, n)) if *first + *n as u64 == block => *n += 1,
            _ => self.runs.push((block, 1)),
        }
        self.next = self.log.after(self.next);
        self.count += 1;
        let at = self.filled;
        self.filled += self.bsize;
        Ok(&mut self.chunk[at..at + self.bsize])
    }

    fn copies(&mut self, kind: u32, blocks: &[Committed]) -> Result<()> {
        let words = if kind == LD_JDATA { 2 } else { 1 };
        let per = self.disk.geometry().ldptrs() / words;
        for group in blocks.chunks(per) {
            let descriptor = self.slot()?;
            descriptor.fill(0);
            let count = group.len() as u32;
            LogDescriptor { kind, length: count + 1, count }.encode(descriptor);
            for (i, c) in group.iter().enumerate() {
                let entry = LogDescriptor::SIZE + 8 * words * i;
                put_u64(descriptor, entry, c.buf.block().0);
                if kind == LD_JDATA {
                    put_u64(descriptor, entry + 8, has_magic(&c.content).into());
                }
            }
            for c in group {
                let escape = kind == LD_JDATA && has_magic(&c.content);
                let slot = self.slot()?;
                slot.copy_from_slice(&c.content);
                if escape {
                    // log data must never look like log structure
                    put_u32(slot, 0, 0);
                }
                debug_assert!(kind == LD_JDATA || slot[..4] == MAGIC.to_be_bytes());
            }
        }
        Ok(())
    }

    fn revokes(&mut self, blocks: &[u64]) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let geo = self.disk.geometry();
        let (here, rest) = blocks.split_at(blocks.len().min(geo.ldptrs()));
        let length = 1 + rest.len().div_ceil(geo.inptrs()) as u32;
        let descriptor = self.slot()?;
        descriptor.fill(0);
        LogDescriptor { kind: LD_REVOKE, length, count: blocks.len() as u32 }.encode(descriptor);
        for (i, &b) in here.iter().enumerate() {
            put_u64(descriptor, LogDescriptor::SIZE + 8 * i, b);
        }
        for group in rest.chunks(geo.inptrs()) {
            let more = self.slot()?;
            more.fill(0);
            MetaHeader::new(MetaType::LogBlock).encode(more);
            for (i, &b) in group.iter().enumerate() {
                put_u64(more, MetaHeader::SIZE + 8 * i, b);
            }
        }
        Ok(())
    }
}
