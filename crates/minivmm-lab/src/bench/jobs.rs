//! Reads fio job files, as far as their jobs can run alike in a guest and on its host.
//!
//! Owns the table of accepted options. Any other option is refused, because its effect on the figures or on
//! other files is not known here. Each section is a job of its own and runs alone.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// The built-in jobs, which run if there is no job file.
pub const BUILT_IN: &str = include_str!("default.fio");
/// Largest size of a job file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Default duration of a job in seconds.
const SECONDS: u64 = 10;
/// Time limit in seconds of a job that ends after an amount of I/O and not after a time.
const SECONDS_MAX: u64 = 6 * 3600;

/// One section of a job file, with the options of `[global]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Name of the section.
    pub name: String,
    /// The options of fio and their values. Each occurs once, in the order of first mention.
    options: Vec<(String, String)>,
}

/// Why a job file is refused.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The file cannot be read.
    #[error("cannot read the job file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error that the host reported.
        source: std::io::Error,
    },
    /// A line is not valid or not accepted.
    #[error("{file}, line {line}: {why}")]
    Line {
        /// The file.
        file: String,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong, and what is accepted.
        why: String,
    },
    /// The file has no job.
    #[error("{0} has no job: a section [NAME] with at least rw=, besides [global]")]
    Empty(String),
    /// Two jobs have the same name.
    #[error("{file} has two jobs named {name}: rename one, because figures are reported by name")]
    Twice {
        /// The file.
        file: String,
        /// The name.
        name: String,
    },
    /// There is no job of a name that was asked for.
    #[error("there is no job {name}: the jobs are {known}")]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// The names of all jobs.
        known: String,
    },
}

/// Accepted options. They do not interfere with the protocol.
const TAKEN: [&str; 59] = [
    "rw",
    "bs",
    "bsrange",
    "bssplit",
    "ba",
    "blockalign",
    "bs_unaligned",
    "rwmixread",
    "rwmixwrite",
    "iodepth",
    "iodepth_low",
    "iodepth_batch_submit",
    "iodepth_batch_complete_min",
    "iodepth_batch_complete_max",
    "direct",
    "ioengine",
    "runtime",
    "time_based",
    "ramp_time",
    "size",
    "io_size",
    "offset",
    "offset_increment",
    "number_ios",
    "loops",
    "numjobs",
    "thread",
    "percentage_random",
    "random_distribution",
    "random_generator",
    "randrepeat",
    "randseed",
    "allrandrepeat",
    "norandommap",
    "softrandommap",
    "fsync",
    "fdatasync",
    "sync",
    "end_fsync",
    "thinktime",
    "thinktime_spin",
    "thinktime_blocks",
    "rate",
    "rate_iops",
    "rate_process",
    "latency_target",
    "latency_window",
    "latency_percentile",
    "refill_buffers",
    "scramble_buffers",
    "buffer_compress_percentage",
    "buffer_compress_chunk",
    "dedupe_percentage",
    "hipri",
    "fixedbufs",
    "registerfiles",
    "sqthread_poll",
    "nonvectored",
    "iomem_align",
];
/// Accepted engines. The fio of the test guest has them too.
const ENGINES: [&str; 8] = ["psync", "sync", "vsync", "pvsync", "pvsync2", "libaio", "io_uring", "posixaio"];
/// Aliases of options.
const ALIASES: [(&str, &str); 7] = [
    ("readwrite", "rw"),
    ("blocksize", "bs"),
    ("blocksize_range", "bsrange"),
    ("file_size", "filesize"),
    ("io_limit", "io_size"),
    ("iodepth_batch", "iodepth_batch_submit"),
    ("iodepth_batch_complete", "iodepth_batch_complete_min"),
];
/// Options that are accepted and ignored, because sections run alone anyway.
const DROPPED: [&str; 4] = ["stonewall", "wait_for_previous", "new_group", "description"];

/// Refused options, and why.
static REFUSED: [(&[&str], &str); 8] = [
    (
        &[
            "filename",
            "filename_format",
            "directory",
            "opendir",
            "nrfiles",
            "openfiles",
            "filesize",
            "file_append",
            "file_service_type",
            "lockfile",
            "pre_read",
            "fallocate",
            "allow_file_create",
            "overwrite",
            "unlink",
            "create_serialize",
            "create_fsync",
            "create_on_open",
            "create_only",
            "fill_device",
        ],
        "bench says what a job works on: the whole disk in the guest, the image itself on the host",
    ),
    (
        &["exec_prerun", "exec_postrun", "include", "read_iolog", "write_iolog", "merge_blktrace_file"],
        "it names other files or programs, which guest and host do not have alike",
    ),
    (
        &[
            "write_bw_log",
            "write_lat_log",
            "write_hist_log",
            "write_iops_log",
            "log_avg_msec",
            "log_offset",
            "bandwidth-log",
            "per_job_logs",
        ],
        "logs would be written in the guest and go with it; the figures of each run are in the report (--json)",
    ),
    (
        &[
            "verify",
            "do_verify",
            "verify_pattern",
            "verify_backlog",
            "verify_only",
            "verify_fatal",
            "verify_async",
        ],
        "verifying takes time of its own; do it without measuring: minivmm --disk IMAGE -- fio ... --verify=crc32c",
    ),
    (
        &[
            "cpus_allowed",
            "cpumask",
            "cpus_allowed_policy",
            "numa_cpu_nodes",
            "numa_mem_policy",
            "prio",
            "nice",
        ],
        "guest and host number their CPUs differently",
    ),
    (
        &[
            "percentile_list",
            "clat_percentiles",
            "lat_percentiles",
            "slat_percentiles",
            "disable_lat",
            "disable_clat",
            "disable_slat",
            "gtod_reduce",
            "unified_rw_reporting",
            "group_reporting",
            "significant_figures",
            "stats",
        ],
        "bench reads the figures that it asks fio for itself",
    ),
    (
        &["invalidate", "fadvise_hint"],
        "bench sets the state of the host's cache before each run (--host-cache), and fio is not to change it",
    ),
    (&["buffered"], "say it as direct=0"),
];

/// Reads the jobs of a file, or the built-in jobs without one. If `only` is not empty, it selects jobs by name.
pub fn read(file: Option<&Path>, only: &[String]) -> Result<Vec<Job>, JobError> {
    let jobs = match file {
        None => parse(BUILT_IN, "the built-in job file")?,
        Some(path) => {
            let failed = |source| JobError::Read { path: path.to_owned(), source };
            parse(&read_text(path).map_err(failed)?, &path.display().to_string())?
        }
    };
    if let Some(name) = only.iter().find(|name| !jobs.iter().any(|job| job.name == **name)) {
        let known: Vec<_> = jobs.iter().map(|job| job.name.as_str()).collect();
        return Err(JobError::Unknown { name: name.clone(), known: known.join(", ") });
    }
    Ok(jobs.into_iter().filter(|job| only.is_empty() || only.contains(&job.name)).collect())
}

/// Reads a file or a pipe. Fails if it is longer than [`FILE_BYTES_MAX`], so an endless one is not read for
/// ever.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let count = File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    let too_long = || io::Error::other("it has more than 1 MiB, and is no job file");
    if count as u64 > FILE_BYTES_MAX { Err(too_long()) } else { Ok(text) }
}

fn parse(text: &str, file: &str) -> Result<Vec<Job>, JobError> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut global: Vec<(String, String)> = Vec::new();
    let mut section: Option<String> = None;
    for (line, content) in text.lines().enumerate().map(|(at, content)| (at + 1, content.trim())) {
        let wrong = |why: String| JobError::Line { file: file.to_owned(), line, why };
        if content.is_empty() || content.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = content.strip_prefix('[') {
            let name = name.strip_suffix(']').map(str::trim).filter(|name| is_name(name));
            let name = name.ok_or_else(|| {
                wrong(format!("{content} is no section: [NAME], of letters, digits, -, _ and ."))
            })?;
            section = Some(name.to_owned());
            if name != "global" {
                if jobs.iter().any(|job| job.name == name) {
                    return Err(JobError::Twice { file: file.to_owned(), name: name.to_owned() });
                }
                jobs.push(Job { name: name.to_owned(), options: global.clone() });
            }
            continue;
        }
        let (name, value) = option(content).map_err(wrong)?;
        if DROPPED.contains(&name.as_str()) {
            continue;
        }
        let options = match (section.as_deref(), jobs.last_mut()) {
            (None, _) => return Err(wrong("an option before the first [section]".into())),
            (Some("global"), _) => &mut global,
            (Some(_), Some(job)) => &mut job.options,
            (Some(_), None) => continue,
        };
        set(options, &name, value);
    }
    if jobs.is_empty() || jobs.iter().any(|job| job.option("rw").is_none()) {
        return Err(JobError::Empty(file.to_owned()));
    }
    Ok(jobs)
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn set(options: &mut Vec<(String, String)>, name: &str, value: String) {
    match options.iter_mut().find(|option| option.0 == name) {
        Some(option) => option.1 = value,
        None => options.push((name.to_owned(), value)),
    }
}

/// Parses `NAME=VALUE`, or `NAME`, which means 1. Returns why the option is refused if it is.
fn option(content: &str) -> Result<(String, String), String> {
    let (name, value) = content.split_once('=').unwrap_or((content, "1"));
    let (name, value) = (name.trim().to_lowercase(), value.trim());
    let name = ALIASES.iter().find(|alias| alias.0 == name).map_or(name.as_str(), |alias| alias.1);
    if let Some((_, why)) =
        REFUSED.iter().find(|(names, _)| names.contains(&name.split_whitespace().next().unwrap_or(name)))
    {
        return Err(format!("{name} is not taken: {why}"));
    }
    if DROPPED.contains(&name) {
        return Ok((name.to_owned(), value.to_owned()));
    }
    if !TAKEN.contains(&name) {
        return Err(format!(
            "{name} is not taken: what it would do to the figures is not known here. These are: {}",
            TAKEN.join(", ")
        ));
    }
    if value.contains(['$', '`']) {
        return Err(format!("{name}={value}: variables are not taken, guest and host would differ in them"));
    }
    match name {
        "rw" if value.contains("trim") => {
            Err("rw with trim is not taken: it makes holes, and what runs after it reads no disk".into())
        }
        "ioengine" if !ENGINES.contains(&value) => Err(format!(
            "ioengine={value} is not taken: those that guest and host have alike are {}",
            ENGINES.join(", ")
        )),
        "end_fsync" if value == "0" => Err(
            "end_fsync=0 is not taken: without a last sync what a cache took would be measured, not the disk"
                .into(),
        ),
        _ => Ok((name.to_owned(), value.to_owned())),
    }
}

impl Job {
    /// Returns the value of an option.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|option| option.0 == name).map(|option| option.1.as_str())
    }

    /// Returns the options of the job file.
    pub fn options(&self) -> &[(String, String)] {
        &self.options
    }

    fn is_on(&self, name: &str) -> bool {
        self.option(name).is_some_and(|value| value != "0" && value != "none")
    }

    fn rw(&self) -> &str {
        self.option("rw").unwrap_or_default().split(':').next().unwrap_or_default()
    }

    /// Returns `true` if the job writes to the disk.
    pub fn writes(&self) -> bool {
        !matches!(self.rw(), "read" | "randread")
    }

    /// Returns `true` if the job bypasses the page cache of the system that runs it.
    pub fn is_direct(&self) -> bool {
        self.is_on("direct")
    }

    /// Returns `true` if the job makes its own writes stable, each of them or every few.
    pub fn syncs(&self) -> bool {
        ["fsync", "fdatasync", "sync"].iter().any(|name| self.is_on(name))
    }

    /// Returns the job with these options changed.
    pub fn with(&self, changes: &[(&str, &str)]) -> Self {
        let mut job = self.clone();
        for (name, value) in changes {
            set(&mut job.options, name, (*value).to_owned());
        }
        job
    }

    /// Returns the job with a duration: `seconds`, else what the job file says, else ten seconds.
    pub fn timed(&self, seconds: Option<u64>) -> Self {
        let says =
            ["runtime", "io_size", "number_ios", "loops"].iter().any(|name| self.option(name).is_some());
        match seconds {
            None if says => self.clone(),
            asked => self.with(&[("time_based", "1"), ("runtime", &asked.unwrap_or(SECONDS).to_string())]),
        }
    }

    /// Returns the duration of the job in seconds; `None` if it is not set or has a unit other than seconds.
    pub fn seconds(&self) -> Option<u64> {
        self.option("runtime")?.trim_end_matches('s').parse().ok()
    }

    /// Returns a time limit for the job in seconds, with ample room for its last sync.
    pub fn seconds_max(&self) -> u64 {
        self.seconds().map_or(SECONDS_MAX, |seconds| (4 * seconds + 600).min(SECONDS_MAX))
    }

    /// Returns a job file that runs this job on `target`, with the options that the protocol adds.
    pub fn file(&self, target: &str) -> String {
        let mut text = format!("[{}]\nfilename={target}\n", self.name);
        // fio must not make a file or drop a cache, and it must report all processes of the job together.
        text += "allow_file_create=0\ninvalidate=0\ngroup_reporting=1\npercentile_list=50:99:99.9\n";
        if self.writes() {
            text += "end_fsync=1\n";
        }
        for (name, value) in self.options.iter().filter(|option| option.0 != "end_fsync") {
            let _ = writeln!(text, "{name}={value}");
        }
        text
    }

    /// Returns the job as one line for people.
    pub fn in_words(&self) -> String {
        let words = self.options.iter().filter(|option| !["time_based"].contains(&option.0.as_str()));
        words.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Job {
        parse(text, "f").unwrap().remove(0)
    }

    #[test]
    fn the_built_in_jobs_are_a_job_file_like_any_other() {
        let jobs = read(None, &[]).unwrap();
        let found: Vec<_> =
            jobs.iter().map(|j| (j.name.as_str(), j.writes(), j.syncs(), j.is_direct())).collect();
        assert_eq!(
            found,
            [
                ("randread", false, false, true),
                ("randwrite", true, false, true),
                ("randwrite-sync", true, true, true),
                ("seqread", false, false, true),
                ("seqwrite", true, false, true),
            ]
        );
        let some = read(None, &["seqread".into()]).unwrap();
        assert_eq!(some.len(), 1);
        let unknown = read(None, &["seq".into()]).unwrap_err().to_string();
        assert!(unknown.contains("randwrite-sync, seqread"), "{unknown}");
    }

    #[test]
    fn a_file_without_an_end_is_not_read_to_it() {
        let error = read(Some(Path::new("/dev/zero")), &[]).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("more than 1 MiB"), "{error}: {source}");
    }

    #[test]
    fn sections_have_what_global_says_and_change_it_for_themselves() {
        let text = "; a comment\n[global]\nblocksize = 4k\nDIRECT\n# one more\n[a]\nreadwrite=randrw:4\nstonewall\n\
                    [b]\nrw=read\nbs=8k\n[global]\niodepth=2\n[c]\nrw=write\nend_fsync=1\nsync=none\n";
        let jobs = parse(text, "f").unwrap();
        let found: Vec<_> = jobs.iter().map(Job::in_words).collect();
        assert_eq!(
            found,
            [
                "bs=4k direct=1 rw=randrw:4",
                "bs=8k direct=1 rw=read",
                "bs=4k direct=1 iodepth=2 rw=write end_fsync=1 sync=none"
            ]
        );
        assert!(jobs[0].writes() && !jobs[2].syncs());
        assert_eq!(
            jobs[2].file("/dev/vda"),
            "[c]\nfilename=/dev/vda\nallow_file_create=0\ninvalidate=0\ngroup_reporting=1\n\
             percentile_list=50:99:99.9\nend_fsync=1\nbs=4k\ndirect=1\niodepth=2\nrw=write\nsync=none\n"
        );
        assert!(!jobs[1].file("/dev/vda").contains("end_fsync"));
    }

    #[test]
    fn a_job_has_its_own_length_or_is_given_one() {
        let plain = one("[a]\nrw=read\n");
        assert_eq!((plain.timed(None).seconds(), plain.timed(Some(3)).seconds()), (Some(10), Some(3)));
        let own = one("[a]\nrw=read\nruntime=7s\n");
        assert_eq!((own.timed(None).seconds(), own.timed(Some(3)).seconds()), (Some(7), Some(3)));
        let amount = one("[a]\nrw=read\nio_size=1g\n");
        assert_eq!((amount.timed(None).seconds(), amount.timed(None).seconds_max()), (None, SECONDS_MAX));
        assert_eq!(amount.timed(Some(3)).option("time_based"), Some("1"));
    }

    #[test]
    fn what_would_break_the_protocol_is_refused_and_said_why() {
        for (line, words) in [
            ("filename=/dev/sda", "what a job works on"),
            ("directory=/tmp", "what a job works on"),
            ("exec_prerun=rm x", "other files or programs"),
            ("include other.fio", "other files or programs"),
            ("write_bw_log=x", "--json"),
            ("verify=crc32c", "verify=crc32c"),
            ("cpus_allowed=1", "CPUs"),
            ("percentile_list=1", "asks fio for itself"),
            ("invalidate=1", "--host-cache"),
            ("buffered=1", "direct=0"),
            ("rw=randtrim", "holes"),
            ("readwrite=trimwrite", "holes"),
            ("ioengine=rbd", "io_uring"),
            ("end_fsync=0", "a cache took"),
            ("bs=${BS}", "variables"),
            ("zonemode=zbd", "not known here"),
            ("[a b", "no section"),
            ("[a;b]", "no section"),
        ] {
            let error = parse(&format!("[x]\nrw=read\n{line}\n"), "my.fio").unwrap_err().to_string();
            assert!(error.starts_with("my.fio, line 3: ") && error.contains(words), "{line}: {error}");
        }
        for (text, words) in [
            ("", "no job"),
            ("[global]\nrw=read\n", "no job"),
            ("[a]\nbs=4k\n", "at least rw="),
            ("bs=4k\n", "before the first"),
            ("[a]\nrw=read\n[a]\nrw=read\n", "two jobs named a"),
        ] {
            let error = parse(text, "f").unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let missing = read(Some(Path::new("/nowhere.fio")), &[]).unwrap_err().to_string();
        assert!(missing.contains("/nowhere.fio"), "{missing}");
    }

    #[test]
    fn no_option_is_both_taken_and_refused() {
        for name in TAKEN {
            assert!(
                !REFUSED.iter().any(|(names, _)| names.contains(&name)) && !DROPPED.contains(&name),
                "{name}"
            );
        }
    }
}
