//! A conversation with one guest. Its script reports figures, and asks at the right moment for what only the
//! host can do or see.
//!
//! Owns the protocol: lines on the standard streams of the script, and the requests that the host serves.
//!
//! | the guest writes | which means |
//! |---|---|
//! | `=NAME VALUE` | a figure |
//! | `<NAME` ... `>STATUS` | fio's JSON, and its exit status |
//! | `!WORD ...` | a request; the host answers `ok` on standard input |
//!
//! [`crate::measuring::boot`] builds the command line, and boots guests without a conversation.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use super::figures::StepRecord;
use super::steps::{StepContext, open};
use crate::child::Group;
use crate::measuring::boot::OutputFiles;
use crate::measuring::{Boot, DiskSpec, fio};
use crate::scratch_dir::ScratchDir;
use minivmm::disk::cache::CachePolicy;
use minivmm::files::{Inventory, Output, output};
use minivmm::observe::cache::Residency;
use minivmm::observe::control::drop_cache;
use minivmm::observe::csv::Row;
use minivmm::observe::host::HostDisk;
use minivmm::program;

/// Shell functions that precede every script.
const PRELUDE: &str = r#"
ask() { echo "!$*"; read -r answer || exit 90; [ "$answer" = ok ] || { echo "the host: $answer" >&2; exit 91; }; }
put() { echo "=$1 $2"; }
# Prints the size of the guest's page cache in bytes.
cached() { awk '/^(Cached|Buffers):/ { sum += $2 } END { printf "%d\n", sum * 1024 }' /proc/meminfo; }
forget() { echo 3 >/proc/sys/vm/drop_caches; }
# job NAME DEVICE OPTION...
job() {
    name=$1; device=$2; shift 2
    echo "<$name"
    fio --name=j --thread --ioengine=psync --filename=/dev/$device --invalidate=0 --output-format=json "$@" 2>/tmp/fio-error
    status=$?
    echo; echo ">$status"
    [ $status = 0 ] || { cat /tmp/fio-error >&2; exit 92; }
}
"#;
/// File in the directory of the run that receives the output of the last guest, with times.
pub const TRANSCRIPT: &str = "guest.log";
/// A guest that writes nothing for this long is taken to hang.
const SILENCE_MAX: Duration = Duration::from_secs(240);
/// How often a waiting host checks whether the run is interrupted.
const CHECK_STOP_EVERY: Duration = Duration::from_millis(100);
/// How long the host waits for new statistics.
const STATS_MAX: Duration = Duration::from_secs(30);

/// A guest is killed after this time.
const LIFE_MAX: Duration = Duration::from_secs(1200);

/// Returns the description of a guest's disk: this image in this cache mode.
pub fn disk(image: PathBuf, mode: &str) -> Result<DiskSpec> {
    Ok(DiskSpec::new(image, CachePolicy::by_name(mode).with_context(|| format!("there is no mode {mode}"))?))
}

/// Returns the guest's name of the disk with this index: vda, vdb, ...
pub fn device(at: usize) -> String {
    let letter = u8::try_from(at).map_or('?', |at| char::from(b'a' + at.min(25)));
    format!("vd{letter}")
}

/// A guest to be run.
#[derive(Debug)]
pub struct Guest {
    /// The disks, in the order vda, vdb, ...
    pub disks: Vec<DiskSpec>,
    /// Memory of the guest in MiB.
    pub memory_mib: u64,
    /// The shell script that the guest runs.
    pub script: String,
    /// Time between two samples of the observation.
    pub interval: Duration,
}

/// Serves the requests that are not part of the protocol itself.
pub type OtherRequests<'a> = &'a mut dyn FnMut(&[&str], &mut StepRecord) -> Result<()>;

/// What a guest leaves behind when it ended with status 0.
#[derive(Debug)]
pub struct GuestOutcome {
    /// The statistics that minivmm wrote (docs/statistics.md).
    pub stats: Value,
}

impl Guest {
    /// Runs the guest, and stores its figures and curves in `record`.
    pub fn run(
        &self,
        context: &StepContext<'_>,
        record: &mut StepRecord,
        others: OtherRequests<'_>,
    ) -> Result<GuestOutcome> {
        let place = ScratchDir::new("study")?;
        let mut conversation = Conversation::begin(self, &place, context)?;
        let ended = conversation.listen(context, record, others);
        let status = conversation.end(context, ended.is_err());
        if let Err(error) = ended {
            let said = conversation.stderr_tail();
            return Err(error).with_context(|| format!("the guest{said}"));
        }
        let status = status?;
        if status != 0 {
            bail!("the guest ended with status {status}{}", conversation.stderr_tail());
        }
        conversation.store_curves(record);
        Ok(GuestOutcome { stats: conversation.files.stats().context("the guest has left no statistics")? })
    }
}

/// A period of which curves are wanted, in seconds of the observation.
#[derive(Debug)]
struct Span {
    name: String,
    device: String,
    from: f64,
    to: f64,
}

struct Conversation {
    /// `None` once the guest has ended.
    group: Option<Group>,
    lines: Receiver<String>,
    images: Vec<(String, File)>,
    disk: Option<HostDisk>,
    files: OutputFiles,
    stderr_path: PathBuf,
    spans: Vec<Span>,
    begun: Instant,
    transcript: File,
}

impl Conversation {
    fn begin(guest: &Guest, place: &ScratchDir, context: &StepContext<'_>) -> Result<Self> {
        let dir = place.path();
        let mut images = Vec::new();
        for (at, disk) in guest.disks.iter().enumerate() {
            images.push((device(at), open(&disk.image)?));
        }
        let disk = images.first().and_then(|(_, file)| HostDisk::below(file));
        let boot = Boot {
            memory_bytes: guest.memory_mib << 20,
            observe_interval: guest.interval,
            arguments: vec!["--quiet".into()],
            timeout: LIFE_MAX,
            ..Boot::new(guest.disks.clone(), format!("{PRELUDE}\n{}", guest.script))
        };
        let (mut command, files) = boot.command(&program::beside(program::VMM)?, dir)?;
        let stderr_path = dir.join("said");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(output::make_anew(&stderr_path)?);
        let mut group = Group::start(&mut command).context("cannot start minivmm")?;
        let (send, lines) = channel();
        let stdout = BufReader::new(group.child().stdout.take().context("no standard output")?);
        // The thread ends when the pipe is closed.
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let spans = Vec::new();
        let transcript = Output::text("--out", context.out.join(TRANSCRIPT));
        let transcript = Inventory::default().open(&transcript)?.file;
        Ok(Self {
            group: Some(group),
            lines,
            images,
            disk,
            files,
            stderr_path,
            spans,
            begun: Instant::now(),
            transcript,
        })
    }

    /// Returns the next line, or `None` at the end of the output.
    fn next_line(&self, context: &StepContext<'_>) -> Result<Option<String>> {
        let until = Instant::now() + SILENCE_MAX;
        loop {
            match self.lines.recv_timeout(CHECK_STOP_EVERY) {
                Ok(line) => {
                    writeln!(&self.transcript, "{:9.3} {line}", self.begun.elapsed().as_secs_f64())?;
                    return Ok(Some(line));
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if context.stop.load(Ordering::SeqCst) => bail!("was ended"),
                Err(RecvTimeoutError::Timeout) if Instant::now() > until => {
                    bail!("has said nothing for {} s", SILENCE_MAX.as_secs())
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn listen(
        &mut self,
        context: &StepContext<'_>,
        record: &mut StepRecord,
        others: OtherRequests<'_>,
    ) -> Result<()> {
        while let Some(line) = self.next_line(context)? {
            if let Some(figure) = line.strip_prefix('=') {
                let (name, value) = figure.split_once(' ').context("said a figure without a value")?;
                record.put(name, value.parse().with_context(|| format!("said {figure}"))?);
            } else if let Some(name) = line.strip_prefix('<') {
                self.read_job(name, context, record)?;
            } else if let Some(request) = line.strip_prefix('!') {
                let words: Vec<&str> = request.split_whitespace().collect();
                self.serve(&words, record, others).with_context(|| format!("asked for {request}"))?;
                let stdin = self
                    .group
                    .as_mut()
                    .and_then(|group| group.child().stdin.as_mut())
                    .context("no standard input")?;
                stdin.write_all(b"ok\n").and_then(|()| stdin.flush()).context("cannot be answered")?;
            }
        }
        Ok(())
    }

    /// Reads fio's JSON to its end and stores the figures.
    fn read_job(&self, name: &str, context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
        let mut answer = String::new();
        loop {
            let line = self.next_line(context)?.context("ended within a job")?;
            if line.starts_with('>') {
                break;
            }
            answer.push_str(&line);
            answer.push('\n');
        }
        for job in fio::parse(&answer).with_context(|| format!("ran the job {name}"))? {
            record.put(&format!("{name}.iops"), job.iops());
            record.put(&format!("{name}.mb-s"), job.mb_s());
            record.put(&format!("{name}.bytes"), job.bytes() as f64);
            for side in [&job.read, &job.write].into_iter().flatten() {
                if let Some(latency) = side.latency {
                    record.put(&format!("{name}.p99-us"), latency.p99_us);
                    record.put(&format!("{name}.p999-us"), latency.p999_us);
                }
            }
        }
        Ok(())
    }

    fn image(&self, device: &str) -> Result<&File> {
        let found = self.images.iter().find(|(name, _)| name == device);
        Ok(&found.with_context(|| format!("there is no disk {device}"))?.1)
    }

    fn serve(&mut self, words: &[&str], record: &mut StepRecord, others: OtherRequests<'_>) -> Result<()> {
        match *words {
            ["look", name, device] => self.look(name, device, record),
            ["drop", device] => Ok(drop_cache(self.image(device)?)?),
            ["sync", name, device] => {
                let begun = Instant::now();
                self.image(device)?.sync_data()?;
                record.put(&format!("{name}.sync-seconds"), begun.elapsed().as_secs_f64());
                Ok(())
            }
            ["stats", name, device] => self.store_stats(name, device, record),
            ["begin", name, device] => {
                let from = self.observed_until();
                self.spans.push(Span { name: name.into(), device: device.into(), from, to: f64::MAX });
                Ok(())
            }
            ["end", name] => {
                let to = self.observed_until();
                let span = self.spans.iter_mut().rev().find(|span| span.name == name);
                span.with_context(|| format!("{name} was not begun"))?.to = to;
                Ok(())
            }
            _ => others(words, record),
        }
    }

    /// Stores how much of the image is in the host's page cache now, and the counters of the host's disk.
    fn look(&self, name: &str, device: &str, record: &mut StepRecord) -> Result<()> {
        let found = Residency::of(self.image(device)?)?;
        record.put(&format!("{name}.at"), self.begun.elapsed().as_secs_f64());
        record.put(&format!("{name}.cached"), found.cached_bytes() as f64);
        for (what, pages) in [("dirty", found.dirty), ("writeback", found.writeback)] {
            if let Some(pages) = pages {
                record.put(&format!("{name}.{what}"), found.bytes(pages) as f64);
            }
        }
        if let Some(io) = self.disk.as_ref().and_then(HostDisk::io) {
            record.put(&format!("{name}.disk-reads"), io.reads as f64);
            record.put(&format!("{name}.disk-read-bytes"), io.read_bytes as f64);
            record.put(&format!("{name}.disk-writes"), io.writes as f64);
            record.put(&format!("{name}.disk-written-bytes"), io.written_bytes as f64);
            if let Some(flushes) = io.flushes {
                record.put(&format!("{name}.disk-flushes"), flushes as f64);
            }
        }
        Ok(())
    }

    /// Stores the counters of the device. minivmm rewrites its statistics when it receives SIGUSR1.
    fn store_stats(&self, name: &str, device: &str, record: &mut StepRecord) -> Result<()> {
        // The content of new statistics may equal the old, so the time of writing tells them apart.
        let before = self.files.stats_written();
        kill_process(self.group.as_ref().context("it has ended")?.pid(), Signal::USR1)?;
        let until = Instant::now() + STATS_MAX;
        loop {
            if self.files.stats_written() != before
                && let Some(stats) = self.files.stats()
            {
                put_stats(name, device, &stats, record);
                return Ok(());
            }
            if Instant::now() > until {
                bail!("no statistics came");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the time of the newest sample of the observation.
    fn observed_until(&self) -> f64 {
        self.files.rows().last().and_then(|row| row.number("time_s")).unwrap_or(0.0)
    }

    /// Stores what was observed during the spans, over the seconds since their beginning.
    fn store_curves(&self, record: &mut StepRecord) {
        let rows = self.files.rows();
        for span in &self.spans {
            let own: Vec<&Row> = rows
                .iter()
                .filter(|row| row.text("disk") == span.device)
                .filter(|row| row.number("time_s").is_some_and(|at| (span.from..=span.to).contains(&at)))
                .collect();
            for column in CURVES {
                let points = own
                    .iter()
                    .filter_map(|row| Some((row.number("time_s")? - span.from, row.number(column)?)));
                record.curves.insert(format!("{}.{column}", span.name), points.collect());
            }
        }
    }

    /// Waits until the guest ends, or kills it if `kill` is set. Returns its exit status, or -1 if a signal
    /// ended it.
    fn end(&mut self, context: &StepContext<'_>, kill: bool) -> Result<i32> {
        let mut group = self.group.take().context("it has ended")?;
        drop(group.child().stdin.take());
        if !kill {
            group.watch(Instant::now() + LIFE_MAX, &[context.stop])?;
        }
        Ok(group.end()?.code().unwrap_or(-1))
    }

    /// Returns the last lines of the guest's standard error, to be appended to a message.
    fn stderr_tail(&self) -> String {
        let mut said = String::new();
        if let Ok(mut file) = File::open(&self.stderr_path) {
            let _ = file.read_to_string(&mut said);
        }
        let last: Vec<&str> = said.trim().lines().rev().take(3).collect();
        match last.is_empty() {
            true => String::new(),
            false => format!(": {}", last.into_iter().rev().collect::<Vec<_>>().join(" / ")),
        }
    }
}

/// Columns of the observation that become curves.
const CURVES: [&str; 6] = [
    "host_cached_bytes",
    "host_dirty_bytes",
    "guest_cache_growth_bytes",
    "bytes_at_risk",
    "writes",
    "written_bytes",
];

/// Stores the counters of one disk as `NAME.writes` and so on.
fn put_stats(name: &str, device: &str, stats: &Value, record: &mut StepRecord) {
    let disks = stats["disks"].as_array();
    for disk in disks.into_iter().flatten().filter(|disk| disk["name"] == device) {
        for (what, value) in [
            ("reads", &disk["requests"]["read"]),
            ("writes", &disk["requests"]["write"]),
            ("flushes", &disk["requests"]["flush"]),
            ("fdatasyncs", &disk["host_calls"]["fdatasync"]),
            ("plain-writes", &disk["host_calls"]["pwritev"]),
            ("dsync-writes", &disk["host_calls"]["pwritev_dsync"]),
        ] {
            if let Some(value) = value.as_f64() {
                record.put(&format!("{name}.{what}"), value);
            }
        }
    }
}

/// Refuses every request that is not part of the protocol itself.
pub fn no_other_requests(words: &[&str], _: &mut StepRecord) -> Result<()> {
    bail!("nobody knows what {} is", words.join(" "))
}
