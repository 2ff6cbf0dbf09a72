//! The engine that is always there: `pread`/`pwritev`, batches that wait for a device spread over threads.

use crate::{Read, Write};
use std::io;
use std::os::fd::RawFd;

/// Batches up to this many requests are done by the caller's thread, one after the other.
const INLINE: usize = 2;
/// Threads that one batch may occupy.
const WORKERS: usize = 8;
/// Writes in one `pwritev` (the system's limit is 1024).
const MAX_VECTOR: usize = 256;

/// The request of a batch that failed first.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) offset: u64,
    pub(crate) len: usize,
    pub(crate) source: io::Error,
}

pub(crate) fn pread_all(fd: RawFd, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    move_all(buf.len(), io::ErrorKind::UnexpectedEof, |done| {
        let (rest, at) = (&mut buf[done..], offset + done as u64);
        // SAFETY: the buffer is valid for its length; the descriptor outlives the call.
        unsafe { libc::pread(fd, rest.as_mut_ptr().cast(), rest.len(), at as libc::off_t) }
    })
}

pub(crate) fn pwrite_all(fd: RawFd, offset: u64, buf: &[u8]) -> io::Result<()> {
    move_all(buf.len(), io::ErrorKind::WriteZero, |done| {
        let (rest, at) = (&buf[done..], offset + done as u64);
        // SAFETY: the buffer is valid for its length; the descriptor outlives the call.
        unsafe { libc::pwrite(fd, rest.as_ptr().cast(), rest.len(), at as libc::off_t) }
    })
}

/// Calls `step` with what is done so far until all of `len` is; a call that moves nothing is the error `nothing`.
fn move_all(
    len: usize,
    nothing: io::ErrorKind,
    mut step: impl FnMut(usize) -> libc::ssize_t,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match usize::try_from(step(done)) {
            Ok(0) => return Err(io::Error::from(nothing)),
            Ok(n) => done += n,
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn fdatasync(fd: RawFd) -> io::Result<()> {
    // SAFETY: a plain system call on an open descriptor. Not repeated after an error: the kernel may have
    // dropped the dirty pages, and a second call would answer success.
    if unsafe { libc::fdatasync(fd) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn one_read(fd: RawFd, r: &mut Read<'_>) -> Result<(), Failed> {
    let len = r.buf.len();
    pread_all(fd, r.offset, r.buf).map_err(|source| Failed { offset: r.offset, len, source })
}

fn one_write(fd: RawFd, w: &Write<'_>) -> Result<(), Failed> {
    pwrite_all(fd, w.offset, w.buf).map_err(|source| Failed { offset: w.offset, len: w.buf.len(), source })
}

/// `wide`: the requests wait for a device, so threads gain something.
pub(crate) fn read_all(fd: RawFd, batch: &mut [Read<'_>], wide: bool) -> Result<(), Failed> {
    if !wide || batch.len() <= INLINE {
        return batch.iter_mut().try_for_each(|r| one_read(fd, r));
    }
    let share = batch.len().div_ceil(WORKERS);
    std::thread::scope(|s| {
        let workers: Vec<_> = batch
            .chunks_mut(share)
            .map(|part| s.spawn(move || part.iter_mut().try_for_each(|r| one_read(fd, r))))
            .collect();
        collect(workers)
    })
}

pub(crate) fn write_all(fd: RawFd, batch: &[Write<'_>], wide: bool) -> Result<(), Failed> {
    let runs = runs(batch);
    if !wide || runs.len() <= INLINE {
        return runs.into_iter().try_for_each(|run| write_run(fd, run));
    }
    let share = runs.len().div_ceil(WORKERS);
    std::thread::scope(|s| {
        let workers: Vec<_> = runs
            .chunks(share)
            .map(|part| s.spawn(move || part.iter().try_for_each(|run| write_run(fd, run))))
            .collect();
        collect(workers)
    })
}

/// Cuts a batch into runs of writes that follow each other on the device: one `pwritev` each.
fn runs<'a, 'b>(batch: &'a [Write<'b>]) -> Vec<&'a [Write<'b>]> {
    let follows = |a: &Write<'_>, b: &Write<'_>| a.offset + a.buf.len() as u64 == b.offset;
    batch.chunk_by(follows).flat_map(|run| run.chunks(MAX_VECTOR)).collect()
}

fn write_run(fd: RawFd, run: &[Write<'_>]) -> Result<(), Failed> {
    let [first, rest @ ..] = run else { return Ok(()) };
    if rest.is_empty() {
        return one_write(fd, first);
    }
    let vector: Vec<libc::iovec> = run
        .iter()
        .map(|w| libc::iovec { iov_base: w.buf.as_ptr().cast_mut().cast(), iov_len: w.buf.len() })
        .collect();
    // SAFETY: every element points to a live slice; the kernel only reads them.
    let n = unsafe { libc::pwritev(fd, vector.as_ptr(), vector.len() as i32, first.offset as libc::off_t) };
    let total: usize = run.iter().map(|w| w.buf.len()).sum();
    match usize::try_from(n) {
        Ok(n) if n == total => Ok(()),
        // Short, or refused: one by one, which continues where it stopped or names the write that fails.
        Ok(mut landed) => run.iter().try_for_each(|w| {
            let skip = landed.min(w.buf.len());
            landed -= skip;
            let tail = Write { offset: w.offset + skip as u64, buf: &w.buf[skip..] };
            one_write(fd, &tail)
        }),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => run.iter().try_for_each(|w| one_write(fd, w)),
            source => Err(Failed { offset: first.offset, len: total, source }),
        },
    }
}

/// Waits for every worker (the scope would anyway) and keeps the first error.
fn collect(workers: Vec<std::thread::ScopedJoinHandle<'_, Result<(), Failed>>>) -> Result<(), Failed> {
    let mut first = Ok(());
    for w in workers {
        let r = w.join().expect("invariant: I/O workers do not panic");
        if first.is_ok() {
            first = r;
        }
    }
    first
}
