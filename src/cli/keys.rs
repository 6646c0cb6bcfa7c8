//! Running `key`.

use std::fmt::Write;

use serde::Serialize;

use super::dispatch::Surroundings;
use super::drivers::{host_name, open_repository, run_light};
use super::key_source::{make_key_file, read_key};
use super::output::columns;
use super::requests::KeyRequest;
use super::settings::NOTHING_DONE;
use super::settings_table::KEY_VARIABLE;
use crate::failure::{Failure, Kind};
use crate::format::{KeyId, SecretKey};
use crate::ops;
use crate::ops::key::{Changed, Keys};

/// The document of `key new`. Field names are part of the contract of `--json`.
#[derive(Serialize)]
struct Made {
    file: String,
    user_key: KeyId,
}

pub(super) fn key(request: KeyRequest, surroundings: &Surroundings<'_>) -> Result<(), Failure> {
    let output = surroundings.output;
    let file = match request {
        KeyRequest::New(file) => file,
        other => return change(other, surroundings),
    };
    let made = make_key_file(&file)?;
    let made = Made { file: file.display().to_string(), user_key: made.id() };
    output.report(&made, |made| {
        format!(
            "made key {} in {}\n  keep a copy away from this host and from the repository: what is encrypted cannot be read without it, by anybody\n",
            made.user_key, made.file
        )
    })
}

/// Whatever needs the repository.
fn change(request: KeyRequest, surroundings: &Surroundings<'_>) -> Result<(), Failure> {
    if surroundings.settings.key.choice().is_none() {
        return Err(Failure::new(
            Kind::Usage,
            "no key is set",
            NOTHING_DONE,
            format!(
                "name one that opens the cluster: `key_file` or `key_command` in the settings (--key-file, --key-command), or the variable {KEY_VARIABLE}"
            ),
        ));
    }
    let repository = open_repository(surroundings)?.repository;
    let (output, host) = (surroundings.output, host_name());
    let changed = match request {
        KeyRequest::New(_) | KeyRequest::List => {
            let keys = run_light(ops::key::list(&repository))?;
            return output.report(&keys, list);
        }
        KeyRequest::Add(file) => run_light(ops::key::add(&repository, &read_key(&file)?, host))?,
        KeyRequest::Rotate { also, left_out } => {
            let user_keys =
                also.iter().map(|file| read_key(file)).collect::<Result<Vec<SecretKey>, _>>()?;
            let left_out = left_out.into_iter().collect();
            run_light(ops::key::rotate(&repository, &user_keys, &left_out, host))?
        }
        KeyRequest::Rewrap(file) => {
            run_light(ops::key::rewrap(&repository, &read_key(&file)?, host))?
        }
        KeyRequest::Remove(id) => run_light(ops::key::remove(&repository, id, host))?,
    };
    output.report(&changed, done)
}

fn done(changed: &Changed) -> String {
    let key = changed.key;
    let told = match changed.done {
        "added" => format!("user key {key} opens everything now"),
        "rotated" => format!(
            "everything is stored under repository key {key} from now on; processes that run take it up within 5 minutes"
        ),
        "rewrapped" => format!(
            "user key {key} opens everything now, and the one before it nothing: set it wherever that was set"
        ),
        _ => format!("user key {key} opens nothing any more"),
    };
    format!("{told}\n\n{}", list(&changed.keys))
}

fn list(keys: &Keys) -> String {
    let mut text = format!("keys of {} in {}\n\n", keys.cluster, keys.repository);
    let mut rows = Vec::new();
    for key in &keys.user_keys {
        let opens = if key.opens_all { "opens everything" } else { "opens a part only" };
        let mut words = vec![opens];
        words.extend(key.in_hand.then_some("is the one that is set here"));
        words.extend(key.leaving.then_some("is being removed: end that with `key remove`"));
        rows.push(vec!["user key".to_owned(), key.user_key.to_string(), words.join("; ")]);
    }
    for key in &keys.repository_keys {
        let state = if key.in_use { "in use" } else { "for what was stored before" };
        let users = key.user_keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let words = format!("number {}, {state}; opened by {users}", key.number);
        rows.push(vec!["repository key".to_owned(), key.repository_key.to_string(), words]);
    }
    text.push_str(&columns(&rows));
    if keys.user_keys.len() == 1 {
        let _ = writeln!(
            text,
            "\nOne key opens everything. A second one, kept elsewhere (`highwater key add`), is what a lost key costs nothing with."
        );
    }
    text
}
