//! A statement that runs beside the test, since it may wait for something that the test does.

use super::cluster::Cluster;
use super::wait::passes_within;
use std::process::{Child, Stdio};
use std::time::Duration;

/// Counts the commits that wait for a standby.
pub const WAITING_COMMITS: &str =
    "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";

/// A statement in a session of its own, which ends when this is dropped.
pub struct Statement {
    sql: String,
    psql: Child,
}

impl Statement {
    /// Begins it.
    pub fn begin(cluster: &Cluster, sql: &str) -> Self {
        let mut psql = cluster.client("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql]);
        psql.stdin(Stdio::null()).stdout(Stdio::null());
        Self { sql: sql.to_owned(), psql: psql.spawn().expect("psql starts") }
    }

    /// Returns whether it has returned within this time; fails unless it succeeded then.
    #[track_caller]
    pub fn returns_within(&mut self, limit: Duration) -> bool {
        let mut status = None;
        let ended = passes_within(limit, || {
            status = self.psql.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.is_none_or(|status| status.success()), "{}: {status:?}", self.sql);
        ended
    }
}

impl Drop for Statement {
    fn drop(&mut self) {
        self.psql.kill().ok();
        self.psql.wait().ok();
    }
}
