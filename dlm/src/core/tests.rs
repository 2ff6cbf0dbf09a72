//! What a founder of a lock space knows, and what it may say.

use super::{Action, Config, Core, CoreView, Event};
use crate::msg::{Msg, TreeOp};
use crate::name::ResName;
use crate::types::{Flags, LockId, Mode};
use cairn_base::{Boottime, Incarnation, NodeId, Proc, ViewId};

fn node(n: u16) -> Proc {
    Proc { node: NodeId(n), incarnation: Incarnation(1) }
}

/// Returns the end marker that the view makes the member send: fresh, gates.
fn view(core: &mut Core, id: u64, members: &[u16]) -> Option<(bool, Vec<(Proc, bool)>)> {
    let mut out = Vec::new();
    let members = members.iter().map(|n| node(*n)).collect();
    let view = CoreView { id: ViewId(id), members, left_clean: Vec::new() };
    core.step(Boottime::ZERO, Event::View(view), &mut out).expect("views rise");
    out.into_iter().find_map(|a| match a {
        Action::Send { msg: Msg::SyncEnd { fresh, gates }, .. } => Some((fresh, gates)),
        _ => None,
    })
}

fn say(core: &mut Core, from: u16, view: u64, msg: Msg) {
    core.step(Boottime::ZERO, Event::Msg { from: node(from), view: ViewId(view), msg }, &mut Vec::new())
        .expect("messages are taken");
}

/// Two founders wait for the fence of a third, which was only missed: it comes back, with its locks and a gate.
#[test]
fn founders_that_have_not_begun_open_no_gate_of_one_with_state() {
    let mut core = Core::new(Config::new(node(1)));
    view(&mut core, 1, &[1, 2]);
    say(&mut core, 2, 1, Msg::SyncEnd { fresh: true, gates: Vec::new() });
    assert!(core.settled() && core.founder());
    let (fresh, gates) = view(&mut core, 5, &[1, 2, 3]).expect("a marker for the others");
    assert!(fresh && gates.is_empty());
    say(&mut core, 2, 5, Msg::SyncEnd { fresh: true, gates: Vec::new() });
    say(&mut core, 3, 5, Msg::SyncEnd { fresh: false, gates: vec![(node(9), true)] });
    assert_eq!(core.gates().collect::<Vec<_>>(), [(node(9), true)]);
    assert!(core.settled() && !core.founder(), "there is somebody who knows");
    let (fresh, gates) = view(&mut core, 6, &[1, 2, 3]).expect("a marker for the others");
    assert!(!fresh && gates == [(node(9), true)]);
}

#[test]
fn a_founder_that_has_begun_has_state() {
    let mut core = Core::new(Config::new(node(1)));
    view(&mut core, 1, &[1]);
    assert!(core.founder());
    let name = ResName::root_of(b"r").expect("a short name");
    core.request(Boottime::ZERO, &name, Mode::EX, Flags::NONE, 0, None, &mut Vec::new()).expect("a request");
    let (fresh, _) = view(&mut core, 2, &[1, 2]).expect("a marker for the other");
    assert!(!fresh);
}

/// The proof is told before the view that shows the loss: what goes with the fence goes with that view, the rest waits for the replay.
#[test]
fn a_fence_before_the_view_frees_what_goes_with_it() {
    let mut core = Core::new(Config::new(node(1)));
    view(&mut core, 1, &[1, 2]);
    say(&mut core, 2, 1, Msg::SyncEnd { fresh: true, gates: Vec::new() });
    let names = [&b"mount"[..], b"data"].map(|n| ResName::root_of(n).expect("a short name"));
    let ask = |core: &mut Core, name: &ResName, flags| {
        let mut out = Vec::new();
        let lock = core.request(Boottime::ZERO, name, Mode::EX, flags, 0, None, &mut out).expect("a request");
        (lock, out.iter().any(|a| matches!(a, Action::Complete(c) if c.mode == Some(Mode::EX))))
    };
    // both are mastered here, granted to node 2, wanted by us
    let mut mine = Vec::new();
    for (at, name) in names.iter().enumerate() {
        let flags = if at == 0 { Flags::RELEASE_AT_FENCE } else { Flags::NONE };
        let (lock, granted) = ask(&mut core, name, flags);
        assert!(granted, "{name}");
        core.unlock(Boottime::ZERO, lock, Flags::NONE, None, &mut Vec::new()).expect("an unlock");
        let tree = core.by_root[name] as usize;
        let term = core.trees[tree].term;
        let id = LockId(at as u64);
        let op = TreeOp::Request { id, op: 1, mode: Mode::EX, flags, order: 5 + at as u64 };
        say(&mut core, 2, 1, Msg::Op { name: name.clone(), term, op });
        let (lock, granted) = ask(&mut core, name, flags);
        assert!(!granted, "node 2 holds {name}");
        mine.push(lock);
    }
    core.step(Boottime::ZERO, Event::Fenced(node(2)), &mut Vec::new()).expect("a fence");
    let mut out = Vec::new();
    let lost = CoreView { id: ViewId(2), members: vec![node(1)], left_clean: Vec::new() };
    core.step(Boottime::ZERO, Event::View(lost), &mut out).expect("views rise");
    let done = |out: &[Action]| -> Vec<LockId> {
        out.iter().filter_map(|a| if let Action::Complete(c) = a { Some(c.lock) } else { None }).collect()
    };
    assert_eq!(done(&out), [mine[0]]);
    let mut out = Vec::new();
    core.step(Boottime::ZERO, Event::Recovered { who: node(2), spread: false }, &mut out).expect("a replay");
    assert_eq!(done(&out), [mine[1]]);
}
