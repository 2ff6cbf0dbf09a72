//! Exit codes of the commands, in one place (for people: docs/runbook.md, *Exit codes*).

/// Done.
pub const OK: i32 = 0;
/// Refused or failed; the message says what and what to do.
pub const FAILED: i32 = 1;
/// Wrong usage: an unknown option, a missing argument, a value out of range. Nothing was looked at.
pub const USAGE: i32 = 2;

/// Those of mount(8).
pub mod mount {
    /// Wrong usage, or not permitted to mount.
    pub const USAGE: i32 = 1;
    /// The system lacks something: /dev/fuse, memory.
    pub const SYSTEM: i32 = 2;
    /// The volume cannot be mounted.
    pub const FAILED: i32 = 32;
    /// A mount in the foreground was ended by its node.
    pub const ENDED: i32 = 33;
}

/// Those of fsck(8).
pub mod fsck {
    /// Faults were mended: journals have been replayed, the volume is clean now.
    pub const REPLAYED: i32 = 1;
    /// Faults are left.
    pub const FAULTS: i32 = 4;
    /// The LUN cannot be opened, is in use, or fails.
    pub const FAILED: i32 = 8;
    /// Wrong usage.
    pub const USAGE: i32 = 16;
}
