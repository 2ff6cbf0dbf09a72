//! May a process open a file that its kernel takes for a new one?
//!
//! The reply to CREATE makes the kernel skip its permission checks: who makes a file may open it. When another node has made the file first,
//! those checks are ours. They say what the kernel's would (mode bits, groups, capabilities); where that cannot be known from here the answer
//! is ESTALE, which makes the kernel look the name up again, once, and decide itself.

use crate::ops::Attr;
use crate::{Error, Result};
use fuser::Request;

const READ: u32 = 4;
const WRITE: u32 = 2;
const CAP_DAC_OVERRIDE: u64 = 1 << 1;
const CAP_DAC_READ_SEARCH: u64 = 1 << 2;

/// Who sent a CREATE, and for what.
pub(super) struct Opener {
    uid: u32,
    gid: u32,
    /// Thread number; 0 when it is not visible from here.
    pid: u32,
    want: u32,
}

/// What a request does not say of its sender.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Credentials {
    groups: Vec<u32>,
    capabilities: u64,
    /// Its capabilities count here, because it is in our user namespace.
    ours: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Yes,
    No,
    KernelDecides,
}

impl Opener {
    pub(super) fn new(request: &Request, flags: i32) -> Self {
        let access = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => READ,
            libc::O_WRONLY => WRITE,
            _ => READ | WRITE,
        };
        let truncates = if flags & libc::O_TRUNC != 0 { WRITE } else { 0 };
        Self { uid: request.uid(), gid: request.gid(), pid: request.pid(), want: access | truncates }
    }

    /// Errors: EACCES; ESTALE for "ask the kernel".
    pub(super) fn may(&self, dir: &Attr, file: &Attr) -> Result<()> {
        match self.decide(dir, file, || self.credentials()) {
            Answer::Yes => Ok(()),
            Answer::No => Err(Error::Errno(libc::EACCES)),
            Answer::KernelDecides => Err(Error::Errno(libc::ESTALE)),
        }
    }

    fn decide(&self, dir: &Attr, file: &Attr, credentials: impl FnOnce() -> Option<Credentials>) -> Answer {
        // The kernel's settings fs.protected_regular are about these.
        let foreign = file.uid != self.uid && file.uid != dir.uid;
        if dir.mode & libc::S_ISVTX != 0 && dir.mode & 0o022 != 0 && foreign {
            return Answer::KernelDecides;
        }
        let granted = |bits: u32| bits & self.want == self.want;
        let (owner, group, other) = (granted(file.mode >> 6), granted(file.mode >> 3), granted(file.mode));
        let known = if self.uid == file.uid {
            Some(owner)
        } else if self.gid == file.gid {
            Some(group)
        } else if group == other {
            Some(group)
        } else {
            None
        };
        if known == Some(true) {
            return Answer::Yes;
        }
        let Some(who) = credentials() else { return Answer::KernelDecides };
        if known.unwrap_or_else(|| if who.groups.contains(&file.gid) { group } else { other }) {
            return Answer::Yes;
        }
        let reads = if self.want == READ { CAP_DAC_READ_SEARCH } else { 0 };
        match who.capabilities & (CAP_DAC_OVERRIDE | reads) {
            0 => Answer::No,
            _ if who.ours => Answer::Yes,
            _ => Answer::KernelDecides,
        }
    }

    /// The thread waits for our reply, so it is there; `None` where its record is not to be had or is another's.
    fn credentials(&self) -> Option<Credentials> {
        if self.pid == 0 {
            return None;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/user")).ok();
        let theirs = namespace(&self.pid.to_string());
        parse(&status, self.uid, self.gid, theirs.is_some() && theirs == namespace("self"))
    }
}

/// Reads `/proc/<thread>/status`; `None` unless it is that of a thread with these file-system ids.
fn parse(status: &str, uid: u32, gid: u32, ours: bool) -> Option<Credentials> {
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name));
    let numbers = |name: &str| -> Option<Vec<u32>> {
        field(name)?.split_whitespace().map(|n| n.parse().ok()).collect()
    };
    // Real, effective, saved, file system.
    if numbers("Uid:")?.get(3) != Some(&uid) || numbers("Gid:")?.get(3) != Some(&gid) {
        return None;
    }
    let capabilities = u64::from_str_radix(field("CapEff:")?.trim(), 16).ok()?;
    Some(Credentials { groups: numbers("Groups:")?, capabilities, ours })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Time;
    use crate::{BlockNo, InodeNo};

    fn attr(mode: u32, uid: u32, gid: u32) -> Attr {
        let zero = Time { sec: 0, nsec: 0 };
        Attr {
            ino: InodeNo { addr: BlockNo(1), formal: 1 },
            mode,
            nlink: 1,
            uid,
            gid,
            rdev: (0, 0),
            size: 0,
            blocks: 0,
            atime: zero,
            mtime: zero,
            ctime: zero,
            block_size: 4096,
        }
    }

    fn who(groups: &[u32], capabilities: u64, ours: bool) -> Option<Credentials> {
        Some(Credentials { groups: groups.to_vec(), capabilities, ours })
    }

    #[test]
    fn files_are_opened_for_whom_the_kernel_would_open_them() {
        use Answer::{KernelDecides, No, Yes};
        let (plain, sticky) = (attr(0o040_755, 0, 0), attr(0o041_777, 0, 0));
        let none = || who(&[], 0, true);
        // (directory, mode, uid and gid of the file, wanted, rest of the credentials) for uid 10, gid 20
        let cases = [
            (plain, 0o600, 10, 1, READ | WRITE, None, Yes),
            (plain, 0o400, 10, 1, WRITE, none(), No),
            (plain, 0o066, 10, 20, READ, none(), No),
            (plain, 0o060, 1, 20, READ | WRITE, None, Yes),
            (plain, 0o606, 1, 20, READ, none(), No),
            (plain, 0o666, 1, 1, READ | WRITE, None, Yes),
            (plain, 0o660, 1, 30, WRITE, None, KernelDecides),
            (plain, 0o660, 1, 30, WRITE, who(&[7, 30], 0, true), Yes),
            (plain, 0o606, 1, 30, WRITE, who(&[7, 30], 0, true), No),
            (plain, 0o600, 1, 1, WRITE, None, KernelDecides),
            (plain, 0o600, 1, 1, WRITE, none(), No),
            (plain, 0o600, 1, 1, WRITE, who(&[], CAP_DAC_OVERRIDE, true), Yes),
            (plain, 0o600, 1, 1, WRITE, who(&[], CAP_DAC_OVERRIDE, false), KernelDecides),
            (plain, 0o600, 1, 1, WRITE, who(&[], CAP_DAC_READ_SEARCH, true), No),
            (plain, 0o600, 1, 1, READ, who(&[], CAP_DAC_READ_SEARCH, true), Yes),
            (sticky, 0o666, 1, 1, READ, none(), KernelDecides),
            (sticky, 0o666, 10, 1, READ, none(), Yes),
            (sticky, 0o666, 0, 1, READ, none(), Yes),
        ];
        for (n, (dir, mode, uid, gid, want, rest, answer)) in cases.into_iter().enumerate() {
            let opener = Opener { uid: 10, gid: 20, pid: 0, want };
            assert_eq!(opener.decide(&dir, &attr(0o100_000 | mode, uid, gid), || rest), answer, "case {n}");
        }
    }

    #[test]
    fn own_credentials_are_found() {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let opener = Opener { uid, gid, pid: nix::unistd::gettid().as_raw().cast_unsigned(), want: READ };
        let found = opener.credentials().unwrap();
        assert!(found.ours);
        assert_eq!(found.capabilities & CAP_DAC_OVERRIDE != 0, uid == 0);
        let other = Opener { uid: uid + 1, ..opener };
        assert_eq!(other.credentials(), None, "another's record");
        assert_eq!(Opener { pid: 0, ..other }.credentials(), None);
    }
}
