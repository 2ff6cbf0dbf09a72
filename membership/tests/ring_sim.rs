//! Random runs of the ring under a bad network with crashes, pauses, partitions, checked against EVS1–EVS10.
//!
//! `RING_SEEDS=n` runs more seeds, `RING_SEED=s` repeats one and prints what happened.

use cairn_base::{NodeId, Proc, Rng};
use membership::engine::{Engine, LeaveReason};
use membership::ring::Sabotage;
use membership::ring::log::State;
use membership::sim::{Cluster, RingHost, Weather, evs};
use std::collections::BTreeSet;
use std::time::Duration;

type Sim = Cluster<RingHost>;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn cluster(seed: u64, n: u16, sabotage: Sabotage) -> Sim {
    Cluster::new(seed, n, move |b| RingHost::new(&b, sabotage))
}

fn formed(c: &Sim) -> bool {
    let alive = c.alive();
    let mut hosts = c.hosts();
    let Some((_, first)) = hosts.next() else { return true };
    let ok = |h: &RingHost| h.ring.state() == State::Operational && h.ring.members().len() == alive.len();
    ok(first) && hosts.all(|(_, h)| ok(h) && h.ring.ring() == first.ring.ring())
}

fn weather(rng: &mut Rng) -> Weather {
    if rng.chance(1, 4) {
        return Weather::CALM;
    }
    Weather {
        loss: rng.below(150),
        duplicate: rng.below(100),
        delay: Duration::from_micros(20 + rng.below(2000)),
        jitter: Duration::from_micros(rng.below(3000)),
        late: rng.below(50),
    }
}

struct Run {
    verdict: Result<(), String>,
    digest: u64,
    delivered: usize,
    rings: usize,
}

fn fault(c: &mut Sim, rng: &mut Rng) {
    let nodes = c.node_ids();
    let n = nodes[rng.below(nodes.len() as u64) as usize];
    let m = nodes[rng.below(nodes.len() as u64) as usize];
    match rng.below(14) {
        0 | 1 => {
            let p = c.proc(n);
            let was = c.host(n).is_some();
            c.crash(n);
            if was && rng.chance(1, 2) {
                let to: Vec<NodeId> = c.alive();
                if let Some(&tell) = to.first() {
                    c.with(tell, |h, _| h.ring.hint_dead(p.node, p.incarnation));
                }
            }
        }
        2 | 3 => {
            if c.host(n).is_none() {
                let forget = rng.chance(1, 4);
                c.start(n, forget);
            }
        }
        4 => c.pause(n, ms(rng.below(700))),
        5 => c.pause(n, ms(500 + rng.below(4000))),
        6 => {
            let salt = rng.next_u64();
            let sides = 2 + rng.below(2);
            c.partition(|x| (salt >> (x.0 * 4)) % sides);
        }
        7 => c.cut.clear(),
        8 => {
            c.cut.insert((n, m));
        }
        9 => c.link(n, m, false),
        10 => {
            let w = weather(rng);
            c.weather = w;
        }
        11 => {
            if rng.chance(1, 3) {
                c.with(n, |h, _| h.ring.leave(LeaveReason::Shutdown));
            }
        }
        _ => {
            c.link(n, m, true);
        }
    }
}

fn run(seed: u64, sabotage: Sabotage) -> Run {
    let mut rng = Rng::new(seed ^ 0x5EED);
    let n = 2 + rng.below(4) as u16;
    let mut c = cluster(seed, n, sabotage);
    c.budget = 3_000_000;
    c.weather = weather(&mut rng);
    for node in c.node_ids() {
        c.start(node, false);
        c.run(ms(rng.below(300)));
    }
    let mut id = 0;
    let faults = 6 + rng.below(14);
    for _ in 0..faults {
        for _ in 0..rng.below(6) {
            let alive = c.alive();
            if alive.is_empty() {
                break;
            }
            let from = alive[rng.below(alive.len() as u64) as usize];
            for _ in 0..1 + rng.below(8) {
                id += 1;
                let len = if rng.chance(1, 10) { 2000 + rng.below(30_000) as usize } else { 16 };
                let safe = rng.chance(1, 3);
                c.with(from, |h, _| h.send(id, len, safe).is_ok());
            }
            let gap = if rng.chance(1, 3) { 500 } else { 10 };
            c.run(ms(rng.below(gap)));
        }
        fault(&mut c, &mut rng);
        let gap = *[5, 50, 500, 2500].get(rng.below(4) as usize).expect("index below 4");
        c.run(ms(rng.below(gap)));
    }
    // Healed phase.
    c.cut.clear();
    c.weather = Weather::CALM;
    // Sleepers wake; a leave that was asked for before may still be under way, then that node comes back.
    c.run(ms(5000));
    let mut verdict = Err("EVS10 nobody stayed".to_string());
    for _ in 0..6 {
        for node in c.node_ids() {
            if c.host(node).is_none() {
                c.start(node, false);
            }
        }
        let limit = c.now + ms(150_000);
        if !c.run_while(limit, |c| !formed(c)) {
            verdict = Err("EVS10 no common ring after healing".into());
            break;
        }
        let before = (c.alive().len(), c.hosts().next().map(|(_, h)| h.ring.ring()));
        c.run(ms(6000));
        if formed(&c) && before == (c.alive().len(), c.hosts().next().map(|(_, h)| h.ring.ring())) {
            verdict =
                if before.0 == c.node_ids().len() { Ok(()) } else { Err("EVS10 somebody is missing".into()) };
            break;
        }
        if c.alive().len() == before.0 {
            verdict = Err("EVS10 the common ring did not stay".into());
            break;
        }
    }
    let alive: BTreeSet<Proc> = c.alive().into_iter().map(|n| c.proc(n)).collect();
    let traces: Vec<evs::Trace> =
        c.dead.iter().map(|h| h.trace.clone()).chain(c.hosts().map(|(_, h)| h.trace.clone())).collect();
    let count = |f: fn(&evs::Event) -> bool| traces.iter().flat_map(|t| &t.events).filter(|e| f(e)).count();
    let delivered = count(|e| matches!(e, evs::Event::Delivered { .. }));
    let rings = count(|e| matches!(e, evs::Event::Regular { .. }));
    if std::env::var("RING_SEED").is_ok() {
        for h in c.dead.iter().chain(c.hosts().map(|(_, h)| h)) {
            println!("--- {}", h.trace.proc);
            h.logs.iter().for_each(|(at, l)| println!("{:>9} us {l}", at.0 / 1000));
            h.trace.events.iter().for_each(|e| println!("    {e:?}"));
        }
    }
    let verdict = verdict.and_then(|()| evs::check(&traces, &alive));
    Run { verdict, digest: evs::digest(&traces), delivered, rings }
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    if let Ok(s) = std::env::var("RING_SEED") {
        let s: u64 = s.parse().expect("RING_SEED is a number");
        return s..s + 1;
    }
    let n = std::env::var("RING_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(default);
    1..n + 1
}

#[test]
fn sim_ring_random_faults_keep_evs() {
    let (mut delivered, mut rings, mut failures) = (0, 0, Vec::new());
    let seeds = seeds(if cfg!(debug_assertions) { 300 } else { 1200 });
    for seed in seeds.clone() {
        let r = run(seed, Sabotage::default());
        delivered += r.delivered;
        rings += r.rings;
        if let Err(e) = r.verdict {
            println!("RING_SEED={seed}: {e}");
            failures.push(seed);
        }
    }
    println!("{} seeds, {rings} configurations, {delivered} deliveries", seeds.end - seeds.start);
    assert!(
        failures.is_empty(),
        "{} seeds failed, first {:?}",
        failures.len(),
        &failures[..failures.len().min(20)]
    );
    assert!(delivered > 0 && rings > 0);
}

#[test]
fn sim_ring_same_seed_gives_same_run() {
    for seed in [3, 17, 255] {
        assert_eq!(
            run(seed, Sabotage::default()).digest,
            run(seed, Sabotage::default()).digest,
            "seed {seed}"
        );
    }
}

/// Breaks one rule on purpose; the checker must notice within so many seeds.
fn is_killed(name: &str, sabotage: Sabotage, seeds: u64) {
    std::panic::set_hook(Box::new(|_| ()));
    let killed = (1..=seeds).find_map(|seed| {
        // An invariant that stops the ring is a kill as well.
        let verdict =
            std::panic::catch_unwind(|| run(seed, sabotage).verdict).unwrap_or(Err("assertion".into()));
        verdict.err().map(|e| (seed, e))
    });
    let _ = std::panic::take_hook();
    match killed {
        Some((seed, why)) => println!("{name}: seed {seed}: {}", &why[..why.len().min(120)]),
        None => panic!("sabotage {name} survived {seeds} seeds"),
    }
}

#[test]
fn busted_rings_are_noticed() {
    let s = Sabotage::default();
    let n = 600;
    is_killed("accept_duplicate_token", Sabotage { accept_duplicate_token: true, ..s }, n);
    is_killed("release_early", Sabotage { release_early: true, ..s }, n);
    is_killed("safe_as_agreed", Sabotage { safe_as_agreed: true, ..s }, n);
    is_killed("stop_at_gap", Sabotage { stop_at_gap: true, ..s }, n);
    is_killed("ring_id_without_incarnation", Sabotage { ring_id_without_incarnation: true, ..s }, n);
    is_killed("keep_failed", Sabotage { keep_failed: true, ..s }, n);
}
