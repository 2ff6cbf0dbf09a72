//! `cairnd` and its cluster.conf.

use super::{POLL, cairn, hash, say, scratch, text};
use cairn_base::exit;
use membership::config::Config;
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// A one-node configuration with its key; `cairn` and `extra` go where their names say.
struct Conf {
    dir: tempfile::TempDir,
}

impl Conf {
    fn new() -> Self {
        let conf = Self { dir: scratch() };
        fs::write(conf.key(), [7_u8; 64]).unwrap();
        conf.chmod(0o600);
        conf
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("cluster.conf")
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn chmod(&self, mode: u32) {
        fs::set_permissions(self.key(), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn text(&self, attrs: &str, extra: &str) -> String {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (key, run, port) = (self.key(), self.run_dir(), socket.local_addr().unwrap().port());
        format!(
            "<?xml version=\"1.0\"?>\n<cluster name=\"one\" config_version=\"1\">\n  <cairn profile=\"fast\" one_host=\"yes\" \
             key_file=\"{}\" run_dir=\"{}\"{attrs}/>\n  <clusternodes>\n    <clusternode name=\"alpha\" nodeid=\"1\" \
             addr=\"127.0.0.1\" port=\"{port}\"/>\n  </clusternodes>\n{extra}\n</cluster>\n",
            key.display(),
            run.display()
        )
    }

    fn start(&self, conf: &str) -> super::Said {
        fs::write(self.path(), conf).unwrap();
        self.start_as("alpha")
    }

    fn start_as(&self, node: &str) -> super::Said {
        let (conf, run) = (self.path(), self.run_dir());
        say(&["cairnd", "-f", "--config", text(&conf), "--node", node, "--run-dir", text(&run)])
    }
}

#[test]
fn a_malformed_configuration_is_refused_with_its_place_and_rule() {
    let conf = Conf::new();
    let good = conf.text("", "");
    let file = conf.path().display().to_string();
    let second = "<clusternode name=\"beta\" nodeid=\"1\" addr=\"127.0.0.2\" port=\"9\" run_dir=\"/x\"/>";
    let cases: [(String, [String; 2]); 6] = [
        ("not XML at all".into(), [format!("{file}:1:1: CF-0"), "not well-formed".into()]),
        (
            good.replace("</clusternodes>", "</clusternode>"),
            [format!("{file}:6:3: CF-0"), "not well-formed".into()],
        ),
        (
            good.replace("  </clusternodes>", &format!("    {second}\n  </clusternodes>")),
            [format!("{file}:6:5: CF-1"), "node id 1 of beta is also that of alpha".into()],
        ),
        (
            conf.text(
                "",
                "  <quorumd device=\"file:/x\" label=\"q\" votes=\"1\" interval_ms=\"5000\" tko=\"8\"/>",
            ),
            [format!("{file}:7:3: QD-6"), "below the vote lease".into()],
        ),
        (
            good.replace("\"fast\"", "\"hasty\""),
            [format!("{file}:3:10: CF-0"), "no profile \"hasty\"".into()],
        ),
        (
            good.replace("nodeid=\"1\"", "nodeid=\"zero\""),
            [format!("{file}:5:"), "nodeid=\"zero\" is not a number".into()],
        ),
    ];
    for (bad, words) in cases {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        conf.start(&bad).refused(exit::FAILED, &words);
        assert!(!conf.run_dir().exists(), "written before the configuration was read:\n{bad}");
    }
    fs::remove_file(conf.path()).unwrap();
    conf.start_as("alpha").refused(exit::FAILED, &[&file, "No such file"]);
    assert!(!conf.run_dir().exists());
    conf.start(&good.replace("alpha", "beta")).refused(exit::FAILED, &["no clusternode is named \"alpha\""]);
    say(&["cairnd", "--bogus"]).refused(exit::USAGE, &["usage: cairnd"]);
    say(&["cairnd", "--config"]).refused(exit::USAGE, &["usage: cairnd"]);
}

#[test]
fn a_key_that_others_can_read_or_that_is_none_is_refused() {
    let conf = Conf::new();
    let key = conf.key().display().to_string();
    let good = conf.text("", "");
    for mode in [0o640, 0o604, 0o660, 0o666] {
        conf.chmod(mode);
        let said = conf.start(&good);
        said.refused(exit::FAILED, &["CF-11", &key, &format!("mode {mode:04o}"), "chmod 600"]);
    }
    conf.chmod(0o600);
    fs::write(conf.key(), [7; 31]).unwrap();
    conf.start(&good).refused(exit::FAILED, &["CF-11", &key, "31 bytes; 32 to 4096 are a key"]);
    fs::remove_file(conf.key()).unwrap();
    conf.start(&good).refused(exit::FAILED, &["CF-11", &key, "No such file"]);
    fs::create_dir(conf.key()).unwrap();
    conf.start(&good).refused(exit::FAILED, &["CF-11", &key, "not a regular file"]);
}

/// What an old configuration carries for others stays there, and the node runs.
#[test]
fn unknown_elements_are_warned_about_and_kept() {
    let conf = Conf::new();
    let extra = "  <gulm lockserver=\"x\"><lockserver name=\"y\"/></gulm>";
    let old = conf.text("", extra).replace("one_host", "frob=\"1\" one_host");
    let read = Config::parse(&old, "cluster.conf").unwrap();
    assert_eq!(read.other.len(), 1);
    assert_eq!((read.other[0].name.as_str(), read.other[0].children.len()), ("gulm", 1));
    fs::write(conf.path(), &old).unwrap();
    let log = fs::File::create(conf.dir.path().join("err")).unwrap();
    let mut child = Command::new(cairn())
        .args(["cairnd", "-f", "--node", "alpha", "--config"])
        .arg(conf.path())
        .arg("--run-dir")
        .arg(conf.run_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let start = Instant::now();
    let client = loop {
        let kind = membership::ipc::ClientKind::Tool;
        match membership::client::Client::connect(&conf.run_dir(), kind) {
            Ok(client) => break Some(client),
            Err(_) if start.elapsed() < super::LIMIT && child.try_wait().unwrap().is_none() => {
                std::thread::sleep(POLL);
            }
            Err(_) => break None,
        }
    };
    // SAFETY: our child, not reaped yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let status = child.wait().unwrap();
    let err = fs::read_to_string(conf.dir.path().join("err")).unwrap();
    assert!(client.is_some(), "no daemon: {err}");
    assert_eq!(status.code(), Some(exit::OK), "{err}");
    let file = conf.path().display().to_string();
    for place in [format!("{file}:7:3: "), format!("{file}:3:")] {
        assert!(
            err.lines().any(|l| l.contains("WARN") && l.contains(&place)),
            "no warning at {place} in {err}"
        );
    }
    assert!(err.contains("gulm") && err.contains("frob"), "{err}");
    assert_eq!(fs::read_to_string(conf.path()).unwrap(), old);
}

/// A daemon whose quorum disk is none must not begin to use it.
#[test]
fn a_quorum_disk_that_is_none_is_left_alone() {
    let conf = Conf::new();
    let disk = super::volume(conf.dir.path(), "disk");
    let with = |device: &Path, label: &str| {
        conf.text(
            "",
            &format!("  <quorumd device=\"file:{}\" label=\"{label}\" votes=\"1\"/>", device.display()),
        )
    };
    let before = hash(&disk);
    conf.start(&with(&disk, "qd")).refused(exit::FAILED, &["quorum disk", text(&disk)]);
    conf.start(&with(&conf.dir.path().join("none"), "qd"))
        .refused(exit::FAILED, &["quorum disk", "No such file"]);
    assert!(before == hash(&disk));
    let disk = super::blank(conf.dir.path(), "other", 2 << 20);
    say(&["mkqdisk", "-q", "-c", text(&disk), "-l", "theirs"]).worked();
    let before = hash(&disk);
    conf.start(&with(&disk, "ours")).refused(exit::FAILED, &["quorum disk", text(&disk), "theirs", "ours"]);
    assert!(before == hash(&disk));
}
