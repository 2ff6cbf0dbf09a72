//! The shared LUN: what stores blocks, seen the same way from every node.
//!
//! One trait, [`BlockDevice`], synchronous and batched: a call returns when the *device* has answered for
//! every request of the batch. A write that returned is readable by every node, but durable only after
//! [`BlockDevice::flush`] returned. Nothing is retried here: a lost answer is an error, and the caller decides.
//!
//! ```text
//!   file:/path   /dev/…   #part=N        names, opened by `open` (module url)
//!        \         |         /
//!         BlockDevice (trait)             wrappers: Part, Guarded (permit), LoggedLun, FaultLun
//!        /                   \
//!   file.rs (pool, uring)    mem.rs       files and devices; in memory, with a volatile cache and a log
//! ```
//!
//! When a process that writes through [`open`]ed LUNs is gone, its writes are over: see `uring.rs`.

pub mod aligned;
mod error;
pub mod fault;
mod file;
pub mod guard;
pub mod image;
pub mod logged;
mod loops;
pub mod mem;
pub mod part;
mod pool;
pub mod probe;
mod uring;
mod url;

pub use error::LunError;
pub use file::{Direct, Engine, OpenOptions, Share};
pub use url::{Url, WRITE_LOG_ENV, open};

use std::sync::Arc;

pub type Result<T, E = LunError> = std::result::Result<T, E>;

/// One read of a batch. `offset` in bytes; offset and length are multiples of the sector size.
pub struct Read<'a> {
    pub offset: u64,
    pub buf: &'a mut [u8],
}

/// One write of a batch. `offset` in bytes; offset and length are multiples of the sector size.
#[derive(Clone, Copy)]
pub struct Write<'a> {
    pub offset: u64,
    pub buf: &'a [u8],
}

/// A LUN, or a part of one. All methods may be called from many threads at once.
///
/// Buffers need no alignment: a back end that wants alignment copies (callers on the hot path take
/// their buffers from [`aligned`], which never needs the copy).
pub trait BlockDevice: Send + Sync {
    /// Logical sector in bytes: the unit of atomicity and alignment (512 or 4096).
    fn sector_size(&self) -> u32;

    /// Size in bytes, a multiple of the sector size.
    fn size(&self) -> u64;

    /// Human name for messages: the URL it was opened with.
    fn name(&self) -> &str;

    /// All reads of the batch, in any order; returns when all have ended, with the first error.
    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()>;

    /// All writes of the batch, in any order and possibly in parallel. On error an unknown part has landed.
    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()>;

    /// Everything whose write returned before this call is durable when it returns `Ok`.
    /// After an error nothing may be assumed about earlier unflushed writes, ever again.
    fn flush(&self) -> Result<()>;

    /// A write that is durable when it returns (FUA where there is one, else write and flush).
    fn write_durable(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, buf)?;
        self.flush()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_batch(&mut [Read { offset, buf }])
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_batch(&[Write { offset, buf }])
    }
}

/// How a LUN is shared between threads of one process.
pub type Lun = Arc<dyn BlockDevice>;

/// Refuses what is not whole sectors inside the device.
pub(crate) fn check_range(dev: &dyn BlockDevice, op: &'static str, offset: u64, len: usize) -> Result<()> {
    let (len, sector) = (len as u64, dev.sector_size());
    let inside = offset.checked_add(len).is_some_and(|end| end <= dev.size());
    if inside && offset.is_multiple_of(u64::from(sector)) && len.is_multiple_of(u64::from(sector)) {
        return Ok(());
    }
    Err(LunError::Range { name: dev.name().to_owned(), op, offset, len, sector })
}

/// A shared pointer to a device is a device, so that wrappers nest.
impl<D: BlockDevice + ?Sized> BlockDevice for Arc<D> {
    fn sector_size(&self) -> u32 {
        (**self).sector_size()
    }

    fn size(&self) -> u64 {
        (**self).size()
    }

    fn name(&self) -> &str {
        (**self).name()
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        (**self).read_batch(batch)
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        (**self).write_batch(batch)
    }

    fn flush(&self) -> Result<()> {
        (**self).flush()
    }

    fn write_durable(&self, offset: u64, buf: &[u8]) -> Result<()> {
        (**self).write_durable(offset, buf)
    }
}
