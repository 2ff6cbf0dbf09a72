//! The log against crashes: random transactions on a small ring, every prefix of the device's writes, any subset of the
//! unflushed ones; the state after replay must be that after some whole number of transactions, not older than the last flush
//! that was acknowledged.

mod oracle;

use super::log::{FlushReason, JournalMap, Log, LogConfig};
use crate::cache::MetaCache;
use crate::disk::Disk;
use crate::geometry::Geometry;
use crate::glock::{Glock, Glocks};
use crate::lockspace::local::LocalSpace;
use crate::lockspace::{GlockName, GlockType};
use crate::ondisk::header::MetaType;
use crate::ondisk::log::{LHF_UNMOUNT, LHF_USERSPACE, LogHeader};
use crate::ondisk::statfs::StatfsChange;
use crate::ondisk::{put_u64, u64_at};
use crate::trans::{OrderedData, TransSize};
use crate::{BlockNo, JournalId, Result};
use cairn_base::Rng;
use lun::fault::{Fault, FaultLun, Op};
use lun::image::Image;
use lun::mem::{Keep, MemLun};
use oracle::Journal;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const BSIZE: usize = 512;
const DEVICE: u64 = 1 << 20;
/// Block that says what all others hold.
const MAP: u64 = 600;
/// Blocks whose kind and content change.
const FIRST: u64 = 601;
const COUNT: u64 = 24;

struct Ring(Vec<u64>);

impl JournalMap for Ring {
    fn len(&self) -> u32 {
        self.0.len() as u32
    }
    fn block(&self, at: u32) -> BlockNo {
        BlockNo(self.0[at as usize])
    }
}

/// What a block holds after a transaction: nothing that matters, metadata, journaled data or plain data, with a version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Kind {
    #[default]
    Free,
    Meta(u64),
    Journaled(u64),
    Plain(u64),
}

impl Kind {
    fn word(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Meta(v) => 1 << 56 | v,
            Self::Journaled(v) => 2 << 56 | v,
            Self::Plain(v) => 3 << 56 | v,
        }
    }

    fn from_word(w: u64) -> Self {
        let v = w & ((1 << 56) - 1);
        match w >> 56 {
            0 => Self::Free,
            1 => Self::Meta(v),
            2 => Self::Journaled(v),
            _ => Self::Plain(v),
        }
    }
}

type State = BTreeMap<u64, Kind>;

struct Rig {
    lun: MemLun,
    disk: Arc<Disk>,
    cache: Arc<MetaCache>,
    log: Arc<Log>,
    map_glock: Arc<Glock>,
    glock: Arc<Glock>,
    ring: Vec<u64>,
    glocks: Arc<Glocks>,
}

/// A device with a fresh journal of `len` blocks in two extents, whose head lies anywhere, and an empty map block.
fn rig(len: usize, start: u64) -> Rig {
    let half = len / 2;
    let ring: Vec<u64> =
        (0..half as u64).map(|i| 200 + i).chain((half as u64..len as u64).map(|i| 300 + i)).collect();
    let mut image = Image::new(DEVICE);
    let head = start as usize % len;
    for (at, &b) in ring.iter().enumerate() {
        let mut buf = vec![0; BSIZE];
        let sequence = 1000 + ((at + len - (head + 1)) % len) as u64;
        let flags = LHF_UNMOUNT | LHF_USERSPACE;
        LogHeader { sequence, flags, blkno: at as u32, addr: b, ..LogHeader::default() }.encode(&mut buf);
        image.write(b * BSIZE as u64, &buf);
    }
    let mut map = vec![0; BSIZE];
    crate::ondisk::header::MetaHeader::new(MetaType::Indirect).encode(&mut map);
    image.write(MAP * BSIZE as u64, &map);
    mount(MemLun::from_image(image, 512), ring)
}

fn mount(lun: MemLun, ring: Vec<u64>) -> Rig {
    let device = Arc::new(lun.clone());
    mount_on(lun, device, ring)
}

fn mount_on(lun: MemLun, device: lun::Lun, ring: Vec<u64>) -> Rig {
    let head = Journal { bsize: BSIZE, ring: &ring }.head(&lun.current());
    let disk = Arc::new(Disk::new(device, Geometry::new(512).unwrap(), "t", false));
    let cache = Arc::new(MetaCache::new(Arc::clone(&disk), 64));
    let glocks = Glocks::new(LocalSpace::new());
    let log = Log::new(
        Arc::clone(&disk),
        Arc::clone(&cache),
        LogConfig {
            jid: JournalId(3),
            map: Box::new(Ring(ring.clone())),
            jinode: 77,
            statfs_addr: 78,
            quota_addr: 79,
            next: (head.blkno + 1) % ring.len() as u32,
            sequence: head.sequence + 1,
            local: StatfsChange::default(),
            commit_interval: Duration::from_hours(1),
        },
    );
    let name = |number| GlockName { ty: GlockType::Inode, number };
    Rig { lun, disk, cache, log, map_glock: glocks.get(name(1)), glock: glocks.get(name(2)), ring, glocks }
}

struct Plain {
    disk: Arc<Disk>,
    writes: Mutex<Vec<(u64, u64)>>,
}

fn plain_bytes(version: u64) -> Vec<u8> {
    let mut b = vec![0xd0; BSIZE];
    put_u64(&mut b, 0, version);
    b
}

impl OrderedData for Plain {
    fn write_out(&self) -> Result<()> {
        for (block, version) in self.writes.lock().drain(..) {
            self.disk.write_blocks(&[(BlockNo(block), &plain_bytes(version))])?;
        }
        Ok(())
    }
}

/// Journaled data that begins with the magic number every other time: the log must escape it.
fn journaled_bytes(version: u64) -> Vec<u8> {
    let mut b = vec![0x1d; BSIZE];
    let magic: u32 = if version.is_multiple_of(2) { 0x0116_1970 } else { 0x7777_7777 };
    b[..4].copy_from_slice(&magic.to_be_bytes());
    put_u64(&mut b, 8, version);
    b
}

impl Rig {
    fn journal(&self) -> Journal<'_> {
        Journal { bsize: BSIZE, ring: &self.ring }
    }

    /// What the map block of an image says: number of the last transaction, and the state of all blocks.
    fn read_state(image: &Image) -> (u64, State) {
        let mut map = vec![0; BSIZE];
        image.read(MAP * BSIZE as u64, &mut map);
        let state =
            (0..COUNT).map(|i| (FIRST + i, Kind::from_word(u64_at(&map, 32 + 8 * i as usize)))).collect();
        (u64_at(&map, 24), state)
    }

    /// Every block holds what the map says.
    fn verify(image: &Image) -> (u64, State) {
        let (number, state) = Self::read_state(image);
        for (&block, &kind) in &state {
            let mut b = vec![0; BSIZE];
            image.read(block * BSIZE as u64, &mut b);
            match kind {
                Kind::Free => {}
                Kind::Meta(v) => {
                    assert_eq!(
                        (&b[..4], u64_at(&b, 24)),
                        (&0x0116_1970u32.to_be_bytes()[..], v),
                        "block {block} after {number}"
                    );
                }
                Kind::Journaled(v) => {
                    assert!(b == journaled_bytes(v), "block {block} after {number}: {kind:?}");
                }
                Kind::Plain(v) => assert!(
                    b == plain_bytes(v),
                    "block {block} after {number}: {kind:?}, has {:x?}",
                    &b[..16]
                ),
            }
        }
        (number, state)
    }

    /// One random transaction; `state` is changed with it. Blocks in `cooling` were freed by a flush that is not durable yet.
    fn transaction(&self, rng: &mut Rng, number: u64, state: &mut State, cooling: &Arc<Mutex<Vec<u64>>>) {
        let plain = Arc::new(Plain { disk: Arc::clone(&self.disk), writes: Mutex::default() });
        let trans = self.log.begin(TransSize::new(8, 8)).unwrap();
        let map = self.cache.read(&self.map_glock, BlockNo(MAP), MetaType::Indirect).unwrap();
        for _ in 0..=rng.below(5) {
            let block = FIRST + rng.below(COUNT);
            let new = match state[&block] {
                Kind::Free if cooling.lock().contains(&block) => Kind::Free,
                Kind::Free => match rng.below(3) {
                    0 => {
                        let buf =
                            trans.create(&self.cache, &self.glock, BlockNo(block), MetaType::Leaf).unwrap();
                        put_u64(&mut trans.modify(&buf), 24, number);
                        Kind::Meta(number)
                    }
                    1 => {
                        let buf = self.cache.new_data(&self.glock, BlockNo(block)).unwrap();
                        trans.modify(&buf).copy_from_slice(&journaled_bytes(number));
                        Kind::Journaled(number)
                    }
                    _ => {
                        plain.writes.lock().push((block, number));
                        Kind::Plain(number)
                    }
                },
                kind if rng.chance(1, 2) => {
                    if let Kind::Plain(_) = kind {
                        plain.writes.lock().retain(|w| w.0 != block);
                    }
                    trans.revoke(BlockNo(block));
                    cooling.lock().push(block);
                    let cooling = Arc::clone(cooling);
                    trans.on_durable(Box::new(move || cooling.lock().retain(|&b| b != block)));
                    Kind::Free
                }
                Kind::Meta(_) => {
                    let buf = self.cache.read(&self.glock, BlockNo(block), MetaType::Leaf).unwrap();
                    put_u64(&mut trans.modify(&buf), 24, number);
                    Kind::Meta(number)
                }
                Kind::Journaled(_) => {
                    let buf = self.cache.read_data(&self.glock, BlockNo(block)).unwrap();
                    trans.modify(&buf).copy_from_slice(&journaled_bytes(number));
                    Kind::Journaled(number)
                }
                // plain data in place is not versioned by transactions
                Kind::Plain(v) => Kind::Plain(v),
            };
            state.insert(block, new);
        }
        let mut bytes = trans.modify(&map);
        put_u64(&mut bytes, 24, number);
        for (i, kind) in state.values().enumerate() {
            put_u64(&mut bytes, 32 + 8 * i, kind.word());
        }
        drop(bytes);
        if !plain.writes.lock().is_empty() {
            trans.ordered(plain);
        }
    }
}

/// Runs `transactions`, with random flushes, write-backs and glock syncs. Returns the states after each transaction, and
/// the pairs (device log length, transaction) of acknowledged flushes.
fn run(
    rig: &Rig,
    rng: &mut Rng,
    transactions: u64,
    first: u64,
    mut state: State,
) -> (BTreeMap<u64, State>, Vec<(usize, u64)>) {
    let cooling = Arc::new(Mutex::new(Vec::new()));
    let mut states = BTreeMap::from([(first, state.clone())]);
    let mut acknowledged = vec![(rig.lun.log_len(), first)];
    for number in first + 1..=first + transactions {
        rig.transaction(rng, number, &mut state, &cooling);
        states.insert(number, state.clone());
        match rng.below(10) {
            0..3 => {
                rig.log.flush(FlushReason::Fsync).unwrap();
                acknowledged.push((rig.lun.log_len(), number));
            }
            3 => rig.log.ail.write_back(&rig.disk, None).unwrap(),
            4 if rng.chance(1, 3) => {
                rig.log.sync_glock(&rig.glock).unwrap();
                let dirty_elsewhere = rig.cache.any_pinned(rig.map_glock.name());
                if !dirty_elsewhere {
                    acknowledged.push((rig.lun.log_len(), number));
                }
            }
            5 if rng.chance(1, 6) => {
                rig.log.flush_and_empty(FlushReason::LogSpace).unwrap();
                acknowledged.push((rig.lun.log_len(), number));
            }
            _ => {}
        }
    }
    (states, acknowledged)
}

fn check_crashes(
    rig: &Rig,
    rng: &mut Rng,
    states: &BTreeMap<u64, State>,
    acknowledged: &[(usize, u64)],
) -> usize {
    let mut seen = 0;
    for (n, point) in rig.lun.trace().points().enumerate() {
        let floor = acknowledged.iter().rev().find(|a| a.0 <= n).map_or(0, |a| a.1);
        let open = point.unflushed().len();
        let mut choices = vec![Keep::Nothing, Keep::Everything];
        for _ in 0..2 {
            choices.push(Keep::Subset((0..open).filter(|_| rng.chance(1, 2)).collect()));
        }
        for keep in choices {
            let mut image = point.image(&keep);
            rig.journal().replay(&mut image);
            let (number, state) = Rig::verify(&image);
            assert!(
                number >= floor,
                "crash at {n} {keep:?}: transaction {floor} was acknowledged, {number} is there"
            );
            assert_eq!(states.get(&number), Some(&state), "crash at {n} {keep:?}");
            seen += 1;
        }
    }
    seen
}

fn seeds() -> u64 {
    std::env::var("GFS_TEST_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(12)
}

#[test]
fn every_crash_leaves_a_whole_number_of_transactions_not_older_than_the_last_fsync() {
    let mut seen = 0;
    for seed in 0..seeds() {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let len = 60 + rng.below(60) as usize;
        let rig = rig(len, rng.next_u64() % 1000);
        let (_, state) = Rig::read_state(&rig.lun.current());
        let (states, acknowledged) = run(&rig, &mut rng, 120, 0, state);
        assert!(rig.log.usage().0 <= len as u32);
        seen += check_crashes(&rig, &mut rng, &states, &acknowledged);
    }
    assert!(seen > 1000, "{seen} crash states");
}

#[test]
fn a_mount_after_a_crash_goes_on_behind_the_replayed_head() {
    for seed in 100..100 + seeds() / 3 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let mut rig_now = rig(70, seed);
        let (mut first, mut state) = Rig::read_state(&rig_now.lun.current());
        for _ in 0..4 {
            let (states, acknowledged) = run(&rig_now, &mut rng, 30, first, state);
            check_crashes(&rig_now, &mut rng, &states, &acknowledged);
            let mut image = rig_now.lun.crash_point().image(&Keep::Nothing);
            let journal = rig_now.journal();
            journal.replay(&mut image);
            let head = journal.head(&image);
            let at = (head.blkno + 1) % rig_now.ring.len() as u32;
            let mut clean = vec![0; BSIZE];
            let sequence = head.sequence + 1;
            LogHeader { sequence, flags: LHF_UNMOUNT, blkno: at, ..LogHeader::default() }.encode(&mut clean);
            image.write(rig_now.ring[at as usize] * BSIZE as u64, &clean);
            (first, state) = Rig::verify(&image);
            rig_now = mount(MemLun::from_image(image, 512), rig_now.ring.clone());
        }
    }
}

#[test]
fn after_shutdown_the_journal_is_clean_and_everything_is_in_place() {
    let rig = rig(80, 17);
    let mut rng = Rng::new(5);
    let (_, state) = Rig::read_state(&rig.lun.current());
    let (states, _) = run(&rig, &mut rng, 50, 0, state);
    rig.log.shutdown().unwrap();
    let image = rig.lun.crash_point().image(&Keep::Nothing);
    let head = rig.journal().head(&image);
    assert!(head.is_clean() && head.tail == head.blkno);
    let (number, state) = Rig::verify(&image);
    assert_eq!((number, &state), (50, &states[&50]));
    assert!(rig.log.begin(TransSize::new(1, 0)).is_err(), "no transaction after the clean end");
}

#[test]
fn a_glock_is_given_up_only_without_live_copies_of_its_blocks() {
    let rig = rig(90, 3);
    let other = 700u64;
    for round in 1..=20 {
        let trans = rig.log.begin(TransSize::new(3, 0)).unwrap();
        let map = rig.cache.read(&rig.map_glock, BlockNo(MAP), MetaType::Indirect).unwrap();
        put_u64(&mut trans.modify(&map), 24, round);
        let buf = match rig.cache.get(BlockNo(other)) {
            Some(buf) => buf,
            None => trans.create(&rig.cache, &rig.glock, BlockNo(other), MetaType::Leaf).unwrap(),
        };
        put_u64(&mut trans.modify(&buf), 24, round);
        drop(trans);
        rig.log.sync_glock(&rig.glock).unwrap();
        // another node changes the block; a replay of our journal must leave that alone
        let mut image = rig.lun.crash_point().image(&Keep::Nothing);
        let mut b = vec![0; BSIZE];
        image.read(other * BSIZE as u64, &mut b);
        assert_eq!(u64_at(&b, 24), round, "in place and durable");
        put_u64(&mut b, 24, 1_000_000);
        image.write(other * BSIZE as u64, &b);
        rig.journal().replay(&mut image);
        image.read(other * BSIZE as u64, &mut b);
        assert_eq!(u64_at(&b, 24), 1_000_000, "round {round}: replayed over the other node's content");
        assert_eq!(Rig::read_state(&image).0, round);
    }
}

#[test]
fn flushes_of_several_descriptors_and_long_revoke_lists_replay() {
    let rig = rig(700 - 2, 650);
    let blocks: Vec<u64> = (1100..1400).collect();
    let create = |n: u64| {
        for chunk in blocks.chunks(100) {
            let trans = rig.log.begin(TransSize::new(100, 0)).unwrap();
            for &b in chunk {
                let buf = match rig.cache.get(BlockNo(b)) {
                    Some(buf) => buf,
                    None => trans.create(&rig.cache, &rig.glock, BlockNo(b), MetaType::Leaf).unwrap(),
                };
                put_u64(&mut trans.modify(&buf), 24, n);
            }
        }
        rig.log.flush(FlushReason::Fsync).unwrap();
    };
    create(7);
    let mut image = rig.lun.crash_point().image(&Keep::Nothing);
    assert_eq!(rig.journal().replay(&mut image), (300, 0));
    let trans = rig.log.begin(TransSize::new(0, 300)).unwrap();
    // one block stays, and keeps the tail where the copies are
    for &b in &blocks[1..] {
        trans.revoke(BlockNo(b));
    }
    drop(trans);
    rig.log.flush(FlushReason::Fsync).unwrap();
    let mut image = rig.lun.crash_point().image(&Keep::Nothing);
    assert_eq!(rig.journal().replay(&mut image), (1, 299));
}

#[test]
fn after_a_withdraw_nothing_is_written() {
    let rig = rig(80, 0);
    let trans = rig.log.begin(TransSize::new(1, 0)).unwrap();
    let map = rig.cache.read(&rig.map_glock, BlockNo(MAP), MetaType::Indirect).unwrap();
    put_u64(&mut trans.modify(&map), 24, 1);
    drop(trans);
    rig.disk.withdraw("test");
    let before = rig.lun.log_len();
    assert!(rig.log.flush(FlushReason::Fsync).is_err());
    assert!(rig.log.begin(TransSize::new(1, 0)).is_err());
    assert!(rig.log.sync_glock(&rig.map_glock).is_err());
    assert_eq!(rig.lun.log_len(), before);
}

/// A log write, a device flush and the header may each fail: the mount stops, and what was acknowledged before is there.
#[test]
fn a_failed_write_or_flush_withdraws_and_is_never_repeated() {
    for (op, from) in [(Op::Write, 1), (Op::Write, 2), (Op::Flush, 1), (Op::Flush, 2)] {
        let base = rig(80, 5);
        let (lun, faults) = FaultLun::new(base.lun.clone());
        let rig = mount_on(base.lun.clone(), Arc::new(lun), base.ring.clone());
        let change = |n: u64| {
            let trans = rig.log.begin(TransSize::new(1, 0)).unwrap();
            let map = rig.cache.read(&rig.map_glock, BlockNo(MAP), MetaType::Indirect).unwrap();
            put_u64(&mut trans.modify(&map), 24, n);
        };
        change(1);
        rig.log.flush(FlushReason::Fsync).unwrap();
        change(2);
        faults.at(op, from, Fault::Fail(libc::EIO));
        assert!(rig.log.flush(FlushReason::Fsync).is_err(), "{op:?} {from}");
        assert!(rig.disk.is_withdrawn());
        let after = rig.lun.log_len();
        assert!(rig.log.flush(FlushReason::Fsync).is_err());
        assert!(rig.log.sync_glock(&rig.map_glock).is_err());
        assert!(rig.log.shutdown().is_err());
        assert_eq!(rig.lun.log_len(), after, "{op:?} {from}: written after the failure");
        for keep in [Keep::Nothing, Keep::Everything] {
            let mut image = rig.lun.crash_point().image(&keep);
            rig.journal().replay(&mut image);
            let number = Rig::verify(&image).0;
            assert!((1..=2).contains(&number), "{op:?} {from} {keep:?}: {number}");
        }
    }
}

#[test]
fn in_place_writes_beside_transactions_and_flushes_keep_every_crash_state_whole() {
    for seed in 200..200 + seeds() / 3 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let rig = Arc::new(rig(75, seed));
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (rig, stop) = (Arc::clone(&rig), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    rig.log.ail.write_back(&rig.disk, None).unwrap();
                    rig.log.ail.reap(&rig.disk);
                    std::thread::yield_now();
                }
            })
        };
        let (_, state) = Rig::read_state(&rig.lun.current());
        let (states, acknowledged) = run(&rig, &mut rng, 120, 0, state);
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        check_crashes(&rig, &mut rng, &states, &acknowledged);
    }
}

#[test]
fn concurrent_writers_share_flushes_and_lose_nothing() {
    let rig = Arc::new(rig(110, 40));
    let threads: Vec<_> = (0..4u64)
        .map(|t| {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || {
                let block = BlockNo(1000 + t);
                let name = GlockName { ty: GlockType::Inode, number: 100 + t };
                let glock = rig.glocks.get(name);
                for n in 1..=100 {
                    let trans = rig.log.begin(TransSize::new(2, 0)).unwrap();
                    let buf = match rig.cache.get(block) {
                        Some(buf) => buf,
                        None => trans.create(&rig.cache, &glock, block, MetaType::Leaf).unwrap(),
                    };
                    put_u64(&mut trans.modify(&buf), 24, n);
                    drop(trans);
                    rig.log.flush(FlushReason::Fsync).unwrap();
                    if n % 10 == 0 {
                        let mut image = rig.lun.crash_point().image(&Keep::Nothing);
                        rig.journal().replay(&mut image);
                        let mut b = vec![0; BSIZE];
                        image.read(block.0 * BSIZE as u64, &mut b);
                        assert_eq!(u64_at(&b, 24), n);
                    }
                }
            })
        })
        .collect();
    for t in threads {
        t.join().unwrap();
    }
}
