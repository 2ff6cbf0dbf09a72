//! Every system call once, on a mount of a lone node and on one among nodes.

use super::rig::{CLIENT, Rig, can_mount, client};
use crate::fuse::node::MAX_BLOCKS;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    DirBuilderExt, DirEntryExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink,
};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn os(result: i64) -> Result<i64, i32> {
    if result < 0 { Err(std::io::Error::last_os_error().raw_os_error().unwrap()) } else { Ok(result) }
}

fn code<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn rename2(from: &Path, to: &Path, flags: u32) -> Result<i64, i32> {
    // SAFETY: two valid C strings.
    os(unsafe { libc::renameat2(libc::AT_FDCWD, c(from).as_ptr(), libc::AT_FDCWD, c(to).as_ptr(), flags) }
        .into())
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn files(root: &Path) {
    let dir = root.join("files");
    fs::DirBuilder::new().mode(0o750).create(&dir).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o750);
    let path = dir.join("a");
    assert_eq!(code(File::open(&path)), Some(libc::ENOENT));
    fs::write(&path, b"hello").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hello");
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.write_at(&[7; 10_000], 100_000).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 110_000);
    file.set_len(50_000).unwrap();
    file.seek(SeekFrom::Start(49_995)).unwrap();
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [0; 5]);
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    let mut append = OpenOptions::new().append(true).open(&path).unwrap();
    append.write_all(b"tail").unwrap();
    append.write_all(b"tail").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().size(), 50_008);
    drop(OpenOptions::new().write(true).truncate(true).open(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().size(), 0);

    let link = dir.join("b");
    fs::hard_link(&path, &link).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(&path).unwrap().ino(), fs::metadata(&link).unwrap().ino());
    fs::rename(&link, dir.join("c")).unwrap();
    symlink("c", dir.join("s")).unwrap();
    assert_eq!(fs::read_link(dir.join("s")).unwrap(), Path::new("c"));
    assert_eq!(names(&dir), ["a", "c", "s"]);
    assert_eq!(rename2(&path, &dir.join("c"), libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    fs::write(dir.join("s"), b"through the link").unwrap();
    fs::write(dir.join("d"), b"other").unwrap();
    rename2(&dir.join("a"), &dir.join("d"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(dir.join("a")).unwrap(), b"other");
    assert_eq!(fs::read(dir.join("d")).unwrap(), b"through the link");
    assert_eq!(code(fs::remove_dir(&dir)), Some(libc::ENOTEMPTY));
    assert_eq!(code(fs::remove_file(&dir)), Some(libc::EISDIR));
    for name in names(&dir) {
        fs::remove_file(dir.join(name)).unwrap();
    }
    fs::remove_dir(&dir).unwrap();
    assert_eq!(code(fs::metadata(&dir)), Some(libc::ENOENT));
}

fn nodes_and_attributes(root: &Path) {
    let fifo = root.join("fifo");
    // SAFETY: valid C string.
    os(unsafe { libc::mkfifo(c(&fifo).as_ptr(), 0o600) }.into()).unwrap();
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    let device = root.join("null");
    // SAFETY: valid C string.
    os(unsafe { libc::mknod(c(&device).as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) }.into())
        .unwrap();
    fs::write(&device, b"gone").unwrap();
    assert_eq!(fs::metadata(&device).unwrap().rdev(), libc::makedev(1, 3));
    let path = root.join("attributes");
    fs::write(&path, b"x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4755);
    std::os::unix::fs::chown(&path, Some(7), Some(8)).unwrap();
    let about = fs::metadata(&path).unwrap();
    assert_eq!((about.uid(), about.gid(), about.mode() & 0o7777), (7, 8, 0o755));
    let file = File::options().write(true).open(&path).unwrap();
    let (epoch, time) = (std::time::UNIX_EPOCH, std::time::Duration::new);
    for (when, sec, nsec) in [
        (epoch + time(1_234_567_890, 987_654_321), 1_234_567_890, 987_654_321),
        (epoch + time(1 << 33, 7), 1 << 33, 7),
        (epoch - time(0, 1), -1, 999_999_999),
        (epoch - time(5, 0), -5, 0),
    ] {
        file.set_times(fs::FileTimes::new().set_accessed(when).set_modified(when)).unwrap();
        let about = fs::metadata(&path).unwrap();
        assert_eq!((about.mtime(), about.mtime_nsec()), (sec, nsec));
        assert_eq!((about.atime(), about.atime_nsec()), (sec, nsec));
    }
    let space = nix::sys::statvfs::statvfs(root).unwrap();
    assert!(space.blocks() > space.blocks_free() && space.blocks_free() > 0 && space.name_max() == 255);
    for path in [fifo, device, path] {
        fs::remove_file(path).unwrap();
    }
}

fn space_and_holes(root: &Path) {
    let path = root.join("space");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let fd: RawFd = file.as_raw_fd();
    // SAFETY: plain numbers.
    let allocate = |mode, offset, len| os(unsafe { libc::fallocate(fd, mode, offset, len) }.into());
    allocate(0, 0, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 1 << 20);
    assert!(file.metadata().unwrap().blocks() >= 2048);
    file.write_all_at(&[1; 1 << 20], 0).unwrap();
    allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 4096 * 16, 4096 * 16).unwrap();
    let mut back = vec![9; 4096 * 48];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back[..65536].iter().all(|b| *b == 1));
    assert!(back[65536..131_072].iter().all(|b| *b == 0));
    assert!(back[131_072..].iter().all(|b| *b == 1));
    // SAFETY: plain numbers.
    let seek = |offset, what| os(unsafe { libc::lseek(fd, offset, what) });
    assert_eq!(seek(0, libc::SEEK_HOLE), Ok(65536));
    assert_eq!(seek(65536, libc::SEEK_DATA), Ok(131_072));
    assert_eq!(seek(2 << 20, libc::SEEK_DATA), Err(libc::ENXIO));
    let copy = root.join("copy");
    assert_eq!(fs::copy(&path, &copy).unwrap(), 1 << 20);
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&path).unwrap());
    fs::remove_file(copy).unwrap();
    fs::remove_file(path).unwrap();
}

fn mapping(root: &Path) {
    let path = root.join("mapped");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(10_000).unwrap();
    // SAFETY: nobody truncates the file while the map lives.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
    map[5000..5005].copy_from_slice(b"store");
    map.flush().unwrap();
    let direct = fs::read(&path).unwrap();
    assert_eq!(direct.len(), 10_000);
    assert_eq!(&direct[5000..5005], b"store");
    file.write_all_at(b"write", 5000).unwrap();
    assert_eq!(&map[5000..5005], b"write");
    drop(map);
    drop(file);
    fs::remove_file(path).unwrap();
}

fn open_and_removed(root: &Path) {
    let path = root.join("removed");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(b"still here", 0).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"another").unwrap();
    let mut back = [0; 10];
    file.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"still here");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    fs::remove_file(path).unwrap();
}

fn many_names(root: &Path) {
    let dir = root.join("many");
    fs::create_dir(&dir).unwrap();
    let wanted: Vec<String> = (0..3000).map(|n| format!("name-{n:05}-{}", "x".repeat(n % 40))).collect();
    for name in &wanted {
        fs::write(dir.join(name), b"").unwrap();
    }
    let mut sorted = wanted.clone();
    sorted.sort();
    assert_eq!(names(&dir), sorted);
    for name in &wanted {
        fs::remove_file(dir.join(name)).unwrap();
    }
    fs::remove_dir(&dir).unwrap();
}

fn locks(root: &Path) {
    let path = root.join("locks");
    let first = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let second = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: plain numbers.
    let flock = |file: &File, how| os(unsafe { libc::flock(file.as_raw_fd(), how) }.into());
    flock(&first, libc::LOCK_EX).unwrap();
    assert_eq!(flock(&second, libc::LOCK_EX | libc::LOCK_NB), Err(libc::EWOULDBLOCK));
    flock(&first, libc::LOCK_UN).unwrap();
    flock(&second, libc::LOCK_EX | libc::LOCK_NB).unwrap();
    drop(second);
    flock(&first, libc::LOCK_EX | libc::LOCK_NB).unwrap();
    flock(&first, libc::LOCK_UN).unwrap();
    let range = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 10, l_len: 20, l_pid: 0 };
    // SAFETY: the structure lives across the call.
    os(unsafe { libc::fcntl(first.as_raw_fd(), libc::F_SETLK, &raw const range) }.into()).unwrap();
    drop(first);
    fs::remove_file(path).unwrap();
}

/// Not even an open that is refused in the end may empty the file that runs.
fn running_program(root: &Path) {
    let path = root.join("program");
    let program = fs::read("/bin/sleep").unwrap();
    fs::write(&path, &program).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let mut running = std::process::Command::new(&path).arg("60").spawn().unwrap();
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR].map(|access| access | libc::O_TRUNC) {
        // SAFETY: a valid C string.
        assert_eq!(os(unsafe { libc::open(c(&path).as_ptr(), flags) }.into()), Err(libc::ETXTBSY));
    }
    assert!(fs::read(&path).unwrap() == program);
    running.kill().unwrap();
    assert_eq!(running.wait().unwrap().signal(), Some(libc::SIGKILL), "it ran until then");
    // SAFETY: as above; the descriptor is closed.
    os(unsafe { libc::close(libc::open(c(&path).as_ptr(), libc::O_RDONLY | libc::O_TRUNC)) }.into()).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().size(), 0);
    fs::remove_file(path).unwrap();
}

fn everything(root: &Path) {
    files(root);
    running_program(root);
    nodes_and_attributes(root);
    space_and_holes(root);
    mapping(root);
    open_and_removed(root);
    locks(root);
    many_names(root);
    assert_eq!(names(root), Vec::<String>::new());
}

/// See [`crate::fuse::device`]: a node that was killed in the middle of a mount, while the locks of the cluster stood still, never ended.
#[test]
fn mounting_asks_the_mount_nothing() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(1, 256);
    rig.mount_shared(1);
    let asked = || rig.mounts[0].core.probe.asked.single.load(SeqCst);
    assert_eq!(asked(), 0);
    let (major, minor) = crate::fuse::device(&rig.path(0)).unwrap();
    let ahead = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap();
    assert_eq!((asked(), ahead.trim()), (0, "1024"));
    assert_eq!(fs::metadata(rig.path(0)).unwrap().dev(), libc::makedev(major, minor));
    assert_ne!(asked(), 0);
    rig.end();
}

/// Runs in a process of its own (see [`client`]).
#[test]
fn client_of_every_system_call() {
    if let Ok(root) = std::env::var(CLIENT) {
        everything(Path::new(&root));
    }
}

fn everything_on(rig: &Rig, mount: usize) {
    let root = rig.path(mount);
    let name = "fuse::tests::smoke::client_of_every_system_call";
    let (well, said) = client(rig, name, root.to_str().unwrap(), Duration::from_secs(60));
    assert!(well, "{}", said.join("\n"));
}

#[test]
fn every_system_call_on_a_lone_mount() {
    if can_mount() {
        let mut rig = Rig::new(1, 256);
        rig.mount_alone();
        everything_on(&rig, 0);
        rig.end();
    }
}

#[test]
fn every_system_call_among_nodes() {
    if can_mount() {
        let mut rig = Rig::new(2, 256);
        rig.mount_shared(2);
        everything_on(&rig, 0);
        everything_on(&rig, 1);
        everything_on(&rig, 0);
        rig.end();
    }
}

/// One mount reads symbolic links while the other changes their times: the kernel has the page of a link locked while it asks for the target, and
/// the mount that gives the link up drops that page. Whoever waits for the other must not.
#[test]
fn client_of_symbolic_links() {
    let Ok(roots) = std::env::var(CLIENT) else { return };
    let roots: Vec<_> = roots.split(' ').map(Path::new).collect();
    let left = std::sync::atomic::AtomicU32::new(3000);
    std::thread::scope(|s| {
        for n in 0..6 {
            let (root, left) = (roots[n % 2], &left);
            s.spawn(move || {
                while left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok() {
                    let path = root.join("link");
                    assert_eq!(fs::read_link(&path).unwrap(), Path::new("target"));
                    if n < 2 {
                        // SAFETY: a valid C string, and no times are "now".
                        let changed = unsafe {
                            let flags = libc::AT_SYMLINK_NOFOLLOW;
                            libc::utimensat(libc::AT_FDCWD, c(&path).as_ptr(), std::ptr::null(), flags)
                        };
                        os(changed.into()).unwrap();
                    }
                }
            });
        }
        while left.load(SeqCst) > 0 {
            println!("beat {}", left.load(SeqCst));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn symbolic_links_are_read_while_another_node_takes_them() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(2, 256);
    rig.mount_shared(2);
    rig.mounts.iter().for_each(|m| m.coherence().set_contended(Duration::ZERO));
    symlink("target", rig.path(0).join("link")).unwrap();
    let roots = format!("{} {}", rig.path(0).display(), rig.path(1).display());
    let (well, said) =
        client(&rig, "fuse::tests::smoke::client_of_symbolic_links", &roots, Duration::from_secs(10));
    assert!(well, "{}", said.join("\n"));
    rig.end();
}

/// Two nodes open with O_CREAT, and remove, the same names: no race may show, be it as ESTALE, as EEXIST or as EIO.
#[test]
fn client_of_open_or_create() {
    let Ok(roots) = std::env::var(CLIENT) else { return };
    let roots: Vec<_> = roots.split(' ').map(Path::new).collect();
    let left = std::sync::atomic::AtomicU32::new(6000);
    std::thread::scope(|s| {
        for n in 0..6 {
            let (root, left) = (roots[n % 2], &left);
            s.spawn(move || {
                while let Ok(count) = left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) {
                    let path = root.join(format!("f{}", count / 8 % 2));
                    let truncate = count % 3 == 0;
                    let opened = File::options()
                        .read(count % 2 == 0)
                        .write(true)
                        .create(true)
                        .truncate(truncate)
                        .open(&path);
                    match opened {
                        Ok(file) => file.write_all_at(b"x", 0).unwrap(),
                        Err(e) => println!("wrong: open: {e}"),
                    }
                    match fs::remove_file(&path) {
                        Err(e) if e.raw_os_error() != Some(libc::ENOENT) => println!("wrong: unlink: {e}"),
                        _ => {}
                    }
                }
            });
        }
        while left.load(SeqCst) > 0 {
            println!("beat {}", left.load(SeqCst));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn open_or_create_tells_of_no_race() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(2, 256);
    rig.mount_shared(2);
    let roots = format!("{} {}", rig.path(0).display(), rig.path(1).display());
    let (well, said) =
        client(&rig, "fuse::tests::smoke::client_of_open_or_create", &roots, Duration::from_secs(15));
    let wrong: Vec<_> = said.iter().filter(|l| l.starts_with("wrong")).collect();
    assert!(well && wrong.is_empty(), "{} wrong: {wrong:?}", wrong.len());
    rig.end();
}

/// What another node has removed is gone: ESTALE. It was EIO once another file was in its block, also in the middle of an open(2) that had just
/// looked the name up: the kernel took both for one inode, of which two generations cannot be, and gave that up. The numbers that are shown
/// are the same on all mounts, in listings too.
#[test]
fn a_removed_file_whose_block_is_used_again_is_stale() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(2, 32);
    rig.mount_shared(2);
    let (here, there) = (rig.path(0), rig.path(1));
    let block = |meta: fs::Metadata| meta.ino() & (MAX_BLOCKS - 1);
    fs::write(there.join("f"), b"1").unwrap();
    let known = File::options().read(true).custom_flags(libc::O_PATH).open(here.join("f")).unwrap();
    let was = known.metadata().unwrap().ino();
    let deadline = Instant::now() + Duration::from_secs(60);
    fs::remove_file(there.join("f")).unwrap();
    loop {
        fs::write(there.join("f"), b"22").unwrap();
        if block(fs::metadata(there.join("f")).unwrap()) == was & (MAX_BLOCKS - 1) {
            break;
        }
        assert!(Instant::now() < deadline, "its block is never used again");
        fs::remove_file(there.join("f")).unwrap();
    }
    let now = fs::metadata(here.join("f")).unwrap();
    assert_ne!(now.ino(), was, "another file");
    let again = format!("/proc/self/fd/{}", known.as_raw_fd());
    assert_eq!(code(known.metadata()), Some(libc::ESTALE));
    assert_eq!(code(File::open(&again)), Some(libc::ESTALE));
    assert_eq!(code(fs::set_permissions(&again, fs::Permissions::from_mode(0))), Some(libc::ESTALE));
    assert_eq!(
        fs::metadata(here.join("f")).unwrap().mode(),
        now.mode(),
        "the new file was taken for the old one"
    );

    fs::create_dir(here.join("d")).unwrap();
    let mut shown = Vec::new();
    for root in [&here, &there] {
        let entries = fs::read_dir(root).unwrap().map(|e| {
            let e = e.unwrap();
            assert_eq!(e.ino(), e.metadata().unwrap().ino(), "{:?}", e.file_name());
            (e.file_name(), e.ino())
        });
        let mut entries: Vec<_> = entries.collect();
        entries.push(("".into(), fs::metadata(root).unwrap().ino()));
        entries.sort();
        shown.push(entries);
    }
    assert_eq!(shown[0], shown[1]);
    assert_eq!(shown[0].len(), 3);
    drop(known);
    rig.end();
}

/// fsx, where it is installed, on one file through two mounts in turn. `CAIRN_FSX_STEPS` makes it longer.
#[test]
fn fsx_through_two_mounts_in_turn() {
    const ROUND: u32 = 600;
    let Some(fsx) =
        ["../target/tools/bin/fsx", "/usr/local/bin/fsx"].into_iter().map(Path::new).find(|p| p.exists())
    else {
        eprintln!("skipped: no fsx (cargo install --root target/tools fsx)");
        return;
    };
    if !can_mount() {
        return;
    }
    let steps = std::env::var("CAIRN_FSX_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(FSX_STEPS);
    let mut rig = Rig::new(2, 256);
    rig.mount_shared(2);
    let started = std::time::Instant::now();
    for round in 0..steps.div_ceil(ROUND) {
        let file = rig.path(round as usize % 2).join("fsx");
        let (seed, steps) = ((round + 1).to_string(), ROUND.to_string());
        let out =
            std::process::Command::new(fsx).args(["-N", &steps, "-S", &seed]).arg(&file).output().unwrap();
        assert!(out.status.success(), "round {round}: {}", String::from_utf8_lossy(&out.stdout));
        let copies: Vec<_> = (0..2).map(|n| fs::read(rig.path(n).join("fsx")).unwrap()).collect();
        assert!(copies[0] == copies[1], "round {round}: the mounts differ");
    }
    eprintln!("{} steps in {:?}", steps.div_ceil(ROUND) * ROUND, started.elapsed());
    rig.end();
}

/// About 20 seconds on a small machine.
const FSX_STEPS: u32 = 20_000;
