//! What only tests need: the program under test ([`program`]), judges from outside the project ([`oracle`]).

pub mod oracle;
pub mod program;
