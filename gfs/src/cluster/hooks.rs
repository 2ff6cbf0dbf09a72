//! The way of `mount.gfs` into its cluster, and out of it.

use super::{Cluster, Prepared};
use crate::driver::{self, Hooks, Request};
use crate::lockdlm::Dlm;
use crate::lockspace::LockSpace;
use crate::volume::Volume;
use crate::{Error, Result};
use cairn_base::exit;
use lun::Lun;
use std::path::PathBuf;
use std::sync::Arc;

/// Makes this process a member of the file system's group and lock space.
pub fn join(request: &Request) -> Result<(Arc<dyn LockSpace>, Arc<dyn Hooks>)> {
    let prepared = Prepared::connect(&request.options.run_dir, &request.lock_table)?;
    let gate = prepared.gate();
    let dlm = Dlm::start(&prepared)?;
    let dir = request.dir.clone();
    let on_stop = Box::new(move |why: &str| {
        tracing::error!("the mount ends: {why}");
        // Out of the tree first, so that the next mount of this node finds a clean directory.
        driver::detach(&dir);
        std::process::exit(exit::mount::ENDED);
    });
    let cluster = prepared.join(dlm.members(), dlm.address(), on_stop)?;
    dlm.settle()?;
    cluster.wait_all_fenced(dlm.is_founder())?;
    // somebody may have come while we waited
    dlm.settle()?;
    let space = dlm.space();
    Ok((space, Arc::new(ClusterHooks { gate, dlm, cluster, dir: request.dir.clone() })))
}

struct ClusterHooks {
    gate: Arc<super::Gate>,
    dlm: Dlm,
    cluster: Arc<Cluster>,
    dir: PathBuf,
}

impl Hooks for ClusterHooks {
    fn lun(&self, lun: Lun) -> Lun {
        self.gate.guard(lun)
    }

    fn volume_mounted(&self, volume: &Arc<Volume>) -> Result<()> {
        let dir =
            self.dir.canonicalize().map_err(|e| Error::Mount(format!("{}: {e}", self.dir.display())))?;
        self.cluster.attach(Arc::clone(volume), &dir)
    }

    fn ending(&self) {
        self.cluster.detach();
    }

    /// Only a mount that has given everything up may say that it leaves in good order; another one is fenced.
    fn unmounted(&self, clean: bool) {
        self.cluster.detach();
        if clean {
            self.dlm.leave();
            if let Err(e) = self.cluster.leave() {
                tracing::warn!(err = %e, "leaving the group");
            }
        }
    }
}
