//! What a volume shows after a crash, and whether it may show that.

use super::run::{History, Item, Kind, Tree};
use gfs::BlockNo;
use gfs::reader::Reader;
use lun::Lun;
use std::collections::BTreeMap;
use std::sync::Arc;

const SECTOR: usize = 512;

/// A tree read from disk: what paths lead to, by address.
pub(crate) struct Seen {
    names: BTreeMap<String, BlockNo>,
    items: BTreeMap<BlockNo, Item>,
}

/// `fsck.gfs2` makes a directory for what it finds without a name.
const LOST: &str = "lost+found";

impl Seen {
    pub(crate) fn read(lun: &Lun) -> gfs::Result<Self> {
        let reader = Reader::open(lun)?;
        let mut seen = Self { names: BTreeMap::new(), items: BTreeMap::new() };
        for node in reader.tree()? {
            let path = String::from_utf8(node.path).expect("names of workloads are ASCII");
            if path.is_empty() || path == LOST {
                continue;
            }
            let d = node.dinode;
            let addr = d.num.addr;
            seen.names.insert(path, addr);
            if seen.items.contains_key(&addr) {
                continue;
            }
            let kind = if d.is_dir() {
                Kind::Dir
            } else if d.is_symlink() {
                Kind::Symlink(reader.read_all(addr)?)
            } else if d.is_regular() {
                Kind::File(Arc::new(reader.read_all(addr)?))
            } else {
                Kind::Device(d.mode & 0o170_000, (d.major, d.minor))
            };
            let item = Item { kind, perm: d.mode & 0o7777, owner: (d.uid, d.gid), mtime: Some(d.mtime.sec) };
            seen.items.insert(addr, item);
        }
        Ok(seen)
    }

    /// Regular files: path, address, contents.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, BlockNo, &Arc<Vec<u8>>)> {
        self.names.iter().filter_map(|(path, addr)| match &self.items[addr].kind {
            Kind::File(data) => Some((path.as_str(), *addr, data)),
            _ => None,
        })
    }

    /// The first thing in which this differs from a version. `loose` lists the contents that sectors of an item may have besides.
    fn differs(&self, tree: &Tree, loose: &BTreeMap<usize, Vec<Arc<Vec<u8>>>>) -> Option<String> {
        let mut by_addr: BTreeMap<BlockNo, usize> = BTreeMap::new();
        let mut by_id: BTreeMap<usize, BlockNo> = BTreeMap::new();
        for (path, id) in &tree.names {
            let Some(addr) = self.names.get(path) else { return Some(format!("{path} is missing")) };
            if *by_addr.entry(*addr).or_insert(*id) != *id || *by_id.entry(*id).or_insert(*addr) != *addr {
                return Some(format!("{path} is another inode"));
            }
        }
        if let Some(path) = self.names.keys().find(|path| !tree.names.contains_key(*path)) {
            return Some(format!("{path} should not be there"));
        }
        for (id, addr) in by_id {
            let (want, is) = (&tree.items[&id], &self.items[&addr]);
            if (want.perm, want.owner) != (is.perm, is.owner) {
                return Some(format!("inode {addr}: attributes {:o} {:?}", is.perm, is.owner));
            }
            if want.mtime.is_some() && want.mtime != is.mtime {
                return Some(format!("inode {addr}: mtime {:?}", is.mtime));
            }
            match (&want.kind, &is.kind) {
                (Kind::File(want), Kind::File(is)) => {
                    if want.len() != is.len() {
                        return Some(format!("inode {addr}: {} bytes instead of {}", is.len(), want.len()));
                    }
                    if want == is {
                        continue;
                    }
                    let also = loose.get(&id).map_or(&[][..], |v| v);
                    if let Some(at) =
                        (0..is.len()).step_by(SECTOR).find(|at| !sector_fits(is, *at, want, also))
                    {
                        return Some(format!(
                            "inode {addr}: sector at byte {at} holds {:x?}…",
                            &is[at..is.len().min(at + 8)]
                        ));
                    }
                }
                (want, is) if want == is => {}
                (_, is) => return Some(format!("inode {addr} is {is:?}")),
            }
        }
        None
    }

    /// The version that this is, between the last one acknowledged at this event and the last one begun; or why it is none of them.
    pub(crate) fn version(&self, h: &History, event: usize) -> Result<usize, String> {
        let floor = h.floor(event);
        let top =
            h.versions.iter().rposition(|v| v.began <= event).expect("the first begins at 0").max(floor);
        let mut loose: BTreeMap<usize, Vec<Arc<Vec<u8>>>> = BTreeMap::new();
        for (_, id) in h.in_place.iter().filter(|(v, _)| *v > floor && *v <= top) {
            loose.entry(*id).or_default().extend((floor..=top).filter_map(|v| {
                match h.versions[v].tree.items.get(id).map(|item| &item.kind) {
                    Some(Kind::File(data)) => Some(Arc::clone(data)),
                    _ => None,
                }
            }));
        }
        let mut why = String::new();
        for v in (floor..=top).rev() {
            match self.differs(&h.versions[v].tree, &loose) {
                None => return Ok(v),
                Some(difference) => why += &format!("\n    not version {v}: {difference}"),
            }
        }
        Err(format!("shows none of versions {floor} to {top}:{why}"))
    }
}

/// Does the sector at `at` hold what one of the versions has there?
fn sector_fits(is: &[u8], at: usize, want: &[u8], also: &[Arc<Vec<u8>>]) -> bool {
    let end = is.len().min(at + SECTOR);
    let fits = |data: &[u8]| (at..end).all(|i| is[i] == data.get(i).copied().unwrap_or(0));
    fits(want) || also.iter().any(|data| fits(data))
}
