//! Linux's own gfs2 as a judge: a user-mode Linux guest mounts an image, runs a script on it, unmounts.
//!
//! The guest sees the host's files read-only, an empty /tmp, and the image as /dev/ubda. A *crash* kills the guest at a point that
//! the script chooses (`crash-now`) or after a time: what it had written to the image stays, its memory is lost.
//!
//! The guest's 6.1 kernel saves floating-point state through ptrace requests whose buffer is too small for CPUs with AVX-512; a seccomp
//! filter makes those two requests fail, so that it takes the older ones, and the guest's C library is told to
//! stay away from the registers that the older requests do not save.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const MODULES: &str = "/usr/lib/uml/modules";
const INIT: &str = include_str!("../../oracle/guest-init");
/// Registers beyond what FXSAVE keeps.
const TUNABLES: &str = "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD,\
-AVX_Fast_Unaligned_Load,-AVX2_Usable,-XSAVE,-XSAVEC,-RTM,-BMI2";

/// How a guest runs.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Further mount options, for example `quota=on,acl`.
    pub mount_options: String,
    /// Kill the guest so long after the script began.
    pub crash_after: Option<Duration>,
    pub timeout: Duration,
    /// A directory of the host that the script may write to, as `$OUT`.
    pub out: Option<PathBuf>,
}

impl Default for KernelOptions {
    fn default() -> Self {
        Self { mount_options: String::new(), crash_after: None, timeout: Duration::from_mins(2), out: None }
    }
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The script's exit status; the volume was unmounted.
    Exit(i32),
    /// Killed on purpose.
    Crashed,
    MountFailed,
    UnmountFailed,
    /// The guest could not load gfs2, or died by itself.
    Died,
    TimedOut,
}

#[derive(Clone, Debug)]
pub struct KernelRun {
    pub outcome: Outcome,
    /// What the script printed.
    pub output: String,
    /// The kernel's messages about gfs2, and whatever was said before the script ran.
    pub log: String,
}

impl KernelRun {
    /// Panics, with everything that was said, unless the script ended with 0.
    pub fn expect_ok(self) -> Self {
        assert_eq!(self.outcome, Outcome::Exit(0), "output:\n{}\nlog:\n{}", self.output, self.log);
        self
    }
}

fn version_dir() -> Option<PathBuf> {
    fs::read_dir(MODULES)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.join("kernel/fs/gfs2/gfs2.ko").exists())
}

/// The package that is missing on this machine, if any.
pub fn missing() -> Option<&'static str> {
    let there = |program: &str| {
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|dir| dir.join(program).exists())
    };
    if !there("linux.uml") || version_dir().is_none() {
        Some("user-mode-linux")
    } else if !there("modprobe") {
        Some("kmod")
    } else {
        None
    }
}

/// Fail the two ptrace requests in this process and all that come from it.
fn forbid_regset() -> std::io::Result<()> {
    const PTRACE_GETREGSET: u32 = 0x4204;
    const PTRACE_SETREGSET: u32 = 0x4205;
    // byte offsets in struct seccomp_data: system call number, low half of the first argument
    const NUMBER: u32 = 0;
    const REQUEST: u32 = 16;
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let answer = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        op(load, 0, 0, NUMBER),
        op(equal, 0, 4, libc::SYS_ptrace as u32),
        op(load, 0, 0, REQUEST),
        op(equal, 1, 0, PTRACE_GETREGSET),
        op(equal, 0, 1, PTRACE_SETREGSET),
        op(answer, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EIO as u32),
        op(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: two prctl calls with valid arguments; `program` and `filter` live until they return.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A process and everything below it.
fn family(pid: u32, found: &mut BTreeSet<u32>) {
    if !found.insert(pid) {
        return;
    }
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for task in tasks.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
            family(child, found);
        }
    }
}

fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| s.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X'])))
}

/// A guest; dropping it kills what is left of it.
struct Guest {
    child: Child,
}

impl Guest {
    fn kill(&mut self) {
        let mut all = BTreeSet::new();
        family(self.child.id(), &mut all);
        for &pid in &all {
            // SAFETY: plain system call on processes that descend from our child.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        let _ = self.child.wait();
        // nothing may write to the image any more when this returns
        let deadline = Instant::now() + Duration::from_secs(10);
        while all.iter().any(|&p| is_running(p)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs `script` (bash, in the root of the mounted volume) on `image`. Fails only when the guest cannot be started.
pub fn kernel_run(image: &Path, script: &str, options: &KernelOptions) -> std::io::Result<KernelRun> {
    let kit = tempfile::Builder::new().prefix("kernel-mount.").tempdir()?;
    let modules = version_dir().ok_or_else(|| std::io::Error::other("package user-mode-linux is missing"))?;
    let lib = kit.path().join("lib/modules");
    fs::create_dir_all(&lib)?;
    symlink(&modules, lib.join(modules.file_name().unwrap_or_default()))?;
    fs::create_dir(kit.path().join("bin"))?;
    let install = |name: &str, text: &str| -> std::io::Result<()> {
        let path = kit.path().join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
    };
    install("init", INIT)?;
    install("script", script)?;
    // the console line may wait behind disk writes; what the script did before it is issued by then
    install("bin/crash-now", "#!/bin/sh\necho '%%crash'\nwhile :; do sleep 1; done\n")?;
    let image = image.canonicalize()?;
    let kit_dir = kit.path().display().to_string();
    let memory = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { kit_dir.as_str() };
    let more = match options.mount_options.as_str() {
        "" => String::new(),
        more => format!(",{more}"),
    };
    let mut command = Command::new("linux.uml");
    command
        .args(["mem=256M", "root=/dev/root", "rootfstype=hostfs", "hostfs=/", "ro", "quiet", "loglevel=1"])
        .args(["con=null", "con0=fd:0,fd:1", "ssl=null", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"])
        .arg(format!("umid=guest-{}", std::process::id()))
        .arg(format!("uml_dir={kit_dir}/"))
        .arg(format!("ubd0={}", image.display()))
        .arg(format!("init={kit_dir}/init"))
        .arg(format!("KIT={kit_dir}"))
        .arg(format!("VOLUME_OPTIONS={more}"))
        .arg(format!("GLIBC_TUNABLES={TUNABLES}"))
        .env("HOME", &kit_dir)
        .env("TMPDIR", memory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if let Some(out) = &options.out {
        command.arg(format!("OUT_DIR={}", out.canonicalize()?.display()));
    }
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(forbid_regset) };
    let mut guest = Guest { child: command.spawn()? };
    let console = guest.child.stdout.take().ok_or_else(|| std::io::Error::other("no console"))?;
    let (send, lines) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                return;
            }
        }
    });
    let run = follow(&mut guest, &lines, options);
    drop(guest);
    drop(lines);
    let _ = reader.join();
    Ok(run)
}

/// Reads the console to the end of the run.
fn follow(guest: &mut Guest, lines: &mpsc::Receiver<String>, options: &KernelOptions) -> KernelRun {
    let mut run = KernelRun { outcome: Outcome::Died, output: String::new(), log: String::new() };
    let mut deadline = Instant::now() + options.timeout;
    let mut crash_at: Option<Instant> = None;
    let mut in_script = false;
    loop {
        let until = crash_at.map_or(deadline, |at| at.min(deadline));
        let line = match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Disconnected) => return run,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                run.outcome = match crash_at {
                    Some(at) if at <= Instant::now() => Outcome::Crashed,
                    _ => Outcome::TimedOut,
                };
                guest.kill();
                return run;
            }
        };
        match line.as_str() {
            "%%run" => {
                in_script = true;
                crash_at = options.crash_after.map(|d| Instant::now() + d);
            }
            "%%log" => (in_script, crash_at) = (false, None),
            "%%crash" => {
                guest.kill();
                run.outcome = Outcome::Crashed;
                return run;
            }
            _ if line.starts_with("%%end ") => {
                run.outcome = match line.trim_start_matches("%%end ").split_once(' ') {
                    Some(("exit", status)) => status.parse().map_or(Outcome::Died, Outcome::Exit),
                    _ if line.ends_with("unmount") => Outcome::UnmountFailed,
                    _ if line.ends_with("mount") => Outcome::MountFailed,
                    _ => Outcome::Died,
                };
                // it halts now; not for long
                deadline = deadline.min(Instant::now() + Duration::from_secs(5));
                while lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {}
                return run;
            }
            _ => {
                let to = if in_script { &mut run.output } else { &mut run.log };
                to.push_str(&line);
                to.push('\n');
            }
        }
    }
}
