//! Working ahead of PostgreSQL: where that is noted, and the process left behind for it.
//!
//! Never here: what is done ahead (`ops`).

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::dispatch::Surroundings;
use super::drivers::{program, repository_flags};
use super::redact;
use super::setting_values::WalCopies;
use super::settings::SpoolChoice;
use super::settings_table::is_secret_option;
use crate::ops::ahead::{Ahead, wal_directory_of_server};
use crate::store::clients::is_cloud_variable;

/// The name of the spool in the directory of WAL.
const BESIDE_WAL: &str = "highwater.spool";

/// The command that fetches ahead.
pub(super) const FETCH_AHEAD: &str = "fetch-ahead";

/// Returns what is needed to work ahead, if the server itself asks, in its data directory, for the
/// file at `path`, and the settings do not forbid it.
pub(super) fn ahead(path: &Path, surroundings: &Surroundings<'_>) -> Option<Ahead> {
    let wal = wal_directory_of_server(path)?;
    let settings = surroundings.settings;
    let spool = match &settings.spool.value {
        SpoolChoice::None => return None,
        SpoolChoice::BesideWal => wal.join(BESIDE_WAL),
        SpoolChoice::Directory(directory) => {
            // Several servers may share it; each has its own data directory.
            let own = std::fs::metadata(".").ok()?;
            directory.join(format!("{:x}-{:x}", own.dev(), own.ino()))
        }
    };
    let room_bytes = settings.spool_max_bytes.value;
    Some(Ahead { spool, place: place_of(surroundings), room_bytes })
}

/// Makes one mark of all settings that say which repository is meant. Secrets take no part: a digest of one
/// in a file would help to guess it.
fn place_of(surroundings: &Surroundings<'_>) -> String {
    let settings = surroundings.settings;
    let mut hasher = blake3::Hasher::new();
    let mut add = |name: &str, value: &str| {
        for part in [name, value] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
    };
    let url = settings.repo.as_ref().map_or("", |repo| &repo.value);
    add("repo", &redact::url(url).0);
    add("cluster", settings.cluster.as_ref().map_or("", |cluster| &cluster.value));
    for (name, option) in settings.repo_options.iter().filter(|(_, option)| !option.secret) {
        add(name, &option.text);
    }
    // A segment that was stored before there was a second repository is not in that.
    if let Some(second) = &settings.second.url {
        add("second_repo", &redact::url(&second.value).0);
        // One copy is not enough any more once both are wanted.
        let is_all = settings.second.wal_copies.value == WalCopies::All;
        add("wal_copies", if is_all { "all" } else { "any" });
        for (name, option) in settings.second.options.iter().filter(|(_, option)| !option.secret) {
            add(name, &option.text);
        }
    }
    let cloud = surroundings.environment.cloud.iter();
    for (name, value) in
        cloud.filter(|(name, _)| is_cloud_variable(name) && !is_secret_option(name))
    {
        add(name, value);
    }
    hasher.finalize().to_hex().to_string()
}

/// Starts the process that fetches ahead, and leaves it to itself: it takes its settings from the same places, and
/// says nothing. That it cannot be started harms nothing.
pub(super) fn leave_behind(surroundings: &Surroundings<'_>) {
    let Ok(program) = program() else { return };
    let mut command = Command::new(program);
    command.args(repository_flags(surroundings)).arg(FETCH_AHEAD);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(child) => tracing::debug!("process {} fetches ahead", child.id()),
        Err(error) => tracing::info!("nothing is fetched ahead: {error}"),
    }
}

/// Leaves the session and process group of whoever started us, so that their end is not ours.
pub(super) fn leave_session() {
    // Refused only to who has left it already.
    let _ = rustix::process::setsid();
}
