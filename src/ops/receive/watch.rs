//! A look at the server now and then, over an ordinary connection: does the slot still
//! protect our WAL, does anybody wait for us unawares, and is there another like us?
//!
//! Where no ordinary connection is allowed (only the replication line in pg_hba.conf),
//! streaming goes on without these warnings, and that is said once. Whether the server shuts down it says before it
//! looks at its `pg_hba.conf`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::Request;
use super::source::{Facts, Source};
use crate::ops::slot_view::view_slot;
use crate::walsender::{ConnInfo, Connection, Mode, PgError, SlotName};

/// How often the server is looked at.
const INTERVAL: Duration = Duration::from_mins(1);

/// When it is looked at again after the first time, since the stream begins only then, and as long as the slot's room
/// shrinks: a minute of a busy server's WAL may be all that is left.
const SOON: Duration = Duration::from_secs(5);

/// What was seen that the stream must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// The slot protects nothing any more.
    SlotLost,
    /// The server takes no connections, since it shuts down.
    ShutsDown,
}

/// Looks at the server until it is aborted.
#[derive(Debug)]
pub(super) struct Watch {
    task: JoinHandle<()>,
    wanted: Arc<Notify>,
    /// Gives what the stream must know.
    pub(super) news: mpsc::Receiver<News>,
}

impl Watch {
    /// Looks at the server now, and not only when its time has come.
    pub(super) fn look_now(&self) {
        self.wanted.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn begin(request: &Request, source: &Source) -> Watch {
    let (sender, news) = mpsc::channel(1);
    let facts: &Facts = &source.facts;
    let wanted = Arc::new(Notify::new());
    let looking = Looking {
        server: facts.server.clone(),
        slot: request.slot.clone(),
        synchronous: request.synchronous,
        application_name: request.server.application_name().to_owned(),
        news: sender,
        told: BTreeSet::new(),
        soon: true,
    };
    let task = tokio::spawn(looking.go(Arc::clone(&wanted)).in_current_span());
    Watch { task, wanted, news }
}

struct Looking {
    server: ConnInfo,
    slot: Option<SlotName>,
    synchronous: bool,
    application_name: String,
    news: mpsc::Sender<News>,
    told: BTreeSet<Told>,
    /// Whether the next look comes sooner than usual.
    soon: bool,
}

/// What is said once while it is so: a warning a minute would hide everything else.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    NoConnection,
    SlotInDanger,
    WaitedForUnawares,
    Another,
}

impl Looking {
    async fn go(mut self, wanted: Arc<Notify>) {
        loop {
            let pause = if self.soon { SOON } else { INTERVAL };
            if let Err(error) = self.look().await {
                self.tell_unseen(&error);
            }
            // Nothing is lost if the time is up first.
            drop(tokio::time::timeout(pause, wanted.notified()).await);
        }
    }

    /// Returns whether something is so that was not so when it was looked last.
    fn is_news(&mut self, what: Told, is_so: bool) -> bool {
        if is_so {
            return self.told.insert(what);
        }
        self.told.remove(&what);
        false
    }

    fn tell_unseen(&mut self, error: &PgError) {
        if error.is_no_time_for_connections() {
            let _ = self.news.try_send(News::ShutsDown);
        } else if self.is_news(Told::NoConnection, true) {
            tracing::info!(
                "slot and synchronous state are not watched, since an ordinary connection was refused: {error}"
            );
        }
    }

    async fn look(&mut self) -> Result<(), PgError> {
        self.soon = false;
        let mut connection = Connection::connect(&self.server, Mode::Sql).await?;
        self.look_at_slot(&mut connection).await?;
        self.look_at_role(&mut connection).await?;
        connection.close().await;
        Ok(())
    }

    async fn look_at_slot(&mut self, connection: &mut Connection) -> Result<(), PgError> {
        let Some(slot) = self.slot.clone() else { return Ok(()) };
        let room = view_slot(connection, &slot).await?.unwrap_or_default().room;
        if room.wal_status == "lost" {
            let _ = self.news.try_send(News::SlotLost);
        }
        self.soon = room.is_shrinking();
        if self.is_news(Told::SlotInDanger, room.is_in_danger()) {
            tracing::warn!(
                "replication slot `{slot}` is about to lose WAL that is not stored yet (wal_status {}, {} bytes left): the store is too slow for this server, or max_slot_wal_keep_size too small",
                room.wal_status,
                room.safe_bytes.unwrap_or_default()
            );
        }
        Ok(())
    }

    async fn look_at_role(&mut self, connection: &mut Connection) -> Result<(), PgError> {
        let query = format!(
            "SELECT sync_state FROM pg_catalog.pg_stat_replication WHERE application_name = '{}' AND state IN ('streaming', 'catchup')",
            self.application_name.replace('\'', "''")
        );
        let rows = connection.query(&query).await?;
        // Without pg_monitor none is seen.
        let states = || (0..rows.rows.len()).filter_map(|row| rows.get(row, "sync_state"));
        let is_waited_for = states().any(|state| matches!(state, "sync" | "quorum"));
        let is_unawares = is_waited_for && !self.synchronous;
        if self.is_news(Told::WaitedForUnawares, is_unawares) {
            tracing::warn!(
                "synchronous_standby_names makes commits wait for this receiver, which stores only every so often (`rpo`): start it with `--synchronous`, or take it out of synchronous_standby_names"
            );
        }
        if self.is_news(Told::Another, states().count() > 1) {
            tracing::warn!(
                "{} receivers called `{}` stream from this server, each with a slot of its own or none. They do no harm, but one is enough: stop the others and drop their slots. If there is no other, it is an earlier connection that the server has not given up yet (wal_sender_timeout)",
                states().count(),
                self.application_name
            );
        }
        Ok(())
    }
}
