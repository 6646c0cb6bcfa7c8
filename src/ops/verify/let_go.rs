//! WAL that was let go: a finding, until a backup behind it has made it unneeded.

use super::Verifying;
use super::findings::{About, Fault, Raw};
use crate::failure::Failure;
use crate::format::WalGap;
use crate::plan::stall::{closed_by, is_stored};
use crate::plan::window::Hole;

impl Verifying<'_> {
    /// Compares holes with what is recorded of WAL that was let go: a hole has its reason then, and is no finding once a
    /// backup begins behind it. What was let go at the end of WAL, where nothing follows, is one as well.
    pub(super) async fn judge_let_go(&mut self, holes: Vec<Raw>) -> Result<Vec<Raw>, Failure> {
        let gaps = self.repository.gaps().await;
        let gaps = gaps.map_err(|error| self.failed(error, "read what was let go"))?;
        let mut found = holes;
        for (key, gap) in gaps {
            self.check_stop().await?;
            self.checked += 1;
            let gap = match gap {
                Ok(gap) => gap,
                Err(error) => {
                    let read = Fault::of(error);
                    let (fault, why) = read.map_err(|error| self.failed(error, "read a record"))?;
                    found.push(Raw { about: About::LetGo(key), fault, why });
                    continue;
                }
            };
            found = self.judge(&gap, found);
        }
        Ok(found)
    }

    fn judge(&mut self, gap: &WalGap, mut found: Vec<Raw>) -> Vec<Raw> {
        let Some(one) = self.incarnation(gap.system_identifier) else { return found };
        let ranges = one.coverage.get(&gap.timeline).map_or(&[][..], Vec::as_slice);
        if is_stored(gap, ranges) {
            return found;
        }
        if let Some(id) = closed_by(gap, &one.backups) {
            self.notes.push(format!(
                "WAL from {} to {} on timeline {} was let go at {} on {}; backup {id} begins behind it",
                gap.start_lsn, gap.end_lsn, gap.timeline, gap.let_go_at, gap.host
            ));
            return found.into_iter().flat_map(|raw| outside(raw, gap)).collect();
        }
        let why = format!("it was let go at {} on {}: {}", gap.let_go_at, gap.host, gap.why);
        let mut is_told = false;
        for raw in &mut found {
            if let About::Hole(system_id, hole) = &raw.about
                && *system_id == gap.system_identifier
                && gap.overlaps(hole.timeline, hole.start_lsn, hole.end_lsn)
            {
                raw.why.clone_from(&why);
                is_told = true;
            }
        }
        if !is_told {
            let WalGap { timeline, start_lsn, end_lsn, .. } = *gap;
            let hole = Hole { timeline, start_lsn, end_lsn };
            let about = About::Hole(gap.system_identifier, hole);
            found.push(Raw { about, fault: Fault::Gap, why });
        }
        found
    }
}

/// Returns what of a finding is not in a gap; all of it, if it is no hole there.
fn outside(raw: Raw, gap: &WalGap) -> Vec<Raw> {
    let About::Hole(system_id, hole) = &raw.about else { return vec![raw] };
    let is_elsewhere = *system_id != gap.system_identifier
        || !gap.overlaps(hole.timeline, hole.start_lsn, hole.end_lsn);
    if is_elsewhere {
        return vec![raw];
    }
    let parts = [
        Hole { end_lsn: hole.end_lsn.min(gap.start_lsn), ..*hole },
        Hole { start_lsn: hole.start_lsn.max(gap.end_lsn), ..*hole },
    ];
    let left = parts.into_iter().filter(|part| part.start_lsn < part.end_lsn);
    left.map(|part| Raw { about: About::Hole(*system_id, part), ..raw.clone() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::{Lsn, SystemId, Timeline};

    #[test]
    fn only_the_part_of_a_hole_that_was_let_go_is_excused() {
        let hole = |system_id, start, end| {
            let hole = Hole { timeline: Timeline(1), start_lsn: Lsn(start), end_lsn: Lsn(end) };
            let about = About::Hole(SystemId(system_id), hole);
            Raw { about, fault: Fault::Gap, why: String::new() }
        };
        let left = |raw: Raw| outside(raw, &WalGap::sample(16, 32));
        assert_eq!(left(hole(7, 16, 32)), []);
        assert_eq!(left(hole(7, 20, 30)), []);
        assert_eq!(left(hole(7, 0, 64)), [hole(7, 0, 16), hole(7, 32, 64)]);
        assert_eq!(left(hole(7, 32, 64)), [hole(7, 32, 64)], "behind it");
        assert_eq!(left(hole(8, 16, 32)), [hole(8, 16, 32)], "another cluster's");
    }
}
