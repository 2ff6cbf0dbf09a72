//! What giving up a glock asks of the mount, by type.
//!
//! | glock | leaving EX | going to UN | going to DF | going to SH |
//! |---|---|---|---|---|
//! | inode | file data written; log flushed, blocks in place, durable, revoked | buffers and object dropped | file data dropped | kept |
//! | rgrp | log flushed, blocks in place, durable, revoked | buffers and bitmap dropped | – | kept |
//! | others | – | – | – | – |

use super::Volume;
use crate::glock::{Glock, GlockOps};
use crate::lockspace::{GlockType, LockState};
use crate::{BlockNo, Error, Result};
use std::sync::{Arc, Weak};

/// What the layer above keeps for an inode's (or iopen) glock. Called without locks held, when nobody uses the glock.
pub trait GlockObject: Send + Sync {
    /// EX is given up: write all dirty file data to its place and wait for it. No transaction may be opened.
    fn write_back(&self) -> Result<()>;

    /// Forget file data and, unless `keep_metadata`, everything else that was read.
    fn invalidate(&self, keep_metadata: bool);

    /// First use after the mode was taken anew: read the dinode.
    fn instantiate(&self, state: LockState) -> Result<()>;

    /// Another node wants the lock; for those that are held long (iopen).
    fn callback(&self, _wanted: LockState) {}
}

/// How a [`GlockObject`] stands in the glock's object slot: `glock.set_object(Some(Arc::new(Attached(object))))`.
pub struct Attached(pub Arc<dyn GlockObject>);

pub(super) struct Ops(pub(super) Weak<Volume>);

impl Ops {
    fn volume(&self) -> Result<Arc<Volume>> {
        self.0.upgrade().ok_or_else(|| Error::Withdrawn("the mount has ended".to_owned()))
    }
}

impl GlockOps for Ops {
    fn release(&self, glock: &Arc<Glock>, from: LockState, to: LockState) -> Result<()> {
        self.volume()?.release(glock, from, to)
    }

    fn instantiate(&self, glock: &Arc<Glock>, state: LockState) -> Result<()> {
        let volume = self.volume()?;
        match glock.name().ty {
            GlockType::Inode => match glock.object::<Attached>() {
                Some(object) => object.0.instantiate(state),
                None => Ok(()),
            },
            GlockType::Rgrp => match &volume.writer {
                Some(w) => w.rgrps.instantiate(glock),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn callback(&self, glock: &Arc<Glock>, wanted: LockState) {
        let name = glock.name();
        if name.ty == GlockType::Iopen
            && wanted == LockState::Exclusive
            && let Some(volume) = self.0.upgrade()
            && let Some(hook) = volume.on_iopen_wanted.get()
        {
            hook(BlockNo(name.number));
        }
        if let Some(object) = glock.object::<Attached>() {
            object.0.callback(wanted);
        }
    }
}

impl Volume {
    fn release(&self, glock: &Arc<Glock>, from: LockState, to: LockState) -> Result<()> {
        // a mount that cannot write keeps what it has: another node must not see half of it
        self.disk.check()?;
        match glock.name().ty {
            GlockType::Inode => {
                let object = glock.object::<Attached>();
                if from == LockState::Exclusive {
                    if let Some(object) = &object {
                        object.0.write_back().map_err(|e| self.stop("file data", glock, &e))?;
                    }
                    self.sync_glock(glock).map_err(|e| self.stop("metadata", glock, &e))?;
                }
                if to != LockState::Shared
                    && let Some(object) = &object
                {
                    object.0.invalidate(to == LockState::Deferred);
                }
                if to == LockState::Unlocked {
                    self.invalidate_glock(glock);
                    if glock.name().number == self.system.rindex.0
                        && let Some(w) = &self.writer
                    {
                        w.rgrps.mark_stale();
                    }
                }
            }
            GlockType::Rgrp => {
                if from == LockState::Exclusive {
                    self.sync_glock(glock).map_err(|e| self.stop("metadata", glock, &e))?;
                }
                if to == LockState::Unlocked {
                    if let Some(w) = &self.writer {
                        w.rgrps.forget(glock);
                    }
                    self.invalidate_glock(glock);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What another node is about to read could not be written: the lock stays, the mount goes.
    fn stop(&self, what: &str, glock: &Glock, e: &Error) -> Error {
        self.withdraw(&format!("{what} under glock {} could not be written: {e}", glock.name()))
    }
}
