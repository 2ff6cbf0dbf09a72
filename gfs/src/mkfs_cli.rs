//! `mkfs.gfs`: the command line in front of [`mkfs`](crate::mkfs).
//!
//! Exit codes: 0 made; 1 the device or its content stood in the way, or writing failed; 2 wrong usage.

use crate::mkfs::{self, MkfsError, MkfsOptions, Summary};
use cairn_base::exit;
use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lun::{OpenOptions, Share};
use std::ffi::OsString;
use std::io::{BufRead, IsTerminal, Write};

pub const EXIT_OK: u8 = exit::OK as u8;
pub const EXIT_FAILED: u8 = exit::FAILED as u8;
pub const EXIT_USAGE: u8 = exit::USAGE as u8;

/// Make a GFS2 volume.
#[derive(Parser, Debug)]
#[command(
    name = "mkfs.gfs",
    about = "Make a GFS2 volume",
    version,
    after_help = "DEVICE is a block device, a file, file:/path, or one of these with #part=N for a GPT partition.\n\
                  Exit codes: 0 made; 1 refused or failed; 2 wrong usage.\n\
                  Example: mkfs.gfs -t mycluster:data -j 3 /dev/vg0/shared"
)]
struct Cli {
    /// Lock table: the cluster's name, and a name for the file system that is unique in it
    #[arg(short = 't', value_name = "CLUSTER:FS", default_value = "")]
    table: String,
    /// Locking protocol: lock_dlm, or lock_nolock for a volume of one node
    #[arg(short = 'p', value_name = "PROTOCOL", default_value = "lock_dlm")]
    protocol: String,
    /// Number of journals: one for each node that mounts at the same time
    #[arg(short = 'j', value_name = "N", default_value_t = 1)]
    journals: u32,
    /// Size of each journal in MiB, 8 to 1024 [default: by the size of the device]
    #[arg(short = 'J', value_name = "MIB")]
    journal_mb: Option<u32>,
    /// Block size in bytes: 512, 1024, 2048 or 4096
    #[arg(short = 'b', value_name = "BYTES", default_value_t = 4096)]
    block_size: u32,
    /// Target size of resource groups in MiB, 32 to 2048
    #[arg(short = 'r', value_name = "MIB", default_value_t = 256)]
    rgrp_mb: u32,
    /// Size of each node's quota change file in MiB, 1 to 64
    #[arg(short = 'c', value_name = "MIB", default_value_t = 1)]
    quota_change_mb: u32,
    /// UUID of the volume [default: random]
    #[arg(short = 'U', value_name = "UUID", value_parser = parse_uuid)]
    uuid: Option<[u8; 16]>,
    /// Owner of the root directory
    #[arg(long, value_name = "UID:GID", value_parser = parse_owner, default_value = "0:0")]
    root_owner: (u32, u32),
    /// Overwrite what is on the device without a question
    #[arg(short = 'O')]
    override_existing: bool,
    /// Print errors only
    #[arg(short = 'q')]
    quiet: bool,
    /// The LUN
    device: String,
    /// Size of the volume in blocks [default: the whole device]
    blocks: Option<u64>,
}

fn parse_owner(text: &str) -> Result<(u32, u32), String> {
    text.split_once(':')
        .and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)))
        .ok_or_else(|| "an owner is UID:GID, two numbers".to_owned())
}

fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|&c| c != b'-')
        .map(|c| {
            char::from(c).to_digit(16).map(|d| d as u8).ok_or("a UUID has hexadecimal digits and hyphens")
        })
        .collect::<Result<_, _>>()?;
    if digits.len() != 32 {
        return Err("a UUID has 32 hexadecimal digits".to_owned());
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(uuid)
}

/// A UUID as people write it.
pub fn format_uuid(uuid: &[u8; 16]) -> String {
    use std::fmt::Write;
    let mut s = String::with_capacity(36);
    for (i, b) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            s.push('-');
        }
        let _ = write!(s, "{b:02x}");
    }
    s
}

impl Cli {
    fn options(&self) -> MkfsOptions {
        MkfsOptions {
            lock_proto: self.protocol.clone(),
            lock_table: self.table.clone(),
            journals: self.journals,
            journal_mb: self.journal_mb,
            quota_change_mb: self.quota_change_mb,
            block_size: self.block_size,
            rgrp_mb: self.rgrp_mb,
            uuid: self.uuid,
            size_blocks: self.blocks,
            root_owner: self.root_owner,
            override_existing: self.override_existing,
            ..MkfsOptions::default()
        }
    }
}

/// The summary block, in the classic layout.
pub fn describe(s: &Summary) -> String {
    let gb = |blocks: u64| (blocks * u64::from(s.block_size)) as f64 / f64::from(1u32 << 30);
    format!(
        "Device:                    {}\n\
         Block size:                {}\n\
         Device size:               {:.2} GB ({} blocks)\n\
         Filesystem size:           {:.2} GB ({} blocks)\n\
         Journals:                  {}\n\
         Journal size:              {}MB\n\
         Resource groups:           {}\n\
         Locking protocol:          \"{}\"\n\
         Lock table:                \"{}\"\n\
         UUID:                      {}\n",
        s.device,
        s.block_size,
        gb(s.device_blocks),
        s.device_blocks,
        gb(s.fs_blocks),
        s.fs_blocks,
        s.journals,
        s.journal_mb,
        s.rgrps,
        s.lock_proto,
        s.lock_table,
        format_uuid(&s.uuid)
    )
}

/// Ask on the terminal. Without one the answer is no.
fn confirmed(device: &str, found: &str) -> bool {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return false;
    }
    eprintln!("{device} appears to contain {found}.");
    eprintln!("This will destroy any data on {device}.");
    eprint!("Are you sure you want to proceed? [y/n] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

fn run(cli: &Cli) -> Result<Summary, MkfsError> {
    let lun = lun::open(&cli.device, &OpenOptions::default().share(Share::Exclusive))?;
    let mut options = cli.options();
    let target = if cli.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let bar = ProgressBar::with_draw_target(None, target);
    if let Ok(style) = ProgressStyle::with_template("writing {wide_bar} {bytes}/{total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let mut made = mkfs::make(&lun, &options, &mut progress);
    if let Err(MkfsError::InUse { device, what }) = &made
        && confirmed(device, what)
    {
        options.override_existing = true;
        made = mkfs::make(&lun, &options, &mut progress);
    }
    bar.finish_and_clear();
    made
}

/// Runs the command; `args` begin with the program's name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { EXIT_USAGE } else { EXIT_OK };
        }
    };
    match run(&cli) {
        Ok(summary) => {
            if !cli.quiet {
                print!("{}", describe(&summary));
            }
            EXIT_OK
        }
        Err(e) => {
            eprintln!("mkfs.gfs: {e}");
            match e {
                MkfsError::Option(_) => EXIT_USAGE,
                _ => EXIT_FAILED,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mkfs(args: &[&str]) -> u8 {
        main(std::iter::once("mkfs.gfs").chain(args.iter().copied()).map(OsString::from))
    }

    #[test]
    fn exit_codes_tell_usage_refusal_and_success_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lun");
        std::fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
        let device = path.to_str().unwrap();
        assert_eq!(mkfs(&[]), EXIT_USAGE);
        assert_eq!(mkfs(&["-q", device]), EXIT_USAGE, "lock_dlm without a table");
        assert_eq!(mkfs(&["-q", "-t", "no-colon", device]), EXIT_USAGE);
        assert_eq!(mkfs(&["-q", "-t", "a:b", "-b", "8192", device]), EXIT_USAGE);
        assert_eq!(mkfs(&["-q", "-t", "a:b", "-j", "9", device]), EXIT_FAILED, "too small");
        assert_eq!(mkfs(&["-q", "-t", "a:b", "/nonexistent/lun"]), EXIT_FAILED);
        assert_eq!(mkfs(&["-q", "-t", "a:b", device]), EXIT_OK);
        assert_eq!(mkfs(&["-q", "-t", "a:b", device]), EXIT_FAILED, "a volume is already there");
        assert_eq!(mkfs(&["-q", "-O", "-t", "a:b", device]), EXIT_OK);
        assert_eq!(mkfs(&["--help"]), EXIT_OK);
    }

    #[test]
    fn uuids_are_read_and_printed() {
        let text = "1b4e28ba-2fa1-11d2-883f-b9a761bde3fb";
        assert_eq!(format_uuid(&parse_uuid(text).unwrap()), text);
        assert!(
            parse_uuid("1b4e28ba").is_err() && parse_uuid("zz4e28ba-2fa1-11d2-883f-b9a761bde3fb").is_err()
        );
    }
}
