//! `restore`, from settings to its report.
//!
//! Never here: what a restore does (`ops::restore`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use super::dispatch::Surroundings;
use super::drivers::{needed_variables, open_repository, program, repository_flags, run_parallel};
use super::output::Output;
use super::requests::RestoreRequest;
use super::settings::{NOTHING_DONE, Settings};
use super::two::either;
use super::{progress, reports};
use crate::failure::{Failure, Kind};
use crate::ops;
use crate::plan::memory::{TooLittle, restore_range_bytes};

/// Restores from the repository, or from the one of two that can.
pub(super) fn restore(
    request: &RestoreRequest,
    surroundings: &Surroundings<'_>,
) -> Result<(), Failure> {
    tell_target(request, surroundings.output);
    either(surroundings, |one, began| restore_from(request.clone(), one, began))
}

/// Restores from one repository; `began` is set once anything is created.
fn restore_from(
    request: RestoreRequest,
    surroundings: &Surroundings<'_>,
    began: &AtomicBool,
) -> Result<(), Failure> {
    let opened = open_repository(surroundings)?;
    let repository = &opened.repository;
    let jobs = surroundings.settings.jobs.value;
    let dry_run = request.dry_run;
    let request = restore_request(request, surroundings)?;
    let listener = progress::listener("restore", surroundings.output);
    let output = surroundings.output;
    let outcome = run_parallel(jobs, async {
        let mut planned = ops::restore::make_plan(repository, &request).await?;
        ops::restore::check_place(&request, &planned).await?;
        if dry_run {
            listener.note("looking for tablespaces that replay would make");
            ops::restore::tell_tablespaces(repository, &request, &mut planned).await?;
            if request.delta {
                let survey = ops::restore::survey(repository, &request, &planned.backup).await?;
                planned.report.fetch_bytes = survey.fetch_bytes;
                planned.report.survey = Some(survey);
            }
            output.report(&planned.report, reports::dry_restore_plan)?;
            return Ok(None);
        }
        for line in reports::restore_plan(&planned.report).lines() {
            output.say(line);
        }
        let mut plan = planned.report.clone();
        let looking = ops::restore::LookBeside::begin(repository, &request, &planned);
        began.store(true, Ordering::SeqCst);
        let report =
            ops::restore::carry_out(repository, &request, planned, listener.clone()).await?;
        plan.made_by_replay = looking.found().await;
        Ok(Some((plan, report)))
    });
    listener.finish();
    match outcome? {
        None => Ok(()),
        Some((plan, report)) => {
            let needed = needed_variables(surroundings);
            let done = reports::RestoreDone::of(plan, &report, &request, needed);
            output.report(&done, reports::RestoreDone::text)
        }
    }
}

/// Returns what a restore is asked, as the settings have it.
///
/// # Errors
/// [`Kind::Usage`] for a name that is no backup's, and a ceiling of memory that is too low.
pub(super) fn restore_request(
    request: RestoreRequest,
    surroundings: &Surroundings<'_>,
) -> Result<ops::restore::Request, Failure> {
    let backup = request.backup.map(|id| id.parse()).transpose();
    let backup = backup.map_err(|error: crate::format::NameError| {
        let next = "`highwater info` lists the backups";
        Failure::new(Kind::Usage, "`--backup` names no backup", NOTHING_DONE, next).because(error)
    })?;
    let settings = surroundings.settings;
    let range_bytes_max = restore_range_bytes(settings.memory_max_bytes.value, settings.jobs.value);
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    Ok(ops::restore::Request {
        pgdata: absolute(request.pgdata),
        backup,
        target: request.target,
        tablespace_map: request
            .tablespace_map
            .into_iter()
            .map(|mapping| (mapping.old.display().to_string(), absolute(mapping.new)))
            .collect(),
        standby: request.standby,
        delta: request.delta,
        take_over: request.take_over,
        jobs: surroundings.settings.jobs.value,
        range_bytes_max: range_bytes_max.map_err(|little| too_little(&little, settings))?,
        program: program()?,
        program_flags: repository_flags(surroundings),
    })
}

/// The ceiling of memory is checked before anything begins: no stage could stay below its share.
pub(super) fn too_little(little: &TooLittle, settings: &Settings) -> Failure {
    let memory_max = &settings.memory_max_bytes;
    let mut next = format!("raise memory_max to {} MiB", little.least_bytes.div_ceil(1 << 20));
    if little.jobs_max > 0 {
        next.push_str(&format!(", or set `jobs` to {} or less", little.jobs_max));
    }
    let (mib, origin) = (memory_max.value >> 20, &memory_max.origin);
    let what = format!("{little}, and it is {mib} MiB ({origin})");
    Failure::new(Kind::Usage, what, NOTHING_DONE, next)
}

/// Tells a time back in full before anything is done, since a zone was perhaps only meant.
pub(super) fn tell_target(restore: &RestoreRequest, output: Output) {
    if let Some(in_full) = &restore.target_in_full {
        output.say(&format!("the target is {in_full}, which is {}", restore.target));
    }
}
