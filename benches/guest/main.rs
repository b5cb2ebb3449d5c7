//! What a guest sees: fio in the test guest under minivmm and QEMU, with the same kernel, initramfs and
//! image, in turn, and fio on the host beside them; boots to init; memory beyond the guest's
//! (benches/README.md).
//!
//! Owns the arguments and the report. It never fails because something is slow: a figure is reported,
//! not tested.

#[path = "../common/image.rs"]
#[allow(clippy::cast_possible_truncation, reason = "a count of extents")]
mod image;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/markdown.rs"]
mod markdown;
#[path = "../common/median.rs"]
mod median;
#[path = "../common/random.rs"]
#[allow(dead_code, reason = "the device's benchmark needs more of it")]
mod random;

mod fio;
mod memory;
mod outside;
mod plan;
mod report;
mod results;
mod run;
mod session;
mod vmm;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;

use fio::Times;
use machine::Machine;
use plan::{BOOTERS, Booter, COMPETITORS, Competitor, JOBS, Job, MODES, Mode};
use results::{Boots, Contest, Loaded};
use run::Bench;
use vmm::{MEMORY_MIB, Programs, Qemu};

/// Measures fio in the test guest under minivmm and QEMU, in turn, and boots to init.
#[derive(Parser, Debug, Serialize)]
#[command(name = "cargo bench --bench guest --")]
struct Arguments {
    /// Rounds of each mode; in each round every competitor boots once, next round in reverse.
    #[arg(long, default_value = "5", default_value_if("quick", "true", "1"))]
    rounds: u32,
    /// Boots to init of each VMM.
    #[arg(long, default_value = "11", default_value_if("quick", "true", "2"))]
    boots: u32,
    /// Seconds that are measured of each job.
    #[arg(long, default_value = "2", default_value_if("quick", "true", "0.3"))]
    seconds: f64,
    /// Seconds before that.
    #[arg(long, default_value_t = 0.3)]
    warm_up: f64,
    /// Only jobs whose name contains one of these words; `boot`: the boots.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only those whose name begins with one of these words (minivmm-pci, qemu-microvm, host, ...).
    #[arg(long, value_delimiter = ',')]
    who: Vec<String>,
    /// Only these cache modes.
    #[arg(long, value_delimiter = ',')]
    modes: Vec<String>,
    /// One round, two boots, a third of a second: whether it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// Names jobs, competitors and modes, and runs nothing.
    #[arg(long)]
    list: bool,
    /// The image's size [default: 1024, or 256 in the emulated host].
    #[arg(long)]
    image_mib: Option<u64>,
    /// The directory of the image, which must be on a file system with O_DIRECT.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// Where the JSON goes [default: guest.json in that directory].
    #[arg(long)]
    json: Option<PathBuf>,
    /// minivmm's binary.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/release/minivmm"))]
    minivmm: PathBuf,
    /// The directory with vmlinux and initrd.cpio.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/guest-images/build/6.12"))]
    guest: PathBuf,
    /// `installed`, `none`, or a directory that guest-images/pack-qemu has made.
    #[arg(long, default_value = "installed")]
    qemu: String,
    /// This is the emulated host, on this machine.
    #[arg(long, hide = true)]
    emulated_on: Option<String>,
    /// The commit, where git cannot tell.
    #[arg(long, hide = true)]
    commit: Option<String>,
    /// Said by cargo.
    #[arg(long, hide = true)]
    #[serde(skip)]
    bench: bool,
}

/// The whole report as JSON (benches/README.md has the fields).
#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    machine: &'a Machine,
    emulated_on: Option<&'a str>,
    load_at_end: String,
    vmms: &'a [String],
    arguments: &'a Arguments,
    image_bytes: u64,
    image_extents: Option<u64>,
    guest_memory_bytes: u64,
    contests: &'a [Contest],
    memory_after_jobs: &'a [Loaded],
    boots: &'a [Boots],
    boot_over_microvm: Option<f64>,
}

/// Of [`Report`]: it changes when a field goes or changes its meaning.
const REPORT_VERSION: u32 = 1;
const IMAGE_MIB: u64 = 1024;
/// An emulated host's disk is slow to fill, and its memory small.
const IMAGE_MIB_EMULATED: u64 = 256;
/// A boot in an emulated host on a busy machine takes up to a minute.
const STEP_LIMIT: Duration = Duration::from_secs(240);

/// What is chosen of the tables.
struct Choice {
    competitors: Vec<Competitor>,
    modes: Vec<Mode>,
    jobs: Vec<Job>,
    booters: Vec<Booter>,
}

impl Choice {
    fn new(arguments: &Arguments) -> Result<Self> {
        let begins = |name: &str| {
            arguments.who.is_empty() || arguments.who.iter().any(|word| name.starts_with(word.as_str()))
        };
        // A competitor of the jobs names its VMM's boots too.
        let boots = |booter: &&Booter| {
            begins(booter.name)
                || arguments.who.iter().any(|who| booter.machine.is_none() && who.starts_with("minivmm"))
        };
        let named = |name: &str| {
            arguments.only.is_empty() || arguments.only.iter().any(|word| name.contains(word.as_str()))
        };
        let known =
            |mode: &&Mode| arguments.modes.is_empty() || arguments.modes.iter().any(|m| m == mode.name);
        let boot = arguments.only.is_empty() || arguments.only.iter().any(|word| word == "boot");
        let choice = Self {
            competitors: COMPETITORS.into_iter().filter(|who| begins(who.name)).collect(),
            modes: MODES.iter().filter(known).copied().collect(),
            jobs: JOBS.into_iter().filter(|job| named(job.name)).collect(),
            booters: BOOTERS.iter().filter(boots).filter(|_| boot).copied().collect(),
        };
        let some = !choice.jobs.is_empty() && !choice.competitors.is_empty() && !choice.modes.is_empty();
        ensure!(some || !choice.booters.is_empty(), "nothing is chosen; --list names what there is");
        Ok(choice)
    }

    fn list(&self) {
        let line = |title: &str, names: Vec<&str>| println!("{title}: {}", names.join(" "));
        line("jobs", self.jobs.iter().map(|job| job.name).collect());
        line("competitors", self.competitors.iter().map(|who| who.name).collect());
        line("modes", self.modes.iter().map(|mode| mode.name).collect());
        line("boots", self.booters.iter().map(|booter| booter.name).collect());
    }

    fn wants_qemu(&self) -> bool {
        let boots = self.booters.iter().any(|booter| booter.machine.is_some());
        boots || !self.jobs.is_empty() && self.competitors.iter().any(Competitor::is_qemu)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let choice = Choice::new(&arguments)?;
    if arguments.list {
        choice.list();
        return Ok(());
    }
    let json = arguments.json.clone().unwrap_or_else(|| arguments.dir.join("guest.json"));
    if arguments.emulated_on.is_none() {
        let (place, emulated) = outside::which_host()?;
        println!("Guests run {place}.\n");
        if emulated {
            let qemu = arguments.qemu != "none" && choice.wants_qemu();
            let (minivmm, dir) = (&arguments.minivmm, &arguments.dir);
            let arguments = for_inside(&arguments);
            return outside::run(&outside::Inside { minivmm, dir, qemu, arguments, json: &json });
        }
    }
    measure(&arguments, &choice, &json)
}

/// The arguments again, for the harness in the emulated host.
fn for_inside(arguments: &Arguments) -> Vec<String> {
    let commit = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let commit = commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let mut inside = vec![
        format!("--rounds={}", arguments.rounds),
        format!("--boots={}", arguments.boots),
        format!("--seconds={}", arguments.seconds),
        format!("--warm-up={}", arguments.warm_up),
        format!("--image-mib={}", arguments.image_mib.unwrap_or(IMAGE_MIB_EMULATED)),
        format!("--commit={}", commit.unwrap_or_default()),
    ];
    for (name, words) in [("only", &arguments.only), ("who", &arguments.who), ("modes", &arguments.modes)] {
        if !words.is_empty() {
            inside.push(format!("--{name}={}", words.join(",")));
        }
    }
    inside
}

fn measure(arguments: &Arguments, choice: &Choice, json: &Path) -> Result<()> {
    std::fs::create_dir_all(&arguments.dir)?;
    let bench = bench(arguments)?;
    let mut machine = Machine::look(&arguments.dir, fio_version()?);
    machine.commit = arguments.commit.clone().unwrap_or(machine.commit);
    let vmms = bench.programs.versions()?;
    head(arguments, &machine, &vmms, &bench);

    let boots = bench.boots(&choice.booters, arguments.boots)?;
    let (mut contests, mut loaded) = (Vec::new(), Vec::new());
    let mut image_extents = None;
    if !choice.jobs.is_empty() {
        image_extents = Some(bench.image()?.extents);
        for mode in &choice.modes {
            let (more, memory) = bench.jobs(mode, &choice.competitors, &choice.jobs, arguments.rounds);
            contests.extend(more);
            loaded.extend(memory);
        }
    }
    if !contests.is_empty() {
        println!(
            "{}\n{}\n{}",
            report::contests(&contests),
            report::summary(&contests),
            report::loaded(&loaded)
        );
    }
    if !boots.is_empty() {
        println!("{}", report::boots(&boots));
    }
    println!("{}", report::gaps(&contests, &boots));
    let report = Report {
        version: REPORT_VERSION,
        machine: &machine,
        emulated_on: arguments.emulated_on.as_deref(),
        load_at_end: machine::load(),
        vmms: &vmms,
        arguments,
        image_bytes: bench.image_bytes,
        image_extents,
        guest_memory_bytes: MEMORY_MIB << 20,
        contests: &contests,
        memory_after_jobs: &loaded,
        boot_over_microvm: results::boot_ratio(&boots).map(|(ratio, _)| ratio),
        boots: &boots,
    };
    std::fs::write(json, serde_json::to_string_pretty(&report)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    if arguments.emulated_on.is_none() {
        println!("JSON: {}", json.display());
    }
    Ok(())
}

fn bench(arguments: &Arguments) -> Result<Bench> {
    let qemu = match arguments.qemu.as_str() {
        "none" => None,
        "installed" => Qemu::installed(),
        pack => Qemu::packed(Path::new(pack)),
    };
    let ms = |seconds: f64| Duration::from_secs_f64(seconds).as_millis().try_into();
    Ok(Bench {
        programs: Programs { minivmm: arguments.minivmm.clone(), qemu },
        kernel: arguments.guest.join("vmlinux"),
        initrd: arguments.guest.join("initrd.cpio"),
        dir: arguments.dir.clone(),
        image_bytes: arguments.image_mib.unwrap_or(IMAGE_MIB) << 20,
        times: Times { warm_up_ms: ms(arguments.warm_up)?, window_ms: ms(arguments.seconds)? },
        step_limit: STEP_LIMIT,
    })
}

fn fio_version() -> Result<String> {
    let output = Command::new("fio").arg("--version").output();
    let output = output.context("fio cannot be started: `make deps` installs it (Debian's package fio)")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn head(arguments: &Arguments, machine: &Machine, vmms: &[String], bench: &Bench) {
    println!("{}; {}\n", machine.describe(), vmms.join("; "));
    if let Some(around) = &arguments.emulated_on {
        println!("An emulated host on {around}.\n\n{}\n", report::EMULATED);
    }
    println!(
        "{} rounds of {} s a job, {} boots, interleaved; guest of 1 CPU and {MEMORY_MIB} MiB; image of {} MiB, \
         wholly written; the host's page cache brought into the state named before each job\n",
        arguments.rounds,
        arguments.seconds,
        arguments.boots,
        bench.image_bytes >> 20
    );
}
