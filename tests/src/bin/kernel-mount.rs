//! Mount a GFS2 image with the Linux kernel (in a user-mode guest), run a script on it, unmount.
//!
//! Exit status: the script's; 75 after a crash on purpose, 120 mount failed, 121 unmount failed, 122 guest died or timed out, 125
//! something is missing.

use cairn_tests::oracle::kernel::{KernelOptions, Outcome, kernel_run, missing};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(name = "kernel-mount", about = "Run a script on a GFS2 image that the Linux kernel has mounted")]
struct Cli {
    /// Further mount options
    #[arg(short)]
    options: Option<String>,
    /// Directory that the script may write to, as $OUT
    #[arg(long)]
    out: Option<PathBuf>,
    /// Kill the guest so many seconds after the script began (or let the script call crash-now)
    #[arg(long)]
    crash_after: Option<f64>,
    /// Kill a guest that takes longer, in seconds
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    image: PathBuf,
    /// A bash script; it runs in the root directory of the volume
    script: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(package) = missing() {
        eprintln!("kernel-mount: package {package} is missing");
        return ExitCode::from(125);
    }
    let options = KernelOptions {
        mount_options: cli.options.unwrap_or_default(),
        crash_after: cli.crash_after.map(Duration::from_secs_f64),
        timeout: Duration::from_secs(cli.timeout),
        out: cli.out,
    };
    let run = std::fs::read_to_string(&cli.script).and_then(|s| kernel_run(&cli.image, &s, &options));
    match run {
        Ok(run) => {
            print!("{}", run.output);
            eprint!("{}", run.log);
            ExitCode::from(match run.outcome {
                Outcome::Exit(status) => status as u8,
                Outcome::Crashed => 75,
                Outcome::MountFailed => 120,
                Outcome::UnmountFailed => 121,
                Outcome::Died | Outcome::TimedOut => 122,
            })
        }
        Err(e) => {
            eprintln!("kernel-mount: {e}");
            ExitCode::from(125)
        }
    }
}
