//! The words after `-o`.

use crate::JournalId;
use crate::fuse::FuseOptions;
use crate::ops::{Atime, FsOptions};
use crate::volume::MountOptions;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that `-o` says, checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// `lock_nolock` or `lock_dlm`; the superblock's when absent.
    pub lock_proto: Option<String>,
    /// `cluster:fsname`; the superblock's when absent.
    pub lock_table: Option<String>,
    pub read_only: bool,
    pub spectator: bool,
    pub atime: bool,
    /// Every change is durable before it is answered.
    pub sync: bool,
    pub commit: Duration,
    /// Memory for data and metadata together.
    pub cache_bytes: usize,
    pub journal: Option<JournalId>,
    pub debug: bool,
    pub foreground: bool,
    pub run_dir: PathBuf,
    pub allow_other: Option<bool>,
    pub dev_suid: Option<bool>,
    pub noexec: bool,
    pub read_ahead_kb: u32,
}

pub const DEFAULT_RUN_DIR: &str = "/run/cairn";
const DEFAULT_CACHE: usize = 320 << 20;
/// Of the cache, for metadata.
const METADATA_SHARE: usize = 5;

impl Default for Options {
    fn default() -> Self {
        Self {
            lock_proto: None,
            lock_table: None,
            read_only: false,
            spectator: false,
            atime: true,
            sync: false,
            commit: MountOptions::default().commit,
            cache_bytes: DEFAULT_CACHE,
            journal: None,
            debug: false,
            foreground: false,
            run_dir: PathBuf::from(DEFAULT_RUN_DIR),
            allow_other: None,
            dev_suid: None,
            noexec: false,
            read_ahead_kb: 1024,
        }
    }
}

/// Size with an optional K, M or G.
fn size(text: &str) -> Option<usize> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        _ => (text, 0),
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

impl Options {
    /// Takes one comma-separated list in. The error names the word.
    pub fn add(&mut self, list: &str) -> Result<(), String> {
        for word in list.split(',').filter(|w| !w.is_empty()) {
            let (key, value) = word.split_once('=').map_or((word, None), |(k, v)| (k, Some(v)));
            self.add_word(key, value).map_err(|why| format!("option {word}: {why}"))?;
        }
        Ok(())
    }

    fn add_word(&mut self, key: &str, value: Option<&str>) -> Result<(), String> {
        let need = || value.filter(|v| !v.is_empty()).ok_or_else(|| "needs a value".to_owned());
        let number = || need()?.parse::<u64>().map_err(|_| "needs a number".to_owned());
        match key {
            "lockproto" => {
                let proto = need()?;
                if !matches!(proto, "lock_nolock" | "lock_dlm") {
                    return Err("is lock_nolock or lock_dlm".into());
                }
                self.lock_proto = Some(proto.into());
            }
            "locktable" => self.lock_table = Some(need()?.into()),
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "spectator" => (self.spectator, self.read_only) = (true, true),
            "sync" | "dirsync" => self.sync = true,
            "async" => self.sync = false,
            "noatime" => self.atime = false,
            "relatime" | "atime" | "strictatime" => self.atime = true,
            "commit" => match number()? {
                0 => return Err("needs at least one second".into()),
                seconds => self.commit = Duration::from_secs(seconds.min(3600)),
            },
            "cache" => {
                self.cache_bytes =
                    size(need()?).filter(|bytes| *bytes >= 16 << 20).ok_or("needs a size of at least 16M")?;
            }
            "journal" => {
                self.journal = Some(JournalId(u32::try_from(number()?).map_err(|_| "is no journal id")?));
            }
            "read_ahead_kb" => self.read_ahead_kb = number()?.min(64 << 10) as u32,
            "debug" => self.debug = true,
            "foreground" => self.foreground = true,
            "run_dir" => self.run_dir = need()?.into(),
            "allow_other" => self.allow_other = Some(true),
            "noallow_other" => self.allow_other = Some(false),
            "dev" | "suid" => self.dev_suid = Some(true),
            "nodev" | "nosuid" => self.dev_suid = Some(false),
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            // For mount(8), systemd and users' fstab lines; of no meaning here.
            "defaults" | "_netdev" | "auto" | "noauto" | "user" | "nouser" | "users" | "owner" | "group"
            | "nofail" | "nodiratime" | "diratime" | "acl" | "noacl" | "remount" | "loop" => {
                if key == "remount" {
                    return Err("is not possible; unmount and mount again".into());
                }
            }
            _ if key.starts_with("x-") || key.starts_with("comment") => {}
            _ => return Err("is unknown".into()),
        }
        Ok(())
    }

    pub(super) fn volume(&self) -> MountOptions {
        MountOptions {
            read_only: self.read_only,
            spectator: self.spectator,
            lock_table: self.lock_table.clone(),
            journal: self.journal,
            commit: self.commit,
            cache_bytes: self.cache_bytes / METADATA_SHARE,
            ..MountOptions::default()
        }
    }

    pub(super) fn operations(&self) -> FsOptions {
        FsOptions {
            atime: if self.atime { Atime::Relative } else { Atime::Never },
            data_cache: self.cache_bytes - self.cache_bytes / METADATA_SHARE,
            sync: self.sync,
        }
    }

    pub(super) fn kernel(&self, source: &str) -> FuseOptions {
        let default = FuseOptions::default();
        FuseOptions {
            source: source.to_owned(),
            read_only: self.read_only,
            allow_other: self.allow_other.unwrap_or(default.allow_other),
            dev_suid: self.dev_suid.unwrap_or(default.dev_suid),
            noexec: self.noexec,
            read_ahead_kb: self.read_ahead_kb,
            ..default
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_taken_or_named() {
        let mut o = Options::default();
        o.add("lockproto=lock_nolock,ro,_netdev,x-systemd.automount,commit=5,cache=64M,noatime,nodev")
            .unwrap();
        assert_eq!((o.lock_proto.as_deref(), o.read_only, o.atime), (Some("lock_nolock"), true, false));
        assert_eq!((o.commit, o.cache_bytes, o.dev_suid), (Duration::from_secs(5), 64 << 20, Some(false)));
        for bad in
            ["lockproto=x", "commit=0", "commit", "cache=1M", "cache=99999999999G", "remount", "no-such"]
        {
            let why = o.add(bad).unwrap_err();
            assert!(why.contains(bad), "{why}");
        }
    }
}
