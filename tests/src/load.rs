//! What the load of the chaos run writes on a volume, the journals of acknowledgements that it keeps beside it, and the judgement.
//!
//! One journal per life and kind, `<kind>-<life>`, appended after the system call has returned; a torn last line was never acknowledged.
//!
//! | kind | lines | rule |
//! |---|---|---|
//! | `own`, `shared` | `<seq> <t>` | each acknowledged record is in the file once, no record is torn, none but the one under way is there besides |
//! | `names` | `+ name`, `> old new`, `- name`, `!` | the names are those of a prefix of the operations that contains all before the last `!` |
//! | `counter` | `t`, `a <value>` | no value twice; the counter is the number of `a`, or more by at most the `t` without `a` |
//! | `section` | `b <t> <who was there>`, `e <t>` | sections that ended do not overlap; who was still there died in it |

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

pub const RECORD: usize = 64;

/// Record `seq` of a life.
pub fn record(life: &str, seq: u64) -> [u8; RECORD] {
    let body = format!("{life:<28.28} {seq:>14}");
    let line = format!("{body} {:08x}", sum(body.as_bytes()));
    let mut out = [b'.'; RECORD];
    out[..line.len()].copy_from_slice(line.as_bytes());
    out[RECORD - 1] = b'\n';
    out
}

/// FNV-1a, 32 bits: tells a torn record from a whole one.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

/// Life and sequence number of a whole record.
fn parse(bytes: &[u8]) -> Option<(String, u64)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut words = text.split_whitespace();
    let (life, seq) = (words.next()?, words.next()?.parse().ok()?);
    (bytes == record(life, seq)).then(|| (life.to_owned(), seq))
}

/// The whole lines of a journal; none if it is not there yet.
pub fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(str::to_owned).collect()
}

/// Journals of one kind: (life, path), in the order of their names.
pub fn journals(acks: &Path, kind: &str) -> io::Result<Vec<(String, std::path::PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(acks)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(life) = name.strip_prefix(kind).and_then(|n| n.strip_prefix('-')) {
            found.push((life.to_owned(), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Sequence numbers that a journal of records acknowledges.
pub fn acked(path: &Path) -> Vec<u64> {
    lines(path).iter().filter_map(|l| l.split(' ').next()?.parse().ok()).collect()
}

/// A file of records against the journals of all who append to it. `quiet`: nobody does any more.
pub fn judge_records(file: &[u8], acked: &BTreeMap<String, Vec<u64>>, quiet: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut found: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    for (i, piece) in file.chunks(RECORD).enumerate() {
        match parse(piece) {
            Some((life, seq)) => {
                if !found.entry(life.clone()).or_default().insert(seq) {
                    wrong.push(format!("record {seq} of {life} is there twice, again at {i}"));
                }
            }
            None => wrong.push(format!("record {i} is torn: {:?}", String::from_utf8_lossy(piece))),
        }
    }
    for (life, seqs) in acked {
        let there = found.remove(life).unwrap_or_default();
        let lost: Vec<u64> = seqs.iter().copied().filter(|s| !there.contains(s)).collect();
        if let Some(first) = lost.first() {
            wrong.push(format!("{} of {} of {life} are lost, the first is {first}", lost.len(), seqs.len()));
        }
        if quiet && there.len() > seqs.len() + 1 {
            wrong.push(format!("{life}: {} records, {} acknowledged", there.len(), seqs.len()));
        }
    }
    if quiet {
        // Whoever died in its first record has acknowledged none.
        wrong.extend(found.iter().filter(|(_, s)| s.len() > 1).map(|(life, _)| format!("records of {life}")));
    }
    wrong
}

/// The value of the counter against all journals.
pub fn judge_counter(value: u64, journals: &[Vec<String>]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut values = BTreeSet::new();
    let (mut acked, mut tried) = (0, 0);
    for line in journals.iter().flatten() {
        match line.strip_prefix("a ").and_then(|v| v.parse::<u64>().ok()) {
            Some(v) => {
                acked += 1;
                if !values.insert(v) {
                    wrong.push(format!("two increments were told the value {v}"));
                }
            }
            None => tried += 1,
        }
    }
    if value < acked || value > tried || value < values.last().copied().unwrap_or(0) {
        wrong.push(format!(
            "counter {value}; {acked} increments acknowledged (the highest {:?}), {tried} tried",
            values.last()
        ));
    }
    wrong
}

/// Journals of sections by life.
pub fn judge_sections(journals: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut all = Vec::new();
    let mut died_inside = BTreeSet::new();
    let mut found_there = Vec::new();
    for (life, lines) in journals {
        let mut begun: Option<u64> = None;
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let Some(t) = words.get(1).and_then(|t| t.parse::<u64>().ok()) else { continue };
            if words[0] == "b" {
                begun = Some(t);
                found_there.push((life, words.get(2).copied().unwrap_or_default().to_owned()));
            } else if let Some(begin) = begun.take() {
                all.push((begin, t, life));
            }
        }
        if begun.is_some() {
            died_inside.insert(life.as_str());
        }
    }
    all.sort_unstable();
    let mut last: Option<(u64, u64, &String)> = None;
    for s in all {
        if let Some(l) = last.filter(|l| s.0 < l.1) {
            wrong.push(format!("exclusive sections overlap: {l:?} and {s:?}"));
        }
        if last.is_none_or(|l| s.1 > l.1) {
            last = Some(s);
        }
    }
    for (life, there) in found_there {
        if there != FREE && !died_inside.contains(there.as_str()) {
            wrong.push(format!("{life} entered where {there} was, which has left"));
        }
    }
    wrong
}

/// Contents of the section's file when nobody is inside.
pub const FREE: &str = "free";

/// Contents of a file of `names`: its first name.
pub fn content(name: &str) -> Vec<u8> {
    format!("{name}\n").repeat(1 + name.len() * 7 % 90).into_bytes()
}

/// The names that may be there: one set for each prefix of the operations that the journal allows. Name to content.
pub fn allowed_names(journal: &[String]) -> Vec<BTreeMap<String, String>> {
    let mut now = BTreeMap::new();
    let mut allowed = vec![now.clone()];
    for line in journal {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["+", name] => {
                now.insert(name.to_owned(), name.to_owned());
            }
            ["-", name] => {
                now.remove(name);
            }
            [">", old, new] => {
                if let Some(content) = now.remove(old) {
                    now.insert(new.to_owned(), content);
                }
            }
            _ => allowed.clear(),
        }
        allowed.push(now.clone());
    }
    allowed
}

/// A directory as read (name to contents) against the journals of all who work in it; all of them have ended.
pub fn judge_names(dir: &BTreeMap<String, Vec<u8>>, journals: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut wrong = Vec::new();
    let owner = |name: &str| name.split_once('+').map_or(String::new(), |(life, _)| life.to_owned());
    for name in dir.keys().filter(|n| !journals.contains_key(&owner(n))) {
        wrong.push(format!("{name} is nobody's"));
    }
    for (life, journal) in journals {
        let there: BTreeMap<&str, &Vec<u8>> =
            dir.iter().filter(|(n, _)| owner(n) == *life).map(|(n, c)| (n.as_str(), c)).collect();
        let allowed = allowed_names(journal);
        let safe: BTreeSet<&String> = allowed[0].values().collect();
        // What was acknowledged is whole; of the file under way any part may be there.
        let is_content = |found: &[u8], origin: &String| {
            let whole = content(origin);
            if safe.contains(origin) { found == whole } else { whole.starts_with(found) }
        };
        let is_this = |state: &BTreeMap<String, String>| {
            state.len() == there.len()
                && state.iter().all(|(n, o)| there.get(n.as_str()).is_some_and(|c| is_content(c, o)))
        };
        if !allowed.iter().any(is_this) {
            let sizes: Vec<_> = there.iter().map(|(n, c)| (n, c.len())).collect();
            wrong.push(format!("{life}: {sizes:?} is none of {allowed:?}"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn lost_doubled_and_torn_records_are_found() {
        let file: Vec<u8> = [0, 1, 2].iter().flat_map(|s| record("a.1", *s)).collect();
        let acked = |seqs: &[u64]| BTreeMap::from([("a.1".to_owned(), seqs.to_vec())]);
        assert!(judge_records(&file, &acked(&[0, 1]), true).is_empty());
        assert_eq!(judge_records(&file, &acked(&[0, 1, 2, 3]), true).len(), 1);
        assert_eq!(judge_records(&file, &acked(&[0]), true).len(), 1, "two more than acknowledged");
        assert!(judge_records(&file, &acked(&[0]), false).is_empty(), "it goes on writing");
        assert_eq!(judge_records(&file[..130], &acked(&[0, 1]), true).len(), 1, "torn");
        let twice = [&file[..], &record("a.1", 2)].concat();
        assert_eq!(judge_records(&twice, &acked(&[0, 1, 2]), true).len(), 1);
        assert_eq!(judge_records(&file, &BTreeMap::new(), true).len(), 1, "nobody's");
    }

    #[test]
    fn a_counter_loses_nothing() {
        let two = [journal("t\na 1\nt\na 3\nt"), journal("t\na 2")];
        assert!(judge_counter(3, &two).is_empty());
        assert!(judge_counter(4, &two).is_empty(), "the one under way");
        assert_eq!(judge_counter(2, &two).len(), 1);
        assert_eq!(judge_counter(5, &two).len(), 1);
        assert_eq!(judge_counter(3, &[journal("t\na 1\nt\na 2"), journal("t\na 2")]).len(), 1);
    }

    #[test]
    fn sections_that_overlap_are_found() {
        let of = |a: &str, b: &str| {
            judge_sections(&BTreeMap::from([("a".into(), journal(a)), ("b".into(), journal(b))]))
        };
        assert!(of("b 1 free\ne 2\nb 5 free\ne 6", "b 3 free\ne 4").is_empty());
        assert_eq!(of("b 1 free\ne 4", "b 3 free\ne 5").len(), 1);
        assert!(of("b 1 free", "b 3 a\ne 5").is_empty(), "a died inside");
        assert_eq!(of("b 1 free\ne 2", "b 3 a\ne 5").len(), 1);
    }

    #[test]
    fn names_are_those_of_a_prefix() {
        let journals = BTreeMap::from([("a".to_owned(), journal("+ a+1\n+ a+2\n!\n> a+1 a+2\n- a+2"))]);
        let dir = |names: &[(&str, &str)]| {
            names.iter().map(|(n, o)| ((*n).to_owned(), content(o))).collect::<BTreeMap<_, _>>()
        };
        let ok = |names: &[(&str, &str)]| judge_names(&dir(names), &journals).is_empty();
        assert!(ok(&[("a+1", "a+1"), ("a+2", "a+2")]));
        assert!(ok(&[("a+2", "a+1")]));
        assert!(ok(&[]));
        assert!(!ok(&[("a+1", "a+1")]), "a rename takes the old name away");
        assert!(!ok(&[("a+1", "x"), ("a+2", "a+2"), ("b+1", "b+1")]), "nobody's");
        assert!(!ok(&[("a+2", "a+2")]), "the contents of a+1 are gone");
        let all = BTreeMap::from([("a".to_owned(), journal("+ a+1\n!"))]);
        assert_eq!(judge_names(&dir(&[("a+1", "x")]), &all).len(), 1);
        assert_eq!(judge_names(&dir(&[]), &all).len(), 1);
    }
}
