//! fio at the same load: its command line and what it says.
//!
//! Owns the flags. Each is there so that fio is not held back: registered file, huge pages under its
//! buffers, no checks, no second clock reading, no dropping of a page cache that the device may use.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::counted;
use crate::driver::Times;
use crate::load::{FioEngine, Load};

const HUGE_PAGE_BYTES: u32 = 2 << 20;

/// What a run of fio gives.
#[derive(Debug, Clone)]
pub struct Fio {
    /// Reads or writes a second.
    pub iops: f64,
    /// From before the submission to after the end (fio's `lat`).
    pub times: Times,
    /// The same for its fdatasyncs.
    pub flush_times: Option<Times>,
    /// CPU seconds a second, of its job with all its threads: io_uring's workers are among them. What
    /// fio itself reports leaves them out.
    pub cpu_share: f64,
    /// Bytes on huge pages, seen in the middle of the run.
    pub huge_bytes: Option<u64>,
}

/// Its version; an error that tells what to install where there is none.
pub fn version() -> Result<String> {
    let output = Command::new("fio").arg("--version").output();
    let output = output.context("fio cannot be started: `make deps` installs it (Debian's package fio)")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command line of a run, without the environment.
pub fn arguments(load: &Load, engine: FioEngine, image: &Path, times: (Duration, Duration)) -> Vec<String> {
    let (warm_up, window) = times;
    let block = load.block_bytes;
    // The third number is the size of a trim, of which there is none. It only spreads the buffers over
    // whole huge pages, which a few small ones would not fill.
    let stride = block.max(HUGE_PAGE_BYTES / u32::from(load.depth));
    let mut arguments: Vec<String> = [
        "--name=fio",
        "--output-format=json",
        "--time_based",
        "--group_reporting",
        "--disk_util=0",
        "--allow_file_create=0",
        "--norandommap",
        "--randrepeat=0",
        "--scramble_buffers=0",
        "--invalidate=0",
        "--fadvise_hint=0",
        "--disable_slat=1",
        "--disable_clat=1",
        "--lat_percentiles=1",
        "--percentile_list=50:99:99.9",
        "--iomem_align=2m",
    ]
    .map(String::from)
    .into();
    arguments.push(format!("--filename={}", image.display().to_string().replace(':', "\\:")));
    arguments.push(format!("--rw={}", load.pattern.fio()));
    arguments.push(format!("--bs={block},{block},{stride}"));
    arguments.push(format!("--iodepth={}", load.depth));
    arguments.push(format!("--direct={}", u8::from(load.begins_uncached())));
    arguments.push(format!("--ramp_time={}ms", warm_up.as_millis()));
    arguments.push(format!("--runtime={}ms", window.as_millis()));
    if load.pattern.writes() && load.stable_writes() {
        arguments.push("--sync=dsync".into());
    }
    if let Some(every) = load.flush_every() {
        arguments.push(format!("--fdatasync={every}"));
    }
    arguments.extend(engine_arguments(engine, load.depth));
    arguments
}

fn engine_arguments(engine: FioEngine, depth: u16) -> Vec<String> {
    let ring = ["--ioengine=io_uring", "--registerfiles=1"].map(String::from);
    match engine {
        FioEngine::Pvsync2 | FioEngine::Loop => vec!["--ioengine=pvsync2".into()],
        FioEngine::IoUring => ring.into(),
        FioEngine::IoUringFixed => [&ring[..], &["--fixedbufs=1".into()]].concat(),
        FioEngine::IoUringBatched => {
            let batch = [
                format!("--iodepth_batch_submit={depth}"),
                "--iodepth_batch_complete_min=1".into(),
                format!("--iodepth_batch_complete_max={depth}"),
            ];
            [&ring[..], &batch].concat()
        }
    }
}

/// Runs a load once.
pub fn run(load: &Load, engine: FioEngine, image: &Path, times: (Duration, Duration)) -> Result<Fio> {
    let arguments = arguments(load, engine, image, times);
    let mut child = Command::new("fio")
        .args(&arguments)
        // glibc then asks for huge pages under what malloc maps, as the VMM does for guest RAM.
        .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("fio cannot be started")?;
    let middle = watch(child.id(), times);
    let (mut json, mut complaint) = (String::new(), String::new());
    if let (Some(stdout), Some(stderr)) = (&mut child.stdout, &mut child.stderr) {
        stdout.read_to_string(&mut json)?;
        stderr.read_to_string(&mut complaint)?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "fio {} failed: {complaint}{json}", arguments.join(" "));
    // It may warn before it writes JSON.
    let json = json.find('{').map_or("", |at| &json[at..]);
    let report: Value = serde_json::from_str(json).context("fio's answer is no JSON")?;
    let direction = if load.pattern.writes() { "write" } else { "read" };
    let middle = middle.context("fio's job cannot be watched in /proc")?;
    parse(&report["jobs"][0], direction, &middle).with_context(|| format!("fio's answer is unusual: {json}"))
}

fn parse(job: &Value, direction: &str, middle: &Middle) -> Option<Fio> {
    let side = &job[direction];
    Some(Fio {
        iops: side["iops"].as_f64()?,
        times: times(&side["lat_ns"])?,
        flush_times: times(&job["sync"]["lat_ns"]),
        cpu_share: middle.cpu_share,
        huge_bytes: middle.huge_bytes,
    })
}

fn times(lat: &Value) -> Option<Times> {
    let at = |name: &str| lat["percentile"][name].as_f64().map(|ns| ns / 1e3);
    Some(Times {
        p50_us: at("50.000000")?,
        p99_us: at("99.000000")?,
        p999_us: at("99.900000")?,
        mean_us: lat["mean"].as_f64()? / 1e3,
    })
}

/// What is seen of fio's job while it runs.
struct Middle {
    cpu_share: f64,
    huge_bytes: Option<u64>,
}

/// Looks at fio's job twice, half a window apart, when it has begun for certain.
fn watch(fio: u32, (warm_up, window): (Duration, Duration)) -> Option<Middle> {
    let begin = Instant::now();
    while begin.elapsed() < warm_up + window && job_of(fio).is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let job = job_of(fio)?;
    std::thread::sleep(warm_up + window / 4);
    let (from, cpu_from) = (Instant::now(), counted::cpu_seconds_of(job).ok()?);
    std::thread::sleep(window / 2);
    let (to, cpu_to) = (Instant::now(), counted::cpu_seconds_of(job).ok()?);
    let cpu_share = (cpu_to - cpu_from) / (to - from).as_secs_f64();
    Some(Middle { cpu_share, huge_bytes: huge_bytes_of(job) })
}

/// fio's job is a child of fio, of whichever of its threads.
fn job_of(fio: u32) -> Option<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{fio}/task")).ok()?;
    let children = tasks.flatten().map(|task| std::fs::read_to_string(task.path().join("children")));
    children.flatten().find_map(|text| text.split_whitespace().next()?.parse().ok())
}

fn huge_bytes_of(process: i32) -> Option<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib << 10)
}
