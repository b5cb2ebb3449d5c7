//! `--observe` as a part of the machine: the port through which the guest is asked, and the observer.
//!
//! Owns the pipes behind that port, and the moments at which the observation begins and ends. What is
//! observed, and how it is written, is [`crate::observe`]'s.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::machine::Machine;
use super::{ObserveTarget, VmmError};
use crate::console::PortConfig;
use crate::console::stream::{Sink, Source};
use crate::files::{Inventory, output};
use crate::observe::guest::GuestEnd;
use crate::observe::sample::Sampler;
use crate::observe::{Observer, follow};

/// An observation of this machine.
pub struct Watch {
    path: PathBuf,
    observer: Observer,
}

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

impl Watch {
    /// Begins the observation; called before the guest runs.
    pub fn begin(target: &ObserveTarget, files: &Inventory, machine: &mut Machine) -> Result<Self, VmmError> {
        let path = target.path.clone();
        let refused = |source| VmmError::Observe { path: path.clone(), source };
        let opened = files.open_unchanged(&target.output())?;
        if !follow::lock_as_writer(&opened.file).map_err(refused)? {
            return Err(refused(io::Error::other("another minivmm writes to it")));
        }
        let file = output::emptied(opened).map_err(refused)?;
        let images = machine.disks.iter().map(|disk| Arc::clone(&disk.image));
        let sampler = Sampler::begin(images, machine.observed.take());
        let observer = Observer::start(sampler, file, target.interval).map_err(refused)?;
        Ok(Self { path, observer })
    }

    /// Ends the observation after a last sample.
    pub fn end(self) -> Result<(), VmmError> {
        let Self { path, observer } = self;
        observer.finish().map_err(|source| VmmError::Observe { path, source })
    }
}
