//! The node core alone: views are handed to it with what the synchronisation round would have made of its members' states.

use super::*;
use crate::event::{GroupView, Left, Member};
use std::sync::Arc as StdArc;

const CONF: &str = r#"<cluster name="c" config_version="3"><cairn one_host="yes" run_dir="/nonexistent/%n"/>
<quorumd device="file:/x" votes="2"/><clusternodes><clusternode name="n1" nodeid="1"/><clusternode name="n2" nodeid="2"/>
<clusternode name="n3" nodeid="3"/><clusternode name="n4" nodeid="4"/></clusternodes></cluster>"#;

fn proc(node: u16, incarnation: u64) -> Proc {
    Proc { node: NodeId(node), incarnation: Incarnation(incarnation) }
}

fn member(p: Proc) -> Member {
    Member { node: p.node, incarnation: p.incarnation, votes: 1 }
}

fn ring(seq: u64) -> RingId {
    RingId { seq, rep: NodeId(1), rep_incarnation: Incarnation(1) }
}

const T0: Boottime = Boottime::from_millis(1_000_000);

struct Rig {
    core: NodeCore,
    now: Boottime,
    members: Vec<Proc>,
    /// How those leave who leave.
    how: How,
    out: Vec<NodeAction>,
}

impl Rig {
    fn new(conf: &str) -> Self {
        let config = StdArc::new(Config::parse(conf, "test").unwrap());
        let core = NodeCore::new(proc(1, 1), config);
        Self { core, now: T0, members: Vec::new(), how: How::Failed, out: Vec::new() }
    }

    /// A view in which the others know what we know.
    fn view(&mut self, seq: u64, members: &[Proc]) -> Vec<NodeAction> {
        let state = postcard::to_stdvec(&self.core.sync()).unwrap();
        let parts: Vec<_> = members.iter().map(|p| (member(*p), Bytes::from(state.clone()))).collect();
        self.view_of(seq, members, &parts)
    }

    fn view_of(&mut self, seq: u64, members: &[Proc], parts: &[(Member, Bytes)]) -> Vec<NodeAction> {
        let merged = merge(&ring(seq), parts);
        let old = std::mem::replace(&mut self.members, members.to_vec());
        let left = old
            .iter()
            .filter(|p| !members.contains(p))
            .map(|p| Left { member: member(*p), how: self.how, fenced: false })
            .collect();
        let joined = members.iter().filter(|p| !old.contains(p)).map(|p| member(*p)).collect();
        let view = View {
            id: ring(seq),
            seq,
            members: members.iter().map(|p| member(*p)).collect(),
            joined,
            left,
            quorate: false,
        };
        let event = GroupsEvent::View { view, state: merged.state.into() };
        self.core.groups_event(self.now, 0, event, &mut self.out);
        self.settle()
    }

    /// Delivers our own ordered messages until there are none, and returns everything that was done. The others install and record
    /// when we do, and everything written lands at once.
    fn settle(&mut self) -> Vec<NodeAction> {
        let mut done = Vec::new();
        loop {
            let acts = std::mem::take(&mut self.out);
            if acts.is_empty() {
                return done;
            }
            for act in &acts {
                match act {
                    NodeAction::Service { data, safe } => {
                        let all = matches!(
                            postcard::from_bytes(data),
                            Ok(NodeMsg::Installed(_) | NodeMsg::Recorded(_))
                        );
                        let from = if all { self.members.clone() } else { vec![self.core.me] };
                        for p in from {
                            let (from, safe, data) = (member(p), *safe, data.clone());
                            let event = GroupsEvent::Service { service: SERVICE, from, safe, data };
                            self.core.groups_event(self.now, 0, event, &mut self.out);
                        }
                    }
                    NodeAction::RecordView(view) => {
                        self.core.view_recorded(self.now, *view, &mut self.out);
                    }
                    NodeAction::Disk(QdiskCommand::Record(view)) => {
                        self.core.disk_event(self.now, QdiskEvent::Recorded(*view), &mut self.out);
                    }
                    _ => {}
                }
            }
            done.extend(acts);
        }
    }

    fn say(&mut self, from: Proc, msg: &NodeMsg) -> Vec<NodeAction> {
        let data = postcard::to_stdvec(msg).unwrap().into();
        let event = GroupsEvent::Service { service: SERVICE, from: member(from), safe: true, data };
        self.core.groups_event(self.now, 0, event, &mut self.out);
        self.settle()
    }

    fn disk(&mut self, event: QdiskEvent) -> Vec<NodeAction> {
        self.core.disk_event(self.now, event, &mut self.out);
        self.settle()
    }

    fn hold(&mut self, seq: u64, ms: u64) {
        let until = self.now + Duration::from_millis(ms);
        self.disk(QdiskEvent::Renewed { at: self.now });
        self.disk(QdiskEvent::Votes { view: name_of(ring(seq)), until });
    }

    fn quorum(&self) -> (u32, u32, bool) {
        let q = self.core.quorum();
        (q.needed, q.have, q.quorate)
    }

    fn permit(&mut self, token_ms_ago: u64) -> Option<Boottime> {
        let ring = self.core.view.as_ref().map_or_else(RingId::default, |v| v.id);
        self.permit_by(ring, token_ms_ago)
    }

    fn permit_by(&mut self, ring: RingId, token_ms_ago: u64) -> Option<Boottime> {
        let token = self.now - Duration::from_millis(token_ms_ago);
        let until = self.core.permit(self.now, Some((ring, token)), &mut self.out).map(|p| p.0);
        self.settle();
        until
    }
}

fn all(n: u16) -> Vec<Proc> {
    (1..=n).map(|i| proc(i, 1)).collect()
}

#[test]
fn quorum_sinks_with_evicted_nodes_as_in_the_historical_outputs() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    assert_eq!(r.quorum(), (4, 4, true), "four nodes without the disk");
    r.hold(4, 3_000);
    assert_eq!(r.quorum(), (4, 6, true));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    for (seq, left, want) in [(8, 3, (3, 5, true)), (12, 2, (3, 4, true)), (16, 1, (2, 3, true))] {
        r.disk(QdiskEvent::Evicted {
            victim: proc(left + 1, 1),
            by: NodeId(1),
            reason: qdisk::event::KillReason::Silent,
        });
        r.view(seq, &all(left));
        r.hold(seq, 3_000);
        assert_eq!(r.quorum(), want, "{left} left");
        assert_eq!(r.core.expected_votes(), 6, "the displayed expectation stays");
    }
    // the shrunk value counts only while the device is held
    r.disk(QdiskEvent::VotesLost { why: qdisk::VotesWhy::Expired });
    assert_eq!(r.quorum(), (4, 1, false));
}

#[test]
fn a_lease_counts_for_its_view_and_its_time_only() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(3));
    r.hold(8, 3_000);
    assert_eq!(r.quorum(), (4, 3, false), "a lease of another view");
    r.hold(4, 3_000);
    assert_eq!(r.quorum(), (4, 5, true));
    r.now += Duration::from_secs(3);
    let now = r.now;
    r.core.tick(now, &mut r.out);
    assert_eq!(r.quorum(), (4, 3, false), "the lease is over");
}

#[test]
fn the_permit_follows_token_disk_lease_and_quorum() {
    let mut r = Rig::new(CONF);
    assert_eq!(r.permit(0), None, "no view");
    r.view(4, &all(4));
    assert_eq!(r.permit(0), None, "the disk was never renewed");
    r.disk(QdiskEvent::Renewed { at: r.now });
    // P = 7200, S = 3200: the disk ends first
    assert_eq!(r.permit(0), Some(r.now + Duration::from_millis(3_200)));
    r.now += Duration::from_millis(3_200);
    assert_eq!(r.permit(0), None, "SS3");
    r.disk(QdiskEvent::Renewed { at: r.now });
    assert!(r.permit(0).is_some());
    // three nodes are quorate by the device only
    r.view(8, &all(3));
    assert_eq!(r.permit(0), None, "SS1");
    r.hold(8, 700);
    assert_eq!(r.permit(0), Some(r.now + Duration::from_millis(700)), "ends with the lease");
    r.view(12, &all(1));
    assert_eq!(r.permit(0), None);
}

#[test]
fn without_a_token_the_permit_runs_out_by_itself() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let mut r = Rig::new(&conf);
    r.view(4, &all(4));
    assert!(r.permit(0).is_some());
    r.now += Duration::from_secs(7);
    assert!(r.core.permit(r.now, None, &mut Vec::new()).is_some(), "GATHER costs nothing");
    r.now += Duration::from_millis(200);
    let now = r.now;
    let mut out = Vec::new();
    assert_eq!(r.core.permit(now, None, &mut out), None, "SS2");
    assert!(out.contains(&NodeAction::Event(ClusterEvent::PermitWithdrawn { why: StopWhy::NoToken })));
}

/// A busy node forms a ring of its own, and is long in installing its view: the tokens of that ring extend nothing (MB9).
#[test]
fn tokens_of_a_ring_without_a_view_extend_no_permit() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let mut r = Rig::new(&conf);
    r.view(4, &all(4));
    let until = r.permit(0).expect("quorate");
    while r.now + Duration::from_millis(500) < until {
        r.now += Duration::from_millis(500);
        assert_eq!(r.permit_by(ring(8), 0), Some(until));
    }
    r.now = until;
    assert_eq!(r.permit_by(ring(8), 0), None);
    r.view(8, &all(3));
    assert!(r.permit(0).is_some(), "the view is here, and quorate");
}

#[test]
fn a_killed_life_stops_and_never_gets_a_permit_again() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    r.hold(4, 3_000);
    assert!(r.permit(0).is_some());
    let acts = r.say(proc(2, 1), &NodeMsg::Kill(proc(1, 1)));
    assert!(acts.contains(&NodeAction::Stop(StopWhy::Killed)));
    assert_eq!(r.permit(0), None, "SS4");
    let acts = r.say(proc(2, 1), &NodeMsg::Kill(proc(3, 1)));
    assert!(acts.contains(&NodeAction::HintDead(proc(3, 1))));
}

#[test]
fn a_life_that_a_quorate_view_went_on_without_stops_itself() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    // meanwhile the others made us a victim
    let mut other: NodeSync = r.core.sync();
    other.domain.state.victims.insert(proc(1, 1), domain::Cause::Failed);
    let mine: Bytes = postcard::to_stdvec(&r.core.sync()).unwrap().into();
    let theirs: Bytes = postcard::to_stdvec(&other).unwrap().into();
    let parts: Vec<_> = all(4)
        .into_iter()
        .map(|p| (member(p), if p.node.0 == 1 { mine.clone() } else { theirs.clone() }))
        .collect();
    let acts = r.view_of(8, &all(4), &parts);
    assert!(acts.contains(&NodeAction::Stop(StopWhy::Excluded)), "SS5");
}

#[test]
fn view_comes_before_what_happens_in_it_and_a_lost_member_is_fenced() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let mut r = Rig::new(&conf);
    r.view(4, &all(4));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    let acts = r.view(8, &all(3));
    let run = acts.iter().position(|a| *a == NodeAction::RunAgent { victim: proc(4, 1), probe: false });
    let view = acts.iter().position(|a| {
        matches!(a, NodeAction::Event(ClusterEvent::View(v)) if v.quorate && v.left == [(proc(4, 1), Departure::Failed)])
    });
    assert!(view.unwrap() < run.unwrap());
    let now = r.now;
    r.core.agent_done(now, 0, proc(4, 1), Ok(Proof::Exited), &mut r.out);
    let acts = r.settle();
    assert!(acts.iter().any(|a| matches!(
        a,
        NodeAction::Event(ClusterEvent::Fenced { proc: p, scope: Scope::Node, proof: Proof::Exited, .. }) if *p == proc(4, 1)
    )));
    assert!(r.core.domain().state().victims.is_empty());
}

#[test]
fn a_dead_mount_is_told_once_however_often_it_is_said() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    let msg = NodeMsg::MountGone { client: 7, fs: "web".to_owned() };
    let fenced = |acts: Vec<NodeAction>| {
        acts.iter().filter(|a| matches!(a, NodeAction::Event(ClusterEvent::Fenced { .. }))).count()
    };
    assert_eq!(fenced(r.say(proc(2, 1), &msg)), 1);
    assert_eq!(fenced(r.say(proc(2, 1), &msg)), 0);
    assert_eq!(fenced(r.say(proc(3, 1), &msg)), 1, "another node's client");
}

/// A node that slept through its own fence is back for a moment and tells of a mount that ended before.
#[test]
fn the_proof_of_a_node_has_answered_for_its_mounts() {
    let mut r = Rig::new(&CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", ""));
    r.view(4, &all(4));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    r.view(8, &[proc(1, 1), proc(3, 1), proc(4, 1)]);
    let done = DomainMsg::Done { victim: proc(2, 1), proof: Proof::Exited, unix_time: 0 };
    let is_told = |a: &NodeAction| matches!(a, NodeAction::Event(ClusterEvent::Fenced { .. }));
    assert!(r.say(proc(1, 1), &NodeMsg::Domain(done)).iter().any(is_told));
    r.view(12, &all(4));
    let acts = r.say(proc(2, 1), &NodeMsg::MountGone { client: 7, fs: "web".to_owned() });
    assert!(!acts.iter().any(is_told), "{acts:?}");
}

/// Who subscribes after a proof was told hears it all the same, once per dead node and mount.
#[test]
fn a_late_subscriber_hears_the_proofs() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    r.say(proc(2, 1), &NodeMsg::MountGone { client: 7, fs: "web".to_owned() });
    r.view(8, &all(3));
    let done = DomainMsg::Done { victim: proc(4, 1), proof: Proof::Exited, unix_time: 0 };
    let told = |core: &NodeCore| -> Vec<(Proc, Scope)> {
        let events = core.snapshot(T0).into_iter();
        events
            .filter_map(|e| match e {
                ClusterEvent::Fenced { proc, scope, .. } => Some((proc, scope)),
                _ => None,
            })
            .collect()
    };
    let mount = (proc(2, 1), Scope::Mount { client: 7, fs: "web".to_owned() });
    assert_eq!(told(&r.core), [mount.clone()]);
    r.say(proc(2, 1), &NodeMsg::Domain(done));
    assert_eq!(told(&r.core), [(proc(4, 1), Scope::Node), mount]);
}

#[test]
fn an_acknowledgement_needs_quorum_and_a_victim() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let mut r = Rig::new(&conf);
    r.view(4, &all(4));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    let ack = |r: &mut Rig, n| r.core.acknowledge(NodeId(n), "root".to_owned(), 5, &mut r.out);
    assert!(ack(&mut r, 4).unwrap_err().contains("is a member"));
    r.view(8, &all(3));
    assert!(ack(&mut r, 4).is_ok());
    let acts = r.settle();
    assert!(
        acts.iter().any(|a| matches!(
            a,
            NodeAction::Event(ClusterEvent::Fenced { proof: Proof::Override { .. }, .. })
        ))
    );
    assert!(ack(&mut r, 4).is_err(), "not a victim any more");
    r.view(12, &all(2));
    assert!(ack(&mut r, 3).unwrap_err().contains("not quorate"));
}

#[test]
fn an_older_configuration_is_not_served() {
    let mut r = Rig::new(CONF);
    let mut newer = r.core.sync();
    newer.config_version = 9;
    let mine: Bytes = postcard::to_stdvec(&r.core.sync()).unwrap().into();
    let theirs: Bytes = postcard::to_stdvec(&newer).unwrap().into();
    let parts = [(member(proc(1, 1)), mine), (member(proc(2, 1)), theirs)];
    let acts = r.view_of(4, &all(2), &parts);
    assert!(acts.contains(&NodeAction::Stop(StopWhy::Excluded)));
}

/// Of a group that no client of ours can tell from another.
fn group_view(view_no: u64) -> GroupsEvent {
    let group = crate::event::GroupName::new("g").unwrap();
    let view = GroupView { group, view_no, members: Vec::new(), joined: Vec::new(), left: Vec::new() };
    GroupsEvent::GroupView { local: vec![1], view }
}

/// Nothing is decided in a view before all its members have it in their files.
#[test]
fn a_view_is_recorded_before_anything_is_decided_in_it() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let config = StdArc::new(Config::parse(&conf, "test").unwrap());
    let (now, me, ring) = (T0, proc(1, 1), ring(4));
    let mut core = NodeCore::new(me, config);
    let parts: Vec<_> = all(3)
        .into_iter()
        .map(|p| (member(p), Bytes::from(postcard::to_stdvec(&core.sync()).unwrap())))
        .collect();
    let members: Vec<Member> = all(3).into_iter().map(member).collect();
    let view = View {
        id: ring,
        seq: 4,
        joined: members.clone(),
        members: members.into(),
        left: Vec::new(),
        quorate: false,
    };
    let (mut out, state) = (Vec::new(), merge(&ring, &parts).state.into());
    core.groups_event(now, 0, GroupsEvent::View { view, state }, &mut out);
    assert!(core.quorum().quorate);
    let name = name_of(ring);
    let mut said = Vec::new();
    let mut hear = |core: &mut NodeCore, from: Proc, msg: &NodeMsg| -> Vec<NodeAction> {
        let (data, mut out) = (postcard::to_stdvec(msg).unwrap().into(), Vec::new());
        let event = GroupsEvent::Service { service: SERVICE, from: member(from), safe: true, data };
        core.groups_event(now, 0, event, &mut out);
        said.extend(out.iter().filter_map(|a| match a {
            NodeAction::Service { data, .. } => postcard::from_bytes::<NodeMsg>(data).ok(),
            _ => None,
        }));
        out
    };
    let record = NodeAction::RecordView(name);
    for p in all(2) {
        assert!(
            !hear(&mut core, p, &NodeMsg::Installed(name)).contains(&record),
            "not all have installed it"
        );
    }
    assert!(hear(&mut core, proc(3, 1), &NodeMsg::Installed(name)).contains(&record));
    let mut out = Vec::new();
    core.groups_event(now, 0, group_view(4), &mut out);
    assert!(out.is_empty(), "locks would be passed on in it");
    let quorate = |snapshot: &[ClusterEvent]| {
        snapshot.iter().any(|e| matches!(e, ClusterEvent::Quorum { quorate: true, .. }))
    };
    assert!(!quorate(&core.snapshot(now)));
    core.view_recorded(now, name, &mut out);
    for p in all(2) {
        hear(&mut core, p, &NodeMsg::Recorded(name));
    }
    assert!(!core.may_join() && !core.domain().is_recorded());
    let told: Vec<_> = hear(&mut core, proc(3, 1), &NodeMsg::Recorded(name))
        .into_iter()
        .filter(|a| {
            matches!(a, NodeAction::ToClients { .. } | NodeAction::Event(ClusterEvent::Quorum { .. }))
        })
        .collect();
    assert!(
        matches!(
            &told[..],
            [
                NodeAction::ToClients { event: ClusterEvent::GroupView { view_no: 4, .. }, .. },
                NodeAction::Event(ClusterEvent::Quorum { quorate: true, .. })
            ]
        ),
        "the views first: {told:?}"
    );
    assert!(quorate(&core.snapshot(now)));
    assert!(core.domain().is_recorded());
    assert_eq!(said, [NodeMsg::Domain(DomainMsg::Join(me))], "not before");
}

/// Clients that were quorate go on in the view before while the next one is recorded, and hear of it at once when quorum goes.
#[test]
fn what_is_held_until_the_record_is_told_when_quorum_goes() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let mut r = Rig::new(&conf);
    r.view(4, &all(4));
    let now = r.now;
    r.core.ring_broken(&mut r.out);
    r.core.groups_event(now, 0, group_view(9), &mut r.out);
    assert!(r.out.is_empty());
    let goes_on = |e: &ClusterEvent| matches!(e, ClusterEvent::Quorum { quorate: true, .. });
    assert!(r.core.snapshot(now).iter().any(goes_on));
    let acts = r.view(8, &all(2));
    let lost =
        acts.iter().position(|a| matches!(a, NodeAction::Event(ClusterEvent::Quorum { quorate: false, .. })));
    let told = acts.iter().position(|a| {
        matches!(a, NodeAction::ToClients { event: ClusterEvent::GroupView { view_no: 9, .. }, .. })
    });
    assert!(lost.is_some() && lost < told, "{acts:?}");
    r.core.groups_event(now, 0, group_view(10), &mut r.out);
    assert_eq!(r.settle().len(), 1, "it decides nothing with it");
}

/// A proof is told behind what is held: at a node that was told that in the view before it came first as well. (Found by the simulator.)
#[test]
fn a_proof_overtakes_nothing_that_is_held() {
    let conf = CONF.replace("<quorumd device=\"file:/x\" votes=\"2\"/>", "");
    let mut r = Rig::new(&conf);
    r.view(4, &all(4));
    let now = r.now;
    r.core.ring_broken(&mut r.out);
    r.core.groups_event(now, 0, group_view(9), &mut r.out);
    let mut acts = r.say(proc(2, 1), &NodeMsg::MountGone { client: 7, fs: "web".to_owned() });
    acts.extend(r.view(8, &all(4)));
    let proof = acts.iter().position(|a| matches!(a, NodeAction::Event(ClusterEvent::Fenced { .. })));
    let told = acts.iter().position(|a| {
        matches!(a, NodeAction::ToClients { event: ClusterEvent::GroupView { view_no: 9, .. }, .. })
    });
    assert!(told.is_some() && told < proof, "{acts:?}");
}

/// The disk shows that others were quorate after the last view that this life's state includes.
#[test]
fn a_life_that_the_disk_shows_to_be_passed_by_stops_itself() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    for p in all(4) {
        r.say(p, &NodeMsg::Domain(DomainMsg::Join(p)));
    }
    assert!(r.disk(QdiskEvent::LastView(name_of(ring(4)))).is_empty(), "it was there");
    r.view(12, &all(3));
    let later = name_of(RingId { rep: NodeId(4), ..ring(12) });
    let acts = r.disk(QdiskEvent::LastView(later));
    assert!(acts.contains(&NodeAction::Stop(StopWhy::Excluded)), "SS5");
    // without state there is nothing to be passed by
    let mut r = Rig::new(CONF);
    r.view(4, &all(2));
    assert!(r.disk(QdiskEvent::LastView(later)).is_empty());
    assert_eq!(r.core.sync().last, later);
    // but quorate views rise
    r.now += Duration::from_millis(1);
    let until = r.now + Duration::from_secs(3);
    r.disk(QdiskEvent::Renewed { at: r.now });
    let acts = r.disk(QdiskEvent::Votes { view: name_of(ring(4)), until });
    assert!(acts.contains(&NodeAction::Stop(StopWhy::Excluded)), "quorate below a recorded view");
}

/// A mount that is ending is a victim to everybody, a newcomer too, until its node has seen its end.
#[test]
fn a_dying_mount_is_waited_for() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(2));
    let (client, fs) = (7, "web".to_owned());
    r.core.mount_dying(client, fs.clone(), &mut r.out);
    assert!(r.core.is_fencing(), "here at once: its group is told at once");
    let mut newcomer = Rig::new(CONF);
    let part = |r: &Rig| Bytes::from(postcard::to_stdvec(&r.core.sync()).unwrap());
    let parts = [(member(proc(1, 1)), part(&r)), (member(proc(2, 1)), part(&newcomer))];
    newcomer.view_of(8, &all(2), &parts);
    assert!(newcomer.core.is_fencing());
    newcomer.say(proc(1, 1), &NodeMsg::MountGone { client, fs: fs.clone() });
    assert!(!newcomer.core.is_fencing());
    newcomer.say(proc(1, 1), &NodeMsg::MountDying { client, fs });
    assert!(!newcomer.core.is_fencing(), "not again");
}

/// Who was never in the fence domain is no loss, but may count the device votes until its lease ends.
#[test]
fn only_a_goodbye_to_the_ring_is_told_to_the_disk() {
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    let gone = |acts: Vec<NodeAction>| {
        acts.iter().any(|a| matches!(a, NodeAction::Disk(QdiskCommand::Gone(p)) if *p == proc(4, 1)))
    };
    assert!(!gone(r.view(8, &all(3))), "silence");
    let mut r = Rig::new(CONF);
    r.view(4, &all(4));
    r.how = How::Clean;
    assert!(gone(r.view(8, &all(3))));
}
