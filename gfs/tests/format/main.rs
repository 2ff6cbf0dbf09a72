//! The on-disk format against the tools and volumes of others: mkfs.gfs2, fsck.gfs2, images left by crashed kernels.

mod check;
mod common;
mod mkfs;
mod replay;
