//! Where a process of a node says what it does: a log for people, and `events.jsonl` for machines.
//!
//! Every `tracing` record with a field `event` (the names in `cairn_base::events`) becomes one line of
//! `<run-dir>/log/events.jsonl`: `{"t":<boottime ns>,"unix_ms":…,"event":"…","from":"<process>",<fields>}`. Appends of one line
//! each, so the processes of a node may share the file.

use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::{EnvFilter, Layer, util::SubscriberInitExt};

/// Starts the log of this process: for people to `file` (or standard error), events to the run directory. `CAIRN_LOG` sets the
/// levels, in the syntax of `RUST_LOG`.
pub fn init(run_dir: &Path, process: &str, is_debug: bool, file: Option<&Path>) -> io::Result<()> {
    let dir = run_dir.join("log");
    std::fs::create_dir_all(&dir)?;
    let append = |path: &Path| OpenOptions::new().create(true).append(true).open(path);
    let events = append(&dir.join("events.jsonl"))?;
    let default = if is_debug { "debug" } else { "info" };
    let filter = EnvFilter::try_from_env("CAIRN_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let writer = match file {
        Some(path) => BoxMakeWriter::new(Mutex::new(append(path)?)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let people = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false).with_filter(filter);
    let events = Events { file: Mutex::new(events), process: process.to_owned() };
    // A second start in one process (tests) keeps the first.
    let _ = tracing_subscriber::registry().with(people).with(events).try_init();
    Ok(())
}

struct Events {
    file: Mutex<File>,
    process: String,
}

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").into());
    }
}

impl<S: Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().fields().field("event").is_none() {
            return;
        }
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let mut line = fields.0;
        line.remove("message");
        line.insert("t".into(), crate::clock::boottime().0.into());
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        line.insert("unix_ms".into(), unix_ms.into());
        line.insert("from".into(), self.process.clone().into());
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        if let Ok(mut file) = self.file.lock() {
            // A full local disk must not stop the node: the log is a convenience.
            let _ = file.write_all(text.as_bytes());
        }
    }
}
