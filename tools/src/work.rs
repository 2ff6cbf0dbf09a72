//! `cairn work`: the load of the demonstration, and its verification. Every acknowledgement is written to a journal
//! outside the volume, after the system call has returned; the journal says what must be found later.
//!
//! * `work write`: appends records of 64 bytes to its own file and fsyncs each; acknowledged after fsync returned.
//! * `work count`: increments one counter file under an exclusive fcntl lock, with fsync before unlock.
//! * `work verify`: every acknowledged record is present and whole.

use clap::{Parser, Subcommand};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of a record: sequence number and writer in text, checksum, newline.
pub(crate) const RECORD: usize = 64;

#[derive(Parser, Debug)]
#[command(name = "work", about = "Load and verification for the demonstration")]
struct Args {
    #[command(subcommand)]
    op: Op,
}

#[derive(Subcommand, Debug)]
enum Op {
    /// Append records with fsync until killed
    Write {
        #[arg(long)]
        file: PathBuf,
        #[arg(long)]
        acks: PathBuf,
        #[arg(long)]
        name: String,
    },
    /// Check that every acknowledged record is in the file; exit status 1 if one is missing
    Verify {
        #[arg(long)]
        file: PathBuf,
        #[arg(long)]
        acks: PathBuf,
        #[arg(long)]
        name: String,
    },
    /// Increment a counter under a lock
    Count {
        #[arg(long)]
        file: PathBuf,
        #[arg(long)]
        times: u64,
    },
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match crate::classic::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let result = match &args.op {
        Op::Write { file, acks, name } => write(file, acks, name),
        Op::Verify { file, acks, name } => verify(file, acks, name),
        Op::Count { file, times } => count(file, *times),
    };
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("work: {e}");
            1
        }
    }
}

/// Record `seq` of writer `name`.
pub(crate) fn record(name: &str, seq: u64) -> [u8; RECORD] {
    let body = format!("{name:<20.20} {seq:>20}");
    let line = format!("{body} {:08x}", crc(body.as_bytes()));
    let mut out = [b'.'; RECORD];
    out[..line.len()].copy_from_slice(line.as_bytes());
    out[RECORD - 1] = b'\n';
    out
}

/// FNV-1a, 32 bits: tells a torn record from a whole one.
fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

/// Runs until an error or a signal. One line `<seq> <boottime ns>` in `acks` per acknowledged record.
fn write(file: &Path, acks: &Path, name: &str) -> io::Result<()> {
    let target = OpenOptions::new().create(true).append(true).open(file)?;
    let mut acks = OpenOptions::new().create(true).append(true).open(acks)?;
    for seq in 0.. {
        (&target).write_all(&record(name, seq))?;
        target.sync_data()?;
        writeln!(acks, "{seq} {}", membership::clock::boottime().0)?;
    }
    Ok(())
}

/// What a journal of acknowledgements says: (sequence number, boottime ns). A torn last line was never acknowledged to anybody.
pub(crate) fn read_acks(path: &Path) -> io::Result<Vec<(u64, u64)>> {
    let text = std::fs::read_to_string(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    Ok(whole
        .lines()
        .filter_map(|l| {
            let (seq, at) = l.split_once(' ')?;
            Some((seq.parse().ok()?, at.parse().ok()?))
        })
        .collect())
}

/// Acknowledged records that are not in the file, or not whole.
pub(crate) fn lost(file: &Path, name: &str, acks: &[(u64, u64)]) -> io::Result<Vec<u64>> {
    let data = std::fs::read(file)?;
    Ok(acks
        .iter()
        .map(|(seq, _)| *seq)
        .filter(|seq| {
            let start = *seq as usize * RECORD;
            data.get(start..start + RECORD) != Some(&record(name, *seq)[..])
        })
        .collect())
}

fn verify(file: &Path, acks: &Path, name: &str) -> io::Result<()> {
    let acked = read_acks(acks)?;
    let lost = lost(file, name, &acked)?;
    if lost.is_empty() {
        println!("{} acknowledged records, all there", acked.len());
        return Ok(());
    }
    let text =
        format!("{} of {} acknowledged records are lost, the first is {}", lost.len(), acked.len(), lost[0]);
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}

fn count(file: &Path, times: u64) -> io::Result<()> {
    let f = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o666).open(file)?;
    for _ in 0..times {
        lock(&f, libc::F_WRLCK as i16)?;
        let value = read_counter(&f)?;
        f.write_all_at(format!("{:>20}\n", value + 1).as_bytes(), 0)?;
        f.sync_data()?;
        lock(&f, libc::F_UNLCK as i16)?;
    }
    Ok(())
}

/// Value of the counter file; 0 when it is empty.
pub(crate) fn read_counter(f: &File) -> io::Result<u64> {
    let mut text = [0_u8; 21];
    let n = f.read_at(&mut text, 0)?;
    if n == 0 {
        return Ok(0);
    }
    std::str::from_utf8(&text[..n])
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the counter file holds no number"))
}

fn lock(f: &File, kind: i16) -> io::Result<()> {
    let mut fl =
        libc::flock { l_type: kind, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    loop {
        // SAFETY: `fl` is a valid flock for the kernel to read.
        let rc = unsafe { libc::fcntl(f.as_raw_fd(), libc::F_SETLKW, &raw mut fl) };
        if rc == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_torn_record_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut data = Vec::new();
        for seq in 0..5 {
            data.extend_from_slice(&record("node1", seq));
        }
        let acks: Vec<(u64, u64)> = (0..5).map(|s| (s, 1)).collect();
        std::fs::write(&path, &data).unwrap();
        assert!(lost(&path, "node1", &acks).unwrap().is_empty());
        data[2 * RECORD + 30] ^= 1;
        std::fs::write(&path, &data[..4 * RECORD + 10]).unwrap();
        assert_eq!(lost(&path, "node1", &acks).unwrap(), [2, 4]);
    }

    #[test]
    fn the_counter_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        count(&path, 3).unwrap();
        count(&path, 4).unwrap();
        assert_eq!(read_counter(&File::open(&path).unwrap()).unwrap(), 7);
    }
}
