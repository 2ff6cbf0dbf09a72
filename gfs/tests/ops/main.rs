//! Operations on mounted volumes, without FUSE: every test ends with a clean unmount and a volume without a fault.

mod basic;
mod crash;
mod damage;
mod every_write;
mod foreign;
mod full;
mod large;
mod model;
mod nodes;
mod random;
mod rig;
