//! `fsck.gfs`: the command line in front of the [checker](crate::check). It repairs nothing; what it can do is replay journals.
//!
//! Exit codes, as other fscks have them: 0 clean; 1 journals were replayed and the volume is clean now; 4 faults are left; 8 the LUN cannot be
//! opened or fails; 16 wrong usage.

use crate::check::{Report, check};
use crate::ondisk::dinode::Time;
use crate::reader::Reader;
use crate::{Error, Result};
use cairn_base::exit;
use clap::Parser;
use lun::{Lun, OpenOptions, Share};
use std::ffi::OsString;

pub const EXIT_CLEAN: u8 = exit::OK as u8;
pub const EXIT_REPLAYED: u8 = exit::fsck::REPLAYED as u8;
pub const EXIT_FAULTS: u8 = exit::fsck::FAULTS as u8;
pub const EXIT_FAILED: u8 = exit::fsck::FAILED as u8;
pub const EXIT_USAGE: u8 = exit::fsck::USAGE as u8;

/// Check a GFS2 volume that no node has mounted.
#[derive(Parser, Debug)]
#[command(
    name = "fsck.gfs",
    about = "Check a GFS2 volume that no node has mounted",
    version,
    after_help = "Nothing but journals is ever written; to repair damage use fsck.gfs2 of gfs2-utils.\n\
                  Exit codes: 0 clean; 1 journals replayed, clean now; 4 faults are left; 8 the LUN failed; 16 wrong usage."
)]
struct Cli {
    /// Change nothing [the default]
    #[arg(short = 'n', conflicts_with = "replay")]
    no_change: bool,
    /// Replay dirty journals first
    #[arg(long)]
    replay: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// The LUN: block device, file, file:/path, with #part=N for a GPT partition
    device: String,
}

fn open(cli: &Cli) -> Result<Lun> {
    let options = OpenOptions { read_only: !cli.replay, ..OpenOptions::default() };
    // alone also when it only reads: of a volume that changes meanwhile it would tell faults that are none
    Ok(lun::open(&cli.device, &options.share(Share::Exclusive))?)
}

fn run(cli: &Cli) -> Result<(Report, u64)> {
    let lun = open(cli)?;
    let mut replayed = 0;
    if cli.replay {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let now = Time { sec: now.as_secs() as i64, nsec: now.subsec_nanos() };
        match Reader::open(&lun).and_then(|r| r.replay_all(now)) {
            Ok(done) => replayed = done.iter().flatten().count() as u64,
            Err(e @ Error::Lun(_)) => return Err(e),
            // the report says what is wrong
            Err(e) => eprintln!("fsck.gfs: journals not replayed: {e}"),
        }
    }
    Ok((check(&lun)?, replayed))
}

/// Runs the command; `args` begin with the program's name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { EXIT_USAGE } else { EXIT_CLEAN };
        }
    };
    let (report, replayed) = match run(&cli) {
        Ok(done) => done,
        Err(e) => {
            eprintln!("fsck.gfs: {e}");
            return EXIT_FAILED;
        }
    };
    if cli.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(e) => {
                eprintln!("fsck.gfs: {e}");
                return EXIT_FAILED;
            }
        }
    } else {
        for fault in &report.faults {
            println!("{fault}");
        }
        if report.unlisted > 0 {
            println!("… and {} more", report.unlisted);
        }
        if replayed > 0 {
            println!("{replayed} journal(s) replayed");
        }
        let verdict = match (report.is_clean(), report.is_consistent()) {
            (true, _) => "clean".to_owned(),
            (_, true) => "consistent; a mount finishes what is listed".to_owned(),
            _ => format!("{} fault(s)", report.faults.len() as u64 + report.unlisted),
        };
        println!("{}: {} inodes, {} blocks in use: {verdict}", cli.device, report.inodes, report.blocks);
    }
    match (report.is_clean(), replayed) {
        (true, 0) => EXIT_CLEAN,
        (true, _) => EXIT_REPLAYED,
        _ => EXIT_FAULTS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fsck(args: &[&str]) -> u8 {
        main(std::iter::once("fsck.gfs").chain(args.iter().copied()).map(OsString::from))
    }

    #[test]
    fn exit_codes_tell_clean_damaged_and_unreadable_apart() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lun");
        std::fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
        let device = path.to_str().unwrap();
        let made = crate::mkfs_cli::main(["mkfs.gfs", "-q", "-t", "a:b", device].map(OsString::from));
        assert_eq!(made, 0);
        assert_eq!(fsck(&[device]), EXIT_CLEAN);
        assert_eq!(fsck(&["--replay", "--json", device]), EXIT_CLEAN);
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(&[0; 4], 65536).unwrap();
        assert_eq!(fsck(&[device]), EXIT_FAULTS);
        assert_eq!(fsck(&["/nonexistent/lun"]), EXIT_FAILED);
        assert_eq!(fsck(&["-n", "--replay", device]), EXIT_USAGE);
    }
}
