//! One bit for each data block of a group: may it be given out now?

const WORD: u32 = 64;
/// How many candidate runs an allocation looks at before it takes the longest seen.
const LOOK_AHEAD: usize = 64;

pub(super) struct FreeMap {
    words: Vec<u64>,
    /// Blocks of the group.
    len: u32,
    count: u32,
}

impl FreeMap {
    pub(super) fn new(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(WORD) as usize], len, count: 0 }
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Adds the free blocks of a piece of the on-disk bitmap that begins at block `first`.
    pub(super) fn set_from_bitmap(&mut self, first: u32, bits: &[u8]) {
        use crate::ondisk::bitmap::{BlockState, find, run};
        let end = bits.len() * 4;
        let mut k = 0;
        while let Some(at) = find(bits, k, end, BlockState::Free) {
            let n = run(bits, at, end, BlockState::Free);
            self.add(first + at as u32, n as u32);
            k = at + n;
        }
    }

    fn contains(&self, k: u32) -> bool {
        self.words[(k / WORD) as usize] >> (k % WORD) & 1 == 1
    }

    /// Runs `f` on each word touched by `n` blocks from `k` on, with the mask of those blocks.
    fn each_word(&mut self, k: u32, n: u32, mut f: impl FnMut(&mut u64, u64)) {
        assert!(k.checked_add(n).is_some_and(|end| end <= self.len), "blocks {k}+{n} of {}", self.len);
        let (mut k, end) = (k, k + n);
        while k < end {
            let here = (WORD - k % WORD).min(end - k);
            let mask = (u64::MAX >> (WORD - here)) << (k % WORD);
            f(&mut self.words[(k / WORD) as usize], mask);
            k += here;
        }
    }

    pub(super) fn add(&mut self, k: u32, n: u32) {
        let mut added = 0;
        self.each_word(k, n, |w, mask| {
            added += (mask & !*w).count_ones();
            *w |= mask;
        });
        assert_eq!(added, n, "blocks {k}+{n} were free already");
        self.count += n;
    }

    pub(super) fn remove(&mut self, k: u32, n: u32) {
        let mut removed = 0;
        self.each_word(k, n, |w, mask| {
            removed += (mask & *w).count_ones();
            *w &= !mask;
        });
        assert_eq!(removed, n, "blocks {k}+{n} were not free");
        self.count -= n;
    }

    fn next_set(&self, from: u32) -> Option<u32> {
        let mut k = from;
        while k < self.len {
            let w = self.words[(k / WORD) as usize] >> (k % WORD);
            if w != 0 {
                let found = k + w.trailing_zeros();
                return (found < self.len).then_some(found);
            }
            k = (k / WORD + 1) * WORD;
        }
        None
    }

    /// Length of the run that begins at `k`, at most `max`.
    fn run(&self, k: u32, max: u32) -> u32 {
        let mut n = 0;
        while n < max && k + n < self.len {
            let at = k + n;
            let ones = (self.words[(at / WORD) as usize] >> (at % WORD)).trailing_ones();
            n += ones;
            if ones < WORD - at % WORD {
                break;
            }
        }
        n.min(max).min(self.len - k)
    }

    /// A run of 1 to `n` blocks: at `from` when that block is free; else the first long enough one behind it, round the
    /// group; else the longest of those looked at.
    pub(super) fn find_run(&self, from: u32, n: u32) -> Option<(u32, u32)> {
        if self.count == 0 {
            return None;
        }
        if from < self.len && self.contains(from) {
            return Some((from, self.run(from, n)));
        }
        let mut best: Option<(u32, u32)> = None;
        let mut looks = 0;
        for (begin, end) in [(from.min(self.len), self.len), (0, from.min(self.len))] {
            let mut k = begin;
            while let Some(at) = self.next_set(k).filter(|&at| at < end) {
                let len = self.run(at, n);
                if best.is_none_or(|(_, b)| len > b) {
                    best = Some((at, len));
                }
                looks += 1;
                if len == n || looks == LOOK_AHEAD {
                    return best;
                }
                k = at + len;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain array of booleans.
        #[test]
        fn agrees_with_a_model(len in 4u32..400, ops in prop::collection::vec((any::<bool>(), any::<u32>(), 1u32..90), 1..60)) {
            let mut map = FreeMap::new(len);
            let mut model = vec![false; len as usize];
            for (add, at, n) in ops {
                let k = at % len;
                if add {
                    let n = (k..len.min(k + n)).take_while(|&i| !model[i as usize]).count() as u32;
                    map.add(k, n);
                    model[k as usize..(k + n) as usize].fill(true);
                } else if let Some((k2, got)) = map.find_run(k, n) {
                    prop_assert!(got >= 1 && got <= n);
                    prop_assert!(model[k2 as usize..(k2 + got) as usize].iter().all(|&x| x));
                    if model[k as usize] {
                        prop_assert_eq!(k2, k);
                    }
                    map.remove(k2, got);
                    model[k2 as usize..(k2 + got) as usize].fill(false);
                } else {
                    prop_assert!(model.iter().all(|&x| !x));
                }
                prop_assert_eq!(map.count() as usize, model.iter().filter(|&&x| x).count());
            }
        }
    }
}
