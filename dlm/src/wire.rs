//! Bytes of the messages, version 1: little-endian, every length checked before it is used, nothing left over.
//!
//! A message is one tag byte and its fields in order. Names carry a u16 length, lists a u32 count that must fit into
//! the bytes that are left. `decode` accepts exactly what `encode` writes.

use crate::msg::{Claim, Msg, PlockAnswer, Probe, Record, TreeOp};
use crate::name::ResName;
use crate::plock::{PlockKey, PlockRange, PlockTest};
use crate::resource::LvbCopy;
use crate::types::{Flags, LVB_LEN, LockId, Lvb, Mode, SbFlags, Status, Term};
use cairn_base::{Incarnation, NodeId, Proc};

/// Version of the message set, compared in the handshake.
pub(crate) const VERSION: u16 = 1;

/// Why bytes are not a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("message ends early")]
    Short,
    #[error("{0} is not valid")]
    Bad(&'static str),
    #[error("bytes after the end of the message")]
    Trailing,
}

type R<T> = Result<T, WireError>;

struct W(Vec<u8>);

impl W {
    fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn name(&mut self, n: &ResName) {
        self.u16(n.encoded().len() as u16);
        self.0.extend_from_slice(n.encoded());
    }
    fn proc(&mut self, p: Proc) {
        self.u16(p.node.0);
        self.u64(p.incarnation.0);
    }
    fn mode(&mut self, m: Option<Mode>) {
        self.u8(m.map_or(0xff, |m| m as u8));
    }
    fn lvb(&mut self, l: Option<&Lvb>) {
        self.u8(u8::from(l.is_some()));
        if let Some(l) = l {
            self.0.extend_from_slice(l);
        }
    }
    fn copy(&mut self, c: Option<LvbCopy>) {
        self.lvb(c.as_ref().map(|c| &c.bytes));
        if let Some(c) = c {
            self.u64(c.seq);
        }
    }
    fn range(&mut self, r: &PlockRange) {
        self.u64(r.owner);
        self.u32(r.pid);
        self.u64(r.start);
        self.u64(r.end);
        self.u8(u8::from(r.write));
    }
    fn probe(&mut self, p: &Probe) {
        self.proc(p.victim.who);
        self.u64(p.victim.owner);
        self.u64(p.ticket);
        self.proc(p.owner.who);
        self.u64(p.owner.owner);
        self.u8(p.hops);
    }
    fn list<T>(&mut self, l: &[T], mut f: impl FnMut(&mut Self, &T)) {
        self.u32(l.len() as u32);
        for x in l {
            f(self, x);
        }
    }
    fn op(&mut self, op: &TreeOp) {
        match op {
            TreeOp::Request { id, op, mode, flags, order } => {
                self.u8(0);
                self.u64(id.0);
                self.u32(*op);
                self.mode(Some(*mode));
                self.u32(flags.0);
                self.u64(*order);
            }
            TreeOp::Convert { id, op, mode, flags, order, lvb } => {
                self.u8(1);
                self.u64(id.0);
                self.u32(*op);
                self.mode(Some(*mode));
                self.u32(flags.0);
                self.u64(*order);
                self.lvb(lvb.as_ref());
            }
            TreeOp::Release { id, flags, lvb } => {
                self.u8(2);
                self.u64(id.0);
                self.u32(flags.0);
                self.lvb(lvb.as_ref());
            }
            TreeOp::Cancel { id, op } => {
                self.u8(3);
                self.u64(id.0);
                self.u32(*op);
            }
            TreeOp::PlockLock { ticket, range, wait } => {
                self.u8(4);
                self.u64(*ticket);
                self.range(range);
                self.u8(u8::from(*wait));
            }
            TreeOp::PlockUnlock { ticket, range } => {
                self.u8(5);
                self.u64(*ticket);
                self.range(range);
            }
            TreeOp::PlockCancel { ticket, deadlock } => {
                self.u8(6);
                self.u64(*ticket);
                self.u8(u8::from(*deadlock));
            }
            TreeOp::PlockTest { ticket, range } => {
                self.u8(7);
                self.u64(*ticket);
                self.range(range);
            }
            TreeOp::PlockProbe { ticket, probe } => {
                self.u8(8);
                self.u64(*ticket);
                self.probe(probe);
            }
        }
    }
    fn record(&mut self, r: &Record) {
        self.name(&r.name);
        self.u64(r.id.0);
        self.u32(r.op);
        self.mode(r.granted);
        self.mode(r.want);
        self.u32(r.flags.0);
        self.u64(r.order);
        self.u8(u8::from(r.valblk));
        self.copy(r.lvb);
        self.u8(u8::from(r.lvb_valid));
    }
}

pub(crate) fn encode(msg: &Msg) -> Vec<u8> {
    let mut w = W(Vec::with_capacity(96));
    match msg {
        Msg::Lookup { name, op } => {
            w.u8(1);
            w.name(name);
            w.op(op);
        }
        Msg::Forward { origin, name, term, op } => {
            w.u8(2);
            w.proc(*origin);
            w.name(name);
            w.u64(term.0);
            w.op(op);
        }
        Msg::YouAreMaster { root, term, masks } => {
            w.u8(3);
            w.name(root);
            w.u64(term.0);
            w.list(masks, |w, p| w.proc(*p));
        }
        Msg::Assign { root, master, term } => {
            w.u8(4);
            w.name(root);
            w.proc(*master);
            w.u64(term.0);
        }
        Msg::Drop { root, term } => {
            w.u8(5);
            w.name(root);
            w.u64(term.0);
        }
        Msg::Dropped { root, term } => {
            w.u8(6);
            w.name(root);
            w.u64(term.0);
        }
        Msg::Op { name, term, op } => {
            w.u8(7);
            w.name(name);
            w.u64(term.0);
            w.op(op);
        }
        Msg::Redirect { root, term, looked_up } => {
            w.u8(8);
            w.name(root);
            w.u64(term.0);
            w.u8(u8::from(*looked_up));
        }
        Msg::Result { name, term, id, op, status, mode, sb, lvb } => {
            w.u8(9);
            w.name(name);
            w.u64(term.0);
            w.u64(id.0);
            w.u32(*op);
            w.u8(*status as u8);
            w.mode(*mode);
            w.u8(sb.0);
            w.copy(*lvb);
        }
        Msg::Bast { id, mode } => {
            w.u8(10);
            w.u64(id.0);
            w.mode(Some(*mode));
        }
        Msg::PlockResult { name, term, ticket, answer } => {
            w.u8(11);
            w.name(name);
            w.u64(term.0);
            w.u64(*ticket);
            match answer {
                PlockAnswer::Granted => w.u8(0),
                PlockAnswer::Again => w.u8(1),
                PlockAnswer::Cancelled => w.u8(2),
                PlockAnswer::Deadlock => w.u8(3),
                PlockAnswer::Tested(None) => w.u8(4),
                PlockAnswer::Tested(Some(t)) => {
                    w.u8(5);
                    w.proc(t.who);
                    w.range(&t.range);
                }
                PlockAnswer::Queued => w.u8(6),
            }
        }
        Msg::Probe(p) => {
            w.u8(12);
            w.probe(p);
        }
        Msg::PlockVictim { ticket } => {
            w.u8(13);
            w.u64(*ticket);
        }
        Msg::Mastered { trees } => {
            w.u8(14);
            w.list(trees, |w, (n, t)| {
                w.name(n);
                w.u64(t.0);
            });
        }
        Msg::Claims { claims } => {
            w.u8(15);
            w.list(claims, |w, c| {
                w.name(&c.root);
                w.list(&c.records, W::record);
                w.list(&c.ranges, W::range);
            });
        }
        Msg::SyncEnd { fresh, gates } => {
            w.u8(16);
            w.u8(u8::from(*fresh));
            w.list(gates, |w, (p, f)| {
                w.proc(*p);
                w.u8(u8::from(*f));
            });
        }
        Msg::Recovered { who } => {
            w.u8(17);
            w.proc(*who);
        }
    }
    w.0
}

struct D<'a>(&'a [u8]);

impl D<'_> {
    fn take<const N: usize>(&mut self) -> R<[u8; N]> {
        let (a, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*a)
    }
    fn u8(&mut self) -> R<u8> {
        Ok(self.take::<1>()?[0])
    }
    fn u16(&mut self) -> R<u16> {
        self.take().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> R<u32> {
        self.take().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> R<u64> {
        self.take().map(u64::from_le_bytes)
    }
    fn bool(&mut self) -> R<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Bad("boolean")),
        }
    }
    fn name(&mut self) -> R<ResName> {
        let n = self.u16()? as usize;
        if n > self.0.len() {
            return Err(WireError::Short);
        }
        let (b, rest) = self.0.split_at(n);
        self.0 = rest;
        ResName::decode(b).ok_or(WireError::Bad("resource name"))
    }
    fn root(&mut self) -> R<ResName> {
        let n = self.name()?;
        if n.is_root() { Ok(n) } else { Err(WireError::Bad("name of a tree")) }
    }
    fn term(&mut self) -> R<Term> {
        self.u64().map(Term)
    }
    fn id(&mut self) -> R<LockId> {
        self.u64().map(LockId)
    }
    fn proc(&mut self) -> R<Proc> {
        Ok(Proc { node: NodeId(self.u16()?), incarnation: Incarnation(self.u64()?) })
    }
    fn opt_mode(&mut self) -> R<Option<Mode>> {
        match self.u8()? {
            0xff => Ok(None),
            m => Mode::from_u8(m).map(Some).ok_or(WireError::Bad("mode")),
        }
    }
    fn mode(&mut self) -> R<Mode> {
        self.opt_mode()?.ok_or(WireError::Bad("mode"))
    }
    fn flags(&mut self) -> R<Flags> {
        let f = Flags(self.u32()?);
        if f.known() { Ok(f) } else { Err(WireError::Bad("flags")) }
    }
    fn lvb(&mut self) -> R<Option<Lvb>> {
        if self.bool()? { self.take::<LVB_LEN>().map(Some) } else { Ok(None) }
    }
    fn copy(&mut self) -> R<Option<LvbCopy>> {
        match self.lvb()? {
            None => Ok(None),
            Some(bytes) => Ok(Some(LvbCopy { bytes, seq: self.u64()? })),
        }
    }
    fn range(&mut self) -> R<PlockRange> {
        let r = PlockRange {
            owner: self.u64()?,
            pid: self.u32()?,
            start: self.u64()?,
            end: self.u64()?,
            write: self.bool()?,
        };
        if r.start > r.end { Err(WireError::Bad("range")) } else { Ok(r) }
    }
    fn key(&mut self) -> R<PlockKey> {
        Ok(PlockKey { who: self.proc()?, owner: self.u64()? })
    }
    fn probe(&mut self) -> R<Probe> {
        let victim = self.key()?;
        let ticket = self.u64()?;
        let owner = self.key()?;
        Ok(Probe { victim, ticket, owner, hops: self.u8()? })
    }
    /// `least`: bytes that an element takes at the least, so that a count cannot ask for more memory than was sent.
    fn list<T>(&mut self, least: usize, mut f: impl FnMut(&mut Self) -> R<T>) -> R<Vec<T>> {
        let n = self.u32()? as usize;
        if n > self.0.len() / least {
            return Err(WireError::Short);
        }
        (0..n).map(|_| f(self)).collect()
    }
    fn op(&mut self) -> R<TreeOp> {
        Ok(match self.u8()? {
            0 => TreeOp::Request {
                id: self.id()?,
                op: self.u32()?,
                mode: self.mode()?,
                flags: self.flags()?,
                order: self.u64()?,
            },
            1 => TreeOp::Convert {
                id: self.id()?,
                op: self.u32()?,
                mode: self.mode()?,
                flags: self.flags()?,
                order: self.u64()?,
                lvb: self.lvb()?,
            },
            2 => TreeOp::Release { id: self.id()?, flags: self.flags()?, lvb: self.lvb()? },
            3 => TreeOp::Cancel { id: self.id()?, op: self.u32()? },
            4 => TreeOp::PlockLock { ticket: self.u64()?, range: self.range()?, wait: self.bool()? },
            5 => TreeOp::PlockUnlock { ticket: self.u64()?, range: self.range()? },
            6 => TreeOp::PlockCancel { ticket: self.u64()?, deadlock: self.bool()? },
            7 => TreeOp::PlockTest { ticket: self.u64()?, range: self.range()? },
            8 => TreeOp::PlockProbe { ticket: self.u64()?, probe: self.probe()? },
            _ => return Err(WireError::Bad("operation")),
        })
    }
    fn record(&mut self) -> R<Record> {
        let r = Record {
            name: self.name()?,
            id: self.id()?,
            op: self.u32()?,
            granted: self.opt_mode()?,
            want: self.opt_mode()?,
            flags: self.flags()?,
            order: self.u64()?,
            valblk: self.bool()?,
            lvb: self.copy()?,
            lvb_valid: self.bool()?,
        };
        if (r.granted.is_none() && r.want.is_none()) || r.op == 0 {
            return Err(WireError::Bad("lock record"));
        }
        Ok(r)
    }
}

pub(crate) fn decode(bytes: &[u8]) -> R<Msg> {
    let mut d = D(bytes);
    let msg = match d.u8()? {
        1 => Msg::Lookup { name: d.name()?, op: d.op()? },
        2 => Msg::Forward { origin: d.proc()?, name: d.name()?, term: d.term()?, op: d.op()? },
        3 => Msg::YouAreMaster { root: d.root()?, term: d.term()?, masks: d.list(10, D::proc)? },
        4 => Msg::Assign { root: d.root()?, master: d.proc()?, term: d.term()? },
        5 => Msg::Drop { root: d.root()?, term: d.term()? },
        6 => Msg::Dropped { root: d.root()?, term: d.term()? },
        7 => Msg::Op { name: d.name()?, term: d.term()?, op: d.op()? },
        8 => Msg::Redirect { root: d.root()?, term: d.term()?, looked_up: d.bool()? },
        9 => {
            let (name, term, id, op) = (d.name()?, d.term()?, d.id()?, d.u32()?);
            let status = Status::from_u8(d.u8()?).ok_or(WireError::Bad("status"))?;
            let mode = d.opt_mode()?;
            if status == Status::Granted && mode.is_none() {
                return Err(WireError::Bad("grant without mode"));
            }
            Msg::Result { name, term, id, op, status, mode, sb: SbFlags(d.u8()?), lvb: d.copy()? }
        }
        10 => Msg::Bast { id: d.id()?, mode: d.mode()? },
        11 => {
            let (name, term, ticket) = (d.root()?, d.term()?, d.u64()?);
            let answer = match d.u8()? {
                0 => PlockAnswer::Granted,
                1 => PlockAnswer::Again,
                2 => PlockAnswer::Cancelled,
                3 => PlockAnswer::Deadlock,
                4 => PlockAnswer::Tested(None),
                5 => PlockAnswer::Tested(Some(PlockTest { who: d.proc()?, range: d.range()? })),
                6 => PlockAnswer::Queued,
                _ => return Err(WireError::Bad("answer")),
            };
            Msg::PlockResult { name, term, ticket, answer }
        }
        12 => Msg::Probe(d.probe()?),
        13 => Msg::PlockVictim { ticket: d.u64()? },
        14 => Msg::Mastered { trees: d.list(12, |d| Ok((d.root()?, d.term()?)))? },
        15 => Msg::Claims {
            claims: d.list(12, |d| {
                Ok(Claim { root: d.root()?, records: d.list(30, D::record)?, ranges: d.list(29, D::range)? })
            })?,
        },
        16 => Msg::SyncEnd { fresh: d.bool()?, gates: d.list(11, |d| Ok((d.proc()?, d.bool()?)))? },
        17 => Msg::Recovered { who: d.proc()? },
        _ => return Err(WireError::Bad("message type")),
    };
    if d.0.is_empty() { Ok(msg) } else { Err(WireError::Trailing) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_of_version_1() {
        let name = ResName::root_of(b"ab").unwrap();
        let m = Msg::Op { name, term: Term(0x0102), op: TreeOp::Cancel { id: LockId(7), op: 9 } };
        let want = [7, 3, 0, 2, b'a', b'b', 2, 1, 0, 0, 0, 0, 0, 0, 3, 7, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0];
        assert_eq!(encode(&m), want);
        assert_eq!(decode(&want), Ok(m));
    }

    #[test]
    fn counts_that_promise_more_than_was_sent_are_refused() {
        for tag in [3, 14, 15, 16] {
            let mut b = vec![tag];
            b.extend_from_slice(&[1; 3]);
            b.extend_from_slice(&u32::MAX.to_le_bytes());
            assert!(decode(&b).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic_and_only_canonical_ones_succeed(b in proptest::collection::vec(any::<u8>(), 0..200), tag in 0u8..20) {
            let mut b = b;
            b.insert(0, tag);
            if let Ok(m) = decode(&b) {
                prop_assert_eq!(encode(&m), b);
            }
        }
    }
}
