//! How errors of the floors below become a [`Failure`] that a user can act on.
//!
//! One place for the wording that all use cases share; what was not harmed is
//! the use case's own to say.

use crate::failure::{Failure, Kind};
use crate::pgdata::DiskError;
use crate::repo::{KeyError, RepoError};
use crate::store::StoreError;
use crate::walsender::PgError;

/// Turns an error of the repository into a failure of `what`.
pub(crate) fn of_repo(error: RepoError, what: impl Into<String>, unharmed: &str) -> Failure {
    let kind = kind_of_repo(&error);
    let next = next_of_repo(&error);
    Failure::new(kind, what, unharmed, next).because(error)
}

/// Returns the exit code's meaning of an error of the repository.
pub(crate) fn kind_of_repo(error: &RepoError) -> Kind {
    match error {
        RepoError::Store(StoreError::Absent { .. })
        | RepoError::Damaged { .. }
        | RepoError::Key(KeyError::Unreadable { .. }) => Kind::Integrity,
        RepoError::Store(_) | RepoError::NotClaimed { .. } => Kind::Store,
        RepoError::OtherCluster { .. }
        | RepoError::Conflict { .. }
        | RepoError::LastKey { .. }
        | RepoError::Leaving { .. } => Kind::Conflict,
        RepoError::NotReadable { .. } | RepoError::Key(_) => Kind::Usage,
        RepoError::Sink { .. } => Kind::Disk,
        RepoError::Task(_) => Kind::Bug,
    }
}

pub(crate) fn next_of_repo(error: &RepoError) -> String {
    match error {
        RepoError::Store(error) => next_of_store(error),
        RepoError::NotClaimed { .. } => {
            "Check repository URL, cluster name and (for a directory) that it is mounted. If this place was never set up, run `highwater init`.".into()
        }
        RepoError::OtherCluster { .. } => {
            "Give this cluster a place of its own with another `--cluster` name. If it came out of pg_upgrade, run `highwater init --successor`.".into()
        }
        RepoError::Conflict { key, .. } => format!(
            "Find out who wrote `{key}`: most often a copy of this cluster that was started with archiving on. Nothing is overwritten; stop the copy or give it a cluster name of its own."
        ),
        RepoError::Damaged { key, .. } => format!(
            "Keep `{key}` for inspection. If the server still has the original, move the damaged object away and archive again; otherwise restore from a backup that does not need it."
        ),
        RepoError::Key(error) => next_of_key(error).into(),
        RepoError::LastKey { .. } => {
            "Give another user key first (`highwater key add`), set that one, and try again: a key is removed only by who holds another that opens everything.".into()
        }
        RepoError::Leaving { user_key } => format!(
            "Bring the removal to its end first: `highwater key remove {user_key}`, with another key set that opens everything."
        ),
        RepoError::NotReadable { .. } => {
            "Use the version of Highwater that wrote it, or a newer one.".into()
        }
        RepoError::Sink { .. } => "Make room or mend the permissions, then try again.".into(),
        RepoError::Task(_) => {
            "This is a defect of Highwater or a lack of memory; please report it with the lines above.".into()
        }
    }
}

fn next_of_key(error: &KeyError) -> &'static str {
    match error {
        KeyError::Missing { .. } => {
            "Name the key: `key_file` or `key_command` in the settings (--key-file, --key-command), or the variable HIGHWATER_KEY."
        }
        KeyError::NotEncrypted { .. } => {
            "Take the key out of the settings to go on without encryption; or begin anew, encrypted, under another cluster name: `highwater init`, then `highwater backup`."
        }
        KeyError::Source(_) => {
            "Mend what is said above; `highwater config` shows where the key is to come from."
        }
        KeyError::Wrong { .. } => {
            "Set one of the keys that open it. Where none of them is left, nothing of this cluster can be read, by anybody: begin anew under another cluster name."
        }
        KeyError::NotOpened { .. } => {
            "The key was left out of a rotation. Set another, or have it added by who holds one: `highwater key add`."
        }
        KeyError::Unreadable { .. } => {
            "Set another key that opens it; with that one, `highwater key remove` and then `highwater key add` make the object anew. Where no other key is left, put the object back from a copy of the repository: what is stored under that repository key can be read by nobody without it."
        }
    }
}

fn next_of_store(error: &StoreError) -> String {
    match error {
        StoreError::Absent { key } => format!(
            "`{key}` is missing though something else refers to it. Look whether it was deleted by hand or by a lifecycle rule of the bucket."
        ),
        StoreError::Exists { .. } => "Try again.".into(),
        StoreError::Denied { .. } => {
            "Check the credentials and that they may read, write, list and delete below the repository's prefix; `highwater check` tries each.".into()
        }
        StoreError::NoRoom { .. } => "Make room in the store, or raise its quota.".into(),
        StoreError::Unavailable { .. } => {
            "It is safe to try again; PostgreSQL does so by itself. `highwater check` tells more about the store.".into()
        }
        StoreError::NotConfirmed { .. } => {
            "Look at the kernel's log for errors of the disk under the repository. Nothing that it did not confirm is counted on; it is written anew at the next attempt.".into()
        }
        StoreError::Refused { .. } => {
            "Check repository URL and store options; `highwater config` shows them, `highwater check` tries them.".into()
        }
    }
}

/// Turns an error of the connection to PostgreSQL into a failure of `what`.
pub(crate) fn of_postgres(error: PgError, what: impl Into<String>, unharmed: &str) -> Failure {
    let (kind, next) = match (&error, error.sqlstate()) {
        (PgError::Settings(_), _) => (
            Kind::Usage,
            "Correct `--dsn` or the PG* variables; libpq's documentation lists the keywords.",
        ),
        (_, Some("42501")) => (
            Kind::Postgres,
            "Give the role what it lacks: `ALTER ROLE … REPLICATION` for backups, and a line `host replication <role> <address> scram-sha-256` in pg_hba.conf. `highwater check` looks at each.",
        ),
        (_, Some("28000" | "28P01")) | (PgError::Auth { .. }, _) => (
            Kind::Postgres,
            "Check user and password (`~/.pgpass`, PGPASSWORD) and pg_hba.conf: a backup needs a line whose database is `replication`; `all` does not match it.",
        ),
        (_, Some("XX001")) => (
            Kind::Integrity,
            "Pages on the server fail their checksum; its log names file and block. Keep all earlier backups, and find the damage with pg_amcheck and pg_checksums before anything else.",
        ),
        (_, Some("53300")) => {
            (Kind::Postgres, "Raise max_wal_senders or max_connections, or try again later.")
        }
        (PgError::Tls { .. }, _) => {
            (Kind::Postgres, "Check sslmode, sslrootcert and the server's certificate.")
        }
        _ => (
            Kind::Postgres,
            "Check that the server runs and can be reached with these settings, then try again.",
        ),
    };
    Failure::new(kind, what, unharmed, next).because(error)
}

/// Turns the end of a background task into a failure.
pub(crate) fn of_task(error: tokio::task::JoinError, unharmed: &str) -> Failure {
    Failure::new(
        Kind::Bug,
        "a background task failed",
        unharmed,
        "This is a defect of Highwater or a lack of memory; please report it with the lines above.",
    )
    .because(error)
}

/// Turns an error of the local disk into a failure of `what`.
pub(crate) fn of_disk(error: DiskError, what: impl Into<String>, unharmed: &str) -> Failure {
    let next = match &error {
        DiskError::Full { .. } => "Make room on that file system, then try again.",
        DiskError::Denied { .. } => {
            "Run as the user who owns the data directory, or mend the permissions."
        }
        DiskError::Missing { .. } => "Check the path.",
        DiskError::Exists { .. } => "Choose another path, or remove what is there if it is yours.",
        DiskError::Other { .. } => "Check the disk and its file system, then try again.",
    };
    Failure::new(Kind::Disk, what, unharmed, next).because(error)
}
