//! The GFS2 file system in user space: on-disk format, journal, glocks, caches, every operation, FUSE.
//!
//! Layers, top to bottom: `fuse` (thin) → `ops` → `inode dir file bmap` → `trans journal` + `glock` → `cache` → `lun`.
//! The table of modules and the lock order stand in ARCHITECTURE.md §6.

mod bmap;
pub mod cache;
pub mod check;
pub mod cluster;
mod dir;
pub mod disk;
pub mod driver;
mod error;
mod file;
pub mod fsck_cli;
pub mod fuse;
pub mod geometry;
pub mod glock;
mod inode;
pub mod journal;
pub mod lockdlm;
pub mod lockspace;
pub mod mkfs;
pub mod mkfs_cli;
pub mod ondisk;
pub mod ops;
mod orphan;
mod pages;
pub mod reader;
pub mod rgrp;
pub mod trans;
mod types;
pub mod volume;
pub mod workers;

pub use error::{Error, Result};
pub use types::{BlockNo, InodeNo, JournalId};
