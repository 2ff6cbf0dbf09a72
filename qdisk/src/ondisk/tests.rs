use super::*;
use crate::event::{KillReason, ViewName};
use cairn_base::{Incarnation, NodeId, Proc};
use proptest::prelude::*;

fn seal() -> Seal {
    Seal::derive(b"cluster key of at least 16 bytes", "mycluster", &[7; 16])
}

fn block() -> EBlock {
    let mut b = EBlock {
        node: NodeId(3),
        incarnation: Incarnation(0x1234_5678_9ABC),
        seq: 77,
        written_at: 123_456,
        view: ViewName { seq: 12, rep: NodeId(1), rep_incarnation: Incarnation(5) },
        voters: 3,
        score: 1,
        score_max: 2,
        flags: Flags(3),
        stop_ms: 3200,
        watchdog_ms: 5000,
        settle_ms: 1000,
        term: 4,
        mbal: Ballot::new(2, NodeId(3)),
        bal: Ballot::new(1, NodeId(1)),
        value: Proc { node: NodeId(1), incarnation: Incarnation(5) },
        lease: Lease {
            term: 4,
            grant: 99,
            view: ViewName { seq: 12, rep: NodeId(1), rep_incarnation: Incarnation(5) },
            mask: 0b111,
        },
        ring_seq: 16,
        highest_incarnation: Incarnation(0x1234_5678_9ABC),
        last_view: ViewName { seq: 8, rep: NodeId(2), rep_incarnation: Incarnation(6) },
        ..EBlock::default()
    };
    b.kill[3] = Some(Kill { incarnation: Incarnation(8), reason: KillReason::Fence, view_seq: 12 });
    b.seen[0] = SeenSlot { incarnation_low: 5, unchanged: 1, seq: 1000 };
    b
}

#[test]
fn e_blocks_round_trip() {
    let b = block();
    assert_eq!(EBlock::decode(&b.encode(&seal()), NodeId(3), &seal()), Slot::Valid(Box::new(b)));
}

#[test]
fn torn_foreign_and_empty_blocks_are_told_apart() {
    let whole = block().encode(&seal());
    assert_eq!(EBlock::decode(&[0; SLOT], NodeId(3), &seal()), Slot::Empty);
    assert!(matches!(EBlock::decode(&whole[..100], NodeId(3), &seal()), Slot::Torn(_)));
    let mut next = block();
    next.seq += 1;
    let next = next.encode(&seal());
    for sectors in 1..8 {
        let mut torn = whole.clone();
        torn[..sectors * 512].copy_from_slice(&next[..sectors * 512]);
        assert!(matches!(EBlock::decode(&torn, NodeId(3), &seal()), Slot::Torn(_)), "{sectors} sectors");
    }
    // Whole, but another key, another disk, or another node's place.
    for other in [
        Seal::derive(b"cluster key of at least 16 bytez", "mycluster", &[7; 16]),
        Seal::derive(b"cluster key of at least 16 bytes", "other", &[7; 16]),
        Seal::derive(b"cluster key of at least 16 bytes", "mycluster", &[8; 16]),
    ] {
        assert!(matches!(EBlock::decode(&whole, NodeId(3), &other), Slot::Foreign(_)));
    }
    assert!(matches!(EBlock::decode(&whole, NodeId(4), &seal()), Slot::Foreign(_)));
}

#[test]
fn label_has_the_historic_bytes() {
    let label = Label {
        magic: classic::LABEL_MAGIC,
        created: 0x4C72_F05F,
        host: "web1".into(),
        label: "myqdisk".into(),
        block_size: 512,
    };
    let mut s = [0u8; 512];
    encode_label(&label, &mut s);
    assert_eq!(s[..4], [0x1E, 0xBB, 0xDE, 0x00]);
    assert_eq!(le32(&s, 12), 272);
    assert_eq!(s[32..40], [0xEB, 0x7A, 0x62, 0xC2, 0x38, 0x9F, 0xAB, 0xC4]);
    assert_eq!(s[40..48], [0, 0, 0, 0, 0x4C, 0x72, 0xF0, 0x5F]);
    assert_eq!(&s[48..53], b"web1\0");
    assert_eq!(&s[176..184], b"myqdisk\0");
    assert_eq!(s[296..304], [0, 0, 2, 0, 0, 0, 0, 0]);
    assert!(s[304..].iter().all(|&b| b == 0));
    assert_eq!(decode_label(&s).unwrap(), label);
}

#[test]
fn status_has_the_historic_bytes() {
    let status = StatusBlock {
        update_node: 2,
        timestamp: 5,
        node: 2,
        state: NodeState::Master,
        last: (1, 500),
        incarnation: 0x0102_0304_0506_0708,
        message: Message { kind: 1, seq: 3, arg: 2 },
        mask: 0x8003,
        master_mask: 1,
        ..StatusBlock::default()
    };
    let mut s = [0u8; 512];
    encode_status(&status, &mut s);
    assert_eq!(le32(&s, 12), 80);
    let p = &s[32..112];
    assert_eq!(p[..8], [0x47, 0xBA, 0xCE, 0xF8, 0, 0, 0, 2]);
    assert_eq!(p[24], 6);
    assert_eq!(p[48..56], [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(p[56..64], [0, 1, 0, 3, 0, 0, 0, 2]);
    assert_eq!(p[64..66], [0x03, 0x80]);
    assert_eq!(decode_status(&s).unwrap(), status);
}

#[test]
fn classic_damage_is_named() {
    let mut s = [0u8; 512];
    encode_status(&StatusBlock::default(), &mut s);
    let check = |at: usize, want: fn(&ClassicError) -> bool| {
        let mut t = s;
        t[at] ^= 0x40;
        let e = decode_status(&t).unwrap_err();
        assert!(want(&e), "byte {at}: {e}");
    };
    check(0, |e| matches!(e, ClassicError::HeaderMagic(_)));
    check(5, |e| matches!(e, ClassicError::HeaderCrc));
    check(26, |e| matches!(e, ClassicError::HeaderCrc));
    check(40, |e| matches!(e, ClassicError::DataCrc));
    assert!(matches!(decode_status(&s[..50]), Err(ClassicError::Short(50))));
    assert!(decode_label(&s).is_err());
}

#[test]
fn header_round_trips_and_its_damage_is_named() {
    let h = ExtHeader { uuid: [9; 16], label: "qü".repeat(60), block_size: 512 };
    let mut b = h.encode();
    let back = ExtHeader::decode(&b).unwrap();
    assert!(back.uuid == h.uuid && h.label.starts_with(&back.label) && back.label.len() >= 125);
    b[20] ^= 1;
    assert!(ExtHeader::decode(&b).is_err() && ExtHeader::decode(&b[..10]).is_err());
}

proptest! {
    #[test]
    fn prop_no_bytes_make_the_decoders_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..5000), fix in any::<bool>()) {
        if fix && bytes.len() >= SLOT {
            put(&mut bytes, 0, b"CAIRNQE1");
            let crc = ::crc32c::crc32c(&bytes[..4080]);
            put(&mut bytes, 4080, &crc.to_le_bytes());
        }
        prop_assert!(!matches!(EBlock::decode(&bytes, NodeId(1), &seal()), Slot::Valid(_)));
        let _ = decode_label(&bytes);
        let _ = decode_status(&bytes);
        let _ = ExtHeader::decode(&bytes);
    }

    #[test]
    fn prop_one_changed_byte_is_never_accepted(at in 0usize..4084, bit in 0u8..8) {
        let mut b = block().encode(&seal());
        b[at] ^= 1 << bit;
        let slot = EBlock::decode(&b, NodeId(3), &seal());
        prop_assert!(!matches!(slot, Slot::Valid(_)), "{:?}", slot);
    }
}
