//! Notifications to the kernel, written to `/dev/fuse` beside the replies: fuser hides ENOENT, which the protocol needs, and
//! does not know the epoch.
//!
//! Source: include/uapi/linux/fuse.h (`fuse_out_header`, `fuse_notify_inval_inode_out`, `fuse_notify_store_out`, `FUSE_NOTIFY_INC_EPOCH`);
//! fs/fuse/dev.c (`fuse_notify_store`).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

const INVAL_INODE: i32 = 2;
const STORE: i32 = 4;
const INC_EPOCH: i32 = 8;
const HEADER: usize = 16;

/// The kernel's end of one mount.
pub(super) struct Notify {
    device: File,
    #[cfg(test)]
    passes: std::sync::Arc<super::tests::Slow>,
}

/// What the kernel knew of an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Known {
    Yes,
    /// No such inode now: never was, evicted, or the reply that creates it is on its way.
    No,
    /// The mount is gone, and its caches with it.
    Unmounted,
}

impl Notify {
    /// `device`: a duplicate of the mount's descriptor.
    pub(super) fn new(device: OwnedFd) -> Self {
        Self {
            device: File::from(device),
            #[cfg(test)]
            passes: std::sync::Arc::default(),
        }
    }

    /// Page passes take the time that `passes` says.
    #[cfg(test)]
    pub(super) fn slowed(self, passes: std::sync::Arc<super::tests::Slow>) -> Self {
        Self { passes, ..self }
    }

    fn send(&self, code: i32, payload: &[u8]) -> io::Result<()> {
        let mut message = [0_u8; HEADER + 24];
        let len = HEADER + payload.len();
        // The kernel's own byte order, by definition of the interface.
        message[0..4].copy_from_slice(&native32(len as u32));
        message[4..8].copy_from_slice(&native32(code.cast_unsigned()));
        message[HEADER..len].copy_from_slice(payload);
        loop {
            match (&self.device).write(&message[..len]) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn inval(&self, node: u64, offset: i64, len: i64) -> Known {
        let mut payload = [0_u8; 24];
        payload[0..8].copy_from_slice(&native64(node));
        payload[8..16].copy_from_slice(&native64(offset.cast_unsigned()));
        payload[16..24].copy_from_slice(&native64(len.cast_unsigned()));
        match self.send(INVAL_INODE, &payload) {
            Ok(()) => Known::Yes,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Known::No,
            Err(_) => Known::Unmounted,
        }
    }

    /// Attributes and ACLs only. Takes no lock that a request holds; may be called from anywhere.
    pub(super) fn attributes(&self, node: u64) -> Known {
        self.inval(node, -1, 0)
    }

    /// Pages from byte `offset` on, `len` bytes or (0) to the end, and the attributes. Waits for pages that are being read or written back.
    pub(super) fn pages(&self, node: u64, offset: u64, len: u64) -> Known {
        #[cfg(test)]
        self.passes.pause();
        self.inval(node, offset.min(i64::MAX as u64) as i64, len.min(i64::MAX as u64) as i64)
    }

    /// The size in the kernel's inode becomes at least `size`, whatever is on its way; no page changes.
    ///
    /// By storing the last byte from where nothing can be read (EFAULT): the kernel sets the size first, then looks for the page, and may wait for it while it is being read.
    /// A byte that is read could be the one that a buffered write has just put there.
    pub(super) fn grow(&self, node: u64, size: u64) -> Known {
        const PAYLOAD: usize = 24;
        let Some(last) = size.checked_sub(1) else { return Known::Yes };
        let mut message = [0_u8; HEADER + PAYLOAD];
        message[0..4].copy_from_slice(&native32((HEADER + PAYLOAD + 1) as u32));
        message[4..8].copy_from_slice(&native32(STORE.cast_unsigned()));
        message[16..24].copy_from_slice(&native64(node));
        message[24..32].copy_from_slice(&native64(last));
        message[32..36].copy_from_slice(&native32(1));
        let parts = [
            libc::iovec { iov_base: message.as_mut_ptr().cast(), iov_len: message.len() },
            libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 },
        ];
        // SAFETY: the kernel reads the parts, the second of which is not there.
        let sent = unsafe { libc::writev(self.device.as_raw_fd(), parts.as_ptr(), parts.len() as i32) };
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EFAULT) if sent < 0 => Known::Yes,
            Some(libc::ENOENT) if sent < 0 => Known::No,
            _ => Known::Unmounted,
        }
    }

    /// Every name of the mount is looked up again on next use. Takes no lock. False where the kernel (before 6.16) does not know it.
    pub(super) fn epoch(&self) -> bool {
        self.send(INC_EPOCH, &[]).is_ok()
    }
}

#[expect(clippy::host_endian_bytes, reason = "the kernel interface is in host order")]
fn native32(v: u32) -> [u8; 4] {
    v.to_ne_bytes()
}

#[expect(clippy::host_endian_bytes, reason = "the kernel interface is in host order")]
fn native64(v: u64) -> [u8; 8] {
    v.to_ne_bytes()
}
