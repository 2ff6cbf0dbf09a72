//! Journals written by kernels, replayed here: the trees that kernel and fsck.gfs2 got, the same numbers of blocks, whatever happens
//! in between.

use crate::common::{as_lun, fsck, fsck_path, has_tool, kernel_tree, kernel_volume, listing};
use gfs::JournalId;
use gfs::journal::replay::Replayed;
use gfs::ondisk::dinode::Time;
use gfs::ondisk::statfs::StatfsChange;
use gfs::reader::Reader;
use lun::image::Image;
use lun::mem::{Keep, MemLun};

const NOW: Time = Time { sec: 1_800_000_000, nsec: 5 };

type Counts = ((u64, u64), (u64, u64), u64);

struct Expected {
    name: &'static str,
    /// For each journal: (metadata copies replayed, found), (data copies replayed, found), revoked addresses.
    journals: &'static [Counts],
    /// Master totals after recovery.
    totals: (i64, i64, i64),
    /// `fsck.gfs2 -n` is content afterwards. It is not with orphans, nor with a truncate in progress.
    fsck_clean: bool,
}

const VOLUMES: [Expected; 8] = [
    Expected {
        name: "k1-metadata-bs4096-1802",
        journals: &[((20, 21), (0, 0), 1)],
        totals: (16364, 13998, 25),
        fsck_clean: true,
    },
    Expected {
        name: "k2-jdata-bs4096-1802",
        journals: &[((22, 26), (10, 13), 7)],
        totals: (16364, 14023, 21),
        fsck_clean: true,
    },
    Expected {
        name: "k3-wrap-exhash-bs512-1801",
        journals: &[((495, 608), (0, 0), 110)],
        totals: (65368, 46332, 218),
        fsck_clean: true,
    },
    Expected {
        name: "k4-orphans-bs1024-1802",
        journals: &[((12, 13), (0, 0), 1)],
        totals: (65452, 56089, 18),
        fsck_clean: false,
    },
    Expected {
        name: "k5-two-dirty-journals-bs4096-1802",
        journals: &[((1, 4), (0, 0), 5), ((27, 34), (0, 0), 7)],
        totals: (16360, 11688, 43),
        fsck_clean: true,
    },
    Expected {
        name: "k6-quota-bs4096-1802",
        journals: &[((10, 11), (0, 0), 1)],
        totals: (16364, 14021, 19),
        fsck_clean: true,
    },
    Expected {
        name: "k7-truncate-revokes-bs512-1802",
        journals: &[((68, 992), (0, 0), 918)],
        totals: (130868, 111910, 15),
        fsck_clean: true,
    },
    Expected {
        name: "k8-truncate-in-progress-bs512-1802",
        journals: &[((0, 0), (0, 0), 0)],
        totals: (261876, 123976, 15),
        fsck_clean: false,
    },
];

fn totals((total, free, dinodes): (i64, i64, i64)) -> StatfsChange {
    StatfsChange { total, free, dinodes }
}

fn replayed(lun: &MemLun) -> Vec<Option<Replayed>> {
    Reader::open(&as_lun(lun)).unwrap().replay_all(NOW).unwrap()
}

#[test]
fn eight_volumes_of_crashed_kernels_replay_to_their_trees() {
    for v in &VOLUMES {
        let lun = MemLun::from_image(kernel_volume(v.name), 512);
        let done = replayed(&lun);
        assert_eq!(done.len(), v.journals.len(), "{}", v.name);
        for (done, &((meta, metas), (data, datas), revokes)) in done.iter().zip(v.journals) {
            let done = done.unwrap();
            assert_eq!((done.metadata_replayed, done.metadata), (meta, metas), "{}: metadata", v.name);
            assert_eq!((done.jdata_replayed, done.jdata), (data, datas), "{}: data", v.name);
            assert_eq!(done.revokes, revokes, "{}: revokes", v.name);
        }
        assert_eq!(listing(&lun), kernel_tree(v.name), "{}", v.name);
        let reader = Reader::open(&as_lun(&lun)).unwrap();
        let (master, changes) = reader.statfs().unwrap();
        assert_eq!(master, totals(v.totals), "{}", v.name);
        assert!(changes.iter().all(StatfsChange::is_zero), "{}: {changes:?}", v.name);
        for jid in 0..v.journals.len() as u32 {
            let head = reader.journal_head(JournalId(jid)).unwrap();
            assert!(head.is_clean() && head.flags == 0x21, "{}: {head:?}", v.name);
        }
        // everything that was written is durable, and there is nothing left to do
        assert_eq!(lun.current().first_difference(&lun.durable()), None, "{}", v.name);
        assert!(replayed(&lun).iter().all(Option::is_none), "{}", v.name);
        if has_tool("fsck.gfs2") {
            let verdict = fsck(&lun.durable());
            assert_eq!(verdict.is_clean(), v.fsck_clean, "{}: {}", v.name, verdict.text);
        }
    }
}

/// `fsck.gfs2 -y` on a copy: its replay, then its repair.
fn fsck_replay(image: &Image) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    image.save(&path).unwrap();
    fsck_path(&path, "-y");
    Image::load(&path).unwrap()
}

#[test]
fn fsck_gfs2_replays_the_same_volumes_to_the_same_trees() {
    if !has_tool("fsck.gfs2") {
        return;
    }
    for v in &VOLUMES {
        let theirs = MemLun::from_image(fsck_replay(&kernel_volume(v.name)), 512);
        assert_eq!(listing(&theirs), kernel_tree(v.name), "{}", v.name);
        // its clean header is of version 1, and is recognised
        assert!(replayed(&theirs).iter().all(Option::is_none), "{}", v.name);
    }
}

#[test]
fn a_replay_that_is_cut_short_anywhere_ends_well_the_second_time() {
    for v in &VOLUMES {
        let start = kernel_volume(v.name);
        let lun = MemLun::from_image(start.clone(), 512);
        replayed(&lun);
        let trace = lun.trace();
        let points = trace.points().count();
        let step = (points / 12).max(1);
        for n in (0..points).step_by(step) {
            let point = trace.point(n);
            let torn = point.unflushed().len();
            for keep in [Keep::Nothing, Keep::Everything, Keep::Prefix(torn / 2)] {
                let again = MemLun::from_image(point.image(&keep), 512);
                replayed(&again);
                assert_eq!(listing(&again), kernel_tree(v.name), "{} cut at {n} {keep:?}", v.name);
            }
        }
    }
}

#[test]
fn two_dirty_journals_replay_in_either_order() {
    use gfs::geometry::Geometry;
    let name = "k5-two-dirty-journals-bs4096-1802";
    let images: Vec<Image> = [[0, 1], [1, 0]]
        .iter()
        .map(|order| {
            let lun = MemLun::from_image(kernel_volume(name), 512);
            let reader = Reader::open(&as_lun(&lun)).unwrap();
            let disk = gfs::disk::Disk::new(as_lun(&lun), Geometry::new(4096).unwrap(), "k5", false);
            for &jid in order {
                let jid = JournalId(jid);
                let map = reader.journal_map(jid).unwrap();
                let head = reader.journal_head(jid).unwrap();
                gfs::journal::replay::replay(&disk, jid, &*map, &head).unwrap();
            }
            assert_eq!(listing(&lun), kernel_tree(name));
            lun.current()
        })
        .collect();
    assert_eq!(images[0].first_difference(&images[1]), None);
}

#[test]
fn a_damaged_live_log_is_an_error_with_journal_and_block_and_writes_no_clean_header() {
    let name = "k1-metadata-bs4096-1802";
    // journal 0: log block 0 is device block 24; tail 1048 a descriptor, header at 1070, head at 1072
    let byte = |at: u64| (24 + at) * 4096;
    let damages: [(u64, u64, [u8; 4], &str); 8] = [
        (1048, 0, [0; 4], "magic"),
        (1048, 4, [0, 0, 0, 4], "dinode inside the log"),
        (1048, 24, [0, 0, 1, 0x30], "ld_type"),
        (1048, 28, [0, 0, 0, 0], "ld_length"),
        (1048, 28, [0xff, 0xff, 0xff, 0xff], "ld_data1"),
        (1070, 24, [9; 4], "checksum"),
        (1049, 0, [0; 4], "no magic number"),
        (1048, 76, [0, 0, 0, 16], "no log may write"),
    ];
    for (block, offset, bytes, words) in damages {
        let mut image = kernel_volume(name);
        image.write(byte(block) + offset, &bytes);
        let lun = MemLun::from_image(image, 512);
        let reader = Reader::open(&as_lun(&lun)).unwrap();
        let text = reader.replay_all(NOW).unwrap_err().to_string();
        assert!(text.starts_with("journal 0, journal block") && text.contains(words), "{text}");
        assert!(!reader.journal_head(JournalId(0)).unwrap().is_clean());
    }
}

#[test]
fn random_damage_to_journals_never_panics_or_hangs() {
    let seed = std::env::var("CAIRN_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x6a75_726e_616c_u64);
    let rounds = std::env::var("CAIRN_FUZZ_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    eprintln!("CAIRN_SEED={seed}");
    let mut rng = cairn_base::Rng::new(seed);
    // (volume, byte of log block 0, block size, live range)
    for (name, base, bsize, live) in [
        ("k1-metadata-bs4096-1802", 24u64 * 4096, 4096u64, 1048..1073u64),
        ("k2-jdata-bs4096-1802", 24 * 4096, 4096, 0x677..0x6ae),
        ("k7-truncate-revokes-bs512-1802", 413 * 512, 512, 0xea3..0x12c0),
    ] {
        let start = kernel_volume(name);
        for _ in 0..rounds {
            let mut image = start.clone();
            for _ in 0..=rng.below(4) {
                let at = live.start + rng.below(live.end - live.start);
                // mostly in the fields of a block's head
                let within = if rng.chance(3, 4) { rng.below(96) } else { rng.below(bsize) };
                let n = 1 + rng.below(8).min(bsize - within - 1);
                let bytes: Vec<u8> = (0..n).map(|_| rng.below(256) as u8).collect();
                image.write(base + at * bsize + within, &bytes);
            }
            let lun = MemLun::from_image(image, 512);
            if let Ok(reader) = Reader::open(&as_lun(&lun)) {
                let _ = reader.replay_all(NOW);
            }
        }
    }
}
