//! Named rates, and what several rounds say together.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::Instant;

/// Rates of one round by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures(BTreeMap<&'static str, f64>);

impl Figures {
    pub(crate) fn rate(&mut self, name: &'static str, count: f64, since: Instant) {
        self.0.insert(name, count / since.elapsed().as_secs_f64());
    }

    /// The smaller of both, figure by figure.
    pub(crate) fn least(mut self, other: &Self) -> Self {
        for (name, v) in &other.0 {
            self.0.entry(name).and_modify(|mine| *mine = mine.min(*v)).or_insert(*v);
        }
        self
    }

    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

/// Quotients of the figures that both have.
pub(crate) fn ratio(of: &Figures, to: &Figures) -> Figures {
    Figures(of.0.iter().filter_map(|(k, v)| Some((*k, v / to.0.get(k)?))).collect())
}

/// Quotients of rows with different names, under that of the first.
pub(crate) fn ratio_of_rows(of: &Figures, to: &Figures, rows: &[(&'static str, &'static str)]) -> Figures {
    Figures(rows.iter().filter_map(|(a, b)| Some((*a, of.0.get(a)? / to.0.get(b)?))).collect())
}

/// Median, least and greatest of each figure.
pub(crate) fn summary(rounds: &[&Figures]) -> Value {
    let names: Vec<&'static str> = rounds.first().map(|f| f.0.keys().copied().collect()).unwrap_or_default();
    let mut out = Map::new();
    for name in names {
        let mut all: Vec<f64> = rounds.iter().filter_map(|f| f.0.get(name).copied()).collect();
        all.sort_by(f64::total_cmp);
        let (least, greatest) = (all[0], all[all.len() - 1]);
        let median = f64::midpoint(all[(all.len() - 1) / 2], all[all.len() / 2]);
        out.insert(name.to_owned(), json!([round(median), round(least), round(greatest)]));
    }
    Value::Object(out)
}

/// Three digits are more than the machine is worth.
fn round(v: f64) -> Value {
    if v >= 100.0 { json!(v.round()) } else { json!((v * 1000.0).round() / 1000.0) }
}
