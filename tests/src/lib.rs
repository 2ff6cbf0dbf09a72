//! What only tests need: the program under test ([`program`]), clusters of it ([`cluster`]), the load of the chaos run and its judgement
//! ([`load`]), judges from outside the project ([`oracle`]).

pub mod cluster;
pub mod load;
pub mod oracle;
pub mod program;
