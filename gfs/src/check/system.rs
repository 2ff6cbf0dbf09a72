//! System files: journals, totals, and the per-node files.

use super::{Checker, Fault, damage};
use crate::journal::replay;
use crate::ondisk::dinode::{Dinode, S_IFMT, S_IFREG};
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::statfs::{InumRange, StatfsChange};
use crate::volume::system::SysReader;
use crate::{BlockNo, Result};

impl Checker<'_> {
    pub(super) fn check_system(&mut self) -> Result<()> {
        let sys = SysReader(self.reader.disk());
        let system = match damage(sys.system_inodes(self.sb.master))? {
            Ok(system) => system,
            Err(why) => {
                self.report.add(Fault::System { why });
                return Ok(());
            }
        };
        let names = match damage(sys.directory(self.sb.master.addr))? {
            Ok(names) => names,
            Err(why) => {
                self.report.add(Fault::System { why });
                return Ok(());
            }
        };
        let pernode = match damage(sys.directory(system.per_node))? {
            Ok(names) => names,
            Err(why) => {
                self.report.add(Fault::System { why });
                return Ok(());
            }
        };
        for (name, least) in [("inum", 8), ("statfs", StatfsChange::SIZE), ("quota", 0), ("rindex", 0)] {
            match names.get(name.as_bytes()) {
                Some(num) => {
                    self.system_file(name, num.addr, |size| size >= least as u64)?;
                }
                None => self.report.add(Fault::System { why: format!("{name} is missing") }),
            }
        }
        if let Some(di) = self.system_file("rindex", system.rindex, |_| true)?
            && !di.size.is_multiple_of(RindexEntry::SIZE as u64)
        {
            self.report.add(Fault::Rindex { why: format!("{} bytes are no whole entries", di.size) });
        }
        // the kernel counts journals by their names, other tools by the files of the nodes: both must agree
        let journals = system.journals.len();
        if pernode.len() != 2 + 3 * journals {
            let why = format!("per_node has {} entries for {journals} journals", pernode.len());
            self.report.add(Fault::System { why });
        }
        for j in &system.journals {
            let jid = j.jid.0;
            let name = format!("inum_range{jid}");
            match pernode.get(name.as_bytes()) {
                Some(num) => {
                    self.system_file(&name, num.addr, |size| size == InumRange::SIZE as u64)?;
                }
                None => self.report.add(Fault::System { why: format!("{name} is missing") }),
            }
            let name = format!("statfs_change{jid}");
            self.system_file(&name, j.statfs_change, |size| size == StatfsChange::SIZE as u64)?;
            self.quota_change(jid, j.quota_change)?;
            self.system_file(&format!("journal{jid}"), j.dinode, |_| true)?;
            let head =
                damage(sys.journal(j).and_then(|map| replay::find_head(self.reader.disk(), j.jid, &map)))?;
            match head {
                Ok(head) if head.is_clean() => {}
                Ok(h) => self.report.add(Fault::JournalDirty { jid, head: h.blkno, tail: h.tail }),
                Err(why) => self.report.add(Fault::Journal { jid, why }),
            }
        }
        if let Ok((found, deltas)) = damage(self.reader.statfs())? {
            let counted = self.space.totals();
            if found != counted {
                self.report.add(Fault::Statfs { found, counted });
            }
            for (jid, delta) in deltas.into_iter().enumerate() {
                if !delta.is_zero() {
                    self.report.add(Fault::StatfsDelta { jid: jid as u32, delta });
                }
            }
        }
        Ok(())
    }

    /// Dinode of a system file with the right type, flag and size.
    fn system_file(
        &mut self,
        name: &str,
        addr: BlockNo,
        size_fits: impl Fn(u64) -> bool,
    ) -> Result<Option<Dinode>> {
        let fault = |why: String| Fault::SystemFile { name: name.to_owned(), why };
        let di = match damage(self.reader.dinode(addr))? {
            Ok(di) => di,
            Err(why) => {
                self.report.add(fault(why));
                return Ok(None);
            }
        };
        if !di.is_system() {
            self.report.add(fault("has no SYSTEM flag".to_owned()));
        }
        if di.mode & S_IFMT != S_IFREG {
            self.report.add(fault(format!("has mode {:o}", di.mode)));
            return Ok(None);
        }
        if !size_fits(di.size) {
            self.report.add(fault(format!("has {} bytes", di.size)));
            return Ok(None);
        }
        Ok(Some(di))
    }

    /// Whole MiB, without holes, every block with its header.
    fn quota_change(&mut self, jid: u32, addr: BlockNo) -> Result<()> {
        let name = format!("quota_change{jid}");
        let fits = |size: u64| (1..=64).contains(&(size >> 20)) && size.is_multiple_of(1 << 20);
        let Some(di) = self.system_file(&name, addr, fits)? else { return Ok(()) };
        let sys = SysReader(self.reader.disk());
        let mut buf = self.buffer();
        self.read(addr.0, &mut buf)?;
        let blocks = match damage(sys.tree(&di, &buf, di.size >> self.geo.shift))? {
            Ok(blocks) => blocks,
            Err(why) => {
                self.report.add(Fault::SystemFile { name, why });
                return Ok(());
            }
        };
        for (i, b) in blocks.into_iter().enumerate() {
            if b == 0 {
                self.report
                    .add(Fault::SystemFile { name: name.clone(), why: format!("block {i} is a hole") });
                continue;
            }
            if !self.space.contains(b) {
                continue; // reported by the walk
            }
            self.read(b, &mut buf)?;
            if let Err(e) = MetaHeader::expect(&buf, MetaType::QuotaChange) {
                let why = format!("block {b}: {e}");
                self.report.add(Fault::SystemFile { name: name.clone(), why });
            }
        }
        Ok(())
    }
}
