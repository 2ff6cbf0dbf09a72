//! Buffers that every back end can hand to the device as they are.
//!
//! O_DIRECT wants memory, offset and length aligned to the device's sector; 4096 satisfies every device.
//! A back end copies buffers that are not aligned, so this type is a matter of speed, never of correctness.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of [`AlignedBuf`], in bytes.
pub const ALIGN: usize = 4096;

/// Heap memory at a 4096-byte boundary.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory exclusively, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedBuf {}

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len.max(1), ALIGN).expect("invariant: buffer length below isize::MAX")
}

impl AlignedBuf {
    pub fn zeroed(len: usize) -> Self {
        let layout = layout(len);
        // SAFETY: the layout's size is not zero (see `layout`).
        let raw = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout));
        Self { ptr, len }
    }

    pub fn copy_of(bytes: &[u8]) -> Self {
        let layout = layout(bytes.len());
        // SAFETY: the layout's size is not zero (see `layout`).
        let raw = unsafe { alloc(layout) };
        let ptr = NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: fresh memory of that length, which overlaps nothing; all of it is initialised here.
        unsafe { ptr.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Self { ptr, len: bytes.len() }
    }
}

/// Whether a slice may go to the device without a copy.
pub fn is_aligned(buf: &[u8]) -> bool {
    (buf.as_ptr() as usize).is_multiple_of(ALIGN)
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: ptr is valid for len bytes, initialised and owned by self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` or `copy_of` with the same layout.
        unsafe { dealloc(self.ptr.as_ptr(), layout(self.len)) }
    }
}

impl Clone for AlignedBuf {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_keep_their_bytes() {
        for len in [0usize, 1, 512, 4096, 12345] {
            let mut b = AlignedBuf::zeroed(len);
            assert!(is_aligned(&b) && b.len() == len && b.iter().all(|&x| x == 0));
            if let Some(last) = b.last_mut() {
                *last = 7;
            }
            assert_eq!(b.clone()[..], b[..]);
        }
    }
}
