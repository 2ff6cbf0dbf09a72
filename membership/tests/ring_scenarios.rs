//! Directed stories of the ring: one fault each, with its time limit in the `fast` profile.

use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use membership::engine::{Engine, EngineInput, EngineOutput, Guarantee, Lane, LeaveReason, SendError};
use membership::event::How;
use membership::ring::log::{Cause, RingLog, State};
use membership::ring::{Ring, Sabotage, is_token};
use membership::sim::{Birth, Cluster, RingHost, Weather, evs, fast_timers};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

type Sim = Cluster<RingHost>;

const MCAST: u8 = 2;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn sim(n: u16) -> Sim {
    sim_with(n, Sabotage::default())
}

fn sim_with(n: u16, sabotage: Sabotage) -> Sim {
    let mut c = Cluster::new(1, n, move |b| RingHost::new(&b, sabotage));
    c.start_all();
    await_ring(&mut c, &(1..=n).collect::<Vec<_>>(), ms(5000));
    c
}

fn members(c: &Sim, node: u16) -> Vec<u16> {
    c.host(NodeId(node)).map_or(Vec::new(), |h| h.ring.members().iter().map(|m| m.node.0).collect())
}

fn is_ring(c: &Sim, nodes: &[u16]) -> bool {
    let first = c.host(NodeId(nodes[0])).map(|h| h.ring.ring());
    nodes.iter().all(|&n| {
        let h = c.host(NodeId(n)).expect("alive");
        h.ring.state() == State::Operational && Some(h.ring.ring()) == first && members(c, n) == nodes
    })
}

/// Virtual time until these nodes are one ring.
fn await_ring(c: &mut Sim, nodes: &[u16], limit: Duration) -> Duration {
    let from = c.now;
    let until = from + limit;
    assert!(c.run_while(until, |c| !is_ring(c, nodes)), "no ring {nodes:?} within {limit:?}");
    c.now.since(from)
}

fn views(c: &Sim, node: u16) -> usize {
    let t = &c.host(NodeId(node)).expect("alive").trace;
    t.events.iter().filter(|e| matches!(e, evs::Event::Regular { .. })).count()
}

fn delivered(c: &Sim, node: u16) -> BTreeSet<u64> {
    let t = &c.host(NodeId(node)).expect("alive").trace;
    let id = |e: &evs::Event| match e {
        evs::Event::Delivered { id, .. } => Some(*id),
        _ => None,
    };
    t.events.iter().filter_map(id).collect()
}

fn has_cause(c: &Sim, node: u16, cause: Cause) -> bool {
    c.host(NodeId(node)).expect("alive").logs.iter().any(|(_, l)| *l == RingLog::Gather { cause })
}

fn how_left(c: &Sim, at: u16, node: u16) -> Option<How> {
    let t = &c.host(NodeId(at)).expect("alive").trace;
    t.events.iter().rev().find_map(|e| match e {
        evs::Event::Regular { left, .. } => left.iter().find(|(p, _)| p.node.0 == node).map(|(_, h)| *h),
        _ => None,
    })
}

fn check(c: &Sim) {
    let alive: BTreeSet<Proc> = c.alive().into_iter().map(|n| c.proc(n)).collect();
    let traces: Vec<evs::Trace> =
        c.dead.iter().map(|h| h.trace.clone()).chain(c.hosts().map(|(_, h)| h.trace.clone())).collect();
    evs::check(&traces, &alive).expect("extended virtual synchrony");
}

#[test]
fn nodes_that_start_together_merge_at_once() {
    let c = sim(5);
    assert!(c.now < Boottime::from_millis(2000), "{:?}", c.now);
    // A ring of one, then the ring of all.
    assert!((1..=5).all(|n| views(&c, n) <= 3), "{}", views(&c, 1));
}

#[test]
fn a_killed_node_is_out_within_two_ret_of_the_hint() {
    for victim in 1..=4u16 {
        for phase in 0..6 {
            let mut c = sim(4);
            c.run(ms(500 + 17 * phase));
            let p = c.proc(NodeId(victim));
            c.crash(NodeId(victim));
            let rest: Vec<u16> = (1..=4).filter(|&n| n != victim).collect();
            c.with(NodeId(rest[1]), |h, _| h.ring.hint_dead(p.node, p.incarnation));
            let took = await_ring(&mut c, &rest, ms(3000));
            assert!(took <= 2 * fast_timers().retransmit, "victim {victim}, phase {phase}: {took:?}");
            assert_eq!(how_left(&c, rest[0], victim), Some(How::Failed));
            check(&c);
        }
    }
}

#[test]
fn a_crash_without_hint_takes_token_and_consensus() {
    for victim in 1..=3u16 {
        let mut c = sim(3);
        c.run(ms(300));
        c.crash(NodeId(victim));
        let rest: Vec<u16> = (1..=3).filter(|&n| n != victim).collect();
        let took = await_ring(&mut c, &rest, ms(10_000));
        assert!(took >= ms(1000) && took <= ms(2522), "{took:?}");
        assert!(rest.iter().any(|&n| has_cause(&c, n, Cause::TokenLostOperational)));
        assert!(rest.iter().any(|&n| has_cause(&c, n, Cause::ConsensusTimeout)));
        check(&c);
    }
}

#[test]
fn lost_tokens_are_sent_again() {
    let mut c = sim(3);
    let left = Rc::new(Cell::new(5));
    let n = left.clone();
    c.filter = Some(Box::new(move |_, _, p| {
        let lose = is_token(p) && n.get() > 0;
        n.set(n.get() - i32::from(lose));
        !lose
    }));
    c.run(ms(3000));
    assert_eq!(left.get(), 0);
    assert!(is_ring(&c, &[1, 2, 3]) && !has_cause(&c, 1, Cause::TokenLostOperational));
    assert!((1..=3).all(|n| views(&c, n) == views(&c, 1)));
}

#[test]
fn everything_doubled_changes_nothing() {
    let mut c = sim(3);
    c.weather = Weather { duplicate: 1000, ..Weather::CALM };
    for id in 1..=50 {
        c.with(NodeId(1 + (id % 3) as u16), |h, _| h.send(id, 24, id % 2 == 0).is_ok());
        c.run(ms(5));
    }
    let p = c.proc(NodeId(3));
    c.crash(NodeId(3));
    c.with(NodeId(2), |h, _| h.ring.hint_dead(p.node, p.incarnation));
    await_ring(&mut c, &[1, 2], ms(3000));
    c.run(ms(500));
    assert_eq!(delivered(&c, 1).len(), 50);
    check(&c);
}

#[test]
fn idle_ring_is_cheap_and_a_message_still_fast() {
    let mut c = sim(3);
    c.run(ms(1000));
    let before = c.packets;
    c.run(ms(10_000));
    let per_second = (c.packets - before) / 10;
    // Beacons of three nodes to two others each, ten times a second, and a token round per hold.
    assert!(per_second < 60 + 3 * 12 + 10, "{per_second} packets a second");
    for node in 1..=3u16 {
        for safe in [false, true] {
            c.run(ms(333));
            let id = u64::from(node) * 2 + u64::from(safe);
            let from = c.now;
            c.with(NodeId(node), |h, _| h.send(id, 100, safe).is_ok());
            let until = from + ms(100);
            let ok = c.run_while(until, |c| !(1..=3).all(|n| delivered(c, n).contains(&id)));
            let took = c.now.since(from);
            assert!(ok && took < ms(3), "node {node} safe {safe}: {took:?}");
        }
    }
    check(&c);
}

#[test]
fn clean_leave_is_quick_and_known_to_all() {
    for leaver in 1..=3u16 {
        let mut c = sim(3);
        c.run(ms(400));
        c.with(NodeId(leaver), |h, _| h.ring.leave(LeaveReason::Removed));
        let rest: Vec<u16> = (1..=3).filter(|&n| n != leaver).collect();
        let took = await_ring(&mut c, &rest, ms(3000));
        assert!(took <= 2 * fast_timers().retransmit, "{took:?}");
        assert!(rest.iter().all(|&n| how_left(&c, n, leaver) == Some(How::Removed)));
        assert!(c.host(NodeId(leaver)).is_none());
        check(&c);
    }
}

#[test]
fn representative_restarts_before_its_loss_is_noticed() {
    let mut c = sim(3);
    for forget in [false, true] {
        c.crash(NodeId(1));
        c.start(NodeId(1), forget);
        await_ring(&mut c, &[1, 2, 3], ms(12_000));
        assert!(matches!(how_left(&c, 2, 1), Some(How::Failed | How::Restarted(_))));
    }
    check(&c);
}

#[test]
fn mass_restart_never_forms_a_ring_id_twice() {
    let mut c = sim(5);
    for _ in 0..4 {
        for n in 2..=5 {
            c.crash(NodeId(n));
        }
        for n in 2..=5 {
            c.start(NodeId(n), true);
        }
        await_ring(&mut c, &[1, 2, 3, 4, 5], ms(20_000));
    }
    check(&c);
}

#[test]
fn a_cut_pair_costs_at_most_two_views_and_heals() {
    for (a, b) in [(1, 2), (2, 3), (4, 1)] {
        let mut c = sim(4);
        c.link(NodeId(a), NodeId(b), false);
        let before: Vec<usize> = (1..=4).map(|n| views(&c, n)).collect();
        c.run(ms(300_000));
        for n in 1..=4u16 {
            let more = views(&c, n) - before[usize::from(n) - 1];
            assert!(more <= 2, "cut {a}-{b}: node {n} saw {more} more views");
            let with: Vec<u16> = members(&c, n);
            assert!(!(with.contains(&a) && with.contains(&b)), "a ring over a cut: {with:?}");
        }
        c.cut.clear();
        await_ring(&mut c, &[1, 2, 3, 4], ms(10_000));
        check(&c);
    }
}

/// The token does not pass between 1 and 3, and what they miss of each other others have: no reason to break.
/// Offset of a message's bytes in an MCAST packet.
const BODY: usize = 72;

fn carries(p: &[u8], id: u64) -> bool {
    p[0] == MCAST && p.len() >= BODY + 8 && p[BODY - 16] == 0 && p[BODY..BODY + 8] == id.to_le_bytes()
}

fn verdict(c: &Sim) -> Result<(), String> {
    let traces: Vec<evs::Trace> =
        c.dead.iter().map(|h| h.trace.clone()).chain(c.hosts().map(|(_, h)| h.trace.clone())).collect();
    let alive: BTreeSet<Proc> = c.alive().into_iter().map(|n| c.proc(n)).collect();
    evs::check(&traces, &alive)
}

/// Node 4 dies with its first message, which nobody else has; the second is everywhere.
fn die_with_a_message(sabotage: Sabotage) -> Sim {
    let mut c = sim_with(4, sabotage);
    c.filter = Some(Box::new(|_, _, p| !carries(p, 1)));
    c.with(NodeId(4), |h, _| [1, 2].map(|id| h.send(id, 24, false).is_ok()));
    c.with(NodeId(2), |h, _| h.send(3, 24, false).is_ok());
    c.run(ms(60));
    let p = c.proc(NodeId(4));
    c.crash(NodeId(4));
    c.with(NodeId(2), |h, _| h.ring.hint_dead(p.node, p.incarnation));
    await_ring(&mut c, &[1, 2, 3], ms(3000));
    c.run(ms(200));
    c
}

#[test]
fn nothing_of_the_dead_is_delivered_above_a_gap() {
    let c = die_with_a_message(Sabotage::default());
    for n in 1..=3 {
        assert_eq!(delivered(&c, n), [3].into(), "the survivors' messages only");
    }
    verdict(&c).expect("extended virtual synchrony");
    let broken = Sabotage { deliver_everything_after_gap: true, ..Sabotage::default() };
    let error = verdict(&die_with_a_message(broken)).expect_err("the checker must notice");
    assert!(error.starts_with("EVS7"), "{error}");
}

/// A message of the dead node reaches one survivor after it has told the others what it has.
fn late_message_in_recovery(sabotage: Sabotage) -> Sim {
    let tape: Rc<RefCell<Option<Vec<u8>>>> = Rc::default();
    let mut c = sim_with(4, sabotage);
    let rec = tape.clone();
    c.filter = Some(Box::new(move |_, _, p| {
        let ours = carries(p, 1);
        if ours {
            *rec.borrow_mut() = Some(p.to_vec());
        }
        !ours
    }));
    c.with(NodeId(4), |h, _| h.send(1, 24, false).is_ok());
    c.run(ms(20));
    c.with(NodeId(2), |h, _| h.send(3, 24, false).is_ok());
    c.run(ms(60));
    let (p, cookie) = (c.proc(NodeId(4)), c.cookie(NodeId(4)));
    c.crash(NodeId(4));
    c.with(NodeId(2), |h, _| h.ring.hint_dead(p.node, p.incarnation));
    let until = c.now + ms(3000);
    let told = |c: &Sim| c.host(NodeId(2)).is_some_and(|h| h.ring.state() == State::Recovery);
    assert!(c.run_while(until, |c| !told(c)));
    let packet = Bytes::from(tape.borrow().clone().expect("it was sent"));
    c.input(NodeId(2), EngineInput::Frame { from: p, cookie, packet });
    await_ring(&mut c, &[1, 2, 3], ms(3000));
    c.run(ms(200));
    c
}

#[test]
fn nothing_is_taken_in_after_the_commit_was_answered() {
    let c = late_message_in_recovery(Sabotage::default());
    assert!((1..=3).all(|n| delivered(&c, n) == [3].into()));
    verdict(&c).expect("extended virtual synchrony");
    let broken = Sabotage { no_freeze: true, ..Sabotage::default() };
    let error = verdict(&late_message_in_recovery(broken)).expect_err("the checker must notice");
    assert!(error.starts_with("EVS5"), "{error}");
}

#[test]
fn a_cut_off_the_path_of_the_token_breaks_nothing() {
    let mut c = sim(4);
    c.link(NodeId(1), NodeId(3), false);
    let before = views(&c, 2);
    for id in 1..=20 {
        c.with(NodeId(1 + (id % 4) as u16), |h, _| h.send(id, 24, id % 2 == 0).is_ok());
        c.run(ms(100));
    }
    c.run(ms(1000));
    assert!((1..=4).all(|n| delivered(&c, n).len() == 20) && views(&c, 2) == before);
    check(&c);
}

#[test]
fn one_way_cuts_cost_at_most_two_views_and_heal() {
    for out in [false, true] {
        let mut c = sim(3);
        for n in 1..=2 {
            c.cut.insert(if out { (NodeId(3), NodeId(n)) } else { (NodeId(n), NodeId(3)) });
        }
        let before: Vec<usize> = (1..=3).map(|n| views(&c, n)).collect();
        c.run(ms(300_000));
        assert!(is_ring(&c, &[1, 2]) && is_ring(&c, &[3]));
        assert!((1..=3).all(|n| views(&c, n) - before[usize::from(n) - 1] <= 2));
        c.cut.clear();
        await_ring(&mut c, &[1, 2, 3], ms(10_000));
        check(&c);
    }
}

#[test]
fn three_islands_merge_when_the_sea_is_gone() {
    let mut c = sim(3);
    c.partition(|n| u64::from(n.0));
    c.run(ms(20_000));
    assert!((1..=3).all(|n| is_ring(&c, &[n])));
    c.cut.clear();
    await_ring(&mut c, &[1, 2, 3], ms(5000));
    check(&c);
}

#[test]
fn a_flapping_node_is_damped() {
    assert!(views_of_flaps(Sabotage::default()) <= 12);
    assert!(views_of_flaps(Sabotage { no_hold_down: true, ..Sabotage::default() }) > 20);
}

fn views_of_flaps(sabotage: Sabotage) -> usize {
    let mut c = sim_with(3, sabotage);
    let before = views(&c, 1);
    // Away for longer than token and consensus each time, so that every flap costs a view while it is taken back.
    for i in 0..30 {
        let up = i % 2 == 1;
        c.link(NodeId(1), NodeId(3), up);
        c.link(NodeId(2), NodeId(3), up);
        c.run(ms(4000));
    }
    let more = views(&c, 1) - before;
    println!("{more} views in fifteen flaps");
    c.cut.clear();
    await_ring(&mut c, &[1, 2, 3], ms(70_000));
    check(&c);
    more
}

#[test]
fn short_pauses_change_nothing_long_ones_one_view_each_way() {
    let mut c = sim(3);
    let before = views(&c, 1);
    for n in 1..=3 {
        c.pause(NodeId(n), ms(400));
        c.run(ms(1500));
    }
    assert!(is_ring(&c, &[1, 2, 3]) && views(&c, 1) == before);
    c.pause(NodeId(1), ms(6000));
    await_ring(&mut c, &[2, 3], ms(4000));
    assert!(members(&c, 1).len() == 3, "it sleeps and knows nothing");
    await_ring(&mut c, &[1, 2, 3], ms(15_000));
    assert!(views(&c, 2) <= before + 2);
    check(&c);
}

#[test]
fn a_node_that_does_not_receive_leaves_alone() {
    let mut c = sim(4);
    c.filter = Some(Box::new(|_, to, p| !(to == NodeId(3) && p.first() == Some(&MCAST))));
    for id in 1..=5 {
        c.with(NodeId(1), |h, _| h.send(id, 24, true).is_ok());
    }
    let took = await_ring(&mut c, &[1, 2, 4], ms(6000));
    println!("out after {took:?}");
    assert!(has_cause(&c, 3, Cause::FailedToReceive) || has_cause(&c, 1, Cause::JoinNews));
    c.run(ms(500));
    assert_eq!(delivered(&c, 4).len(), 5);
    c.filter = None;
    await_ring(&mut c, &[1, 2, 3, 4], ms(70_000));
    check(&c);
}

#[test]
fn a_safe_message_waits_until_everybody_has_it() {
    let mut c = sim(3);
    c.filter = Some(Box::new(|_, to, p| !(to == NodeId(3) && p.first() == Some(&MCAST))));
    c.with(NodeId(1), |h, _| h.send(1, 24, false).is_ok());
    c.with(NodeId(1), |h, _| h.send(2, 24, true).is_ok());
    c.run(ms(200));
    assert_eq!((delivered(&c, 2).len(), delivered(&c, 3).len()), (1, 0), "agreed yes, safe not yet");
    c.filter = None;
    c.run(ms(300));
    assert!((1..=3).all(|n| delivered(&c, n).len() == 2));
    check(&c);
}

#[test]
fn a_message_of_a_mebibyte_arrives_and_full_queues_say_so() {
    let mut c = sim(3);
    let max = c.host(NodeId(1)).expect("alive").ring.max_message();
    c.with(NodeId(1), |h, _| h.send(1, max, false)).expect("alive").expect("fits");
    let too_long = c.with(NodeId(1), |h, _| h.send(2, max + 1, false)).expect("alive");
    assert_eq!(too_long, Err(SendError::TooLong { len: max + 1, max }));
    let mut id = 10;
    while c.host(NodeId(1)).is_some() {
        id += 1;
        // Without letting the ring work in between.
        let full = c.with(NodeId(2), |h, _| {
            while h.send(id, 100_000, false).is_ok() {
                id += 1;
            }
            h.send(id, 100_000, false)
        });
        if full == Some(Err(SendError::WouldBlock)) {
            break;
        }
    }
    let until = c.now + ms(60_000);
    assert!(c.run_while(until, |c| !(1..=3).all(|n| delivered(c, n).len() as u64 == id - 10)));
    check(&c);
}

#[test]
fn frames_of_an_earlier_life_move_nothing() {
    // Record a whole life of nodes 2 and 3.
    let tape: Rc<RefCell<Vec<(NodeId, Vec<u8>)>>> = Rc::default();
    let rec = tape.clone();
    let mut c = Cluster::new(5, 3, |b: Birth| RingHost::new(&b, Sabotage::default()));
    c.filter = Some(Box::new(move |from, to, p| {
        if to == NodeId(1) {
            rec.borrow_mut().push((from, p.to_vec()));
        }
        true
    }));
    c.start_all();
    await_ring(&mut c, &[1, 2, 3], ms(5000));
    c.run(ms(500));
    // A fresh node 1 hears only the recording.
    let birth = Birth {
        me: Proc { node: NodeId(1), incarnation: Incarnation(2) },
        cookie: 77,
        nodes: c.node_ids(),
        ring_seq: 0,
        now: Boottime::ZERO,
    };
    let mut ring = Ring::new(RingHost::config(&birth), Boottime::ZERO);
    let mut out = Vec::new();
    ring.step(Boottime::ZERO, EngineInput::Tick, &mut out);
    let mine = ring.ring();
    for (i, (from, packet)) in tape.borrow().iter().enumerate() {
        let now = Boottime::from_millis(i as u64);
        let from = Proc { node: *from, incarnation: Incarnation(1) };
        let packet = Bytes::from(packet.clone());
        ring.step(now, EngineInput::Frame { from, cookie: 1234, packet }, &mut out);
        ring.step(now, EngineInput::Tick, &mut out);
    }
    assert_eq!((ring.ring(), ring.state(), ring.members().len()), (mine, State::Operational, 1));
    let regular = out.iter().filter(|o| matches!(o, EngineOutput::Regular { .. })).count();
    assert_eq!(regular, 1, "only its own ring of one");
    assert!(ring.stats().unconfirmed > 0);
}

#[test]
fn user_messages_wait_for_the_barrier() {
    let birth = Birth {
        me: Proc { node: NodeId(1), incarnation: Incarnation(1) },
        cookie: 7,
        nodes: vec![NodeId(1)],
        ring_seq: 0,
        now: Boottime::ZERO,
    };
    let mut ring = Ring::new(RingHost::config(&birth), Boottime::ZERO);
    let mut out = Vec::new();
    ring.send(Lane::User, Guarantee::Agreed, Bytes::from_static(b"user")).expect("room");
    ring.send(Lane::Control, Guarantee::Agreed, Bytes::from_static(b"control")).expect("room");
    ring.step(Boottime::ZERO, EngineInput::Tick, &mut out);
    let got = |out: &[EngineOutput]| -> Vec<Lane> {
        out.iter()
            .filter_map(|o| if let EngineOutput::Deliver { lane, .. } = o { Some(*lane) } else { None })
            .collect()
    };
    assert_eq!(got(&out), [Lane::Control]);
    let ring_id = ring.ring();
    ring.open_users(membership::event::RingId { seq: 1, ..ring_id });
    ring.step(Boottime::ZERO, EngineInput::Tick, &mut out);
    assert_eq!(got(&out), [Lane::Control], "another ring's barrier");
    ring.open_users(ring_id);
    ring.step(Boottime::ZERO, EngineInput::Tick, &mut out);
    assert_eq!(got(&out), [Lane::Control, Lane::User]);
}

/// Views seen by all nodes under a random set of one-way cuts, how many live alone in the end, and whether all
/// rings are cliques that stay.
fn under_random_cuts(seed: u64) -> (usize, usize, bool) {
    let mut rng = cairn_base::Rng::new(seed);
    let mut c = sim(5);
    c.budget = c.packets + 500_000;
    let before: usize = (1..=5).map(|n| views(&c, n)).sum();
    for _ in 0..2 + rng.below(6) {
        let (a, b) = (1 + rng.below(5) as u16, 1 + rng.below(5) as u16);
        c.cut.insert((NodeId(a), NodeId(b)));
    }
    c.run(ms(40_000));
    let then: usize = (1..=5).map(|n| views(&c, n)).sum();
    c.run(ms(60_000));
    let more: usize = (1..=5).map(|n| views(&c, n)).sum();
    let alone = (1..=5).filter(|&n| members(&c, n).len() == 1).count();
    (more - before, alone, more == then && (1..=5).all(|n| is_ring(&c, &members(&c, n))))
}

#[test]
fn partial_cuts_settle_in_stable_rings() {
    let (mut views, mut alone) = (0, 0);
    for seed in 1..=60 {
        let (v, a, stable) = under_random_cuts(seed);
        assert!(stable, "seed {seed}: {v} views, {a} alone");
        // Up to seven cuts at once.
        assert!(v <= 6 * 5, "seed {seed}: {v} views of five nodes");
        views += v;
        alone += a;
    }
    println!("60 cut graphs: {views} views of five nodes each, {alone} nodes alone");
}
