use super::members::{Action, Dead, Members, Note, Peer};
use crate::JournalId;
use cairn_base::{Incarnation, NodeId, Proc};
use membership::ipc::Scope;

fn node(n: u16, life: u64) -> Proc {
    Proc { node: NodeId(n), incarnation: Incarnation(life) }
}

fn peer(n: u16, life: u64, client: u32, mount: u64) -> Peer {
    Peer {
        node: node(n, life),
        client,
        who: node(n, mount),
        address: format!("127.0.0.{n}:1").parse().unwrap(),
    }
}

/// Node 1 is us (mount 100), mounted on journal 0; node 2 (mount 200) uses journal 1.
fn two() -> Members {
    let mut m = Members::new(node(1, 100));
    m.quorate(true);
    m.view(1, vec![peer(1, 5, 1, 100)], &[]);
    m.set_own_journal(Some(JournalId(0)));
    m.view(2, vec![peer(1, 5, 1, 100), peer(2, 6, 3, 200)], &[]);
    m.note(node(2, 6), 3, Note::Journal { jid: Some(1) });
    m
}

#[test]
fn a_death_is_recovered_after_its_fence_and_not_before() {
    let mut m = two();
    let out = m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    assert!(!out.iter().any(|a| matches!(a, Action::Recover(_))), "{out:?}");
    assert!(!m.is_settled());
    // A note that comes before the fence opens nothing.
    assert!(m.note(node(1, 5), 1, Note::Recovered { node: 2, incarnation: 200 }).is_empty());
    // The fence of another life is not ours.
    assert!(m.fenced(node(2, 5), &Scope::Node).is_empty());
    let dead = Dead { who: node(2, 200), jid: Some(JournalId(1)) };
    assert_eq!(m.fenced(node(2, 6), &Scope::Node), [Action::LockFenced(node(2, 200)), Action::Recover(dead)]);
    assert!(m.needs_recovery(node(2, 200)));
    assert_eq!(
        m.note(node(1, 5), 1, Note::Recovered { node: 2, incarnation: 200 }),
        [Action::LockRecovered(node(2, 200))]
    );
    assert!(m.is_settled());
}

#[test]
fn a_clean_leave_needs_no_fence() {
    let mut m = two();
    let out = m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, true)]);
    assert!(matches!(&out[..], [Action::LockView { left_clean, .. }] if left_clean == &[node(2, 200)]));
    assert!(m.is_settled());
}

#[test]
fn the_lock_manager_sees_quorate_views_only_and_misses_no_clean_leave() {
    let mut m = two();
    assert_eq!(m.quorate(false), [Action::Suspend]);
    assert!(m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, true)]).is_empty());
    assert!(
        m.view(4, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[])
            .iter()
            .all(|a| !matches!(a, Action::LockView { .. }))
    );
    let out = m.quorate(true);
    assert!(
        matches!(&out[..], [Action::LockView { view: 4, left_clean, members }, Action::Resume]
            if left_clean == &[node(2, 200)] && members.len() == 2),
        "{out:?}"
    );
}

/// A side without quorum misses the others for a while; they come back alive and were never fenced.
#[test]
fn who_was_missed_without_quorum_only_is_no_loss() {
    let mut m = two();
    m.quorate(false);
    assert!(m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]).is_empty());
    assert!(!m.is_settled());
    m.view(4, vec![peer(1, 5, 1, 100), peer(2, 6, 3, 200)], &[]);
    let out = m.quorate(true);
    assert!(
        matches!(&out[..], [Action::LockView { view: 4, members, .. }, Action::Resume] if members.len() == 2),
        "{out:?}"
    );
    assert!(m.is_settled());
    assert_eq!(m.journals_in_use(), [JournalId(1), JournalId(0)]);
}

/// A mount comes and is lost and fenced while we have no quorum: the lock manager has no gate for it before it is given the view.
#[test]
fn the_lock_manager_is_told_of_a_fence_behind_the_view_that_shows_the_loss() {
    let mut m = two();
    m.quorate(false);
    m.fenced(node(2, 6), &Scope::Node);
    let out = m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    assert!(!out.iter().any(|a| matches!(a, Action::LockView { .. })));
    let out = m.quorate(true);
    assert!(
        matches!(&out[..], [Action::LockView { view: 3, .. }, Action::LockFenced(who), Action::Resume] if *who == node(2, 200)),
        "{out:?}"
    );
}

/// A mount that a quorate view has lost wakes up before its fence: it is kept out until the fence, and recovered as every other.
#[test]
fn a_ghost_stays_out() {
    let mut m = two();
    m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    let out = m.view(4, vec![peer(1, 5, 1, 100), peer(2, 6, 3, 200)], &[]);
    assert!(
        matches!(&out[0], Action::LockView { members, .. } if *members == [(node(1, 100), peer(1, 5, 1, 100).address)]),
        "{out:?}"
    );
    assert!(m.fenced(node(2, 6), &Scope::Node).len() == 2);
    m.view(5, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    m.note(node(1, 5), 1, Note::Recovered { node: 2, incarnation: 200 });
    assert!(m.is_settled());
}

/// The fence comes between the sending of the note and its delivery to the joiner.
#[test]
fn a_joiner_misses_no_fence() {
    let mut old = two();
    old.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    let out = old.view(4, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    let mut joiner = Members::new(node(3, 300));
    joiner.quorate(true);
    joiner.view(4, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    assert!(joiner.fenced(node(2, 6), &Scope::Node).is_empty());
    let notes = out.into_iter().filter_map(|a| if let Action::Say(n) = a { Some(n) } else { None });
    let out: Vec<Action> = notes.flat_map(|n| joiner.note(node(1, 5), 1, n)).collect();
    assert_eq!(out, [Action::LockFenced(node(2, 200))]);
}

/// Two notes, before and behind the fence, to a joiner whose daemon was not there when the proof was told.
#[test]
fn a_note_carries_the_proof() {
    let mut old = two();
    old.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    let all = vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)];
    let note = |m: &mut Members, view| {
        let lost = |a| if let Action::Say(n @ Note::Lost { .. }) = a { Some(n) } else { None };
        let out = m.view(view, all.clone(), &[]);
        m.view(view + 1, vec![peer(1, 5, 1, 100)], &[(node(3, 9), 1, true)]);
        out.into_iter().find_map(lost).unwrap()
    };
    let before = note(&mut old, 4);
    old.fenced(node(2, 6), &Scope::Node);
    let behind = note(&mut old, 6);
    let mut joiner = Members::new(node(3, 300));
    joiner.quorate(true);
    joiner.view(6, all.clone(), &[]);
    assert!(joiner.note(node(1, 5), 1, before).is_empty());
    assert_eq!(joiner.note(node(1, 5), 1, behind.clone()), [Action::LockFenced(node(2, 200))]);
    assert!(joiner.note(node(1, 5), 1, behind).is_empty(), "once");
    let recovered = Note::Recovered { node: 2, incarnation: 200 };
    assert_eq!(joiner.note(node(1, 5), 1, recovered), [Action::LockRecovered(node(2, 200))]);
    assert!(joiner.is_settled());
}

/// One member says to a joiner what it misses while the recovery that another has said is on its way to both.
#[test]
fn a_late_note_brings_no_recovered_mount_back() {
    let mut old = two();
    old.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    old.fenced(node(2, 6), &Scope::Node);
    let all = vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)];
    let out = old.view(4, all.clone(), &[]);
    let mut joiner = Members::new(node(3, 300));
    joiner.quorate(true);
    joiner.view(4, all, &[]);
    let recovered = Note::Recovered { node: 2, incarnation: 200 };
    assert_eq!(old.note(node(4, 1), 1, recovered.clone()), [Action::LockRecovered(node(2, 200))]);
    assert!(joiner.note(node(4, 1), 1, recovered).is_empty());
    let late = |a| if let Action::Say(n @ Note::Lost { .. }) = a { Some(n) } else { None };
    let late = out.into_iter().find_map(late).unwrap();
    let again = Action::Say(Note::Recovered { node: 2, incarnation: 200 });
    for m in [&mut old, &mut joiner] {
        assert_eq!(m.note(node(1, 5), 1, late.clone()), [again.clone()]);
        assert!(m.is_settled(), "{:?}", m.waiting());
    }
    // one that joined behind the recovery knows nothing of it, and is told
    let mut later = Members::new(node(6, 600));
    later.quorate(true);
    later.fenced(node(2, 6), &Scope::Node);
    later.view(5, vec![peer(1, 5, 1, 100), peer(6, 1, 1, 600)], &[]);
    later.note(node(1, 5), 1, late);
    assert!(!later.is_settled());
    later.note(node(3, 9), 1, Note::Recovered { node: 2, incarnation: 200 });
    assert!(later.is_settled());
}

/// Whoever knew the dead told our lock manager, and died before it told us.
#[test]
fn the_dead_of_the_lock_manager_that_nobody_speaks_of_are_recovered() {
    let mut m = Members::new(node(3, 300));
    m.quorate(true);
    m.view(1, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    m.view(2, vec![peer(3, 9, 1, 300)], &[(node(1, 5), 1, false)]);
    m.fenced(node(1, 5), &Scope::Node);
    let out = m.adopt([(node(1, 100), true), (node(2, 200), false)].into_iter());
    assert_eq!(out[0], Action::LockFenced(node(2, 200)));
    assert!(matches!(&out[1..], [Action::Say(Note::Lost { list })] if list.len() == 2), "{out:?}");
    assert!(m.adopt([(node(2, 200), true)].into_iter()).is_empty(), "once");
    let (_, dead) = m.set_own_journal(Some(JournalId(2)));
    let dead: Vec<Proc> = dead.iter().map(|d| d.who).collect();
    assert_eq!(dead, [node(1, 100), node(2, 200)]);
    assert_eq!(m.journals_of(Dead { who: node(2, 200), jid: None }, 4).len(), 3, "all but our own");
}

/// A daemon tells a late mount the last proof of each node only.
#[test]
fn the_proof_of_a_later_life_answers_for_the_earlier_ones() {
    let mut m = two();
    assert!(m.fenced(node(2, 7), &Scope::Node).is_empty());
    let out = m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    assert!(out.contains(&Action::LockFenced(node(2, 200))), "{out:?}");
    // not the other way round, and not for another mount
    let mut m = two();
    m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    assert!(m.fenced(node(2, 5), &Scope::Node).is_empty());
    assert!(m.fenced(node(2, 7), &Scope::Mount { client: 3, fs: "vol".into() }).is_empty());
}

#[test]
fn a_joiner_learns_who_is_not_recovered() {
    let mut old = two();
    old.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    let out = old.view(4, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    let notes: Vec<Note> =
        out.into_iter().filter_map(|a| if let Action::Say(n) = a { Some(n) } else { None }).collect();
    assert_eq!(notes.len(), 2, "journal and losses: {notes:?}");
    let mut joiner = Members::new(node(3, 300));
    joiner.quorate(true);
    joiner.view(4, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    for n in notes {
        joiner.note(node(1, 5), 1, n);
    }
    assert!(!joiner.is_settled());
    assert_eq!(joiner.journals_in_use(), [JournalId(0)]);
    // Fenced before it has mounted: recovered by others, or by itself after its mount.
    assert_eq!(joiner.fenced(node(2, 6), &Scope::Node), [Action::LockFenced(node(2, 200))]);
    let (_, dead) = joiner.set_own_journal(Some(JournalId(2)));
    assert_eq!(dead, [Dead { who: node(2, 200), jid: Some(JournalId(1)) }]);
}

#[test]
fn only_the_named_mount_of_a_living_node_is_fenced() {
    let mut m = two();
    m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    assert!(m.fenced(node(2, 6), &Scope::Mount { client: 4, fs: "vol".into() }).is_empty());
    assert_eq!(m.fenced(node(2, 6), &Scope::Mount { client: 3, fs: "vol".into() }).len(), 2);
}

#[test]
fn a_journal_that_a_new_mount_found_clean_is_not_waited_for() {
    let mut m = two();
    m.view(3, vec![peer(1, 5, 1, 100)], &[(node(2, 6), 3, false)]);
    m.fenced(node(2, 6), &Scope::Node);
    let dead = Dead { who: node(2, 200), jid: Some(JournalId(1)) };
    assert_eq!(m.journals_of(dead, 4), [JournalId(1)]);
    // the next mount of node 2 takes the journal before anybody has looked at it
    m.view(4, vec![peer(1, 5, 1, 100), peer(2, 7, 1, 201)], &[]);
    m.note(node(2, 7), 1, Note::Journal { jid: Some(1) });
    assert!(m.journals_of(dead, 4).is_empty(), "its lock is not to be had any more");
    assert_eq!(m.journals_of(Dead { jid: None, ..dead }, 4), [JournalId(2), JournalId(3)]);
}

#[test]
fn only_who_has_mounted_leads() {
    let mut m = Members::new(node(3, 300));
    m.quorate(true);
    m.view(1, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    assert!(!m.is_led(), "a member that has not mounted may be waiting for a fence itself");
    m.note(node(1, 5), 1, Note::Journal { jid: Some(0) });
    assert!(m.is_led());
    m.view(2, vec![peer(3, 9, 1, 300)], &[(node(1, 5), 1, false)]);
    assert!(!m.is_led());
}

/// The gate that our lock manager was told of may be that of a mount that is lost and lives; who knows says so before it says what it is itself.
#[test]
fn nothing_is_taken_for_dead_before_all_who_are_here_have_spoken() {
    let (mounted, other) = (peer(1, 5, 1, 100), peer(2, 6, 1, 200));
    let mut m = Members::new(node(3, 300));
    m.quorate(true);
    let said = m.view(1, vec![mounted.clone(), other.clone(), peer(3, 9, 1, 300)], &[]);
    assert!(said.contains(&Action::Say(Note::Waiting)), "we are new to them as they are to us: {said:?}");
    assert!(m.is_current() && !m.is_informed());
    m.note(node(2, 6), 1, Note::Waiting);
    assert!(!m.is_informed() && !m.is_led());
    m.note(node(1, 5), 1, Note::Journal { jid: None });
    assert!(m.is_informed());
    m.view(2, vec![other.clone(), peer(3, 9, 1, 300)], &[(node(1, 5), 1, false)]);
    assert!(m.is_informed(), "of those who are here");
    m.view(3, vec![mounted, other, peer(3, 9, 1, 300)], &[]);
    assert_eq!(
        m.unfenced(),
        [node(1, 100)],
        "given to the lock manager as lost: it stays out until it is fenced"
    );
}

/// Whoever waits until nobody is left to fence must know that the lock manager has seen who came back instead.
#[test]
fn a_view_that_waits_for_quorum_is_not_current() {
    let mut m = Members::new(node(3, 300));
    assert!(!m.is_current(), "no quorum");
    m.quorate(true);
    m.view(1, vec![peer(3, 9, 1, 300)], &[]);
    assert!(m.is_current());
    m.quorate(false);
    m.view(2, vec![peer(1, 5, 1, 100), peer(3, 9, 1, 300)], &[]);
    assert!(!m.is_current());
    m.quorate(true);
    assert!(m.is_current());
}
