//! The protocol of cairnd's control socket: what local processes say to their node, and what they are told.
//!
//! A frame is a little-endian u32 length and that many bytes of postcard. The first frame in each direction is
//! [`Request::Hello`] and its [`Reply::Welcome`]; a different [`VERSION`] is refused there, in words. Every other
//! request carries an id that its reply repeats; events come in between, in the one order of this node.
//!
//! Order promised to every subscriber: `View`, `Fenced`, `GroupView` and `GroupMessage` appear at all nodes of a view in
//! the same order. `Quorum` inside a view, `Permit` and `Device` are local facts and carry no order between nodes.
//! After `Stop` nothing follows but the end of the connection.

use crate::timing::Timing;
use cairn_base::{Boottime, Incarnation, NodeId, Proc, ViewId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, Read, Write};

/// Version of the protocol. Both sides must have the same.
pub const VERSION: u16 = 1;

/// Longest frame that either side accepts: a group message of 1 MiB and its wrapping.
pub const MAX_FRAME: usize = (1 << 20) + (1 << 16);

/// Longest group message and longest join payload.
pub const MAX_MESSAGE: usize = (1 << 20) - 512;
pub const MAX_PAYLOAD: usize = 4096;

/// Longest group name.
pub const MAX_GROUP_NAME: usize = 128;

/// Bytes of unread events after which a client is disconnected as a slow reader.
pub const CLIENT_BACKLOG: usize = 16 << 20;

/// What a client is; decides what its death means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientKind {
    /// A mounted file system. If the process dies, it is a victim of its own and needs a proof of death.
    Mount { fs: String },
    /// The service manager.
    Rgmanager,
    /// A command that asks and goes; gets no events unless it subscribes.
    Tool,
    /// Any other group member.
    Other(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    Hello { version: u16, kind: ClientKind, subscribe: bool },
    Join { group: String, payload: Vec<u8> },
    Leave { group: String },
    Send { group: String, safe: bool, data: Vec<u8> },
    Status,
    Command(Command),
}

/// What an administrator may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Leave the cluster cleanly and end the daemon. Refused while mounts exist, unless `force` (they are then killed
    /// and proved dead first). `remove`: the votes of this node leave the expectation as well.
    LeaveCluster { force: bool, remove: bool },
    /// `cman_tool kill`: the named member is told to stop and is put out of the ring.
    KillNode { node: String },
    /// `fence_node`: run the configured methods against the node now.
    FenceNode { node: String },
    /// A person asserts that the node is dead. Refused while there is evidence of life, unless `force_unsafe`.
    FenceAckManual { node: String, force_unsafe: bool },
    /// `cman_tool expected -e`.
    SetExpected { votes: u32 },
}

/// Envelope from client to daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    pub id: u64,
    pub request: Request,
}

/// Envelope from daemon to client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    Reply { id: u64, reply: Reply },
    Event(ClusterEvent),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    Welcome(Welcome),
    Done,
    /// The ring's queue is full: nothing was sent, try again after the next event or a few milliseconds.
    Busy,
    Refused(String),
    Status(Box<StatusReport>),
}

/// Who the client is, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    pub version: u16,
    /// This node in its present life.
    pub proc: Proc,
    /// Number of the client at its node; with `proc` it names a group member. Never used twice in one life.
    pub client: u32,
    pub node_name: String,
    pub cluster_name: String,
    pub config_version: u32,
    /// For a mount: the key of its lock manager's links, `Secret::lock_key` of the cluster key. Empty for everybody else.
    pub lock_key: Secret,
}

/// Key bytes that no log shows.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub Vec<u8>);

impl Secret {
    /// HKDF-SHA256 of the cluster key, so that a mount process never holds the cluster key itself.
    pub fn lock_key(cluster_key: &[u8], cluster_name: &str) -> Self {
        let mut out = vec![0; 32];
        hkdf::Hkdf::<sha2::Sha256>::new(Some(cluster_name.as_bytes()), cluster_key)
            .expand(b"cairn dlm 1", &mut out)
            .expect("invariant: 32 bytes are a valid length for HKDF-SHA256");
        Self(out)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secret bytes", self.0.len())
    }
}

/// A node of a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewMember {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub votes: u32,
    pub name: String,
}

impl ViewMember {
    pub fn proc(&self) -> Proc {
        Proc { node: self.node, incarnation: self.incarnation }
    }
}

/// How a node left a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Departure {
    /// It said goodbye to the fence domain first; there is nothing to fence.
    Clean,
    /// It must be fenced before anything that it may have held is touched.
    Failed,
    /// The same node is there again in a later life.
    Restarted(Incarnation),
}

/// A set of nodes that order messages together, with its quorum at the moment of installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewInfo {
    pub id: ViewId,
    pub members: Vec<ViewMember>,
    pub joined: Vec<Proc>,
    pub left: Vec<(Proc, Departure)>,
    pub quorate: bool,
}

/// Why quorum was computed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum QuorumWhy {
    View,
    Device,
    Expected,
    Shrink,
}

/// What of a node was fenced.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Scope {
    /// The whole node in that life, with all its mounts.
    Node,
    /// One mount process of a node that lives on; `client` as in [`GroupMember`].
    Mount { client: u32, fs: String },
}

/// What makes a fence true.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proof {
    /// The kernel says that every process of the victim that could write has ended (`fence_local`).
    Exited,
    /// Nothing of the victim was running: its lock was free, or the life in question had ended before.
    NotRunning,
    /// An outside agent exited with status 0.
    Agent(String),
    /// The node has left the fence domain, its mounts having ended; or the quorum disk says that it stopped cleanly, and it has been
    /// silent since.
    StoppedClean,
    /// The node came back as a later life and asserts that no process of the old one exists.
    Rejoined(Incarnation),
    /// A person said so.
    Override { user: String, unix_time: u64 },
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited => f.write_str("exited"),
            Self::NotRunning => f.write_str("not-running"),
            Self::Agent(name) => write!(f, "agent({name})"),
            Self::StoppedClean => f.write_str("stopped-clean"),
            Self::Rejoined(inc) => write!(f, "rejoined({inc})"),
            Self::Override { user, .. } => write!(f, "override({user})"),
        }
    }
}

/// A member of a process group: a client of a node in one of its lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    pub proc: Proc,
    pub client: u32,
    /// What the member gave when it joined.
    pub payload: Vec<u8>,
}

/// Why a member is no longer in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaveReason {
    /// It said so.
    Leave,
    /// Its node is out of the view.
    NodeDown,
    /// Its process ended or its connection closed without a leave.
    ProcDown,
}

/// Why the permit to write was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopWhy {
    /// SS1: the view is not quorate.
    NotQuorate,
    /// SS2: no token for too long.
    NoToken,
    /// SS3: the quorum disk could not be renewed.
    DiskStale,
    /// SS4: killed: by an administrator, by the quorum disk's master, or for a protocol error.
    Killed,
    /// SS5: a quorate view went on without this incarnation.
    Excluded,
    /// SS6: a thread of the daemon made no progress.
    Stuck,
    /// SS12: the local disk does not take the incarnation or the ring's sequence number.
    NotDurable,
    /// The administrator stopped the node.
    Shutdown,
}

impl fmt::Display for StopWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotQuorate => "not quorate",
            Self::NoToken => "no token",
            Self::DiskStale => "quorum disk not renewed",
            Self::Killed => "killed",
            Self::Excluded => "excluded by a quorate view",
            Self::Stuck => "a daemon thread is stuck",
            Self::NotDurable => "local state is not durable",
            Self::Shutdown => "shutdown",
        })
    }
}

/// What a client is told. See the module page for the order that is promised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterEvent {
    /// `quorate`: by its votes. A client may take itself for quorate with [`Self::Quorum`] only; it loses quorum with either.
    View(ViewInfo),
    /// Quorum came with a view, which is recorded now, or changed inside it (device, expected votes, shrink).
    Quorum {
        view: ViewId,
        needed: u32,
        have: u32,
        quorate: bool,
        why: QuorumWhy,
    },
    /// From here on no write of that life (or mount) takes effect. `proc.incarnation` 0: "whatever ran there before",
    /// from start-up fencing. When a client subscribes it is told the last proof of each node, which answers for the node's earlier
    /// lives, and the mounts that ended in its present life.
    Fenced {
        proc: Proc,
        scope: Scope,
        proof: Proof,
        view: ViewId,
    },
    /// A victim waits for its proof. Also sent once for each present victim when a client subscribes.
    FencePending {
        proc: Proc,
        scope: Scope,
    },
    /// Members are sorted by (node, incarnation, client). `view_no` is the same at all members and rises. Those that left
    /// come without payload.
    /// In a quorate view this and the messages of groups come when the view is recorded.
    GroupView {
        group: String,
        view_no: u64,
        members: Vec<GroupMember>,
        joined: Vec<GroupMember>,
        left: Vec<(GroupMember, LeaveReason)>,
    },
    /// `no` counts the messages of that sender in the group, from 1, without holes.
    GroupMessage {
        group: String,
        from: Proc,
        client: u32,
        no: u64,
        safe: bool,
        data: Vec<u8>,
    },
    PermitGranted {
        view: ViewId,
    },
    PermitWithdrawn {
        why: StopWhy,
    },
    /// The quorum disk's votes, as this node may count them.
    Device {
        held: bool,
        votes: u32,
        master: Option<NodeId>,
    },
    /// The node leaves the cluster: the service manager hands its services over and disconnects. What is not done by `deadline` is
    /// not waited for, and the node then does not leave cleanly.
    Leaving {
        deadline: Boottime,
    },
    /// This life of the node ends: stop writing now, exit before `deadline` or be killed.
    Stop {
        why: StopWhy,
        deadline: Boottime,
    },
    /// Made by the client library: the daemon is gone. Freeze, and exit.
    Disconnected {
        why: String,
    },
}

/// Everything that the status tools show.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusReport {
    pub protocol_version: String,
    pub config_version: u32,
    pub cluster_name: String,
    pub cluster_id: u16,
    pub rhel5: bool,
    pub node_name: String,
    pub node: NodeId,
    pub incarnation: Incarnation,
    /// Sequence number of the ring.
    pub generation: u64,
    pub state: MembershipState,
    pub quorate: bool,
    pub expected_votes: u32,
    pub node_votes: u32,
    /// Present while the device's votes are counted.
    pub device_votes: Option<u32>,
    pub total_votes: u32,
    pub quorum: u32,
    pub active_subsystems: u32,
    pub flags: Vec<String>,
    pub ports_bound: Vec<u16>,
    pub multicast: String,
    pub addresses: Vec<String>,
    pub nodes: Vec<NodeStatus>,
    pub device: Option<DeviceStatus>,
    pub fence: FenceStatus,
    pub groups: Vec<GroupStatus>,
    pub clients: Vec<ClientStatus>,
    pub ring_state: String,
    /// Milliseconds that the permit to write has left; 0 when there is none.
    pub permit_left_ms: u64,
    pub stop: Option<StopWhy>,
    pub timing: Timing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MembershipState {
    Joining,
    ClusterMember,
    NotInCluster,
    Leaving,
}

impl fmt::Display for MembershipState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Joining => "Joining",
            Self::ClusterMember => "Cluster-Member",
            Self::NotInCluster => "Not-in-Cluster",
            Self::Leaving => "Leaving",
        })
    }
}

/// One configured node, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub node: NodeId,
    pub name: String,
    pub votes: u32,
    pub member: bool,
    /// Ring sequence number at which it last joined; 0 when never seen.
    pub joined_generation: u64,
    /// Seconds since 1970, when it is a member.
    pub joined_unix: Option<u64>,
    pub incarnation: Incarnation,
    pub addresses: Vec<String>,
    pub in_fence_domain: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    pub name: String,
    pub label: String,
    pub votes: u32,
    pub held: bool,
    pub master: Option<NodeId>,
    pub state: String,
    /// Milliseconds since the last renewal of this node's own slot.
    pub renewed_ms_ago: Option<u64>,
    pub evicted: Vec<Proc>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitState {
    None,
    Quorum,
    Messages,
    Fencing,
}

impl fmt::Display for WaitState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Quorum => "quorum",
            Self::Messages => "messages",
            Self::Fencing => "fencing",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VictimStatus {
    pub proc: Proc,
    pub name: String,
    pub cause: String,
    pub fencer: Option<NodeId>,
    pub attempts: u32,
    pub last_error: String,
}

/// The last proof of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceRecord {
    pub proc: Proc,
    pub fencer: NodeId,
    pub proof: Proof,
    pub unix_time: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceStatus {
    pub in_domain: bool,
    pub members: Vec<NodeId>,
    pub victims: Vec<VictimStatus>,
    /// Node that is being fenced now.
    pub victim_now: Option<NodeId>,
    pub master: Option<NodeId>,
    pub wait_state: WaitState,
    pub history: Vec<FenceRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatus {
    pub name: String,
    pub view_no: u64,
    pub members: Vec<GroupMember>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientStatus {
    pub client: u32,
    pub pid: u32,
    pub kind: ClientKind,
    pub groups: Vec<String>,
}

/// Errors of the control socket, on either side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IpcError {
    #[error(
        "cannot reach cairnd at {path}: {source}; is it running, and is this the node's run directory (--run-dir, CAIRN_RUN_DIR)?"
    )]
    Connect { path: String, source: io::Error },
    #[error("connection to cairnd: {0}")]
    Io(#[from] io::Error),
    #[error("frame of {len} bytes is over the limit of {MAX_FRAME}")]
    TooLong { len: usize },
    #[error("frame does not decode: {0}")]
    Decode(postcard::Error),
    #[error("cairnd speaks protocol version {theirs}, this program {VERSION}")]
    Version { theirs: u16 },
    #[error("{0}")]
    Refused(String),
    #[error("the ring's send queue is full")]
    Busy,
    #[error("connection to cairnd is closed")]
    Closed,
    #[error("cairnd did not answer within {0:?}")]
    TimedOut(std::time::Duration),
    #[error("unexpected reply to {0}")]
    Protocol(&'static str),
    #[error("cannot register this process in {path}: {why}")]
    Alive { path: String, why: String },
}

/// One frame: length and postcard bytes.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, IpcError> {
    let frame = postcard::to_extend(value, vec![0; 4]).map_err(IpcError::Decode)?;
    finish(frame)
}

fn finish(mut frame: Vec<u8>) -> Result<Vec<u8>, IpcError> {
    let len = frame.len() - 4;
    if len > MAX_FRAME {
        return Err(IpcError::TooLong { len });
    }
    frame[..4].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(frame)
}

/// The length in a frame's head, checked.
pub fn frame_len(head: [u8; 4]) -> Result<usize, IpcError> {
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX_FRAME { Err(IpcError::TooLong { len }) } else { Ok(len) }
}

/// The content of a frame; bytes left over are an error, as everything unexpected is.
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, IpcError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(IpcError::Decode(postcard::Error::DeserializeBadEncoding)),
        Err(e) => Err(IpcError::Decode(e)),
    }
}

pub fn write_frame<T: Serialize>(to: &mut impl Write, value: &T) -> Result<(), IpcError> {
    to.write_all(&encode(value)?)?;
    Ok(())
}

pub fn read_frame(from: &mut impl Read) -> Result<Vec<u8>, IpcError> {
    let mut head = [0; 4];
    from.read_exact(&mut head)?;
    let mut body = vec![0; frame_len(head)?];
    from.read_exact(&mut body)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let call = Call {
            id: 7,
            request: Request::Send { group: "gfs:web".into(), safe: true, data: vec![0, 255, 3] },
        };
        let mut wire = Vec::new();
        write_frame(&mut wire, &call).unwrap();
        let body = read_frame(&mut wire.as_slice()).unwrap();
        let back: Call = decode(&body).unwrap();
        assert_eq!(format!("{call:?}"), format!("{back:?}"));
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused_before_memory_is_taken() {
        let wire = [0xff, 0xff, 0xff, 0x7f, 0];
        assert!(matches!(read_frame(&mut wire.as_slice()), Err(IpcError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_err_but_never_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<Call>(&body);
            let _ = decode::<Answer>(&body);
        }
    }
}
