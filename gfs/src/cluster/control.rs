//! Control socket of a mount: `<run-dir>/mounts/<pid>.sock`, mode 0600. Asked by the service manager before it starts what
//! lives on the mount, and by tools.

use super::Cluster;
use crate::{Error, Result};
use membership::ipc::{IpcError, decode, read_frame, write_frame};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a service start waits for a replay before it fails (and is tried elsewhere or again).
const REPLAY_LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Ask {
    /// Answer when every journal of a mount fenced before now is replayed.
    Replayed { mountpoint: PathBuf },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Told {
    Done,
    OtherMount,
    Failed(String),
}

fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("mounts").join(format!("{}.sock", std::process::id()))
}

pub(super) fn serve(cluster: &Arc<Cluster>, mountpoint: &Path) -> Result<()> {
    let path = socket(&cluster.run_dir);
    let fail = |e: std::io::Error| Error::Mount(format!("{}: {e}", socket(&cluster.run_dir).display()));
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(fail)?;
    }
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(fail)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    let cluster = Arc::downgrade(cluster);
    let mountpoint = mountpoint.to_owned();
    super::spawn("gfs-control", move || {
        for stream in listener.incoming().flatten() {
            let Some(cluster) = cluster.upgrade() else { return };
            let mountpoint = mountpoint.clone();
            // One short-lived thread per question: a question may wait for a replay.
            let _ = super::spawn("gfs-control-1", move || {
                if let Err(e) = answer(stream, &cluster, &mountpoint) {
                    tracing::debug!(err = %e, "control connection");
                }
            });
        }
    })
}

pub(super) fn remove(run_dir: &Path) {
    let _ = std::fs::remove_file(socket(run_dir));
}

fn answer(mut stream: UnixStream, cluster: &Cluster, own: &Path) -> std::result::Result<(), IpcError> {
    let Ask::Replayed { mountpoint } = decode(&read_frame(&mut stream)?)?;
    let told = if mountpoint != own {
        Told::OtherMount
    } else {
        match cluster.wait_settled(REPLAY_LIMIT) {
            Ok(()) => Told::Done,
            Err(why) => Told::Failed(why),
        }
    };
    write_frame(&mut stream, &told)
}

/// For the service manager: returns when the mount at `mountpoint` on the node at `run_dir` has worked off every death known to the node
/// and every journal concerned is replayed.
pub fn wait_replayed(run_dir: &Path, mountpoint: &Path) -> Result<()> {
    let mountpoint = mountpoint.canonicalize().unwrap_or_else(|_| mountpoint.to_owned());
    let dir = run_dir.join("mounts");
    let sockets: Vec<PathBuf> =
        std::fs::read_dir(&dir).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    for path in sockets {
        // The socket of a mount that died answers nobody.
        let Ok(mut stream) = UnixStream::connect(&path) else { continue };
        let told = write_frame(&mut stream, &Ask::Replayed { mountpoint: mountpoint.clone() })
            .and_then(|()| decode(&read_frame(&mut stream)?));
        match told {
            Ok(Told::Done) => return Ok(()),
            Ok(Told::OtherMount) => {}
            Ok(Told::Failed(why)) => return Err(Error::Mount(format!("{}: {why}", mountpoint.display()))),
            Err(e) => return Err(Error::Mount(format!("{}: {e}", path.display()))),
        }
    }
    Err(Error::Mount(format!("no mount process of this node serves {}", mountpoint.display())))
}
