//! The chain of quorate views: who may go on with what it knows.
//!
//! Two quorate views that follow each other may share no living member: only the quorum disk, or a node that was restarted in between.
//! Then nobody in the second one knows whom the first had admitted, or whom it had proved dead. So a view is *recorded*, in a file of
//! each of its members and on the quorum disk where its quorum rests on it, before anything is decided in it:
//!
//! ```text
//!   view ──Installed (safe)──► from all ──quorate?──► file, disk ──Recorded (safe)──► from all: decide (admissions, proofs; clients: `told.rs`)
//! ```
//!
//! A life whose state does not include the newest recorded view has been passed by: it stops (SS5). Where nobody's state does, the
//! fence domain forms anew, and fences whatever may run on the absent nodes.
//!
//! Why that is enough: what was decided in a view was decided after all its members had recorded it, and (by device votes) after the
//! disk had. Whoever is quorate later shares a living member with it, which includes it, or a restarted one, which has the file, or
//! the disk. That a view is recorded after all have installed it means that none of its members is passed by.

use cairn_base::Proc;
use qdisk::ViewName;
use std::collections::BTreeSet;

/// Views whose decisions a state may include; the oldest are forgotten first, which is safe.
const REMEMBERED: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The newest recorded view that this node knows of.
    last: ViewName,
    /// Views whose decisions this life's state includes, from `last` on.
    included: BTreeSet<ViewName>,
    view: ViewName,
    members: BTreeSet<Proc>,
    installed: BTreeSet<Proc>,
    recorded: BTreeSet<Proc>,
    asked: bool,
    in_file: bool,
    on_disk: bool,
    said: bool,
}

/// What has to be done about the present view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Into the file and onto the disk, if there is one.
    Record(ViewName),
    /// To all: it is recorded here.
    Say(ViewName),
}

impl Chain {
    /// What an earlier life of this node had recorded.
    pub(super) fn start(&mut self, last: ViewName) {
        self.last = self.last.max(last);
    }

    pub(super) const fn last(&self) -> ViewName {
        self.last
    }

    pub(super) fn included(&self) -> Vec<ViewName> {
        self.included.iter().copied().collect()
    }

    /// A view was installed; `included`: what the members' states come to.
    pub(super) fn view(
        &mut self,
        view: ViewName,
        members: &[Proc],
        last: ViewName,
        included: &BTreeSet<ViewName>,
    ) {
        self.last = last;
        self.included = included.iter().copied().filter(|v| *v >= last).collect();
        self.included.extend([last, view]);
        while self.included.len() > REMEMBERED {
            self.included.pop_first();
        }
        self.view = view;
        self.members = members.iter().copied().collect();
        self.installed.clear();
        self.recorded.clear();
        (self.asked, self.in_file, self.on_disk, self.said) = (false, false, false, false);
    }

    /// The ring of the view is broken: nothing more is decided in it here.
    pub(super) fn broken(&mut self) {
        self.recorded.clear();
    }

    pub(super) fn installed(&mut self, from: Proc, view: ViewName) {
        if view == self.view {
            self.installed.insert(from);
        }
    }

    pub(super) fn recorded(&mut self, from: Proc, view: ViewName) {
        if view == self.view {
            self.recorded.insert(from);
        }
    }

    pub(super) fn in_file(&mut self, view: ViewName) {
        self.in_file |= view == self.view;
    }

    pub(super) fn on_disk(&mut self, view: ViewName) {
        self.on_disk |= view >= self.view;
    }

    /// The disk shows a recorded view. False: it is newer than all that this life's state includes.
    pub(super) fn shown(&mut self, view: ViewName) -> bool {
        let is_new = view > self.last;
        self.last = self.last.max(view);
        !is_new || self.included.contains(&view)
    }

    /// Nothing of this life's is older than `view`: it has no state yet.
    pub(super) fn is_fresh_for(&mut self, view: ViewName) {
        self.included.insert(view);
    }

    /// A later view is recorded already: this one may not become quorate, because quorate views rise (its ring did not know how high).
    pub(super) fn is_overtaken(&self) -> bool {
        self.view != ViewName::NONE && self.view < self.last
    }

    /// `quorate`: here, now; `by_device`: only with the device votes.
    pub(super) fn step(&mut self, quorate: bool, by_device: bool) -> Option<Step> {
        let all_here = !self.members.is_empty() && self.members.is_subset(&self.installed);
        if !self.asked && all_here && (quorate || !self.recorded.is_empty()) {
            self.asked = true;
            self.last = self.last.max(self.view);
            return Some(Step::Record(self.view));
        }
        if self.asked && self.in_file && (self.on_disk || !by_device) && !self.said {
            self.said = true;
            return Some(Step::Say(self.view));
        }
        None
    }

    /// All members have recorded the present view.
    pub(super) fn is_recorded(&self) -> bool {
        !self.members.is_empty() && self.members.is_subset(&self.recorded)
    }
}
