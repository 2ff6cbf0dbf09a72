//! Extended attributes, for reading: what other systems have stored on the volume is shown and kept. Setting answers EOPNOTSUPP.

use super::{Fs, Held};
use crate::cache::Buf;
use crate::glock::LockState;
use crate::inode::Locked;
use crate::ondisk::dinode::DIF_EA_INDIRECT;
use crate::ondisk::ea::{EATYPE_SECURITY, EATYPE_SYS, EATYPE_TRUSTED, EATYPE_USR, EaRecords};
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::pointer_at;
use crate::{BlockNo, Error, InodeNo, Result};

/// Prefix of a name, by type. It is not stored.
fn prefix(ty: u8) -> Option<&'static [u8]> {
    match ty {
        EATYPE_USR => Some(b"user."),
        EATYPE_SYS => Some(b"system."),
        EATYPE_SECURITY => Some(b"security."),
        EATYPE_TRUSTED => Some(b"trusted."),
        _ => None,
    }
}

impl Fs {
    /// Errors: ENODATA.
    pub fn getxattr(&self, ino: InodeNo, name: &[u8]) -> Result<Held<Vec<u8>>> {
        let inode = self.lock(&self.inode(ino)?, LockState::Shared)?;
        let value = inode.ea_get(name)?.ok_or(Error::Errno(libc::ENODATA))?;
        Ok(Held::new(value, vec![inode.into_holder()]))
    }

    /// All names, each ended by a zero byte.
    pub fn listxattr(&self, ino: InodeNo) -> Result<Held<Vec<u8>>> {
        let inode = self.lock(&self.inode(ino)?, LockState::Shared)?;
        let mut names = Vec::new();
        for buf in inode.ea_bufs()? {
            let bytes = buf.read();
            for record in EaRecords::new(&bytes) {
                let record = record.map_err(|e| e.at(buf.block()))?;
                if let Some(prefix) = prefix(record.head.ty) {
                    names.extend_from_slice(prefix);
                    names.extend_from_slice(record.name);
                    names.push(0);
                }
            }
        }
        Ok(Held::new(names, vec![inode.into_holder()]))
    }

    pub fn setxattr(&self, _ino: InodeNo, _name: &[u8], _value: &[u8]) -> Result<()> {
        Err(Error::Errno(libc::EOPNOTSUPP))
    }

    pub fn removexattr(&self, _ino: InodeNo, _name: &[u8]) -> Result<()> {
        Err(Error::Errno(libc::EOPNOTSUPP))
    }
}

impl Locked<'_> {
    /// Blocks with attribute records.
    fn ea_bufs(&self) -> Result<Vec<Buf>> {
        let here = self.inode.no.addr;
        let Some(at) = self.checked(here, self.d.eattr)? else { return Ok(Vec::new()) };
        let cache = self.fs.volume().cache();
        if self.d.flags & DIF_EA_INDIRECT == 0 {
            return Ok(vec![cache.read(self.glock(), at, MetaType::ExtAttr)?]);
        }
        let list = cache.read(self.glock(), at, MetaType::Indirect)?.read();
        let mut bufs = Vec::new();
        for slot in 0..self.geo().inptrs() {
            match self.checked(at, pointer_at(&list, MetaHeader::SIZE, slot))? {
                Some(block) => bufs.push(cache.read(self.glock(), block, MetaType::ExtAttr)?),
                None => break,
            }
        }
        Ok(bufs)
    }

    fn ea_get(&self, name: &[u8]) -> Result<Option<Vec<u8>>> {
        for buf in self.ea_bufs()? {
            let bytes = buf.read();
            for record in EaRecords::new(&bytes) {
                let record = record.map_err(|e| e.at(buf.block()))?;
                let Some(prefix) = prefix(record.head.ty) else { continue };
                if name.strip_prefix(prefix) != Some(record.name) {
                    continue;
                }
                let len = record.head.data_len as usize;
                if record.head.num_ptrs == 0 {
                    return Ok(Some(record.body[..len].to_vec()));
                }
                let mut value = Vec::with_capacity(len);
                for pointer in record.pointers() {
                    let Some(at) = self.checked(buf.block(), pointer)? else { break };
                    let block = self.fs.volume().cache().read(self.glock(), at, MetaType::ExtAttrData)?;
                    block.with(|b| {
                        let n = (len - value.len()).min(b.len() - MetaHeader::SIZE);
                        value.extend_from_slice(&b[MetaHeader::SIZE..MetaHeader::SIZE + n]);
                    });
                }
                if value.len() < len {
                    let what = "extended attribute with too few value blocks".to_owned();
                    return Err(Error::Corrupt { block: buf.block(), what });
                }
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Every block that attributes occupy.
    pub(crate) fn ea_blocks(&self) -> Result<Vec<BlockNo>> {
        let mut blocks = Vec::new();
        for buf in self.ea_bufs()? {
            blocks.push(buf.block());
            let bytes = buf.read();
            for record in EaRecords::new(&bytes) {
                let record = record.map_err(|e| e.at(buf.block()))?;
                for pointer in record.pointers() {
                    blocks.extend(self.checked(buf.block(), pointer)?);
                }
            }
        }
        if self.d.flags & DIF_EA_INDIRECT != 0 {
            blocks.extend(self.checked(self.inode.no.addr, self.d.eattr)?);
        }
        Ok(blocks)
    }
}
