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
use crate::plan::changed_chunks::{ChangedChunks, Coverage, coverage};
use crate::walsender::{ManifestChecksums, Rows};

/// The first version with WAL summaries.
const SUMMARIES_FROM: MajorVersion = MajorVersion(17);

/// How long the summarizer may bring nothing new on its way to the backup's start, and how often is
/// looked.
const NOTHING_NEW_MAX: Duration = Duration::from_secs(5);
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
        let is_covered = self.coverage(&mut session).await? == Coverage::Whole;
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
        let (mut reached, mut since) = (Lsn(0), Instant::now());
        loop {
            match self.coverage(session).await? {
                Coverage::Whole => return Ok(true),
                Coverage::Hole => return Ok(false),
                Coverage::Until(end) if end > reached => (reached, since) = (end, Instant::now()),
                Coverage::Until(_) if since.elapsed() >= NOTHING_NEW_MAX => return Ok(false),
                Coverage::Until(_) => {}
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn coverage(&self, session: &mut Session) -> Result<Coverage, Failure> {
        let query =
            format!("SELECT start_lsn, end_lsn FROM {SUMMARIES} WHERE {}", self.condition());
        let rows = session.ask(&query, "could not list the server's WAL summaries").await?;
        let lsn = |row, column| rows.get(row, column).and_then(|text| text.parse::<Lsn>().ok());
        let found: Option<Vec<_>> = (0..rows.rows.len())
            .map(|row| Some((lsn(row, "start_lsn")?, lsn(row, "end_lsn")?)))
            .collect();
        let found = found.ok_or_else(super::session::nonsense)?;
        Ok(coverage(&found, self.from, self.to))
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
