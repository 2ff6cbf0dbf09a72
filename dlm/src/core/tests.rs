//! What a founder of a lock space knows, and what it may say.

use super::{Action, Config, Core, CoreView, Event};
use crate::msg::Msg;
use crate::name::ResName;
use crate::types::{Flags, Mode};
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
