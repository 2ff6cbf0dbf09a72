//! A sparse copy-on-write picture of a LUN's content.
//!
//! Two levels: groups of 256 chunks of 4 KiB. Cloning copies one pointer per MiB in use; a write after a
//! clone copies one group table and one chunk. So thousands of crash states of a volume cost little.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const CHUNK: u64 = 4096;
const CHUNKS_PER_GROUP: u64 = 256;

type Chunk = Arc<[u8]>;

#[derive(Clone)]
struct Group([Option<Chunk>; CHUNKS_PER_GROUP as usize]);

/// Bytes 0…size-1, zero where nothing was written.
#[derive(Clone)]
pub struct Image {
    size: u64,
    groups: BTreeMap<u64, Arc<Group>>,
}

impl Image {
    pub fn new(size: u64) -> Self {
        Self { size, groups: BTreeMap::new() }
    }

    /// Content of a file, its holes and zero blocks left out.
    pub fn load(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut image = Self::new(size);
        let mut buf = vec![0u8; 1 << 20];
        let mut at = 0;
        while at < size {
            let n = buf.len().min((size - at) as usize);
            file.read_exact_at(&mut buf[..n], at)?;
            for (i, piece) in buf[..n].chunks(CHUNK as usize).enumerate() {
                if piece.iter().any(|&b| b != 0) {
                    image.write(at + i as u64 * CHUNK, piece);
                }
            }
            at += n as u64;
        }
        Ok(image)
    }

    /// Writes the content to a (sparse) file, for tools that want one.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.size)?;
        for (&g, group) in &self.groups {
            for (c, chunk) in group.0.iter().enumerate() {
                if let Some(chunk) = chunk {
                    let at = (g * CHUNKS_PER_GROUP + c as u64) * CHUNK;
                    let n = (self.size - at).min(CHUNK) as usize;
                    file.write_all_at(&chunk[..n], at)?;
                }
            }
        }
        Ok(())
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    fn chunk(&self, no: u64) -> Option<&Chunk> {
        self.groups.get(&(no / CHUNKS_PER_GROUP))?.0[(no % CHUNKS_PER_GROUP) as usize].as_ref()
    }

    /// Panics when the range is outside the image: ranges are checked by the device above.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        assert!(offset + buf.len() as u64 <= self.size, "read outside the image");
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (no, within) = (at / CHUNK, (at % CHUNK) as usize);
            let n = (CHUNK as usize - within).min(buf.len() - done);
            let out = &mut buf[done..done + n];
            match self.chunk(no) {
                Some(chunk) => out.copy_from_slice(&chunk[within..within + n]),
                None => out.fill(0),
            }
            done += n;
        }
    }

    /// Panics when the range is outside the image.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= self.size, "write outside the image");
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (no, within) = (at / CHUNK, (at % CHUNK) as usize);
            let n = (CHUNK as usize - within).min(data.len() - done);
            let piece = &data[done..done + n];
            let group = self
                .groups
                .entry(no / CHUNKS_PER_GROUP)
                .or_insert_with(|| Arc::new(Group([const { None }; CHUNKS_PER_GROUP as usize])));
            let slot = &mut Arc::make_mut(group).0[(no % CHUNKS_PER_GROUP) as usize];
            if n == CHUNK as usize {
                *slot = Some(Arc::from(piece));
            } else {
                let chunk = slot.get_or_insert_with(|| Arc::from([0u8; CHUNK as usize].as_slice()));
                Arc::make_mut(chunk)[within..within + n].copy_from_slice(piece);
            }
            done += n;
        }
    }

    /// First byte at which two images of one size differ.
    pub fn first_difference(&self, other: &Self) -> Option<u64> {
        assert_eq!(self.size, other.size, "images of different size");
        let zero: Chunk = Arc::from([0u8; CHUNK as usize].as_slice());
        let groups: std::collections::BTreeSet<u64> =
            self.groups.keys().chain(other.groups.keys()).copied().collect();
        for g in groups {
            if let (Some(a), Some(b)) = (self.groups.get(&g), other.groups.get(&g))
                && Arc::ptr_eq(a, b)
            {
                continue;
            }
            for no in g * CHUNKS_PER_GROUP..(g + 1) * CHUNKS_PER_GROUP {
                let (a, b) = (self.chunk(no).unwrap_or(&zero), other.chunk(no).unwrap_or(&zero));
                if !Arc::ptr_eq(a, b)
                    && let Some(i) = a.iter().zip(b.iter()).position(|(x, y)| x != y)
                {
                    return Some(no * CHUNK + i as u64);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_do_not_see_each_others_writes() {
        let mut a = Image::new(32 << 20);
        a.write(512, &[1; 512]);
        a.write(5 << 20, &[2; 8192]);
        let mut b = a.clone();
        b.write(5 << 20, &[3; 512]);
        b.write(30 << 20, &[4; 4096]);
        let mut got = [0u8; 512];
        a.read(5 << 20, &mut got);
        assert_eq!(got, [2; 512]);
        b.read(5 << 20, &mut got);
        assert_eq!(got, [3; 512]);
        assert_eq!(a.first_difference(&b), Some(5 << 20));
        b.write(5 << 20, &[2; 512]);
        assert_eq!(a.first_difference(&b), Some(30 << 20));
        b.write(30 << 20, &[0; 4096]);
        assert_eq!(a.first_difference(&b), None);
    }

    #[test]
    fn save_and_load_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let mut a = Image::new((3 << 20) + 512);
        a.write(4096 * 3 + 100, b"hello");
        a.write(3 << 20, &[9; 512]);
        let path = dir.path().join("img");
        a.save(&path).unwrap();
        let b = Image::load(&path).unwrap();
        assert_eq!(a.first_difference(&b), None);
        assert_eq!(b.size(), (3 << 20) + 512);
    }
}
