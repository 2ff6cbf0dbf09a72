//! The commands that an administrator of the historic suite knows, with their output, on the node's control sockets.

pub(crate) mod clustat;
pub(crate) mod clusvcadm;
pub(crate) mod cman_tool;
pub(crate) mod dlm_tool;
pub(crate) mod fence_ack_manual;

use membership::client::Client;
use membership::ipc::{ClientKind, IpcError, StatusReport};
use std::path::PathBuf;

/// Where the node's sockets are: `--run-dir`, else `$CAIRN_RUN_DIR`, else `/run/cairn`.
#[derive(clap::Args, Debug)]
pub(crate) struct NodeArg {
    /// Run directory of the node to ask
    #[arg(long, env = "CAIRN_RUN_DIR", default_value = "/run/cairn", global = true)]
    pub(crate) run_dir: PathBuf,
}

impl NodeArg {
    /// What the daemon says of its node, and the way to ask it for more.
    pub(crate) fn ask(&self) -> Result<(Client, StatusReport), IpcError> {
        let client = self.tool()?;
        let report = client.status()?;
        Ok((client, report))
    }

    pub(crate) fn tool(&self) -> Result<Client, IpcError> {
        Client::connect(&self.run_dir, ClientKind::Tool)
    }
}

/// The arguments of a command, or its exit code when they are wrong or `--help` was asked for.
pub(crate) fn parse<A: clap::Parser>(argv: &[String]) -> Result<A, i32> {
    A::try_parse_from(argv).map_err(|e| crate::usage(&e))
}

/// `Tue Aug 24 18:59:01 2010`, in local time.
pub(crate) fn ctime(unix: u64) -> String {
    local_time(unix, c"%a %b %e %H:%M:%S %Y")
}

/// `2010-08-24 18:59:01`, in local time.
pub(crate) fn iso_time(unix: u64) -> String {
    local_time(unix, c"%Y-%m-%d %H:%M:%S")
}

fn local_time(unix: u64, format: &std::ffi::CStr) -> String {
    let secs = unix as libc::time_t;
    let mut buf = [0_u8; 64];
    // SAFETY: `tm` is filled by localtime_r before strftime reads it; the buffer's length is passed along.
    let len = unsafe {
        let mut tm = std::mem::zeroed::<libc::tm>();
        if libc::localtime_r(&raw const secs, &raw mut tm).is_null() {
            return String::new();
        }
        libc::strftime(buf.as_mut_ptr().cast(), buf.len(), format.as_ptr(), &raw const tm)
    };
    String::from_utf8_lossy(&buf[..len]).into_owned()
}
