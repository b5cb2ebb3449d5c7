//! The steps of a run: what is done once a repetition, for several experiments together where they do not
//! disturb each other.
//!
//! Owns the list, and what all steps have at hand. What each experiment wants of a step is in its own file.

pub mod crash;
pub mod host;
pub mod pressure;
pub mod reads;
pub mod stable;
pub mod writes;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};

use super::experiment::Experiment;
use super::figures::Record;
use crate::lab::image;

/// One of them.
pub struct Step {
    /// Its name in the record.
    pub name: &'static str,
    /// Whether it boots guests.
    pub boots: bool,
    /// Does it.
    pub run: fn(&Bench<'_>, &mut Record) -> Result<()>,
}

/// All, in their order.
static STEPS: [Step; 7] = [
    Step { name: "dirty", boots: false, run: host::dirty },
    Step { name: "mechanisms", boots: false, run: host::mechanisms },
    Step { name: "reads", boots: true, run: reads::reads },
    Step { name: "writes", boots: true, run: writes::writes },
    Step { name: "stable", boots: true, run: stable::stable },
    Step { name: "crash", boots: true, run: crash::crash },
    Step { name: "pressure", boots: true, run: pressure::pressure },
];

/// Those that these experiments need.
pub fn of(experiments: &[&Experiment]) -> Vec<&'static Step> {
    let is_needed = |step: &&Step| experiments.iter().any(|experiment| experiment.steps.contains(&step.name));
    STEPS.iter().filter(is_needed).collect()
}

/// What a step works with.
#[derive(Debug)]
pub struct Bench<'a> {
    /// Where everything goes.
    pub out: PathBuf,
    /// Where images lie.
    pub images: PathBuf,
    /// Whether jobs are to be small.
    pub quick: bool,
    /// The experiments that are wanted.
    experiments: Vec<String>,
    /// All is to end.
    pub stop: &'a AtomicBool,
}

impl<'a> Bench<'a> {
    /// In the directory of a run.
    pub fn new(out: &Path, quick: bool, experiments: Vec<String>, stop: &'a AtomicBool) -> Result<Self> {
        let images = out.join("images");
        fs::create_dir_all(&images).with_context(|| format!("cannot make {}", images.display()))?;
        Ok(Self { out: out.to_owned(), images, quick, experiments, stop })
    }

    /// Whether the experiment is wanted.
    pub fn wants(&self, id: &str) -> bool {
        self.experiments.iter().any(|wanted| wanted == id)
    }

    /// One number in a quick run, another in a full one.
    pub fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// An image of that size, all of it written: without holes, and with none of it in the host's cache.
    pub fn image(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.images.join(format!("{name}.img"));
        image::ready(&path, bytes, &mut |_| (), self.stop)?;
        image::settle(&path, minivmm::disk::options::HostCache::Drop)?;
        Ok(path)
    }
}

/// Opens for reading and writing.
pub fn open(path: &Path) -> Result<File> {
    let opened = File::options().read(true).write(true).open(path);
    opened.with_context(|| format!("cannot open {}", path.display()))
}
