//! fio's options that every job has, in the guest and on the host, and what fio says.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::plan::{FILE_MIB, Job, Mode, Target};

/// How long a job runs.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Not measured, in milliseconds.
    pub warm_up_ms: u64,
    /// Measured, in milliseconds.
    pub window_ms: u64,
}

impl Times {
    /// The options of every job.
    pub fn options(&self) -> Vec<String> {
        let mut options =
            vec![format!("--ramp_time={}ms", self.warm_up_ms), format!("--runtime={}ms", self.window_ms)];
        options.extend(
            [
                "--time_based",
                "--norandommap",
                "--randrepeat=0",
                "--disable_slat=1",
                "--disable_clat=1",
                "--lat_percentiles=1",
                "--percentile_list=50:99:99.9",
                "--allow_file_create=0",
                // It must not drop a page cache whose state was made for the job.
                "--invalidate=0",
                "--fadvise_hint=0",
            ]
            .map(String::from),
        );
        options
    }
}

/// Of one kind of request, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    /// Half are faster.
    pub p50_us: f64,
    /// One in a hundred is slower.
    pub p99_us: f64,
    /// One in a thousand is slower.
    pub p999_us: f64,
    /// All of them.
    pub mean_us: f64,
}

/// What fio says of a job.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Reads and writes a second. Syncs do not count.
    pub iops: f64,
    /// MiB a second.
    pub mib_s: f64,
    /// Of reads.
    pub read: Option<Latency>,
    /// Of writes. With fdatasync or fsync after each, without it.
    pub write: Option<Latency>,
    /// Of fdatasync or fsync.
    pub sync: Option<Latency>,
    /// Pages of the image in the host's page cache when the job began.
    pub resident_pages: Option<u64>,
}

impl Figures {
    /// From fio's JSON.
    pub fn parse(text: &str) -> Result<Self> {
        // It may warn before it writes JSON.
        let json = text.find('{').map_or("", |at| &text[at..]);
        let report: Value = serde_json::from_str(json).context("fio's answer is no JSON")?;
        let job = &report["jobs"][0];
        ensure!(job["error"] == 0, "fio has met error {}", job["error"]);
        let sum = |name: &str| {
            Some(job["read"][name].as_f64()? + job["write"][name].as_f64()?).filter(|&sum| sum > 0.0)
        };
        let rates = sum("iops").zip(sum("bw_bytes"));
        let (iops, bytes_s) = rates.with_context(|| format!("fio tells no rate: {json}"))?;
        Ok(Self {
            iops,
            mib_s: bytes_s / f64::from(1 << 20),
            read: latency(&job["read"]["lat_ns"]),
            write: latency(&job["write"]["lat_ns"]),
            sync: latency(&job["sync"]["lat_ns"]),
            resident_pages: None,
        })
    }

    /// Of the requests that the job is about: writes where there are any but in a mixed one, which is
    /// mostly reads.
    pub fn main(&self) -> Option<Latency> {
        self.read.or(self.write)
    }
}

/// fio leaves out the percentiles of what has not happened.
fn latency(value: &Value) -> Option<Latency> {
    let at = |name: &str| value["percentile"][name].as_f64().map(|ns| ns / 1e3);
    Some(Latency {
        p50_us: at("50.000000")?,
        p99_us: at("99.000000")?,
        p999_us: at("99.900000")?,
        mean_us: value["mean"].as_f64()? / 1e3,
    })
}

/// A job on the host, on the image itself.
pub fn on_host(job: &Job, mode: &Mode, image: &Path, times: Times) -> Result<Figures> {
    let mut command = Command::new("fio");
    command.args(["--name=job", "--output-format=json"]);
    command.arg(format!("--filename={}", image.display().to_string().replace(':', "\\:")));
    command.args(times.options()).args(job.on_host(mode));
    if job.target == Target::Ext4 {
        command.arg(format!("--size={FILE_MIB}M"));
    }
    let output = command.stdin(Stdio::null()).output().context("fio cannot be started")?;
    let answer = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "fio has failed: {}{answer}", String::from_utf8_lossy(&output.stderr));
    Figures::parse(&answer)
}
