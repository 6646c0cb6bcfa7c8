//! What can go wrong between us and a PostgreSQL server, sorted by what a caller may do about it.
//!
//! No text here ever holds a password. `is_transient` is the one rule for
//! retries: it says whether the same attempt may succeed later unchanged.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::Bytes;

use super::conninfo::SettingsError;

/// An ErrorResponse of the server.
///
/// Source: PostgreSQL manual, "Error and Notice Message Fields"
/// (`doc/src/sgml/protocol.sgml`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerError {
    /// Who said it: `host:port`, or the path of the socket.
    pub place: String,
    /// `ERROR`, `FATAL` or `PANIC`, never translated.
    pub severity: String,
    /// The five characters of the SQLSTATE, such as `28P01`.
    pub sqlstate: String,
    /// The primary message, in the server's language.
    pub message: String,
    /// The secondary message; may be empty.
    pub detail: String,
    /// The server's advice; may be empty.
    pub hint: String,
    /// The function of the server's source that reported it; never translated,
    /// and empty where something in between leaves it out.
    pub routine: String,
}

impl ServerError {
    /// Reads the fields of an ErrorResponse or NoticeResponse body.
    ///
    /// A body that breaks off is read as far as it goes: what the server
    /// wanted to say matters more than the form.
    pub(super) fn from_body(place: &str, body: &Bytes) -> Self {
        let mut error = Self { place: place.to_owned(), ..Self::default() };
        let mut severity_translated = String::new();
        for field in body.split(|byte| *byte == 0) {
            let Some((code, text)) = field.split_first() else { continue };
            let text = String::from_utf8_lossy(text).into_owned();
            match code {
                b'V' => error.severity = text,
                b'S' => severity_translated = text,
                b'C' => error.sqlstate = text,
                b'M' => error.message = text,
                b'D' => error.detail = text,
                b'H' => error.hint = text,
                b'R' => error.routine = text,
                _ => {}
            }
        }
        if error.severity.is_empty() {
            error.severity = severity_translated;
        }
        error
    }

    /// Returns whether the server ends the connection after this error.
    pub(super) fn ends_connection(&self) -> bool {
        self.severity == "FATAL" || self.severity == "PANIC"
    }

    /// Classes 08 (connection), 53 (resources) and the states of a server that
    /// is going down, coming up or busy (`src/backend/utils/errcodes.txt`).
    fn is_transient(&self) -> bool {
        let state = self.sqlstate.as_str();
        state.starts_with("08")
            || state.starts_with("53")
            || matches!(state, "57P01" | "57P02" | "57P03" | "55006" | "40001" | "40P01")
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, severity, sqlstate, message, detail, hint, routine: _ } = self;
        write!(f, "PostgreSQL at {place}: {severity}: {message} (SQLSTATE {sqlstate})")?;
        if !detail.is_empty() {
            write!(f, "; detail: {detail}")?;
        }
        if !hint.is_empty() {
            write!(f, "; hint: {hint}")?;
        }
        Ok(())
    }
}

/// Any failure of a connection to PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// The connection settings are wrong; nothing was sent anywhere.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The address could not be found, or the socket could not be opened.
    #[error("could not connect to PostgreSQL at {place}: {cause}")]
    Connect {
        /// `host:port`, or the path of the socket.
        place: String,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// TLS could not be set up, or the certificate was not accepted.
    #[error("could not set up TLS with PostgreSQL at {place}: {reason}")]
    Tls {
        /// `host:port`.
        place: String,
        /// What was wrong, and where known how to mend it.
        reason: String,
    },
    /// We could not do, or would not do, the authentication that the server asked for.
    #[error("could not log in to PostgreSQL at {place}: {reason}")]
    Auth {
        /// `host:port`, or the path of the socket.
        place: String,
        /// What was wrong, and where known how to mend it.
        reason: String,
    },
    /// The server reported an error.
    #[error("{0}")]
    Server(Box<ServerError>),
    /// The server's bytes do not follow the protocol; the connection is unusable.
    #[error("PostgreSQL at {place} broke the protocol: {reason}")]
    Protocol {
        /// `host:port`, or the path of the socket.
        place: String,
        /// What was seen.
        reason: String,
    },
    /// Nothing came, or nothing could be sent, for `limit`; the connection is unusable.
    #[error("PostgreSQL at {place}: {activity} took longer than {} s", limit.as_secs_f64())]
    Timeout {
        /// `host:port`, or the path of the socket.
        place: String,
        /// What was being done.
        activity: &'static str,
        /// The limit that passed.
        limit: Duration,
    },
    /// The connection ended before the reply did.
    #[error("lost the connection to PostgreSQL at {place}: {reason}")]
    Closed {
        /// `host:port`, or the path of the socket.
        place: String,
        /// What was seen.
        reason: String,
    },
    /// The server is not of the kind that `target_session_attrs` wants.
    #[error("PostgreSQL at {place} is not what target_session_attrs={wanted} asks for")]
    Unsuitable {
        /// `host:port`, or the path of the socket.
        place: String,
        /// The value of `target_session_attrs`.
        wanted: &'static str,
    },
    /// We were asked for something that cannot be sent; nothing was.
    #[error("{0}")]
    Request(&'static str),
    /// More than one server, address or way was tried, and each failed; in the order tried.
    #[error("{}", Attempts(.0))]
    AllFailed(Vec<PgError>),
}

impl PgError {
    /// Returns whether the same attempt may succeed later with nothing changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { cause, .. } => !matches!(
                cause.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput
            ),
            Self::Timeout { .. } | Self::Closed { .. } | Self::Unsuitable { .. } => true,
            Self::Server(error) => error.is_transient(),
            Self::AllFailed(attempts) => attempts.iter().any(Self::is_transient),
            Self::Settings(_)
            | Self::Request(_)
            | Self::Tls { .. }
            | Self::Auth { .. }
            | Self::Protocol { .. } => false,
        }
    }

    /// Returns the SQLSTATE where a server reported one (of several attempts, the last).
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server(error) => Some(&error.sqlstate),
            Self::AllFailed(attempts) => attempts.iter().rev().find_map(Self::sqlstate),
            _ => None,
        }
    }

    /// Returns whether the server has no room for one more connection, or for one more that streams (53300).
    pub fn is_without_room(&self) -> bool {
        self.sqlstate() == Some("53300")
    }

    /// Returns whether the server is there and takes no connections now: it shuts down, or starts and recovers. It
    /// says so before it looks who asks.
    pub fn is_no_time_for_connections(&self) -> bool {
        self.sqlstate() == Some("57P03")
    }

    /// Returns whether the replication slot is in use by somebody else, or
    /// still by a connection of ours that the server has not given up yet. A
    /// retry can cure it. Also said of a slot that is to be dropped.
    pub fn is_slot_in_use(&self) -> bool {
        self.sqlstate() == Some("55006")
    }

    /// Returns whether the replication slot named does not exist.
    pub fn is_slot_absent(&self) -> bool {
        self.sqlstate() == Some("42704")
    }

    /// Returns whether the replication slot that was to be made exists already.
    pub fn is_slot_there_already(&self) -> bool {
        self.sqlstate() == Some("42710")
    }

    /// Returns whether the server gave up the slot (`wal_status` is `lost`):
    /// it can only be dropped. Only PostgreSQL 18 says so; see the head of
    /// `slots.rs` for what earlier ones do.
    ///
    /// The same SQLSTATE tells of a logical slot, so the function that
    /// reported it counts: `ReplicationSlotAcquire` in `slot.c`.
    pub fn is_slot_lost(&self) -> bool {
        self.reported("55000", "ReplicationSlotAcquire").is_some()
    }

    /// Returns whether the server no longer has the WAL to stream. Of
    /// TIMELINE_HISTORY the same SQLSTATE (58P01) says that there is no such file.
    ///
    /// A segment that goes away while it is sent is reported by
    /// `CheckXLogRemoved` in `xlog.c`, under whatever SQLSTATE an old `errno`
    /// gives (XX000 was seen).
    pub fn is_wal_removed(&self) -> bool {
        self.is_file_absent()
            || matches!(self, Self::Server(error) if error.routine == "CheckXLogRemoved")
    }

    /// Returns whether the server looked for a file that it does not have (58P01): WAL, or a timeline history.
    pub fn is_file_absent(&self) -> bool {
        matches!(self, Self::Server(error) if error.sqlstate == "58P01")
    }

    /// Returns whether the place to stream from is not in the server's history:
    /// the timeline is none of its ancestors, or it left that timeline before
    /// the place. The server has another past than who asked.
    ///
    /// There is no SQLSTATE of its own (XX000), so the function that reported
    /// it counts: `tliSwitchPoint` in `timeline.c`, `StartReplication` in
    /// `walsender.c`, whose other error of the kind has no detail.
    pub fn is_not_in_history(&self) -> bool {
        self.reported("XX000", "tliSwitchPoint").is_some()
            || self.reported("XX000", "StartReplication").is_some_and(|e| !e.detail.is_empty())
    }

    /// Returns whether the place to stream from is past the end of the
    /// server's WAL: it lags behind, or lost its tail. By the same rule as
    /// [`Self::is_not_in_history`].
    pub fn is_ahead_of_server(&self) -> bool {
        self.reported("XX000", "StartReplication").is_some_and(|e| e.detail.is_empty())
    }

    fn reported(&self, sqlstate: &str, routine: &str) -> Option<&ServerError> {
        match self {
            Self::Server(error) if error.sqlstate == sqlstate && error.routine == routine => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Folds the failures of several attempts; one stands for itself.
    pub(super) fn of_attempts(mut attempts: Vec<Self>) -> Self {
        match attempts.pop() {
            Some(only) if attempts.is_empty() => only,
            Some(last) => {
                attempts.push(last);
                Self::AllFailed(attempts)
            }
            None => Self::Settings(SettingsError::NoHost),
        }
    }
}

struct Attempts<'a>(&'a [PgError]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, attempt) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str("; then ")?;
            }
            write!(f, "{attempt}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(sqlstate: &str) -> PgError {
        let body =
            format!("SERREUR\0VFATAL\0C{sqlstate}\0Mno such luck\0Dthe detail\0Htry again\0\0");
        PgError::Server(Box::new(ServerError::from_body("db:5432", &Bytes::from(body))))
    }

    #[test]
    fn a_server_error_is_told_whole_and_with_its_untranslated_severity() {
        assert_eq!(
            server("57P03").to_string(),
            "PostgreSQL at db:5432: FATAL: no such luck (SQLSTATE 57P03); detail: the detail; \
             hint: try again"
        );
    }

    #[test]
    fn a_starting_server_is_worth_a_retry_and_a_wrong_password_is_not() {
        for (sqlstate, transient) in
            [("57P03", true), ("53300", true), ("55006", true), ("28P01", false), ("58P01", false)]
        {
            assert_eq!(server(sqlstate).is_transient(), transient, "{sqlstate}");
        }
    }

    #[test]
    fn errors_of_replication_are_told_apart_by_who_in_the_server_reports_them() {
        let of = |sqlstate: &str, routine: &str, detail: &str| {
            PgError::Server(Box::new(ServerError {
                sqlstate: sqlstate.to_owned(),
                routine: routine.to_owned(),
                detail: detail.to_owned(),
                ..ServerError::default()
            }))
        };
        let lost = of("55000", "ReplicationSlotAcquire", "it has been invalidated");
        let logical = of("55000", "StartReplication", "");
        assert!(lost.is_slot_lost() && !logical.is_slot_lost());
        let unknown = of("XX000", "tliSwitchPoint", "");
        let left_before = of("XX000", "StartReplication", "it forked");
        let ahead = of("XX000", "StartReplication", "");
        assert!(unknown.is_not_in_history() && left_before.is_not_in_history());
        assert!(ahead.is_ahead_of_server() && !ahead.is_not_in_history());
        assert!(!left_before.is_ahead_of_server());
        for gone in [of("58P01", "WalSndSegmentOpen", ""), of("XX000", "CheckXLogRemoved", "")] {
            assert!(gone.is_wal_removed() && !gone.is_ahead_of_server());
        }
        let body = Bytes::from_static(b"SERROR\0CXX000\0RtliSwitchPoint\0\0");
        assert_eq!(ServerError::from_body("db:5432", &body).routine, "tliSwitchPoint");
    }

    #[test]
    fn of_several_attempts_each_is_named_in_order() {
        let first = PgError::Connect {
            place: "a:1".to_owned(),
            cause: io::Error::from(io::ErrorKind::ConnectionRefused),
        };
        let error = PgError::of_attempts(vec![first, server("28P01")]);
        assert!(error.is_transient(), "the first server may come back");
        assert_eq!(error.sqlstate(), Some("28P01"));
        let text = error.to_string();
        assert!(text.starts_with("could not connect to PostgreSQL at a:1: "), "{text}");
        assert!(text.contains("; then PostgreSQL at db:5432: FATAL"), "{text}");
    }
}
