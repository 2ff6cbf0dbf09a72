use super::*;

fn byte(image: &Image, offset: u64) -> u8 {
    let mut b = [0u8; 1];
    image.read(offset, &mut b);
    b[0]
}

#[test]
fn unflushed_writes_are_visible_but_not_durable() {
    let lun = MemLun::new(1 << 20, 512);
    let (a, b) = (lun.handle("a"), lun.handle("b"));
    a.write_at(0, &[1; 512]).unwrap();
    let mut got = [0u8; 512];
    b.read_at(0, &mut got).unwrap();
    assert_eq!(got, [1; 512]);
    assert_eq!(byte(&lun.durable(), 0), 0);
    b.flush().unwrap();
    assert_eq!(byte(&lun.durable(), 0), 1);
    let log = lun.log();
    assert_eq!(log.iter().map(|l| &*l.who).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(log[1].what, What::Flush);
}

#[test]
fn crash_keeps_exactly_the_chosen_writes() {
    let lun = MemLun::new(1 << 20, 512);
    lun.write_at(0, &[9; 2048]).unwrap();
    lun.flush().unwrap();
    lun.write_at(0, &[1; 1024]).unwrap();
    lun.write_at(512, &[2; 512]).unwrap();
    lun.write_at(1024, &[3; 1024]).unwrap();
    let p = lun.crash_point();
    assert_eq!(p.unflushed().len(), 3);
    let at = |k: &Keep| [0u64, 512, 1024, 1536].map(|o| byte(&p.image(k), o));
    assert_eq!(at(&Keep::Nothing), [9, 9, 9, 9]);
    assert_eq!(at(&Keep::Everything), [1, 2, 3, 3]);
    assert_eq!(at(&Keep::Prefix(1)), [1, 1, 9, 9]);
    assert_eq!(at(&Keep::Subset(vec![2, 1])), [9, 2, 3, 3]);
    assert_eq!(at(&Keep::Torn { whole: 2, sectors: 1 }), [1, 2, 3, 9]);
    assert_eq!(at(&Keep::Torn { whole: 0, sectors: 1 }), [1, 9, 9, 9]);
    assert_eq!(at(&Keep::Pieces(vec![(2, Some(1)), (0, None)])), [1, 1, 3, 9]);
    lun.power_cut(&Keep::Prefix(2));
    assert_eq!(byte(&lun.current(), 512), 2);
    assert_eq!(byte(&lun.current(), 1024), 9);
    assert!(lun.crash_point().unflushed().is_empty());
}

#[test]
fn trace_points_agree_whether_walked_or_asked_for() {
    let lun = MemLun::new(1 << 20, 4096);
    for i in 0..20u8 {
        lun.write_at(u64::from(i % 7) * 4096, &[i; 4096]).unwrap();
        if i % 3 == 0 {
            lun.flush().unwrap();
        }
    }
    let trace = lun.trace();
    for (n, walked) in trace.points().enumerate() {
        let asked = trace.point(n);
        assert_eq!(walked.unflushed(), asked.unflushed());
        for keep in [Keep::Nothing, Keep::Everything] {
            assert_eq!(walked.image(&keep).first_difference(&asked.image(&keep)), None);
        }
    }
    let last = trace.points().last().unwrap().image(&Keep::Everything);
    assert_eq!(last.first_difference(&lun.current()), None);
}

#[test]
fn restarted_log_keeps_unflushed_writes() {
    let lun = MemLun::new(1 << 20, 512);
    lun.write_at(0, &[1; 512]).unwrap();
    lun.flush().unwrap();
    lun.write_at(512, &[2; 512]).unwrap();
    lun.restart_log();
    assert_eq!(lun.log_len(), 1);
    let t = lun.trace();
    assert_eq!(byte(&t.base, 0), 1);
    assert_eq!(byte(&t.point(1).image(&Keep::Nothing), 512), 0);
    assert_eq!(byte(&t.point(1).image(&Keep::Everything), 512), 2);
}

#[test]
fn ranges_outside_or_misaligned_are_refused() {
    let lun = MemLun::new(1 << 20, 512);
    for (offset, len) in
        [(1 << 20, 512usize), ((1 << 20) - 512, 1024), (100, 512), (0, 100), (u64::MAX - 511, 512)]
    {
        let buf = vec![0; len];
        assert!(matches!(lun.write_at(offset, &buf), Err(LunError::Range { .. })), "{offset} {len}");
        assert!(matches!(lun.read_at(offset, &mut vec![0; len]), Err(LunError::Range { .. })));
    }
    assert_eq!(lun.log_len(), 0);
}
