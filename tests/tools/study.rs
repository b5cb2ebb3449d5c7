//! `minivmm study`: its page needs nothing else and is sound; a run that was ended goes on; and, with guests,
//! residencies are what was predicted.
//!
//! Guests run on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use minivmm_lab::study::experiment::MODES;
use minivmm_lab::study::figures::StepRecord;
use minivmm_lab::study::machine::StudyMachine;
use minivmm_lab::study::page::page;
use minivmm_lab::study::report::{RunSummary, StudyReport};
use minivmm_lab::study::verdict::{Decision, Outcome};
use minivmm_lab::study::{EXPERIMENTS, by_id};
use minivmm_testkit::host;
use minivmm_testkit::tools;

/// A step of reads in which T1 is what was predicted, and the step of T9.
fn steps() -> Vec<StepRecord> {
    let mut reads = StepRecord::new("reads", 1);
    for mode in MODES {
        for mib in [0.0, 4.0, 8.0] {
            let cached = if ["none", "directsync", "dontcache"].contains(&mode) { 0.0 } else { mib };
            for (what, value) in
                [("guest", mib), ("asked", mib), ("host.cached", cached), ("host.at", mib / 4.0)]
            {
                reads.put(&format!("T1.{mode}.{what}"), value * 1048576.0);
            }
        }
    }
    let mut dirty = StepRecord::new("dirty", 1);
    for (stage, cached, pages) in [
        ("clean", 0.0, 0.0),
        ("written", 2048.0, 2048.0),
        ("let-go", 2048.0, 0.0),
        ("let-go-again", 0.0, 0.0),
    ] {
        dirty.put(&format!("T9.{stage}.cached"), cached);
        dirty.put(&format!("T9.{stage}.dirty"), pages);
    }
    dirty.put("T9.let-go.disk-written-bytes", 0.0);
    let failed = StepRecord { error: Some("it <failed> & \"so\"".into()), ..StepRecord::new("writes", 1) };
    vec![reads, dirty, failed]
}

fn report(steps: Vec<StepRecord>) -> StudyReport {
    let machine = StudyMachine::look(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
    StudyReport::of(&EXPERIMENTS, machine, steps, &RunSummary { quick: true, rounds: 1, complete: true })
}

/// Each element that is opened is closed, in order; the names of all of them.
fn elements(html: &str) -> HashSet<String> {
    const VOID: [&str; 3] = ["meta", "link", "br"];
    let (mut open, mut seen) = (Vec::new(), HashSet::new());
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        let end = at + rest[at..].find('>').unwrap_or_else(|| panic!("an open < in {}", &rest[at..]));
        let tag = &rest[at + 1..end];
        let name: String =
            tag.trim_start_matches('/').chars().take_while(char::is_ascii_alphanumeric).collect();
        rest = &rest[end + 1..];
        if tag.starts_with('!') {
            continue;
        }
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(closed), "{tag} closes another element");
            continue;
        }
        // Within a picture an element may close itself.
        if !tag.ends_with('/') && !VOID.contains(&name.as_str()) {
            open.push(name.clone());
            // What is in them is no markup.
            if ["script", "style"].contains(&name.as_str()) {
                rest = &rest[rest.find(&format!("</{name}>")).unwrap()..];
            }
        }
        seen.insert(name);
    }
    assert!(open.is_empty(), "not closed: {open:?}");
    seen
}

#[test]
fn the_page_is_sound_and_needs_nothing_else() {
    let html = page(&report(steps()));
    let elements = elements(&html);
    for element in ["svg", "table", "button", "blockquote"] {
        assert_eq!(elements.contains(element), element != "button", "{element}: buttons are the script's");
    }
    for (what, why) in [
        ("http:", "nothing is loaded"),
        ("https:", "nothing is loaded"),
        ("src=", "nothing is loaded"),
        ("url(", "nothing is loaded"),
        ("@import", "nothing is loaded"),
        ("NaN", "every number is one"),
        ("inf\"", "every number is one"),
        ("it <failed>", "text is escaped"),
    ] {
        assert!(!html.contains(what), "{what} in the page: {why}");
    }
    for text in [
        "it &lt;failed&gt; &amp; &quot;so&quot;",
        "prefers-color-scheme",
        "width=device-width",
        "Copy the table",
    ] {
        assert!(html.contains(text), "{text} is missing");
    }
    for experiment in EXPERIMENTS {
        assert!(html.contains(&format!("<h2 id=\"{}\">", experiment.id)), "{}", experiment.id);
    }
}

#[test]
fn coordinates_of_pictures_are_numbers_within_them() {
    let html = page(&report(steps()));
    let pictures: Vec<&str> =
        html.split("<svg ").skip(1).map(|rest| rest.split("</svg>").next().unwrap()).collect();
    assert!(pictures.len() >= 3, "{}", pictures.len());
    for picture in pictures {
        for (name, most) in [("x1", 400.0), ("x2", 400.0), ("cx", 400.0), ("y1", 400.0), ("cy", 400.0)] {
            for part in picture.split(&format!(" {name}=\"")).skip(1) {
                let value: f64 = part.split('"').next().unwrap().parse().unwrap();
                assert!((0.0..=most).contains(&value), "{name} {value}");
            }
        }
    }
}

#[test]
fn verdicts_follow_from_the_figures_and_from_nothing_else() {
    let outcome = |report: &StudyReport, id: &str| {
        let found = report.experiments.iter().find(|found| found.id == id).unwrap();
        (found.claims[0].verdict.outcome, found.claims[0].verdict.true_of.clone())
    };
    let good = report(steps());
    assert_eq!(
        outcome(&good, "T1"),
        (Outcome::InPart, ["writethrough", "writeback", "unsafe"].map(String::from).to_vec())
    );
    assert_eq!(outcome(&good, "T9").0, Outcome::Confirmed);
    assert_eq!(outcome(&good, "T3").0, Outcome::Inconclusive, "it was not measured");
    // Nothing measured, nothing said.
    for experiment in report(Vec::new()).experiments {
        for claim in experiment.claims {
            assert_eq!(claim.verdict.outcome, Outcome::Inconclusive, "{}", experiment.id);
        }
    }
    // The same figures in every mode: the claim is then true, or not true, of all of them.
    let mut steps = steps();
    for mode in MODES {
        let guest = steps[0].figures[&format!("T1.{mode}.guest")].clone();
        steps[0].figures.insert(format!("T1.{mode}.host.cached"), guest);
    }
    assert_eq!(outcome(&report(steps.clone()), "T1").0, Outcome::Confirmed);
    // A guest that does not cache: the control fails, and nothing is said.
    for mode in MODES {
        let halves = steps[0].figures[&format!("T1.{mode}.guest")].iter().map(|bytes| bytes / 2.0).collect();
        steps[0].figures.insert(format!("T1.{mode}.guest"), halves);
    }
    assert_eq!(outcome(&report(steps), "T1").0, Outcome::Inconclusive);
}

/// On most hosts dontcache cannot be had: that is told, and is no failure.
#[test]
fn a_case_that_the_host_cannot_have_is_told_and_changes_no_verdict() {
    const WHY: &str = "Linux 6.12 has no RWF_DONTCACHE for files on ext4";
    let mut steps = steps();
    steps[0].figures.retain(|name, _| !name.contains("dontcache"));
    let missing = report(steps.clone());
    steps[0].unavailable.insert("dontcache".into(), WHY.into());
    let told = report(steps);
    let t1 = |report: &StudyReport| report.experiments.iter().find(|found| found.id == "T1").unwrap().clone();
    assert_eq!(t1(&missing).claims[0].verdict.outcome, Outcome::Inconclusive, "a control was not measured");
    let t1 = t1(&told);
    let verdict = &t1.claims[0].verdict;
    assert_eq!(
        (verdict.outcome, verdict.unavailable.clone(), verdict.open.len()),
        (Outcome::InPart, vec!["dontcache".to_owned()], 0)
    );
    for measure in &t1.measures {
        let case = measure.cases.iter().find(|case| case.case == "dontcache").unwrap();
        assert_eq!(case.prediction, Decision::Unavailable(WHY.into()), "{}", measure.name);
    }
    assert_eq!(t1.failed().count(), 0);
    let html = page(&told);
    elements(&html);
    assert!(html.contains(&format!("not available here, because {WHY}")));
    assert!(html.contains(", 2 not available"), "T1 has two predictions of it");
    assert!(told.to_text().contains(&format!("dontcache is not available here, because {WHY}")));
    let json = serde_json::to_value(&told).unwrap();
    assert_eq!(json["steps"][0]["unavailable"]["dontcache"], WHY);
    assert_eq!(json["experiments"][0]["claims"][0]["verdict"]["unavailable"][0], "dontcache");
}

#[test]
fn every_claim_is_judged_by_some_rule_and_every_case_has_a_prediction() {
    let mut ids = HashSet::new();
    for experiment in EXPERIMENTS {
        assert!(ids.insert(experiment.id) && by_id(experiment.id).is_some());
        for (claim, quote) in experiment.claims.iter().enumerate() {
            let mut rules = experiment.measures.iter().flat_map(|measure| measure.rules);
            assert!(
                rules.any(|rule| rule.claim == claim),
                "{}: nothing decides {}",
                experiment.id,
                quote.text
            );
        }
        for measure in experiment.measures {
            assert!(!measure.predictions.is_empty(), "{} {}", experiment.id, measure.name);
            assert!(measure.rules.iter().all(|rule| rule.claim < experiment.claims.len()));
        }
    }
    assert_eq!(ids.len(), 13);
}

#[test]
fn the_json_has_a_version_and_what_the_guide_says() {
    let json: serde_json::Value = serde_json::from_str(&report(steps()).to_json().unwrap()).unwrap();
    assert_eq!(json["schema"], "minivmm-study");
    assert_eq!(json["version"], 1);
    let guide =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/study-json.md"))
            .unwrap();
    let names = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let experiment = &json["experiments"][0];
    let measure = &experiment["measures"][0];
    for (object, value) in [
        ("the report", &json),
        ("`experiments[]`", experiment),
        ("`experiments[].claims[]`", &experiment["claims"][0]),
        ("`experiments[].measures[]`", measure),
        ("`experiments[].measures[].cases[]`", &measure["cases"][0]),
        ("`experiments[].plots[]`", &experiment["plots"][0]),
        ("`steps[]`", &json["steps"][0]),
    ] {
        let row = guide.lines().find(|line| line.starts_with(&format!("| {object} |"))).unwrap();
        for name in names(value) {
            assert!(
                row.contains(&format!("`{name}`")),
                "docs/reference/study-json.md: {object} lacks {name}"
            );
        }
    }
}

fn study(out: &Path, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(tools::minivmm());
    command.args(["study", "--quick", "--out"]).arg(out).args(arguments);
    command.output().unwrap()
}

#[test]
fn what_needs_no_guest_runs_anywhere_and_goes_on_where_it_was() {
    let out = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let done = study(out.path(), &["--only", "T9", "--rounds", "2"]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{said}");
    assert!(said.contains("2/2 dirty (repetition 2): done"), "{said}");
    for file in ["study.html", "study.json", "steps.jsonl"] {
        assert!(out.path().join(file).exists(), "{file}");
    }
    // It is all there already: nothing is measured again.
    let again = study(out.path(), &["--only", "T9", "--rounds", "2"]);
    assert!(again.stderr.is_empty(), "{}", String::from_utf8_lossy(&again.stderr));
    let other = study(out.path(), &["--host=direct", "--only", "T9,T10"]);
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(125) && said.contains("another run"), "{said}");
    let unknown = study(out.path(), &["--only", "T99"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("T1, T2, T3"), "{unknown:?}");
}

#[test]
fn with_guests_residencies_are_what_was_predicted_and_an_ended_run_goes_on() {
    let place = host::Host::get().place();
    let study =
        "MINIVMM_GUEST=${GUESTS:-$MINIVMM_GUEST} minivmm study --quick --only T1,T9 --rounds 1 --out out";
    // Ended in its first guest: what was done before is kept, page and JSON are there.
    let ended = place.sh(&format!(
        "{study} & child=$!
         until [ -s out/guest.log ]; do kill -0 $child || exit 1; sleep 0.2; done
         kill -INT $child; wait $child"
    ));
    assert_eq!(ended.status, 130, "{ended:#?}");
    let record = place.sh("cat out/steps.jsonl; ls out").stdout;
    assert!(record.contains("\"step\":\"dirty\"") && !record.contains("\"step\":\"reads\""), "{record}");
    assert!(record.contains("study.html") && record.contains("study.json"), "{record}");
    let done = place.sh(study);
    assert_eq!(done.status, 0, "{done:#?}");
    assert!(!done.stderr.contains("dirty (repetition"), "it was done already: {done:#?}");
    let json: serde_json::Value = serde_json::from_str(&place.sh("cat out/study.json").stdout).unwrap();
    assert_eq!(json["complete"], true);
    let probe = "truncate -s 1M p.img; minivmm --explain --disk p.img,cache=dontcache";
    let has_dontcache = place.sh(probe).status == 0;
    for (at, outcome) in [(0, "in-part"), (1, "confirmed")] {
        let experiment = &json["experiments"][at];
        assert_eq!(experiment["claims"][0]["verdict"]["outcome"], outcome, "{experiment:#}");
        for measure in experiment["measures"].as_array().unwrap() {
            for case in measure["cases"].as_array().unwrap() {
                let lacks = case["case"] == "dontcache" && !has_dontcache;
                let expected = if lacks { "unavailable" } else { "yes" };
                assert_eq!(case["prediction"]["is"], expected, "{}: {case:#}", measure["title"]);
            }
        }
    }
}
