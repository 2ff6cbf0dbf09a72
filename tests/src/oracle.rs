//! Judges that know nothing of this project: `fsck.gfs2`, and Linux's own gfs2 in a user-mode guest ([`kernel`]).
//!
//! A judge that is not installed makes a test fail, unless the environment has `CAIRN_ORACLES=optional`; then the test says
//! which package is missing and passes.

pub mod kernel;

use gfs::BlockNo;
use gfs::ondisk::dinode::{S_IFMT, S_IFREG};
use gfs::reader::Reader;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;

/// May this test go on? False when something is missing and that is allowed.
pub fn present(missing: Option<&str>) -> bool {
    let Some(package) = missing else { return true };
    let optional = std::env::var("CAIRN_ORACLES").is_ok_and(|v| v == "optional");
    assert!(optional, "package {package} is missing (CAIRN_ORACLES=optional skips such tests)");
    eprintln!("skipped: package {package} missing");
    false
}

/// The package that `fsck.gfs2` and `mkfs.gfs2` need, if they are not there.
pub fn missing_utils() -> Option<&'static str> {
    Command::new("fsck.gfs2").arg("-V").output().is_err().then_some("gfs2-utils")
}

/// What `fsck.gfs2` said.
#[derive(Clone, Debug)]
pub struct FsckResult {
    /// `None` when it was killed because it did not end.
    pub code: Option<i32>,
    pub text: String,
}

impl FsckResult {
    /// Exit code 0 and no complaint in the text: with a dirty journal the code alone may be 0.
    pub fn is_clean(&self) -> bool {
        self.code == Some(0) && !["dirty", "corrupt", "bitmap says"].iter().any(|w| self.text.contains(w))
    }
}

fn fsck(image: &Path, flag: &str) -> FsckResult {
    let out = Command::new("timeout")
        .args(["-k", "1", "60", "fsck.gfs2", flag])
        .arg(image)
        .output()
        .expect("timeout and fsck.gfs2");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    FsckResult { code: out.status.code().filter(|&c| c != 124 && c != 137), text }
}

/// `fsck.gfs2 -n`: looks, changes nothing.
pub fn fsck_gfs2(image: &Path) -> FsckResult {
    fsck(image, "-n")
}

/// `fsck.gfs2 -y`: replays journals and repairs.
pub fn fsck_gfs2_repair(image: &Path) -> FsckResult {
    fsck(image, "-y")
}

/// One line for every name of a tree, sorted: what every reader of a volume must agree on.
///
/// `path TAB type TAB permissions TAB links TAB size or - TAB SHA-256, link target or -`, types as `find -printf %y` names them.
pub fn tree_digest(reader: &Reader) -> gfs::Result<Vec<String>> {
    let mut lines = Vec::new();
    for node in reader.tree()? {
        if node.path.is_empty() {
            continue;
        }
        let di = &node.dinode;
        let path = String::from_utf8_lossy(&node.path);
        let (perm, links) = (di.mode & 0o7777, di.nlink);
        lines.push(match di.mode & S_IFMT {
            S_IFREG => {
                format!("{path}\tf\t{perm:o}\t{links}\t{}\t{}", di.size, sha256(reader, di.num.addr)?)
            }
            _ if di.is_symlink() => {
                let target = reader.read_all(di.num.addr)?;
                format!("{path}\tl\t{perm:o}\t{links}\t-\t{}", String::from_utf8_lossy(&target))
            }
            mode => {
                let ty = match mode >> 12 {
                    1 => 'p',
                    2 => 'c',
                    4 => 'd',
                    6 => 'b',
                    12 => 's',
                    _ => '?',
                };
                format!("{path}\t{ty}\t{perm:o}\t{links}\t-\t-")
            }
        });
    }
    lines.sort();
    Ok(lines)
}

fn sha256(reader: &Reader, addr: BlockNo) -> gfs::Result<String> {
    let mut hash = Sha256::new();
    reader.read(addr, &mut |piece| hash.update(piece))?;
    Ok(hash.finalize().iter().fold(String::new(), |s, b| s + &format!("{b:02x}")))
}

/// A shell script that prints the lines of [`tree_digest`] for the directory it runs in.
pub const TREE_SCRIPT: &str = r#"
declare -A sums
find . -mindepth 1 -type f -printf '%P\0' | xargs -0r sha256sum > /tmp/sums
while read -r sum path; do sums[$path]=$sum; done < /tmp/sums
find . -mindepth 1 -printf '%P\t%y\t%m\t%n\t%s\t%l\n' | while IFS=$'\t' read -r path type perm links size target; do
	case $type in
	f) printf '%s\tf\t%s\t%s\t%s\t%s\n' "$path" "$perm" "$links" "$size" "${sums[$path]}" ;;
	l) printf '%s\tl\t%s\t%s\t-\t%s\n' "$path" "$perm" "$links" "$target" ;;
	*) printf '%s\t%s\t%s\t%s\t-\t-\n' "$path" "$type" "$perm" "$links" ;;
	esac
done
"#;

/// The lines of [`TREE_SCRIPT`]'s output, sorted.
pub fn tree_lines(output: &str) -> Vec<String> {
    let mut lines: Vec<String> =
        output.lines().filter(|l| l.matches('\t').count() == 5).map(str::to_owned).collect();
    lines.sort();
    lines
}
