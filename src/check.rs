//! `minivmm check`: can this machine run Linux guests, and if not, what can the user do?
//!
//! Owns the rows of the answer, the verdict, and both ways to print them. The checks are in `devkvm` (KVM),
//! `probe` (guests of a few instructions) and `features` (what minivmm uses if it is available). Starts
//! no guest of the user, and changes nothing.

mod devkvm;
mod features;
mod probe;

use std::sync::Arc;

use kvm_ioctls::Kvm;
use serde::Serialize;

use crate::kvm::cpuid::Supported;
use crate::text;
use probe::{Failed, Probe};

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Required, and available.
    Pass,
    /// Required, and missing.
    Fail,
    /// Not required; for information.
    Note,
}

/// The result of one check.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The row's group: `kvm`, `probe` or `features`.
    pub group: &'static str,
    /// The row's name for programs, which never changes.
    pub key: String,
    /// The result.
    pub status: Status,
    /// The finding in words.
    pub found: String,
    /// The finding as a number, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
}

impl Row {
    fn new(group: &'static str, key: impl Into<String>, status: Status, found: impl Into<String>) -> Self {
        Self { group, key: key.into(), status, found: found.into(), number: None }
    }

    fn with(self, number: u64) -> Self {
        Self { number: Some(number), ..self }
    }
}

/// The whole answer.
#[derive(Debug, Serialize)]
pub struct CheckReport {
    /// `true` if Linux guests run here.
    pub linux_runs: bool,
    /// The verdict in a sentence.
    pub verdict: String,
    /// What the user can do; `None` if Linux guests run here.
    pub remedy: Option<String>,
    /// The results of all checks.
    pub rows: Vec<Row>,
    /// `true` if the verdict is valid until the next boot of the machine. That requires that probes decided
    /// it, and that neither a refusal by the host nor a busy machine can have caused it.
    #[serde(skip)]
    pub is_certain: bool,
}

/// The groups, with their headings.
const GROUPS: [(&str, &str); 3] = [
    ("kvm", "KVM"),
    ("probe", "Probe guests: a few instructions each, in kernel mode, in a VM of its own"),
    ("features", "Not needed; used where they are there"),
];

const EMULATED_HOST: &str = "run Linux guests in the emulated host, from minivmm's source tree: guest-images/emuhost \
                             run -- minivmm ...";

/// Checks this machine. Starts threads, so a process that may become a VMM runs this in another process.
pub fn check() -> CheckReport {
    let mut rows = Vec::new();
    let (is_certain, (verdict, remedy)) = match devkvm::look(&mut rows) {
        Err(cause) => (false, (cause.what, Some(cause.remedy))),
        Ok(kvm) => {
            let probed = probes(&kvm, &mut rows);
            (probed.is_certain(), judge(probed))
        }
    };
    rows.extend(features::rows());
    CheckReport { linux_runs: remedy.is_none(), verdict, remedy, rows, is_certain }
}

/// The results of the probes.
#[derive(Default)]
struct Probed {
    /// The probes that do not run.
    lacking: Vec<&'static str>,
    per_second: Option<u64>,
    /// What the host refused although any guest needs it, and what the user can do. Nothing is then known of
    /// the instructions.
    refused: Option<(String, &'static str)>,
    /// `true` if a probe did not return in time.
    timed_out: bool,
}

/// Instructions per second below which this is emulation: a kernel's boot would take minutes.
const SLOW: u64 = 20_000_000;

fn probes(kvm: &Kvm, rows: &mut Vec<Row>) -> Probed {
    let mut probed = Probed::default();
    // Queried once for all probes, because the processors of a hybrid machine differ.
    let cpuid = match Supported::by(kvm) {
        Ok(cpuid) => Arc::new(cpuid),
        Err(error) => {
            let failed = Failed::from(error);
            rows.push(Row::new("probe", "CPUID", Status::Fail, failed.to_string()));
            probed.note(failed);
            return probed;
        }
    };
    for (probe, key, purpose) in Probe::ALL {
        let row = match probe::run(probe, &cpuid) {
            Ok(found) => Row::new("probe", key, Status::Pass, found),
            Err(failed) => {
                let found = match &failed {
                    Failed::Host { .. } => failed.to_string(),
                    _ => format!("{failed}; Linux needs it for {purpose}"),
                };
                if !probed.note(failed) {
                    probed.lacking.push(key);
                }
                Row::new("probe", key, Status::Fail, found)
            }
        };
        rows.push(row);
    }
    rows.push(match probe::instructions_per_second(&cpuid) {
        Ok(count) => {
            probed.per_second = Some(count);
            let (status, found) = match count < SLOW {
                true => (Status::Fail, format!("{}: emulated", speed(count))),
                false => (Status::Pass, speed(count)),
            };
            Row::new("probe", "speed", status, found).with(count)
        }
        Err(failed) => {
            let row = Row::new("probe", "speed", Status::Fail, failed.to_string());
            probed.note(failed);
            row
        }
    });
    probed
}

impl Probed {
    fn is_slow(&self) -> bool {
        self.per_second.is_none_or(|count| count < SLOW)
    }

    /// Returns `true` if the probes' result is certain. On a processor with vmx or svm a busy machine can
    /// cause low speed or a late probe.
    fn is_certain(&self) -> bool {
        let may_be_load = self.timed_out || self.lacking.is_empty() && self.is_slow();
        self.refused.is_none() && !(may_be_load && crate::kvm::failure::hardware().is_some())
    }

    /// Records a failure, and keeps the host's first refusal. Returns `false` if the instructions failed, not
    /// the host.
    fn note(&mut self, failed: Failed) -> bool {
        self.timed_out |= failed == Failed::TimedOut;
        let Failed::Host { what, remedy } = failed else { return false };
        self.refused.get_or_insert((what, remedy));
        true
    }
}

/// Formats the speed. More digits than these would be more than the measurement is worth.
fn speed(per_second: u64) -> String {
    match per_second {
        0..10_000_000 => format!("{:.1} million instructions a second", to_f64(per_second) / 1e6),
        _ => format!("{} million instructions a second", per_second / 1_000_000),
    }
}

fn to_f64(count: u64) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

fn judge(probed: Probed) -> (String, Option<String>) {
    if let Some((what, remedy)) = probed.refused {
        return (format!("this host lets KVM run no guest: {what}"), Some(remedy.into()));
    }
    let slow = probed.is_slow();
    if probed.lacking.is_empty() && !slow {
        return ("Linux kernels run here".into(), None);
    }
    let lacks = match probed.lacking.as_slice() {
        [] => String::new(),
        names => format!(" and lacks {}", names.join(", ")),
    };
    let verdict = match (slow, crate::kvm::failure::hardware()) {
        (true, _) => format!("this KVM emulates kernel code{lacks}: no Linux kernel runs here"),
        (false, _) => format!("this KVM lacks {}: no Linux kernel runs here", probed.lacking.join(", ")),
    };
    (verdict, Some(format!("{EMULATED_HOST}; or use a machine, or a VM, with VMX or SVM")))
}

impl CheckReport {
    /// Returns the report as JSON. `docs/reference/explain-json.md` describes its keys.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// Returns the report for a terminal of 80 columns. The last lines are the verdict and the remedy.
    pub fn to_text(&self) -> String {
        let mut page = String::new();
        for (group, heading) in GROUPS {
            let rows: Vec<_> = self.rows.iter().filter(|row| row.group == group).collect();
            if rows.is_empty() {
                continue;
            }
            page += &format!("{heading}\n");
            for row in rows {
                let mark = match row.status {
                    Status::Pass => "PASS",
                    Status::Fail => "FAIL",
                    Status::Note => "note",
                };
                page += &text::hang(&format!("  {mark}  {:<23} ", row.key), &row.found);
            }
            page.push('\n');
        }
        page += &text::hang("verdict: ", &self.verdict);
        if let Some(remedy) = &self.remedy {
            page += &text::hang("remedy:  ", remedy);
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_what_to_do() {
        let judged = |lacking: &[&'static str], per_second| {
            judge(Probed { lacking: lacking.into(), per_second, ..Probed::default() })
        };
        assert_eq!(judged(&[], Some(900_000_000)), ("Linux kernels run here".into(), None));
        for (lacking, speed, words) in [
            (&["int3", "iretq"][..], Some(1_300_000), &["emulates", "int3, iretq"][..]),
            (&["int3"], Some(900_000_000), &["lacks int3"]),
            (&[], Some(1_300_000), &["emulates kernel code"]),
            (&["int3"], None, &["emulates"]),
        ] {
            let (verdict, remedy) = judged(lacking, speed);
            assert!(words.iter().all(|word| verdict.contains(word)), "{verdict}");
            assert!(remedy.is_some_and(|remedy| remedy.contains("emuhost")));
        }
    }

    #[test]
    fn a_host_that_refuses_what_any_guest_needs_is_not_taken_for_one_that_emulates() {
        let mut probed = Probed::default();
        assert!(!probed.note(Failed::TimedOut));
        assert!(!probed.note(Failed::Instructions("exception 6".into())));
        for what in ["the first", "the second"] {
            assert!(probed.note(Failed::Host { what: what.into(), remedy: "raise it" }));
        }
        assert!(!probed.is_certain(), "the next time the host may let it");
        let (verdict, remedy) = judge(probed);
        assert!(verdict.contains("the first") && !verdict.contains("emulates"), "{verdict}");
        assert_eq!(remedy.as_deref(), Some("raise it"));
    }

    #[test]
    fn speed_is_said_so_that_one_can_read_it() {
        assert_eq!(speed(1_312_345), "1.3 million instructions a second");
        assert_eq!(speed(1_512_345_678), "1512 million instructions a second");
    }
}
