//! Bytes of what the group cores of all nodes say to each other: a tag and a postcard body; the bytes of a message
//! follow its header unwrapped.

use crate::event::{GroupEntry, GroupMember, GroupName, RingId};
use bytes::{BufMut, Bytes, BytesMut};
use cairn_base::Proc;
use serde::{Deserialize, Serialize};

/// One group in a node's SYNC_STATE.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct GroupReport {
    pub(super) name: GroupName,
    pub(super) view_no: u64,
    /// The members as the reporter has shown them to its clients.
    pub(super) believed: Vec<(GroupMember, u64)>,
    /// Its own clients.
    pub(super) own: Vec<GroupEntry>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wire {
    Join { client: u32, join_no: u64, group: GroupName, payload: Bytes },
    Leave { client: u32, group: GroupName },
    ProcDown { client: u32 },
    Mcast { client: u32, no: u64, group: GroupName, data: Bytes },
    Service { service: u8, data: Bytes },
    State { ring: RingId, floor: u64, apart: Vec<Proc>, groups: Vec<GroupReport>, service: Bytes },
    Barrier { ring: RingId, digest: u64 },
}

const JOIN: u8 = 1;
const LEAVE: u8 = 2;
const PROC_DOWN: u8 = 3;
const MCAST: u8 = 4;
const SERVICE: u8 = 5;
const STATE: u8 = 6;
const BARRIER: u8 = 7;

fn pack<T: Serialize>(tag: u8, body: &T, data: &[u8]) -> Bytes {
    let body = postcard::to_stdvec(body).expect("invariant: plain data into memory");
    let mut b = BytesMut::with_capacity(1 + body.len() + data.len());
    b.put_u8(tag);
    b.put_slice(&body);
    b.put_slice(data);
    b.freeze()
}

pub(super) fn encode_mcast(client: u32, no: u64, group: &GroupName, data: &[u8]) -> Bytes {
    pack(MCAST, &(client, no, group), data)
}

pub(super) fn encode_service(service: u8, data: &[u8]) -> Bytes {
    pack(SERVICE, &service, data)
}

impl Wire {
    pub(super) fn encode(&self) -> Bytes {
        match self {
            Self::Join { client, join_no, group, payload } => pack(JOIN, &(client, join_no, group), payload),
            Self::Leave { client, group } => pack(LEAVE, &(client, group), &[]),
            Self::ProcDown { client } => pack(PROC_DOWN, client, &[]),
            Self::Mcast { client, no, group, data } => encode_mcast(*client, *no, group, data),
            Self::Service { service, data } => encode_service(*service, data),
            Self::State { ring, floor, apart, groups, service } => {
                pack(STATE, &(ring, floor, apart, groups), service)
            }
            Self::Barrier { ring, digest } => pack(BARRIER, &(ring, digest), &[]),
        }
    }

    /// `None` for anything that [`Wire::encode`] does not write.
    pub(super) fn decode(bytes: &Bytes) -> Option<Self> {
        fn open<'a, T: Deserialize<'a>>(body: &'a [u8], whole: &Bytes) -> Option<(T, Bytes)> {
            let (value, rest) = postcard::take_from_bytes(body).ok()?;
            Some((value, whole.slice(whole.len() - rest.len()..)))
        }
        let (&tag, body) = bytes.split_first()?;
        let named = |g: &GroupName| !g.as_str().is_empty() && g.as_str().len() <= GroupName::MAX;
        let message = match tag {
            JOIN => {
                let ((client, join_no, group), payload) = open(body, bytes)?;
                Self::Join { client, join_no, group, payload }
            }
            LEAVE => {
                let ((client, group), _) = open(body, bytes)?;
                Self::Leave { client, group }
            }
            PROC_DOWN => Self::ProcDown { client: open(body, bytes)?.0 },
            MCAST => {
                let ((client, no, group), data) = open(body, bytes)?;
                Self::Mcast { client, no, group, data }
            }
            SERVICE => {
                let (service, data) = open(body, bytes)?;
                Self::Service { service, data }
            }
            STATE => {
                let ((ring, floor, apart, groups), service) = open(body, bytes)?;
                Self::State { ring, floor, apart, groups, service }
            }
            BARRIER => {
                let ((ring, digest), _) = open(body, bytes)?;
                Self::Barrier { ring, digest }
            }
            _ => return None,
        };
        match &message {
            Self::Join { group, .. } | Self::Leave { group, .. } | Self::Mcast { group, .. }
                if !named(group) =>
            {
                None
            }
            _ => Some(message),
        }
    }
}
