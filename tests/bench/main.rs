//! Benchmark: the plain operations on one mount, on two, and on two that want the same things, beside a pass-through FUSE file system
//! over tmpfs and beside the LUN itself, in one run. Prints one JSON object; ratios compare figures of the same round only, since the machine changes under us.
//!
//! `cargo run --release -p cairn-tests --bin bench -- [--quick] [--rounds N] [--files N] [--mib N] [--only PLACE] [--dir DIR]`. Needs the
//! superuser and /dev/fuse. Progress on standard error. Exit status 0, or 1 with the reason, 2 wrong usage.

mod figures;
mod passthrough;
mod places;

use cairn_base::exit;
use clap::Parser;
use figures::{Figures, ratio, ratio_of_rows, summary};
use places::Place;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// As in `cairn`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// No round begins after this time.
const BOUND: Duration = Duration::from_secs(240);

#[derive(Parser)]
#[command(about = "Plain operations on one and two mounts, beside a pass-through file system and the LUN")]
struct Args {
    /// Files per directory
    #[arg(long, default_value_t = 2000)]
    files: u32,
    /// Size of the sequential file
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// How often everything is measured
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// One round with few files
    #[arg(long)]
    quick: bool,
    /// Only this place (for a profile)
    #[arg(long)]
    only: Option<Place>,
    /// Where the LUN file goes (not tmpfs, if the LUN is to mean anything)
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
}

fn main() {
    let mut args = Args::parse();
    if args.quick {
        (args.files, args.mib, args.rounds) = (args.files.min(500), args.mib.min(64), 1);
    }
    match run(&args) {
        Ok(report) => println!("{report:#}"),
        Err(e) => {
            eprintln!("bench: {e}");
            std::process::exit(exit::FAILED);
        }
    }
}

fn run(args: &Args) -> Result<Value> {
    let work = tempfile::Builder::new().prefix("cairn-bench-").tempdir_in(&args.dir)?;
    let tmpfs = tempfile::Builder::new().prefix("cairn-bench-").tempdir_in("/dev/shm")?;
    let start = Instant::now();
    let all = [Place::Passthrough, Place::Lun, Place::OneMount, Place::TwoMounts, Place::Contended];
    let places: Vec<Place> = all.into_iter().filter(|p| args.only.is_none_or(|o| o == *p)).collect();
    let mut rounds: Vec<Vec<Figures>> = Vec::new();
    for round in 1..=args.rounds.max(1) {
        if start.elapsed() > BOUND {
            eprintln!("{} rounds are enough: {BOUND:?} are over", rounds.len());
            break;
        }
        let mut figures = Vec::new();
        for place in &places {
            eprintln!("round {round} of {}: {}", args.rounds, place.describe());
            let dirs = places::Dirs { work: work.path(), tmpfs: tmpfs.path() };
            figures.push(place.measure(args.files, args.mib, &dirs)?);
        }
        rounds.push(figures);
    }
    let of = |place: Place| -> Vec<&Figures> {
        let at = places.iter().position(|p| *p == place);
        rounds.iter().filter_map(|r| r.get(at?)).collect()
    };
    let mut figures = serde_json::Map::new();
    for place in &places {
        figures.insert(place.name().to_owned(), summary(&of(*place)));
    }
    let ratios = |a: Place, b: Place| {
        let each: Vec<Figures> = of(a).into_iter().zip(of(b)).map(|(a, b)| ratio(a, b)).collect();
        summary(&each.iter().collect::<Vec<_>>())
    };
    let contended: Vec<Figures> = of(Place::Contended)
        .into_iter()
        .zip(of(Place::OneMount))
        .map(|(a, b)| ratio_of_rows(a, b, &places::UNCONTENDED))
        .collect();
    let contended = summary(&contended.iter().collect::<Vec<_>>());
    Ok(json!({
        "files": args.files,
        "mib": args.mib,
        "rounds": rounds.len(),
        "cpus": std::thread::available_parallelism().map_or(0, |n| n.get()),
        "seconds": start.elapsed().as_secs(),
        "unit": "operations per second; seq_*: MiB per second; each: [median, least, greatest] of the rounds",
        "figures": figures,
        "ratios": {
            "one_mount_to_passthrough": ratios(Place::OneMount, Place::Passthrough),
            "each_of_two_mounts_to_one": ratios(Place::TwoMounts, Place::OneMount),
            "one_mount_to_lun": ratios(Place::OneMount, Place::Lun),
            "contended_to_one": contended,
        },
    }))
}
