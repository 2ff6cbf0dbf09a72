//! `cairnd`: the node's daemon with the service manager beside it.
//!
//! `membership::daemon` does the cluster; a thread of ours connects to its socket like any other client and runs the service
//! manager, again after each new life of the node.

use cairn_base::{Incarnation, exit};
use crossbeam_channel::{Receiver, unbounded};
use membership::client::Client;
use membership::ipc::ClientKind;
use rgmanager::agent::{AgentResult, Context, Storage, is_mounted};
use rgmanager::driver::{self, DriverConfig, DriverError};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Between two attempts to reach the daemon's socket.
const RETRY: Duration = Duration::from_millis(50);

pub(crate) fn main(argv: &[String]) -> i32 {
    let value = |name: &str| {
        argv.iter().enumerate().find_map(|(i, a)| {
            a.strip_prefix(&format!("{name}="))
                .map(str::to_owned)
                .or_else(|| (a == name).then(|| argv.get(i + 1).cloned())?)
        })
    };
    if let (Some(run_dir), Some(config)) = (value("--run-dir"), value("--config")) {
        let run_dir = PathBuf::from(run_dir);
        // Before anything is written: the daemon reads it again for each of its lives.
        if let Err(e) = membership::config::Config::load(Path::new(&config)) {
            eprintln!("cairnd: {e}");
            return exit::FAILED;
        }
        if let Err(e) = membership::log::init(&run_dir, "cairnd", false, None) {
            eprintln!("cairnd: {}: {e}", run_dir.display());
            return exit::FAILED;
        }
        let spawned = std::thread::Builder::new()
            .name("rgmanager".into())
            .spawn(move || services(&run_dir, Path::new(&config)));
        if let Err(e) = spawned {
            eprintln!("cairnd: cannot start the service manager: {e}");
            return exit::FAILED;
        }
    }
    membership::daemon::main(argv.get(1..).unwrap_or_default())
}

/// Run the service manager through all lives of the node.
fn services(run_dir: &Path, config: &Path) {
    let (_stop, stop) = unbounded();
    loop {
        // The daemon complains about a configuration that cannot be read, and ends.
        let Ok(text) = std::fs::read_to_string(config) else { return };
        match one_life(run_dir, text, &stop) {
            Ok(()) => return,
            Err(DriverError::Config(e)) => {
                tracing::error!(target: "rgmanager", "{}: {e}", config.display());
                return;
            }
            Err(e) => {
                tracing::debug!(target: "rgmanager", err = %e, "service manager waits for the daemon");
                std::thread::sleep(RETRY);
            }
        }
    }
}

fn one_life(run_dir: &Path, config: String, stop: &Receiver<()>) -> Result<(), DriverError> {
    let welcome = Client::connect(run_dir, ClientKind::Tool)?.welcome().clone();
    let agents = Context {
        storage: Arc::new(Mounts { run_dir: run_dir.to_owned(), incarnation: welcome.proc.incarnation }),
        agent_dir: "/usr/share/cluster".into(),
        log_dir: run_dir.join("log"),
        run_dir: run_dir.to_owned(),
        incarnation: welcome.proc.incarnation,
        alive: alive_lock(run_dir),
    };
    driver::run(DriverConfig { run_dir: run_dir.to_owned(), config, agents }, stop)
}

/// A descriptor with a shared lock on `alive.lock`, for children to inherit. The lock goes with its last user: the next life needs it exclusively.
fn alive_lock(run_dir: &Path) -> Option<Arc<File>> {
    let file = File::options().read(true).write(true).open(run_dir.join("alive.lock")).ok()?;
    file.try_lock_shared().ok()?;
    Some(Arc::new(file))
}

/// The node's cluster mounts, through `mount.gfs` and the control socket of each mount.
struct Mounts {
    run_dir: PathBuf,
    incarnation: Incarnation,
}

impl Storage for Mounts {
    fn ensure_ready(&self, device: &str, at: &Path, options: &str) -> AgentResult {
        let one = crate::local::lock_mounting(&self.run_dir).map_err(|e| format!("mounting.lock: {e}"))?;
        if !is_mounted(at) {
            std::fs::create_dir_all(at).map_err(|e| format!("{}: {e}", at.display()))?;
            let exe = std::env::current_exe().map_err(|e| e.to_string())?;
            let options = if options.is_empty() {
                "lockproto=lock_dlm".to_owned()
            } else {
                format!("lockproto=lock_dlm,{options}")
            };
            let out = Command::new(exe)
                .args(["mount.gfs", device])
                .arg(at)
                .args(["-o", &options, "--run-dir"])
                .arg(&self.run_dir)
                .env(
                    membership::alive::marked::MARK,
                    membership::alive::marked::mark(&self.run_dir, self.incarnation),
                )
                .stdin(Stdio::null())
                .output()
                .map_err(|e| format!("mount.gfs: {e}"))?;
            if !out.status.success() {
                return Err(format!("mount.gfs: {}", String::from_utf8_lossy(&out.stderr).trim()));
            }
        }
        drop(one);
        gfs::cluster::wait_replayed(&self.run_dir, at).map_err(|e| e.to_string())
    }

    fn unmount(&self, at: &Path, force: bool) -> AgentResult {
        if force {
            let _ = Command::new("fuser").args(["-k", "-m"]).arg(at).output();
        }
        let out = Command::new("umount").arg(at).output().map_err(|e| format!("umount: {e}"))?;
        if out.status.success() {
            return Ok(());
        }
        Err(format!("umount {}: {}", at.display(), String::from_utf8_lossy(&out.stderr).trim()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use membership::alive;

    #[test]
    fn the_service_manager_of_a_life_does_not_stand_in_the_way_of_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let limit = Duration::from_millis(50);
        drop(alive::conquer(dir.path(), limit).unwrap());
        let held = alive_lock(dir.path()).unwrap();
        let of_a_worker = Arc::clone(&held);
        drop(held);
        assert!(alive::conquer(dir.path(), limit).is_err());
        drop(of_a_worker);
        assert!(alive::conquer(dir.path(), limit).is_ok());
    }
}
