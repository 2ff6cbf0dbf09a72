//! The load of the chaos run. `run`: what one node does on its mount until it is killed or an operation fails. `service`: what the service
//! of the cluster is. What they do and how it is judged: `cairn_tests::load`.
//!
//! Exit status: 1 an operation failed (its mount went), 3 a rule was broken; `violation-<life>` in the directory of acknowledgements says which.

use cairn_base::Rng;
use cairn_tests::load::{self, FREE, RECORD, content, record};
use clap::{Parser, Subcommand};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    op: Op,
}

#[derive(Subcommand)]
enum Op {
    /// Load on one mount
    Run {
        #[arg(long)]
        mount: PathBuf,
        #[arg(long)]
        acks: PathBuf,
        /// Name of this life: `node.number`
        #[arg(long)]
        life: String,
        #[arg(long)]
        seed: u64,
        /// Only these kinds. Who waits for a lock cannot be killed (docs/semantics.md), and keeps the locks of its other threads: so a
        /// process waits for one lock only.
        #[arg(long)]
        kinds: String,
    },
    /// Takes the arguments of `cairn http-serve`
    Service {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        listen: String,
        #[arg(long)]
        pid_file: PathBuf,
        #[arg(long)]
        name: String,
        #[arg(long)]
        acks: PathBuf,
    },
}

fn now() -> u64 {
    membership::clock::boottime().0
}

/// One life on one mount.
#[derive(Clone)]
struct Life {
    mount: PathBuf,
    acks: PathBuf,
    name: String,
}

impl Life {
    fn journal(&self, kind: &str) -> io::Result<File> {
        append(&self.acks.join(format!("{kind}-{}", self.name)))
    }

    fn violation(&self, text: &str) -> ! {
        let path = self.acks.join(format!("violation-{}", self.name));
        let line = format!("{text} (at {})\n", now());
        let _ = append(&path).and_then(|mut f| f.write_all(line.as_bytes()));
        eprintln!("{}: {line}", self.name);
        std::process::exit(3)
    }
}

/// The root of the mount. When the mount goes its path leads to the directory below, which must not be taken for it.
fn enter(mount: &Path) -> io::Result<File> {
    use std::os::unix::fs::MetadataExt;
    let handle = File::open(mount)?;
    if handle.metadata()?.dev() == fs::metadata(mount.join(".."))?.dev() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "nothing is mounted here"));
    }
    Ok(handle)
}

fn path_of(handle: &File) -> PathBuf {
    format!("/proc/self/fd/{}", handle.as_raw_fd()).into()
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// One line in one system call: a kill leaves it whole or out.
fn say(journal: &mut File, line: &str) -> io::Result<()> {
    journal.write_all(format!("{line}\n").as_bytes())
}

fn main() {
    match Cli::parse().op {
        Op::Run { mount, acks, life, seed, kinds } => {
            let handle = enter(&mount).expect("the mount");
            run(&Life { mount: path_of(&handle), acks, name: life }, Rng::new(seed), &kinds);
        }
        Op::Service { dir, listen, pid_file, name, acks } => {
            let handle = enter(dir.parent().unwrap_or(&dir)).expect("the mount");
            let life = Life { mount: path_of(&handle), acks, name: format!("{name}.{}", now() / 1_000_000) };
            let e = service(&life, &listen, &pid_file).err();
            eprintln!("service {}: {e:?}", life.name);
            std::process::exit(1);
        }
    }
}

type Work = fn(&Life, Rng) -> io::Result<()>;

fn run(life: &Life, mut rng: Rng, wanted: &str) {
    let kinds: [(&str, Work); 6] = [
        ("own", |l, r| records(l, r, "own", &format!("own-{}", l.name))),
        ("shared", |l, r| records(l, r, "shared", "shared")),
        ("names", names),
        ("counter", counter),
        ("section", section),
        ("reader", reader),
    ];
    let threads: Vec<_> = kinds
        .into_iter()
        .filter(|(kind, _)| wanted.split(',').any(|w| w == *kind))
        .map(|(kind, work)| {
            let (life, rng) = (life.clone(), rng.fork(1));
            std::thread::spawn(move || {
                if let Err(e) = work(&life, rng) {
                    eprintln!("{} {} {kind}: {e}", now(), life.name);
                }
                std::process::exit(1);
            })
        })
        .collect();
    for t in threads {
        let _ = t.join();
    }
}

fn pause(rng: &mut Rng, most_ms: u64) {
    std::thread::sleep(Duration::from_micros(rng.below(most_ms * 1000)));
}

fn records(life: &Life, mut rng: Rng, kind: &str, file: &str) -> io::Result<()> {
    let mut journal = life.journal(kind)?;
    let mut target = append(&life.mount.join(file))?;
    for seq in 0.. {
        let n = target.write(&record(&life.name, seq))?;
        if n != RECORD {
            life.violation(&format!("short append to {file}: {n}"));
        }
        target.sync_data()?;
        say(&mut journal, &format!("{seq} {}", now()))?;
        pause(&mut rng, 20);
    }
    Ok(())
}

/// Makes, renames (also over others) and removes files in a directory that all nodes share.
fn names(life: &Life, mut rng: Rng) -> io::Result<()> {
    let mut journal = life.journal("names")?;
    let dir = life.mount.join("names");
    match fs::create_dir(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let handle = File::open(&dir)?;
    let mut mine: BTreeSet<String> = BTreeSet::new();
    for seq in 0.. {
        for step in 0..=rng.below(4) {
            let fresh = format!("{}+{seq}.{step}", life.name);
            let pick = |rng: &mut Rng| mine.iter().nth(rng.below(mine.len() as u64) as usize).cloned();
            match (rng.below(3), pick(&mut rng), pick(&mut rng)) {
                (1, Some(name), _) if mine.len() > 20 || rng.chance(1, 2) => {
                    say(&mut journal, &format!("- {name}"))?;
                    fs::remove_file(dir.join(&name))?;
                    mine.remove(&name);
                }
                (2, Some(old), Some(other)) => {
                    let new = if other != old && rng.chance(1, 2) { other } else { fresh };
                    say(&mut journal, &format!("> {old} {new}"))?;
                    fs::rename(dir.join(&old), dir.join(&new))?;
                    mine.remove(&old);
                    mine.insert(new);
                }
                _ => {
                    say(&mut journal, &format!("+ {fresh}"))?;
                    let mut f = OpenOptions::new().write(true).create_new(true).open(dir.join(&fresh))?;
                    f.write_all(&content(&fresh))?;
                    f.sync_all()?;
                    mine.insert(fresh);
                }
            }
        }
        handle.sync_all()?;
        say(&mut journal, "!")?;
        pause(&mut rng, 60);
    }
    Ok(())
}

fn fcntl_lock(f: &File, kind: i32) -> io::Result<()> {
    let mut fl =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: `fl` is a valid flock for the kernel to read.
    retry(|| unsafe { libc::fcntl(f.as_raw_fd(), libc::F_SETLKW, &raw mut fl) })
}

fn flock(f: &File, how: i32) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    retry(|| unsafe { libc::flock(f.as_raw_fd(), how) })
}

fn retry(mut call: impl FnMut() -> i32) -> io::Result<()> {
    loop {
        if call() == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

fn shared_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn counter(life: &Life, mut rng: Rng) -> io::Result<()> {
    let mut journal = life.journal("counter")?;
    let f = shared_file(&life.mount.join("counter"))?;
    loop {
        fcntl_lock(&f, libc::F_WRLCK)?;
        let mut text = [0; 32];
        let n = f.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text[..n]).into_owned();
        let value: u64 = match text.trim().parse() {
            Ok(v) => v,
            Err(_) if n == 0 => 0,
            Err(_) => life.violation(&format!("the counter holds {text:?}")),
        };
        say(&mut journal, "t")?;
        f.write_all_at(format!("{:>20}\n", value + 1).as_bytes(), 0)?;
        f.sync_data()?;
        say(&mut journal, &format!("a {}", value + 1))?;
        fcntl_lock(&f, libc::F_UNLCK)?;
        pause(&mut rng, 20);
    }
}

/// Enters a section under flock, says so in the file, and looks whether it stays alone. A section counts as one only if a write was
/// acknowledged after its end was noted: until then the mount was there, and with it the lock.
fn section(life: &Life, mut rng: Rng) -> io::Result<()> {
    let mut journal = life.journal("section")?;
    let f = shared_file(&life.mount.join("section"))?;
    let read = || -> io::Result<String> {
        let mut text = [0; 32];
        let n = f.read_at(&mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..n]).trim().to_owned())
    };
    loop {
        flock(&f, libc::LOCK_EX)?;
        let began = now();
        let there = read()?;
        let there = if there.is_empty() { FREE } else { &there };
        say(&mut journal, &format!("b {began} {there}"))?;
        f.write_all_at(format!("{:<31}\n", life.name).as_bytes(), 0)?;
        if rng.chance(1, 2) {
            f.sync_data()?;
        }
        pause(&mut rng, 4);
        let there = read()?;
        if there != life.name {
            life.violation(&format!("{there} in the section of {}", life.name));
        }
        let ended = now();
        f.write_all_at(format!("{FREE:<31}\n").as_bytes(), 0)?;
        f.sync_data()?;
        say(&mut journal, &format!("e {ended}"))?;
        flock(&f, libc::LOCK_UN)?;
        pause(&mut rng, 20);
    }
}

/// Looks on this mount for what other lives were told is safe. It must be there at the first look, in one read.
fn reader(life: &Life, mut rng: Rng) -> io::Result<()> {
    loop {
        let all = load::journals(&life.acks, "own")?;
        for (other, journal) in all {
            // The last line that is whole; the journal first, the file after it.
            let Some(seq) = last_acked(&journal)? else { continue };
            let (file, offset) = (format!("own-{other}"), seq * RECORD as u64);
            let path = life.mount.join(&file);
            let first = match look(&path, offset) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                got => got,
            };
            if !first.as_ref().is_ok_and(|(bytes, _)| *bytes == record(&other, seq)) {
                life.violation(&format!(
                    "record {seq} in {file} at offset {offset}, which was told is safe, reads on {}: {}; once more: {}",
                    life.name,
                    show(&first),
                    show(&look(&path, offset))
                ));
            }
            pause(&mut rng, 20);
        }
    }
}

/// What one read brings, and the size of the file after it; 0 if the mount has gone meanwhile.
fn look(path: &Path, offset: u64) -> io::Result<(Vec<u8>, u64)> {
    let f = File::open(path)?;
    let mut bytes = vec![0; RECORD];
    let n = f.read_at(&mut bytes, offset)?;
    bytes.truncate(n);
    Ok((bytes, f.metadata().map_or(0, |m| m.len())))
}

fn show(look: &io::Result<(Vec<u8>, u64)>) -> String {
    match look {
        Ok((bytes, size)) => {
            format!("{} bytes {:?}, size {size}", bytes.len(), String::from_utf8_lossy(bytes))
        }
        Err(e) => e.to_string(),
    }
}

fn last_acked(journal: &Path) -> io::Result<Option<u64>> {
    let mut f = File::open(journal)?;
    let len = f.metadata()?.len();
    f.seek(SeekFrom::Start(len.saturating_sub(200)))?;
    let mut text = String::new();
    f.read_to_string(&mut text)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    Ok(whole.rsplit('\n').next().and_then(|l| l.split(' ').next()?.parse().ok()))
}

/// The service: holds the referee's lock, which the kernel takes back only when the process has ended, and appends to the volume.
fn service(life: &Life, listen: &str, pid_file: &Path) -> io::Result<()> {
    let referee = shared_file(&life.acks.join("service.lock"))?;
    let mut marks = append(&life.acks.join("service.marks"))?;
    if flock(&referee, libc::LOCK_EX | libc::LOCK_NB).is_err() {
        let marks = load::lines(&life.acks.join("service.marks"));
        life.violation(&format!("a second copy of the service starts; the first: {:?}", marks.last()));
    }
    say(&mut marks, &format!("{} {} {}", life.name, std::process::id(), now()))?;
    // Two copies could not have the same port either.
    let _listener = std::net::TcpListener::bind(listen)?;
    fs::write(pid_file, format!("{}\n", std::process::id()))?;
    let rng = Rng::new(now());
    records(life, rng, "service", "service")
}
