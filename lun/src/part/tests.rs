use super::*;
use crate::mem::MemLun;
use proptest::prelude::*;
use std::process::Command;

fn two() -> Vec<PartSpec> {
    let spec = |name: &str, size, b: u8| PartSpec {
        name: name.to_owned(),
        size,
        type_guid: TYPE_LINUX_DATA,
        guid: [b; 16],
    };
    vec![spec("quorum disk", Some(2 << 20), 1), spec("volume", None, 2)]
}

#[test]
fn created_tables_are_found_again_in_both_sector_sizes() {
    for sector in [512, 4096] {
        let lun = MemLun::new(64 << 20, sector);
        let made = create(&lun, [7; 16], &two()).unwrap();
        assert_eq!(list(&lun).unwrap(), made);
        assert_eq!((made[0].start, made[0].len), (1 << 20, 2 << 20));
        assert_eq!((made[1].start, made[1].len), (3 << 20, 60 << 20));
    }
}

#[test]
fn the_backup_table_serves_when_the_primary_is_damaged() {
    let lun = MemLun::new(16 << 20, 512);
    let made = create(&lun, [7; 16], &two()).unwrap();
    for damaged in [512u64, 1024] {
        let mut block = [0u8; 512];
        lun.read_at(damaged, &mut block).unwrap();
        block[40] ^= 1;
        lun.write_at(damaged, &block).unwrap();
        assert_eq!(list(&lun).unwrap(), made);
    }
    lun.write_at((16 << 20) - 512, &[0; 512]).unwrap();
    let e = list(&lun).unwrap_err().to_string();
    assert!(e.contains("header checksum") && e.contains("no GPT signature"), "{e}");
}

#[test]
fn a_partition_stays_inside_itself() {
    let lun = MemLun::new(16 << 20, 512);
    let made = create(&lun, [7; 16], &two()).unwrap();
    let p = Part::open(Arc::new(lun.clone()), 1, "mem#part=1").unwrap();
    assert_eq!(p.size(), made[0].len);
    p.write_at(0, &[5; 512]).unwrap();
    p.write_durable(p.size() - 512, &[6; 512]).unwrap();
    assert!(matches!(p.write_at(p.size(), &[7; 512]), Err(LunError::Range { .. })));
    assert!(matches!(p.read_at(u64::MAX - 511, &mut [0; 512]), Err(LunError::Range { .. })));
    let mut got = [0; 512];
    lun.read_at(made[0].start + made[0].len - 512, &mut got).unwrap();
    assert_eq!(got, [6; 512]);
    lun.read_at(made[1].start, &mut got).unwrap();
    assert_eq!(got, [0; 512]);
    let e = Part::open(Arc::new(lun), 3, "mem#part=3").err().unwrap().to_string();
    assert!(e.contains("not in the table"), "{e}");
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let lun = MemLun::new(4 << 20, 512);
    let mut specs = two();
    specs[0].size = Some(8 << 20);
    assert!(create(&lun, [7; 16], &specs).is_err());
    specs[0].size = None;
    assert!(create(&lun, [7; 16], &specs).is_err());
    assert!(create(&MemLun::new(1 << 20, 512), [7; 16], &two()).is_err());
    assert_eq!(lun.log_len(), 0);
}

/// The system's own tools are the judges where they are installed.
#[test]
fn sfdisk_accepts_the_table_and_we_accept_sfdisks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let name = path.to_str().unwrap();
    let Ok(version) = Command::new("sfdisk").arg("--version").output() else {
        eprintln!("sfdisk is not installed: nothing compared");
        return;
    };
    assert!(version.status.success());
    let lun = crate::open(name, &crate::OpenOptions::default()).unwrap();
    create(&*lun, [7; 16], &two()).unwrap();
    drop(lun);
    let verify = Command::new("sfdisk").args(["--verify", name]).output().unwrap();
    let text =
        String::from_utf8_lossy(&verify.stdout).into_owned() + &String::from_utf8_lossy(&verify.stderr);
    assert!(verify.status.success() && text.contains("No errors detected"), "{text}");
    let dump = Command::new("sfdisk").args(["--dump", name]).output().unwrap();
    let text = String::from_utf8_lossy(&dump.stdout).into_owned();
    assert!(text.contains("start=        2048, size=        4096"), "{text}");
    assert!(text.contains("name=\"quorum disk\"") && text.contains("name=\"volume\""), "{text}");

    let script = dir.path().join("script");
    std::fs::write(&script, "label: gpt\nsize=2MiB, name=a\nsize=8MiB, name=b\n").unwrap();
    let stdin = std::fs::File::open(&script).unwrap();
    let made = Command::new("sfdisk").args(["--quiet", name]).stdin(stdin).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let lun = crate::open(name, &crate::OpenOptions::default()).unwrap();
    let found: Vec<_> =
        list(&*lun).unwrap().into_iter().map(|p| (p.number, p.start, p.len, p.name)).collect();
    assert_eq!(found, [(1, 1 << 20, 2 << 20, "a".to_owned()), (2, 3 << 20, 8 << 20, "b".to_owned())]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// A damaged table may be refused or read from the backup, but never panics and never yields another layout.
    #[test]
    fn prop_damage_never_changes_the_layout(hits in prop::collection::vec((0usize..34 * 512, any::<u8>(), any::<bool>()), 1..6)) {
        let lun = MemLun::new(4 << 20, 512);
        let made = create(&lun, [7; 16], &[PartSpec { name: "x".into(), size: Some(1 << 20), type_guid: TYPE_LINUX_DATA, guid: [1; 16] }]).unwrap();
        for (at, value, front) in hits {
            let at = if front { at as u64 } else { (4 << 20) - 33 * 512 + (at as u64 % (33 * 512)) };
            let mut block = [0u8; 512];
            lun.read_at(at / 512 * 512, &mut block).unwrap();
            block[(at % 512) as usize] = value;
            lun.write_at(at / 512 * 512, &block).unwrap();
        }
        if let Ok(found) = list(&lun) {
            prop_assert_eq!(found, made);
        }
    }

    #[test]
    fn prop_forged_headers_never_panic(fields in prop::collection::vec((8usize..92, any::<u32>()), 0..8)) {
        let lun = MemLun::new(4 << 20, 512);
        create(&lun, [7; 16], &[PartSpec { name: "x".into(), size: Some(1 << 20), type_guid: TYPE_LINUX_DATA, guid: [1; 16] }]).unwrap();
        let mut h = [0u8; 512];
        lun.read_at(512, &mut h).unwrap();
        for (at, v) in fields {
            put32(&mut h, at.min(88), v);
        }
        let size = (u32_at(&h, 12) as usize).clamp(92, 512);
        put32(&mut h, 16, 0);
        let crc = crc32(&h[..size]);
        put32(&mut h, 16, crc);
        lun.write_at(512, &h).unwrap();
        lun.write_at((4 << 20) - 512, &[0; 512]).unwrap();
        if let Ok(found) = list(&lun) {
            for p in found {
                prop_assert!(p.start + p.len <= 4 << 20);
            }
        }
    }
}
