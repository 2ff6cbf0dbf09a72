//! `mount.gfs`: from a device and a directory to a served mount, and cleanly back.
//!
//! The process returns (exit code 0) when the mount is ready; a child in the background serves it until somebody unmounts it, or until
//! SIGTERM or SIGINT. What makes a mount part of a cluster comes in through [`Hooks`] and a [`LockSpace`]; alone, the device is locked against every
//! other use on this host.
//!
//! Exit codes: `cairn_base::exit`.

mod options;

pub use options::{DEFAULT_RUN_DIR, Options};

use crate::fuse::{self, Mounted};
use crate::lockspace::LockSpace;
use crate::lockspace::local::LocalSpace;
use crate::ops::Fs;
use crate::reader::read_superblock;
use crate::volume::Volume;
use crate::{Error, JournalId, Result};
use clap::Parser;
use lun::{Lun, OpenOptions, Share};
use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub use cairn_base::exit::OK as EXIT_OK;
pub use cairn_base::exit::mount::{FAILED as EXIT_MOUNT, SYSTEM as EXIT_SYSTEM, USAGE as EXIT_USAGE};

/// What surrounds a mount. Alone: nothing.
pub trait Hooks: Send + Sync {
    /// The device through which everything is read and written from now on, for instance one that asks for a permit before it writes.
    fn lun(&self, lun: Lun) -> Lun {
        lun
    }

    /// The journal that the cluster gave this mount.
    fn journal(&self) -> Option<JournalId> {
        None
    }

    /// The volume is mounted and recovered; users come next. An error undoes the mount.
    fn volume_mounted(&self, _volume: &Arc<Volume>) -> Result<()> {
        Ok(())
    }

    /// The users have gone; the volume is unmounted next.
    fn ending(&self) {}

    /// Users can come.
    fn mounted(&self, _mounted: &Mounted) {}

    /// The volume is unmounted, its locks are given up; `clean`: its journal needs no replay.
    fn unmounted(&self, _clean: bool) {}
}

/// A mount of a lone node.
pub struct Alone;

impl Hooks for Alone {}

/// What `mount.gfs` asks a cluster for.
#[derive(Clone, Debug)]
pub struct Request {
    pub device: String,
    pub dir: PathBuf,
    pub options: Options,
    /// `cluster:fsname`.
    pub lock_table: String,
    pub journals_wanted: bool,
}

/// Makes this process a member of the file system's lock space.
pub type Join = fn(&Request) -> Result<(Arc<dyn LockSpace>, Arc<dyn Hooks>)>;

/// A mount with users.
pub struct Running {
    mounted: Mounted,
    hooks: Arc<dyn Hooks>,
}

/// Mounts the volume on `device` at `dir`.
pub fn mount(
    device: &str,
    dir: &Path,
    options: &Options,
    space: Arc<dyn LockSpace>,
    hooks: Arc<dyn Hooks>,
) -> Result<Running> {
    let share = if space.is_clustered() { Share::Shared } else { Share::Exclusive };
    let lun = open(device, options.spectator, share)?;
    let mut volume_options = options.volume();
    volume_options.journal = hooks.journal().or(volume_options.journal);
    let volume = Volume::mount(hooks.lun(lun), space, volume_options)?;
    let source =
        if volume.superblock().lock_table.is_empty() { device.to_owned() } else { volume.name().to_owned() };
    let undo = |volume: &Arc<Volume>, error: Error| {
        hooks.unmounted(volume.unmount().is_ok());
        error
    };
    if let Err(e) = hooks.volume_mounted(&volume) {
        return Err(undo(&volume, e));
    }
    let fs = Fs::new(Arc::clone(&volume), options.operations());
    match fuse::mount(Arc::clone(&fs), dir, &options.kernel(&source)) {
        Ok(mounted) => {
            hooks.mounted(&mounted);
            Ok(Running { mounted, hooks })
        }
        Err(e) => {
            let _ = fs.stop();
            Err(undo(&volume, e))
        }
    }
}

impl Running {
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// Serves until somebody unmounts it, then ends everything cleanly.
    pub fn wait(self) -> Result<()> {
        let fs = self.mounted.wait();
        Self::finish(fs, &*self.hooks)
    }

    /// Unmounts, at the latest when the last user has gone.
    pub fn unmount(self) -> Result<()> {
        let fs = self.mounted.unmount();
        Self::finish(fs, &*self.hooks)
    }

    fn finish(fs: Result<Arc<Fs>>, hooks: &dyn Hooks) -> Result<()> {
        let fs = match fs {
            Ok(fs) => fs,
            Err(e) => {
                hooks.unmounted(false);
                return Err(e);
            }
        };
        hooks.ending();
        let stopped = fs.stop();
        let result = stopped.and(fs.volume().unmount());
        hooks.unmounted(result.is_ok());
        result
    }
}

/// How long a mount of this device that is ending is waited for.
const LAST_MOUNT: Duration = Duration::from_secs(5);

fn open(device: &str, read_only: bool, share: Share) -> Result<Lun> {
    let options = OpenOptions { read_only, share, ..OpenOptions::default() };
    // umount(8) returns before the process that served the last mount has written its journal's end and let the device go.
    let deadline = Instant::now() + LAST_MOUNT;
    loop {
        match lun::open(device, &options) {
            Err(lun::LunError::InUse { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            result => return result.map_err(|e| Error::Mount(e.to_string())),
        }
    }
}

/// The superblock's lock protocol and table.
fn lock_words(device: &str) -> Result<(String, String)> {
    let lun = open(device, true, Share::Any)?;
    let sb = read_superblock(&lun)?;
    Ok((sb.lock_proto, sb.lock_table))
}

/// Mount a GFS2 volume.
#[derive(Parser, Debug)]
#[command(
    name = "mount.gfs",
    about = "Mount a GFS2 volume",
    version,
    after_help = "DEVICE is a block device, a file, file:/path, or one of these with #part=N for a GPT partition.\n\
        Options: lockproto=lock_nolock|lock_dlm, locktable=CLUSTER:FS, ro, spectator, noatime, relatime, sync, commit=SECONDS,\n  \
        cache=SIZE, journal=N, read_ahead_kb=N, allow_other, nodev, nosuid, noexec, run_dir=DIR, debug, foreground.\n\
        Exit codes: 0 mounted; 1 wrong usage or missing permission; 2 no /dev/fuse; 32 the volume cannot be mounted;\n  \
        33 (with --foreground) ended by its node.\n\
        Example: mount.gfs -o lockproto=lock_nolock /dev/vg0/data /mnt"
)]
struct Cli {
    /// Options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stay in the foreground
    #[arg(long)]
    foreground: bool,
    /// Directory of the node's sockets and logs
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Mount read-only
    #[arg(short = 'r')]
    read_only: bool,
    #[arg(short = 'w', hide = true)]
    read_write: bool,
    /// Say what is being done
    #[arg(short = 'v')]
    verbose: bool,
    /// Only check the options
    #[arg(short = 'f')]
    fake: bool,
    /// Accepted for mount(8), without effect
    #[arg(short = 'n', hide = true)]
    no_mtab: bool,
    #[arg(short = 's', hide = true)]
    sloppy: bool,
    #[arg(short = 't', hide = true)]
    fs_type: Option<String>,
    /// The LUN
    device: String,
    /// Where to mount it
    dir: PathBuf,
}

/// `mount.gfs` with its arguments (the first one is the program's name); the exit code.
///
/// Must be called while the process has a single thread: it forks.
pub fn main(args: impl IntoIterator<Item = OsString>) -> i32 {
    main_with(args, |request| {
        Err(Error::Mount(format!(
            "{}: lock table \"{}\" needs a cluster, and this program was built without one; on a single node use -o lockproto=lock_nolock",
            request.device, request.lock_table
        )))
    })
}

/// As [`main`], with the way into a cluster.
pub fn main_with(args: impl IntoIterator<Item = OsString>, join: Join) -> i32 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { EXIT_USAGE } else { EXIT_OK };
        }
    };
    let mut options = Options::default();
    for list in &cli.options {
        if let Err(why) = options.add(list) {
            eprintln!("mount.gfs: {why}");
            return EXIT_USAGE;
        }
    }
    options.read_only |= cli.read_only;
    options.foreground |= cli.foreground;
    options.debug |= cli.verbose;
    if let Some(dir) = cli.run_dir {
        options.run_dir = dir;
    }
    if cli.fake {
        return EXIT_OK;
    }
    // Before the volume is touched.
    if let Err(e) = fuse::check_system() {
        eprintln!("mount.gfs: {}: {e}", cli.dir.display());
        return match e {
            fuse::Unusable::Absent(_) => EXIT_SYSTEM,
            fuse::Unusable::Forbidden(_) | fuse::Unusable::NoHelper => EXIT_USAGE,
        };
    }
    // The background process works in the root directory.
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let dir = absolute(&cli.dir);
    if options.foreground {
        return report(&cli.device, serve(&cli.device, &dir, options, join, || {}));
    }
    let device = match lun::Url::parse(&cli.device) {
        Ok(url) => {
            let part = url.part.map_or(String::new(), |n| format!("#part={n}"));
            format!("{}{part}", absolute(&url.path).display())
        }
        Err(e) => return report(&cli.device, Err(e.into())),
    };
    in_background(&device, |ready| serve(&device, &dir, options, join, ready))
}

fn report(device: &str, result: Result<()>) -> i32 {
    let Err(error) = result else { return EXIT_OK };
    match &error {
        // these name the thing themselves
        Error::Mount(_) | Error::Lun(_) => eprintln!("mount.gfs: {error}"),
        Error::Corrupt { .. } | Error::Journal { .. } => {
            eprintln!("mount.gfs: {device}: {error}; fsck.gfs2 mends a volume that no node has mounted");
        }
        _ => eprintln!("mount.gfs: {device}: {error}"),
    }
    exit_code(&error)
}

fn exit_code(error: &Error) -> i32 {
    match error {
        Error::Mount(why) if why.contains("not permitted to mount") => EXIT_USAGE,
        _ => EXIT_MOUNT,
    }
}

/// Mounts, says `ready`, and serves to the end.
fn serve(device: &str, dir: &Path, mut options: Options, join: Join, ready: impl FnOnce()) -> Result<()> {
    match std::fs::metadata(dir) {
        Ok(about) if about.is_dir() => {
            // what fusermount3 wants of a user, asked before the volume is touched
            let is_ours = nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_ok();
            if !nix::unistd::geteuid().is_root() && !is_ours {
                return Err(Error::Mount(format!(
                    "{}: not permitted to mount on a directory without write access; be root, or take a directory of yours",
                    dir.display()
                )));
            }
        }
        Ok(_) => return Err(Error::Mount(format!("{}: not a directory; mount on one", dir.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::Mount(format!("{}: no such directory; make it first (mkdir)", dir.display())));
        }
        Err(e) => return Err(Error::Mount(format!("{}: {e}", dir.display()))),
    }
    let (proto, table) = lock_words(device)?;
    let proto = options.lock_proto.clone().unwrap_or(proto);
    if !matches!(proto.as_str(), "lock_nolock" | "lock_dlm") {
        return Err(Error::Mount(format!(
            "{device}: the volume's lock protocol \"{proto}\" is not supported; mount with -o lockproto=lock_dlm, or -o lockproto=lock_nolock on a single node"
        )));
    }
    let lock_table = options.lock_table.clone().unwrap_or(table);
    start_log(&options, &lock_table, proto != "lock_nolock");
    let (space, hooks): (Arc<dyn LockSpace>, Arc<dyn Hooks>) = if proto == "lock_nolock" {
        // The volume may carry the name of a cluster that does not use it now.
        options.lock_table = None;
        (LocalSpace::new(), Arc::new(Alone))
    } else {
        let request = Request {
            device: device.to_owned(),
            dir: dir.to_owned(),
            options: options.clone(),
            lock_table,
            journals_wanted: !options.spectator,
        };
        join(&request)?
    };
    // Signals are taken before the mount exists, so that none is lost.
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])
        .map_err(|e| Error::Mount(format!("cannot handle signals: {e}")))?;
    let handle = signals.handle();
    let running = mount(device, dir, &options, space, hooks)?;
    let target = dir.to_owned();
    let thread = std::thread::Builder::new()
        .name("gfs-signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                tracing::info!(signal, dir = %target.display(), "unmounting");
                detach(&target);
            }
        })
        .map_err(|e| Error::Mount(format!("cannot start a thread: {e}")))?;
    ready();
    let result = running.wait();
    handle.close();
    let _ = thread.join();
    if let Err(e) = &result {
        tracing::error!(err = %e, "the mount did not end cleanly; its journal will be replayed");
    }
    result
}

/// Takes the mount out of the tree; it ends when its last user has gone.
pub(crate) fn detach(dir: &Path) {
    if nix::mount::umount2(dir, nix::mount::MntFlags::MNT_DETACH).is_ok() {
        return;
    }
    for tool in ["fusermount3", "fusermount"] {
        if std::process::Command::new(tool).args(["-u", "-z"]).arg(dir).status().is_ok_and(|s| s.success()) {
            return;
        }
    }
    tracing::error!(dir = %dir.display(), "cannot unmount");
}

fn start_log(options: &Options, lock_table: &str, is_clustered: bool) {
    let name = lock_table.split(':').next_back().filter(|n| !n.is_empty()).unwrap_or("local");
    let process = format!("mount-{name}");
    let path = options.run_dir.join("log").join(format!("{process}.log"));
    // A node that is not there gets no directory.
    if is_clustered && options.run_dir.is_dir() {
        let file = (!options.foreground).then_some(path.as_path());
        if membership::log::init(&options.run_dir, &process, options.debug, file).is_ok() {
            return;
        }
    }
    let default = match options.foreground {
        _ if options.debug => "debug",
        true => "info",
        // A command that works says nothing.
        false => "warn",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("CAIRN_LOG").unwrap_or_else(|_| default.into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    let _ = if options.foreground {
        builder.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).try_init()
    } else {
        builder.with_ansi(false).with_writer(Mutex::new(LateLog { path, file: None })).try_init()
    };
}

/// The caller's terminal has been let go.
static IS_QUIET: AtomicBool = AtomicBool::new(false);

/// Log of a mount without a cluster: the caller's terminal, later a file that is made when there is something to tell.
struct LateLog {
    path: PathBuf,
    file: Option<File>,
}

impl Write for LateLog {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        if !IS_QUIET.load(Ordering::Relaxed) {
            return std::io::stderr().write(text);
        }
        if self.file.is_none() {
            if let Some(dir) = self.path.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            }
            self.file = Some(File::options().append(true).create(true).open(&self.path)?);
        }
        self.file.as_mut().map_or(Ok(text.len()), |f| f.write(text))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs `work` in a process of its own, and returns when it has said that it is ready, or has failed.
fn in_background(device: &str, work: impl FnOnce(Box<dyn FnOnce()>) -> Result<()>) -> i32 {
    let (mut receive, send) = match std::io::pipe() {
        Ok(pipe) => pipe,
        Err(e) => {
            eprintln!("mount.gfs: cannot make a pipe: {e}");
            return EXIT_SYSTEM;
        }
    };
    // SAFETY: the process has a single thread (the caller's contract), so the child may do everything.
    match unsafe { nix::unistd::fork() } {
        Err(e) => {
            eprintln!("mount.gfs: cannot start a process: {e}");
            EXIT_SYSTEM
        }
        Ok(nix::unistd::ForkResult::Parent { .. }) => {
            drop(send);
            // One byte: the exit code. The child's messages went to the same terminal. Nothing: it died.
            let mut code = [0];
            match receive.read_exact(&mut code) {
                Ok(()) => code[0].into(),
                Err(_) => {
                    eprintln!("mount.gfs: the serving process died before the mount was ready");
                    EXIT_MOUNT
                }
            }
        }
        Ok(nix::unistd::ForkResult::Child) => {
            drop(receive);
            let _ = nix::unistd::setsid();
            let _ = std::env::set_current_dir("/");
            let send = Arc::new(send);
            let tell = |send: &std::io::PipeWriter, code: i32| {
                let mut send = send;
                let _ = send.write_all(&[code as u8]);
            };
            let ready = Arc::clone(&send);
            let result = work(Box::new(move || {
                quiet();
                tell(&ready, EXIT_OK);
            }));
            let code = report(device, result);
            tell(&send, code);
            std::process::exit(code)
        }
    }
}

/// Lets the caller's terminal go.
fn quiet() {
    IS_QUIET.store(true, Ordering::Relaxed);
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
}
