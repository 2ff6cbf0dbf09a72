//! Two bits per block, four blocks per byte, the first block in the least significant bits.
//!
//! All calls work on the bitmap bytes of one header block (a [`super::rindex::BitmapPart`]) or of a whole group joined together.

/// State of a block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[repr(u8)]
pub enum BlockState {
    Free = 0,
    /// Data, indirect, leaf, hash table, attribute and log blocks.
    Used = 1,
    /// Dinode without links that is not yet deallocated.
    Unlinked = 2,
    Dinode = 3,
}

impl BlockState {
    pub fn from_bits(v: u8) -> Self {
        match v & 3 {
            0 => Self::Free,
            1 => Self::Used,
            2 => Self::Unlinked,
            _ => Self::Dinode,
        }
    }

    /// May a block go from this state to `next`? Any other change is corruption.
    pub fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Free, Self::Used | Self::Dinode)
                | (Self::Used | Self::Unlinked, Self::Free)
                | (Self::Dinode, Self::Unlinked | Self::Free)
        )
    }
}

/// State of block `k`.
pub fn get(bits: &[u8], k: usize) -> BlockState {
    BlockState::from_bits(bits[k / 4] >> (2 * (k % 4)))
}

pub fn set(bits: &mut [u8], k: usize, state: BlockState) {
    let shift = 2 * (k % 4);
    let byte = &mut bits[k / 4];
    *byte = (*byte & !(3 << shift)) | ((state as u8) << shift);
}

const EVEN: u64 = 0x5555_5555_5555_5555;

/// One bit (the even one) for each of 32 blocks whose state is `state`.
fn matches(word: u64, state: BlockState) -> u64 {
    let x = word ^ (EVEN * state as u64);
    !(x | (x >> 1)) & EVEN
}

fn word(bits: &[u8], byte: usize) -> (u64, usize) {
    let n = (bits.len() - byte).min(8);
    let mut w = [0u8; 8];
    w[..n].copy_from_slice(&bits[byte..byte + n]);
    (u64::from_le_bytes(w), n * 4)
}

/// First block at or after `from` and before `end` in state `state`.
pub fn find(bits: &[u8], from: usize, end: usize, state: BlockState) -> Option<usize> {
    let end = end.min(bits.len() * 4);
    let mut k = from;
    while k < end {
        let byte = k / 4;
        let (w, valid) = word(bits, byte);
        let skip = k - byte * 4;
        let hits = matches(w, state) & (u64::MAX << (2 * skip));
        if hits != 0 {
            let found = byte * 4 + hits.trailing_zeros() as usize / 2;
            // a hit in the zero padding behind the last byte is none
            return (found < end).then_some(found);
        }
        k = byte * 4 + valid;
    }
    None
}

/// Length of the run of blocks in state `state` that begins at `from`, at most up to `end`.
pub fn run(bits: &[u8], from: usize, end: usize, state: BlockState) -> usize {
    let end = end.min(bits.len() * 4);
    let mut k = from;
    while k < end {
        let byte = k / 4;
        let (w, valid) = word(bits, byte);
        let skip = k - byte * 4;
        let misses = (!matches(w, state) & EVEN) & (u64::MAX << (2 * skip));
        if misses != 0 {
            return (byte * 4 + misses.trailing_zeros() as usize / 2).min(end) - from;
        }
        k = byte * 4 + valid;
    }
    end.saturating_sub(from)
}

/// Number of blocks in each state, indexed by state.
pub fn count(bits: &[u8]) -> [u64; 4] {
    let mut n = [0u64; 4];
    for chunk in bits.chunks(8) {
        let (w, valid) = word(chunk, 0);
        for state in [BlockState::Used, BlockState::Unlinked, BlockState::Dinode] {
            n[state as usize] += u64::from(matches(w, state).count_ones());
        }
        n[0] += valid as u64;
    }
    n[0] -= n[1] + n[2] + n[3];
    n
}
