//! What can go wrong below the file system, with the place where it went wrong.

/// Errors of a LUN. No variant is ever retried by the `lun` crate itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LunError {
    #[error("{name}: cannot open: {source}")]
    Open { name: String, source: std::io::Error },
    #[error("{name}: {reason}")]
    Url { name: String, reason: String },
    /// Another open handle on this host excludes ours.
    #[error("{name}: is in use on this host by another mount or program ({held}); end that one first")]
    InUse { name: String, held: &'static str },
    #[error("{name}: no usable partition {part}: {reason}")]
    Partition { name: String, part: u32, reason: String },
    #[error("{name}: {op} of {len} bytes at byte {offset}: {source}")]
    Io { name: String, op: &'static str, offset: u64, len: u64, source: std::io::Error },
    #[error(
        "{name}: {op} of {len} bytes at byte {offset} is outside the device or not a multiple of {sector}"
    )]
    Range { name: String, op: &'static str, offset: u64, len: u64, sector: u32 },
    #[error("{name}: flush: {source}")]
    Flush { name: String, source: std::io::Error },
    /// The permit to write ran out or was withdrawn; nothing was submitted.
    #[error("{name}: not permitted to write: {why}")]
    NotPermitted { name: String, why: String },
    /// The device refused us because another node has fenced us. Final.
    #[error("{name}: reservation conflict: this node has been fenced")]
    Fenced { name: String },
}
