//! Replay of journals: by a survivor after a fence, by the first mounter of all.

use super::{JOURNAL, MOUNTED, RETRY, Replay, Step};
use crate::lun::Op;
use crate::world::{Call, Ev, MS, Tag, World};
use dlm::{Flags, Mode};
use gfs::cluster::members::{Note, encode};

impl World {
    // ---- replay ----

    pub(super) fn recovery_go_on(&mut self, i: usize) {
        let now = self.now;
        let journals = self.lun.journals.len() as u32;
        let m = self.m(i);
        if m.replay.is_some() || now < m.retry_at {
            return;
        }
        while let Some(dead) = m.to_recover.front().copied() {
            if !m.members.needs_recovery(dead.who) {
                m.to_recover.pop_front();
                continue;
            }
            let list = m.members.journals_of(dead, journals).iter().map(|j| j.0 as usize).collect();
            m.replay = Some(Replay {
                dead: Some(dead),
                journals: list,
                at: 0,
                all: true,
                entries: Vec::new(),
                written: 0,
                cleared: false,
            });
            return self.replay_go(i);
        }
    }

    /// The next journal of the list, or the end of it.
    pub(super) fn replay_go(&mut self, i: usize) {
        let retry = self.now + RETRY;
        let m = self.m(i);
        let own = m.jid;
        let Some(r) = &mut m.replay else { return };
        if let Some(j) = r.journals.get(r.at).copied() {
            if Some(j) == own && r.dead.is_some() {
                // our own holder would not keep us out
                r.all = false;
                r.at += 1;
                return self.replay_go(i);
            }
            if Some(j) == own {
                return self.replay_read(i);
            }
            // a first mounter passes over no journal
            let flags = if r.dead.is_some() { Flags::NOQUEUE } else { Flags::NONE };
            return self.ask(i, JOURNAL + j, Mode::EX, flags | Flags::RECOVERY);
        }
        let (dead, all) = (r.dead, r.all);
        m.replay = None;
        match dead {
            None => {
                let jid = own.expect("invariant: the first mounter has a journal");
                let who = m.who;
                self.lun.journal_of[jid] = Some(who);
                self.check_first_mounter(who);
                self.set_step(i, Step::FirstDone);
                self.ask(i, MOUNTED, Mode::PR, Flags::RECOVERY);
            }
            Some(dead) => {
                m.retry_at = retry;
                let who = m.who;
                if all {
                    self.audit.replayed(dead.who);
                    self.say(|| format!("{who} recovered {}", dead.who));
                    self.dlm_step(i, dlm::Event::Recovered { who: dead.who, spread: true });
                    let note = Note::Recovered { node: dead.who.node.0, incarnation: dead.who.incarnation.0 };
                    self.call_daemon(i, Call::Say(encode(&note)));
                }
                self.timer(i, RETRY);
            }
        }
    }

    pub(super) fn replay_lock(&mut self, i: usize, ok: bool) {
        if ok {
            return self.replay_read(i);
        }
        if let Some(r) = &mut self.m(i).replay {
            r.all = false;
            r.at += 1;
        }
        self.replay_go(i);
    }

    pub(super) fn replay_read(&mut self, i: usize) {
        let m = self.m(i);
        let r = m.replay.as_ref().expect("invariant: a replay runs");
        let (j, dead, who) = (r.journals[r.at], r.dead, m.who);
        self.check_replay(who, j, dead.map(|d| d.who));
        self.say(|| format!("{who} replays journal {j} for {dead:?}"));
        // a journal has to be read as a whole
        let time = self.between(2 * MS, 300 * MS);
        let latency = self.latency(i);
        self.after(latency + time, Ev::Read { node: i, who, tag: Tag::Replay, what: j });
    }

    pub(super) fn replay_next(&mut self, i: usize) {
        let m = self.m(i);
        let r = m.replay.as_ref().expect("invariant: a replay runs");
        let j = r.journals[r.at];
        if let Some((counter, value)) = r.entries.get(r.written).copied() {
            self.write(i, Op::InPlace { counter, value }, Tag::Replay);
        } else if !r.cleared {
            self.write(i, Op::Clear { jid: j }, Tag::Replay);
        } else {
            self.replay_journal_done(i);
        }
    }

    pub(super) fn replay_written(&mut self, i: usize) {
        let Some(r) = &mut self.m(i).replay else { return };
        if r.written < r.entries.len() {
            r.written += 1;
            self.replay_next(i);
        } else {
            r.cleared = true;
            self.replay_journal_done(i);
        }
    }

    pub(super) fn replay_journal_done(&mut self, i: usize) {
        let m = self.m(i);
        let own = m.jid;
        let r = m.replay.as_mut().expect("invariant: a replay runs");
        let j = r.journals[r.at];
        r.at += 1;
        r.entries.clear();
        r.written = 0;
        if Some(j) != own {
            self.lun.journal_of[j] = None;
            self.give(i, JOURNAL + j);
        }
        self.replay_go(i);
    }
}
