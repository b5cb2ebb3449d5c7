//! The runs: one boot a competitor, mode and round, in which the guest does all jobs; and the boots to
//! init.
//!
//! Owns their order and the state of the host's page cache before each job.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use minivmm_testkit::cpio;

use crate::fio::{self, Figures, Times};
use crate::image::{BenchImage, Resident};
use crate::memory::{self, Beyond};
use crate::plan::{Booter, Competitor, FILE_MIB, Job, Kind, Mode, Target};
use crate::results::{Boots, Contest, Loaded};
use crate::session::Session;
use crate::vmm::{self, Disks, Guest, MEMORY_MIB, Programs};

/// Bytes for a job's answer on the disk for results.
const JOB_BYTES: usize = 64 << 10;
const JOB_SCRIPT: &str = include_str!("job.sh");
/// The first process of a guest that only boots: it marks its moment and waits for its end.
const MARK: &str = "echo '@ init'\nread -r _";
const PAGE_BYTES: u64 = 4096;

/// Parameters of a guest that runs jobs.
const JOB_PARAMETERS: &str = "console=ttyS0 reboot=k panic=-1 quiet";
/// Parameters of one that boots to init: what minivmm gives to a guest with a COMMAND, for all alike.
const BOOT_PARAMETERS: &str = "console=ttyS0 reboot=k panic=-1 quiet pci=off tsc=reliable no_timer_check \
    i8042.noaux i8042.nokbd 8250.nr_uarts=1 cryptomgr.notests random.trust_cpu=on \
    rcupdate.rcu_expedited=1 rdinit=/job/run";

/// What is run, with what, where.
pub struct Bench {
    /// The VMMs.
    pub programs: Programs,
    /// vmlinux.
    pub kernel: PathBuf,
    /// The test guest's initrd.cpio.
    pub initrd: PathBuf,
    /// Where files are made.
    pub dir: PathBuf,
    /// The image's size.
    pub image_bytes: u64,
    /// How long a job runs.
    pub times: Times,
    /// The longest that a guest may take for one step.
    pub step_limit: Duration,
}

impl Bench {
    /// All rounds of a mode. What fails is told in the entries concerned; the others go on.
    pub fn jobs(
        &self,
        mode: &Mode,
        who: &[Competitor],
        jobs: &[Job],
        rounds: u32,
    ) -> (Vec<Contest>, Vec<Loaded>) {
        let jobs: Vec<Job> = jobs.iter().filter(|job| job.wants(mode)).copied().collect();
        let mut contests: Vec<Contest> = jobs.iter().map(|job| Contest::new(job, mode, who)).collect();
        let loaded = |who: &Competitor| Loaded { who: who.name, mode: mode.name, beyond_guest: Vec::new() };
        let mut loaded: Vec<Loaded> = who.iter().map(loaded).collect();
        for round in 0..rounds {
            for at in order(who.len(), round) {
                eprintln!("[{} round {} of {rounds}] {}", mode.name, round + 1, who[at].name);
                let mut figures = Vec::new();
                let outcome = self.turn(mode, &who[at], &jobs, &mut figures);
                let failure = match outcome {
                    Ok(beyond) => {
                        loaded[at].beyond_guest.extend(beyond);
                        None
                    }
                    Err(error) => Some(format!("{error:#}")),
                };
                if let Some(why) = &failure {
                    eprintln!("  {}: {why}", who[at].name);
                }
                let mut figures = figures.into_iter();
                for contest in &mut contests {
                    let entry = &mut contest.entries[at];
                    let figures = figures.next();
                    if figures.is_none() {
                        entry.not_measured.extend(failure.clone());
                    }
                    entry.rounds.push(figures);
                }
            }
        }
        (contests, loaded)
    }

    /// The image, wholly written: what a guest has discarded is written again.
    pub fn image(&self) -> Result<BenchImage> {
        BenchImage::ready(self.dir.join("guest.img"), self.image_bytes)
    }

    /// One competitor's run of all jobs; what it has done before a failure is in `figures`.
    fn turn(
        &self,
        mode: &Mode,
        who: &Competitor,
        jobs: &[Job],
        figures: &mut Vec<Figures>,
    ) -> Result<Option<Beyond>> {
        if let Some(why) = who.refuses(mode) {
            anyhow::bail!("{why}");
        }
        let image = self.image()?;
        if who.kind == Kind::HostFio {
            for job in jobs {
                let resident_pages = settle(&image, mode)?;
                let run = fio::on_host(job, mode, &image.path, self.times)?;
                figures.push(Figures { resident_pages, ..run });
            }
            return Ok(None);
        }
        self.in_guest(mode, who, jobs, &image, figures).map(Some)
    }

    fn in_guest(
        &self,
        mode: &Mode,
        who: &Competitor,
        jobs: &[Job],
        image: &BenchImage,
        figures: &mut Vec<Figures>,
    ) -> Result<Beyond> {
        let results = self.dir.join("results.img");
        File::create(&results)?.set_len((jobs.len() * JOB_BYTES) as u64)?;
        let initrd = self.with_job("jobs.cpio", &self.script(jobs))?;
        let guest = Guest { kernel: &self.kernel, initrd: &initrd, parameters: JOB_PARAMETERS };
        let disks = Disks { image: &image.path, mode, results: &results };
        let command = vmm::for_jobs(&self.programs, who.kind, &guest, &disks)?;
        let mut session = Session::start(command, self.dir.join("vmm.log"), self.step_limit)?;
        let mut states = Vec::new();
        let done = self.serve(&mut session, mode, jobs, image, &mut states);
        // What was done before a failure counts: the guest has synced it.
        let ended = done.and_then(|beyond| {
            let status = session.end()?;
            ensure!(status.success(), "the VMM has ended with {status}");
            Ok(beyond)
        });
        let results = File::open(&results)?;
        for (slot, resident_pages) in states.into_iter().enumerate() {
            let mut answer = vec![0; JOB_BYTES];
            results.read_exact_at(&mut answer, (slot * JOB_BYTES) as u64)?;
            answer.retain(|&byte| byte != 0);
            let run = Figures::parse(&String::from_utf8_lossy(&answer))?;
            figures.push(Figures { resident_pages, ..run });
        }
        ended
    }

    /// Answers the guest: `states` has an entry for each job that it has done.
    fn serve(
        &self,
        session: &mut Session,
        mode: &Mode,
        jobs: &[Job],
        image: &BenchImage,
        states: &mut Vec<Option<u64>>,
    ) -> Result<Beyond> {
        for job in jobs {
            session.expect(&format!("ready {}", job.name))?;
            let state = settle(image, mode)?;
            session.answer()?;
            session.expect(&format!("done {}", job.name))?;
            states.push(state);
        }
        session.expect("finished")?;
        let beyond = memory::beyond(session.process(), MEMORY_MIB << 20)?;
        session.answer()?;
        Ok(beyond)
    }

    /// What the guest does, in the shell.
    fn script(&self, jobs: &[Job]) -> String {
        let mut script = format!("JOB_BYTES={JOB_BYTES}\n{JOB_SCRIPT}");
        let common = self.times.options().join(" ");
        let mut on_disk = true;
        for (slot, job) in jobs.iter().enumerate() {
            if on_disk && job.target == Target::Ext4 {
                script += &format!("make_ext4 {FILE_MIB}\n");
                on_disk = false;
            }
            script += &format!("job {slot} {} {common} {}\n", job.name, job.options.join(" "));
        }
        script + "wait_for_host finished"
    }

    /// Interleaved boots to init.
    pub fn boots(&self, booters: &[Booter], rounds: u32) -> Result<Vec<Boots>> {
        let initrd = self.with_job("boot.cpio", MARK)?;
        let guest = Guest { kernel: &self.kernel, initrd: &initrd, parameters: BOOT_PARAMETERS };
        let mut boots: Vec<Boots> = booters.iter().map(Boots::new).collect();
        // The first boot of all reads the kernel from the disk; it does not count.
        if let Some(first) = booters.first() {
            drop(self.boot(first, &guest));
        }
        for round in 0..rounds {
            for at in order(booters.len(), round) {
                eprintln!("[boot {} of {rounds}] {}", round + 1, booters[at].name);
                match self.boot(&booters[at], &guest) {
                    Ok((seconds, beyond)) => {
                        boots[at].seconds_to_init.push(seconds);
                        boots[at].beyond_guest.push(beyond);
                    }
                    Err(error) => {
                        eprintln!("  {}: {error:#}", booters[at].name);
                        boots[at].not_measured.push(format!("{error:#}"));
                    }
                }
            }
        }
        Ok(boots)
    }

    fn boot(&self, booter: &Booter, guest: &Guest<'_>) -> Result<(f64, Beyond)> {
        let command = vmm::for_boot(&self.programs, booter.machine, guest)?;
        let mut session = Session::start(command, self.dir.join("vmm.log"), self.step_limit)?;
        let to_init = session.expect("init")?;
        let beyond = memory::beyond(session.process(), MEMORY_MIB << 20)?;
        Ok((to_init.as_secs_f64(), beyond))
    }

    /// The initramfs with this script as its job.
    fn with_job(&self, name: &str, script: &str) -> Result<PathBuf> {
        let read =
            |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut archive = read(&self.initrd)?;
        archive.extend(cpio::job(script));
        let path = self.dir.join(name);
        std::fs::write(&path, archive).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// Each round in the reverse order of the last.
fn order(len: usize, round: u32) -> Vec<usize> {
    if round.is_multiple_of(2) { (0..len).collect() } else { (0..len).rev().collect() }
}

/// Brings the host's page cache into the mode's state, and looks whether it is so.
fn settle(image: &BenchImage, mode: &Mode) -> Result<Option<u64>> {
    let wanted = mode.resident();
    let resident = image.settle(wanted)?;
    let pages = image.bytes / PAGE_BYTES;
    let right = match wanted {
        Resident::None => 0..=0,
        Resident::All => pages..=pages,
    };
    if let Some(resident) = resident {
        ensure!(
            right.contains(&resident),
            "{resident} of {pages} pages are in the host's page cache, which is not the state wanted"
        );
    }
    Ok(resident)
}
