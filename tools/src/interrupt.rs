//! SIGINT, SIGTERM and SIGHUP while a cluster is made or shown: noticed where something is waited for, so that whoever began it can end it.

use crate::local::{Doing, Failure, Result, fail};
use nix::sys::signal::Signal;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

static CAUGHT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// From now on these signals are noted and do not end the process. Those that the caller ignores (nohup) stay ignored.
pub(crate) fn catch() -> Result<()> {
    let caught = CAUGHT.get_or_init(Arc::default);
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        if is_ignored(signal) {
            continue;
        }
        signal_hook::flag::register_usize(signal as i32, Arc::clone(caught), signal as usize)
            .doing(signal)?;
    }
    Ok(())
}

fn is_ignored(signal: Signal) -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only asks; the kernel fills the structure.
    unsafe {
        libc::sigaction(signal as i32, std::ptr::null(), now.as_mut_ptr()) == 0
            && now.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// The last signal that came.
pub(crate) fn caught() -> Option<i32> {
    let signal = CAUGHT.get()?.load(Ordering::Relaxed);
    (signal != 0).then_some(signal as i32)
}

/// An error once a signal has come.
pub(crate) fn check() -> Result<()> {
    match caught() {
        None => Ok(()),
        Some(n) => fail(format!("interrupted by {}", Signal::try_from(n).map_or("a signal", Signal::as_str))),
    }
}

/// What made this fail: a signal, if one came (our children may have got it too), else the error itself.
pub(crate) fn cause(e: Failure) -> Failure {
    check().err().unwrap_or(e)
}

/// Sleeps, or fails once a signal has come.
pub(crate) fn pause(time: Duration) -> Result<()> {
    check()?;
    std::thread::sleep(time);
    Ok(())
}

/// Exit status of a command that a signal ended in order, as shells give it.
pub(crate) fn exit_code(signal: i32) -> i32 {
    128 + signal
}
