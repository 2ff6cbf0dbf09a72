//! READ, WRITE and byte-range locks: the requests with rules of their own about glocks and the kernel's pages.

use super::adapter::{Adapter, Core, errno};
use super::coherence::Part;
use super::node::Node;
use super::range::Pages;
use super::size::Shrink;
use crate::glock::{AcquireFlags, Class, LockState, as_request, is_nowait, nowait};
use crate::lockspace::{PlockKind, PlockRequest};
use crate::ops::{Held, WriteMode, Written};
use crate::volume::inode_glock;
use crate::{Error, InodeNo, Result};
use fuser::{Errno, FileHandle, ReplyData, ReplyEmpty, ReplyLock, ReplyWrite, WriteFlags};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What is remembered of an open file: it is its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Handle {
    /// Among nodes: not through the kernel's pages. Write-only handles lose nothing by it, and appends must not be placed by the kernel.
    pub(super) direct: bool,
    /// Can make a mapping that stores.
    pub(super) writer: bool,
}

const DIRECT: u64 = 1;
const WRITER: u64 = 2;

impl Handle {
    pub(super) fn new(flags: i32) -> Self {
        let access = flags & libc::O_ACCMODE;
        let append = flags & libc::O_APPEND != 0;
        Self {
            direct: access == libc::O_WRONLY || (append && access != libc::O_RDONLY),
            writer: access == libc::O_RDWR,
        }
    }

    pub(super) fn number(self) -> FileHandle {
        FileHandle(if self.direct { DIRECT } else { 0 } | if self.writer { WRITER } else { 0 })
    }
}

impl From<FileHandle> for Handle {
    fn from(number: FileHandle) -> Self {
        Self { direct: number.0 & DIRECT != 0, writer: number.0 & WRITER != 0 }
    }
}

/// One WRITE.
#[derive(Clone, Copy)]
struct Write {
    ino: InodeNo,
    offset: u64,
    mode: WriteMode,
    /// Comes from, and stays in, the kernel's pages.
    buffered: bool,
    /// Who sends it.
    thread: u32,
}

/// What a READ has come to.
enum Read<T> {
    Done(T),
    /// The glock has to be given back until this has made the kernel's size of the file smaller.
    Exceeds(Arc<Shrink>),
}

/// What a WRITE leaves to be noted once its reply is written.
struct Done {
    held: Held<Written>,
    /// For a buffered one: the count of page passes under which it was applied.
    passes: Option<u64>,
}

thread_local! {
    /// The last READ's buffer of this thread, so that not each READ clears a new one.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Core {
    pub(super) fn count_writer(&self, ino: InodeNo) {
        self.kernel.nodes.get(ino).writers.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn uncount_writer(&self, ino: InodeNo) {
        let node = self.kernel.nodes.get(ino);
        node.writers.fetch_sub(1, Ordering::SeqCst);
        if node.lookups() == 0 {
            self.kernel.nodes.forget(ino, 0);
        }
    }

    /// The node has EX once after a writer was counted: pages that were cached under SH are covered by it from then on.
    pub(super) fn take_for_writing(&self, ino: InodeNo) -> Result<()> {
        if !self.kernel.does(Part::WriterTakesExclusive) {
            return Ok(());
        }
        let flags = AcquireFlags::PIN | AcquireFlags::SKIP;
        self.fs.volume().glocks().acquire(inode_glock(ino.addr), LockState::Exclusive, flags).map(drop)
    }

    fn write(&self, w: Write, data: &[u8]) -> Result<Done> {
        let write = || self.fs.write(w.ino, w.offset, data, w.mode);
        if !self.kernel.is_clustered() {
            return Ok(Done { held: write()?, passes: None });
        }
        let name = inode_glock(w.ino.addr);
        let glocks = self.fs.volume().glocks();
        let glock = glocks.get(name);
        if w.mode.mapped {
            if glock.state() != LockState::Exclusive {
                self.kernel.stats.late_write_back.fetch_add(1, Ordering::Relaxed);
                tracing::error!(ino = w.ino.addr.0, offset = w.offset, state = ?glock.state(), "a mapped page was written back without EX");
            }
            return Ok(Done { held: as_request(name, Class::WriteBack, false, write)?, passes: None });
        }
        if w.buffered && w.mode.append && is_nowait() {
            return Err(Error::WouldBlock);
        }
        #[cfg(test)]
        if w.buffered && !self.kernel.does(Part::WriteOrder) {
            // Gives what the order is for the time to happen.
            if is_nowait() {
                return Err(Error::WouldBlock);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let class = if w.buffered { Class::Page } else { Class::Ordinary };
        let pin = as_request(name, class, false, || {
            glocks.acquire_on(&glock, LockState::Exclusive, AcquireFlags::PIN | AcquireFlags::SKIP)
        })?;
        let node = self.kernel.nodes.get(w.ino);
        let pages = Pages::of(w.offset, data.len() as u64);
        let (must_order, passes) = node.traffic.must_order(pages);
        let apply = || as_request(name, Class::Pinned, false, write);
        let ordered = self.kernel.does(Part::WriteOrder) && (!w.buffered || must_order || w.mode.append);
        let mut held = if ordered {
            let own = w.buffered.then_some(pages.last);
            let mut pages = pages;
            if w.mode.append {
                let attr = as_request(name, Class::Pinned, false, || self.fs.getattr(w.ino))?;
                let there = Pages::of(attr.value.size, data.len() as u64);
                pages = Pages { first: pages.first.min(there.first), last: pages.last.max(there.last) };
            }
            self.kernel.ordered_write(&glock, &node, w.ino, pages, own, || {
                let held = apply()?;
                let misplaced = w.buffered && held.value.offset != w.offset;
                Ok((held, misplaced))
            })?
        } else {
            apply()?
        };
        held.holders.push(pin);
        Ok(Done { held, passes: w.buffered.then_some(passes) })
    }

    /// `written_back`: of a mapped page, whose arrival was noted there.
    fn answer_write(
        &self,
        w: Write,
        len: usize,
        written_back: Option<Arc<Node>>,
        reply: ReplyWrite,
        result: Result<Done>,
    ) {
        match result {
            Ok(Done { held, passes }) => {
                if w.mode.mapped || w.mode.kill_priv || held.value.offset != w.offset {
                    self.kernel.attributes_changed(w.ino);
                }
                // What lies behind the end of the file in a mapped page is written by being dropped.
                let done = if w.mode.mapped { len } else { held.value.len };
                if let Some(passes) = passes {
                    // Before the reply: from then on the kernel may send the next one.
                    let node = self.kernel.nodes.get(w.ino);
                    node.traffic.wrote_through_cache(Pages::of(w.offset, len as u64), passes);
                }
                if self.kernel.is_clustered() && !w.mode.mapped {
                    // Where the kernel believes to have written.
                    self.kernel.nodes.get(w.ino).size.lock().reaches(w.offset + done as u64, w.thread);
                }
                reply.written(done as u32);
                drop(held);
            }
            Err(e) => {
                if w.mode.mapped {
                    // The kernel keeps such a page and forgets that it is dirty.
                    tracing::error!(ino = w.ino.addr.0, offset = w.offset, err = %e, "write-back of a mapped page failed");
                }
                reply.error(errno(&e));
            }
        }
        if let Some(node) = written_back {
            node.traffic.write_back_ended();
        }
    }
}

impl Adapter {
    pub(super) fn serve_read(
        &self,
        ino: InodeNo,
        handle: Handle,
        offset: u64,
        size: u32,
        flags: i32,
        thread: u32,
        reply: ReplyData,
    ) {
        let direct = flags & libc::O_DIRECT != 0;
        let certain = !handle.direct && !direct;
        let begun = Instant::now();
        let read = move |core: &Core| {
            let mut buffer = BUFFER.take();
            if buffer.len() < size as usize {
                buffer.resize(size as usize, 0);
            }
            let mut read = || {
                let held = core.fs.read(ino, offset, &mut buffer[..size as usize], direct)?;
                let short = held.value < size as usize;
                let shrink = if short { core.end_met(ino, thread, certain, begun)? } else { None };
                Ok(match shrink {
                    Some(shrink) => Read::Exceeds(shrink),
                    None => Read::Done(held),
                })
            };
            match read() {
                Ok(Read::Done(held)) => Ok(Read::Done((held, buffer))),
                other => {
                    BUFFER.set(buffer);
                    other.map(|read| match read {
                        Read::Exceeds(shrink) => Read::Exceeds(shrink),
                        Read::Done(_) => unreachable!("taken above"),
                    })
                }
            }
        };
        let answer = |reply: ReplyData, result: Result<(Held<usize>, Vec<u8>)>| match result {
            Ok((held, buffer)) => {
                reply.data(&buffer[..held.value]);
                BUFFER.set(buffer);
                Some(held)
            }
            Err(e) => {
                reply.error(errno(&e));
                None
            }
        };
        let fills = certain || Pages::are_whole(offset, size.into());
        self.serve_pages(ino, Pages::of(offset, size.into()), certain, fills, reply, read, answer);
    }

    /// The kernel keeps the target of a symbolic link in the first page, and has that locked while it waits: as with READ.
    pub(super) fn serve_readlink(&self, ino: InodeNo, reply: ReplyData) {
        let read = move |core: &Core| core.fs.readlink(ino).map(Read::Done);
        let answer = |reply: ReplyData, result: Result<Held<Vec<u8>>>| match result {
            Ok(held) => {
                reply.data(&held.value);
                Some(held)
            }
            Err(e) => {
                reply.error(errno(&e));
                None
            }
        };
        self.serve_pages(ino, Pages { first: 0, last: 0 }, true, true, reply, read, answer);
    }

    /// A request whose reply fills `pages` of the kernel's cache (surely when `certain`, perhaps when it `fills` whole ones).
    /// A page pass must neither wait for one that waits, nor miss one that has been
    /// answered. `answer` writes the reply, and returns the holders if there was data.
    fn serve_pages<T: 'static, H: 'static>(
        &self,
        ino: InodeNo,
        pages: Pages,
        certain: bool,
        fills: bool,
        reply: ReplyData,
        read: impl Fn(&Core) -> Result<Read<T>> + Send + 'static,
        answer: impl FnOnce(ReplyData, Result<T>) -> Option<H> + Send + 'static,
    ) {
        if !self.core.kernel.is_clustered() {
            let read = move |core: &Core| match read(core)? {
                Read::Done(value) => Ok(value),
                Read::Exceeds(_) => unreachable!("invariant: on a lone mount the kernel knows the size"),
            };
            return self.serve(reply, read, move |_, reply, result| drop(answer(reply, result)));
        }
        let node = self.core.kernel.nodes.get(ino);
        let ticket = node.traffic.read_arrived(pages, certain);
        let name = inode_glock(ino.addr);
        let ended = Arc::clone(&node);
        self.serve(
            reply,
            move |core| {
                node.traffic.read_starts(ticket)?;
                let writers = || {
                    core.kernel.does(Part::WriterTakesExclusive) && node.writers.load(Ordering::SeqCst) > 0
                };
                let mut exclusive = writers();
                loop {
                    let result = as_request(name, Class::Page, exclusive, || read(core));
                    match result {
                        Ok(Read::Exceeds(shrink)) => {
                            node.traffic.read_waits(ticket);
                            shrink.wait();
                            node.traffic.read_starts(ticket)?;
                        }
                        // A writer that was counted before we had the glock may map the page before the glock goes.
                        Ok(_) if !exclusive && writers() => exclusive = true,
                        Ok(Read::Done(value)) => return Ok(value),
                        Err(Error::WouldBlock) => {
                            node.traffic.read_waits(ticket);
                            return Err(Error::WouldBlock);
                        }
                        Err(e) => return Err(e),
                    }
                }
            },
            move |_, reply, result| {
                let held = answer(reply, result);
                ended.traffic.read_ended(ticket, fills && held.is_some());
                drop(held);
            },
        );
    }

    #[expect(clippy::too_many_arguments, reason = "the request's own")]
    pub(super) fn serve_write(
        &self,
        ino: InodeNo,
        handle: Handle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: i32,
        thread: u32,
        reply: ReplyWrite,
    ) {
        let mapped = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let direct = flags & libc::O_DIRECT != 0 && !mapped;
        let through_pages = !self.core.kernel.is_clustered() || !handle.direct;
        let w = Write {
            ino,
            offset,
            mode: WriteMode {
                append: flags & libc::O_APPEND != 0 && !mapped,
                direct,
                // For buffered writes the kernel sends an FSYNC of its own.
                sync: flags & libc::O_DSYNC != 0 && !mapped && (direct || !through_pages),
                kill_priv: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
                mapped,
            },
            buffered: through_pages && !direct,
            thread,
        };
        let written_back = (mapped && self.core.kernel.is_clustered()).then(|| {
            let node = self.core.kernel.nodes.get(ino);
            node.traffic.write_back_begins();
            node
        });
        match nowait(|| self.core.write(w, data)) {
            Err(Error::WouldBlock) => {
                let core = Arc::clone(&self.core);
                let data = data.to_vec();
                let pool = if mapped { &self.write_back } else { &self.blocked };
                pool.run(move || {
                    let result = core.write(w, &data);
                    core.before_slow_reply();
                    core.answer_write(w, data.len(), written_back, reply, result);
                });
            }
            result => self.core.answer_write(w, data.len(), written_back, reply, result),
        }
    }
}

/// End of a lock that reaches to the end of the file, in the kernel's words.
const TO_THE_END: u64 = i64::MAX as u64;

fn plock(ino: InodeNo, owner: u64, (start, end): (u64, u64), typ: i32, pid: u32) -> Option<PlockRequest> {
    let kind = match typ {
        libc::F_RDLCK => PlockKind::Read,
        libc::F_WRLCK => PlockKind::Write,
        libc::F_UNLCK => PlockKind::Unlock,
        _ => return None,
    };
    let end = if end >= TO_THE_END { u64::MAX } else { end };
    (start <= end).then_some(PlockRequest { ino: ino.addr.0, owner, pid, start, end, kind })
}

impl Core {
    pub(super) fn set_lock(
        &self,
        ino: InodeNo,
        owner: u64,
        range: (u64, u64),
        typ: i32,
        pid: u32,
        wait: bool,
        reply: ReplyEmpty,
    ) {
        let Some(request) = plock(ino, owner, range, typ, pid) else { return reply.error(Errno::EINVAL) };
        if request.kind != PlockKind::Unlock {
            self.kernel.nodes.get(ino).lock_owners.lock().insert(owner);
        }
        let done = move |result: Result<()>| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        };
        self.fs.volume().glocks().space().plock(request, wait, Box::new(done));
    }

    pub(super) fn get_lock(
        &self,
        ino: InodeNo,
        owner: u64,
        range: (u64, u64),
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let Some(request) = plock(ino, owner, range, typ, pid) else { return reply.error(Errno::EINVAL) };
        let done = move |result: Result<Option<crate::lockspace::PlockConflict>>| match result {
            Ok(Some(c)) => {
                let typ = if c.kind == PlockKind::Write { libc::F_WRLCK } else { libc::F_RDLCK };
                reply.locked(c.start, c.end.min(TO_THE_END), typ, c.pid);
            }
            Ok(None) => reply.locked(0, 0, libc::F_UNLCK, 0),
            Err(e) => reply.error(errno(&e)),
        };
        self.fs.volume().glocks().space().plock_test(request, Box::new(done));
    }

    /// A file description of this owner was closed.
    pub(super) fn release_locks(&self, ino: InodeNo, owner: u64) {
        let Some(node) = self.kernel.nodes.find(ino) else { return };
        if !node.lock_owners.lock().remove(&owner) {
            return;
        }
        let request =
            PlockRequest { ino: ino.addr.0, owner, pid: 0, start: 0, end: u64::MAX, kind: PlockKind::Unlock };
        let done = move |result: Result<()>| {
            if let Err(e) = result {
                tracing::warn!(ino = ino.addr.0, err = %e, "byte-range locks of a closed file could not be released");
            }
        };
        self.fs.volume().glocks().space().plock(request, false, Box::new(done));
    }
}
