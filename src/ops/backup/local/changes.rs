//! What changed since the backup before, as the server's WAL summaries say (PostgreSQL 17 on, with
//! `summarize_wal`).
//!
//! Asked over a connection of its own: whatever goes wrong with it, the backup goes on and reads more.

use std::time::Duration;

use tokio::time::Instant;

use super::super::Request;
use super::super::server::Facts;
use super::session::{Session, Started};
use crate::failure::Failure;
use crate::format::Committed;
use crate::pg::{ControlFile, Lsn, MajorVersion, RelFileLocator};
use crate::plan::changed_chunks::{ChangedChunks, covers};
use crate::walsender::{ManifestChecksums, Rows};

/// The first version with WAL summaries.
const SUMMARIES_FROM: MajorVersion = MajorVersion(17);

/// How long the summarizer has to reach the backup's start, and how often is looked.
const SUMMARIZED_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Returns what changed between the start of the backup before and the start of this one; `None`
/// where that is not known, so that every file is read that was written to.
pub(super) async fn find(
    request: &Request,
    facts: &Facts,
    control: &ControlFile,
    before: &Committed,
    started: &Started,
) -> Option<ChangedChunks> {
    let on_one_timeline =
        before.timeline == facts.timeline && before.stop_timeline == facts.timeline;
    let can_be_asked = facts.version.major() >= SUMMARIES_FROM
        && !matches!(request.source, super::super::Source::Files { rehash: true, .. })
        // Only of CRC-32C is a file's checksum known without its bytes.
        && request.manifest_checksums == ManifestChecksums::Crc32c
        && before.read_from.is_some()
        && before.damaged_pages.is_empty()
        && before.start_lsn <= started.start_lsn
        && on_one_timeline;
    if !can_be_asked {
        return None;
    }
    let changes = ChangedChunks::new(control.block_size, control.relation_segment_blocks)?;
    let asking = Asking { request, facts, from: before.start_lsn, to: started.start_lsn };
    match asking.run(changes).await {
        Ok(found) => found,
        Err(failure) => {
            tracing::info!("WAL summaries are not used: {failure}");
            None
        }
    }
}

struct Asking<'a> {
    request: &'a Request,
    facts: &'a Facts,
    from: Lsn,
    to: Lsn,
}

impl Asking<'_> {
    async fn run(&self, mut changes: ChangedChunks) -> Result<Option<ChangedChunks>, Failure> {
        let mut session = Session::open(self.request, self.facts).await?;
        if session.setting("summarize_wal").await?.as_deref() != Some("on") {
            return Ok(None);
        }
        if !self.wait(&mut session).await? {
            tracing::info!("WAL summaries do not cover {} to {}", self.from, self.to);
            return Ok(None);
        }
        let query = format!(
            "SELECT c.reltablespace, c.reldatabase, c.relfilenode, \
             pg_catalog.min(c.relblocknumber) FILTER (WHERE c.is_limit_block) AS limit_block, \
             pg_catalog.string_agg(DISTINCT (c.relblocknumber / {})::text, ',') \
             FILTER (WHERE NOT c.is_limit_block) AS chunks \
             FROM {}, LATERAL pg_catalog.pg_wal_summary_contents(s.tli, s.start_lsn, s.end_lsn) c \
             WHERE {} AND c.relforknumber = 0 GROUP BY 1, 2, 3",
            changes.blocks_per_chunk(),
            SUMMARIES,
            self.condition(),
        );
        let rows = session.ask(&query, "could not read the server's WAL summaries").await?;
        for row in 0..rows.rows.len() {
            add(&mut changes, &rows, row).ok_or_else(super::session::nonsense)?;
        }
        // The contents are those of what stood there: a summary that was removed meanwhile is missing.
        let is_covered = self.is_covered(&mut session).await?;
        session.close().await;
        Ok(is_covered.then_some(changes))
    }

    fn condition(&self) -> String {
        format!(
            "s.tli = {} AND s.end_lsn > '{}' AND s.start_lsn < '{}'",
            self.facts.timeline, self.from, self.to
        )
    }

    /// Waits until the summarizer has reached the backup's start.
    async fn wait(&self, session: &mut Session) -> Result<bool, Failure> {
        let deadline = Instant::now() + SUMMARIZED_WITHIN;
        loop {
            if self.is_covered(session).await? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn is_covered(&self, session: &mut Session) -> Result<bool, Failure> {
        let query =
            format!("SELECT start_lsn, end_lsn FROM {SUMMARIES} WHERE {}", self.condition());
        let rows = session.ask(&query, "could not list the server's WAL summaries").await?;
        let lsn = |row, column| rows.get(row, column).and_then(|text| text.parse::<Lsn>().ok());
        let found: Option<Vec<_>> = (0..rows.rows.len())
            .map(|row| Some((lsn(row, "start_lsn")?, lsn(row, "end_lsn")?)))
            .collect();
        Ok(found.is_some_and(|summaries| covers(&summaries, self.from, self.to)))
    }
}

const SUMMARIES: &str = "pg_catalog.pg_available_wal_summaries() s";

fn add(changes: &mut ChangedChunks, rows: &Rows, row: usize) -> Option<()> {
    let number = |column| rows.get(row, column)?.parse::<u32>().ok();
    let relation = RelFileLocator {
        tablespace: number("reltablespace")?,
        database: number("reldatabase")?,
        relation: number("relfilenode")?,
    };
    let limit_block = match rows.get(row, "limit_block") {
        Some(text) => Some(text.parse().ok()?),
        None => None,
    };
    let chunks = rows.get(row, "chunks").unwrap_or_default();
    let chunks: Option<Vec<u64>> =
        chunks.split(',').filter(|text| !text.is_empty()).map(|text| text.parse().ok()).collect();
    changes.add(relation, limit_block, chunks?);
    Some(())
}
