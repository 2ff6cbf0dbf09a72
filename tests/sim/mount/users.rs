//! Users of a mount, and the counters they increase and look at.

use super::{Busy, JOURNAL, Job, Step};
use crate::lun::Op;
use crate::world::{COUNTERS, Ev, MS, Tag, World};
use dlm::{Flags, Mode};

impl World {
    // ---- users ----

    pub(crate) fn user(&mut self, i: usize) {
        let m = self.m(i);
        let who = m.who;
        if let Step::TryJournal(0) = m.step
            && m.glocks.get(&JOURNAL).is_none_or(|g| g.pending.is_none())
            && m.retry_at > 0
        {
            m.retry_at = 0;
            return self.ask(i, JOURNAL, Mode::EX, Flags::NOQUEUE);
        }
        if m.step != Step::Mounted || m.unmounting {
            return;
        }
        if self.quiet {
            return;
        }
        let name = self.rng.below(COUNTERS as u64) as usize;
        let job = if self.rng.chance(3, 5) { Job::Increase } else { Job::Look };
        let c = &mut self.m(i).counters[name];
        if c.job.is_none() {
            c.job = Some(job);
        }
        self.counter_go_on(i, name);
        let pause = self.between(10, 400) * MS;
        self.after(pause, Ev::User { node: i, who });
    }

    pub(super) fn counter_go_on(&mut self, i: usize, name: usize) {
        let unmounting = self.m(i).unmounting;
        let flip = self.rng.chance(1, 2);
        let m = self.m(i);
        let jid = m.jid.expect("invariant: mounted");
        let (who, held) = (m.who, m.glocks.get(&name).and_then(|g| g.held));
        let c = &mut m.counters[name];
        if c.busy != Busy::No {
            return;
        }
        if unmounting {
            c.job = None;
            c.demote = held.map(|_| Mode::NL);
        }
        match (c.demote.filter(|_| !c.owed), held) {
            (Some(to), Some(held)) if held != to && held.covers(to) => {
                if c.dirty {
                    c.busy = Busy::InPlace;
                    let value = c.cached.expect("invariant: dirty is cached");
                    return self.write(i, Op::InPlace { counter: name, value }, Tag::Counter(name));
                }
                c.demote = None;
                if to == Mode::PR {
                    c.busy = Busy::Lock;
                    return self.ask(i, name, Mode::PR, Flags::NONE);
                }
                self.give(i, name);
                let c = &mut self.m(i).counters[name];
                c.cached = None;
                return self.counter_go_on(i, name);
            }
            (Some(_), _) => c.demote = None,
            (None, _) => {}
        }
        let Some(job) = c.job else {
            c.owed = false;
            return;
        };
        let need = if job == Job::Increase { Mode::EX } else { Mode::PR };
        if !held.is_some_and(|h| h.covers(need)) {
            c.owed = false;
            if held.is_some() && flip {
                // up by way of nothing
                c.demote = Some(Mode::NL);
                return self.counter_go_on(i, name);
            }
            c.busy = Busy::Lock;
            c.cached = None;
            return self.ask(i, name, need, Flags::NONE);
        }
        let Some(value) = c.cached else {
            c.busy = Busy::Read;
            return self.read(i, Tag::Counter(name), name);
        };
        match job {
            Job::Increase => {
                c.busy = Busy::Log(value + 1);
                self.write(i, Op::Log { jid, counter: name, value: value + 1 }, Tag::Counter(name));
            }
            Job::Look => {
                c.job = None;
                c.owed = false;
                m.looked += 1;
                self.check_look(who, name, value);
                self.counter_go_on(i, name);
            }
        }
    }

    pub(super) fn counter_written(&mut self, i: usize, name: usize) {
        let m = self.m(i);
        let jid = m.jid.expect("invariant: mounted");
        let who = m.who;
        let c = &mut m.counters[name];
        match c.busy {
            Busy::Log(value) => {
                c.busy = Busy::No;
                c.cached = Some(value);
                c.dirty = true;
                c.job = None;
                c.owed = false;
                m.increased += 1;
                self.audit.acknowledged(who, name, value);
            }
            Busy::InPlace => {
                c.busy = Busy::Revoke;
                self.write(i, Op::Revoke { jid, counter: name }, Tag::Counter(name));
            }
            Busy::Revoke => {
                c.busy = Busy::No;
                c.dirty = false;
            }
            Busy::No | Busy::Lock | Busy::Read => panic!("answer to no write of counter {name}"),
        }
    }
}
