//! What is known of the size in the kernel's inode (*K*).

/// Threads whose last WRITE is remembered; behind others K is made greater once more than needed.
const MAX_WRITERS: usize = 16;

/// Threads outside our namespace all have this number.
const UNKNOWN: u32 = 0;

/// What K may be.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::fuse) struct KernelSize {
    least: u64,
    most: u64,
    /// WRITEs that have been answered: by whom, and to where the kernel will make the file longer itself. When the thread asks for
    /// something else it has done so.
    written: Vec<(u32, u64)>,
    /// The same of the last SETATTR of the size; good for as long as `steps` is this.
    set: Option<(u32, u64, u64)>,
    /// Notifications under way that make K greater, up to `most`.
    growing: u32,
    /// Counts whatever may change K.
    steps: u64,
    /// Of these: what may make it smaller.
    lowered: u64,
}

impl Default for KernelSize {
    /// The kernel has no such inode.
    fn default() -> Self {
        Self { least: u64::MAX, most: 0, written: Vec::new(), set: None, growing: 0, steps: 0, lowered: 0 }
    }
}

impl KernelSize {
    /// `thread` asks for something other than to write: what it was answered before is taken in.
    pub(super) fn asks(&mut self, thread: u32) {
        if thread == UNKNOWN {
            return;
        }
        if let Some(at) = self.written.iter().position(|(by, _)| *by == thread) {
            self.least = self.least.max(self.written.swap_remove(at).1);
        }
        if let Some((by, size, steps)) = self.set
            && by == thread
        {
            self.set = None;
            self.is(size, steps);
        }
    }

    /// K was `size` when `steps` were counted, or later.
    pub(super) fn is(&mut self, size: u64, steps: u64) {
        if self.steps == steps && self.growing == 0 {
            (self.least, self.most) = (size, size);
        }
    }

    /// The kernel has the inode, and what it takes for the size is between these.
    pub(super) fn is_known(&self) -> bool {
        self.least <= self.most
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    pub(super) fn may_fall_short(&self, size: u64) -> bool {
        self.least < size && self.least <= self.most
    }

    pub(super) fn may_exceed(&self, size: u64) -> bool {
        self.most > size
    }

    /// A reply with this size is about to be written.
    pub(in crate::fuse) fn told(&mut self, size: u64) {
        self.ends(size);
        self.most = self.most.max(size);
    }

    /// A READ has met the end of the file here: the kernel may take it for no longer.
    pub(super) fn ends(&mut self, size: u64) {
        self.steps += 1;
        if size < self.least && self.least <= self.most {
            self.lowered += 1;
        }
        self.least = self.least.min(size);
    }

    /// The same to a SETATTR of the size.
    pub(in crate::fuse) fn set(&mut self, size: u64, thread: u32) {
        self.told(size);
        self.written.clear();
        self.set = Some((thread, size, self.steps));
    }

    /// A reply to a WRITE or an allocation that ends here is about to be written: the kernel takes the file for at least as long then.
    pub(in crate::fuse) fn reaches(&mut self, end: u64, thread: u32) {
        if end <= self.least {
            return;
        }
        self.steps += 1;
        self.most = self.most.max(end);
        // Not taken in because the thread goes on writing: the kernel makes the file longer at the end of a call, which may be many WRITEs.
        if let Some((_, before)) = self.written.iter_mut().find(|(by, _)| *by == thread) {
            *before = end.max(*before);
        } else if self.written.len() < MAX_WRITERS {
            self.written.push((thread, end));
        }
    }

    /// The file may have got shorter by another node's hand.
    pub(in crate::fuse) fn forget_writes(&mut self) {
        self.written.clear();
        self.set = None;
    }

    /// The count to be given to `grow_ended`.
    pub(super) fn grow_begins(&mut self, size: u64) -> u64 {
        self.steps += 1;
        self.growing += 1;
        self.most = self.most.max(size);
        self.lowered
    }

    /// `done`: K has become at least `size` since then.
    pub(super) fn grow_ended(&mut self, size: u64, lowered: u64, done: bool) {
        self.growing -= 1;
        if done && self.lowered == lowered {
            self.least = self.least.max(size);
        }
    }

    /// K was seen not to exceed the true size, with the glock held.
    pub(super) fn seen_within(&mut self, size: u64) {
        if self.growing == 0 {
            self.most = size;
            self.least = self.least.min(size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: u32 = 5;
    const OTHER: u32 = 6;

    fn bounds(kernel: &KernelSize) -> (u64, u64) {
        (kernel.least, kernel.most)
    }

    #[test]
    fn what_the_kernel_may_take_the_size_for() {
        let mut k = KernelSize::default();
        assert!(!k.may_fall_short(7) && !k.may_exceed(0), "it has no inode");
        k.told(100);
        assert!(!k.may_fall_short(100) && !k.may_exceed(100));
        k.reaches(50, ME);
        assert_eq!(bounds(&k), (100, 100), "inside");
        k.reaches(120, ME);
        k.asks(OTHER);
        assert!(k.may_fall_short(120), "the kernel may not have made it longer yet");
        k.asks(ME);
        assert_eq!(bounds(&k), (120, 120), "it has, since the thread goes on");
        let lowered = k.grow_begins(150);
        assert_eq!(bounds(&k), (120, 150));
        k.seen_within(130);
        assert!(k.may_exceed(130), "it may still grow");
        k.grow_ended(150, lowered, true);
        assert_eq!(bounds(&k), (150, 150));
        assert!(k.may_exceed(60), "another node has made it shorter");
        k.seen_within(60);
        assert_eq!(bounds(&k), (60, 60));
    }

    #[test]
    fn a_call_that_writes_on_is_not_taken_in_yet() {
        let mut k = KernelSize::default();
        k.told(0);
        k.reaches(100, ME);
        k.reaches(200, ME);
        assert_eq!(bounds(&k), (0, 200));
        k.asks(ME);
        assert_eq!(bounds(&k), (200, 200));
        k.reaches(300, UNKNOWN);
        k.asks(UNKNOWN);
        assert_eq!(bounds(&k), (200, 300), "that may be anybody");
    }

    #[test]
    fn a_write_counts_no_more_when_the_file_may_have_become_shorter() {
        let mut k = KernelSize::default();
        k.told(100);
        k.reaches(200, ME);
        k.forget_writes();
        k.asks(ME);
        assert_eq!(bounds(&k), (100, 200));
    }

    #[test]
    fn a_notification_that_ends_late_proves_nothing() {
        let mut k = KernelSize::default();
        k.told(100);
        let lowered = k.grow_begins(200);
        k.told(30);
        k.grow_ended(200, lowered, true);
        assert_eq!(bounds(&k), (30, 200));
    }

    #[test]
    fn a_new_size_is_there_when_its_thread_goes_on_unless_it_may_have_changed() {
        let mut k = KernelSize::default();
        k.told(100);
        k.set(10, ME);
        assert_eq!(bounds(&k), (10, 100));
        k.asks(OTHER);
        assert_eq!(bounds(&k), (10, 100));
        k.asks(ME);
        assert_eq!(bounds(&k), (10, 10));
        k.set(5, ME);
        k.told(10);
        k.asks(ME);
        assert_eq!(bounds(&k), (5, 10));
    }
}
