use super::*;
use proptest::prelude::*;

fn ring() -> RingId {
    RingId { seq: 8, rep: NodeId(2), rep_incarnation: Incarnation(77) }
}

fn p(node: u16, inc: u64) -> Proc {
    Proc { node: NodeId(node), incarnation: Incarnation(inc) }
}

fn samples() -> Vec<Bytes> {
    let heard = vec![
        Heard { node: NodeId(1), in_ring: true, held_down: false, cookie: 5 },
        Heard { node: NodeId(4), in_ring: false, held_down: true, cookie: 0 },
    ];
    let entry = CommitEntry {
        proc: p(1, 9),
        old_ring: ring(),
        aru: 5,
        high_delivered: 4,
        high_seen: 7,
        obligation: 3,
        filled: true,
        received: true,
    };
    let second = CommitEntry { proc: p(3, 2), ..entry.clone() };
    let set: ProcSet = [p(1, 3), p(2, 8)].into_iter().collect();
    let token = Token { ring: ring(), token_seq: 4, seq: 90, aru: 80, rtr: vec![81, 85], ..Token::default() };
    let join = Join {
        sender: p(1, 3),
        max_ring_seq: 12,
        cookie: 9,
        cause: 2,
        proto_min: 1,
        proto_max: 1,
        config_version: 3,
        join_no: 6,
        proc: set.clone(),
        failed: set,
        heard: heard.clone(),
    };
    let beacon = Beacon { ring: ring(), operational: true, config_version: 3, cookie: 8, heard };
    let commit =
        Commit { ring: ring(), token_seq: 1, round: 1, proto: 1, index: 1, entries: vec![entry, second] };
    vec![
        token.encode(),
        Mcast::build(ring(), 5, p(2, 8), Kind::User, true, (1, 3), 44, b"hello").packet,
        beacon.encode(),
        join.encode(),
        commit.encode(),
        encode_hold_cancel(&ring()),
        Leave { ring: ring(), removed: true, sender: p(2, 8) }.encode(),
    ]
}

fn encode(p: &Packet) -> Bytes {
    match p {
        Packet::Token(t) => t.encode(),
        Packet::Mcast(m) => m.packet.clone(),
        Packet::Beacon(b) => b.encode(),
        Packet::Join(j) => j.encode(),
        Packet::Commit(c) => c.encode(),
        Packet::HoldCancel(r) => encode_hold_cancel(r),
        Packet::Leave(l) => l.encode(),
    }
}

#[test]
fn every_packet_comes_back_as_it_was_sent() {
    for bytes in samples() {
        let packet = decode(&bytes).expect("own encoding");
        assert_eq!(encode(&packet), bytes);
    }
    let Packet::Mcast(m) = decode(&samples()[1]).expect("own encoding") else { panic!("an MCAST") };
    assert_eq!((&m.payload[..], m.seq, m.msg_no, m.frag_index), (&b"hello"[..], 5, 44, 1));
}

#[test]
fn cut_or_lengthened_packets_are_refused() {
    for bytes in samples() {
        for n in 0..bytes.len() {
            assert!(decode(&bytes.slice(..n)).is_err(), "type {} cut to {n}", bytes[0]);
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert_eq!(decode(&longer.into()), Err(DecodeError::Length));
    }
}

#[test]
fn counts_are_checked_before_anything_is_taken() {
    // A commit that claims 65535 entries, a token that claims as many requests, a join with more nodes than allowed.
    for (sample, at) in [(4, 44), (0, 68), (3, 52), (3, 54), (2, 34)] {
        let mut bytes = samples()[sample].to_vec();
        bytes[at] = 0xff;
        bytes[at + 1] = 0xff;
        assert_eq!(decode(&bytes.into()), Err(DecodeError::Count(65535)), "sample {sample}");
    }
}

#[test]
fn unsorted_lists_node_zero_and_unknown_versions_are_refused() {
    let mut bytes = samples()[3].to_vec();
    bytes[56] = 9; // first of proc after the second
    assert_eq!(decode(&bytes.clone().into()), Err(DecodeError::Unsorted));
    bytes[56] = 0;
    assert_eq!(decode(&bytes.clone().into()), Err(DecodeError::NodeZero));
    bytes[1] = 2;
    assert_eq!(decode(&bytes.into()), Err(DecodeError::Version(2)));
}

#[test]
fn unknown_flag_bits_are_ignored() {
    let mut bytes = samples()[0].to_vec();
    bytes[3] = 0x80;
    assert!(decode(&bytes.into()).is_ok());
}

proptest! {
    #[test]
    fn prop_no_bytes_panic(sample in 0usize..7, at in 0usize..200, value: u8, more: Vec<u8>) {
        let mut bytes = samples()[sample].to_vec();
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = decode(&bytes.clone().into());
        bytes.truncate(at);
        bytes.extend(more);
        if bytes.len() >= 8 {
            let len = (bytes.len() as u32).to_le_bytes();
            bytes[4..8].copy_from_slice(&len);
        }
        let _ = decode(&bytes.into());
    }

    #[test]
    fn prop_merging_sets_is_a_lattice(a: Vec<(u8, u8)>, b: Vec<(u8, u8)>) {
        let set = |l: &[(u8, u8)]| -> ProcSet { l.iter().map(|&(n, i)| p(u16::from(n) + 1, u64::from(i))).collect() };
        let (x, y) = (set(&a), set(&b));
        let (mut xy, mut yx) = (x.clone(), y.clone());
        xy.merge(&y);
        yx.merge(&x);
        prop_assert_eq!(&xy, &yx);
        prop_assert!(x.is_covered_by(&xy) && y.is_covered_by(&xy));
        let mut again = xy.clone();
        again.merge(&y);
        prop_assert_eq!(again, xy);
    }
}
