//! The two checksums of the format.
//!
//! CRC-32 (IEEE, reflected, final inversion) hashes names and guards rgrp headers and the first part of log headers;
//! CRC-32C *without* final inversion guards the rest of a log header.

/// Bytes of a log header covered by `lh_hash`.
const LH_HASH_SPAN: usize = 48;
const LH_HASH_AT: usize = 44;
/// First byte covered by `lh_crc`; it reaches to the end of the block.
const LH_CRC_FROM: usize = 52;
const RG_SPAN: usize = 128;
const RG_CRC_AT: usize = 64;

/// Hash of a directory entry's name.
pub fn disk_hash(name: &[u8]) -> u32 {
    crc32fast::hash(name)
}

fn crc32_without(block: &[u8], span: usize, hole: usize) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&block[..hole]);
    h.update(&[0; 4]);
    h.update(&block[hole + 4..span]);
    h.finalize()
}

/// `lh_hash` of a log header block of at least 48 bytes.
pub fn lh_hash(block: &[u8]) -> u32 {
    crc32_without(block, LH_HASH_SPAN, LH_HASH_AT)
}

/// `lh_crc` of a whole log header block.
pub fn lh_crc(block: &[u8]) -> u32 {
    !crc32c::crc32c(&block[LH_CRC_FROM..])
}

/// `rg_crc` of a resource group header (first 128 bytes; the bitmap is not covered).
pub fn rg_crc(block: &[u8]) -> u32 {
    crc32_without(block, RG_SPAN, RG_CRC_AT)
}
