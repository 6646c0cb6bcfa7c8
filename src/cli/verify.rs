//! Running `verify`; and what a restore would take by what it has measured.

use std::fmt::Write;

use super::dispatch::Surroundings;
use super::drivers::{host_name, open_repository, run_light, run_parallel};
use super::requests::VerifyRequest;
use super::two::Reported;
use super::units::{human_duration, human_size};
use super::{progress, signals, stall};
use crate::failure::Failure;
use crate::format::{Acknowledgement, Depth};
use crate::ops;
use crate::ops::restore::Outlook;
use crate::ops::verify::{Finding, LOOK_AGAIN_AFTER, Report};

pub(super) fn verify(
    request: &VerifyRequest,
    surroundings: &Surroundings<'_>,
) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let settings = surroundings.settings;
    let request = ops::verify::Request {
        depth: if request.deep { Depth::Whole } else { Depth::Header },
        again: request.all,
        older_than: request.older_than,
        bytes_per_second: request.rate,
        jobs: settings.jobs.value,
        look_again_after: LOOK_AGAIN_AFTER,
        policy: settings.retention.policy(),
        host: host_name(),
    };
    let listener = progress::listener("verify", surroundings.output);
    let outcome = run_parallel(settings.jobs.value, async {
        let work = |stop| ops::verify::run(&opened.repository, &request, &*listener, stop);
        signals::stoppable(surroundings.output, work).await
    });
    listener.finish();
    let mut report = outcome?;
    let host = stall::host_state(surroundings);
    report.notes.extend(host.as_ref().and_then(stall::note));
    Reported::new(&report, text, report.failed())
}

pub(super) fn acknowledge(
    finding: &str,
    reason: &str,
    surroundings: &Surroundings<'_>,
) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let (finding, reason) = (finding.to_owned(), reason.to_owned());
    let request = ops::verify::AcknowledgeRequest { finding, reason, host: host_name() };
    let done = run_light(ops::verify::acknowledge(&opened.repository, &request))?;
    let text = |done: &Acknowledgement| format!("acknowledged {}: {}\n", done.finding, done.what);
    Reported::new(&done, text, None)
}

fn text(report: &Report) -> String {
    let how = if report.deep { "every byte" } else { "sizes and headers" };
    let mut text = format!(
        "verified {} in {}: {how}\n  {} backups; {} objects proven now, {} before; {} read\n",
        report.cluster,
        report.repository,
        report.backups,
        report.checked,
        report.skipped,
        human_size(report.read_bytes),
    );
    for note in &report.notes {
        let _ = writeln!(text, "  note: {note}");
    }
    for finding in &report.findings {
        text.push_str(&finding_text(finding));
    }
    if report.findings_unnamed > 0 {
        let _ = writeln!(text, "\n{} more findings are not named", report.findings_unnamed);
    }
    let known = report.findings.iter().filter(|one| one.acknowledged.is_some()).count();
    let new = (report.findings.len() - known) as u64 + report.findings_unnamed;
    let ending = match (new, known) {
        (0, 0) => "everything is as it should be".to_owned(),
        (0, known) => format!("nothing new is wrong; {known} acknowledged"),
        (new, 0) => format!("{new} FOUND WRONG"),
        (new, known) => format!("{new} FOUND WRONG, besides {known} acknowledged"),
    };
    let _ = writeln!(text, "\n{ending}");
    text
}

fn finding_text(finding: &Finding) -> String {
    let Finding { id, fault, what, consequence, remedy, acknowledged, .. } = finding;
    match acknowledged {
        Some(known) => format!(
            "\nknown {id} ({fault}): {what}\n  lost: {consequence}\n  acknowledged {} on {}: {}\n",
            known.at, known.host, known.reason
        ),
        None => {
            format!("\nFOUND {id} ({fault}): {what}\n  lost: {consequence}\n  do:   {remedy}\n")
        }
    }
}

/// Tells what a restore to a time would use.
pub(super) fn outlook(outlook: &Outlook) -> String {
    let mut text = format!(
        "to {}: backup {} ({} in files, {} to fetch)\n  then {} of WAL, {} to {} along timeline {}\n",
        outlook.target,
        outlook.backup,
        human_size(outlook.size_bytes),
        human_size(outlook.fetch_bytes),
        human_size(outlook.wal_bytes),
        outlook.wal_start_lsn,
        outlook.wal_end_lsn,
        outlook.timeline,
    );
    match (&outlook.measured, outlook.files_seconds) {
        (Some(rate), Some(seconds)) => {
            let took = human_duration(std::time::Duration::from_secs(seconds.max(1)));
            let _ = writeln!(
                text,
                "  the files in about {took}, at the {}/s at which `verify --deep` read this repository on {} ({}); replay of WAL comes on top and was not measured",
                human_size(rate.bytes_per_second),
                rate.host,
                rate.at
            );
        }
        _ => text.push_str(
            "  how long that takes is not known: nothing was measured yet; `verify --deep` measures how fast this repository can be read\n",
        ),
    }
    text
}
