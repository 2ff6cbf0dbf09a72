//! A seeded run of faults on a cluster of processes, under load on every node (`load.rs`) and with a service.
//!
//! It comes in rounds: some faults, at random places and times, also in the middle of what heals the last one; then everybody is helped up,
//! and the cluster must become whole: all nodes quorate and mounted, the service and every kind of load on every node making progress. What was
//! acknowledged is looked for all the time (the load's readers), after each round, and at the end on every node; then the volume is checked.
//! The log of the LUN's writes has no write of a fenced life behind its fence (I9).
//!
//! `CAIRN_CHAOS_SECONDS` (faults go on that long; default 12) and `CAIRN_CHAOS_SEED` are for runs by hand. The seed decides the faults and their
//! times; what the machine makes of them differs from run to run. A failure leaves logs, LUN and journals, and says where.

mod faults;
mod judge;
mod world;

use cairn_tests::cluster::can_run;
use std::time::{Duration, Instant};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is no number")))
}

#[test]
fn faults_under_load_lose_nothing() {
    if !can_run() {
        return;
    }
    let seed = number("CAIRN_CHAOS_SEED", 1);
    let seconds = Duration::from_secs(number("CAIRN_CHAOS_SECONDS", 12));
    eprintln!("seed {seed}, {seconds:?}");
    let mut world = world::World::begin(seed);
    let start = Instant::now();
    world.make_whole();
    while start.elapsed() < seconds {
        world.round();
        world.make_whole();
        judge::while_it_runs(&world);
    }
    judge::at_the_end(world);
}
