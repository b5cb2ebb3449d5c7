//! The port through which a guest is asked for its view of its caches (`--observe`).
//!
//! Owns the pipes behind that port. What is observed, and how it is written, is [`crate::observe`]'s.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use crate::console::PortConfig;
use crate::console::stream::{Sink, Source};
use crate::observe::guest::GuestEnd;

/// Makes the port, and our end of it.
pub fn port() -> io::Result<(PortConfig, GuestEnd)> {
    let (answers, to_us) = io::pipe()?;
    let (from_us, questions) = io::pipe()?;
    let port = PortConfig {
        name: "org.minivmm.observe",
        source: Some(Source::new(from_us)?),
        sink: Some(Sink::new(to_us)?),
        after_others: false,
    };
    let file = |fd: OwnedFd| File::from(fd);
    Ok((port, GuestEnd::new(file(questions.into()), file(answers.into()))))
}
