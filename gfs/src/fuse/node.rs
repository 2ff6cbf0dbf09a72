//! What the kernel has of each inode, as far as this side must know it; and the number by which both call it.
//!
//! The kernel takes one number for node id and `st_ino` from us. It is made of the block of the dinode and of low bits of its formal number
//!
//! ```text
//!   bit 63   62 … 44                        43 … 0
//!   0        low bits of no_formal_ino      no_addr
//! ```
//!
//! which every directory entry carries too: so all nodes show the same, at any time, and no two inodes that exist have the same. A block that is used
//! again gets another number: with that of the deleted inode the kernel would give the old one up in the middle of a call that has just found it, and
//! answer EIO. Formal numbers count up in each resource group, so this is left for an inode that is exactly a multiple of 2^19 creations younger than
//! one that another node deleted and this kernel has not forgotten.

use super::size::{KernelSize, Shrink};
use super::traffic::Traffic;
use crate::ops::Attr;
use crate::{BlockNo, InodeNo};
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Bits of a number that are the address: 64 PiB of blocks of 4096 bytes. Larger volumes are not mounted.
const ADDRESS_BITS: u32 = 44;
/// The sign bit stays clear, for programs that print or store numbers as signed ones.
const FORMAL_BITS: u32 = 63 - ADDRESS_BITS;
/// Addresses of a volume end below this.
pub(super) const MAX_BLOCKS: u64 = 1 << ADDRESS_BITS;

/// What of the formal number is in the number.
const fn formal_part(formal: u64) -> u64 {
    formal & ((1 << FORMAL_BITS) - 1)
}

/// `st_ino`, and but for the root the node id.
pub(super) const fn number(no: InodeNo) -> u64 {
    (formal_part(no.formal) << ADDRESS_BITS) | (no.addr.0 & (MAX_BLOCKS - 1))
}

/// One inode that the kernel knows, or is about to.
#[derive(Default)]
pub(super) struct Node {
    /// References that the kernel owes a FORGET for. Changed under the shard's lock.
    lookups: AtomicU64,
    /// Formal number of the inode, by the last reply that made it known; 0 before.
    formal: AtomicU64,
    /// The kernel owes FORGETs for an earlier inode of the same number as well: which of the two a notification finds is not known.
    mixed: AtomicBool,
    /// When a reply that may create the kernel's inode last gave its attributes a lifetime, in microseconds of the mount.
    pub(super) entry_at: AtomicU64,
    /// A reply has given the attributes a lifetime since the kernel was last told to drop them.
    pub(super) keeps_attributes: AtomicBool,
    /// What the last reply said of its attributes, and since when replies have said the same, in microseconds of the mount.
    told: Mutex<Option<(Attr, u64)>>,
    /// Handles that may map pages for writing, counted from OPEN's arrival to RELEASE's.
    pub(super) writers: AtomicU32,
    /// Greatest epoch in which a name of this directory was handed out with a lifetime; 0 is never.
    pub(super) names_epoch: AtomicU64,
    /// When the glock was last given up, in microseconds of the mount; 0 is never.
    pub(super) demoted_at: AtomicU64,
    pub(super) traffic: Traffic,
    /// A READ of pages was answered without the kernel's size being right: handles for reading that are opened from then on do not use pages.
    pub(super) reads_direct: AtomicBool,
    /// The size in the kernel's inode.
    pub(super) size: Mutex<KernelSize>,
    /// Work on it for READs.
    pub(super) shrink: Mutex<Option<Arc<Shrink>>>,
    /// Owners that have locked byte ranges.
    pub(super) lock_owners: Mutex<BTreeSet<u64>>,
}

impl Node {
    pub(super) fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::Acquire)
    }

    pub(super) fn is_mixed(&self) -> bool {
        self.mixed.load(Ordering::Acquire)
    }

    /// The kernel is about to be told of these attributes at `now`; for how many microseconds it has been told the same.
    pub(super) fn tell(&self, attr: &Attr, now: u64) -> u64 {
        let mut told = self.told.lock();
        match &*told {
            Some((before, since)) if before == attr => now.saturating_sub(*since),
            _ => {
                *told = Some((*attr, now));
                0
            }
        }
    }

    pub(super) fn last_told(&self) -> Option<Attr> {
        self.told.lock().as_ref().map(|(attr, _)| *attr)
    }

    /// The kernel throws away what it was told last.
    pub(super) fn untell(&self) {
        *self.told.lock() = None;
    }

    /// How many references the kernel had before this one, and whether they are to an earlier inode of the same number.
    fn known_as(&self, formal: u64) -> (u64, bool) {
        let before = self.formal.swap(formal, Ordering::AcqRel);
        let lookups = self.lookups.fetch_add(1, Ordering::AcqRel);
        let other = lookups > 0 && before != formal;
        if other {
            self.mixed.store(true, Ordering::Release);
        }
        (lookups, other)
    }
}

/// What a reply is about to make of an inode.
pub(super) struct Told {
    pub(super) node: Arc<Node>,
    /// The kernel does not know it yet.
    pub(super) first: bool,
    /// FORGETs that will name it, beside the one for this reply, and are for an earlier inode of the same number.
    pub(super) inherited: u64,
}

/// By address first, so that all that the kernel may know of a block stand together.
type Key = (BlockNo, u64);

fn key(no: InodeNo) -> Key {
    (no.addr, formal_part(no.formal))
}

const SHARDS: usize = 16;

/// All inodes that the kernel knows.
pub(super) struct Nodes {
    root: InodeNo,
    shards: [RwLock<BTreeMap<Key, Arc<Node>>>; SHARDS],
}

impl Nodes {
    pub(super) fn new(root: InodeNo) -> Self {
        Self { root, shards: std::array::from_fn(|_| RwLock::default()) }
    }

    /// The kernel's name of an inode: the root of a mount is always 1.
    pub(super) fn id(&self, no: InodeNo) -> u64 {
        if key(no) == key(self.root) { fuser::INodeNo::ROOT.0 } else { number(no) }
    }

    /// The inode that the kernel names. One that it cannot know has formal number 0, which no inode has.
    pub(super) fn no(&self, id: u64) -> InodeNo {
        if id == fuser::INodeNo::ROOT.0 {
            return self.root;
        }
        let (addr, part) = (BlockNo(id & (MAX_BLOCKS - 1)), formal_part(id >> ADDRESS_BITS));
        let shard = self.shard(addr).read();
        InodeNo {
            addr,
            formal: shard.get(&(addr, part)).map_or(0, |node| node.formal.load(Ordering::Acquire)),
        }
    }

    fn shard(&self, addr: BlockNo) -> &RwLock<BTreeMap<Key, Arc<Node>>> {
        &self.shards[addr.0 as usize % SHARDS]
    }

    pub(super) fn find(&self, no: InodeNo) -> Option<Arc<Node>> {
        self.shard(no.addr).read().get(&key(no)).cloned()
    }

    /// All that the kernel may know of this block: the inode that is there, and deleted ones.
    pub(super) fn at(&self, addr: BlockNo) -> Vec<(u64, Arc<Node>)> {
        let shard = self.shard(addr).read();
        let of_block = shard.range((addr, 0)..=(addr, u64::MAX));
        let id = |part| self.id(InodeNo { addr, formal: part });
        of_block.map(|((_, part), node)| (id(*part), Arc::clone(node))).collect()
    }

    pub(super) fn get(&self, no: InodeNo) -> Arc<Node> {
        if let Some(node) = self.find(no) {
            return node;
        }
        Arc::clone(self.shard(no.addr).write().entry(key(no)).or_default())
    }

    /// The kernel is about to be told of the inode.
    pub(super) fn remember(&self, no: InodeNo) -> Told {
        let told = |node: &Arc<Node>| {
            let (lookups, other) = node.known_as(no.formal);
            Told { node: Arc::clone(node), first: lookups == 0, inherited: if other { lookups } else { 0 } }
        };
        if let Some(node) = self.shard(no.addr).read().get(&key(no)) {
            return told(node);
        }
        told(self.shard(no.addr).write().entry(key(no)).or_default())
    }

    pub(super) fn forget(&self, no: InodeNo, times: u64) {
        let mut shard = self.shard(no.addr).write();
        let Some(node) = shard.get(&key(no)) else { return };
        let left = node.lookups.load(Ordering::Acquire).saturating_sub(times);
        node.lookups.store(left, Ordering::Release);
        if left == 0 && node.writers.load(Ordering::Acquire) == 0 {
            shard.remove(&key(no));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no(addr: u64, formal: u64) -> InodeNo {
        InodeNo { addr: BlockNo(addr), formal }
    }

    const ROOT: InodeNo = InodeNo { addr: BlockNo(20), formal: 5 };

    #[test]
    fn numbers_name_one_inode_and_change_with_it() {
        let last = no(MAX_BLOCKS - 1, u64::MAX);
        assert_eq!(number(last), i64::MAX as u64, "all bits but the sign");
        assert_eq!(number(no(77, 1)), number(no(77, 1 + (1 << FORMAL_BITS))), "so far apart");
        let nodes = Nodes::new(ROOT);
        let all = [ROOT, no(77, 1), no(77, 2), no(78, 1), no(77, 1 << 18), no(77, (1 << 40) + 3), last];
        for inode in all {
            assert_eq!(nodes.no(nodes.id(inode)).formal, if inode == ROOT { 5 } else { 0 }, "not known yet");
            assert!(nodes.remember(inode).first);
        }
        for inode in all {
            assert_eq!(nodes.no(nodes.id(inode)), inode);
        }
        assert_eq!((nodes.id(ROOT), number(ROOT)), (1, (5 << 44) + 20));
        let at = nodes.at(BlockNo(77));
        assert_eq!(
            at.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [all[1], all[2], all[5], all[4]].map(number)
        );
        assert_eq!(
            nodes.at(ROOT.addr).iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [1],
            "as the kernel knows it"
        );
        nodes.forget(all[1], 1);
        assert_eq!((nodes.no(number(all[1])).formal, nodes.no(number(all[2]))), (0, all[2]));
    }

    /// The one case in which two inodes share a number: what the kernel owes for the first is inherited by the second.
    #[test]
    fn a_number_used_again_is_told_as_mixed() {
        let nodes = Nodes::new(ROOT);
        let (old, new) = (no(77, 9), no(77, 9 + (1 << FORMAL_BITS)));
        nodes.remember(old);
        assert_eq!(nodes.remember(old).inherited, 0);
        let told = nodes.remember(new);
        assert!(!told.first && told.node.is_mixed());
        assert_eq!((told.inherited, nodes.remember(new).inherited), (2, 0));
        assert_eq!(nodes.no(number(old)), new);
        nodes.forget(new, 4);
        assert_eq!(nodes.no(number(new)).formal, 0);
        let told = nodes.remember(new);
        assert!(told.first && !told.node.is_mixed());
    }
}
