//! What the current thread is doing, as far as glocks must know it.
//!
//! Thread-locals, because the request passes through operations that know nothing of the kernel's caches.

use super::GlockName;
use crate::{Error, Result};
use parking_lot::Mutex;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a request behaves at the gate of one glock that is being demoted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Class {
    /// Waits at a shut gate.
    #[default]
    Ordinary,
    /// A page READ or a buffered WRITE: may hold a page lock that the page pass needs, so it is let in through a window.
    Page,
    /// Write-back of a mapped page: never waits at a gate, the demotion waits for it.
    WriteBack,
    /// The thread already holds a pin of this glock; it is a user and must be able to finish.
    Pinned,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Request {
    pub(super) name: Option<GlockName>,
    pub(super) class: Class,
    pub(super) node_exclusive: bool,
}

thread_local! {
    static NOWAIT: Cell<bool> = const { Cell::new(false) };
    static TRANSACTIONS: Cell<u32> = const { Cell::new(0) };
    static REQUEST: Cell<Request> = const { Cell::new(Request { name: None, class: Class::Ordinary, node_exclusive: false }) };
    static CANCEL: RefCell<Option<Arc<CancelToken>>> = const { RefCell::new(None) };
}

struct Restore<F: FnMut()>(F);
impl<F: FnMut()> Drop for Restore<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs `f` such that nothing in it waits for a glock or for the disk on behalf of one: `Error::WouldBlock` instead.
pub fn nowait<T>(f: impl FnOnce() -> T) -> T {
    let before = NOWAIT.replace(true);
    let _restore = Restore(|| NOWAIT.set(before));
    f()
}

/// True on a thread inside [`nowait`]: code that would read the disk answers `Error::WouldBlock`, provided it has changed nothing yet.
pub fn is_nowait() -> bool {
    NOWAIT.get()
}

/// Runs `f` as a request of this class on glock `name`; with `node_exclusive` every acquire of it asks the lock manager for EX,
/// while local holders share as they asked to.
pub fn as_request<T>(name: GlockName, class: Class, node_exclusive: bool, f: impl FnOnce() -> T) -> T {
    let before = REQUEST.replace(Request { name: Some(name), class, node_exclusive });
    let _restore = Restore(|| REQUEST.set(before));
    f()
}

pub(super) fn request_for(name: GlockName) -> Request {
    let request = REQUEST.get();
    if request.name == Some(name) { request } else { Request::default() }
}

/// Marks this thread as inside a transaction while it lives: waiting for a glock then is a bug, and asserted.
#[must_use]
pub struct TransactionScope(std::marker::PhantomData<*const ()>);

pub fn transaction_scope() -> TransactionScope {
    TRANSACTIONS.set(TRANSACTIONS.get() + 1);
    TransactionScope(std::marker::PhantomData)
}

impl Drop for TransactionScope {
    fn drop(&mut self) {
        TRANSACTIONS.set(TRANSACTIONS.get() - 1);
    }
}

pub(super) fn assert_no_transaction(name: GlockName) {
    assert!(TRANSACTIONS.get() == 0, "glock {name}: a thread must not wait for a glock inside a transaction");
}

/// Ends the waits of one request, from another thread.
#[derive(Default)]
pub struct CancelToken {
    cancelled: AtomicBool,
    waiting: Mutex<Option<std::thread::Thread>>,
}

impl CancelToken {
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let Some(thread) = &*self.waiting.lock() {
            thread.unpark();
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Runs `f` such that its waits for glocks end with `Error::Interrupted` after [`CancelToken::cancel`].
    pub fn scope<T>(self: &Arc<Self>, f: impl FnOnce() -> T) -> T {
        *self.waiting.lock() = Some(std::thread::current());
        let before = CANCEL.replace(Some(Arc::clone(self)));
        let _restore = Restore({
            let mut before = Some(before);
            move || {
                *self.waiting.lock() = None;
                CANCEL.set(before.take().flatten());
            }
        });
        f()
    }
}

pub(super) fn check_cancelled() -> Result<()> {
    CANCEL.with_borrow(|token| match token {
        Some(token) if token.is_cancelled() => Err(Error::Interrupted),
        _ => Ok(()),
    })
}
