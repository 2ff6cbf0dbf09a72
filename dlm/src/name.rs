//! Names of resources: 1 to 8 components of 1 to 64 bytes. The first component names the *tree*: it alone decides
//! directory slice and master, so all resources below one root have one master (H-1).
//!
//! A name is kept encoded as `len byte… len byte…`; names up to 30 encoded bytes (a GFS2 name is 25) live inline.

use std::fmt;
use std::sync::Arc;

const INLINE: usize = 30;
/// Most components of a name.
pub(crate) const MAX_DEPTH: usize = 8;
/// Most bytes of a component.
pub(crate) const MAX_COMPONENT: usize = 64;

#[derive(Clone)]
enum Repr {
    Inline(u8, [u8; INLINE]),
    Heap(Arc<[u8]>),
}

/// The full name of a resource.
#[derive(Clone)]
pub struct ResName(Repr);

impl ResName {
    /// A name of one component. `None` when it is empty or too long.
    pub fn root_of(component: &[u8]) -> Option<Self> {
        Self::path(&[component])
    }

    pub fn path(components: &[&[u8]]) -> Option<Self> {
        if components.is_empty() || components.len() > MAX_DEPTH {
            return None;
        }
        if components.iter().any(|c| c.is_empty() || c.len() > MAX_COMPONENT) {
            return None;
        }
        if let [c] = components
            && c.len() < INLINE
        {
            let mut b = [0; INLINE];
            b[0] = c.len() as u8;
            b[1..=c.len()].copy_from_slice(c);
            return Some(Self(Repr::Inline(c.len() as u8 + 1, b)));
        }
        let mut v = Vec::new();
        for c in components {
            v.push(c.len() as u8);
            v.extend_from_slice(c);
        }
        Some(Self::from_encoded(&v))
    }

    fn from_encoded(b: &[u8]) -> Self {
        if b.len() <= INLINE {
            let mut a = [0; INLINE];
            a[..b.len()].copy_from_slice(b);
            Self(Repr::Inline(b.len() as u8, a))
        } else {
            Self(Repr::Heap(b.into()))
        }
    }

    /// From bytes of the wire; checks every limit.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let (mut at, mut depth) = (0, 0);
        while at < b.len() {
            let n = b[at] as usize;
            if n == 0 || n > MAX_COMPONENT || at + 1 + n > b.len() || depth == MAX_DEPTH {
                return None;
            }
            at += 1 + n;
            depth += 1;
        }
        (depth > 0).then(|| Self::from_encoded(b))
    }

    pub fn encoded(&self) -> &[u8] {
        match &self.0 {
            Repr::Inline(n, b) => &b[..*n as usize],
            Repr::Heap(b) => b,
        }
    }

    fn root_len(&self) -> usize {
        1 + self.encoded()[0] as usize
    }

    pub fn is_root(&self) -> bool {
        self.root_len() == self.encoded().len()
    }

    /// Name of the tree.
    pub fn root(&self) -> Self {
        if self.is_root() { self.clone() } else { Self::from_encoded(&self.encoded()[..self.root_len()]) }
    }

    /// The name below this one, `None` when a limit is passed.
    pub fn child(&self, component: &[u8]) -> Option<Self> {
        if component.is_empty() || component.len() > MAX_COMPONENT || self.components().count() == MAX_DEPTH {
            return None;
        }
        let mut v = self.encoded().to_vec();
        v.push(component.len() as u8);
        v.extend_from_slice(component);
        Some(Self::from_encoded(&v))
    }

    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.encoded();
        std::iter::from_fn(move || {
            let (&n, tail) = rest.split_first()?;
            let (c, next) = tail.split_at(n as usize);
            rest = next;
            Some(c)
        })
    }

    /// Stable 64-bit hash of the tree name: the same on every node and in every version (FNV-1a, then mixed).
    pub fn root_hash(&self) -> u64 {
        let mut h: u64 = 0xcbf2_9ce4_8422_2325;
        for &b in &self.encoded()[..self.root_len()] {
            h = (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        }
        mix(h)
    }
}

/// The finalizer of SplitMix64: a good 64-bit mixer.
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl PartialEq for ResName {
    fn eq(&self, o: &Self) -> bool {
        self.encoded() == o.encoded()
    }
}
impl Eq for ResName {}
impl PartialOrd for ResName {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for ResName {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        self.encoded().cmp(o.encoded())
    }
}
impl std::hash::Hash for ResName {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.encoded().hash(state);
    }
}

impl fmt::Display for ResName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, c) in self.components().enumerate() {
            if i > 0 {
                f.write_str("/")?;
            }
            for &b in c {
                if (0x20..0x7f).contains(&b) { write!(f, "{}", b as char)? } else { write!(f, "\\x{b:02x}")? }
            }
        }
        Ok(())
    }
}
impl fmt::Debug for ResName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}
