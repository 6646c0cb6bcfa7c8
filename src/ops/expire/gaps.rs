//! Records of WAL that was let go: they go with the WAL around it.

use super::Expiring;
use super::deleting::Doomed;
use crate::failure::Failure;
use crate::format::WalGap;
use crate::plan::retention::KeptWal;

impl Expiring<'_> {
    /// Deletes the records of gaps of which no segment would stay, were it there. One that cannot be read stays.
    pub(super) async fn delete_gaps(&mut self) -> Result<(), Failure> {
        let gaps = self.repository.gaps().await;
        let gaps = gaps.map_err(|error| self.failed(error, "read what was let go"))?;
        let goes = |gap: &WalGap| {
            self.plan.wal.get(&gap.system_identifier).is_some_and(|kept| is_unneeded(kept, gap))
        };
        let read = gaps.into_iter().filter_map(|(key, gap)| Some((key, gap.ok()?)));
        let doomed = read.filter(|(_, gap)| goes(gap)).map(|(key, _)| Doomed { key, bytes: 0 });
        let doomed: Vec<Doomed> = doomed.collect();
        self.deleting.all(doomed).await
    }
}

fn is_unneeded(kept: &KeptWal, gap: &WalGap) -> bool {
    let size = kept.segment_size;
    let first = size.segment_of(gap.start_lsn);
    let end = size.segment_of(gap.end_lsn).max(first + 1);
    let going = kept.going(gap.timeline, first..end);
    going.len() == 1 && going.first() == Some(&(first..end))
}
