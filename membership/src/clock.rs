//! The clocks, for drivers only: cores get their time as an argument.

use cairn_base::Boottime;
use std::time::{SystemTime, UNIX_EPOCH};

/// Now on CLOCK_BOOTTIME, which goes on while the machine sleeps.
pub fn boottime() -> Boottime {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid timespec for the kernel to fill; the clock exists since Linux 2.6.39.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut ts) };
    assert_eq!(rc, 0, "CLOCK_BOOTTIME must exist");
    Boottime(ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64)
}

/// Seconds since 1970, for display and as the floor of incarnations.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Wall time in units of 2^-20 s: the floor of a new incarnation, never a proof of anything.
pub fn incarnation_floor() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| (d.as_secs() << 20) + (u64::from(d.subsec_micros()) << 20) / 1_000_000)
}
