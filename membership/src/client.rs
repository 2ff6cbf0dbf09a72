//! Blocking client of cairnd for `mount.gfs`, the service manager and the tools.
//!
//! One connection, one reader thread. Replies wake their callers; events go into one bounded channel in the order in
//! which the daemon sent them. A client that does not read its events is disconnected by the daemon in the end (and a
//! mount then has to stop), so read them on a thread of their own.
//!
//! A mount registers itself in the node's run directory before it is told anything (module `alive`), so that whoever
//! fences the node finds it.

use crate::alive::AliveGuard;
use crate::ipc::{
    Answer, Call, ClientKind, ClusterEvent, Command, IpcError, Reply, Request, StatusReport, VERSION,
    Welcome, decode, read_frame, write_frame,
};
use crate::permit::Permit;
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Events that wait in the client before its reader stops reading the socket.
const EVENT_QUEUE: usize = 65_536;

/// How long a request may take; every reply comes from a thread of the daemon that never waits for a disk.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

type Waiting = Arc<Mutex<Option<BTreeMap<u64, Sender<Reply>>>>>;

/// A connection to the node's daemon. Shared by reference between threads; closes when dropped.
pub struct Client {
    stream: UnixStream,
    writer: Mutex<UnixStream>,
    waiting: Waiting,
    events: Receiver<ClusterEvent>,
    next_id: AtomicU64,
    welcome: Welcome,
    run_dir: PathBuf,
    alive: Option<AliveGuard>,
}

impl Client {
    /// Connects, says who we are, and subscribes to events (a `Tool` does not).
    pub fn connect(run_dir: &Path, kind: ClientKind) -> Result<Self, IpcError> {
        let subscribe = kind != ClientKind::Tool;
        Self::connect_with(run_dir, kind, subscribe)
    }

    /// As `connect`, for a tool that watches.
    pub fn connect_with(run_dir: &Path, kind: ClientKind, subscribe: bool) -> Result<Self, IpcError> {
        let path = run_dir.join("cairnd.sock");
        let stream = UnixStream::connect(&path)
            .map_err(|source| IpcError::Connect { path: path.display().to_string(), source })?;
        let mut hello_stream = stream.try_clone()?;
        let is_mount = matches!(kind, ClientKind::Mount { .. });
        write_frame(
            &mut hello_stream,
            &Call { id: 0, request: Request::Hello { version: VERSION, kind, subscribe } },
        )?;
        let welcome = match decode(&read_frame(&mut hello_stream)?)? {
            Answer::Reply { id: 0, reply: Reply::Welcome(w) } if w.version == VERSION => w,
            Answer::Reply { id: 0, reply: Reply::Welcome(w) } => {
                return Err(IpcError::Version { theirs: w.version });
            }
            Answer::Reply { id: 0, reply: Reply::Refused(why) } => return Err(IpcError::Refused(why)),
            _ => return Err(IpcError::Protocol("hello")),
        };
        let alive = if is_mount {
            Some(AliveGuard::register(run_dir, welcome.proc.incarnation, "mount")?)
        } else {
            None
        };
        let waiting: Waiting = Arc::new(Mutex::new(Some(BTreeMap::new())));
        let (tx, events) = bounded(EVENT_QUEUE);
        let reader_waiting = Arc::clone(&waiting);
        std::thread::Builder::new().name("cairnd-client".into()).spawn(move || {
            let why = read_loop(&mut hello_stream, &tx, &reader_waiting);
            // Callers that wait learn it from their dropped senders, later ones from the missing map.
            reader_waiting.lock().take();
            let _ = tx.send(ClusterEvent::Disconnected { why });
        })?;
        Ok(Self {
            writer: Mutex::new(stream.try_clone()?),
            stream,
            waiting,
            events,
            next_id: AtomicU64::new(1),
            welcome,
            run_dir: run_dir.to_owned(),
            alive,
        })
    }

    /// Who we are: node, life, client number, names.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The node's permit to write, for the LUN's guard. Mounts check it before each submission.
    pub fn permit(&self) -> Result<Permit, IpcError> {
        Permit::open(&self.run_dir, self.welcome.proc.incarnation).map_err(IpcError::Io)
    }

    /// Events in the node's order. The last one is `Disconnected`.
    pub fn events(&self) -> &Receiver<ClusterEvent> {
        &self.events
    }

    /// Asks to become a member; the `GroupView` that contains us says that it has happened. A group that writes to the
    /// LUN (`gfs:…`) or runs services (`rgmanager`) is joined only once the node is in the fence domain: that can take until quorum.
    pub fn join_group(&self, group: &str, payload: &[u8]) -> Result<(), IpcError> {
        self.done("join", Request::Join { group: group.to_owned(), payload: payload.to_vec() })
    }

    pub fn leave_group(&self, group: &str) -> Result<(), IpcError> {
        self.done("leave", Request::Leave { group: group.to_owned() })
    }

    /// Multicasts to the group. Retries while the ring's queue is full, up to the reply limit.
    pub fn send(&self, group: &str, safe: bool, data: &[u8]) -> Result<(), IpcError> {
        let give_up = Instant::now() + REPLY_LIMIT;
        loop {
            let request = Request::Send { group: group.to_owned(), safe, data: data.to_vec() };
            match self.done("send", request) {
                Err(IpcError::Busy) if Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => return other,
            }
        }
    }

    pub fn status(&self) -> Result<StatusReport, IpcError> {
        match self.call(Request::Status)? {
            Reply::Status(report) => Ok(*report),
            Reply::Refused(why) => Err(IpcError::Refused(why)),
            _ => Err(IpcError::Protocol("status")),
        }
    }

    pub fn command(&self, command: Command) -> Result<(), IpcError> {
        self.done("command", Request::Command(command))
    }

    fn done(&self, what: &'static str, request: Request) -> Result<(), IpcError> {
        match self.call(request)? {
            Reply::Done => Ok(()),
            Reply::Busy => Err(IpcError::Busy),
            Reply::Refused(why) => Err(IpcError::Refused(why)),
            _ => Err(IpcError::Protocol(what)),
        }
    }

    fn call(&self, request: Request) -> Result<Reply, IpcError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = bounded(1);
        match self.waiting.lock().as_mut() {
            Some(map) => map.insert(id, tx),
            None => return Err(IpcError::Closed),
        };
        let written = write_frame(&mut *self.writer.lock(), &Call { id, request });
        let answer = match written {
            Ok(()) => rx
                .recv_timeout(REPLY_LIMIT)
                .map_err(|e| if e.is_timeout() { IpcError::TimedOut(REPLY_LIMIT) } else { IpcError::Closed }),
            Err(e) => Err(e),
        };
        if answer.is_err()
            && let Some(map) = self.waiting.lock().as_mut()
        {
            map.remove(&id);
        }
        answer
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The registration outlives the connection: the daemon must not see us gone from the run directory first.
        let _ = self.stream.shutdown(Shutdown::Both);
        drop(self.alive.take());
    }
}

/// Reads until the connection ends and says why it did.
fn read_loop(stream: &mut UnixStream, events: &Sender<ClusterEvent>, waiting: &Waiting) -> String {
    loop {
        let answer = match read_frame(stream).and_then(|body| decode::<Answer>(&body)) {
            Ok(answer) => answer,
            Err(e) => return e.to_string(),
        };
        match answer {
            Answer::Event(event) => {
                if events.send(event).is_err() {
                    return "client dropped".to_owned();
                }
            }
            Answer::Reply { id, reply } => {
                let caller = waiting.lock().as_mut().and_then(|map| map.remove(&id));
                if let Some(caller) = caller {
                    let _ = caller.send(reply);
                }
            }
        }
    }
}
