//! Resource trees: what a service consists of, and in which order it starts and stops.
//!
//! Start: the parent, then its children by start level (lowest first; equal levels in file order), then children
//! whose type has no level under this parent, in file order. Stop is the mirror: untyped children first in reverse file
//! order, then by stop level, then the parent.

use std::collections::BTreeMap;

/// One resource with its attributes after `ref` has been resolved and values inherited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Element name: `service`, `script`, `clusterfs`, `ip`, `fs`, `ocf`, …
    pub kind: String,
    pub name: String,
    pub attrs: BTreeMap<String, String>,
    pub children: Vec<Resource>,
}

impl Resource {
    pub fn attr(&self, key: &str) -> Option<&str> {
        self.attrs.get(key).map(String::as_str)
    }

    /// `1`, `yes`, `true`, `on` are true, as in the classic agents.
    pub fn flag(&self, key: &str, default: bool) -> bool {
        self.attr(key).map_or(default, |v| matches!(v, "1" | "yes" | "true" | "on"))
    }

    /// Resources in the order in which they start; the parent first.
    pub fn start_order(&self) -> Vec<&Self> {
        let mut out = vec![self];
        for child in self.ordered(|l| l.0) {
            out.extend(child.start_order());
        }
        out
    }

    /// Resources in the order in which they stop; the parent last.
    pub fn stop_order(&self) -> Vec<&Self> {
        let (typed, untyped): (Vec<_>, Vec<_>) =
            self.children.iter().partition(|c| levels(&self.kind, &c.kind).is_some());
        let mut out = Vec::new();
        for child in untyped.into_iter().rev() {
            out.extend(child.stop_order());
        }
        let mut typed: Vec<_> = typed.into_iter().enumerate().collect();
        typed.sort_by_key(|(i, c)| {
            (levels(&self.kind, &c.kind).map_or(u8::MAX, |l| l.1), std::cmp::Reverse(*i))
        });
        for (_, child) in typed {
            out.extend(child.stop_order());
        }
        out.push(self);
        out
    }

    fn ordered(&self, level: impl Fn((u8, u8)) -> u8) -> Vec<&Self> {
        let mut list: Vec<_> = self.children.iter().enumerate().collect();
        list.sort_by_key(|(i, c)| (levels(&self.kind, &c.kind).map_or(u8::MAX, &level), *i));
        list.into_iter().map(|(_, c)| c).collect()
    }
}

/// (start, stop) level of a child type under a parent type; `None` when the parent does not order it.
fn levels(parent: &str, child: &str) -> Option<(u8, u8)> {
    match parent {
        "service" => match child {
            "lvm" => Some((1, 9)),
            "fs" => Some((2, 8)),
            "clusterfs" => Some((3, 7)),
            "netfs" => Some((4, 6)),
            "nfsexport" => Some((5, 5)),
            "nfsclient" => Some((6, 4)),
            "ip" => Some((7, 2)),
            "smb" => Some((8, 3)),
            "script" => Some((9, 1)),
            _ => None,
        },
        "fs" | "clusterfs" => match child {
            "fs" | "clusterfs" => Some((1, 3)),
            "nfsexport" => Some((3, 1)),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(kind: &str, children: Vec<Resource>) -> Resource {
        Resource { kind: kind.into(), name: kind.into(), attrs: BTreeMap::new(), children }
    }

    fn kinds(list: Vec<&Resource>) -> Vec<&str> {
        list.into_iter().map(|r| r.kind.as_str()).collect()
    }

    #[test]
    fn order_is_by_level_whatever_the_file_says() {
        let s = r("service", vec![r("script", vec![]), r("ip", vec![]), r("clusterfs", vec![])]);
        assert_eq!(kinds(s.start_order()), ["service", "clusterfs", "ip", "script"]);
        assert_eq!(kinds(s.stop_order()), ["script", "ip", "clusterfs", "service"]);
    }

    #[test]
    fn untyped_children_start_last_and_stop_first_in_reverse() {
        let s = r("service", vec![r("a", vec![]), r("script", vec![]), r("b", vec![])]);
        assert_eq!(kinds(s.start_order()), ["service", "script", "a", "b"]);
        assert_eq!(kinds(s.stop_order()), ["b", "a", "script", "service"]);
    }

    #[test]
    fn nested_children_follow_their_parent() {
        let s = r("service", vec![r("clusterfs", vec![r("script", vec![])]), r("ip", vec![])]);
        assert_eq!(kinds(s.start_order()), ["service", "clusterfs", "script", "ip"]);
        assert_eq!(kinds(s.stop_order()), ["ip", "script", "clusterfs", "service"]);
    }
}
