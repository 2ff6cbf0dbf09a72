//! What the kernel has of each inode, as far as this side must know it.

use super::traffic::Traffic;
use crate::ops::Attr;
use crate::{BlockNo, InodeNo};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// One inode that the kernel knows, or is about to.
#[derive(Default)]
pub(super) struct Node {
    /// References that the kernel owes a FORGET for. Changed under the shard's lock.
    lookups: AtomicU64,
    /// Generation of the inode at this address, by the last reply that made it known; 0 before.
    generation: AtomicU64,
    /// The kernel owes FORGETs for an earlier inode at the address as well: which of the two a notification finds is not known.
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

    /// True when the kernel has no such inode before this.
    fn known_as(&self, generation: u64) -> bool {
        let before = self.generation.swap(generation, Ordering::AcqRel);
        if before != 0 && before != generation {
            self.mixed.store(true, Ordering::Release);
        }
        self.lookups.fetch_add(1, Ordering::AcqRel) == 0
    }
}

const SHARDS: usize = 16;

/// All inodes that the kernel knows.
pub(super) struct Nodes {
    shards: [RwLock<FxHashMap<BlockNo, Arc<Node>>>; SHARDS],
}

impl Nodes {
    pub(super) fn new() -> Self {
        Self { shards: std::array::from_fn(|_| RwLock::default()) }
    }

    fn shard(&self, ino: BlockNo) -> &RwLock<FxHashMap<BlockNo, Arc<Node>>> {
        &self.shards[ino.0 as usize % SHARDS]
    }

    pub(super) fn find(&self, ino: BlockNo) -> Option<Arc<Node>> {
        self.shard(ino).read().get(&ino).cloned()
    }

    pub(super) fn get(&self, ino: BlockNo) -> Arc<Node> {
        if let Some(node) = self.find(ino) {
            return node;
        }
        Arc::clone(self.shard(ino).write().entry(ino).or_default())
    }

    /// The kernel is about to be told of the inode; true when it does not know it yet.
    pub(super) fn remember(&self, ino: InodeNo) -> (Arc<Node>, bool) {
        {
            let shard = self.shard(ino.addr).read();
            if let Some(node) = shard.get(&ino.addr) {
                return (Arc::clone(node), node.known_as(ino.formal));
            }
        }
        let mut shard = self.shard(ino.addr).write();
        let node = shard.entry(ino.addr).or_default();
        (Arc::clone(node), node.known_as(ino.formal))
    }

    pub(super) fn forget(&self, ino: BlockNo, times: u64) {
        let mut shard = self.shard(ino).write();
        let Some(node) = shard.get(&ino) else { return };
        let left = node.lookups.load(Ordering::Acquire).saturating_sub(times);
        node.lookups.store(left, Ordering::Release);
        if left == 0 && node.writers.load(Ordering::Acquire) == 0 {
            shard.remove(&ino);
        }
    }
}
