use crate::{Engine, Lun, LunError, OpenOptions, Read, Share, Write, open};
use std::fs::File;
use std::path::{Path, PathBuf};

fn scratch(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("lun");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn engines() -> Vec<Engine> {
    let mut v = vec![Engine::Threads];
    if crate::file::uring_allowed() {
        v.push(Engine::Uring);
    } else {
        eprintln!("io_uring is not allowed here: only the thread engine is tested");
    }
    v
}

fn open_with(path: &Path, engine: Engine) -> Lun {
    open(path.to_str().unwrap(), &OpenOptions { engine, ..OpenOptions::default() }).unwrap()
}

#[test]
fn batches_land_where_they_belong_aligned_or_not() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let path = scratch(dir.path(), 4 << 20);
        let lun = open_with(&path, engine);
        // Odd starts make the buffers unaligned, so that O_DIRECT files go through the bounce path.
        let store: Vec<Vec<u8>> = (0..300u32).map(|i| vec![(i % 251) as u8; 4097]).collect();
        let batch: Vec<Write<'_>> = store
            .iter()
            .enumerate()
            .map(|(i, b)| Write { offset: i as u64 * 8192, buf: &b[i % 2..4096 + i % 2] })
            .collect();
        lun.write_batch(&batch).unwrap();
        lun.flush().unwrap();
        let mut back: Vec<Vec<u8>> = vec![vec![0xEE; 8193]; 300];
        let mut reads: Vec<Read<'_>> = back
            .iter_mut()
            .enumerate()
            .map(|(i, b)| Read { offset: i as u64 * 8192, buf: &mut b[i % 2..8192 + i % 2] })
            .collect();
        lun.read_batch(&mut reads).unwrap();
        for (i, b) in back.iter().enumerate() {
            let got = &b[i % 2..8192 + i % 2];
            assert!(got[..4096].iter().all(|&x| x == (i % 251) as u8), "{engine:?}: request {i}");
            assert!(got[4096..].iter().all(|&x| x == 0), "{engine:?}: gap after request {i}");
        }
    }
}

#[test]
fn many_threads_share_one_lun() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let path = scratch(dir.path(), 8 << 20);
        let lun = open_with(&path, engine);
        std::thread::scope(|s| {
            for t in 0..8u8 {
                let lun = &lun;
                s.spawn(move || {
                    for round in 0..40u64 {
                        let at = u64::from(t) * (1 << 20) + round * 4096;
                        lun.write_at(at, &[t + 1; 4096]).unwrap();
                        let mut got = [0u8; 4096];
                        lun.read_at(at, &mut got).unwrap();
                        assert_eq!(got, [t + 1; 4096]);
                        if round % 16 == 0 {
                            lun.flush().unwrap();
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn a_request_beyond_the_end_of_a_shrunk_file_is_an_error_not_short_data() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let path = scratch(dir.path(), 1 << 20);
        let lun = open_with(&path, engine);
        File::options().write(true).open(&path).unwrap().set_len(512 << 10).unwrap();
        let mut buf = vec![0u8; 8192];
        let err = lun.read_at((512 << 10) - 4096, &mut buf).unwrap_err();
        assert!(matches!(err, LunError::Io { op: "read", .. }), "{engine:?}: {err}");
    }
}

#[test]
fn reads_and_writes_outside_are_refused_before_the_device_sees_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = scratch(dir.path(), 1 << 20);
    let lun = open_with(&path, Engine::Threads);
    assert_eq!((lun.size(), lun.sector_size()), (1 << 20, 512));
    assert!(matches!(lun.write_at(1 << 20, &[0; 512]), Err(LunError::Range { .. })));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
}

#[test]
fn read_only_handles_refuse_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = scratch(dir.path(), 1 << 20);
    let lun = open(path.to_str().unwrap(), &OpenOptions::read_only()).unwrap();
    let err = lun.write_at(0, &[1; 512]).unwrap_err();
    assert!(err.to_string().contains("write of 512 bytes at byte 0"), "{err}");
    lun.flush().unwrap();
}

#[test]
fn exclusive_and_shared_opens_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = scratch(dir.path(), 1 << 20);
    let name = path.to_str().unwrap();
    let shared = OpenOptions::default().share(Share::Shared);
    let exclusive = OpenOptions::default().share(Share::Exclusive);
    let a = open(name, &shared).unwrap();
    let b = open(name, &shared).unwrap();
    let err = open(name, &exclusive).err().unwrap();
    assert!(err.to_string().contains("in use on this host"), "{err}");
    open(name, &OpenOptions::default()).unwrap();
    drop((a, b));
    let c = open(name, &exclusive).unwrap();
    assert!(open(name, &shared).is_err());
    drop(c);
    open(name, &shared).unwrap();
}

#[test]
fn opening_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nothing");
    let text = |name: &str| open(name, &OpenOptions::default()).err().unwrap().to_string();
    assert!(text(missing.to_str().unwrap()).contains("cannot open"));
    assert!(text(dir.path().to_str().unwrap()).contains("neither a regular file nor a block device"));
    File::create(dir.path().join("empty")).unwrap();
    assert!(text(dir.path().join("empty").to_str().unwrap()).contains("is empty"));
}

#[test]
fn partitions_open_by_name_and_their_locks_do_not_meet() {
    let dir = tempfile::tempdir().unwrap();
    let path = scratch(dir.path(), 16 << 20);
    let whole = open_with(&path, Engine::Auto);
    let spec = |name: &str, size, b: u8| crate::part::PartSpec {
        name: name.to_owned(),
        size,
        type_guid: crate::part::TYPE_LINUX_DATA,
        guid: [b; 16],
    };
    crate::part::create(&*whole, [1; 16], &[spec("q", Some(1 << 20), 1), spec("v", None, 2)]).unwrap();
    let name = |n: u32| format!("file:{}#part={n}", path.display());
    let exclusive = OpenOptions::default().share(Share::Exclusive);
    let log = dir.path().join("log");
    let q = open(&name(1), &exclusive).unwrap();
    let v = open(&name(2), &OpenOptions { write_log: Some(log.clone()), ..exclusive.clone() }).unwrap();
    assert!(open(&name(2), &exclusive).is_err());
    assert!(open(path.to_str().unwrap(), &exclusive).is_err());
    v.write_durable(0, &[3; 4096]).unwrap();
    assert_eq!((q.size(), v.size()), (1 << 20, 13 << 20));
    let mut got = [0u8; 4096];
    whole.read_at(2 << 20, &mut got).unwrap();
    assert_eq!(got, [3; 4096]);
    assert!(std::fs::read_to_string(&log).unwrap().contains(r#""off":2097152,"len":4096"#));
    let e = open(&name(3), &exclusive).err().unwrap().to_string();
    assert!(e.contains("no usable partition 3: it is not in the table"), "{e}");
}
