//! Every timeout of the cluster: a few base values, everything else by formula, unsafe combinations refused by name.
//!
//! ```text
//! death at 0 ──T──► token lost, GATHER ──C──► silent ones failed ──F──► view without the dead (D_v)
//!   └─ (k+2)·i + X ──► eviction readable on the quorum disk (D_q)      └─ fence (ft) ── replay ── service runs
//!   permit of the dead ends at T + C + F (P); its stop limit is S = k·i after its last renewal; a watchdog W later it is reset
//! ```
//!
//! All values are milliseconds. The rules are named as in the messages and the manual: `TT-*` for the token, `QD-*` for the
//! quorum disk, `FE-*` for fencing, `WD-1` for the watchdog.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Clock rate allowance in parts per thousand: twice the promised 0.1 %.
pub const RHO_PER_MILLE: u64 = 2;

/// Which set of base values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// The historical values.
    Classic,
    /// Recovery within 20 s.
    #[default]
    Default,
    /// Recovery within 5 s.
    Fast,
}

impl Profile {
    pub fn parse(s: &str) -> Option<Self> {
        Some(match s {
            "classic" => Self::Classic,
            "default" => Self::Default,
            "fast" => Self::Fast,
            _ => return None,
        })
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Classic => "classic",
            Self::Default => "default",
            Self::Fast => "fast",
        })
    }
}

/// What an administrator may set. `consensus_permille` is c · 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub profile: Profile,
    /// T: silence of the token after which it is lost.
    pub token: u64,
    /// R: retransmissions of the token before it is lost.
    pub retransmits: u64,
    /// c in thousandths: consensus = c · T.
    pub consensus_permille: u64,
    /// i: cycle of the quorum disk.
    pub cycle: u64,
    /// k: missed cycles before eviction.
    pub tko: u64,
    /// X: longest life of an I/O that has been issued.
    pub io_limit: u64,
    /// W: watchdog time-out; counts only where a watchdog is configured.
    pub watchdog: u64,
    /// Allowance for journal replay, in the bound that the profile promises.
    pub replay: u64,
}

impl Base {
    pub const fn of(profile: Profile) -> Self {
        match profile {
            Profile::Classic => Self {
                profile,
                token: 10_000,
                retransmits: 20,
                consensus_permille: 2_000,
                cycle: 1_000,
                tko: 10,
                io_limit: 5_000,
                watchdog: 10_000,
                replay: 60_000,
            },
            Profile::Default => Self {
                profile,
                token: 3_000,
                retransmits: 8,
                consensus_permille: 1_200,
                cycle: 400,
                tko: 8,
                io_limit: 1_000,
                watchdog: 5_000,
                replay: 5_000,
            },
            Profile::Fast => Self {
                profile,
                token: 1_000,
                retransmits: 8,
                consensus_permille: 1_200,
                cycle: 150,
                tko: 8,
                io_limit: 300,
                watchdog: 2_000,
                replay: 1_500,
            },
        }
    }
}

/// Facts beside the base values on which the rules depend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    pub nodes: u64,
    pub quorum_disk: bool,
    pub watchdog: bool,
    /// Measured time of one hop of the token, when known.
    pub hop: Option<u64>,
    /// Time that the paths to the LUN need for a fail-over.
    pub path_failover: u64,
    pub rhel5: bool,
}

/// Base and derived values. Derived ones are never written by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    pub base: Base,
    /// Token retransmission interval.
    pub ret: u64,
    /// How long the representative holds the token of an idle ring.
    pub hold: u64,
    /// Join repetition in GATHER.
    pub join: u64,
    /// Beacon period.
    pub merge: u64,
    /// For how long a peer heard counts as heard.
    pub hear_window: u64,
    /// C: consensus.
    pub consensus: u64,
    /// F: forming a ring after consensus.
    pub form: u64,
    /// D_v: death to view without the dead, worst case.
    pub view_after_death: u64,
    /// S: a node stops counting and writing this long after its last renewal; L, the vote lease, is the same.
    pub stop_limit: u64,
    /// D_q: death to eviction readable on the quorum disk.
    pub evicted_after_death: u64,
    /// D_m: death of the device's master to a new master.
    pub master_after_death: u64,
    /// P: life of a permit after a token.
    pub permit: u64,
    /// F_pill: wait of a fencer by poison pill.
    pub pill: u64,
    /// ft: fence through the LUN, worst case.
    pub fence_lun: u64,
    pub fenced_lun: u64,
    pub fenced_watchdog: u64,
    /// Crash to end of replay, LUN methods.
    pub bound_lun: u64,
    pub bound_watchdog: u64,
    pub hold_down: u64,
    /// A gap of the driver loop above this is a pause.
    pub pause_limit: u64,
    /// Shown only: historical names.
    pub quorum_dev_poll: u64,
    pub tko_up: u64,
    pub upgrade_wait: u64,
    pub master_wait: u64,
}

/// A rule that a configuration breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach {
    pub rule: &'static str,
    pub text: String,
    /// False: may be overridden with `unsafe_timing="rule"`, because it costs availability only.
    pub safety: bool,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.text)
    }
}

/// Integer division to the nearest.
const fn div_round(a: u64, b: u64) -> u64 {
    (a + b / 2) / b
}

impl Timing {
    /// All values from the base. `token_only` values never depend on the disk and the other way round, so one function does.
    pub fn derive(base: Base) -> Self {
        let (t, i, k, x, w) = (base.token, base.cycle, base.tko, base.io_limit, base.watchdog);
        // T / (R + 0.2), and 0.8 of that less 10, each rounded once
        let ret = div_round(10 * t, 10 * base.retransmits + 2);
        let hold = div_round(80 * t, 10 * (10 * base.retransmits + 2)).saturating_sub(10).max(1);
        let join = if base.profile == Profile::Classic { 60 } else { (t / 50).min(60) };
        let merge = (t / 10).min(200);
        let consensus = div_round(t * base.consensus_permille, 1000);
        let form = t / 5;
        let view_after_death = t + ret + consensus + form;
        let stop_limit = k * i;
        let evicted_after_death = (k + 2) * i + x;
        let pill = (stop_limit + w + x) * (1000 + RHO_PER_MILLE) / 1000;
        let fence_lun = 2 * x + i.max(200);
        let fenced_lun = view_after_death + fence_lun;
        let fenced_watchdog = view_after_death.max(evicted_after_death + pill);
        Self {
            base,
            ret,
            hold,
            join,
            merge,
            hear_window: 3 * merge + join,
            consensus,
            form,
            view_after_death,
            stop_limit,
            evicted_after_death,
            master_after_death: evicted_after_death + 2 * i,
            permit: t + consensus + form,
            pill,
            fence_lun,
            fenced_lun,
            fenced_watchdog,
            bound_lun: fenced_lun + base.replay,
            bound_watchdog: fenced_watchdog + base.replay,
            hold_down: 2 * t,
            pause_limit: t / 2,
            quorum_dev_poll: t,
            tko_up: k / 2,
            upgrade_wait: 2,
            master_wait: k / 2,
        }
    }

    /// Rules that this combination breaks; empty when it is safe and available.
    pub fn breaches(&self, facts: &Facts) -> Vec<Breach> {
        let mut out = Vec::new();
        let mut need = |ok: bool, rule: &'static str, safety: bool, text: String| {
            if !ok {
                out.push(Breach { rule, text, safety });
            }
        };
        let b = &self.base;
        let (t, c, f, i, k, x) = (b.token, self.consensus, self.form, b.cycle, b.tko, b.io_limit);
        if facts.nodes > 2 {
            need(10 * c >= 12 * t, "TT-1", true, format!("consensus {c} is below 1.2 x token {t}"));
        } else {
            need(c >= 3 * self.join, "TT-1", true, format!("consensus {c} is below 3 x join {}", self.join));
        }
        need(
            self.ret >= 2 * self.join && self.ret >= 30,
            "TT-2",
            true,
            format!("token retransmission every {} must be at least 30 and 2 x join {}", self.ret, self.join),
        );
        if let Some(hop) = facts.hop {
            need(
                t >= 10 * facts.nodes * hop,
                "TT-3",
                false,
                format!("token {t} is below 10 x {} nodes x hop {hop}", facts.nodes),
            );
        }
        need(
            2 * self.hear_window < c,
            "TT-4",
            true,
            format!("hear window {} is not below half of consensus {c}", self.hear_window),
        );
        if facts.quorum_disk {
            need(
                self.master_after_death <= t + c,
                "QD-1",
                false,
                format!(
                    "a new device master may take {}, token + consensus is {}",
                    self.master_after_death,
                    t + c
                ),
            );
            need(
                self.evicted_after_death <= self.view_after_death,
                "QD-2",
                false,
                format!(
                    "eviction may take {}, the view without the dead {}",
                    self.evicted_after_death, self.view_after_death
                ),
            );
            need((4..=249).contains(&k), "QD-3", true, format!("tko {k} is outside 4..249"));
            need(
                x + 2 * i <= self.stop_limit && facts.path_failover + 2 * i <= self.stop_limit,
                "QD-4",
                true,
                format!(
                    "stop limit {} is below I/O limit {x} or path fail-over {} plus two cycles of {i}",
                    self.stop_limit, facts.path_failover
                ),
            );
            need(
                self.stop_limit * (1000 + RHO_PER_MILLE) < (k + 1) * i * 1000,
                "QD-5",
                true,
                format!(
                    "stop limit {} with clock drift reaches the eviction at {}",
                    self.stop_limit,
                    (k + 1) * i
                ),
            );
            need(
                (c + f) * 1000 >= self.stop_limit * (1000 + 2 * RHO_PER_MILLE),
                "QD-6",
                true,
                format!("consensus + form {} is below the vote lease {} with drift", c + f, self.stop_limit),
            );
        }
        if facts.watchdog {
            // the fastest proof that rests on time alone
            let proof = self.evicted_after_death + self.pill;
            need(
                self.permit <= self.view_after_death.max(proof),
                "FE-1",
                true,
                format!("permit {} outlives the earliest proof by time at {proof}", self.permit),
            );
            need(
                b.watchdog >= 2 * i.min(1000) && b.watchdog > 0,
                "WD-1",
                true,
                format!("watchdog {} is below two petting periods of {}", b.watchdog, i.min(1000)),
            );
        }
        let bound = if facts.watchdog { self.bound_watchdog } else { self.bound_lun };
        let promise = match b.profile {
            Profile::Classic => u64::MAX,
            Profile::Default => 20_000,
            Profile::Fast => 5_000,
        };
        need(
            bound <= promise,
            "FE-2",
            false,
            format!("recovery may take {bound}, the profile {} promises {promise}", b.profile),
        );
        out
    }

    /// The historical warning about slow disks: an error in `rhel6`, a warning in `rhel5`.
    pub fn historic_disk_warning(&self) -> Option<String> {
        let b = &self.base;
        let needed = b.cycle * (b.tko + self.master_wait + self.upgrade_wait);
        (needed >= b.token).then(|| {
            format!("Quorum disk timings are too slow for configured token timeout ({needed} >= {})", b.token)
        })
    }

    pub fn token(&self) -> Duration {
        Duration::from_millis(self.base.token)
    }
    pub fn permit(&self) -> Duration {
        Duration::from_millis(self.permit)
    }
    pub fn stop_limit(&self) -> Duration {
        Duration::from_millis(self.stop_limit)
    }
    /// What a submission must have left of its permit: X / 10.
    pub fn guard(&self) -> Duration {
        Duration::from_millis(self.base.io_limit / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts =
        Facts { nodes: 4, quorum_disk: true, watchdog: false, hop: None, path_failover: 0, rhel5: false };

    type Get = fn(&Timing) -> u64;

    #[test]
    fn derived_values_are_those_of_the_table() {
        let table: [(&str, Get, [u64; 3]); 25] = [
            ("T", |t| t.base.token, [10_000, 3_000, 1_000]),
            ("ret", |t| t.ret, [495, 366, 122]),
            ("hold", |t| t.hold, [386, 283, 88]),
            ("join", |t| t.join, [60, 60, 20]),
            ("merge", |t| t.merge, [200, 200, 100]),
            ("hear window", |t| t.hear_window, [660, 660, 320]),
            ("C", |t| t.consensus, [20_000, 3_600, 1_200]),
            ("F", |t| t.form, [2_000, 600, 200]),
            ("D_v", |t| t.view_after_death, [32_495, 7_566, 2_522]),
            ("S", |t| t.stop_limit, [10_000, 3_200, 1_200]),
            ("D_q", |t| t.evicted_after_death, [17_000, 5_000, 1_800]),
            ("D_m", |t| t.master_after_death, [19_000, 5_800, 2_100]),
            ("quorum_dev_poll", |t| t.quorum_dev_poll, [10_000, 3_000, 1_000]),
            ("tko_up", |t| t.tko_up, [5, 4, 4]),
            ("upgrade_wait", |t| t.upgrade_wait, [2, 2, 2]),
            ("master_wait", |t| t.master_wait, [5, 4, 4]),
            ("P", |t| t.permit, [32_000, 7_200, 2_400]),
            ("F_pill", |t| t.pill, [25_050, 9_218, 3_507]),
            ("ft", |t| t.fence_lun, [11_000, 2_400, 800]),
            ("fenced lun", |t| t.fenced_lun, [43_495, 9_966, 3_322]),
            ("fenced watchdog", |t| t.fenced_watchdog, [42_050, 14_218, 5_307]),
            ("bound lun", |t| t.bound_lun, [103_495, 14_966, 4_822]),
            ("bound watchdog", |t| t.bound_watchdog, [102_050, 19_218, 6_807]),
            ("hold_down", |t| t.hold_down, [20_000, 6_000, 2_000]),
            ("pause limit", |t| t.pause_limit, [5_000, 1_500, 500]),
        ];
        let all = [Profile::Classic, Profile::Default, Profile::Fast].map(|p| Timing::derive(Base::of(p)));
        for (name, get, want) in table {
            assert_eq!(all.map(|t| get(&t)), want, "{name}");
        }
    }

    #[test]
    fn the_profiles_keep_every_rule_except_fast_with_a_watchdog() {
        for profile in [Profile::Classic, Profile::Default, Profile::Fast] {
            let timing = Timing::derive(Base::of(profile));
            assert_eq!(timing.breaches(&FACTS), [], "{profile}");
            let with_dog = timing.breaches(&Facts { watchdog: true, ..FACTS });
            let rules: Vec<_> = with_dog.iter().map(|b| b.rule).collect();
            assert_eq!(rules, if profile == Profile::Fast { vec!["FE-2"] } else { vec![] }, "{profile}");
        }
    }

    #[test]
    fn each_rule_refuses_what_breaks_it() {
        let base = Base::of(Profile::Default);
        let cases: [(&str, Base, Facts); 10] = [
            ("TT-1", Base { consensus_permille: 1_100, ..base }, FACTS),
            ("TT-2", Base { retransmits: 40, ..base }, FACTS),
            ("TT-3", base, Facts { hop: Some(100), ..FACTS }),
            ("TT-4", Base { token: 1_000, consensus_permille: 600, ..base }, FACTS),
            ("QD-1", Base { cycle: 500, ..base }, FACTS),
            ("QD-3", Base { tko: 3, ..base }, FACTS),
            ("QD-4", base, Facts { path_failover: 3_000, ..FACTS }),
            ("QD-5", Base { tko: 600, cycle: 1, io_limit: 1, ..base }, FACTS),
            ("QD-6", Base { cycle: 1_000, ..base }, FACTS),
            ("WD-1", Base { watchdog: 100, ..base }, Facts { watchdog: true, ..FACTS }),
        ];
        for (rule, base, facts) in cases {
            let found = Timing::derive(base).breaches(&facts);
            assert!(found.iter().any(|b| b.rule == rule), "{rule} not among {found:?}");
        }
        // QD-2 alone: a long I/O limit makes the eviction late
        let slow = Timing::derive(Base { io_limit: 5_000, ..base }).breaches(&FACTS);
        assert!(slow.iter().any(|b| b.rule == "QD-2"), "{slow:?}");
    }

    #[test]
    fn only_availability_rules_may_be_overridden() {
        let base = Base { token: 10, cycle: 10_000, tko: 2, watchdog: 1, ..Base::of(Profile::Fast) };
        let facts = Facts { watchdog: true, hop: Some(1_000), path_failover: 100_000, ..FACTS };
        for breach in Timing::derive(base).breaches(&facts) {
            let overridable = ["QD-1", "QD-2", "TT-3", "FE-2"].contains(&breach.rule);
            assert_eq!(breach.safety, !overridable, "{breach}");
        }
    }

    #[test]
    fn classic_disk_timings_are_named_too_slow_as_they_always_were() {
        assert!(Timing::derive(Base::of(Profile::Classic)).historic_disk_warning().is_some());
    }
}
