//! How a test says that it cannot run here: aloud, in one list at the end of `make test`, and as a failure where
//! the machine is said to have what it lacks.

use std::io::Write;

/// Says that this test, or a part of it, is skipped for `reason`, because `need` is not here: a word such as `kvm`,
/// `root`, `kernel`, `odirect`, `strace`. A need that MINIVMM_REQUIRE names (words with commas between) is a failure.
/// The list goes to the file that MINIVMM_SKIPS names.
pub fn skip(need: &str, reason: &str) {
    let thread = std::thread::current();
    let suite = std::env::args().next().unwrap_or_default();
    let suite = suite.rsplit('/').next().and_then(|name| name.rsplit_once('-')).map_or("", |it| it.0);
    let line = format!("skipped: {suite} {}: {reason} ({need})\n", thread.name().unwrap_or_default());
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(list) = std::env::var_os("MINIVMM_SKIPS") {
        let opened = std::fs::OpenOptions::new().append(true).create(true).open(list);
        // Another user's list, say.
        let _ = opened.and_then(|mut list| list.write_all(line.as_bytes()));
    }
    let required = std::env::var("MINIVMM_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|word| word == need), "MINIVMM_REQUIRE has {need}: {reason}");
}
