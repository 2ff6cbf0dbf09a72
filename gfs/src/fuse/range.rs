//! Sets of page numbers as ranges.

/// Pages `first..=last`; `last` may be [`Pages::END`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pages {
    pub(super) first: u64,
    pub(super) last: u64,
}

pub(super) const PAGE: u64 = 4096;

impl Pages {
    pub(super) const END: u64 = u64::MAX;
    pub(super) const ALL: Self = Self { first: 0, last: Self::END };

    /// The pages that bytes `offset..offset + len` touch.
    pub(super) fn of(offset: u64, len: u64) -> Self {
        let last = offset.saturating_add(len.saturating_sub(1));
        Self { first: offset / PAGE, last: last / PAGE }
    }

    pub(super) fn page(number: u64) -> Self {
        Self { first: number, last: number }
    }

    /// What is left without one page.
    pub(super) fn without(self, page: Option<u64>) -> impl Iterator<Item = Self> {
        let page = page.filter(|page| (self.first..=self.last).contains(page));
        let before = page.and_then(|p| p.checked_sub(1)).map(|last| Self { last, ..self });
        let after = page.and_then(|p| p.checked_add(1)).map(|first| Self { first, ..self });
        let whole = page.is_none().then_some(self);
        [whole, before, after].into_iter().flatten().filter(|pages| pages.first <= pages.last)
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether these bytes are whole pages, as the kernel reads them for its cache.
    pub(super) fn are_whole(offset: u64, len: u64) -> bool {
        offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE)
    }

    /// (offset, length) in bytes; length 0 is "to the end".
    pub(super) fn bytes(self) -> (u64, u64) {
        if self.last == Self::END {
            (self.first * PAGE, 0)
        } else {
            (self.first * PAGE, (self.last - self.first + 1) * PAGE)
        }
    }
}

/// Disjoint ranges in ascending order. With too many of them neighbours are joined: the set may grow, never shrink.
#[derive(Default, Debug, Clone)]
pub(super) struct RangeSet(Vec<Pages>);

const MAX_RANGES: usize = 128;

impl RangeSet {
    pub(super) fn all() -> Self {
        Self(vec![Pages::ALL])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Pages> {
        self.0.iter().copied()
    }

    pub(super) fn overlaps(&self, pages: Pages) -> bool {
        self.0.iter().any(|p| p.overlaps(pages))
    }

    pub(super) fn insert(&mut self, mut pages: Pages) {
        self.0.retain(|p| {
            let joined = p.first <= pages.last.saturating_add(1) && pages.first <= p.last.saturating_add(1);
            if joined {
                pages.first = pages.first.min(p.first);
                pages.last = pages.last.max(p.last);
            }
            !joined
        });
        let at = self.0.partition_point(|p| p.first < pages.first);
        self.0.insert(at, pages);
        if self.0.len() > MAX_RANGES {
            let next = self.0.remove(at.max(1));
            self.0[at.max(1) - 1].last = next.last;
        }
    }

    pub(super) fn remove(&mut self, pages: Pages) {
        let mut rest = Vec::with_capacity(self.0.len() + 1);
        for p in &self.0 {
            if !p.overlaps(pages) {
                rest.push(*p);
                continue;
            }
            if p.first < pages.first {
                rest.push(Pages { first: p.first, last: pages.first - 1 });
            }
            if p.last > pages.last {
                rest.push(Pages { first: pages.last + 1, last: p.last });
            }
        }
        self.0 = rest;
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_without_one() {
        let left = |first, last, page| {
            Pages { first, last }.without(page).map(|p| (p.first, p.last)).collect::<Vec<_>>()
        };
        assert_eq!(left(3, 9, None), [(3, 9)]);
        assert_eq!(left(3, 9, Some(2)), [(3, 9)]);
        assert_eq!(left(3, 9, Some(5)), [(3, 4), (6, 9)]);
        assert_eq!(left(3, 9, Some(3)), [(4, 9)]);
        assert_eq!(left(0, 9, Some(0)), [(1, 9)]);
        assert_eq!(left(3, 9, Some(9)), [(3, 8)]);
        assert_eq!(left(3, 3, Some(3)), []);
    }

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        let mut set = RangeSet::default();
        for &(first, last) in ranges {
            set.insert(Pages { first, last });
        }
        set
    }

    #[test]
    fn neighbours_join_and_removal_splits() {
        let mut s = set(&[(5, 6), (0, 1), (2, 3), (8, 9)]);
        assert_eq!(s.0, set(&[(0, 3), (5, 6), (8, 9)]).0);
        s.remove(Pages { first: 1, last: 5 });
        assert_eq!(s.0, set(&[(0, 0), (6, 6), (8, 9)]).0);
        let mut all = RangeSet::all();
        all.remove(Pages { first: 3, last: 3 });
        assert_eq!(all.0, [Pages { first: 0, last: 2 }, Pages { first: 4, last: Pages::END }]);
        assert_eq!(all.0[1].bytes(), (4 * PAGE, 0));
    }

    #[test]
    fn full_set_covers_at_least_what_was_inserted() {
        let mut s = RangeSet::default();
        for n in (0..400).rev() {
            s.insert(Pages { first: n * 3, last: n * 3 });
        }
        assert!(s.0.len() <= MAX_RANGES);
        assert!((0..400).all(|n| s.overlaps(Pages { first: n * 3, last: n * 3 })));
        assert!(s.0.windows(2).all(|w| w[0].last < w[1].first));
    }
}
