//! An in-memory lock manager that several mounts of one process share: real modes, queues, value blocks and callbacks, and members that die.
//!
//! Semantics are those the glocks expect of the DLM: conversions go before new requests, both queues are in order, a blocked
//! request sends one callback to each holder in its way, and of two holders that both convert SH to EX the second gets EDEADLK.
//! A member that dies leaves *ghosts*: its modes stay in the way until it is fenced (locks marked so) or its journal is replayed (all others);
//! a request with `recovery` passes those of the fenced. The value block of a resource that a ghost held EX is lost. If what it held was known to
//! itself alone, as it mastered it, its ghost haunts every resource, in the strongest mode that the living leave possible.

use super::plock::{Answers, PlockTable};
use super::{
    GlockName, Granted, LockEvents, LockSpace, LockState, Lvb, PlockConflict, PlockRequest, PlockTicket,
    RequestFlags,
};
use crate::{Error, Result};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, OnceLock};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ghost {
    No,
    Unfenced {
        at_fence: bool,
    },
    /// Until the replay.
    Fenced,
}

struct Held {
    member: u32,
    state: LockState,
    ghost: Ghost,
}

struct Asking {
    member: u32,
    want: LockState,
    flags: RequestFlags,
}

#[derive(Default)]
struct Resource {
    held: Vec<Held>,
    /// Conversions of modes in `held`.
    converting: VecDeque<Asking>,
    waiting: VecDeque<Asking>,
    lvb: Option<Lvb>,
}

fn compatible(a: LockState, b: LockState) -> bool {
    use LockState::{Deferred, Shared, Unlocked};
    matches!((a, b), (Unlocked, _) | (_, Unlocked) | (Shared, Shared) | (Deferred, Deferred))
}

fn is_down(from: LockState, to: LockState) -> bool {
    to == LockState::Unlocked || from == to || from == LockState::Exclusive
}

enum Event {
    Completed(Result<Granted>),
    Blocked(LockState),
}

/// (member, name, event), delivered in order after the mutex was given back.
type Events = Vec<(u32, GlockName, Event)>;

impl Resource {
    fn blockers(&self, asking: &Asking) -> impl Iterator<Item = &Held> {
        let (member, want, recovery) = (asking.member, asking.want, asking.flags.recovery);
        self.held.iter().filter(move |h| {
            h.member != member && !compatible(h.state, want) && !(recovery && h.ghost == Ghost::Fenced)
        })
    }

    /// The dead member may have held whatever the living leave possible.
    fn haunt(&mut self, name: GlockName, member: u32, is_fenced: bool) {
        let at_fence = name.is_released_at_fence();
        let living = self.held.iter().find(|h| h.ghost == Ghost::No).map(|h| h.state);
        if living == Some(LockState::Exclusive) || (is_fenced && at_fence) {
            return;
        }
        let ghost = if is_fenced { Ghost::Fenced } else { Ghost::Unfenced { at_fence } };
        self.held.push(Held { member, state: living.unwrap_or(LockState::Exclusive), ghost });
    }

    fn free(&self, asking: &Asking) -> bool {
        self.blockers(asking).next().is_none()
    }

    fn call_back(&self, name: GlockName, asking: &Asking, events: &mut Events) {
        for held in self.blockers(asking).filter(|h| h.ghost == Ghost::No) {
            events.push((held.member, name, Event::Blocked(asking.want)));
        }
    }

    fn grant(&mut self, name: GlockName, asking: &Asking, events: &mut Events) {
        self.held.retain(|h| h.member != asking.member);
        if asking.want != LockState::Unlocked {
            self.held.push(Held { member: asking.member, state: asking.want, ghost: Ghost::No });
        }
        let lvb = if asking.flags.lvb { self.lvb } else { None };
        events.push((asking.member, name, Event::Completed(Ok(Granted { state: asking.want, lvb }))));
    }

    /// Grants in order whatever became possible, and calls back for what now heads the queues.
    fn advance(&mut self, name: GlockName, events: &mut Events) {
        while let Some(head) = self.converting.front() {
            if !self.free(head) {
                break;
            }
            let head = self.converting.pop_front().expect("it has a front");
            self.grant(name, &head, events);
        }
        // New requests wait behind conversions, those of a recovery excepted.
        let mut index = 0;
        let mut blocked = !self.converting.is_empty();
        while let Some(asking) = self.waiting.get(index) {
            if (!blocked || asking.flags.recovery) && self.free(asking) {
                let asking = self.waiting.remove(index).expect("index is inside");
                self.grant(name, &asking, events);
            } else {
                blocked = true;
                index += 1;
            }
        }
        if let Some(head) = self.converting.front() {
            self.call_back(name, head, events);
        }
        if let Some(head) = self.waiting.front() {
            self.call_back(name, head, events);
        }
    }
}

#[derive(Default)]
struct State {
    resources: FxHashMap<GlockName, Resource>,
    dead: BTreeSet<u32>,
    /// Dead members of whom nobody knows what they held, and whether they are fenced.
    unknown: BTreeMap<u32, bool>,
    members: FxHashMap<u32, Arc<Member>>,
    last_member: u32,
}

/// The lock manager that members join.
#[derive(Default)]
pub struct SharedSpace {
    state: Mutex<State>,
    plocks: Mutex<PlockTable>,
}

/// One mount's end of a [`SharedSpace`].
struct Member {
    id: u32,
    space: Arc<SharedSpace>,
    events: OnceLock<Arc<dyn LockEvents>>,
}

impl SharedSpace {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A new member; the number names it in [`SharedSpace::kill`] and so on.
    pub fn join(self: &Arc<Self>) -> (u32, Arc<dyn LockSpace>) {
        let mut state = self.state.lock();
        state.last_member += 1;
        let id = state.last_member;
        let member = Arc::new(Member { id, space: Arc::clone(self), events: OnceLock::new() });
        state.members.insert(id, Arc::clone(&member));
        (id, member)
    }

    /// The member is gone without a word: nothing it asked for is answered, and what it holds stays in the way.
    pub fn kill(&self, member: u32) {
        let mut events = Events::new();
        {
            let mut state = self.state.lock();
            state.dead.insert(member);
            for (name, resource) in &mut state.resources {
                resource.converting.retain(|a| a.member != member);
                resource.waiting.retain(|a| a.member != member);
                for held in resource.held.iter_mut().filter(|h| h.member == member) {
                    held.ghost = Ghost::Unfenced { at_fence: name.is_released_at_fence() };
                    if held.state == LockState::Exclusive {
                        resource.lvb = None;
                    }
                }
                resource.advance(*name, &mut events);
            }
        }
        self.plocks.lock().remove_waiting(member);
        self.deliver(events);
    }

    /// As [`Self::kill`], and what the member held was known to itself alone.
    pub fn kill_with_what_it_mastered(&self, member: u32) {
        self.kill(member);
        let mut state = self.state.lock();
        state.unknown.insert(member, false);
        for (name, resource) in &mut state.resources {
            resource.haunt(*name, member, false);
        }
    }

    /// The dead member can no longer write.
    pub fn fenced(&self, member: u32) {
        if let Some(is_fenced) = self.state.lock().unknown.get_mut(&member) {
            *is_fenced = true;
        }
        self.remove(member, |ghost| ghost == Ghost::Unfenced { at_fence: true });
        let answers: Answers = self.plocks.lock().remove_member(member);
        answers.deliver();
    }

    /// The dead member's journal is replayed.
    pub fn recovered(&self, member: u32) {
        self.state.lock().unknown.remove(&member);
        self.remove(member, |_| true);
        self.state.lock().members.remove(&member);
    }

    /// A member that has unlocked everything leaves.
    pub fn leave(&self, member: u32) {
        self.kill(member);
        self.fenced(member);
        self.recovered(member);
    }

    fn remove(&self, member: u32, which: impl Fn(Ghost) -> bool) {
        let mut events = Events::new();
        {
            let mut state = self.state.lock();
            assert!(state.dead.contains(&member), "member {member} lives");
            for (name, resource) in &mut state.resources {
                resource.held.retain(|h| h.member != member || !which(h.ghost));
                for held in resource.held.iter_mut().filter(|h| h.member == member) {
                    held.ghost = Ghost::Fenced;
                }
                resource.advance(*name, &mut events);
            }
        }
        self.deliver(events);
    }

    fn deliver(&self, events: Events) {
        for (member, name, event) in events {
            let member = {
                let state = self.state.lock();
                if state.dead.contains(&member) {
                    continue;
                }
                state.members.get(&member).cloned()
            };
            let Some(member) = member else { continue };
            let Some(sink) = member.events.get() else { continue };
            match event {
                Event::Completed(result) => sink.completed(name, result),
                Event::Blocked(wanted) => sink.blocked(name, wanted),
            }
        }
    }

    fn ask(&self, member: u32, name: GlockName, want: LockState, flags: RequestFlags, lvb: Option<&Lvb>) {
        let mut events = Events::new();
        {
            let mut state = self.state.lock();
            if state.dead.contains(&member) {
                return;
            }
            let State { resources, unknown, .. } = &mut *state;
            let resource = resources.entry(name).or_insert_with(|| {
                let mut new = Resource::default();
                for (dead, is_fenced) in unknown {
                    new.haunt(name, *dead, *is_fenced);
                }
                new
            });
            let asking = Asking { member, want, flags };
            let from = resource.held.iter().find(|h| h.member == member).map(|h| h.state);
            match from {
                Some(from) if is_down(from, want) => {
                    if from == LockState::Exclusive && flags.lvb && lvb.is_some() {
                        resource.lvb = lvb.copied();
                    }
                    resource.grant(name, &asking, &mut events);
                    resource.advance(name, &mut events);
                }
                Some(_) => {
                    let others_convert = resource.converting.iter().any(|other| {
                        let mine = from.unwrap_or_default();
                        resource.held.iter().any(|h| h.member == other.member && !compatible(h.state, want))
                            && !compatible(mine, other.want)
                    });
                    if resource.free(&asking) && resource.converting.is_empty() {
                        resource.grant(name, &asking, &mut events);
                    } else if flags.try_lock {
                        Self::refuse(resource, name, &asking, libc::EAGAIN, &mut events);
                    } else if others_convert {
                        Self::refuse(resource, name, &asking, libc::EDEADLK, &mut events);
                    } else {
                        resource.call_back(name, &asking, &mut events);
                        resource.converting.push_back(asking);
                    }
                }
                None if want == LockState::Unlocked => {
                    events.push((member, name, Event::Completed(Ok(Granted { state: want, lvb: None }))));
                }
                None => {
                    let behind = !resource.converting.is_empty() || !resource.waiting.is_empty();
                    if resource.free(&asking) && (!behind || flags.recovery) {
                        resource.grant(name, &asking, &mut events);
                    } else if flags.try_lock {
                        Self::refuse(resource, name, &asking, libc::EAGAIN, &mut events);
                    } else {
                        resource.call_back(name, &asking, &mut events);
                        resource.waiting.push_back(asking);
                    }
                }
            }
            if resource.held.is_empty()
                && resource.waiting.is_empty()
                && resource.converting.is_empty()
                && resource.lvb.is_none()
            {
                state.resources.remove(&name);
            }
        }
        self.deliver(events);
    }

    fn refuse(resource: &Resource, name: GlockName, asking: &Asking, errno: i32, events: &mut Events) {
        if asking.flags.try_1cb {
            resource.call_back(name, asking, events);
        }
        events.push((asking.member, name, Event::Completed(Err(Error::Errno(errno)))));
    }

    /// What a living member holds, for tests that wait for it.
    pub fn held(&self, member: u32, name: GlockName) -> LockState {
        let state = self.state.lock();
        let of_member = |r: &Resource| {
            r.held.iter().find(|h| h.member == member && h.ghost == Ghost::No).map(|h| h.state)
        };
        state.resources.get(&name).and_then(of_member).unwrap_or_default()
    }

    /// Modes that live members hold at the same time although they exclude each other, for tests: must be empty.
    pub fn violations(&self) -> Vec<String> {
        let state = self.state.lock();
        let mut found = Vec::new();
        for (name, resource) in &state.resources {
            for (i, a) in resource.held.iter().enumerate() {
                for b in &resource.held[i + 1..] {
                    if !compatible(a.state, b.state) && a.ghost == Ghost::No && b.ghost == Ghost::No {
                        found.push(format!(
                            "{name}: {}:{:?} and {}:{:?}",
                            a.member, a.state, b.member, b.state
                        ));
                    }
                }
            }
        }
        found
    }
}

impl LockSpace for Member {
    fn attach(&self, events: Arc<dyn LockEvents>) {
        assert!(self.events.set(events).is_ok(), "a member has one user");
    }

    fn is_clustered(&self) -> bool {
        true
    }

    fn request(&self, name: GlockName, want: LockState, flags: RequestFlags, lvb: Option<&Lvb>) {
        self.space.ask(self.id, name, want, flags, lvb);
    }

    fn cancel(&self, name: GlockName) {
        let mut events = Events::new();
        {
            let mut state = self.space.state.lock();
            let Some(resource) = state.resources.get_mut(&name) else { return };
            let before = resource.converting.len() + resource.waiting.len();
            resource.converting.retain(|a| a.member != self.id);
            resource.waiting.retain(|a| a.member != self.id);
            if resource.converting.len() + resource.waiting.len() == before {
                return;
            }
            events.push((self.id, name, Event::Completed(Err(Error::Interrupted))));
            resource.advance(name, &mut events);
        }
        self.space.deliver(events);
    }

    fn plock(
        &self,
        request: PlockRequest,
        wait: bool,
        done: Box<dyn FnOnce(Result<()>) + Send>,
    ) -> PlockTicket {
        let (ticket, answers) = self.space.plocks.lock().request(self.id, request, wait, done);
        answers.deliver();
        ticket
    }

    fn plock_cancel(&self, ticket: PlockTicket) {
        let answers = self.space.plocks.lock().cancel(ticket);
        answers.deliver();
    }

    fn plock_test(&self, request: PlockRequest, done: Box<dyn FnOnce(Result<Option<PlockConflict>>) + Send>) {
        let conflict = self.space.plocks.lock().test(self.id, request);
        done(Ok(conflict));
    }
}
