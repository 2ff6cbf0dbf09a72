//! Deliberate faults for the test suite: each names one rule that the simulation must notice to be missing.
//! Outside of unit tests `on` is the constant `false`.

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(dead_code)] // every variant but the one at hand is unused in a production build
pub(crate) enum Mutant {
    None,
    /// CW and PR compared by number when the blocked mode is chosen.
    BastNumeric,
    /// Converting locks do not count as granted.
    ConvertingIgnored,
    /// Ghosts dropped at the view change instead of at the gate.
    GhostsDropped,
    /// Messages of procs that are not members are accepted.
    StaleView,
    /// The next request overtakes a down-conversion that waits to be sent.
    DownOvertaken,
    /// A value whose writer died is not flagged.
    LvbUnflagged,
    /// Cancel answered although the grant was already sent.
    CancelAndGrant,
    /// A late drop removes a newer directory entry.
    DropKillsNewer,
    /// Mask by union of the survivors' compatible sets.
    MaskUnion,
    /// QUECVT ignored.
    QuecvtIgnored,
    /// Trees assigned before all end markers are in.
    EarlyAssign,
    /// Unclaimed roots of a dead owner's slice handed out without mask.
    NoTaint,
    /// RECOVERY passes before the fence.
    RecoveryBeforeFence,
    /// Resources unknown to survivors in a rebuilt tree carry no mask.
    ChildUnmasked,
    /// Mask forgotten when the survivor that narrowed it releases.
    MaskForgotten,
    /// Trees in the middle of a lookup are not looked up again after a view change.
    LookupNotResent,
    /// Term not compared by the master.
    TermIgnored,
}

#[cfg(test)]
thread_local! {
    static CURRENT: std::cell::Cell<Mutant> = const { std::cell::Cell::new(Mutant::None) };
}

#[cfg(test)]
pub(crate) fn set(m: Mutant) {
    CURRENT.with(|c| c.set(m));
}

#[cfg(test)]
pub(crate) fn on(m: Mutant) -> bool {
    CURRENT.with(|c| c.get() == m)
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn on(_m: Mutant) -> bool {
    false
}
