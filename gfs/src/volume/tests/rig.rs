//! Volumes in memory, and files made by hand.

use crate::glock::{AcquireFlags, Holder};
use crate::lockspace::{LockSpace, LockState};
use crate::mkfs::{self, MkfsOptions};
use crate::ondisk::dinode::{Dinode, S_IFREG};
use crate::ondisk::dirent::{Dirent, Records, put_rec_len, put_record, rec_min};
use crate::ondisk::header::MetaType;
use crate::ondisk::{checksum, pointer_at, put_pointer, put_u64, u64_at};
use crate::trans::{OrderedData, TransSize};
use crate::volume::{MountOptions, Volume, inode_glock};
use crate::{BlockNo, Error, InodeNo, Result};
use lun::image::Image;
use lun::mem::MemLun;
use std::process::Command;
use std::sync::Arc;

pub(super) struct Rig {
    pub(super) lun: MemLun,
}

/// A fresh volume for lock_dlm, small, always the same.
pub(super) fn volume_image(bsize: u32, journals: u32) -> Image {
    let lun = MemLun::new(24 << 20 << journals.ilog2(), 512);
    let options = MkfsOptions {
        lock_table: "test:fs".to_owned(),
        journals,
        journal_mb: Some(8),
        block_size: bsize,
        rgrp_mb: 32,
        uuid: Some([7; 16]),
        time: Some(1_000_000_000),
        journal_starts: vec![77; journals as usize],
        ..MkfsOptions::default()
    };
    let device: lun::Lun = Arc::new(lun.clone());
    mkfs::make(&device, &options, &mut |_, _| ()).unwrap();
    lun.durable()
}

/// `fsck.gfs2 -n` where it is installed: exit code 0, no finding, no dirty journal.
pub(super) fn fsck(image: &Image) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    let mut bytes = vec![0; image.size() as usize];
    image.read(0, &mut bytes);
    std::fs::write(&path, &bytes).unwrap();
    let Ok(out) = Command::new("fsck.gfs2").arg("-n").arg(&path).output() else { return };
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let bad = ["dirty", "corrupt", "bitmap says", "wrong"].iter().any(|w| text.contains(w));
    assert!(out.status.success() && !bad, "fsck.gfs2: {}\n{text}", out.status);
}

impl Rig {
    pub(super) fn new(image: Image) -> Self {
        Self { lun: MemLun::from_image(image, 512) }
    }

    pub(super) fn mount(&self, space: Arc<dyn LockSpace>, options: MountOptions) -> Result<Arc<Volume>> {
        Volume::mount(Arc::new(self.lun.clone()), space, options)
    }

    pub(super) fn mount_as(
        &self,
        who: &str,
        space: Arc<dyn LockSpace>,
        options: MountOptions,
    ) -> Result<Arc<Volume>> {
        Volume::mount(Arc::new(self.lun.handle(who)), space, options)
    }
}

fn lock(vol: &Volume, addr: BlockNo, state: LockState) -> Result<Holder> {
    vol.glocks().acquire(inode_glock(addr), state, AcquireFlags::NONE)
}

struct Fill {
    vol: Arc<Volume>,
    blocks: Vec<u64>,
    seed: u64,
}

pub(super) fn content(bsize: usize, seed: u64, i: u64) -> Vec<u8> {
    let mut b = vec![0xa5; bsize];
    put_u64(&mut b, 0, seed);
    put_u64(&mut b, 8, i);
    b
}

impl OrderedData for Fill {
    fn write_out(&self) -> Result<()> {
        let bsize = self.vol.geometry().block_size as usize;
        for (i, &b) in self.blocks.iter().enumerate() {
            self.vol.disk().write_blocks(&[(BlockNo(b), &content(bsize, self.seed, i as u64))])?;
        }
        Ok(())
    }
}

/// Makes a file of `blocks` blocks in the root directory, in one transaction. EEXIST, ENOSPC.
pub(super) fn create_file(vol: &Arc<Volume>, name: &str, blocks: u32, seed: u64) -> Result<()> {
    let root = vol.root().addr;
    let dir = lock(vol, root, LockState::Exclusive)?;
    let dirbuf = vol.cache().read(dir.glock(), root, MetaType::Dinode)?;
    let need = rec_min(name.len());
    let (mut at, mut head) = (0, Dirent::default());
    for r in Records::new(&dirbuf.read(), Dinode::SIZE) {
        let r = r.map_err(|e| e.at(root))?;
        if r.name == name.as_bytes() {
            return Err(Error::Errno(libc::EEXIST));
        }
        if r.head.slack() >= need {
            (at, head) = (r.offset, r.head);
        }
    }
    if at == 0 {
        return Err(Error::Errno(libc::EFBIG));
    }
    let res = vol.rgrps()?.reserve(root, blocks + 1, blocks + 1)?;
    let trans = vol.begin(TransSize::new(res.trans_blocks(blocks + 1, 0) + 2, 0))?;
    let (addr, generation) = res.alloc_dinode(&trans)?;
    let glock = vol.glocks().get(inode_glock(addr));
    let buf = trans.create(vol.cache(), &glock, addr, MetaType::Dinode)?;
    let mut pointers = Vec::new();
    while pointers.len() < blocks as usize {
        let e = res.alloc_blocks(&trans, blocks - pointers.len() as u32)?;
        pointers.extend((0..u64::from(e.len)).map(|i| e.start.0 + i));
    }
    let num = InodeNo { addr, formal: generation };
    let last = pointers.last().copied().unwrap_or(addr.0);
    let di = Dinode {
        num,
        mode: S_IFREG | 0o644,
        nlink: 1,
        size: u64::from(blocks) * u64::from(vol.geometry().block_size),
        blocks: 1 + u64::from(blocks),
        goal_meta: last,
        goal_data: last,
        generation,
        height: u16::from(blocks > 0),
        ..Dinode::default()
    };
    let mut b = trans.modify(&buf);
    di.encode(&mut b);
    for (i, &p) in pointers.iter().enumerate() {
        put_pointer(&mut b, Dinode::SIZE, i, p);
    }
    drop(b);
    let mut b = trans.modify(&dirbuf);
    let keep = rec_min(head.name_len as usize) as u16;
    put_rec_len(&mut b, at, keep);
    let hash = checksum::disk_hash(name.as_bytes());
    let new = Dirent { num, hash, rec_len: head.rec_len - keep, ty: di.dirent_type(), ..Dirent::default() };
    put_record(&mut b, at + keep as usize, new, name.as_bytes());
    let mut dd = Dinode::decode(&b).unwrap();
    dd.entries += 1;
    dd.encode(&mut b);
    drop(b);
    if blocks > 0 {
        trans.ordered(Arc::new(Fill { vol: Arc::clone(vol), blocks: pointers, seed }));
    }
    trans.commit();
    // an inode's buffers belong to its glock, which this node takes only now (nobody else knows the inode yet)
    drop(lock(vol, addr, LockState::Exclusive)?);
    Ok(())
}

fn find(b: &[u8], name: &str) -> Option<(usize, usize, InodeNo)> {
    let mut before = 0;
    for r in Records::new(b, Dinode::SIZE) {
        let r = r.expect("root directory");
        if r.name == name.as_bytes() {
            return Some((before, r.offset, r.head.num));
        }
        before = r.offset;
    }
    None
}

/// Removes a file and frees it, in one transaction after that of the unlink.
pub(super) fn remove_file(vol: &Arc<Volume>, name: &str) -> Result<()> {
    let root = vol.root().addr;
    let dir = lock(vol, root, LockState::Exclusive)?;
    let dirbuf = vol.cache().read(dir.glock(), root, MetaType::Dinode)?;
    let (before, at, num) = find(&dirbuf.read(), name).ok_or(Error::Errno(libc::ENOENT))?;
    let inode = lock(vol, num.addr, LockState::Exclusive)?;
    let buf = vol.cache().read(inode.glock(), num.addr, MetaType::Dinode)?;
    let rgrps = vol.rgrps()?;
    {
        let res = rgrps.lock_for(&[num.addr])?;
        let trans = vol.begin(TransSize::new(res.trans_blocks(0, 1) + 2, 0))?;
        let mut b = trans.modify(&dirbuf);
        let len = |b: &[u8], at: usize| Dirent::decode(&b[at..]).unwrap().rec_len;
        let joined = len(&b, before) + len(&b, at);
        put_rec_len(&mut b, before, joined);
        let mut dd = Dinode::decode(&b).unwrap();
        dd.entries -= 1;
        dd.encode(&mut b);
        drop(b);
        let mut di = Dinode::decode(&buf.read()).unwrap();
        di.nlink = 0;
        di.encode(&mut trans.modify(&buf));
        res.unlink_dinode(&trans, num.addr)?;
    }
    let content = buf.read();
    let di = Dinode::decode(&content).unwrap();
    let mut blocks: Vec<BlockNo> =
        (0..di.blocks as usize - 1).map(|i| BlockNo(pointer_at(&content, Dinode::SIZE, i))).collect();
    let data = blocks.clone();
    blocks.push(num.addr);
    let res = rgrps.lock_for(&blocks)?;
    let n = blocks.len() as u32;
    let trans = vol.begin(TransSize::new(res.trans_blocks(0, n), n))?;
    for start in data {
        res.free_blocks(&trans, crate::rgrp::Extent { start, len: 1 })?;
    }
    res.free_dinode(&trans, num.addr)
}

/// Number of blocks of a file whose contents are right; `None` when there is no such name.
pub(super) fn read_file(vol: &Arc<Volume>, name: &str) -> Option<u32> {
    let root = vol.root().addr;
    let dir = lock(vol, root, LockState::Shared).unwrap();
    let dirbuf = vol.cache().read(dir.glock(), root, MetaType::Dinode).unwrap();
    let (_, _, num) = find(&dirbuf.read(), name)?;
    let inode = lock(vol, num.addr, LockState::Shared).unwrap();
    let buf = vol.cache().read(inode.glock(), num.addr, MetaType::Dinode).unwrap().read();
    let di = Dinode::decode_at(&buf, &vol.geometry(), num.addr).unwrap();
    assert_eq!(di.num, num);
    let n = di.blocks as usize - 1;
    let mut block = vec![0; vol.geometry().block_size as usize];
    let mut seed = None;
    for i in 0..n {
        vol.disk().read(BlockNo(pointer_at(&buf, Dinode::SIZE, i)), &mut block).unwrap();
        let s = *seed.get_or_insert(u64_at(&block, 0));
        assert!(block == content(block.len(), s, i as u64), "{name}: block {i}");
    }
    Some(n as u32)
}

/// Names in the root directory, straight from an image.
pub(super) fn names(vol: &Arc<Volume>) -> Vec<String> {
    let root = vol.root().addr;
    let dir = lock(vol, root, LockState::Shared).unwrap();
    let buf = vol.cache().read(dir.glock(), root, MetaType::Dinode).unwrap().read();
    let records = Records::new(&buf, Dinode::SIZE).map(|r| r.unwrap());
    let mut names: Vec<String> = records
        .filter(|r| !r.head.is_empty() && !r.name.starts_with(b"."))
        .map(|r| String::from_utf8_lossy(r.name).into_owned())
        .collect();
    names.sort();
    names
}
