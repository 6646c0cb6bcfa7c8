//! Segment after segment along a route, some ahead, joined and given on in the order asked for.

use futures_util::StreamExt;

use super::scan::{Head, Scanned, SegmentRead, Source};
use super::telling::{Teller, Told};
use crate::failure::Failure;
use crate::ops::failures::{of_repo, of_task};
use crate::plan::log::filter::Outside;
use crate::plan::log::fold::Keep;
use crate::plan::log::order::Assembler;
use crate::plan::log::route::{Route, SegmentStop, Stop};
use crate::plan::window::Gap;
use crate::repo::RepoError;

/// Segments that are fetched and walked at a time.
const IN_FLIGHT: usize = 3;

/// So many segments in a row, all of them beyond the time asked for, are the end: clocks step, but not for so long.
const BEYOND_MAX: u32 = 16;

/// A segment whose last record may go on into the next.
struct Pending {
    stop: SegmentStop,
    read: Box<SegmentRead>,
}

/// Reads a route.
pub(super) struct Reader<'r, 't, 'n> {
    source: &'r Source,
    teller: &'r mut Teller<'t, 'n>,
    assembler: Assembler,
    /// Oldest first: the segment before, which waits for this one's beginning.
    pending: Option<Pending>,
    /// Newest first: the beginning of the segment that was read last.
    newer: Option<(SegmentStop, Head)>,
    /// A gap that was met, and not told yet: nobody may have asked for what lies around it.
    gap: Option<Gap>,
    was_read: bool,
    beyond: u32,
}

type Flow = Result<Told, Failure>;

impl<'r, 't, 'n> Reader<'r, 't, 'n> {
    pub(super) fn new(source: &'r Source, teller: &'r mut Teller<'t, 'n>) -> Self {
        Self {
            source,
            teller,
            assembler: Assembler::new(source.order),
            pending: None,
            newer: None,
            gap: None,
            was_read: false,
            beyond: 0,
        }
    }

    /// Reads all that is wanted of a route, or until whoever listens has enough.
    pub(super) async fn run(mut self, route: &Route) -> Result<(), Failure> {
        let stops: Box<dyn Iterator<Item = Stop> + Send + '_> = match self.source.order {
            Keep::Newest => Box::new(route.stops().rev()),
            Keep::Oldest => Box::new(route.stops()),
        };
        let source = self.source;
        let scans = stops.map(|stop| async move {
            let Stop::Segment(segment) = stop else { return Ok((stop, None)) };
            let own = source.clone();
            let task = tokio::spawn(async move { own.scan(segment, false).await });
            match task.await {
                Ok(scanned) => Ok((stop, Some(scanned.map_err(not_read)?))),
                Err(error) => Err(of_task(error, super::UNHARMED)),
            }
        });
        let mut scans = std::pin::pin!(futures_util::stream::iter(scans).buffered(IN_FLIGHT));
        while let Some(scanned) = scans.next().await {
            let told = match scanned? {
                (Stop::Gap(gap), _) => self.meet_gap(gap).await?,
                (Stop::Segment(stop), Some(scanned)) => self.take(stop, scanned).await?,
                (Stop::Segment(_), None) => Told::GoOn,
            };
            if told == Told::Enough {
                return Ok(());
            }
        }
        if self.end_stretch().await? == Told::GoOn {
            self.teller.reached_end();
        }
        Ok(())
    }

    async fn take(&mut self, stop: SegmentStop, mut scanned: Scanned) -> Flow {
        if let Scanned::Skipped(skipped) = scanned {
            let is_last_way = match self.source.order {
                Keep::Newest => skipped.outside == Outside::Before,
                Keep::Oldest => skipped.outside == Outside::Behind,
            };
            if is_last_way && self.assembler.is_waiting() {
                // What began here ends in something that is wanted.
                scanned = self.source.scan(stop, true).await.map_err(not_read)?;
            } else {
                self.beyond = if is_last_way { self.beyond + 1 } else { 0 };
                if self.end_stretch().await? == Told::Enough {
                    return Ok(Told::Enough);
                }
                self.newer = None;
                self.was_read = false;
                if is_last_way && (skipped.is_by_place || self.beyond >= BEYOND_MAX) {
                    self.teller.reached_end();
                    return Ok(Told::Enough);
                }
                return Ok(Told::GoOn);
            }
        }
        let told = match self.gap.take() {
            Some(gap) => self.teller.gap(gap, None)?,
            None => Told::GoOn,
        };
        if told == Told::Enough {
            return Ok(told);
        }
        match scanned {
            Scanned::Read(read) => {
                self.beyond = 0;
                self.was_read = true;
                match self.source.order {
                    Keep::Newest => self.take_older(stop, read).await,
                    Keep::Oldest => self.take_newer(stop, read).await,
                }
            }
            Scanned::Lost(why) => self.lose(stop, why).await,
            Scanned::Skipped(_) => Ok(Told::GoOn),
        }
    }

    async fn take_older(&mut self, stop: SegmentStop, mut read: Box<SegmentRead>) -> Flow {
        let newer = self.newer.take().filter(|(newer, _)| Some(newer.name) == stop.next);
        let ends_early = read.carry.is_none() && newer.is_some();
        if ends_early && self.end_early(stop, &read).await? == Told::Enough {
            return Ok(Told::Enough);
        }
        let head = newer.as_ref().map(|(_, head)| head);
        self.source.join(&mut read, stop, head).await.map_err(not_read)?;
        self.newer = Some((stop, std::mem::take(&mut read.head)));
        self.digest(stop, read).await
    }

    async fn take_newer(&mut self, stop: SegmentStop, read: Box<SegmentRead>) -> Flow {
        let told = match self.pending.take() {
            Some(before) if before.stop.next == Some(stop.name) => {
                let Pending { stop: earlier, read: mut older } = before;
                if older.carry.is_none() {
                    let early = Gap {
                        start_lsn: older.valid_end,
                        end_lsn: self.source.size.start_of(stop.number),
                    };
                    let told = self.digest(earlier, older).await?;
                    self.flush_and_tell(told, early).await?
                } else {
                    let joined = self.source.join(&mut older, earlier, Some(&read.head));
                    joined.await.map_err(not_read)?;
                    self.digest(earlier, older).await?
                }
            }
            Some(before) => self.digest(before.stop, before.read).await?,
            None => Told::GoOn,
        };
        self.pending = Some(Pending { stop, read });
        Ok(told)
    }

    /// Valid WAL ends in a segment though another follows: a `.partial`, or pieces of which the last were lost.
    async fn end_early(&mut self, stop: SegmentStop, read: &SegmentRead) -> Flow {
        let end_lsn = self.source.size.start_of(stop.number + 1);
        let early = Gap { start_lsn: read.valid_end, end_lsn };
        self.flush_and_tell(Told::GoOn, early).await
    }

    async fn flush_and_tell(&mut self, told: Told, gap: Gap) -> Flow {
        if told == Told::Enough || self.flush().await? == Told::Enough {
            return Ok(Told::Enough);
        }
        self.teller.gap(gap, None)
    }

    /// Gives on what a segment holds, in as many passes as its entries need.
    async fn digest(&mut self, stop: SegmentStop, read: Box<SegmentRead>) -> Flow {
        let SegmentRead { fold, mut pass, .. } = *read;
        let mut digest = fold.finish();
        let mut is_first = true;
        loop {
            let cut = digest.cut;
            for entry in self.assembler.add(digest, is_first, cut.is_none()) {
                if self.teller.entry(entry).await? == Told::Enough {
                    return Ok(Told::Enough);
                }
            }
            let Some(cut) = cut else { return Ok(Told::GoOn) };
            is_first = false;
            pass = pass.beyond(cut);
            let again = self.source.read(stop, pass.clone()).await.map_err(not_read)?;
            let Scanned::Read(mut again) = again else {
                let start_lsn = self.source.size.start_of(stop.number);
                let lost = Gap { start_lsn, end_lsn: stop.end_lsn };
                return self.flush_and_tell(Told::GoOn, lost).await;
            };
            self.source.join(&mut again, stop, None).await.map_err(not_read)?;
            digest = again.fold.finish();
        }
    }

    async fn meet_gap(&mut self, gap: Gap) -> Flow {
        if self.end_stretch().await? == Told::Enough {
            return Ok(Told::Enough);
        }
        self.newer = None;
        if self.was_read {
            return self.teller.gap(gap, None);
        }
        self.gap = Some(gap);
        Ok(Told::GoOn)
    }

    async fn lose(&mut self, stop: SegmentStop, why: String) -> Flow {
        if self.end_stretch().await? == Told::Enough {
            return Ok(Told::Enough);
        }
        self.newer = None;
        self.was_read = true;
        let start_lsn = self.source.size.start_of(stop.number);
        self.teller.gap(Gap { start_lsn, end_lsn: stop.end_lsn }, Some(why))
    }

    /// Gives on everything that waits: nothing follows without a break.
    async fn end_stretch(&mut self) -> Flow {
        if let Some(Pending { stop, mut read }) = self.pending.take() {
            self.source.join(&mut read, stop, None).await.map_err(not_read)?;
            if self.digest(stop, read).await? == Told::Enough {
                return Ok(Told::Enough);
            }
        }
        self.flush().await
    }

    async fn flush(&mut self) -> Flow {
        for entry in self.assembler.flush() {
            if self.teller.entry(entry).await? == Told::Enough {
                return Ok(Told::Enough);
            }
        }
        Ok(Told::GoOn)
    }
}

fn not_read(error: RepoError) -> Failure {
    of_repo(error, "could not read archived WAL", super::UNHARMED)
}
