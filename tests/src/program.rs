//! The program under test.

use std::path::{Path, PathBuf};

/// `cairn`, beside the calling test's own program. Panics when it has not been built.
pub fn cairn() -> PathBuf {
    let own = std::env::current_exe().expect("own path");
    let dir = own.parent().and_then(Path::parent).expect("target/<profile>/deps");
    let program = dir.join("cairn");
    assert!(program.exists(), "{} is missing: cargo build -p cairn-tools first", program.display());
    program
}
