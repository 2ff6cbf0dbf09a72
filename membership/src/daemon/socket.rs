//! The control socket: accepts, checks who it is, turns frames into [`Input`]s and back. Decides nothing.

use super::Input;
use crate::ipc::{self, Answer, Call, IpcError};
use crossbeam_channel::Sender;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Connections at once.
const CLIENTS: usize = 1024;

/// The way into the core thread: a bounded queue and a descriptor that wakes it.
#[derive(Clone)]
pub(super) struct Inbox {
    pub(super) queue: Sender<Input>,
    pub(super) wake: Arc<EventFd>,
}

impl Inbox {
    pub(super) fn new(queue: Sender<Input>) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { queue, wake: Arc::new(wake) })
    }

    /// False when the core is gone.
    pub(super) fn put(&self, input: Input) -> bool {
        let sent = self.queue.send(input).is_ok();
        let _ = self.wake.write(1);
        sent
    }
}

/// What goes to one client.
pub(super) struct Outbox {
    frames: UnboundedSender<Vec<u8>>,
    backlog: Arc<AtomicUsize>,
}

impl Outbox {
    /// False when the client must go: it does not read, or it is gone.
    pub(super) fn push(&self, answer: &Answer) -> bool {
        let Ok(frame) = ipc::encode(answer) else { return false };
        let waiting = self.backlog.fetch_add(frame.len(), Ordering::Relaxed) + frame.len();
        waiting <= ipc::CLIENT_BACKLOG && self.frames.send(frame).is_ok()
    }
}

/// Serves until dropped.
pub(super) struct Server {
    path: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Server {
    pub(super) fn start(run_dir: &Path, inbox: Inbox) -> io::Result<Self> {
        let path = run_dir.join("cairnd.sock");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = StdListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("cairnd-socket")
            .enable_io()
            .build()?;
        runtime.spawn(async move {
            match UnixListener::from_std(listener) {
                Ok(listener) => accept(listener, inbox).await,
                Err(e) => tracing::error!("control socket: {e}"),
            }
        });
        Ok(Self { path, runtime: Some(runtime) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        if let Some(runtime) = self.runtime.take() {
            // lets the writers flush what they have (the last Stop event)
            runtime.shutdown_timeout(std::time::Duration::from_millis(200));
        }
    }
}

/// Numbers are not used twice, not even by the next life in this process.
static NEXT_CLIENT: AtomicU32 = AtomicU32::new(1);

async fn accept(listener: UnixListener, inbox: Inbox) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::error!("control socket: accept: {e}");
                return;
            }
        };
        let me = nix::unistd::geteuid().as_raw();
        let Ok(peer) = stream.peer_cred() else { continue };
        if peer.uid() != me && peer.uid() != 0 {
            tracing::warn!("control socket: user {} is refused", peer.uid());
            continue;
        }
        let Some(pid) = peer.pid() else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= CLIENTS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let client = NEXT_CLIENT.fetch_add(1, Ordering::Relaxed);
        let (frames, to_write) = unbounded_channel();
        let backlog = Arc::new(AtomicUsize::new(0));
        let outbox = Outbox { frames, backlog: Arc::clone(&backlog) };
        if !inbox.put(Input::Connected { client, pid, outbox }) {
            return;
        }
        let inbox = inbox.clone();
        let open = Arc::clone(&open);
        tokio::spawn(async move {
            serve(client, stream, to_write, &backlog, &inbox).await;
            open.fetch_sub(1, Ordering::Relaxed);
            inbox.put(Input::Closed { client });
        });
    }
}

async fn serve(
    client: u32,
    stream: UnixStream,
    to_write: UnboundedReceiver<Vec<u8>>,
    backlog: &AtomicUsize,
    inbox: &Inbox,
) {
    let (mut read, mut write) = stream.into_split();
    let mut to_write = to_write;
    let reader = async {
        loop {
            match read_call(&mut read).await {
                Ok(call) => {
                    if !inbox.put(Input::Call { client, call }) {
                        return;
                    }
                }
                Err(IpcError::Io(_)) => return,
                Err(e) => {
                    tracing::warn!("client {client}: {e}");
                    return;
                }
            }
        }
    };
    let writer = async {
        while let Some(frame) = to_write.recv().await {
            if write.write_all(&frame).await.is_err() {
                return;
            }
            backlog.fetch_sub(frame.len(), Ordering::Relaxed);
        }
    };
    tokio::select! {
        () = reader => {}
        () = writer => {}
    }
}

async fn read_call(read: &mut (impl AsyncReadExt + Unpin)) -> Result<Call, IpcError> {
    let mut head = [0; 4];
    read.read_exact(&mut head).await?;
    let mut body = vec![0; ipc::frame_len(head)?];
    read.read_exact(&mut body).await?;
    ipc::decode(&body)
}
