//! `cairn`: one program with many names. `cairn NAME …` or a link called NAME runs the command of that name.
//!
//! Exit status: `cairn_base::exit`; docs/runbook.md lists the exceptions that old scripts expect.

mod cairnd;
mod classic;
mod demo;
mod http;
mod interrupt;
mod local;
mod timeline;
mod work;

use cairn_base::exit;

/// Historic commands that work under their own name through a link.
const LINKS: &[&str] = &[
    "cairnd",
    "mkfs.gfs",
    "fsck.gfs",
    "mount.gfs",
    "mkqdisk",
    "clustat",
    "cman_tool",
    "clusvcadm",
    "fence_ack_manual",
    "dlm_tool",
];

/// A mount allocates a page for each page that is written and read: glibc's allocator spends a third of a sequential transfer on that
/// (docs/benchmarks.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HELP: &str = "\
Cairn: GFS2 volumes shared by several nodes, without a kernel module.

usage: cairn COMMAND [ARGUMENT…]      (cairn COMMAND --help tells more)

a cluster on this machine
  demo            the whole story: share, crash, fence, replay, take over, verify
  up              make and start a cluster in the background     down      stop it, remove its files
  status          nodes, mounts, services                        timeline  what happened, in order
  crash NODE      SIGKILL everything of a node                   start NODE    bring it back
  pause NODE      SIGSTOP everything of a node                   resume NODE   SIGCONT

a node
  cairnd          the daemon                   mount.gfs   mount a volume
  mkfs.gfs        make a volume                mkqdisk     make or list quorum disks
  fsck.gfs        check a volume
  clustat, cman_tool, clusvcadm, fence_ack_manual, dlm_tool
  install-links DIR   links with the historic names
";

fn main() {
    let mut argv: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let own = argv.first().and_then(|a| a.rsplit('/').next()).unwrap_or("cairn").to_owned();
    if !LINKS.contains(&own.as_str()) {
        argv.remove(0);
    }
    let name = argv.first().map_or("", |a| a.rsplit('/').next().unwrap_or(a)).to_owned();
    if let Some(first) = argv.first_mut() {
        first.clone_from(&name);
    }
    std::process::exit(run(&name, &argv));
}

fn run(name: &str, argv: &[String]) -> i32 {
    match name {
        "demo" => demo::main(argv),
        "up" | "down" | "status" | "crash" | "start" | "pause" | "resume" => local::cli::main(argv),
        "timeline" => timeline::main(argv),
        "cairnd" => cairnd::main(argv),
        "mkfs.gfs" => gfs::mkfs_cli::main(argv.iter().map(Into::into)).into(),
        "fsck.gfs" => gfs::fsck_cli::main(argv.iter().map(Into::into)).into(),
        "mount.gfs" => gfs::driver::main_with(argv.iter().map(Into::into), gfs::cluster::join),
        "mkqdisk" => qdisk::mkqdisk_cli::main(argv.get(1..).unwrap_or_default()),
        "clustat" => classic::clustat::main(argv),
        "cman_tool" => classic::cman_tool::main(argv),
        "clusvcadm" => classic::clusvcadm::main(argv),
        "fence_ack_manual" => classic::fence_ack_manual::main(argv),
        "dlm_tool" => classic::dlm_tool::main(argv),
        "http-serve" => http::main(argv),
        "work" => work::main(argv),
        "install-links" => install_links(argv),
        "--version" | "-V" => {
            println!("cairn {}", env!("CARGO_PKG_VERSION"));
            0
        }
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            0
        }
        other => {
            eprintln!("cairn: no command \"{other}\"; cairn --help lists them");
            exit::USAGE
        }
    }
}

/// clap's own message, with 2 for mistakes and 0 for `--help`.
fn usage(e: &clap::Error) -> i32 {
    let _ = e.print();
    if e.use_stderr() { exit::USAGE } else { exit::OK }
}

/// `web` means `service:web`.
fn service_id(name: &str) -> String {
    if name.contains(':') { name.to_owned() } else { format!("service:{name}") }
}

fn install_links(argv: &[String]) -> i32 {
    let Some(dir) = argv.get(1).filter(|a| !a.starts_with('-')) else {
        eprintln!("usage: cairn install-links DIR");
        return exit::USAGE;
    };
    let own = match std::env::current_exe() {
        Ok(p) => p,
        Err(e) => {
            eprintln!("cairn install-links: cannot find myself: {e}");
            return exit::FAILED;
        }
    };
    for name in LINKS {
        let link = std::path::Path::new(dir).join(name);
        let is_ours = std::fs::read_link(&link).is_ok_and(|t| t == own);
        if is_ours {
            continue;
        }
        if let Err(e) = std::os::unix::fs::symlink(&own, &link) {
            let cure = match e.kind() {
                std::io::ErrorKind::AlreadyExists => "remove it first if it may go",
                std::io::ErrorKind::NotFound => "make the directory first",
                _ => "nothing was changed there",
            };
            eprintln!("cairn install-links: {}: {e}; {cure}", link.display());
            return exit::FAILED;
        }
        println!("{}", link.display());
    }
    0
}
