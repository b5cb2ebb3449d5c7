//! The page: one self-contained HTML file for phones and screens, with a light and a dark theme.
//!
//! Owns the layout. It shows what is in the [`StudyReport`] and judges nothing itself.

mod svg;

use std::fmt::Write;

use super::experiment::{MODES, number};
use super::plot::Plot;
use super::report::{JudgedCase, JudgedExperiment, JudgedMeasure, StudyReport};
use super::verdict::{Decision, FEW, MARGIN, QUARTILES_FROM};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("copy.js");

/// Escapes text for use between HTML tags or in an attribute.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(letter),
        }
    }
    safe
}

/// Returns the whole page.
pub fn page(report: &StudyReport) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <link rel=\"icon\" href=\"data:,\">\
         <title>Disk caching in 2008 and now: the claims, measured</title><style>\n{STYLE}</style></head><body>\n"
    );
    html.push_str("<header><h1>Disk caching in 2008 and now: the claims, measured</h1>");
    html.push_str(
        "<p>In October 2008 a patch on libvir-list was to switch off the caching of guests' disks. What was said for and \
         against it is repeated to this day. Here each claim is taken at its word and measured.</p></header>\n<main>",
    );
    summary(&mut html, report);
    host(&mut html, report);
    how_to_read(&mut html);
    for experiment in &report.experiments {
        section(&mut html, experiment);
    }
    steps(&mut html, report);
    let _ = write!(html, "</main>\n<script>\n{SCRIPT}</script></body></html>\n");
    html
}

fn summary(html: &mut String, report: &StudyReport) {
    html.push_str("<h2 id=\"verdicts\">Verdicts</h2>");
    if !report.complete {
        html.push_str("<p class=\"in-part\">The run was ended before all was measured: what is missing is told as such.</p>");
    }
    html.push_str("<div class=\"scroll\"><table><thead><tr><th></th><th>Claim</th><th>Verdict</th><th>Predictions held</th></tr></thead><tbody>");
    for experiment in &report.experiments {
        for claim in &experiment.claims {
            let (held, others) = counted(experiment);
            let others = others.into_iter().filter(|(count, _)| *count > 0);
            let rest: String = others.map(|(count, what)| format!(", {count} {what}")).collect();
            let _ = write!(
                html,
                "<tr><td><a href=\"#{id}\">{id}</a></td><td class=\"claim\">{}<br><span class=\"dim\">\u{201c}{}\u{201d} {}</span></td>\
                 <td class=\"claim {}\">{}</td><td class=\"n\">{held}{rest}</td></tr>",
                escape(experiment.title),
                escape(&beginning(claim.quote.text)),
                escape(claim.quote.author),
                claim.verdict.outcome.class(),
                escape(&capital(&claim.verdict.words)),
                id = experiment.id,
            );
        }
    }
    html.push_str("</tbody></table></div>");
}

/// Returns the first words of a claim.
fn beginning(text: &str) -> String {
    const LETTERS: usize = 60;
    match text.char_indices().skip(LETTERS).find(|(_, letter)| *letter == ' ') {
        Some((at, _)) => format!("{} \u{2026}", text.get(..at).unwrap_or(text)),
        None => text.to_owned(),
    }
}

/// Returns how many predictions held, and how many did not, each with what became of them.
fn counted(experiment: &JudgedExperiment) -> (usize, [(usize, &'static str); 3]) {
    let cases = experiment.measures.iter().flat_map(|measure| &measure.cases);
    let (mut held, mut failed, mut open, mut unavailable) = (0, 0, 0, 0);
    for case in cases {
        match case.prediction {
            Decision::Yes => held += 1,
            Decision::No => failed += 1,
            Decision::Open(_) => open += 1,
            Decision::Unavailable(_) => unavailable += 1,
        }
    }
    (held, [(failed, "not"), (open, "open"), (unavailable, "not available")])
}

fn host(html: &mut String, report: &StudyReport) {
    html.push_str("<h2 id=\"machine\">The machine, and what its figures mean</h2>");
    let machine = &report.machine;
    if let Some(caveat) = &machine.caveat {
        let _ = write!(html, "<p class=\"in-part\">{}.</p>", escape(&capital(caveat)));
    }
    html.push_str("<div class=\"scroll\"><table class=\"facts\"><tbody>");
    let run = format!(
        "{}, {} repetition{} of each step, {} s of measuring",
        if report.quick { "a quick one" } else { "a full one" },
        report.rounds,
        if report.rounds == 1 { "" } else { "s" },
        number(report.seconds.round()),
    );
    let facts = machine.facts();
    for (name, fact) in facts.iter().map(|(name, fact)| (*name, fact.as_str())).chain([("run", run.as_str())])
    {
        let _ = write!(html, "<tr><td>{name}</td><td>{}</td></tr>", escape(fact));
    }
    html.push_str("</tbody></table></div>");
    html.push_str(
        "<p><strong>What is not as it was in 2008.</strong> virtio-blk had no FLUSH that a guest could use with this \
         default, and \u{201c}cache=on\u{201d} stood somewhere between today\u{2019}s writeback and unsafe: writes were acknowledged from the \
         host\u{2019}s cache, and a guest had no way to ask for more. So a claim can have been right then and be refuted for \
         writeback now; unsafe, and writeback with a guest that sends no FLUSH, are nearest to what was meant. dontcache is newer: \
         Linux has RWF_DONTCACHE since 2025.</p>",
    );
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

fn how_to_read(html: &mut String) {
    let _ = write!(
        html,
        "<h2 id=\"reading\">How to read it</h2><ul>\
         <li>A <strong>prediction</strong> was written before anything was measured, with its tolerance; it stands in the program. \
         A <strong>rule</strong> says what a figure must be for the claim to be true of a case; it follows from the claim\u{2019}s \
         words, not from what we expect.</li>\
         <li>A figure stands with its <strong>spread</strong>: from least to greatest, or, from {QUARTILES_FROM} values on, from \
         the first to the third quartile. Only if all of that is on one side of a bound it says yes or no.</li>\
         <li><strong>Confirmed</strong>: true of every case. <strong>Refuted</strong>: of none. <strong>Confirmed for these \
         only</strong>: of those named. <strong>Inconclusive here</strong>: the spread is too wide, a control has failed, or the \
         figure means nothing on this host. A case that is <strong>not available here</strong> counts neither for nor against a \
         claim.</li>\
         <li>Counts, bytes and shares decide on any host. <strong>Times and speeds</strong> decide nothing where the host is \
         emulated, and nothing from fewer than {FEW} values. A <strong>ratio of speeds</strong> must, in either case, clear its bound {MARGIN} \
         times; in both together it decides nothing.</li></ul>"
    );
}

fn section(html: &mut String, experiment: &JudgedExperiment) {
    let _ = write!(
        html,
        "<section><h2 id=\"{}\">{} {}</h2>",
        experiment.id,
        experiment.id,
        escape(experiment.title)
    );
    for claim in &experiment.claims {
        let _ = write!(
            html,
            "<blockquote><p>\u{201c}{}\u{201d}</p><footer>{}, {}</footer></blockquote><p class=\"verdict {}\">{}</p>",
            escape(claim.quote.text),
            escape(claim.quote.author),
            escape(claim.quote.source),
            claim.verdict.outcome.class(),
            escape(&capital(&claim.verdict.words)),
        );
    }
    let _ = write!(
        html,
        "<p>{}</p><p class=\"dim\">{}</p>",
        escape(experiment.what),
        escape(experiment.confounds)
    );
    for problem in &experiment.problems {
        let _ = write!(html, "<p class=\"no\">{}</p>", escape(problem));
    }
    for measure in &experiment.measures {
        measure_table(html, experiment, measure);
    }
    if !experiment.plots.is_empty() {
        html.push_str("<div class=\"plots\">");
        experiment.plots.iter().for_each(|plot| figure(html, plot));
        html.push_str("</div>");
    }
    html.push_str("</section>\n");
}

fn measure_table(html: &mut String, experiment: &JudgedExperiment, measure: &JudgedMeasure) {
    let _ = write!(
        html,
        "<h3>{}</h3><p class=\"dim\">{} A {}{}{}</p>",
        escape(measure.title),
        escape(measure.how),
        measure.kind.name(),
        if measure.means_something { "." } else { ": it means nothing on this host." },
        if measure.control { " A control: if it is not as predicted, nothing is decided." } else { "" }
    );
    for rule in &measure.rules {
        let whose = experiment.claims.get(rule.claim).map_or("", |claim| claim.quote.author);
        let _ = write!(
            html,
            "<p class=\"dim\">{}\u{2019}s claim is true of a case where it is {}: {}</p>",
            escape(whose),
            rule.is_true,
            escape(rule.why),
        );
    }
    let unit = if measure.unit.is_empty() { String::new() } else { format!(", {}", escape(measure.unit)) };
    let _ = write!(
        html,
        "<div class=\"scroll\"><table><thead><tr><th>Case</th><th>Predicted{unit}</th><th>Median{unit}</th><th>Spread</th><th>Values</th><th>Prediction</th>"
    );
    for rule in &measure.rules {
        let more = if experiment.claims.len() > 1 {
            experiment
                .claims
                .get(rule.claim)
                .map(|claim| format!(" ({})", escape(surname(claim.quote.author))))
        } else {
            None
        };
        let _ = write!(html, "<th>Claim{}</th>", more.unwrap_or_default());
    }
    html.push_str("</tr></thead><tbody>");
    measure.cases.iter().for_each(|case| row(html, case));
    html.push_str("</tbody></table></div>");
}

fn surname(author: &str) -> &str {
    author.rsplit(' ').next().unwrap_or(author)
}

fn row(html: &mut String, case: &JudgedCase) {
    let (median, spread, count) = match &case.found {
        None => ("\u{2013}".to_owned(), "\u{2013}".to_owned(), 0),
        Some(found) => {
            let spread = match found.values.len() {
                1 => "one value".to_owned(),
                _ => format!("{} to {}", number(found.low), number(found.high)),
            };
            (number(found.median), spread, found.values.len())
        }
    };
    let _ = write!(
        html,
        "<tr><td class=\"case\">{}</td><td class=\"n\">{}</td><td class=\"n\">{median}</td><td class=\"n\">{spread}</td><td class=\"n\">{count}</td>",
        escape(case.case),
        case.expected,
    );
    html.push_str(&decision_cell(&case.prediction, "held", "failed"));
    for claim in &case.claims {
        html.push_str(&match claim {
            // The cell before this one says why.
            Decision::Unavailable(_) => "<td class=\"open\">\u{2013}</td>".to_owned(),
            claim => decision_cell(claim, "true", "not true"),
        });
    }
    html.push_str("</tr>");
}

fn decision_cell(decision: &Decision, yes: &str, no: &str) -> String {
    match decision {
        Decision::Yes => format!("<td class=\"yes\">{yes}</td>"),
        Decision::No => format!("<td class=\"no\">{no}</td>"),
        Decision::Open(why) => format!("<td class=\"open\">open: {}</td>", escape(why)),
        Decision::Unavailable(why) => {
            format!("<td class=\"open\">not available here, because {}</td>", escape(why))
        }
    }
}

fn figure(html: &mut String, plot: &Plot) {
    let _ = write!(html, "<figure><strong>{}</strong>{}", escape(&plot.title), svg::draw(plot));
    if !plot.note.is_empty() {
        let _ = write!(html, "<figcaption>{}</figcaption>", escape(&plot.note));
    }
    html.push_str("</figure>");
}

fn steps(html: &mut String, report: &StudyReport) {
    html.push_str(
        "<h2 id=\"steps\">Steps</h2><p>Every figure of every step is in the JSON beside this page.</p>",
    );
    html.push_str("<div class=\"scroll\"><table><thead><tr><th>Step</th><th>Repetition</th><th>Seconds</th><th>Figures</th><th>Problem</th></tr></thead><tbody>");
    for step in &report.steps {
        let count: usize = step.figures.values().map(Vec::len).sum();
        let _ = write!(
            html,
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{:.1}</td><td class=\"n\">{count}</td><td class=\"long\">{}</td></tr>",
            escape(&step.step),
            step.round,
            step.seconds,
            escape(step.error.as_deref().unwrap_or("")),
        );
    }
    html.push_str("</tbody></table></div>");
}
