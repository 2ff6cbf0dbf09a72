//! Errors of the file system, and the one place where they become errno or a withdraw.

use crate::types::{BlockNo, JournalId};
use std::sync::Arc;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every way an operation can fail. Three outcomes only: answer an errno, withdraw this mount, stop the node.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An ordinary answer to the caller: ENOENT, EEXIST, ENOSPC, …
    #[error("errno {0}")]
    Errno(i32),
    /// The disk holds something that cannot be: EIO for this caller, other files stay readable.
    #[error("block {block}: {what}")]
    Corrupt { block: BlockNo, what: String },
    /// A journal cannot be read or replayed.
    #[error("journal {jid}, journal block {at}: {what}")]
    Journal { jid: JournalId, at: u32, what: String },
    /// The LUN failed. A failed log write or flush withdraws the mount.
    #[error(transparent)]
    Lun(Arc<lun::LunError>),
    /// The volume cannot be mounted; the text names the thing and the cure.
    #[error("{0}")]
    Mount(String),
    /// The lock manager refused or is gone.
    #[error("glock {name}: {what}")]
    Lock { name: String, what: String },
    /// A no-wait caller would have had to wait. Never leaves the process.
    #[error("would block")]
    WouldBlock,
    /// The caller was interrupted by a signal while it waited.
    #[error("interrupted")]
    Interrupted,
    /// This mount has stopped itself; everything answers EIO.
    #[error("withdrawn: {0}")]
    Withdrawn(String),
}

impl From<lun::LunError> for Error {
    fn from(e: lun::LunError) -> Self {
        Self::Lun(Arc::new(e))
    }
}

impl Error {
    /// What the caller of the operation sees.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Errno(e) => *e,
            Self::Corrupt { .. }
            | Self::Journal { .. }
            | Self::Lun(_)
            | Self::Lock { .. }
            | Self::Withdrawn(_) => libc::EIO,
            Self::Mount(_) => libc::EINVAL,
            Self::WouldBlock => libc::EAGAIN,
            Self::Interrupted => libc::EINTR,
        }
    }
}
