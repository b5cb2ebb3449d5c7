//! fio on the host at the same load, as an anchor: what the disk gives without any VM.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::report::Figures;
use crate::{Load, Place};

/// Its version, or that there is none.
pub fn version() -> String {
    let output = Command::new("fio").arg("--version").output();
    output.map_or("no fio".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// One run. In memory a plain pread or pwrite is the fastest that there is; at depth 1 with FLUSHes too.
pub fn run(load: &Load, place: &Place<'_>, ms: u32) -> Result<Figures> {
    let rw = match load.pattern {
        "seqread" => "read",
        "seqwrite" => "write",
        "mixed" => "randrw",
        "writeflush" => "randwrite",
        same => same,
    };
    let mut command = Command::new("fio");
    command
        .args(["--name=fio", "--output-format=json", "--time_based", "--group_reporting", "--disk_util=0"])
        .args(["--allow_file_create=0", "--norandommap", "--randrepeat=0", "--scramble_buffers=0"])
        .args(["--invalidate=0", "--fadvise_hint=0", "--disable_slat=1", "--disable_clat=1"])
        .args(["--lat_percentiles=1", "--percentile_list=50:99:99.9", "--iomem_align=2m", "--rwmixread=70"])
        .arg(format!("--filename={}", place.path.display().to_string().replace(':', "\\:")))
        .arg(format!("--rw={rw}"))
        .arg(format!("--bs={}", load.block_bytes))
        .arg(format!("--direct={}", u8::from(place.direct)))
        .args(["--ramp_time=100ms".into(), format!("--runtime={ms}ms")]);
    if place.direct && load.depth > 1 {
        command.args([
            "--ioengine=io_uring".into(),
            "--registerfiles=1".into(),
            format!("--iodepth={}", load.depth),
        ]);
    } else if place.direct && load.pattern != "writeflush" {
        command.args(["--ioengine=io_uring", "--registerfiles=1"]);
    } else {
        command.arg("--ioengine=pvsync2");
    }
    if load.pattern == "writeflush" {
        command.arg("--fdatasync=1");
    }
    // Huge pages under its buffers, as under the guest's.
    let output = command.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1").stdin(Stdio::null()).output();
    let output = output.context("fio cannot be started: `make deps` installs it")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "fio failed: {said}");
    let json: Value = serde_json::from_str(said.find('{').map_or("", |at| &said[at..]))?;
    let job = &json["jobs"][0];
    let side = |name: &str| job[name]["iops"].as_f64().unwrap_or_default();
    let lat = &job[if side("read") >= side("write") { "read" } else { "write" }]["lat_ns"]["percentile"];
    let at = |name: &str| lat[name].as_f64().map(|ns| ns / 1e3).context("fio's answer is unusual");
    Ok(Figures {
        iops: side("read") + side("write"),
        p50_us: at("50.000000")?,
        p99_us: at("99.000000")?,
        p999_us: at("99.900000")?,
        doorbells_per_io: None,
    })
}
