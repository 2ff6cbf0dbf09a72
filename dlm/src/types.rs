//! Words of the lock manager: modes, compatibility, flags, status, ids, value blocks.
//!
//! Numbers are those of the Linux and VMS interfaces, so that tools and habits carry over. Strength of modes is only a
//! partial order (CW and PR are not comparable); everything that needs an order uses [`Mode::covers`], never the number.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Lock modes with their interface numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, PartialOrd, Ord)]
#[repr(u8)]
pub enum Mode {
    NL = 0,
    CR = 1,
    CW = 2,
    PR = 3,
    PW = 4,
    EX = 5,
}

/// Row per granted mode: bit m set when mode m may be granted beside it.
const COMPAT: [u8; 6] = [0b11_1111, 0b01_1111, 0b00_0111, 0b00_1011, 0b00_0011, 0b00_0001];

impl Mode {
    pub const ALL: [Self; 6] = [Self::NL, Self::CR, Self::CW, Self::PR, Self::PW, Self::EX];

    pub fn from_u8(v: u8) -> Option<Self> {
        Self::ALL.get(v as usize).copied()
    }

    pub const fn index(self) -> usize {
        self as usize
    }

    /// Both may be granted at once (S-1; symmetric).
    pub const fn compatible(self, other: Self) -> bool {
        COMPAT[self as usize] & (1 << other as u8) != 0
    }

    /// The modes that may be granted beside this one.
    pub const fn compatible_set(self) -> ModeSet {
        ModeSet(COMPAT[self as usize])
    }

    /// Whatever conflicts with `other` conflicts with `self` too: `self` is at least as strong.
    pub const fn covers(self, other: Self) -> bool {
        COMPAT[self as usize] & !COMPAT[other as usize] == 0
    }

    /// A conversion that is always possible at once: to a strictly weaker mode.
    pub const fn is_down_to(self, to: Self) -> bool {
        self as u8 != to as u8 && self.covers(to)
    }

    /// CW↔PR: neither up nor down.
    pub const fn is_middle_to(self, to: Self) -> bool {
        !self.covers(to) && !to.covers(self)
    }

    /// A holder of this mode may change the value block.
    pub const fn writes_lvb(self) -> bool {
        matches!(self, Self::PW | Self::EX)
    }

    /// A holder of this mode knows the present value: nobody else can have changed it since its grant.
    pub const fn pins_lvb(self) -> bool {
        matches!(self, Self::CW | Self::PR | Self::PW | Self::EX)
    }
}

/// A set of modes, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModeSet(pub u8);

impl ModeSet {
    pub const ALL: Self = Self(0b11_1111);

    pub const fn contains(self, m: Mode) -> bool {
        self.0 & (1 << m as u8) != 0
    }

    pub const fn intersect(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Every mode of the set may stand beside `m`.
    pub const fn all_compatible_with(self, m: Mode) -> bool {
        self.0 & !COMPAT[m as usize] == 0
    }
}

/// What happens to the value block in a conversion with VALBLK.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LvbMove {
    /// Resource to caller.
    Read,
    /// Caller to resource.
    Write,
    None,
}

/// The conversion table: from (`None`: new lock) and to.
pub const fn lvb_move(from: Option<Mode>, to: Mode) -> LvbMove {
    match from {
        None => LvbMove::Read,
        Some(f) if f as u8 == to as u8 => {
            if f.writes_lvb() {
                LvbMove::Write
            } else {
                LvbMove::Read
            }
        }
        Some(f) if f.is_down_to(to) => {
            if f.writes_lvb() {
                LvbMove::Write
            } else {
                LvbMove::None
            }
        }
        Some(f) if f.is_middle_to(to) => {
            if matches!(f, Mode::CW) {
                LvbMove::Read
            } else {
                LvbMove::None
            }
        }
        Some(_) => LvbMove::Read,
    }
}

/// Conversions for which QUECVT is legal.
pub(crate) const fn quecvt_legal(from: Mode, to: Mode) -> bool {
    !matches!(to, Mode::NL)
        && from as u8 != to as u8
        && (from.is_middle_to(to) || to.is_down_to(from))
        && !matches!((from, to), (Mode::NL, Mode::NL))
}

/// Request flags, numeric values as in the Linux interface; the last three are ours.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Flags(pub u32);

impl Flags {
    pub const NONE: Self = Self(0);
    pub const NOQUEUE: Self = Self(0x1);
    pub const VALBLK: Self = Self(0x8);
    pub const QUECVT: Self = Self(0x10);
    pub const IVVALBLK: Self = Self(0x20);
    pub const CONVDEADLK: Self = Self(0x40);
    pub const NODLCKWT: Self = Self(0x100);
    pub const EXPEDITE: Self = Self(0x400);
    pub const NOQUEUEBAST: Self = Self(0x800);
    pub const HEADQUE: Self = Self(0x1000);
    pub const NOORDER: Self = Self(0x2000);
    pub const ALTPR: Self = Self(0x8000);
    pub const ALTCW: Self = Self(0x1_0000);
    pub const FORCEUNLOCK: Self = Self(0x2_0000);
    pub const TIMEOUT: Self = Self(0x4_0000);
    /// Passes ghosts and masks of nodes that are fenced but whose journals are not replayed.
    pub const RECOVERY: Self = Self(0x10_0000);
    /// The ghost of this lock goes when its node is fenced, before the gate opens.
    pub const RELEASE_AT_FENCE: Self = Self(0x20_0000);
    /// The holder wants no blocking callbacks.
    pub const NOBAST: Self = Self(0x40_0000);
    const KNOWN: u32 = 0x1
        | 0x8
        | 0x10
        | 0x20
        | 0x40
        | 0x100
        | 0x400
        | 0x800
        | 0x1000
        | 0x2000
        | 0x8000
        | 0x1_0000
        | 0x2_0000
        | 0x4_0000
        | 0x10_0000
        | 0x20_0000
        | 0x40_0000;

    pub const fn has(self, f: Self) -> bool {
        self.0 & f.0 != 0
    }

    pub const fn known(self) -> bool {
        self.0 & !Self::KNOWN == 0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, o: Self) -> Self {
        Self(self.0 | o.0)
    }
}

impl std::ops::BitOrAssign for Flags {
    fn bitor_assign(&mut self, o: Self) {
        self.0 |= o.0;
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum Status {
    Granted = 0,
    /// NOQUEUE could not be granted.
    Again = 1,
    /// Cancelled: a new request is gone, a conversion undone.
    Cancelled = 2,
    Unlocked = 3,
    /// Conversion deadlock; the lock keeps its old mode.
    Deadlock = 4,
    TimedOut = 5,
    /// Only between nodes: queued at the master; a grant follows.
    Queued = 6,
}

impl Status {
    pub fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            0 => Self::Granted,
            1 => Self::Again,
            2 => Self::Cancelled,
            3 => Self::Unlocked,
            4 => Self::Deadlock,
            5 => Self::TimedOut,
            6 => Self::Queued,
            _ => return None,
        })
    }
}

/// Status flags of a completion: DEMOTED 1, VALNOTVALID 2, ALTMODE 4.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SbFlags(pub u8);

impl SbFlags {
    pub const DEMOTED: u8 = 1;
    pub const VALNOTVALID: u8 = 2;
    pub const ALTMODE: u8 = 4;
}

/// Length of a value block.
pub const LVB_LEN: usize = 32;
pub type Lvb = [u8; LVB_LEN];

/// Names a lock of this node: slot in the low half, generation in the high half. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockId(pub u64);

impl LockId {
    pub(crate) const fn new(slot: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | slot as u64)
    }
    pub(crate) const fn slot(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
    pub(crate) const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl fmt::Debug for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// Term of a mastership: (view, counter). Rises whenever the master of a tree changes, because the view is part of it
/// even when the slice owner that hands it out knows nothing of earlier ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Term(pub u64);

/// Refusals that come back from the call itself; no completion follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    #[error("an operation on this lock is in progress")]
    Busy,
    #[error("no such lock")]
    NoLock,
    #[error("the lock space is being left or this node is no longer a member")]
    Gone,
    #[error("{0} locks are still held")]
    StillHeld(usize),
    #[error("view {got} does not follow view {have}")]
    ViewGap { have: u64, got: u64 },
}
