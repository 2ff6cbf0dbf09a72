//! What the kernel does after ESTALE, made to succeed.
//!
//! A path walk finds an inode by LOOKUP and opens it by a request of its own. Between the two another node may remove the file, and OPEN answers
//! ESTALE: the kernel then walks the path once more, and hands a second ESTALE to the application. So the second walk is made safe: until it
//! ends, regular files that LOOKUP shows to this thread are counted as open, and cannot be freed before its OPEN arrives.
//!
//! A walk ends with the thread's next OPEN or CREATE. One that does not get so far (no permission, a name that is gone) ends after [`LIMIT`].

use super::adapter::Core;
use crate::ondisk::dinode::{S_IFMT, S_IFREG};
use crate::ops::{Attr, Held};
use crate::workers::Workers;
use crate::{Error, InodeNo, Result};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// For so long a thread may be between two requests of one system call.
const LIMIT: Duration = Duration::from_secs(10);
/// How often walks that have not ended are looked at.
const TICK: Duration = Duration::from_secs(1);

struct Walk {
    since: Instant,
    /// Inodes counted as open, as often as they are in here.
    pinned: Vec<InodeNo>,
}

/// Second walks under way, by thread.
pub(super) struct SecondLooks {
    walks: Mutex<BTreeMap<u32, Walk>>,
    /// Of `walks`; read without the lock, because nearly always there are none.
    count: AtomicUsize,
    expirer: Workers,
}

impl SecondLooks {
    pub(super) fn new() -> Self {
        Self { walks: Mutex::default(), count: AtomicUsize::new(0), expirer: Workers::new("gfs-looks", 1) }
    }

    fn has(&self, thread: u32) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.walks.lock().contains_key(&thread)
    }

    fn change<T>(&self, f: impl FnOnce(&mut BTreeMap<u32, Walk>) -> T) -> T {
        let mut walks = self.walks.lock();
        let result = f(&mut walks);
        self.count.store(walks.len(), Ordering::Release);
        result
    }

    /// True when it is the first of several, and somebody has to look after them.
    fn begin(&self, thread: u32) -> bool {
        self.change(|walks| {
            let was_empty = walks.is_empty();
            walks.insert(thread, Walk { since: Instant::now(), pinned: Vec::new() });
            was_empty
        })
    }

    /// False when the walk has ended meanwhile.
    fn pin(&self, thread: u32, ino: InodeNo) -> bool {
        self.change(|walks| walks.get_mut(&thread).map(|w| w.pinned.push(ino)).is_some())
    }

    fn end(&self, thread: u32) -> Option<Vec<InodeNo>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.change(|walks| walks.remove(&thread)).map(|walk| walk.pinned)
    }

    /// Ends what is older than [`LIMIT`]. With whether any are left.
    fn expire(&self, now: Instant) -> (Vec<InodeNo>, bool) {
        self.change(|walks| {
            let mut pinned = Vec::new();
            walks.retain(|_, walk| {
                let keep = now.saturating_duration_since(walk.since) < LIMIT;
                if !keep {
                    pinned.append(&mut walk.pinned);
                }
                keep
            });
            (pinned, !walks.is_empty())
        })
    }
}

fn is_file(attr: Option<&Attr>) -> Option<InodeNo> {
    attr.filter(|a| a.mode & S_IFMT == S_IFREG).map(|a| a.ino)
}

impl Core {
    /// LOOKUP for `thread` (0 where the kernel does not tell).
    pub(super) fn lookup(&self, thread: u32, dir: InodeNo, name: &[u8]) -> Result<Held<Option<Attr>>> {
        let mut found = self.fs.lookup(dir, name)?;
        if !self.looks.has(thread) {
            return Ok(found);
        }
        loop {
            let Some(ino) = is_file(found.value.as_ref()) else { return Ok(found) };
            // Opening waits for a glock that must not be waited for with the inode's held.
            drop(found);
            match self.fs.open(ino) {
                Err(Error::Errno(libc::ESTALE)) => {
                    found = self.fs.lookup(dir, name)?;
                    continue;
                }
                other => drop(other?),
            }
            match self.fs.lookup(dir, name) {
                Ok(again) if again.value.map(|attr| attr.ino) == Some(ino) => {
                    if !self.looks.pin(thread, ino) {
                        self.fs.release(ino);
                    }
                    return Ok(again);
                }
                other => {
                    self.fs.release(ino);
                    found = other?;
                }
            }
        }
    }

    /// OPEN or CREATE has this result for `thread`; to be called before the reply is written.
    pub(super) fn opened<T>(self: &Arc<Self>, thread: u32, result: &Result<T>) {
        let ended = self.looks.end(thread);
        let second = ended.is_some();
        for ino in ended.into_iter().flatten() {
            self.fs.release(ino);
        }
        if second || thread == 0 || !matches!(result, Err(Error::Errno(libc::ESTALE))) {
            return;
        }
        if self.looks.begin(thread) {
            let weak = Arc::downgrade(self);
            self.looks.expirer.run(move || {
                loop {
                    std::thread::sleep(TICK);
                    let Some(core) = weak.upgrade() else { break };
                    let (pinned, left) = core.looks.expire(Instant::now());
                    pinned.into_iter().for_each(|ino| core.fs.release(ino));
                    if !left {
                        break;
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockNo;

    #[test]
    fn pins_are_given_back_once_by_the_end_or_by_time() {
        let looks = SecondLooks::new();
        let [a, b, c] = [5, 6, 7].map(|n| InodeNo { addr: BlockNo(n), formal: n });
        assert!(!looks.has(1) && looks.end(1).is_none() && !looks.pin(1, a));
        assert!(looks.begin(1));
        assert!(!looks.begin(2));
        assert!(looks.has(1) && looks.pin(1, a) && looks.pin(1, b) && looks.pin(2, c));
        assert_eq!(looks.end(1), Some(vec![a, b]));
        assert_eq!((looks.end(1), looks.has(1), looks.has(2)), (None, false, true));
        assert_eq!(looks.expire(Instant::now()), (vec![], true));
        assert_eq!(looks.expire(Instant::now() + LIMIT), (vec![c], false));
        assert_eq!(looks.end(2), None);
        assert!(looks.begin(3), "somebody has to look after it again");
    }
}
