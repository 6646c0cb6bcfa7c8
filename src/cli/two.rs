//! One command on two repositories: on each in turn, or on the first that can do it.
//!
//! Owns: that neither hinders the other, that each is told by its name, and what exit code two ends come to. Where
//! there is one repository, nothing is different from a command that knows of one. Never here: what the command does.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::copy::missing_in_words;
use super::dispatch::{Ended, Surroundings};
use super::drivers::{both_sides, host_name, run_light};
use super::output::{Output, failure_json};
use crate::failure::{Failure, Kind};
use crate::ops::copy::Choice;
use crate::ops::{Silent, StopRequest, Which, copy};
use crate::plan::retention::REMAINS_SETTLE_AFTER;

/// A report on one repository, ready to be printed.
pub(super) struct Reported {
    json: String,
    text: String,
    /// Why the exit code is not 0 though there is a report.
    failed: Option<Kind>,
}

impl Reported {
    /// Makes it from what is printed with `--json` and without.
    ///
    /// # Errors
    /// [`Kind::Bug`] for what cannot be JSON.
    pub(super) fn new<T: Serialize>(
        value: &T,
        text: impl FnOnce(&T) -> String,
        failed: Option<Kind>,
    ) -> Result<Self, Failure> {
        Ok(Self { json: Output::json_of(value)?, text: text(value), failed })
    }
}

/// Does something with the only repository, or with the first and then with the second.
///
/// With two, the text of each stands under its name, and the JSON of the second is the field `second` of the first's;
/// one that failed is an `error` in its place. What is absent in one of them only is told and is no failure.
///
/// # Errors
/// With one repository, its own; with two, the gravest end of both, each told already.
pub(super) fn each(
    surroundings: &Surroundings<'_>,
    run: impl Fn(&Surroundings<'_>) -> Result<Reported, Failure>,
) -> Result<(), Ended> {
    each_and(surroundings, run, |_| Ok(None))
}

/// As [`each`], and tells what each repository lacks that the other has, if both have reported.
pub(super) fn each_and_what_is_missing(
    surroundings: &Surroundings<'_>,
    run: impl Fn(&Surroundings<'_>) -> Result<Reported, Failure>,
) -> Result<(), Ended> {
    each_and(surroundings, run, |surroundings| missing(surroundings).map(Some))
}

fn each_and(
    surroundings: &Surroundings<'_>,
    run: impl Fn(&Surroundings<'_>) -> Result<Reported, Failure>,
    between: impl FnOnce(&Surroundings<'_>) -> Result<Option<Reported>, Failure>,
) -> Result<(), Ended> {
    let output = surroundings.output;
    let settings = surroundings.settings;
    let Some(second) = settings.of_second() else {
        let report = run(surroundings)?;
        output.page(if output.json { &report.json } else { &report.text })?;
        return report.failed.map_or(Ok(()), |kind| Err(Ended::Said(kind)));
    };
    let first = settings.of_first();
    let mut ends = Vec::new();
    for (which, settings) in [(Which::First, &first), (Which::Second, &second)] {
        match run(&Surroundings { settings, ..*surroundings }) {
            Err(failure) if matches!(failure.kind, Kind::Stopped(_)) => return Err(failure.into()),
            end => ends.push((which, end)),
        }
    }
    tell(output, ends, || between(surroundings))
}

/// Tells how something ended that was done with both repositories, and what there is to say between them if both
/// have reported.
///
/// # Errors
/// The gravest end of both, told already.
pub(super) fn tell(
    output: Output,
    ends: Vec<(Which, Result<Reported, Failure>)>,
    between: impl FnOnce() -> Result<Option<Reported>, Failure>,
) -> Result<(), Ended> {
    let one_is_well = ends.iter().any(|(_, end)| end.is_ok());
    let both_are_well = ends.iter().all(|(_, end)| end.is_ok());
    let (mut pages, mut kinds) = (Vec::new(), Vec::new());
    for (which, end) in ends {
        match end {
            Ok(report) => {
                kinds.extend(report.failed);
                pages.push(named(output, which, &report));
            }
            Err(failure) => {
                if failure.kind != Kind::Absent || !one_is_well {
                    kinds.push(failure.kind);
                }
                let failure = failure.so(format!("in the {} repository", which.word()));
                if output.json {
                    pages.push(failure_json(&failure, failure.kind.exit_code()));
                } else {
                    output.failure(&failure, failure.kind.exit_code());
                }
            }
        }
    }
    let between = if both_are_well { between() } else { Ok(None) };
    let between = between.unwrap_or_else(|failure| {
        output.failure_on_stderr(&failure.so("could not look what each repository lacks"));
        kinds.push(Kind::Store);
        None
    });
    output.page(&joined(output, pages, between))?;
    gravest(kinds).map_or(Ok(()), |kind| Err(Ended::Said(kind)))
}

fn named(output: Output, which: Which, report: &Reported) -> String {
    if output.json {
        return report.json.clone();
    }
    format!("=== the {} repository\n{}", which.word(), report.text)
}

/// Makes one page: of text one below the other, of JSON one document.
fn joined(output: Output, pages: Vec<String>, between: Option<Reported>) -> String {
    if !output.json {
        let between = between.map(|report| format!("=== between them\n{}", report.text));
        let pages = pages.into_iter().chain(between).map(|page| page.trim_end().to_owned());
        return pages.collect::<Vec<_>>().join("\n\n");
    }
    let mut pages = pages.into_iter();
    let mut page = pages.next().unwrap_or_else(|| "{}".to_owned());
    for (field, more) in
        ["second", "missing"].into_iter().zip(pages.chain(between.map(|report| report.json)))
    {
        page = with_field(&page, field, &more);
    }
    page
}

/// Adds a field to a JSON object that was printed over several lines. A text in JSON holds no line break.
fn with_field(object: &str, field: &str, value: &str) -> String {
    let body = object.trim_end().strip_suffix('}').unwrap_or(object).trim_end();
    let value = value.trim_end().replace('\n', "\n  ");
    format!("{body},\n  \"{field}\": {value}\n}}")
}

/// Returns the kind that the exit code tells: what is wrong with what is stored is graver than a store that is away.
fn gravest(kinds: Vec<Kind>) -> Option<Kind> {
    let rank = |kind: &Kind| match kind {
        Kind::Bug => 7,
        Kind::Integrity => 6,
        Kind::Conflict => 5,
        Kind::Usage => 4,
        Kind::Disk => 3,
        Kind::Postgres => 2,
        Kind::Store => 1,
        Kind::Absent | Kind::Stopped(_) => 0,
    };
    kinds.into_iter().max_by_key(rank)
}

/// Looks what each repository has that the other lacks and would keep; only lists.
fn missing(surroundings: &Surroundings<'_>) -> Result<Reported, Failure> {
    let Some((first, second)) = both_sides(surroundings)? else {
        return Reported::new(&(), |()| String::new(), None);
    };
    let request = copy::Request {
        backups: Choice::All,
        wal: true,
        from: None,
        dry_run: true,
        host: host_name(),
        settle_after: REMAINS_SETTLE_AFTER,
    };
    let stop = StopRequest::new().1;
    let report = run_light(copy::run(&first, &second, &request, &Silent, stop))?;
    Reported::new(&report.ways, |ways| missing_in_words(ways), None)
}

/// Does something that only reads with the only repository, or with the first, or else with the second: where the
/// first is away, is damaged, or does not reach what is wanted.
///
/// `run` sets the flag once it has shown or made anything: from then on its failure is final.
///
/// # Errors
/// The first's, if neither can do it; that of the one which could not be asked, if the other could not do it.
pub(super) fn either<T>(
    surroundings: &Surroundings<'_>,
    run: impl Fn(&Surroundings<'_>, &AtomicBool) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let began = AtomicBool::new(false);
    let Some(second) = surroundings.settings.of_second() else { return run(surroundings, &began) };
    let first = surroundings.settings.of_first();
    let failure = match run(&Surroundings { settings: &first, ..*surroundings }, &began) {
        Err(failure)
            if matches!(failure.kind, Kind::Store | Kind::Integrity | Kind::Absent)
                && !began.load(Ordering::SeqCst) =>
        {
            failure.so("in the first repository")
        }
        outcome => return outcome,
    };
    surroundings.output.say(&format!("{failure}; the second repository is asked"));
    match run(&Surroundings { settings: &second, ..*surroundings }, &began) {
        Err(other) if began.load(Ordering::SeqCst) => Err(other),
        Err(other) => {
            let other = other.so("in the second repository");
            surroundings.output.say(&other.to_string());
            // What could not be asked may hold it.
            Err(if failure.kind != Kind::Store && other.kind == Kind::Store {
                other
            } else {
                failure
            })
        }
        done => done,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_added_to_what_was_printed() {
        let first = serde_json::to_string_pretty(&serde_json::json!({"a": 1, "b": [1]})).unwrap();
        let second = serde_json::to_string_pretty(&serde_json::json!({"a": "}\n"})).unwrap();
        let page = with_field(&with_field(&first, "second", &second), "missing", "[]");
        let read: serde_json::Value = serde_json::from_str(&page).unwrap();
        let expected = serde_json::json!({"a": 1, "b": [1], "second": {"a": "}\n"}, "missing": []});
        assert_eq!(read, expected);
    }

    #[test]
    fn damage_is_graver_than_a_store_that_is_away() {
        assert_eq!(gravest(vec![Kind::Store, Kind::Integrity]), Some(Kind::Integrity));
        assert_eq!(gravest(vec![Kind::Store]), Some(Kind::Store));
        assert_eq!(gravest(Vec::new()), None);
    }
}
