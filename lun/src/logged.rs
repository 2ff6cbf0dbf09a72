//! A write log in a side file, shared by all processes that write to one LUN: who wrote what, where, when.
//!
//! Tests prove with it that not one write of a stopped node reached the LUN after its fence. One JSON object
//! a line, appended with one system call, so that lines of several processes never mix:
//!
//! ```text
//! {"ev":"begin","who":"node2/mount","pid":77,"no":3,"t":123456789,"off":4096,"len":512,"crc":"90abcdef"}
//! {"ev":"end","who":"node2/mount","pid":77,"no":3,"t":123460000,"ok":true}
//! ```
//!
//! `begin` is written before the submission and `end` after the answer, `t` is CLOCK_BOOTTIME in
//! nanoseconds: the write took effect between the two. A begin without an end belongs to a process that died
//! or hangs. Flushes are logged with `"flush":true`. The order of the file is the order of the appends.

use crate::{BlockDevice, Lun, LunError, Read, Result, Write};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Environment variable with the writer's label; the process id stands in when it is not set.
pub const WRITER_ENV: &str = "CAIRN_LUN_WRITER";

/// Any LUN, with a log of its writes.
pub struct LoggedLun {
    inner: Lun,
    log: File,
    who: String,
    calls: AtomicU64,
}

impl LoggedLun {
    pub fn new(inner: Lun, log: &Path) -> Result<Self> {
        let who = std::env::var(WRITER_ENV).unwrap_or_else(|_| format!("pid{}", std::process::id()));
        Self::with_label(inner, log, &who)
    }

    pub fn with_label(inner: Lun, log: &Path, who: &str) -> Result<Self> {
        let log = File::options()
            .append(true)
            .create(true)
            .open(log)
            .map_err(|source| LunError::Open { name: log.display().to_string(), source })?;
        // The label goes into JSON strings as it is.
        let who = who.chars().filter(|c| !c.is_control() && !matches!(c, '"' | '\\')).collect();
        Ok(Self { inner, log, who, calls: AtomicU64::new(0) })
    }

    fn append(&self, lines: &str) -> Result<()> {
        (&self.log).write_all(lines.as_bytes()).map_err(|source| LunError::Io {
            name: format!("write log of {}", self.inner.name()),
            op: "append",
            offset: 0,
            len: lines.len() as u64,
            source,
        })
    }

    fn line(&self, out: &mut String, ev: &str, no: u64, rest: std::fmt::Arguments<'_>) {
        let (pid, t, who) = (std::process::id(), boottime_ns(), &self.who);
        writeln!(out, r#"{{"ev":"{ev}","who":"{who}","pid":{pid},"no":{no},"t":{t},{rest}}}"#)
            .expect("invariant: writing to a String");
    }

    fn logged<T>(&self, begin: &str, no: u64, act: impl FnOnce() -> Result<T>) -> Result<T> {
        self.append(begin)?;
        let answer = act();
        let mut end = String::new();
        self.line(&mut end, "end", no, format_args!(r#""ok":{}"#, answer.is_ok()));
        self.append(&end)?;
        answer
    }
}

fn boottime_ns() -> u64 {
    // SAFETY: `timespec` is plain data and the kernel fills it.
    let mut t: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid; CLOCK_BOOTTIME exists on every Linux that we run on.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    assert_eq!(answer, 0, "CLOCK_BOOTTIME is not readable");
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

impl BlockDevice for LoggedLun {
    fn sector_size(&self) -> u32 {
        self.inner.sector_size()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        self.inner.read_batch(batch)
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        let no = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut begin = String::new();
        for w in batch {
            let (off, len, crc) = (w.offset, w.buf.len(), crc32fast::hash(w.buf));
            self.line(&mut begin, "begin", no, format_args!(r#""off":{off},"len":{len},"crc":"{crc:08x}""#));
        }
        self.logged(&begin, no, || self.inner.write_batch(batch))
    }

    fn flush(&self) -> Result<()> {
        let no = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut begin = String::new();
        self.line(&mut begin, "begin", no, format_args!(r#""flush":true"#));
        self.logged(&begin, no, || self.inner.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Fault, FaultLun, Op};
    use crate::mem::MemLun;
    use std::sync::Arc;

    #[test]
    fn every_write_has_a_begin_and_an_end_with_its_author() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (faulty, faults) = FaultLun::new(MemLun::new(1 << 20, 512));
        let lun: Lun = Arc::new(faulty);
        let a = LoggedLun::with_label(Arc::clone(&lun), &path, "node1").unwrap();
        let b = LoggedLun::with_label(lun, &path, "node\"2\\").unwrap();
        a.write_at(512, &[1; 512]).unwrap();
        b.flush().unwrap();
        faults.at(Op::Write, 1, Fault::Fail(libc::EIO));
        assert!(b.write_at(0, &[2; 512]).is_err());
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(
            lines[0].starts_with(r#"{"ev":"begin","who":"node1""#)
                && lines[0].contains(r#""off":512,"len":512"#)
        );
        assert!(lines[1].contains(r#""ev":"end""#) && lines[1].ends_with(r#""ok":true}"#));
        assert!(lines[2].contains(r#""who":"node2""#) && lines[2].contains(r#""flush":true"#));
        assert!(lines[5].ends_with(r#""ok":false}"#));
    }
}
