//! Page READs and WRITEs of one inode on this node: who may run beside whom, and which pages the kernel may have.
//!
//! The kernel fills a page before it sends the WRITE, and removes pages whenever a pass asks for it. A READ between that and the WRITE's
//! application would bring the old bytes back and keep them under a valid lock; so a WRITE that this can happen to shuts a *gate* for READs of
//! its pages, drops those pages once more if one was read since, and opens the gate when it is applied.
//! A READ that waits at a gate may hold a page lock that the drop needs: then it is let in, and the drop is repeated.

use super::range::{Pages, RangeSet};
use crate::glock::is_nowait;
use crate::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// After so long a pass is taken to wait for a READ that waits for us.
pub(super) const STUCK: Duration = Duration::from_micros(100);

struct Reading {
    id: u64,
    pages: Pages,
    /// Its pages are locked by the kernel and hold nothing; an O_DIRECT read may or may not be such.
    certain: bool,
    running: bool,
}

struct Gate {
    id: u64,
    pages: Pages,
    /// READs come in from then on.
    open_at: Option<Instant>,
    /// One came in: the drop has to be repeated.
    again: bool,
}

#[derive(Default)]
struct State {
    last_id: u64,
    reads: Vec<Reading>,
    gates: Vec<Gate>,
    /// Pages that were read since they were last dropped, or may have been (by a direct READ that looks like that of a page).
    cached: RangeSet,
    /// Of these: since the last buffered WRITE was answered. The kernel sends one at a time, so such a page may have been filled by the next one,
    /// dropped by the kernel on its own (memory, an open without the flag to keep it) and read again, all before that WRITE arrives here.
    read_since_write: RangeSet,
    /// Write-back of mapped pages between arrival and reply.
    writing_back: u32,
    /// Buffered WRITEs left pages in the kernel's cache since the last pass.
    written: bool,
    /// A demotion's pass is running; what was served meanwhile.
    pass: Option<RangeSet>,
    /// Passes so far; a buffered WRITE that is the first after one has to order itself.
    passes: u64,
    written_after: u64,
    /// Drops of single WRITEs that were left behind and still remove pages when they get to it.
    left_behind: u32,
}

#[derive(Default)]
pub(super) struct Traffic {
    state: Mutex<State>,
    changed: Condvar,
}

/// A READ between arrival and reply.
#[derive(Clone, Copy)]
pub(super) struct ReadTicket(u64);

/// A WRITE that keeps READs of its pages back.
#[derive(Clone, Copy)]
pub(super) struct GateTicket(u64);

impl Traffic {
    /// A READ has arrived.
    pub(super) fn read_arrived(&self, pages: Pages, certain: bool) -> ReadTicket {
        let mut state = self.state.lock();
        state.last_id += 1;
        let id = state.last_id;
        state.reads.push(Reading { id, pages, certain, running: false });
        ReadTicket(id)
    }

    /// Waits for the gates in its way.
    pub(super) fn read_starts(&self, ticket: ReadTicket) -> Result<()> {
        let mut state = self.state.lock();
        let Some(at) = state.reads.iter().position(|r| r.id == ticket.0) else { return Ok(()) };
        let pages = state.reads[at].pages;
        loop {
            let now = Instant::now();
            let shut =
                state.gates.iter().filter(|g| g.pages.overlaps(pages) && g.open_at.is_none_or(|at| now < at));
            let Some(until) = shut.map(|g| g.open_at).reduce(|a, b| a.zip(b).map(|(a, b)| a.max(b))) else {
                break;
            };
            if is_nowait() {
                return Err(Error::WouldBlock);
            }
            match until {
                Some(until) => drop(self.changed.wait_until(&mut state, until)),
                None => self.changed.wait(&mut state),
            }
        }
        if let Some(read) = state.reads.iter_mut().find(|r| r.id == ticket.0) {
            read.running = true;
        }
        Ok(())
    }

    /// It did not run after all, and waits again.
    pub(super) fn read_waits(&self, ticket: ReadTicket) {
        if let Some(read) = self.state.lock().reads.iter_mut().find(|r| r.id == ticket.0) {
            read.running = false;
        }
        self.changed.notify_all();
    }

    /// Its reply has been written (the glock is still held); `filled`: with data that may be whole pages of the kernel's now.
    pub(super) fn read_ended(&self, ticket: ReadTicket, filled: bool) {
        let mut state = self.state.lock();
        let Some(at) = state.reads.iter().position(|r| r.id == ticket.0) else { return };
        let pages = state.reads.swap_remove(at).pages;
        if filled {
            state.note_cached(pages);
            for gate in state.gates.iter_mut().filter(|g| g.pages.overlaps(pages)) {
                gate.again = true;
            }
        }
        if !state.gates.is_empty() {
            drop(state);
            self.changed.notify_all();
        }
    }

    /// A buffered WRITE was applied; its pages are in the kernel's cache.
    pub(super) fn wrote_through_cache(&self, pages: Pages, passes_before: u64) {
        let mut state = self.state.lock();
        state.written = true;
        state.read_since_write.clear();
        if let Some(again) = &mut state.pass {
            again.insert(pages);
        }
        state.written_after = state.written_after.max(passes_before);
    }

    /// Whether the pages of a buffered WRITE that arrives now may have gone and come back since the kernel filled them; and the count for
    /// `wrote_through_cache`.
    pub(super) fn must_order(&self, pages: Pages) -> (bool, u64) {
        let state = self.state.lock();
        let passed = state.pass.is_some() || state.left_behind > 0 || state.passes > state.written_after;
        let read =
            || state.read_since_write.overlaps(pages) || state.reads.iter().any(|r| r.pages.overlaps(pages));
        (passed || read(), state.passes)
    }

    /// Write-back of a mapped page has arrived.
    pub(super) fn write_back_begins(&self) {
        self.state.lock().writing_back += 1;
    }

    /// Its reply has been written.
    pub(super) fn write_back_ended(&self) {
        self.state.lock().writing_back -= 1;
    }

    /// True when the kernel can have pages of this inode.
    pub(super) fn may_have_pages(&self) -> bool {
        let state = self.state.lock();
        state.written || !state.cached.is_empty()
    }

    pub(super) fn shut_gate(&self, pages: Pages) -> GateTicket {
        let mut state = self.state.lock();
        state.last_id += 1;
        let id = state.last_id;
        state.gates.push(Gate { id, pages, open_at: None, again: false });
        GateTicket(id)
    }

    pub(super) fn open_gate(&self, ticket: GateTicket) {
        self.state.lock().gates.retain(|g| g.id != ticket.0);
        self.changed.notify_all();
    }

    /// Behind a shut gate: returns when no READ of the pages runs, with whether they have to be dropped (again).
    pub(super) fn settle(&self, ticket: GateTicket) -> Result<bool> {
        let mut state = self.state.lock();
        let pages = state.gate(ticket).pages;
        state.gate(ticket).open_at = None;
        while state.reads.iter().any(|r| r.running && r.pages.overlaps(pages)) {
            if is_nowait() {
                return Err(Error::WouldBlock);
            }
            self.changed.wait(&mut state);
        }
        let again = state.gate(ticket).again || state.cached.overlaps(pages);
        if again && is_nowait() {
            return Err(Error::WouldBlock);
        }
        state.gate(ticket).again = false;
        // What is read from now on is noted anew; a demotion that comes meanwhile goes over everything anyway.
        state.cached.remove(pages);
        Ok(again)
    }

    /// The drop begins: READs that still wait after [`STUCK`] are let in.
    pub(super) fn drop_begins(&self, ticket: GateTicket) {
        self.state.lock().gate(ticket).open_at = Some(Instant::now() + STUCK);
        self.changed.notify_all();
    }

    /// A drop goes on in the background: until it has ended, and for the first WRITE after, it is like a pass.
    pub(super) fn drop_left_behind(&self) {
        self.state.lock().left_behind += 1;
    }

    pub(super) fn left_drop_ended(&self) {
        let mut state = self.state.lock();
        state.passes += 1;
        state.left_behind -= 1;
    }

    /// True when nobody here has work with these pages for which a drop of them would wait.
    pub(super) fn is_quiet(&self, pages: Pages) -> bool {
        let state = self.state.lock();
        state.writing_back == 0 && !state.reads.iter().any(|r| r.pages.overlaps(pages))
    }

    /// A demotion's page pass begins.
    pub(super) fn pass_begins(&self) {
        let mut state = self.state.lock();
        state.passes += 1;
        state.pass = Some(RangeSet::default());
    }

    /// `todo` without the pages of READs that wait: those are locked, and hold nothing. While the glock has no users no READ does more than wait.
    pub(super) fn without_waiting(&self, mut todo: RangeSet) -> RangeSet {
        for read in self.state.lock().reads.iter().filter(|r| r.certain) {
            todo.remove(read.pages);
        }
        todo
    }

    /// What was served since the last call. When there is nothing the pass has ended.
    pub(super) fn pass_again(&self) -> Option<RangeSet> {
        let mut state = self.state.lock();
        let again = state.pass.take().unwrap_or_default();
        if again.is_empty() {
            state.cached.clear();
            state.read_since_write.clear();
            state.written = false;
            return None;
        }
        state.pass = Some(RangeSet::default());
        Some(again)
    }
}

impl State {
    fn note_cached(&mut self, pages: Pages) {
        self.cached.insert(pages);
        self.read_since_write.insert(pages);
        if let Some(again) = &mut self.pass {
            again.insert(pages);
        }
    }

    fn gate(&mut self, ticket: GateTicket) -> &mut Gate {
        self.gates
            .iter_mut()
            .find(|g| g.id == ticket.0)
            .expect("invariant: a gate is there as long as its ticket")
    }
}

/// A piece of work that its owner waits for a bounded time, and then may leave behind.
#[derive(Default)]
pub(super) struct Errand {
    state: Mutex<ErrandState>,
    changed: Condvar,
}

#[derive(Default)]
struct ErrandState {
    begun: bool,
    done: bool,
    left: bool,
}

impl Errand {
    /// A thread is there for it.
    pub(super) fn begins(&self) {
        self.state.lock().begun = true;
    }

    pub(super) fn has_begun(&self) -> bool {
        self.state.lock().begun
    }

    /// The work is done; `left` runs when nobody waits for it any more.
    pub(super) fn done(&self, left: impl FnOnce()) {
        let mut state = self.state.lock();
        state.done = true;
        if state.left {
            left();
        }
        self.changed.notify_all();
    }

    /// True when it was done within `limit`.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let mut state = self.state.lock();
        let deadline = Instant::now() + limit;
        while !state.done {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.done
    }

    /// Goes on without it: `left` runs, before the work can be done, unless it is done already (then true).
    pub(super) fn leave(&self, left: impl FnOnce()) -> bool {
        let mut state = self.state.lock();
        if !state.done {
            state.left = true;
            left();
        }
        state.done
    }
}
