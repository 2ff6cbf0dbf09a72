//! Resource groups as the disk has them, and what the walk has claimed: two bitmaps of the same shape.

use super::{Fault, Report, damage};
use crate::ondisk::bitmap::{self, BlockState};
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::rgrp::Rgrp;
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::statfs::StatfsChange;
use crate::reader::Reader;
use crate::{BlockNo, Result};
use lun::aligned::AlignedBuf;

struct Group {
    entry: RindexEntry,
    /// Counters of the header; `None` when it is damaged.
    header: Option<Rgrp>,
    /// Bitmap on disk.
    bits: Vec<u8>,
    /// States that the walk has found. FREE is "not claimed".
    claims: Vec<u8>,
}

pub(super) struct Space {
    groups: Vec<Group>,
}

pub(super) enum Claim {
    Taken,
    Outside,
    Twice,
}

impl Space {
    /// Reads index, headers and bitmaps. `None` when the index is unusable.
    pub(super) fn load(reader: &Reader, report: &mut Report) -> Result<Option<Self>> {
        let entries = match damage(reader.rindex())? {
            Ok(entries) => entries,
            Err(why) => {
                report.add(Fault::Rindex { why });
                return Ok(None);
            }
        };
        let geo = reader.geometry();
        let mut buf = AlignedBuf::zeroed(geo.block_size as usize);
        let mut groups = Vec::with_capacity(entries.len());
        for entry in entries {
            let rgrp = entry.addr;
            let mut bits = vec![0; entry.bitbytes as usize];
            let mut header = None;
            for (i, part) in entry.parts(&geo).enumerate() {
                reader.disk().read(BlockNo(part.block), &mut buf)?;
                let checked = match i {
                    0 => Rgrp::decode(&buf).map(|h| header = Some(h)).and_then(|()| Rgrp::verify_crc(&buf)),
                    _ => MetaHeader::expect(&buf, MetaType::RgrpBitmap).map(drop),
                };
                if let Err(e) = checked {
                    report.add(Fault::RgrpHeader { rgrp, block: part.block, why: e.to_string() });
                }
                let from = part.first as usize / 4;
                if part.bytes > 0 {
                    bits[from..from + part.bytes]
                        .copy_from_slice(&buf[part.offset..part.offset + part.bytes]);
                }
            }
            if let Some(h) = &header {
                // copies in the header are zero on volumes of old software
                let copies = [
                    ("rg_data0", h.data0, entry.data0),
                    ("rg_data", h.data.into(), entry.data.into()),
                    ("rg_bitbytes", h.bitbytes.into(), entry.bitbytes.into()),
                ];
                for (field, found, wanted) in copies {
                    if found != 0 && found != wanted {
                        report.add(Fault::RgrpCopy { rgrp, field, found, wanted });
                    }
                }
                let n = bitmap::count(&bits);
                let (free, dinodes) = (n[0], n[2] + n[3]);
                if u64::from(h.free) != free {
                    report.add(Fault::RgrpFree { rgrp, found: h.free.into(), counted: free });
                }
                if u64::from(h.dinodes) != dinodes {
                    report.add(Fault::RgrpDinodes { rgrp, found: h.dinodes.into(), counted: dinodes });
                }
            }
            let claims = vec![0; bits.len()];
            groups.push(Group { entry, header, bits, claims });
        }
        Ok(Some(Self { groups }))
    }

    fn group(&self, block: u64) -> Option<usize> {
        let i = self.groups.partition_point(|g| g.entry.addr <= block).checked_sub(1)?;
        self.groups[i].entry.contains(block).then_some(i)
    }

    /// Is it a data block of some group?
    pub(super) fn contains(&self, block: u64) -> bool {
        self.group(block).is_some()
    }

    /// Are these blocks all in one group?
    pub(super) fn in_one_group(&self, blocks: &[u64]) -> bool {
        blocks.windows(2).all(|w| self.group(w[0]) == self.group(w[1]))
    }

    pub(super) fn claim(&mut self, block: u64, state: BlockState) -> Claim {
        let Some(i) = self.group(block) else { return Claim::Outside };
        let g = &mut self.groups[i];
        let k = (block - g.entry.data0) as usize;
        if bitmap::get(&g.claims, k) != BlockState::Free {
            return Claim::Twice;
        }
        bitmap::set(&mut g.claims, k, state);
        Claim::Taken
    }

    /// Next block at or after `from` that the disk calls `state`.
    pub(super) fn next(&self, from: u64, state: BlockState) -> Option<u64> {
        let first = self.groups.partition_point(|g| g.entry.end() <= from);
        self.groups[first..].iter().find_map(|g| {
            let start = from.saturating_sub(g.entry.data0) as usize;
            bitmap::find(&g.bits, start, g.entry.data as usize, state).map(|k| g.entry.data0 + k as u64)
        })
    }

    /// Everything that is not as the walk found it.
    pub(super) fn compare(&self, report: &mut Report) {
        for g in &self.groups {
            for (i, (&on_disk, &claimed)) in g.bits.iter().zip(&g.claims).enumerate() {
                if on_disk == claimed {
                    continue;
                }
                for k in i * 4..i * 4 + 4 {
                    let (bitmap, found) = (bitmap::get(&g.bits, k), bitmap::get(&g.claims, k));
                    if bitmap != found {
                        report.add(Fault::Bitmap { block: g.entry.data0 + k as u64, bitmap, found });
                    }
                }
            }
        }
    }

    /// Sums of the headers' counters.
    pub(super) fn totals(&self) -> StatfsChange {
        let mut t = StatfsChange::default();
        for g in &self.groups {
            t.total += i64::from(g.entry.data);
            if let Some(h) = &g.header {
                t.free += i64::from(h.free);
                t.dinodes += i64::from(h.dinodes);
            }
        }
        t
    }
}
