//! One simulation of everything that decides: ring, process groups, quorum, quorum disk, fence domain, mount membership, lock manager.
//!
//! The cores are those of production, unchanged, composed as production does (`membership::stack`, `qdisk::core`,
//! `gfs::cluster::members`, `dlm::Core`); network, disk, clocks, processes and fence agents are simulated. A run is one seed:
//! faults for a while, then everything is healed and must come together again.
//!
//! `CAIRN_SIM_SEED=n` runs one seed and prints its story; `CAIRN_SIM_SEEDS=n` runs that many, from `CAIRN_SIM_FIRST` on, without
//! the rule that `CAIRN_SIM_MUTANT` names.

mod check;
mod daemon;
mod lun;
mod mount;
mod services;
mod tap;
mod world;

use check::Seen;
use services::SERVICES;
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::{MS, Mutant, Options, World};

/// True time within which a healed cluster must be whole: one restart, the longest pause of a fence domain after failed
/// agents, the views, the replays.
const WHOLE: u64 = 120_000 * MS;
/// Within which every mount of a whole cluster must make progress.
const PROGRESS: u64 = 20_000 * MS;
const SEEDS: u64 = 1000;
/// Seeds above that range that broke a rule once.
const FOUND: [(u64, &str); 27] = [
    (1315, "I24: a node left before its mount's goodbye was ordered; nobody fences who left"),
    (1685, "I9: what a machine that is cut from the LUN had on its way landed after its reset"),
    (1818, "I1: a quorate side did not know of another one that was quorate in between"),
    (
        1867,
        "slow: a lock that goes with the fence of its holder stayed, because the fence came before the view",
    ),
    (1971, "I24: a note on the dead from a mount that was behind, to one that had just come"),
    (2109, "I24: whoever knew the dead told a newcomer's lock manager, and died before it told its mount"),
    (2270, "I7: who was never admitted and lost was taken for gone while it still counted the device"),
    (2278, "I7: the same"),
    (2580, "I24: the same"),
    (2732, "I24: one member took a rejoined node for fenced, the others waited for its agent"),
    (3211, "I1: a mount of a living node was dying, and a newcomer did not know"),
    (3568, "I1: quorate in a view whose number is below a recorded one"),
    (3751, "I1: as 1818"),
    (6240, "I5: what a mount that is proved dead and does not know gives up is no value (the checker's)"),
    (6645, "I24: two members left a victim to each other, after the agent of one had failed"),
    (9949, "I24: a lock manager was told of a fence before the view that showed the loss"),
    (15154, "I24: as 9949"),
    (18705, "I1: locks were passed on in a view that nobody had recorded"),
    (22296, "I8: what a machine that is cut from the LUN has on its way cannot land (the checker's)"),
    (22306, "I9: an old proof for an unknown life was told to a newcomer (the checker's)"),
    (
        324_683,
        "I24: a claim that was ordered behind the proof of its maker's death held the service for ever",
    ),
    (
        335512,
        "I24: nobody fenced any more: whose agent had failed and the others took each other for the one in charge",
    ),
    (
        340859,
        "I24: a node was told a proof of death ahead of what the dead had said before, which it held back; the records of services differed for ever",
    ),
    (
        342703,
        "I8: a mount took one for dead of whom a member that it had not heard yet knew that it is lost and lives",
    ),
    (340049, "I1: the same; its gate was opened"),
    (346511, "I20: the same; a service ran twice"),
    (347312, "I8: the same, as the runs are since mounts say that they wait"),
];

/// The rules that can be taken away, and the seed from which one is looked for that notices: some notice one in thousands.
const SABOTAGES: [(Mutant, u64); 14] = [
    (Mutant::ReplayBeforeFence, 1),
    (Mutant::GateOpenedAtFence, 1),
    (Mutant::PermitNotChecked, 1),
    (Mutant::LyingAgent, 1),
    (Mutant::QuorumOffByOne, 1),
    (Mutant::VotesWithoutLease, 1),
    (Mutant::LeaseOfAnyView, 14720),
    (Mutant::PermitForEver, 1),
    (Mutant::FenceWithoutQuorum, 1),
    (Mutant::PassedByGoesOn, 3361),
    (Mutant::SafeAsAgreed, 1),
    (Mutant::UsersAlwaysOpen, 1),
    (Mutant::KillsNotRead, 1),
    (Mutant::NoVictimsAtOnce, SERVICES),
];

struct Run {
    digest: u64,
    steps: u64,
    seen: Seen,
    whole_after: u64,
}

fn drive(w: &mut World) -> Result<u64, String> {
    let faults = (12_000 + w.rng.below(20_000)) * MS;
    w.schedule_faults(faults);
    w.run(faults + 1, |_| false);
    broken(w)?;
    let healed = w.now;
    // what happened just before may show only now: as a lost token, or as a silent slot of the disk
    let timing = &w.config.timing;
    let shown = timing.view_after_death.max(timing.master_after_death) * MS;
    let mut since = None;
    let is_whole = |w: &mut World| {
        since = w.missing().is_empty().then(|| since.unwrap_or(w.now));
        since.is_some_and(|at| w.now >= at + shown)
    };
    if !w.run(healed + WHOLE, is_whole) {
        w.picture();
        broken(w)?;
        return Err(format!("I24 not whole {} s after the faults: {}", WHOLE / 1000 / MS, w.missing()));
    }
    let whole = since.unwrap_or(w.now) - healed;
    w.audit.calm = true;
    let before: Vec<(u64, u64)> = progress(w);
    let moved =
        |w: &mut World| progress(w).iter().zip(&before).all(|(now, then)| now.0 > then.0 && now.1 > then.1);
    let until = w.now + PROGRESS;
    if !w.run(until, moved) {
        broken(w)?;
        return Err(format!(
            "I24 no progress: {:?} after {before:?}, waiting {:?}",
            progress(w),
            w.audit.waiting()
        ));
    }
    let still = w.missing();
    if !still.is_empty() {
        return Err(format!("I24 whole, and then not: {still}"));
    }
    w.quiet = true;
    w.run(w.now + 3000 * MS, |_| false);
    broken(w)?;
    w.check_tables();
    broken(w)?;
    w.check_evs()?;
    Ok(whole)
}

fn progress(w: &World) -> Vec<(u64, u64)> {
    w.nodes.iter().map(|n| n.mount.as_ref().map_or((0, 0), |m| (m.increased, m.looked))).collect()
}

fn broken(w: &World) -> Result<(), String> {
    w.audit.broken.clone().map_or(Ok(()), Err)
}

/// One seed; `Err` says which rule was broken. The story is there when a trace was asked for.
fn run(seed: u64, opt: Options) -> (Result<Run, String>, Vec<String>) {
    let mut w = World::new(seed, opt);
    let result = catch_unwind(AssertUnwindSafe(|| drive(&mut w)));
    let result = match result {
        Ok(Ok(whole_after)) => {
            Ok(Run { digest: w.digest(), steps: w.steps, seen: w.audit.seen, whole_after })
        }
        Ok(Err(why)) => Err(format!("at {:.4} s: {why}", w.now as f64 / 1e9)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_default();
            Err(format!("at {:.4} s: an assertion of a core: {text}", w.now as f64 / 1e9))
        }
    };
    if opt.trace {
        w.story.push_back(format!("{:?}", w.kinds));
    }
    (result, w.story.into_iter().collect())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|s| s.parse().ok())
}

/// Runs seeds on all cores; the result of each in order.
fn many<T: Send>(seeds: std::ops::Range<u64>, f: impl Fn(u64) -> T + Sync) -> Vec<(u64, T)> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(16);
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let mut all: Vec<(u64, T)> = std::thread::scope(|s| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                s.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if seed >= seeds.end {
                            return mine;
                        }
                        mine.push((seed, f(seed)));
                    }
                })
            })
            .collect();
        workers.into_iter().flat_map(|w| w.join().expect("a worker catches panics")).collect()
    });
    all.sort_by_key(|(seed, _)| *seed);
    all
}

fn tell(seed: u64, why: &str) {
    let (_, story) = run(seed, Options { trace: true, ..Options::default() });
    let from = story.len().saturating_sub(150);
    for line in &story[from..] {
        println!("{line}");
    }
    println!("CAIRN_SIM_SEED={seed}: {why}");
}

#[test]
fn faults_break_no_rule_and_the_healed_cluster_comes_together() {
    let taken = std::env::var("CAIRN_SIM_MUTANT").ok();
    let mutant = taken.map(|name| {
        let known = SABOTAGES.into_iter().map(|(m, _)| m).find(|m| format!("{m:?}") == name);
        known.unwrap_or_else(|| panic!("CAIRN_SIM_MUTANT: none of {SABOTAGES:?}"))
    });
    if let Some(seed) = number("CAIRN_SIM_SEED") {
        let (result, story) = run(seed, Options { mutant, trace: true });
        for line in story {
            println!("{line}");
        }
        let run = result.unwrap_or_else(|why| panic!("CAIRN_SIM_SEED={seed}: {why}"));
        println!("{} events, digest {:x}, whole after {} ms", run.steps, run.digest, run.whole_after / MS);
        return;
    }
    let seeds = number("CAIRN_SIM_SEEDS").unwrap_or(SEEDS);
    let (mut seen, mut steps, mut slowest, mut failed) = (Seen::default(), 0, (0, 0), Vec::new());
    let first = number("CAIRN_SIM_FIRST").unwrap_or(1);
    let mut results = many(first..first + seeds, |seed| {
        let result = run(seed, Options { mutant, trace: false }).0;
        if let Err(why) = &result {
            eprintln!("seed {seed}: {}", &why[..why.len().min(160)]);
        } else if seed.is_multiple_of(2000) {
            eprintln!("seed {seed}");
        }
        result
    });
    for (seed, what) in FOUND.into_iter().filter(|(seed, _)| !(first..first + seeds).contains(seed)) {
        results.push((seed, run(seed, Options::default()).0.map_err(|why| format!("{why} (once {what})"))));
    }
    for (seed, result) in results {
        match result {
            Ok(run) => {
                seen.add(&run.seen);
                steps += run.steps;
                slowest = slowest.max((run.whole_after, seed));
            }
            Err(why) => {
                println!("CAIRN_SIM_SEED={seed}: {}", &why[..why.len().min(400)]);
                failed.push((seed, why));
            }
        }
    }
    println!(
        "{seeds} seeds, {steps} events, whole after at most {} ms (seed {}), {seen:?}",
        slowest.0 / MS,
        slowest.1
    );
    if let Some((seed, why)) = failed.first() {
        tell(*seed, why);
        panic!("{} of {seeds} seeds failed", failed.len());
    }
    if seeds >= 100 {
        let reached = [
            seen.views,
            seen.fences,
            seen.replays,
            seen.entries,
            seen.grants,
            seen.writes,
            seen.evictions,
            seen.grants_of_votes,
            seen.lost_permits,
            seen.rejoined,
            seen.mounts_only,
        ];
        assert!(
            reached.iter().all(|n| *n > seeds / 20),
            "the faults do not reach what they are about: {seen:?}"
        );
    }
}

/// The same with a service manager on each node.
#[test]
fn services_run_on_one_node_and_come_back() {
    let results = many(SERVICES..SERVICES + 500, |seed| run(seed, Options::default()).0.err());
    if let Some((seed, why)) = results.into_iter().find_map(|(seed, why)| Some((seed, why?))) {
        tell(seed, &why);
        panic!("seed {seed}");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    let digests = |range| many(range, |seed| run(seed, Options::default()).0.map(|r| (r.digest, r.steps)));
    for ((seed, one), (_, two)) in digests(1..9).into_iter().zip(digests(1..9)) {
        assert_eq!(one, two, "seed {seed}");
    }
}

/// Each rule that can be taken away must be missed by some seed.
#[test]
fn every_sabotage_is_noticed() {
    let mut missed = Vec::new();
    for (mutant, first) in SABOTAGES {
        let opt = Options { mutant: Some(mutant), trace: false };
        let caught = (0..32u64).find_map(|batch| {
            let from = first + batch * 16;
            many(from..from + 16, |seed| run(seed, opt).0.err())
                .into_iter()
                .filter_map(|(seed, why)| why.map(|why| (seed, why)))
                // noticed is only what the whole product does not do
                .find(|(seed, _)| run(*seed, Options::default()).0.is_ok())
        });
        match caught {
            Some((seed, why)) => println!("{mutant:?}: seed {seed} {}", &why[..why.len().min(160)]),
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "nobody notices {missed:?}");
}
