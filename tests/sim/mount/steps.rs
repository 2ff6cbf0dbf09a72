//! The steps of mounting, in the order of `gfs::volume`.

use super::{Busy, CONTROL, JOURNAL, LIVE, MOUNT, MOUNT_LIMIT, MOUNTED, MountEnd, Replay, Step};
use crate::world::{COUNTERS, Call, Ev, MS, Tag, World};
use dlm::{Flags, Mode, Status};
use gfs::cluster::members::{Action, encode};

impl World {
    // ---- mounting ----

    pub(super) fn set_step(&mut self, i: usize, step: Step) {
        let m = self.m(i);
        m.step = step;
        let who = m.who;
        self.say(|| format!("{who} {step:?}"));
    }

    /// Whatever can go on goes on.
    pub(crate) fn mount_go_on(&mut self, i: usize) {
        if self.nodes[i].mount.as_ref().is_none_or(|m| m.dead) {
            return;
        }
        let now = self.now;
        let m = self.m(i);
        let ready = m.core.view().is_some();
        let settled = ready && m.core.settled();
        let (step, retry_at) = (m.step, m.retry_at);
        match step {
            Step::Joining if ready => self.set_step(i, Step::Settling),
            Step::Settling if settled => {
                let Some(unknown) = self.all_fenced(i) else { return self.timer(i, 20 * MS) };
                self.set_step(i, Step::MountLock);
                for action in unknown {
                    self.member_action(i, action);
                }
                self.ask(i, MOUNT, Mode::EX, Flags::RECOVERY);
            }
            Step::Backoff if now >= retry_at => {
                self.set_step(i, Step::Control);
                self.ask(i, CONTROL, Mode::EX, Flags::NOQUEUE | Flags::RECOVERY);
            }
            Step::Mounted | Step::Unmounting => {
                self.recovery_go_on(i);
                for name in 0..COUNTERS {
                    self.counter_go_on(i, name);
                }
                if self.m(i).unmounting {
                    self.unmount_go_on(i);
                }
            }
            Step::Draining(until) => {
                let who = self.m(i).who;
                if self.lane_is_empty(who) || now >= until {
                    self.call_daemon(i, Call::Leave);
                    self.end_mount(i, MountEnd::Clean);
                    return;
                }
            }
            _ => {}
        }
        if self.nodes[i].mount.as_ref().is_none_or(|m| m.dead) {
            return;
        }
        let m = self.m(i);
        let mounting =
            !matches!(m.step, Step::Connecting | Step::Mounted | Step::Unmounting | Step::Draining(_));
        if mounting && now > m.since + MOUNT_LIMIT {
            let picture = self.m(i).picture();
            self.say(|| picture);
            return self.kill_mount(i, "the mount takes too long");
        }
        let m = self.m(i);
        let busy = m.step != Step::Mounted || m.unmounting || !m.members.is_settled();
        if busy {
            self.timer(i, 50 * MS);
        }
    }

    /// Who has nobody with the volume mounted beside it waits until nobody is left to fence (`Cluster::wait_all_fenced`): `None`.
    fn all_fenced(&mut self, i: usize) -> Option<Vec<Action>> {
        let n = &self.nodes[i];
        let m = n.mount.as_ref().expect("invariant: a mount acts only while it is there");
        if m.members.is_led() && !m.core.founder() {
            return Some(Vec::new());
        }
        let daemon = n.daemon.as_ref().filter(|d| d.me == m.life && n.daemon_asleep == 0);
        let proved = daemon.is_some_and(|d| d.stack.core.domain().joined() && !d.stack.core.is_fencing());
        let current = m.untold == 0 && m.members.is_current() && m.members.is_informed();
        if !proved || !current || !m.members.unfenced().is_empty() {
            return None;
        }
        let m = self.m(i);
        Some(m.members.adopt(m.core.gates()))
    }

    pub(super) fn lock_answer(&mut self, i: usize, name: usize, ok: bool, status: Status) {
        let step = self.m(i).step;
        if name < COUNTERS {
            let c = &mut self.m(i).counters[name];
            c.busy = Busy::No;
            c.owed = ok && c.job.is_some();
            if status == Status::Deadlock {
                c.demote = Some(Mode::NL);
            }
            return;
        }
        match (step, name) {
            (Step::MountLock, MOUNT) if ok => {
                self.set_step(i, Step::Live);
                self.ask(i, LIVE, Mode::PR, Flags::RECOVERY);
            }
            (Step::Live, LIVE) if ok => {
                self.set_step(i, Step::Control);
                self.ask(i, CONTROL, Mode::EX, Flags::NOQUEUE | Flags::RECOVERY);
            }
            (Step::Control, CONTROL) if ok => {
                self.set_step(i, Step::MountedEx);
                self.ask(i, MOUNTED, Mode::EX, Flags::NOQUEUE | Flags::RECOVERY);
            }
            (Step::Control, CONTROL) => self.backoff(i),
            (Step::MountedEx, MOUNTED) if ok => {
                self.m(i).first = true;
                self.try_journals(i);
            }
            (Step::MountedEx, MOUNTED) => {
                self.set_step(i, Step::MountedSh);
                self.ask(i, MOUNTED, Mode::PR, Flags::NOQUEUE | Flags::RECOVERY);
            }
            (Step::MountedSh, MOUNTED) => {
                self.give(i, CONTROL);
                if ok {
                    self.m(i).first = false;
                    self.try_journals(i);
                } else {
                    self.backoff(i);
                }
            }
            (Step::TryJournal(j), _) if name == JOURNAL + j => {
                if ok {
                    self.set_step(i, Step::LookJournal(j));
                    self.read(i, Tag::Unmount, j);
                } else {
                    self.next_journal(i, j + 1);
                }
            }
            (Step::FirstDone, MOUNTED) => {
                self.give(i, CONTROL);
                self.mounted(i);
            }
            _ if name >= JOURNAL && self.m(i).replay.is_some() => self.replay_lock(i, ok),
            _ => {}
        }
    }

    pub(super) fn backoff(&mut self, i: usize) {
        let at = self.now + 100 * MS;
        self.m(i).retry_at = at;
        self.set_step(i, Step::Backoff);
        self.timer(i, 100 * MS);
    }

    pub(super) fn try_journals(&mut self, i: usize) {
        self.next_journal(i, 0);
    }

    pub(super) fn next_journal(&mut self, i: usize, j: usize) {
        if j < self.lun.journals.len() {
            self.set_step(i, Step::TryJournal(j));
            let past_the_dead = if self.m(i).first { Flags::RECOVERY } else { Flags::NONE };
            self.ask(i, JOURNAL + j, Mode::EX, Flags::NOQUEUE | past_the_dead);
        } else {
            // all are in use or dirty: the survivors replay them, if there are any
            if !self.m(i).first {
                return self.backoff(i);
            }
            self.set_step(i, Step::TryJournal(0));
            let at = self.now + 100 * MS;
            self.m(i).retry_at = at;
            let who = self.m(i).who;
            self.after(100 * MS, Ev::User { node: i, who });
        }
    }

    pub(super) fn journal_seen(&mut self, i: usize, j: usize, clean: bool) {
        let m = self.m(i);
        if m.step != Step::LookJournal(j) {
            return;
        }
        if !clean && !m.first {
            self.give(i, JOURNAL + j);
            return self.next_journal(i, j + 1);
        }
        m.jid = Some(j);
        let who = m.who;
        let all = self.lun.journals.len();
        if self.m(i).first {
            let mut journals: Vec<usize> = (0..all).filter(|x| *x != j).collect();
            journals.push(j);
            self.set_step(i, Step::Replaying);
            self.m(i).replay = Some(Replay {
                dead: None,
                journals,
                at: 0,
                all: true,
                entries: Vec::new(),
                written: 0,
                cleared: false,
            });
            self.replay_go(i);
        } else {
            self.check_journal_taken(who, j);
            self.lun.journal_of[j] = Some(who);
            self.mounted(i);
        }
    }

    pub(super) fn mounted(&mut self, i: usize) {
        self.give(i, MOUNT);
        self.set_step(i, Step::Mounted);
        let m = self.m(i);
        let (note, dead) = m.members.set_own_journal(m.jid.map(|j| gfs::JournalId(j as u32)));
        m.to_recover.extend(dead);
        let who = m.who;
        self.call_daemon(i, Call::Say(encode(&note)));
        self.after(MS, Ev::User { node: i, who });
        self.mount_go_on(i);
    }
}
