//! Names of LUNs: `file:/path`, `/dev/…`, a plain path, each with an optional `#part=N`.

use crate::file::{FileLun, OpenOptions};
use crate::logged::LoggedLun;
use crate::part::Part;
use crate::{BlockDevice, Lun, LunError, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A parsed name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    pub path: PathBuf,
    /// GPT partition number, from 1.
    pub part: Option<u32>,
}

impl Url {
    pub fn parse(name: &str) -> Result<Self> {
        let bad = |reason: &str| LunError::Url { name: name.to_owned(), reason: reason.to_owned() };
        let (place, part) = match name.rsplit_once("#part=") {
            Some((place, number)) => {
                let n: u32 = number.parse().map_err(|_| bad("the partition number is not a number"))?;
                if !(1..=128).contains(&n) {
                    return Err(bad("the partition number is not in 1…128"));
                }
                (place, Some(n))
            }
            None => (name, None),
        };
        let path = match place.split_once(':') {
            Some(("file", path)) => path,
            Some((scheme, _))
                if !scheme.contains('/') && scheme.chars().all(|c| c.is_ascii_alphanumeric()) =>
            {
                return Err(bad(&format!("the kind of LUN `{scheme}:` is not supported")));
            }
            _ => place,
        };
        if path.is_empty() {
            return Err(bad("the path is empty"));
        }
        Ok(Self { path: PathBuf::from(path), part })
    }
}

/// Environment variable that makes every opened LUN keep a write log: the path of the side file.
pub const WRITE_LOG_ENV: &str = "CAIRN_LUN_WRITE_LOG";

/// Opens a LUN, or a partition of one, by its name.
pub fn open(name: &str, options: &OpenOptions) -> Result<Lun> {
    let url = Url::parse(name)?;
    let file = Arc::new(FileLun::open(name, Path::new(&url.path), options)?);
    let log = options.write_log.clone().or_else(|| std::env::var_os(WRITE_LOG_ENV).map(PathBuf::from));
    let whole: Lun = match log {
        Some(path) if !options.read_only => Arc::new(LoggedLun::new(Arc::clone(&file) as Lun, &path)?),
        _ => Arc::clone(&file) as Lun,
    };
    let Some(number) = url.part else {
        file.lock(options.share, 0, file.size())?;
        return Ok(whole);
    };
    let part = Part::open(whole, number, name)?;
    file.lock(options.share, part.start(), part.size())?;
    Ok(Arc::new(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_or_refused() {
        let url = |p: &str, part| Url { path: PathBuf::from(p), part };
        assert_eq!(Url::parse("file:/a/b").unwrap(), url("/a/b", None));
        assert_eq!(Url::parse("/dev/sdb#part=2").unwrap(), url("/dev/sdb", Some(2)));
        assert_eq!(Url::parse("rel/a:b").unwrap(), url("rel/a:b", None));
        for bad in ["", "file:", "iscsi://x/y", "/a#part=0", "/a#part=x", "/a#part=129"] {
            assert!(matches!(Url::parse(bad), Err(LunError::Url { .. })), "{bad}");
        }
    }
}
