//! The size in the kernel's inode, made true before a reply on which it relies.
//!
//! Reads through pages, mappings and seeks to the end go by the size in the kernel's inode. The kernel asks for it (GETATTR), but throws the reply away when anything
//! of the inode has changed since it asked: another thread's reply was taken in, a WRITE ended, pages were dropped. The read then goes by an older size: it ends
//! short where another node has made the file longer, and finds zeros behind the end where one has made it shorter (`fuse_change_attributes`,
//! `fuse_read_update_size` of Linux 6.18). So before a GETATTR is answered, and a READ that meets the end of the file, the size in the kernel's inode is
//! compared with the true one, which stays true while the request holds the glock:
//!
//! * `statx` with `AT_STATX_DONT_SYNC` tells it without a request. The inode is found by its file handle, which takes no lock that a request holds; but the root
//!   directory must be open for it. What we ask ourselves for that is answered at once, and counts nowhere.
//! * If the size differs, a thread of ours sets times of the file (on a mount for reading only it asks for attributes, `AT_STATX_FORCE_SYNC`). The request is answered at once
//!   with what is known, and changes nothing: the kernel takes the size in. The thread may then be held up by a page that is being read, perhaps by the very READ
//!   that waits: so the size is waited for, and the reply written, before the thread is.
//! * Replies that are written and not yet taken in could undo it. A notification before makes the kernel throw these away too.
//!
//! With a size the kernel clears pages behind it, a moment later. What a WRITE had filled into them would go to the LUN as zeros; so it has to be a SETATTR, during which nobody
//! writes (`i_rwsem`). What another READ had brought there after the file was made longer would be cleared too; so the glock is kept until the thread has come back. No other
//! reply changes the size in the kernel's inode: those to LOOKUP and CREATE are written when it is right already, and behind those to SETATTR and LINK, which come with `i_rwsem` held, a thread of ours
//! is sent in any case: when it comes back the kernel is done with them.
//!
//! Most replies need none of this: [`Possible`] knows what the kernel's size may be. What remains open is told in docs/semantics.md.
//!
//! Source: fs/fuse/inode.c (`fuse_fh_to_dentry`, `FILEID_INO64_GEN`), open_by_handle_at(2), statx(2).

use super::adapter::Core;
use super::coherence::{Coherence, Part};
use super::node::Node;
use super::traffic::Errand;
use crate::glock::{Class, Glock, as_request, is_nowait};
use crate::ondisk::dinode::{S_IFMT, S_IFREG};
use crate::ops::{Attr, Held};
use crate::volume::inode_glock;
use crate::workers::Workers;
use crate::{Error, InodeNo, Result};
use fuser::{Errno, FileAttr, INodeNo, ReplyAttr};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Between two looks at the kernel's size. The thread that asks ends the wait earlier where no page holds it up.
const LOOK: Duration = Duration::from_micros(200);
/// For as long the glock is held for it. It takes microseconds, unless the kernel takes nothing in.
const PATIENCE: Duration = Duration::from_millis(5);
/// The same behind a reply, since nobody waits for us: for a thread that has to be given a processor.
const PATIENCE_AFTER: Duration = Duration::from_millis(200);
/// A thread that was told of the size waits for nothing but a processor and READs, which are let in; but for one that came with the first handle for writing, and wants EX.
const TOLD_LIMIT: Duration = Duration::from_secs(1);
/// For as long a request is held up by it.
const LIMIT: Duration = Duration::from_secs(10);
/// Threads that ask, for all inodes.
const MAX_ASKING: usize = 1024;

/// What the size in the kernel's inode may be once all replies are taken in or thrown away.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Possible {
    least: u64,
    most: u64,
    /// WRITEs that have been answered: by whom, and to where the kernel will make the file longer itself. When the thread asks for
    /// something else it has done so.
    written: Vec<(u32, u64)>,
}

impl Default for Possible {
    /// The kernel has no such inode.
    fn default() -> Self {
        Self { least: u64::MAX, most: 0, written: Vec::new() }
    }
}

/// Threads whose last WRITE is remembered; of others the kernel's size is looked at.
const MAX_WRITERS: usize = 16;

impl Possible {
    /// There is nothing to be made true, for a request of `thread`.
    fn agrees(&mut self, size: u64, thread: u32) -> bool {
        if let Some(at) = self.written.iter().position(|(by, _)| *by == thread) {
            self.least = self.least.max(self.written.swap_remove(at).1);
        }
        self.least > self.most || (self.least == size && self.most == size)
    }

    /// Whether the kernel may take the file for longer.
    fn may_exceed(&self, size: u64) -> bool {
        self.most > size
    }

    /// A reply with attributes.
    pub(super) fn told(&mut self, size: u64) {
        self.least = self.least.min(size);
        self.most = self.most.max(size);
    }

    /// A reply to a WRITE or an allocation that ends here is about to be written: the kernel takes the file for at least as long then.
    pub(super) fn reaches(&mut self, end: u64, thread: u32) {
        if end <= self.least {
            return;
        }
        self.most = self.most.max(end);
        if let Some((_, before)) = self.written.iter_mut().find(|(by, _)| *by == thread) {
            *before = end.max(*before);
        } else if self.written.len() < MAX_WRITERS {
            self.written.push((thread, end));
        }
    }

    /// A READ that met the end of the file here: the kernel may take it for no longer.
    fn ends(&mut self, end: u64) {
        self.least = self.least.min(end);
    }

    /// The file may get shorter from here on.
    pub(super) fn forget_writes(&mut self) {
        self.written.clear();
    }

    fn agreed(size: u64) -> Self {
        Self { least: size, most: size, written: Vec::new() }
    }
}

/// Where the mount is for those who use it.
struct Place {
    dir: CString,
    device: (u32, u32),
}

/// What our threads are told of an inode.
struct Told {
    /// None any more when nobody needs it, since it may have become wrong.
    attr: Option<FileAttr>,
    /// One was told: the kernel will take it in, whatever has happened meanwhile.
    answered: bool,
}

impl Told {
    fn new(attr: FileAttr) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { attr: Some(attr), answered: false }))
    }
}

/// What one of our threads asks ourselves.
#[derive(Clone)]
enum Question {
    /// What opening the root directory takes.
    Root,
    /// The attributes of an inode.
    Attributes(INodeNo, Arc<Mutex<Told>>),
}

/// Our own questions to the kernel of one mount.
pub(super) struct Sizes {
    place: OnceLock<Place>,
    /// By the thread that asks.
    asking: Mutex<HashMap<u32, Question>>,
    /// Entries of `asking`.
    count: AtomicUsize,
    threads: Workers,
    /// For those who wait behind a reply.
    after: Workers,
}

impl Sizes {
    pub(super) fn new() -> Self {
        Self {
            place: OnceLock::new(),
            asking: Mutex::default(),
            count: AtomicUsize::new(0),
            threads: Workers::new("gfs-size", MAX_ASKING),
            after: Workers::new("gfs-after", MAX_ASKING),
        }
    }

    /// `dir`: absolute path of the mount, which is served already.
    /// Errors: EPERM without `CAP_DAC_READ_SEARCH`, which file handles need, or without the right to set times; sizes are not compared then.
    pub(super) fn connect(&self, dir: &Path, root_attr: FileAttr) -> io::Result<()> {
        let dir = CString::new(dir.as_os_str().as_bytes())?;
        let root = self.ask(Question::Root, || open(&dir))?;
        let device = look(&root, libc::AT_STATX_DONT_SYNC)?.1;
        let place = Place { dir, device };
        let found = self.find(&place, INodeNo::ROOT, 0)?;
        let question = Question::Attributes(INodeNo::ROOT, Told::new(root_attr));
        self.ask(question, || take_in(&found))?;
        let _ = self.place.set(place);
        Ok(())
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
    fn find(&self, place: &Place, node: INodeNo, generation: u64) -> io::Result<OwnedFd> {
        const INO64_GEN: i32 = 0x81;
        #[repr(C)]
        struct Handle {
            bytes: u32,
            kind: i32,
            node: [u32; 2],
            generation: u32,
        }
        let root = self.ask(Question::Root, || open(&place.dir))?;
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
}

/// Opens a directory; for a moment, since a mount with open files cannot be unmounted. (While a request is served, its sender keeps the mount anyway.)
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
fn look(file: &OwnedFd, sync: i32) -> io::Result<(u64, (u32, u32))> {
    let mut about = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | sync;
    // SAFETY: an empty C string, and a structure that the kernel fills in.
    let result =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_SIZE, about.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all of it are numbers, zeroed before.
    let about = unsafe { about.assume_init() };
    Ok((about.stx_size, (about.stx_dev_major, about.stx_dev_minor)))
}

impl Coherence {
    /// A GETATTR or SETATTR that one of our own threads may have sent: such a one is answered here, at once, from what is known; others are handed back.
    pub(super) fn answer_ourselves(&self, thread: u32, node: INodeNo, reply: ReplyAttr) -> Option<ReplyAttr> {
        match self.sizes.asked_by(thread) {
            // To open the directory the kernel wants to know who may. Whatever it takes in with this has no lifetime.
            Some(Question::Root) if node == INodeNo::ROOT => {
                let Some(root) = self.nodes.get(self.nodes.no(node.0)).last_told() else {
                    return Some(reply);
                };
                reply.attr(&Duration::ZERO, &self.file_attr(&root, false));
                None
            }
            Some(Question::Attributes(asked, told)) if asked == node => {
                let mut told = told.lock();
                match told.attr {
                    Some(attr) => {
                        told.answered = true;
                        reply.attr(&Duration::ZERO, &attr);
                    }
                    None => reply.error(Errno::EAGAIN),
                }
                None
            }
            _ => Some(reply),
        }
    }

    fn agrees(&self, attr: &Attr, thread: u32) -> bool {
        let is_file = attr.mode & S_IFMT == S_IFREG;
        !self.is_clustered()
            || !is_file
            || !self.does(Part::Sizes)
            || self.sizes.place.get().is_none()
            || self.nodes.get(attr.ino).size.lock().agrees(attr.size, thread)
    }

    /// Makes the size in the kernel's inode true, with the inode's glock held since `attr` was read; in EX, if READs of this node take EX.
    /// None: the glock has to be given back first, since a WRITE or SETATTR of this node waits for it.
    fn settle(self: &Arc<Self>, glock: &Arc<Glock>, attr: &Attr, how: How) -> Option<Settled> {
        let node = self.nodes.get(attr.ino);
        let place = self.sizes.place.get()?;
        self.stats.sizes.fetch_add(1, Ordering::Relaxed);
        glock.open_window();
        let mut settled = Settled {
            glock: Arc::clone(glock),
            node,
            size: attr.size,
            told: Told::new(self.file_attr(attr, false)),
            is_true: false,
            errand: None,
        };
        match self.make_true(place, &mut settled, attr, how) {
            Ok(true) => Some(settled),
            Ok(false) => None,
            // The kernel has forgotten it.
            Err(e) if e.raw_os_error() == Some(libc::ESTALE) => Some(settled),
            Err(e) => {
                tracing::warn!(ino = attr.ino.addr.0, err = %e, "the kernel's size of a file cannot be compared");
                Some(settled)
            }
        }
    }

    fn make_true(
        self: &Arc<Self>,
        place: &Place,
        settled: &mut Settled,
        attr: &Attr,
        how: How,
    ) -> io::Result<bool> {
        let id = INodeNo(self.nodes.id(attr.ino));
        let file = Arc::new(self.sizes.find(place, id, attr.ino.formal)?);
        self.attributes_changed(attr.ino);
        let started = Instant::now();
        if how == How::Surely {
            settled.errand = Some(self.send_to_ask(id, &file, &settled.told));
        }
        let patience = if how == How::Surely { PATIENCE_AFTER } else { PATIENCE };
        // What a thread was told is taken in.
        while started.elapsed() < patience || (started.elapsed() < TOLD_LIMIT && settled.told.lock().answered)
        {
            let (size, device) = look(&file, libc::AT_STATX_DONT_SYNC)?;
            if device != place.device {
                return Err(io::Error::other("another file system is mounted there"));
            }
            if size == attr.size && (how == How::IfItDiffers || settled.errand.is_none()) {
                settled.is_true = true;
                return Ok(true);
            }
            match &settled.errand {
                None => settled.errand = Some(self.send_to_ask(id, &file, &settled.told)),
                Some(errand) if errand.wait(LOOK) => settled.errand = None,
                Some(_) => {}
            }
        }
        Ok(false)
    }

    fn send_to_ask(
        self: &Arc<Self>,
        id: INodeNo,
        file: &Arc<OwnedFd>,
        told: &Arc<Mutex<Told>>,
    ) -> Arc<Errand> {
        let errand = Arc::new(Errand::default());
        let (me, its) = (Arc::clone(self), Arc::clone(&errand));
        let (file, told) = (Arc::clone(file), Arc::clone(told));
        self.sizes.threads.run(move || {
            let _ = me.sizes.ask(Question::Attributes(id, told), || take_in(&file));
            drop(file);
            its.done(|| ());
        });
        errand
    }
}

/// Whether our thread is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    IfItDiffers,
    /// Also to wait for those who hold `i_rwsem`.
    Surely,
}

/// Has the kernel ask us for attributes, and take in whatever is answered.
fn take_in(file: &OwnedFd) -> io::Result<()> {
    // SAFETY: an empty C string, and no times are "now".
    let set =
        unsafe { libc::utimensat(file.as_raw_fd(), c"".as_ptr(), std::ptr::null(), libc::AT_EMPTY_PATH) };
    if set == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EROFS) => look(file, libc::AT_STATX_FORCE_SYNC).map(drop),
        e => Err(e),
    }
}

/// Our thread may still be clearing what is behind the size that the kernel has taken in. READs, for which it may wait, are let in.
pub(super) struct Settled {
    glock: Arc<Glock>,
    node: Arc<Node>,
    size: u64,
    told: Arc<Mutex<Told>>,
    is_true: bool,
    errand: Option<Arc<Errand>>,
}

impl Drop for Settled {
    /// With the glock still held: a thread that was told of the size has come back, others will not be told.
    fn drop(&mut self) {
        let answered = {
            let mut told = self.told.lock();
            told.attr = None;
            told.answered
        };
        let ended = self.errand.take().is_none_or(|errand| !answered || errand.wait(TOLD_LIMIT));
        if !ended {
            tracing::error!(glock = %self.glock.name(), size = self.size, "the kernel does not come to an end with the size of a file");
        }
        self.glock.shut_window();
        if self.is_true {
            *self.node.size.lock() = Possible::agreed(self.size);
        }
    }
}

impl Core {
    /// Attributes of an inode, with which the kernel's size agrees.
    pub(super) fn getattr(&self, ino: InodeNo, thread: u32) -> Result<Held<Attr>> {
        let held = self.fs.getattr(ino)?;
        if self.kernel.agrees(&held.value, thread) {
            return Ok(held);
        }
        drop(held);
        if is_nowait() {
            return Err(Error::WouldBlock);
        }
        let deadline = Instant::now() + LIMIT;
        let (name, node) = (inode_glock(ino.addr), self.kernel.nodes.get(ino));
        let glock = self.fs.volume().glocks().get(name);
        let mut exclusive = false;
        loop {
            let held = as_request(name, Class::Ordinary, exclusive, || self.fs.getattr(ino))?;
            let settled = if self.kernel.agrees(&held.value, thread) {
                true
            } else if !exclusive && node.writers.load(Ordering::SeqCst) > 0 {
                exclusive = true;
                false
            } else {
                self.kernel.settle(&glock, &held.value, How::IfItDiffers).is_some()
            };
            if settled {
                return Ok(held);
            }
            drop(held);
            if Instant::now() > deadline {
                tracing::error!(ino = ino.addr.0, "the kernel does not take in the size of a file");
                return self.fs.getattr(ino);
            }
        }
    }

    /// A name, with whose file the kernel's size agrees.
    pub(super) fn lookup_agreed(&self, dir: InodeNo, name: &[u8], thread: u32) -> Result<Held<Option<Attr>>> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let found = self.fs.lookup(dir, name)?;
            let Some(attr) = found.value.filter(|attr| !self.kernel.agrees(attr, thread)) else {
                return Ok(found);
            };
            if Instant::now() > deadline {
                return Ok(found);
            }
            drop(found);
            match self.getattr(attr.ino, thread) {
                Ok(_) | Err(Error::Errno(libc::ESTALE)) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// A reply to CREATE that opens what is there already: if not, the size has to be made true first.
    pub(super) fn may_be_told(&self, attr: &Attr, thread: u32) -> bool {
        self.kernel.agrees(attr, thread)
    }

    /// The reply to a SETATTR or LINK is written: if it changes the size in the kernel's inode, the glock is kept until the kernel has done so.
    pub(super) fn after_change(&self, held: Held<Attr>, thread: u32) {
        if self.kernel.agrees(&held.value, thread) {
            return;
        }
        let (kernel, glock) =
            (Arc::clone(&self.kernel), self.fs.volume().glocks().get(inode_glock(held.value.ino.addr)));
        self.kernel.sizes.after.run(move || drop(kernel.settle(&glock, &held.value, How::Surely)));
    }

    /// A READ with the glock held has met the end of the file at `end`, or begins behind it.
    /// Errors: [`Error::WouldBlock`] on a thread that may not wait.
    pub(super) fn end_met(&self, ino: InodeNo, end: u64) -> Result<End> {
        if !self.kernel.is_clustered() {
            return Ok(End::Right);
        }
        let (name, node) = (inode_glock(ino.addr), self.kernel.nodes.get(ino));
        let may_exceed = |size| node.size.lock().may_exceed(size);
        let mut result = End::Right;
        if may_exceed(end) {
            let attr = as_request(name, Class::Pinned, false, || self.fs.getattr(ino))?.value;
            if may_exceed(attr.size) && !self.kernel.agrees(&attr, NOBODY) {
                if is_nowait() {
                    return Err(Error::WouldBlock);
                }
                let glock = self.fs.volume().glocks().get(name);
                result = self.kernel.settle(&glock, &attr, How::IfItDiffers).map_or(End::Wrong, End::Settled);
            }
        }
        node.size.lock().ends(end);
        Ok(result)
    }
}

/// No thread has this number.
const NOBODY: u32 = u32::MAX;

/// What the kernel takes for the end of a file that a READ has met.
pub(super) enum End {
    Right,
    /// To be kept until the reply is written, with the glock.
    Settled(#[expect(dead_code, reason = "it is dropped in time")] Settled),
    /// As [`Coherence::settle`]'s None.
    Wrong,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: u32 = 5;

    fn possible(least: u64, most: u64) -> Possible {
        Possible { least, most, written: Vec::new() }
    }

    #[test]
    fn what_the_kernel_may_take_the_size_for() {
        let mut p = Possible::default();
        assert!(p.agrees(0, ME) && p.agrees(7, ME), "it has no inode");
        p.told(100);
        assert!(p.agrees(100, ME) && !p.may_exceed(100));
        p.reaches(50, ME);
        assert!(p.agrees(100, ME), "inside");
        p.reaches(120, ME);
        assert!(!p.agrees(120, ME + 1), "the kernel may not have made it longer yet");
        assert!(p.agrees(120, ME), "it has, since the thread goes on");
        assert!(p.agrees(120, ME + 1));
        p.told(130);
        assert!(!p.agrees(130, ME), "that may be thrown away");
        assert_eq!(p, possible(120, 130));
        p.ends(60);
        assert!(!p.agrees(60, ME) && p.may_exceed(60), "that too");
        assert_eq!(p, possible(60, 130));
    }

    #[test]
    fn a_write_counts_no_more_when_the_file_may_have_become_shorter() {
        let mut p = possible(100, 100);
        p.reaches(200, ME);
        p.forget_writes();
        p.told(10);
        assert!(!p.agrees(200, ME));
        assert_eq!(p, possible(10, 200));
    }
}
