//! Whole clusters as processes on this machine, judged by what reached the LUN: every write is logged below the permit guard
//! (`lun::logged`), with its process and the boot clock.

mod recovery;
mod silence;

use cairn_tests::cluster::{Cluster, POLL, boottime, can_run, signal};
