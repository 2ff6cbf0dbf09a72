//! Making a local cluster: LUN with two partitions, quorum disk, volume, key, configuration, service script.

use super::{Cluster, Doing, Failure, Layout, Result, fail, own_exe};
use lun::part::{self, PartSpec};
use std::fmt::Write;
use std::fs::{self, OpenOptions};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
/// The quorum disk's partition; it needs far less.
const QDISK_BYTES: u64 = 8 * MIB;
/// The cluster name is also the first part of the volume's lock table.
const CLUSTER: &str = "cairn";
const FS: &str = "vol";

/// Below the cluster's directory; a mount's own socket has its process number.
const LONGEST_SOCKET: &str = "/nodes/node16/mounts/4194304.sock";
/// `sun_path` without the end of the string (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// What `cairn up` was asked to make.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) dir: PathBuf,
    pub(crate) nodes: u16,
    pub(crate) profile: String,
    pub(crate) volume_mib: u64,
    pub(crate) journal_mib: u64,
    pub(crate) has_quorum_disk: bool,
}

impl Plan {
    /// Make all files; nothing is started. Refuses a directory that is in use for something else; a failure leaves nothing behind.
    pub(crate) fn create(&self) -> Result<Cluster> {
        if fs::read_dir(&self.dir).is_ok_and(|mut d| d.next().is_some()) {
            return fail(format!(
                "{} exists and is not empty; choose another --dir, or cairn down --dir {} first",
                self.dir.display(),
                self.dir.display()
            ));
        }
        self.check_dir()?;
        let is_new = !self.dir.exists();
        self.make().inspect_err(|_| {
            let _ = fs::remove_dir_all(&self.dir);
            if !is_new {
                let _ = fs::create_dir(&self.dir);
            }
        })
    }

    /// The directory's name goes into cluster.conf, names of LUNs and names of sockets.
    fn check_dir(&self) -> Result<()> {
        let dir = std::path::absolute(&self.dir).doing(self.dir.display())?;
        let no = |why: &str| fail(format!("{}: {why}; choose another --dir", dir.display()));
        let Some(text) = dir.to_str() else { return no("the path is not UTF-8") };
        if text.contains('%') || text.contains("#part=") || text.chars().any(char::is_control) {
            return no("a cluster cannot live under a path with a %, #part= or a control character");
        }
        if text.len() + LONGEST_SOCKET.len() > SOCKET_PATH_MAX {
            return no("the path is too long for the names of the sockets below it");
        }
        Ok(())
    }

    fn make(&self) -> Result<Cluster> {
        fs::create_dir_all(&self.dir).doing(self.dir.display())?;
        let dir = self.dir.canonicalize().doing(self.dir.display())?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).doing(dir.display())?;
        let nodes: Vec<String> = (1..=self.nodes).map(|i| format!("node{i}")).collect();
        let http =
            TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).doing("a port for the service")?;
        let layout = Layout {
            cluster: CLUSTER.into(),
            fs: FS.into(),
            profile: self.profile.clone(),
            nodes,
            http: http.to_string(),
        };
        let cluster = Cluster { dir, layout };
        // First, so that `cairn down` finds what a failure leaves behind.
        let json = serde_json::to_string_pretty(&cluster.layout).doing("layout")?;
        fs::write(cluster.dir.join("cluster.json"), json).doing("cluster.json")?;
        self.make_lun(&cluster)?;
        make_key(&cluster.dir.join("cairn.key"))?;
        write_script(&cluster)?;
        fs::write(cluster.config(), self.configuration(&cluster)?).doing("cluster.conf")?;
        for node in &cluster.layout.nodes {
            fs::create_dir_all(cluster.run_dir(node).join("log")).doing(node)?;
            fs::set_permissions(cluster.run_dir(node), fs::Permissions::from_mode(0o700)).doing(node)?;
            fs::create_dir_all(cluster.mount_point(node)).doing(node)?;
        }
        Ok(cluster)
    }

    fn make_lun(&self, cluster: &Cluster) -> Result<()> {
        let path = cluster.dir.join("lun.img");
        let size = 2 * MIB + QDISK_BYTES + self.volume_mib * MIB;
        let file = OpenOptions::new().write(true).create_new(true).open(&path).doing(path.display())?;
        file.set_len(size).doing(path.display())?;
        drop(file);
        let url = format!("file:{}", path.display());
        let dev = lun::open(&url, &lun::OpenOptions::default()).doing("the new LUN")?;
        let mut guid = [0; 16];
        getrandom::fill(&mut guid).map_err(|e| Failure(format!("random numbers: {e}")))?;
        let mut part_guid = guid;
        let mut spec = |name: &str, bytes: u64| {
            part_guid[15] = part_guid[15].wrapping_add(1);
            PartSpec {
                name: name.into(),
                size: Some(bytes),
                type_guid: part::TYPE_LINUX_DATA,
                guid: part_guid,
            }
        };
        let parts = [spec("quorum", QDISK_BYTES), spec("volume", self.volume_mib * MIB)];
        part::create(dev.as_ref(), guid, &parts).doing("partition table")?;
        drop(dev);
        if self.has_quorum_disk {
            own(&["mkqdisk", "--yes", "-c", &format!("{url}#part=1"), "-l", CLUSTER])?;
        }
        let table = format!("{CLUSTER}:{FS}");
        let journals = self.nodes.to_string();
        let mib = self.journal_mib.to_string();
        // The volume belongs to whoever makes the cluster, who need not be root.
        let owner = format!("{}:{}", nix::unistd::geteuid(), nix::unistd::getegid());
        let device = cluster.device();
        let words = ["-q", "-O", "-p", "lock_dlm", "-t", &table, "-j", &journals, "-J", &mib, "--root-owner"];
        let words: Vec<&str> =
            std::iter::once("mkfs.gfs").chain(words).chain([owner.as_str(), &device]).collect();
        own(&words)
    }

    fn configuration(&self, cluster: &Cluster) -> Result<String> {
        let dir = in_xml(&cluster.dir.display().to_string());
        let mut nodes = String::new();
        for (i, name) in cluster.layout.nodes.iter().enumerate() {
            let id = i + 1;
            let addr = format!("127.0.0.{id}");
            // A port that was free a moment ago; the daemon says clearly if somebody took it since.
            let port = UdpSocket::bind((addr.as_str(), 0)).and_then(|s| s.local_addr()).doing(&addr)?.port();
            let _ = writeln!(
                nodes,
                "    <clusternode name=\"{name}\" nodeid=\"{id}\" votes=\"1\" addr=\"{addr}\" port=\"{port}\"/>"
            );
        }
        // n nodes and n-1 device votes: the last node and the disk are a majority.
        let device_votes = self.nodes.saturating_sub(1);
        let qdisk = if device_votes == 0 || !self.has_quorum_disk {
            String::new()
        } else {
            format!(
                "  <quorumd device=\"file:{dir}/lun.img#part=1\" label=\"{CLUSTER}\" votes=\"{device_votes}\"/>\n"
            )
        };
        Ok(format!(
            r#"<?xml version="1.0"?>
<cluster name="{CLUSTER}" config_version="1">
  <cairn profile="{profile}" one_host="yes" lun="{lun}" key_file="{dir}/cairn.key" run_dir="{dir}/nodes/%n"/>
  <clusternodes>
{nodes}  </clusternodes>
{qdisk}
  <rm status_poll_interval="2">
    <service name="web" recovery="relocate">
      <clusterfs name="vol" device="{lun}" mountpoint="{dir}/mnt/%n" fstype="gfs2">
        <script name="httpd" file="{dir}/httpd"/>
      </clusterfs>
    </service>
  </rm>
</cluster>
"#,
            profile = self.profile,
            lun = in_xml(&cluster.device()),
        ))
    }
}

fn in_xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

/// Run one of our own commands; its messages are the error.
fn own(args: &[&str]) -> Result<()> {
    let out = Command::new(own_exe()?).args(args).output().doing(args[0])?;
    if out.status.success() {
        return Ok(());
    }
    fail(String::from_utf8_lossy(&out.stderr).trim())
}

fn make_key(path: &Path) -> Result<()> {
    let mut key = [0_u8; 64];
    getrandom::fill(&mut key).map_err(|e| Failure(format!("random numbers: {e}")))?;
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).doing(path.display())?;
    std::io::Write::write_all(&mut file, &key).doing(path.display())
}

/// The service: a web server for the volume's `www` directory, started and stopped like an init script.
fn write_script(cluster: &Cluster) -> Result<()> {
    let path = cluster.dir.join("httpd");
    let text = format!(
        r#"#!/bin/sh
# start | stop | status; the environment comes from the service manager
pid_file=$CAIRN_RUN_DIR/httpd.pid
# A number that a crash has left may be anybody's by now: ours has this file among its arguments, and keeps its start time to the end.
alive() {{ pid=$(cat "$pid_file" 2>/dev/null) && grep -qzxF -e "$pid_file" "/proc/$pid/cmdline" 2>/dev/null; }}
started() {{ sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }}
case $1 in
start)
	alive && exit 0
	rm -f "$pid_file"
	mkdir -p "$OCF_RESKEY_mountpoint/www" || exit 1
	setsid '{exe}' http-serve --dir "$OCF_RESKEY_mountpoint/www" --listen {http} \
		--pid-file "$pid_file" --name "$(basename "$CAIRN_RUN_DIR")" </dev/null &
	server=$!
	while ! alive; do
		kill -0 $server 2>/dev/null || exit 1
		sleep 0.02
	done ;;
stop)
	if alive; then
		start_time=$(started "$pid")
		kill "$pid"
		while [ -n "$start_time" ] && [ "$(started "$pid")" = "$start_time" ]; do sleep 0.02; done
	fi
	rm -f "$pid_file" ;;
status)
	alive ;;
*)
	echo "usage: $0 start|stop|status" >&2; exit 2 ;;
esac
"#,
        exe = own_exe()?.display().to_string().replace('\'', r"'\''"),
        http = cluster.layout.http,
    );
    fs::write(&path, text).doing(path.display())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).doing(path.display())
}
