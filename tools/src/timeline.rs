//! `cairn timeline`: what the nodes' event files say, merged by the machine's boot clock.

use clap::Parser;
use serde_json::Value;
use std::path::{Path, PathBuf};

#[derive(Parser, Debug)]
#[command(name = "timeline", about = "Events of all nodes of a local cluster in order")]
struct Args {
    /// Directory of the cluster (as given to `cairn up`)
    #[arg(long, default_value_os_t = crate::local::default_dir())]
    dir: PathBuf,
    /// Only the last N events
    #[arg(short = 'n', long)]
    last: Option<usize>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// One line of an event file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Nanoseconds of the boot clock.
    pub(crate) t: u64,
    /// Node on which it was logged.
    pub(crate) node: String,
    pub(crate) fields: serde_json::Map<String, Value>,
}

impl Entry {
    pub(crate) fn event(&self) -> &str {
        self.fields.get("event").and_then(Value::as_str).unwrap_or("")
    }

    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        match self.fields.get(key)? {
            Value::Number(n) => n.as_u64(),
            Value::String(s) => s.parse().ok(),
            _ => None,
        }
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key)?.as_str()
    }
}

/// Events of the given nodes (name, run directory), oldest first. Lines that are being written are left out.
pub(crate) fn read(nodes: &[(String, PathBuf)]) -> Vec<Entry> {
    let mut all: Vec<Entry> = nodes.iter().flat_map(|(name, dir)| read_one(name, dir)).collect();
    all.sort_by_key(|e| e.t);
    all
}

fn read_one(name: &str, run_dir: &Path) -> Vec<Entry> {
    let Ok(text) = std::fs::read_to_string(run_dir.join("log/events.jsonl")) else { return Vec::new() };
    text.lines()
        .filter_map(|l| {
            let Value::Object(fields) = serde_json::from_str(l).ok()? else { return None };
            let t = fields.get("t")?.as_u64()?;
            Some(Entry { t, node: name.to_owned(), fields })
        })
        .collect()
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match crate::classic::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let cluster = match crate::local::Cluster::open(&args.dir) {
        Ok(c) => c,
        Err(e) => {
            eprintln!("timeline: {e}");
            return cairn_base::exit::FAILED;
        }
    };
    let events = read(&cluster.run_dirs());
    let skip = args.last.map_or(0, |n| events.len().saturating_sub(n));
    let start = events.first().map_or(0, |e| e.t);
    for e in &events[skip..] {
        if args.json {
            let mut fields = e.fields.clone();
            fields.insert("on".into(), e.node.clone().into());
            println!("{}", Value::Object(fields));
        } else {
            println!("{}", line(e, start));
        }
    }
    0
}

/// `   12.345 s  node1  fence_done  node=3 proof=exited`
pub(crate) fn line(e: &Entry, start: u64) -> String {
    let rest: Vec<String> = e
        .fields
        .iter()
        .filter(|(k, _)| !matches!(k.as_str(), "t" | "unix_ms" | "event" | "from"))
        .map(|(k, v)| format!("{k}={}", v.as_str().map_or_else(|| v.to_string(), str::to_owned)))
        .collect();
    let ms = e.t.saturating_sub(start) / 1_000_000;
    format!("{:>6}.{:03} s  {:<8} {:<18} {}", ms / 1000, ms % 1000, e.node, e.event(), rest.join(" "))
}
