//! The size in the kernel's inode.
//!
//! Reads through pages, mappings and seeks to the end go by the size in the kernel's inode (here *K*). The kernel asks for it (GETATTR), but throws the reply away when
//! anything of the inode has changed since it asked; and a reply that it does take in and that changes K is followed by `truncate_pagecache`, at any later
//! time and without a lock: what a buffered write has put behind the new size meanwhile goes to the LUN as zeros, what was read anew is cleared.
//!
//! The rule: **a reply to GETATTR or LOOKUP never changes K.** Before it is written, with the glock held, K is
//!
//! * made greater where it is too small: by `FUSE_NOTIFY_STORE` ([`Notify::grow`](super::notify::Notify::grow)), which the kernel always takes in, and which clears nothing.
//!   It may have to wait for a page that a READ has locked, but K is greater before that;
//! * left alone where it is too great: a notification makes the kernel throw the reply away. `stat` shows what the reply says all the same.
//!
//! Whatever changes K steps the inode's `attr_version`, and with that all replies that were told before are thrown away. So one that is taken in says what K is.
//! The exceptions come with `i_rwsem`, which every buffered write holds: replies to SETATTR and LINK, and the answer to a seek to the end (below). The reply to a CREATE
//! that opens what another node has just made comes without; that inode is not in use here yet, but for the time between a LOOKUP and this reply.
//!
//! K is too great only after another node has made the file shorter. Then a read of pages would find zeros up to K, so before a READ that meets the end is
//! answered, K is made smaller ([`Shrink`]): a thread of ours sets times of the file, and that SETATTR is answered with the size and changes nothing. The kernel takes it
//! in whatever has happened meanwhile, and nobody writes then. For a seek to the end (which holds `i_rwsem` itself) the thread asks for attributes.
//! It needs `CAP_DAC_READ_SEARCH`, to find the inode by its handle; a mount of a user goes without.
//! A buffered write may hold `i_rwsem` and wait for the page that the READ has locked. A READ ahead fails then: nobody waits for its answer, and the kernel reads the page
//! once more when it is wanted. Any other is answered after a while as it is (`CoherenceStats::zeros`, docs/semantics.md).
//!
//! Such threads have no descriptors of the server's: one that waits for an answer of its own process keeps what it has open from being closed, and a
//! killed server whose `/dev/fuse` is open does not end. So they do nothing but wait for the kernel; they do not log, and give up no glock.
//!
//! Source: fs/fuse/inode.c (`fuse_change_attributes`, `fuse_fh_to_dentry`, `FILEID_INO64_GEN`), dev.c (`fuse_notify_store`), file.c (`fuse_write_update_attr`,
//! `fuse_read_update_size`, `fuse_file_llseek`), dir.c (`fuse_do_setattr`) of Linux 6.18; open_by_handle_at(2), statx(2), utimensat(2).

mod known;

pub(super) use known::KernelSize;

use super::adapter::{Adapter, Core, errno};
use super::coherence::{Coherence, Part};
use super::node::Node;
use super::traffic::Errand;
use crate::glock::{Class, Glock, as_request, is_nowait};
use crate::ondisk::dinode::{S_IFMT, S_IFREG};
use crate::ops::{Attr, Held};
use crate::volume::inode_glock;
use crate::{Error, InodeNo, Result};
use fuser::{INodeNo, ReplyAttr};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A notification that makes K greater is waited for as long with the glock held. Longer, it waits for a READ that may wait for this glock.
const GROW: Duration = Duration::from_millis(5);
/// For as long a request begins anew because of it.
const GROW_LIMIT: Duration = Duration::from_secs(10);
/// For as long a READ waits for K to become smaller: what holds `i_rwsem` may wait for other nodes.
const SHRINK_LIMIT: Duration = Duration::from_secs(2);
/// The same where this node has handles for reading and writing: a buffered write may hold `i_rwsem` and wait for the page that this READ has locked.
const SHRINK_LIMIT_WRITERS: Duration = Duration::from_millis(500);
/// And where the kernel repeats the READ if it fails.
const SHRINK_LIMIT_AHEAD: Duration = Duration::from_millis(5);
/// Between two looks at K when it is expected to change; and before a READ looks for itself whether it has.
const LOOK: Duration = Duration::from_micros(200);
/// For as long a look is waited for with the glock held.
const LOOK_LIMIT: Duration = Duration::from_millis(5);
/// A thread that was told of the size waits for nothing but a processor and READs, which are let in.
const TOLD_LIMIT: Duration = Duration::from_secs(1);

/// What one of our threads asks ourselves.
#[derive(Clone)]
enum Question {
    /// What opening the root directory takes.
    Root,
    /// To take in the size of an inode.
    Size(INodeNo, Arc<Shrink>),
}

/// Our own threads' requests to one mount.
#[derive(Default)]
pub(super) struct Sizes {
    /// Absolute path of the mount.
    dir: OnceLock<CString>,
    /// Its device, looked at when it is first needed; or why we cannot find inodes.
    device: OnceLock<std::result::Result<(u32, u32), String>>,
    /// By the thread that asks.
    asking: Mutex<HashMap<u32, Question>>,
    /// Entries of `asking`.
    count: AtomicUsize,
    warned: AtomicBool,
}

/// How the kernel is made to ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    /// By setting times.
    Set,
    /// By asking for attributes, for one that holds `i_rwsem` already.
    Get,
}

/// K of one inode becomes smaller: one at a time.
pub(super) struct Shrink {
    how: How,
    /// No need for it unless K exceeds this.
    size: u64,
    state: Mutex<ShrinkState>,
    changed: Condvar,
}

#[derive(Default)]
struct ShrinkState {
    /// Looks at K that were asked for, and of these answered; the last answer.
    wanted: u64,
    looked: u64,
    seen: u64,
    /// Our own request is answered; the glock is held until the thread has come back.
    told: bool,
    /// No more looks.
    done: bool,
}

impl Shrink {
    /// K, looked at after this was called. None: it has ended, or did not come to it in time: the thread may wait for others, who may wait for the caller's glock.
    fn look(&self) -> Option<u64> {
        let mut state = self.state.lock();
        state.wanted += 1;
        let mine = state.wanted;
        self.changed.notify_all();
        let deadline = Instant::now() + LOOK_LIMIT;
        while !state.done && state.looked < mine {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        (state.looked >= mine).then_some(state.seen)
    }

    fn is_told(&self) -> bool {
        self.state.lock().told
    }

    /// Returns when it is worth while to look again, or some time has passed.
    pub(super) fn wait(&self) {
        let mut state = self.state.lock();
        let deadline = Instant::now() + 10 * LOOK;
        let worth = |state: &ShrinkState| state.done || (state.told && self.how == How::Set);
        while !worth(&state) && !self.changed.wait_until(&mut state, deadline).timed_out() {}
    }

    fn tell(&self) {
        self.state.lock().told = true;
        self.changed.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.state.lock().done
    }

    fn end(&self) {
        self.state.lock().done = true;
        self.changed.notify_all();
    }

    /// True when it has ended within `limit`.
    fn wait_ended(&self, limit: Duration) -> bool {
        let mut state = self.state.lock();
        let deadline = Instant::now() + limit;
        while !state.done && !self.changed.wait_until(&mut state, deadline).timed_out() {}
        state.done
    }
}

/// What follows after a thread of ours has looked.
enum Looked {
    Enough,
    /// K is too great.
    Exceeds,
}

impl Sizes {
    pub(super) fn mounted_at(&self, dir: &Path) {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        if let Ok(dir) = CString::new(dir.as_os_str().as_bytes()) {
            let _ = self.dir.set(dir);
        }
    }

    fn connect(&self) -> io::Result<(u32, u32)> {
        let root = self.open_root()?;
        let device = look(root.as_raw_fd(), libc::AT_STATX_DONT_SYNC)?.1;
        drop(root);
        self.find(INodeNo::ROOT, 0)?;
        Ok(device)
    }

    fn open_root(&self) -> io::Result<OwnedFd> {
        let dir = self.dir.get().ok_or_else(|| io::Error::other("not mounted"))?;
        self.ask(Question::Root, || open(dir))
    }

    /// `f` sends requests to ourselves.
    fn ask<T>(&self, question: Question, f: impl FnOnce() -> T) -> T {
        let thread = nix::unistd::gettid().as_raw().unsigned_abs();
        self.asking.lock().insert(thread, question);
        self.count.fetch_add(1, Ordering::SeqCst);
        let value = f();
        self.count.fetch_sub(1, Ordering::SeqCst);
        self.asking.lock().remove(&thread);
        value
    }

    fn asked_by(&self, thread: u32) -> Option<Question> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        self.asking.lock().get(&thread).cloned()
    }

    /// Whether an OPENDIR comes from ourselves.
    pub(super) fn is_asking(&self, thread: u32) -> bool {
        self.asked_by(thread).is_some()
    }

    /// The kernel's inode. Errors: ESTALE when it has none.
    fn find(&self, node: INodeNo, generation: u64) -> io::Result<OwnedFd> {
        const INO64_GEN: i32 = 0x81;
        #[repr(C)]
        struct Handle {
            bytes: u32,
            kind: i32,
            node: [u32; 2],
            generation: u32,
        }
        let root = self.open_root()?;
        let mut handle = Handle {
            bytes: 12,
            kind: INO64_GEN,
            node: [(node.0 >> 32) as u32, node.0 as u32],
            generation: generation as u32,
        };
        // SAFETY: `Handle` is `struct file_handle` with the twelve bytes that it says follow.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                root.as_raw_fd(),
                &raw mut handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// What a thread of ours does for `shrink`, from its start to its end.
    fn shrink(self: &Arc<Self>, shrink: &Arc<Shrink>, node: INodeNo, generation: u64) {
        let Ok(device) = *self.device.get_or_init(|| self.connect().map_err(|e| e.to_string())) else {
            return shrink.end();
        };
        let Ok(file) = self.find(node, generation) else { return shrink.end() };
        let file = Arc::new(file);
        let mut asks = false;
        loop {
            {
                let mut state = shrink.state.lock();
                while !state.done && state.wanted == state.looked {
                    shrink.changed.wait(&mut state);
                }
                if state.done {
                    return;
                }
            }
            match Self::answer_looks(shrink, &file, device) {
                Ok(Looked::Exceeds) if !asks => {
                    asks = true;
                    let (me, its, of) = (Arc::clone(self), Arc::clone(shrink), Arc::clone(&file));
                    let asked = std::thread::Builder::new().name("gfs-size".into()).spawn(move || {
                        let question = Question::Size(node, Arc::clone(&its));
                        let _ = me.ask(question, || take_in(of.as_raw_fd(), its.how));
                        drop(of);
                        its.end();
                    });
                    if asked.is_err() {
                        return shrink.end();
                    }
                }
                Ok(Looked::Exceeds) => std::thread::sleep(LOOK / 2),
                Ok(Looked::Enough) if !asks => {
                    // Nobody's `umount` finds it busy because of this.
                    drop(file);
                    return shrink.end();
                }
                Ok(Looked::Enough) => {}
                Err(_) => return shrink.end(),
            }
        }
    }

    fn answer_looks(shrink: &Shrink, file: &OwnedFd, device: (u32, u32)) -> io::Result<Looked> {
        let wanted = shrink.state.lock().wanted;
        let (size, its_device) = look(file.as_raw_fd(), libc::AT_STATX_DONT_SYNC)?;
        if its_device != device {
            return Err(io::Error::other("another file system is mounted there"));
        }
        let mut state = shrink.state.lock();
        (state.looked, state.seen) = (wanted, size);
        shrink.changed.notify_all();
        Ok(if size > shrink.size { Looked::Exceeds } else { Looked::Enough })
    }
}

/// A thread without the descriptors of this process.
fn on_bare_thread(f: impl FnOnce(io::Result<()>) + Send + 'static) -> io::Result<()> {
    let run = move || {
        // SAFETY: from here on this thread has a table of its own, and uses nothing of what was in it.
        let bare = unsafe { libc::unshare(libc::CLONE_FILES) == 0 && libc::close_range(3, u32::MAX, 0) == 0 };
        f(if bare { Ok(()) } else { Err(io::Error::last_os_error()) });
    };
    std::thread::Builder::new().name("gfs-size".into()).spawn(run).map(drop)
}

/// Opens a directory; for a moment, since a mount with open files cannot be unmounted.
fn open(dir: &CString) -> io::Result<OwnedFd> {
    // SAFETY: a valid C string.
    let fd = unsafe { libc::open(dir.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Size and device of an open file.
fn look(file: i32, sync: i32) -> io::Result<(u64, (u32, u32))> {
    let about = super::statx(file, c"", libc::AT_EMPTY_PATH | sync, libc::STATX_SIZE)?;
    Ok((about.stx_size, (about.stx_dev_major, about.stx_dev_minor)))
}

/// Has the kernel ask us, and take in what is answered.
fn take_in(file: i32, how: How) -> io::Result<()> {
    if how == How::Set {
        // SAFETY: an empty C string, and no times are "now".
        let set = unsafe { libc::utimensat(file, c"".as_ptr(), std::ptr::null(), libc::AT_EMPTY_PATH) };
        if set == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // A mount for reading only has nobody who writes.
        if error.raw_os_error() != Some(libc::EROFS) {
            return Err(error);
        }
    }
    look(file, libc::AT_STATX_FORCE_SYNC).map(drop)
}

/// Whether the thread is in `lseek(…, SEEK_END)`, which holds `i_rwsem` while it asks for the size.
fn seeks_the_end(thread: u32) -> bool {
    let Ok(call) = std::fs::read_to_string(format!("/proc/{thread}/syscall")) else { return false };
    let words: Vec<_> = call.split_whitespace().collect();
    let whence = |word: &&str| *word == format!("{:#x}", libc::SEEK_END);
    words.first() == Some(&libc::SYS_lseek.to_string().as_str()) && words.get(3).is_some_and(whence)
}

/// Whether the thread may wait for an answer. The kernel reads pages ahead without, and reads those that could not be read once more when they are wanted: such
/// a READ may fail, and nobody sees it.
fn may_wait_for_an_answer(thread: u32) -> bool {
    let waits_in = std::fs::read_to_string(format!("/proc/{thread}/wchan")).unwrap_or_default();
    !waits_in.contains("folio")
}

/// What the kernel makes of the size in a reply with attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Agreement {
    /// It has this size already, or no such inode.
    Same,
    /// It throws the reply away.
    Ignored,
}

impl Coherence {
    fn minds_sizes(&self, attr: &Attr) -> bool {
        self.is_clustered() && attr.mode & S_IFMT == S_IFREG && self.does(Part::Sizes)
    }

    /// Makes K at least `size`, with the glock held. False: in time it has not come to an end, and the glock has to be given back.
    fn grow(self: &Arc<Self>, glock: &Arc<Glock>, node: &Arc<Node>, ino: InodeNo, size: u64) -> bool {
        let lowered = node.size.lock().grow_begins(size);
        self.stats.grown.fetch_add(1, Ordering::Relaxed);
        let errand = Arc::new(Errand::default());
        let (me, of_node, its) = (Arc::clone(self), Arc::clone(node), Arc::clone(&errand));
        // READs that have the page locked are let in.
        glock.open_window();
        self.helpers.run(move || {
            let done = me.make_greater(ino, size);
            of_node.size.lock().grow_ended(size, lowered, done);
            its.done(|| ());
        });
        let ended = errand.wait(GROW);
        glock.shut_window();
        ended
    }

    /// A thread of ours for K of this inode. None on a mount that may not have it.
    fn start_to_shrink(
        self: &Arc<Self>,
        ino: InodeNo,
        size: u64,
        how: How,
        ended: impl FnOnce(&Arc<Shrink>) + Send + 'static,
    ) -> Option<Arc<Shrink>> {
        if let Some(Err(why)) = self.sizes.device.get() {
            if !self.sizes.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    %why,
                    "files that another node makes shorter may be read with zeros at their end for a moment: mount as root"
                );
            }
            return None;
        }
        let shrink = Arc::new(Shrink { how, size, state: Mutex::default(), changed: Condvar::new() });
        let id = INodeNo(self.nodes.id(ino));
        let (sizes, its) = (Arc::clone(&self.sizes), Arc::clone(&shrink));
        let started = on_bare_thread(move |bare| {
            match bare {
                Ok(()) => sizes.shrink(&its, id, ino.formal),
                // With the server's descriptors it may ask nothing.
                Err(e) => {
                    let _ = sizes.device.set(Err(e.to_string()));
                    its.end();
                }
            }
            ended(&its);
        });
        match started {
            Ok(()) => {
                self.stats.shrunk.fetch_add(1, Ordering::Relaxed);
                Some(shrink)
            }
            Err(e) => {
                tracing::error!(ino = ino.addr.0, err = %e, "no thread for the kernel's size of a file");
                None
            }
        }
    }

    /// What is under way for READs of this inode, or begins.
    fn shrinking(self: &Arc<Self>, node: &Arc<Node>, ino: InodeNo, size: u64) -> Option<Arc<Shrink>> {
        let mut running = node.shrink.lock();
        if running.is_none() {
            let of_node = Arc::clone(node);
            *running = self.start_to_shrink(ino, size, How::Set, move |its| {
                of_node.shrink.lock().take_if(|running| Arc::ptr_eq(running, its));
            });
        }
        running.clone()
    }
}

impl Core {
    /// Before a reply with these attributes to a request of `thread`, with the glock held: the kernel's size becomes what they say, or the reply will be thrown away.
    /// None: the glock has to be given back first.
    fn agree(&self, attr: &Attr, thread: u32) -> Result<Option<Agreement>> {
        if !self.kernel.minds_sizes(attr) {
            return Ok(Some(Agreement::Same));
        }
        let node = self.kernel.nodes.get(attr.ino);
        let (short, exceeds) = {
            let mut size = node.size.lock();
            size.asks(thread);
            (size.may_fall_short(attr.size), size.may_exceed(attr.size))
        };
        if short {
            if is_nowait() {
                return Err(Error::WouldBlock);
            }
            let glock = self.fs.volume().glocks().get(inode_glock(attr.ino.addr));
            return Ok(self.kernel.grow(&glock, &node, attr.ino, attr.size).then_some(Agreement::Ignored));
        }
        if exceeds {
            self.kernel.attributes_changed(attr.ino);
            return Ok(Some(Agreement::Ignored));
        }
        node.size.lock().told(attr.size);
        Ok(Some(Agreement::Same))
    }

    /// Attributes for a GETATTR of `thread`; `by_handle`: the kernel asks for the size itself.
    pub(super) fn getattr(
        &self,
        ino: InodeNo,
        thread: u32,
        by_handle: bool,
    ) -> Result<(Agreement, Held<Attr>)> {
        let begun = Instant::now();
        let mut seek = None;
        loop {
            let held = self.fs.getattr(ino)?;
            if by_handle
                && begun.elapsed() < SHRINK_LIMIT
                && let Some(shrink) = self.before_a_seek(&held.value, thread, &mut seek)?
            {
                drop(held);
                shrink.wait();
                continue;
            }
            match self.agree(&held.value, thread)? {
                Some(agreement) => return Ok((agreement, held)),
                None if begun.elapsed() > GROW_LIMIT => {
                    tracing::error!(
                        ino = ino.addr.0,
                        size = held.value.size,
                        "the kernel does not take in the size of a file"
                    );
                    self.kernel.attributes_changed(ino);
                    return Ok((Agreement::Ignored, held));
                }
                None => {}
            }
        }
    }

    /// A name, whose file the kernel will have at this size.
    pub(super) fn lookup_agreed(
        &self,
        thread: u32,
        dir: InodeNo,
        name: &[u8],
    ) -> Result<(Agreement, Held<Option<Attr>>)> {
        let begun = Instant::now();
        loop {
            let found = self.lookup(thread, dir, name)?;
            let Some(attr) = &found.value else { return Ok((Agreement::Same, found)) };
            match self.agree(attr, thread)? {
                Some(agreement) => return Ok((agreement, found)),
                None if begun.elapsed() > GROW_LIMIT => {
                    self.kernel.attributes_changed(attr.ino);
                    return Ok((Agreement::Ignored, found));
                }
                None => {}
            }
        }
    }

    /// With the glock held: None when K does not exceed `size`; else what has to be waited for, with the glock given back.
    fn exceeds(&self, ino: InodeNo, size: u64, shrink: &Arc<Shrink>) -> Option<Arc<Shrink>> {
        let deadline = Instant::now() + TOLD_LIMIT;
        loop {
            match shrink.look() {
                Some(seen) if seen <= size && (shrink.how == How::Set || !shrink.is_told()) => {
                    self.kernel.nodes.get(ino).size.lock().seen_within(size);
                    return None;
                }
                // The kernel is about to take it in.
                Some(_) if shrink.how == How::Set && shrink.is_told() && Instant::now() < deadline => {}
                _ => return Some(Arc::clone(shrink)),
            }
        }
    }

    fn before_a_seek(
        &self,
        attr: &Attr,
        thread: u32,
        seek: &mut Option<Arc<Shrink>>,
    ) -> Result<Option<Arc<Shrink>>> {
        let node = self.kernel.nodes.get(attr.ino);
        if !self.kernel.minds_sizes(attr) || !node.size.lock().may_exceed(attr.size) {
            return Ok(None);
        }
        if is_nowait() {
            return Err(Error::WouldBlock);
        }
        if !seeks_the_end(thread) {
            return Ok(None);
        }
        // One of its own: that for READs waits for `i_rwsem`, which this thread holds. For as long as it holds that, and no longer, ours may clear pages.
        if seek.as_ref().is_none_or(|s| s.has_ended()) {
            *seek = self.kernel.start_to_shrink(attr.ino, attr.size, How::Get, |_| ());
        }
        let Some(ours) = seek else { return Ok(None) };
        if ours.is_told() {
            return Ok(Some(Arc::clone(ours)));
        }
        Ok(self.exceeds(attr.ino, attr.size, ours))
    }

    /// A READ, with the glock held, meets the end of the file; `certain`: it is one of pages. None when the kernel will see it there. `begun`: when it arrived from `thread`.
    /// Errors: [`Error::WouldBlock`] on a thread that may not wait; EAGAIN when the kernel is to read it again, since the size waits for one that waits for the page.
    pub(super) fn end_met(
        &self,
        ino: InodeNo,
        thread: u32,
        certain: bool,
        begun: Instant,
    ) -> Result<Option<Arc<Shrink>>> {
        let node = self.kernel.nodes.get(ino);
        if !self.kernel.is_clustered() || !self.kernel.does(Part::Sizes) {
            return Ok(None);
        }
        let attr = as_request(inode_glock(ino.addr), Class::Pinned, false, || self.fs.getattr(ino))?.value;
        let exceeds = {
            let mut size = node.size.lock();
            let exceeds = size.may_exceed(attr.size);
            if size.is_known() {
                size.ends(attr.size);
            }
            exceeds
        };
        if !certain || !exceeds || !self.kernel.minds_sizes(&attr) {
            return Ok(None);
        }
        if is_nowait() {
            return Err(Error::WouldBlock);
        }
        let writers = node.writers.load(Ordering::SeqCst) > 0;
        if writers && begun.elapsed() > SHRINK_LIMIT_AHEAD && !may_wait_for_an_answer(thread) {
            self.kernel.stats.failed_ahead.fetch_add(1, Ordering::Relaxed);
            return Err(Error::Errno(libc::EAGAIN));
        }
        if begun.elapsed() > if writers { SHRINK_LIMIT_WRITERS } else { SHRINK_LIMIT } {
            self.kernel.stats.zeros.fetch_add(1, Ordering::Relaxed);
            node.reads_direct.store(true, Ordering::Relaxed);
            return Ok(None);
        }
        let shrink = self.kernel.shrinking(&node, ino, attr.size);
        Ok(shrink.and_then(|shrink| self.exceeds(ino, attr.size, &shrink)))
    }

    /// Our own thread asks for the size of this inode: it is answered with the glock held until the kernel has taken it in.
    fn tell_size(&self, ino: InodeNo, shrink: &Shrink, reply: ReplyAttr) {
        let held = match as_request(inode_glock(ino.addr), Class::Ordinary, true, || self.fs.getattr(ino)) {
            Ok(held) => held,
            Err(e) => return reply.error(errno(&e)),
        };
        let (node, size) = (self.kernel.nodes.get(ino), held.value.size);
        let steps = {
            let mut kernel = node.size.lock();
            kernel.told(size);
            kernel.steps()
        };
        let glock = self.fs.volume().glocks().get(inode_glock(ino.addr));
        // Our thread may wait for pages that READs have locked.
        glock.open_window();
        shrink.tell();
        let ttl = self.kernel.unchecked_attr_ttl(&node, &held.value);
        reply.attr(&ttl, &self.kernel.file_attr(&held.value, false));
        if !shrink.wait_ended(TOLD_LIMIT) {
            tracing::error!(
                ino = ino.addr.0,
                size,
                "the kernel does not come to an end with the size of a file"
            );
        } else if shrink.how == How::Set {
            node.size.lock().is(size, steps);
        }
        glock.shut_window();
        drop(held);
    }
}

impl Adapter {
    /// A GETATTR or SETATTR that one of our own threads may have sent: such a one is answered here, and changes nothing; others are handed back.
    pub(super) fn answer_ourselves(&self, thread: u32, node: INodeNo, reply: ReplyAttr) -> Option<ReplyAttr> {
        match self.core.kernel.sizes.asked_by(thread) {
            // To open the directory the kernel wants to know who may. Whatever it takes in with this has no lifetime.
            Some(Question::Root) if node == INodeNo::ROOT => {
                let root = self.core.kernel.nodes.get(self.core.kernel.nodes.no(node.0)).last_told();
                let Some(root) = root else { return Some(reply) };
                reply.attr(&Duration::ZERO, &self.core.kernel.file_attr(&root, false));
                None
            }
            Some(Question::Size(asked, shrink)) if asked == node => {
                let (core, ino) = (Arc::clone(&self.core), self.core.kernel.nodes.no(node.0));
                self.blocked.run(move || core.tell_size(ino, &shrink, reply));
                None
            }
            _ => Some(reply),
        }
    }
}
