//! Batched reads through io_uring, where the kernel allows it.
//!
//! Each batch takes a ring of its own from a small store, so that submitters never share one. Only *reads*:
//! a killed process is waited for until its system calls have ended, so a write by `pwrite` is over when the
//! process is gone, and that is the proof which fencing by process death rests on. Requests in a ring are not
//! waited for: the kernel takes a dead process's rings down in the background, and a write could land after
//! the exit was reported.

use crate::Read;
use crate::pool::{self, Failed, pread_all};
use io_uring::{IoUring, opcode, types};
use parking_lot::Mutex;
use std::io;
use std::os::fd::RawFd;

/// Requests in flight per ring.
const DEPTH: usize = 64;
/// Rings kept for later use; more may exist while more threads read at once.
const KEPT: usize = 16;

pub(crate) struct Uring {
    rings: Mutex<Vec<IoUring>>,
}

impl Uring {
    /// Fails where io_uring is switched off or filtered.
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::new(DEPTH as u32)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        Ok(Self { rings: Mutex::new(vec![ring]) })
    }

    pub(crate) fn read_all(&self, fd: RawFd, batch: &mut [Read<'_>]) -> Result<(), Failed> {
        let kept = self.rings.lock().pop();
        let Ok(mut ring) = kept.map_or_else(|| IoUring::new(DEPTH as u32), Ok) else {
            // No more rings (descriptors, locked memory): the plain way still works.
            return pool::read_all(fd, batch, true);
        };
        let mut first = Ok(());
        for part in batch.chunks_mut(DEPTH) {
            let answer = read_chunk(&mut ring, fd, part);
            if first.is_ok() {
                first = answer;
            }
        }
        let mut rings = self.rings.lock();
        if rings.len() < KEPT {
            rings.push(ring);
        }
        first
    }
}

/// At most DEPTH reads. Returns only when the kernel has let go of every buffer.
fn read_chunk(ring: &mut IoUring, fd: RawFd, part: &mut [Read<'_>]) -> Result<(), Failed> {
    for (i, r) in part.iter_mut().enumerate() {
        let len = u32::try_from(r.buf.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(types::Fd(fd), r.buf.as_mut_ptr(), len)
            .offset(r.offset)
            .build()
            .user_data(i as u64);
        // SAFETY: buffer and descriptor outlive the request: this function waits for every completion.
        unsafe { ring.submission().push(&entry) }.expect("invariant: at most DEPTH entries in an empty ring");
    }
    let mut done = vec![None; part.len()];
    let mut open = part.len();
    while open > 0 {
        if let Err(e) = ring.submit_and_wait(1) {
            match e.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                // The kernel may still own the buffers; there is no way back that keeps memory sound.
                _ => {
                    tracing::error!(err = %e, "io_uring broke with reads in flight");
                    std::process::abort();
                }
            }
        }
        for c in ring.completion() {
            let slot = &mut done[c.user_data() as usize];
            assert!(slot.is_none(), "io_uring completed a request twice");
            *slot = Some(c.result());
            open -= 1;
        }
    }
    let mut first = Ok(());
    for (r, answer) in part.iter_mut().zip(done) {
        let answer = answer.expect("invariant: all requests are answered");
        let failed = if answer < 0 {
            match -answer {
                // Seen from io_uring when a signal or a full queue interferes; the plain call decides.
                libc::EINTR | libc::EAGAIN => pread_all(fd, r.offset, r.buf).err(),
                errno => Some(io::Error::from_raw_os_error(errno)),
            }
        } else {
            // Short reads: the rest, or the end of the file, which is an error here.
            let n = answer as usize;
            if n < r.buf.len() { pread_all(fd, r.offset + n as u64, &mut r.buf[n..]).err() } else { None }
        };
        if let Some(source) = failed
            && first.is_ok()
        {
            first = Err(Failed { offset: r.offset, len: r.buf.len(), source });
        }
    }
    first
}
