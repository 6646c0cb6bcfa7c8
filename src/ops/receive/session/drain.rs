//! The end of a stream: everything that was received is stored before anything else happens.
//!
//! Whatever ended it: perhaps the server is gone for good, and these bytes are nowhere else.

use tokio::time::Instant;

use super::Session;
use crate::failure::{Failure, Kind};
use crate::ops::StopRequest;
use crate::ops::receive::line::Line;
use crate::plan::receive::Progress;

impl Session<'_> {
    /// Stores everything that was received. An ordered stop limits how long that may take. As long as there is
    /// a `line`, the server is told of each piece: commits may be waiting for it.
    pub(super) async fn drain(
        &mut self,
        stop: &mut StopRequest,
        mut line: Option<&mut Line>,
    ) -> Result<(), Failure> {
        self.cut()?;
        if let Some(line) = &mut line {
            line.listens(false);
        }
        while !self.uploads.is_settled() {
            if let Some(telling) = &mut line
                && telling.tell(&self.progress).await.is_err()
            {
                // What is in hand is stored all the same.
                line = None;
            }
            if stop.is_wanted() && self.stop_at.is_none() {
                self.stop_at = Some(Instant::now() + self.request.stop_deadline);
            }
            let stop_at = self.stop_at;
            tokio::select! {
                settled = self.uploads.next() => {
                    self.settle(settled?);
                }
                lives = status_due(&mut line, &self.progress) => if !lives { line = None },
                _ = stop.wanted(), if stop_at.is_none() => {}
                () = tokio::time::sleep_until(stop_at.unwrap_or(self.began)), if stop_at.is_some() => {
                    return Err(self.not_stored_in_time());
                }
            }
        }
        self.report.stored_lsn = Some(self.stored_lsn());
        Ok(())
    }

    fn not_stored_in_time(&self) -> Failure {
        Failure::new(
            Kind::Store,
            format!(
                "WAL from {} to {} was received and is not stored: the store did not take it within {} s of the order to stop",
                self.progress.stored_lsn(),
                self.progress.write_lsn(),
                self.request.stop_deadline.as_secs()
            ),
            "It was never acknowledged. The server keeps it where it has a slot or archive_command.",
            "Mend the store and start `highwater receive` again: it goes on at the first byte that is not stored.",
        )
    }
}

/// Sends the next status when it is due; returns whether that went well. Never returns without a line.
async fn status_due(line: &mut Option<&mut Line>, progress: &Progress) -> bool {
    let Some(line) = line else { return std::future::pending().await };
    line.timer.tick().await;
    line.keep_alive(progress).await.is_ok()
}
