//! The steps of a run. A step runs once per repetition, and measures for several experiments if they do not
//! disturb each other.
//!
//! Owns the list of steps and what all of them share. The file of an experiment says what it needs of a step.

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
use super::figures::StepRecord;
use crate::measuring::{Host, image};
use crate::scratch_dir::ScratchDir;
use minivmm::disk::cache::CachePolicy;
use minivmm::disk::image::ImageProblem;
use minivmm::disk::{DiskConfig, Image};
use minivmm::files::output;

/// One step.
pub struct Step {
    /// Name of the step in the record.
    pub name: &'static str,
    /// True if the step boots a guest.
    pub boots: bool,
    /// Runs the step.
    pub run: fn(&StepContext<'_>, &mut StepRecord) -> Result<()>,
}

/// All steps, in the order in which they run.
static STEPS: [Step; 7] = [
    Step { name: "dirty", boots: false, run: host::dirty },
    Step { name: "mechanisms", boots: false, run: host::mechanisms },
    Step { name: "reads", boots: true, run: reads::reads },
    Step { name: "writes", boots: true, run: writes::writes },
    Step { name: "stable", boots: true, run: stable::stable },
    Step { name: "crash", boots: true, run: crash::crash },
    Step { name: "pressure", boots: true, run: pressure::pressure },
];

/// Returns the steps that these experiments need.
pub fn of(experiments: &[&Experiment]) -> Vec<&'static Step> {
    let is_needed = |step: &&Step| experiments.iter().any(|experiment| experiment.steps.contains(&step.name));
    STEPS.iter().filter(is_needed).collect()
}

/// What a step works with.
#[derive(Debug)]
pub struct StepContext<'a> {
    /// Directory that receives the results.
    pub out: PathBuf,
    /// Directory that holds the images.
    pub images: PathBuf,
    /// True for smaller jobs.
    pub quick: bool,
    /// Ids of the experiments that are wanted.
    experiments: Vec<String>,
    /// Why the images cannot be used in dontcache, if they cannot.
    no_dontcache: String,
    /// Set when the run is interrupted.
    pub stop: &'a AtomicBool,
}

impl<'a> StepContext<'a> {
    /// Prepares the directory of a run.
    pub fn new(
        out: &Path,
        quick: bool,
        experiments: Vec<String>,
        host: &Host,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        let images = out.join("images");
        fs::create_dir_all(&images).with_context(|| format!("cannot make {}", images.display()))?;
        let no_dontcache =
            format!("Linux {} has no RWF_DONTCACHE for files on {}", host.kernel, host.place.file_system);
        Ok(Self { out: out.to_owned(), images, quick, experiments, no_dontcache, stop })
    }

    /// Returns `true` if this experiment is wanted.
    pub fn wants(&self, id: &str) -> bool {
        self.experiments.iter().any(|wanted| wanted == id)
    }

    /// Returns those of `modes` in which the images can be used here. Stores in `record` why the others cannot.
    pub fn modes_here(
        &self,
        modes: impl IntoIterator<Item = &'static str>,
        record: &mut StepRecord,
    ) -> Result<Vec<&'static str>> {
        let place = ScratchDir::new_in(&self.images, "mode")?;
        let path = place.path().join("probe.img");
        output::make_anew(&path)?.set_len(4096)?;
        let mut here = Vec::new();
        for mode in modes {
            let cache = CachePolicy::by_name(mode).with_context(|| format!("there is no mode {mode}"))?;
            match Image::look(&DiskConfig { cache, ..DiskConfig::new(&path) }) {
                Ok(_) => here.push(mode),
                Err(error) if matches!(error.reason, ImageProblem::NoDontcache { .. }) => {
                    record.unavailable.insert(mode.to_owned(), self.no_dontcache.clone());
                }
                Err(error) => return Err(error).with_context(|| format!("cache={mode} cannot be tried")),
            }
        }
        Ok(here)
    }

    /// Returns the first value in a quick run and the second in a full one.
    pub fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Prepares an image of this size. All of it is written, so it has no holes, and none of it is in the
    /// host's page cache.
    pub fn image(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.images.join(format!("{name}.img"));
        image::ready(&path, bytes, &mut |_| (), self.stop)?;
        image::settle(&path, minivmm::observe::control::HostCache::Drop)?;
        Ok(path)
    }
}

/// Opens a file for reading and writing.
pub fn open(path: &Path) -> Result<File> {
    let opened = File::options().read(true).write(true).open(path);
    opened.with_context(|| format!("cannot open {}", path.display()))
}
