//! `lock_nolock`: the lock space of a node that is alone. Every mode is granted inside the call.

use super::plock::PlockTable;
use super::{
    GlockName, Granted, LockEvents, LockSpace, LockState, Lvb, PlockConflict, PlockRequest, PlockTicket,
    RequestFlags,
};
use crate::Result;
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};

#[derive(Default)]
pub struct LocalSpace {
    events: OnceLock<Arc<dyn LockEvents>>,
    plocks: Mutex<PlockTable>,
}

impl LocalSpace {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
}

impl LockSpace for LocalSpace {
    fn attach(&self, events: Arc<dyn LockEvents>) {
        assert!(self.events.set(events).is_ok(), "a lock space has one user");
    }

    fn is_clustered(&self) -> bool {
        false
    }

    fn request(&self, name: GlockName, want: LockState, _flags: RequestFlags, _lvb: Option<&Lvb>) {
        // Value blocks tell other nodes; alone, what is on disk is true.
        let events = self.events.get().expect("attached before the first request");
        events.completed(name, Ok(Granted { state: want, lvb: None }));
    }

    fn cancel(&self, _name: GlockName) {}

    fn plock(
        &self,
        request: PlockRequest,
        wait: bool,
        done: Box<dyn FnOnce(Result<()>) + Send>,
    ) -> PlockTicket {
        let (ticket, answers) = self.plocks.lock().request(0, request, wait, done);
        answers.deliver();
        ticket
    }

    fn plock_cancel(&self, ticket: PlockTicket) {
        let answers = self.plocks.lock().cancel(ticket);
        answers.deliver();
    }

    fn plock_test(&self, request: PlockRequest, done: Box<dyn FnOnce(Result<Option<PlockConflict>>) + Send>) {
        let conflict = self.plocks.lock().test(0, request);
        done(Ok(conflict));
    }
}
