//! Byte-range locks of one or several members in one table: conflicts, splitting, waiting in order, deadlocks.
//!
//! An owner (member, lock owner) never conflicts with itself; a new lock replaces what it covers of the owner's older ones. A waiter
//! whose wait would close a circle of owners gets EDEADLK, as POSIX asks.

use super::{PlockConflict, PlockKind, PlockRequest, PlockTicket};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

type Done = Box<dyn FnOnce(Result<()>) + Send>;
type Owner = (u32, u64);

#[derive(Clone, Copy, Debug)]
struct Range {
    owner: Owner,
    pid: u32,
    start: u64,
    end: u64,
    write: bool,
}

struct Waiting {
    ticket: PlockTicket,
    member: u32,
    request: PlockRequest,
    done: Done,
}

#[derive(Default)]
struct File {
    held: Vec<Range>,
    waiting: VecDeque<Waiting>,
}

#[derive(Default)]
pub(super) struct PlockTable {
    files: BTreeMap<u64, File>,
    last_ticket: u64,
}

/// Callbacks to run after the table's mutex was given back.
#[must_use]
#[derive(Default)]
pub(super) struct Answers(Vec<(Done, Result<()>)>);

impl Answers {
    pub(super) fn deliver(self) {
        for (done, result) in self.0 {
            done(result);
        }
    }
}

fn overlaps(range: &Range, request: &PlockRequest) -> bool {
    range.start <= request.end && request.start <= range.end
}

impl File {
    fn conflicts<'a>(&'a self, member: u32, request: &'a PlockRequest) -> impl Iterator<Item = &'a Range> {
        let owner = (member, request.owner);
        let write = request.kind == PlockKind::Write;
        self.held.iter().filter(move |r| r.owner != owner && overlaps(r, request) && (r.write || write))
    }

    /// Sets or removes the owner's range, cutting what it had there.
    fn apply(&mut self, member: u32, request: &PlockRequest) {
        let owner = (member, request.owner);
        let mut pieces = Vec::new();
        self.held.retain(|r| {
            if r.owner != owner || !overlaps(r, request) {
                return true;
            }
            if r.start < request.start {
                pieces.push(Range { end: request.start - 1, ..*r });
            }
            if r.end > request.end {
                pieces.push(Range { start: request.end + 1, ..*r });
            }
            false
        });
        self.held.append(&mut pieces);
        if request.kind != PlockKind::Unlock {
            let write = request.kind == PlockKind::Write;
            let mut new = Range { owner, pid: request.pid, start: request.start, end: request.end, write };
            // Neighbours of the same kind become one, so that a file locked byte by byte stays one entry.
            self.held.retain(|r| {
                let touches = r.owner == owner
                    && r.write == write
                    && (r.end.checked_add(1) == Some(new.start) || new.end.checked_add(1) == Some(r.start));
                if touches {
                    new.start = new.start.min(r.start);
                    new.end = new.end.max(r.end);
                }
                !touches
            });
            self.held.push(new);
        }
    }

    fn grant_waiting(&mut self, answers: &mut Answers) {
        let mut index = 0;
        while let Some(waiting) = self.waiting.get(index) {
            if self.conflicts(waiting.member, &waiting.request).next().is_some() {
                index += 1;
                continue;
            }
            let waiting = self.waiting.remove(index).expect("index is inside");
            self.apply(waiting.member, &waiting.request);
            answers.0.push((waiting.done, Ok(())));
            // A grant can convert a write lock to a read lock and so free an earlier waiter.
            index = 0;
        }
    }
}

impl PlockTable {
    pub(super) fn request(
        &mut self,
        member: u32,
        request: PlockRequest,
        wait: bool,
        done: Done,
    ) -> (PlockTicket, Answers) {
        self.last_ticket += 1;
        let ticket = PlockTicket(self.last_ticket);
        let mut answers = Answers::default();
        let file = self.files.entry(request.ino).or_default();
        if request.kind == PlockKind::Unlock || file.conflicts(member, &request).next().is_none() {
            file.apply(member, &request);
            file.grant_waiting(&mut answers);
            answers.0.push((done, Ok(())));
        } else if !wait {
            answers.0.push((done, Err(Error::Errno(libc::EAGAIN))));
        } else if self.closes_circle(member, &request) {
            answers.0.push((done, Err(Error::Errno(libc::EDEADLK))));
        } else if let Some(file) = self.files.get_mut(&request.ino) {
            file.waiting.push_back(Waiting { ticket, member, request, done });
        }
        self.forget_empty(request.ino);
        (ticket, answers)
    }

    fn forget_empty(&mut self, ino: u64) {
        if self.files.get(&ino).is_some_and(|f| f.held.is_empty() && f.waiting.is_empty()) {
            self.files.remove(&ino);
        }
    }

    /// Whether somebody in the way waits, through others, for this owner.
    fn closes_circle(&self, member: u32, request: &PlockRequest) -> bool {
        let me = (member, request.owner);
        let mut seen = BTreeSet::new();
        let mut todo: Vec<Owner> =
            self.files[&request.ino].conflicts(member, request).map(|r| r.owner).collect();
        while let Some(owner) = todo.pop() {
            if owner == me {
                return true;
            }
            if !seen.insert(owner) {
                continue;
            }
            for file in self.files.values() {
                for waiting in file.waiting.iter().filter(|w| (w.member, w.request.owner) == owner) {
                    todo.extend(file.conflicts(waiting.member, &waiting.request).map(|r| r.owner));
                }
            }
        }
        false
    }

    pub(super) fn cancel(&mut self, ticket: PlockTicket) -> Answers {
        let mut answers = Answers::default();
        let mut empty = None;
        for (ino, file) in &mut self.files {
            if let Some(index) = file.waiting.iter().position(|w| w.ticket == ticket) {
                let waiting = file.waiting.remove(index).expect("index is inside");
                answers.0.push((waiting.done, Err(Error::Interrupted)));
                empty = Some(*ino);
                break;
            }
        }
        if let Some(ino) = empty {
            self.forget_empty(ino);
        }
        answers
    }

    pub(super) fn test(&self, member: u32, request: PlockRequest) -> Option<PlockConflict> {
        let file = self.files.get(&request.ino)?;
        let first = file.conflicts(member, &request).min_by_key(|r| r.start)?;
        Some(PlockConflict {
            start: first.start,
            end: first.end,
            kind: if first.write { PlockKind::Write } else { PlockKind::Read },
            pid: if first.owner.0 == member { first.pid } else { 0 },
        })
    }

    /// Forgets a member: its locks and its waits (their callbacks are dropped with it).
    pub(super) fn remove_member(&mut self, member: u32) -> Answers {
        let mut answers = Answers::default();
        for file in self.files.values_mut() {
            file.held.retain(|r| r.owner.0 != member);
            file.waiting.retain(|w| w.member != member);
            file.grant_waiting(&mut answers);
        }
        self.files.retain(|_, f| !f.held.is_empty() || !f.waiting.is_empty());
        answers
    }

    /// Drops what a member waits for, keeps what it holds.
    pub(super) fn remove_waiting(&mut self, member: u32) {
        for file in self.files.values_mut() {
            file.waiting.retain(|w| w.member != member);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn ask(
        table: &mut PlockTable,
        owner: u64,
        ino: u64,
        start: u64,
        end: u64,
        kind: PlockKind,
        wait: bool,
    ) -> (PlockTicket, Receiver<Result<()>>) {
        let (send, receive) = channel();
        let request = PlockRequest { ino, owner, pid: owner as u32, start, end, kind };
        let (ticket, answers) =
            table.request(1, request, wait, Box::new(move |r| send.send(r).unwrap_or(())));
        answers.deliver();
        (ticket, receive)
    }

    fn code(receiver: &Receiver<Result<()>>) -> Option<i32> {
        receiver.try_recv().ok().map(|r| r.map_or_else(|e| e.errno(), |()| 0))
    }

    #[test]
    fn unlock_in_the_middle_splits_and_lets_exactly_that_range_in() {
        let mut t = PlockTable::default();
        assert_eq!(code(&ask(&mut t, 1, 9, 0, 99, PlockKind::Write, false).1), Some(0));
        assert_eq!(code(&ask(&mut t, 1, 9, 40, 59, PlockKind::Unlock, false).1), Some(0));
        assert_eq!(code(&ask(&mut t, 2, 9, 40, 59, PlockKind::Write, false).1), Some(0));
        assert_eq!(code(&ask(&mut t, 2, 9, 39, 40, PlockKind::Read, false).1), Some(libc::EAGAIN));
        assert_eq!(code(&ask(&mut t, 2, 9, 60, u64::MAX, PlockKind::Read, false).1), Some(libc::EAGAIN));
        assert_eq!(code(&ask(&mut t, 2, 9, 100, u64::MAX, PlockKind::Read, false).1), Some(0));
    }

    #[test]
    fn waiter_is_granted_at_unlock_and_cancelled_waiter_is_interrupted() {
        let mut t = PlockTable::default();
        let _ = ask(&mut t, 1, 9, 0, 9, PlockKind::Write, false);
        let (_, second) = ask(&mut t, 2, 9, 5, 6, PlockKind::Read, true);
        let (ticket, third) = ask(&mut t, 3, 9, 5, 6, PlockKind::Write, true);
        assert_eq!(code(&second), None);
        t.cancel(ticket).deliver();
        assert_eq!(code(&third), Some(libc::EINTR));
        let _ = ask(&mut t, 1, 9, 0, 9, PlockKind::Unlock, false);
        assert_eq!(code(&second), Some(0));
    }

    #[test]
    fn circle_over_two_files_is_refused_to_the_one_who_closes_it() {
        let mut t = PlockTable::default();
        let _ = ask(&mut t, 1, 7, 0, 0, PlockKind::Write, false);
        let _ = ask(&mut t, 2, 8, 0, 0, PlockKind::Write, false);
        let (_, first) = ask(&mut t, 1, 8, 0, 0, PlockKind::Write, true);
        let (_, closing) = ask(&mut t, 2, 7, 0, 0, PlockKind::Write, true);
        assert_eq!(code(&first), None);
        assert_eq!(code(&closing), Some(libc::EDEADLK));
    }
}
