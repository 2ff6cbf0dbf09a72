//! Everything that can be wrong with a volume, one variant each. Numbers are block addresses; an inode is named by its dinode's.

use crate::ondisk::bitmap::BlockState;
use crate::ondisk::statfs::StatfsChange;

/// How bad a fault is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub enum Severity {
    /// The next mount or sweep puts it right; no structure is wrong.
    Unfinished,
    /// Something contradicts the format.
    Damage,
}

#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, thiserror::Error)]
#[serde(tag = "fault")]
#[non_exhaustive]
pub enum Fault {
    #[error("superblock: {why}")]
    Superblock { why: String },
    #[error("resource group index: {why}")]
    Rindex { why: String },
    #[error("resource group {rgrp}: block {block}: {why}")]
    RgrpHeader { rgrp: u64, block: u64, why: String },
    #[error("resource group {rgrp}: {field} is {found}, the index says {wanted}")]
    RgrpCopy { rgrp: u64, field: &'static str, found: u64, wanted: u64 },
    #[error("resource group {rgrp}: rg_free is {found}, the bitmap has {counted} free blocks")]
    RgrpFree { rgrp: u64, found: u64, counted: u64 },
    #[error("resource group {rgrp}: rg_dinodes is {found}, the bitmap has {counted} dinodes")]
    RgrpDinodes { rgrp: u64, found: u64, counted: u64 },
    #[error("block {block}: the bitmap says {bitmap:?}, but it is {found:?}")]
    Bitmap { block: u64, bitmap: BlockState, found: BlockState },
    #[error("inode {inode}: {why}")]
    Dinode { inode: u64, why: String },
    #[error("inode {inode}: mode {mode:o} has no known type")]
    Mode { inode: u64, mode: u32 },
    #[error("inode {inode}: allocation goal {goal} is not inside the volume")]
    Goal { inode: u64, goal: u64 },
    #[error("inode {inode}: di_blocks is {found}, it owns {counted}")]
    BlockCount { inode: u64, found: u64, counted: u64 },
    #[error("inode {inode}: points at {pointer}, which is no data block of a resource group")]
    Pointer { inode: u64, pointer: u64 },
    #[error("block {block} has an owner already and is also used by inode {inode}")]
    Duplicate { inode: u64, block: u64 },
    #[error("inode {inode}: block {block} of its tree: {why}")]
    TreeBlock { inode: u64, block: u64, why: String },
    #[error("inode {inode}: a truncate was not finished")]
    TruncateUnfinished { inode: u64 },
    #[error("inode {inode}: has no names and waits to be freed")]
    Orphan { inode: u64 },
    #[error("directory {dir}: size is {found}, should be {wanted}")]
    DirSize { dir: u64, found: u64, wanted: u64 },
    #[error("directory {dir}: block {block}: {why}")]
    DirRecord { dir: u64, block: u64, why: String },
    #[error("directory {dir}: hash of {name:?} in block {block} is {found:#010x}, should be {wanted:#010x}")]
    EntryHash { dir: u64, block: u64, name: String, found: u32, wanted: u32 },
    #[error("directory {dir}: {name:?} stands in leaf {leaf}, where its hash does not lead")]
    EntryLeaf { dir: u64, leaf: u64, name: String },
    #[error("directory {dir}: {name:?} is there twice")]
    DuplicateName { dir: u64, name: String },
    #[error("directory {dir}: di_entries is {found}, it has {counted}")]
    DirEntries { dir: u64, found: u64, counted: u64 },
    #[error("directory {dir}: leaf {leaf}: lf_entries is {found}, it has {counted}")]
    LeafEntries { dir: u64, leaf: u64, found: u64, counted: u64 },
    #[error("directory {dir}: leaf {leaf}: lf_depth is {found}, the hash table says {wanted}")]
    LeafDepth { dir: u64, leaf: u64, found: u16, wanted: u16 },
    #[error("directory {dir}: hash table: {why}")]
    HashTable { dir: u64, why: String },
    #[error("directory {dir}: entry {name:?} is missing or appears more than once")]
    DotEntry { dir: u64, name: &'static str },
    #[error("directory {dir}: {name:?} leads to {target}, where no inode is")]
    Dangling { dir: u64, name: String, target: u64 },
    #[error("directory {dir}: {name:?} has inode number {formal}, the inode at {target} has {found}")]
    EntryFormal { dir: u64, name: String, target: u64, formal: u64, found: u64 },
    #[error("directory {dir}: {name:?} has type {ty}, the inode at {target} has {found}")]
    EntryType { dir: u64, name: String, target: u64, ty: u16, found: u16 },
    #[error("directory {dir}: `.` leads to {target}")]
    DotTarget { dir: u64, target: u64 },
    #[error("directory {dir}: `..` leads to {target}, its parent is {parent}")]
    DotDotTarget { dir: u64, target: u64, parent: u64 },
    #[error("directory {dir}: has {names} names")]
    DirectoryNames { dir: u64, names: u64 },
    #[error("inode {inode}: di_nlink is {found}, it has {counted} names")]
    LinkCount { inode: u64, found: u64, counted: u64 },
    #[error("inode {inode}: has no name")]
    Unreferenced { inode: u64 },
    #[error("directory {dir}: cannot be reached from the root")]
    Unreachable { dir: u64 },
    #[error("inode {inode}: extended attributes in block {block}: {why}")]
    ExtAttr { inode: u64, block: u64, why: String },
    #[error("system inodes: {why}")]
    System { why: String },
    #[error("system file {name}: {why}")]
    SystemFile { name: String, why: String },
    #[error("journal {jid}: {why}")]
    Journal { jid: u32, why: String },
    #[error("journal {jid} is dirty: head {head}, tail {tail}")]
    JournalDirty { jid: u32, head: u32, tail: u32 },
    #[error("the statfs file says {found:?}, the resource groups {counted:?}")]
    Statfs { found: StatfsChange, counted: StatfsChange },
    #[error("statfs_change{jid} holds {delta:?} that are not in the statfs file")]
    StatfsDelta { jid: u32, delta: StatfsChange },
}

impl Fault {
    pub fn severity(&self) -> Severity {
        match self {
            Self::TruncateUnfinished { .. }
            | Self::Orphan { .. }
            | Self::JournalDirty { .. }
            | Self::Statfs { .. }
            | Self::StatfsDelta { .. } => Severity::Unfinished,
            _ => Severity::Damage,
        }
    }
}
