//! Where streaming begins, in random worlds, held against a look at every stretch of them.

use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::pg::SegmentName;
use crate::plan::lineage::segment_on;

const SMALL: u64 = 1 << 20;

/// Positions are multiples of this: only their order matters, and so a quarter of a segment is as good as a byte.
const TICKS_PER_SEGMENT: u64 = 4;
const TICK: u64 = SMALL / TICKS_PER_SEGMENT;

/// Nothing is stored from here on.
const TICKS: u64 = 48;

fn small() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn lsn(tick: u64) -> Lsn {
    Lsn(tick * TICK)
}

fn segment_start(tick: u64) -> u64 {
    tick - tick % TICKS_PER_SEGMENT
}

/// A server's way over several timelines, and what is stored of each.
#[derive(Debug, Clone)]
struct World {
    /// The timelines on the way.
    timelines: Vec<u32>,
    /// Where each but the last was left.
    switches: Vec<u64>,
    /// What is stored by timeline, tick by tick; also of timelines that are not on the way.
    stored: BTreeMap<u32, Vec<bool>>,
}

impl World {
    fn history(&self) -> TimelineHistory {
        let mut text = String::new();
        for (timeline, tick) in self.timelines.iter().zip(&self.switches) {
            writeln!(text, "{timeline}\t{}\tx", lsn(*tick)).unwrap();
        }
        match self.timelines.last() {
            Some(1) | None => TimelineHistory::first(),
            Some(last) => TimelineHistory::parse(Timeline(*last), text.as_bytes()).unwrap(),
        }
    }

    fn coverage(&self) -> Coverage {
        let mut coverage = Coverage::new();
        for (timeline, ticks) in &self.stored {
            let ranges: &mut Vec<(Lsn, Lsn)> = coverage.entry(Timeline(*timeline)).or_default();
            for tick in (0..TICKS).filter(|tick| ticks[usize::try_from(*tick).unwrap()]) {
                match ranges.last_mut() {
                    Some((_, end)) if *end == lsn(tick) => *end = lsn(tick + 1),
                    _ => ranges.push((lsn(tick), lsn(tick + 1))),
                }
            }
        }
        coverage
    }

    /// Who wrote what is at `tick` on the way: a switch point belongs to the newer one.
    fn owner(&self, tick: u64) -> u32 {
        self.timelines[self.switches.iter().filter(|switch| **switch <= tick).count()]
    }

    fn is_stored(&self, timeline: u32, tick: u64) -> bool {
        let ticks = self.stored.get(&timeline);
        ticks.is_some_and(|ticks| ticks.get(usize::try_from(tick).unwrap()) == Some(&true))
    }

    /// Whether the WAL of the `nth` timeline has the byte at `tick` as it is on the way. Its first segment
    /// repeats what was before it.
    fn has(&self, nth: usize, tick: u64) -> bool {
        let begins = nth == 0 || tick >= segment_start(self.switches[nth - 1]);
        begins && self.switches.get(nth).is_none_or(|end| tick < *end)
    }

    fn is_covered(&self, tick: u64) -> bool {
        let mut ways = self.timelines.iter().enumerate();
        ways.any(|(nth, timeline)| self.has(nth, tick) && self.is_stored(*timeline, tick))
    }

    /// The first position from `tick` on that is not stored.
    fn missing_from(&self, tick: u64) -> u64 {
        (tick..=tick + TICKS).find(|tick| !self.is_covered(*tick)).unwrap()
    }
}

fn world() -> impl Strategy<Value = World> {
    let forks = prop::collection::vec((1u32..3, 0u64..14), 0..5);
    let runs = prop::collection::vec((0u64..6, 1u64..20), 0..6);
    (forks, prop::collection::vec(runs, 12)).prop_map(|(forks, runs)| {
        let (mut timelines, mut switches) = (vec![1], Vec::new());
        let mut at = TICKS_PER_SEGMENT;
        for (gap, ticks) in forks {
            at += ticks;
            switches.push(at);
            timelines.push(timelines[timelines.len() - 1] + gap);
        }
        let mut stored = BTreeMap::new();
        for (timeline, runs) in (1u32..).zip(runs) {
            // Nobody writes a timeline before the segment in which it begins.
            let nth = timelines.iter().position(|one| *one == timeline);
            let first = match nth {
                None | Some(0) => TICKS_PER_SEGMENT,
                Some(nth) => segment_start(switches[nth - 1]),
            };
            let (mut ticks, mut at) = (vec![false; usize::try_from(TICKS).unwrap()], first);
            for (hole, run) in runs {
                at += hole;
                for tick in at..(at + run).min(TICKS) {
                    ticks[usize::try_from(tick).unwrap()] = true;
                }
                at += run;
            }
            stored.insert(timeline, ticks);
        }
        World { timelines, switches, stored }
    })
}

fn place() -> impl Strategy<Value = u64> {
    TICKS_PER_SEGMENT..TICKS + 6
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn unbroken_wal_ends_at_the_first_byte_that_no_timeline_on_the_way_has_stored(
        world in world(),
        from in place(),
    ) {
        let end = unbroken_end(&world.history(), &world.coverage(), lsn(from), small());
        prop_assert_eq!(end, lsn(world.missing_from(from)));
    }

    #[test]
    fn holes_are_all_that_is_not_stored_between_two_positions(
        world in world(),
        from in place(),
        ticks in 0u64..40,
    ) {
        let to = from + ticks;
        let found = holes(&world.history(), &world.coverage(), lsn(from), lsn(to), small());
        let is_in = |tick| found.iter().any(|(start, end)| *start <= lsn(tick) && lsn(tick) < *end);
        for tick in from..to {
            prop_assert_eq!(is_in(tick), !world.is_covered(tick), "{}", tick);
        }
        let in_order = found.windows(2).all(|pair| pair[0].1 < pair[1].0);
        prop_assert!(in_order && found.iter().all(|(start, end)| start < end), "{:?}", found);
    }

    #[test]
    fn a_segment_is_read_from_the_newest_timeline_that_owns_a_byte_of_it(
        world in world(),
        number in 1u64..14,
        ticks in 1u64..9,
    ) {
        let first = number * TICKS_PER_SEGMENT;
        let end = first + ticks;
        let owners = (first..end.min(first + TICKS_PER_SEGMENT)).map(|tick| world.owner(tick));
        let expected = SegmentName::new(Timeline(owners.max().unwrap()), number, small());
        prop_assert_eq!(segment_on(&world.history(), number, small(), lsn(end)), expected);
    }

    /// Nothing that is missing from the lowest known position on is skipped, nothing that is
    /// stored in one stretch from there is called missing, and the server is asked for a whole segment that has it.
    #[test]
    fn streaming_starts_at_the_segment_of_the_first_missing_byte_on_its_owners_timeline(
        world in world(),
        slot in prop::option::of(place()),
        slot_is_new in any::<bool>(),
        resume in prop::option::of(place()),
        flush in place(),
    ) {
        let (history, coverage) = (world.history(), world.coverage());
        let start = start_of(&Situation {
            history: &history,
            coverage: &coverage,
            slot_lsn: slot.map(lsn),
            slot_is_new,
            resume_lsn: resume.map(lsn),
            flush_lsn: lsn(flush),
            segment_size: small(),
        });
        let highest = (0..TICKS).rev().find(|tick| world.is_covered(*tick)).map(|tick| tick + 1);
        // Where nobody knows what was acknowledged, the first hole behind stored WAL counts: the whole world is near its end.
        let nobody_knows = resume.is_none() && (slot.is_none() || slot_is_new);
        let is_left_out = |tick: &u64| {
            nobody_knows && world.is_covered(tick - 1) && !world.is_covered(*tick)
        };
        let left_out = (1..highest.unwrap_or(1)).find(is_left_out);
        let known = [highest, slot, resume, left_out].into_iter().flatten().min();
        let missing = world.missing_from(known.unwrap_or(flush));
        prop_assert_eq!(start.first_missing, lsn(missing));
        let at = missing.min(flush);
        prop_assert_eq!(start.timeline, Timeline(world.owner(at)));
        prop_assert_eq!(start.lsn.0 % SMALL, 0, "a segment's first byte");
        prop_assert!(start.lsn <= lsn(at) && lsn(at).0 < start.lsn.0 + SMALL);
        let nth = world.timelines.iter().position(|one| Timeline(*one) == start.timeline).unwrap();
        for tick in start.lsn.0 / TICK..=at {
            prop_assert!(world.has(nth, tick), "{tick} is not on timeline {}", start.timeline);
        }
    }

    #[test]
    fn behind_a_gap_all_from_the_oldest_segment_on_that_is_not_stored_is_asked_for(
        world in world(),
        flush in place(),
        number in 1u64..14,
    ) {
        let (history, coverage) = (world.history(), world.coverage());
        let situation = Situation {
            history: &history,
            coverage: &coverage,
            slot_lsn: None,
            slot_is_new: false,
            resume_lsn: None,
            flush_lsn: lsn(flush),
            segment_size: small(),
        };
        let first = number * TICKS_PER_SEGMENT;
        let expected = Start {
            timeline: Timeline(world.owner(first)),
            lsn: lsn(first),
            first_missing: lsn(world.missing_from(first)),
        };
        prop_assert_eq!(start_after_gap(&situation, number), expected);
    }

    #[test]
    fn at_a_switch_only_what_is_stored_of_the_new_timeline_itself_counts(world in world()) {
        let coverage = world.coverage();
        for (switch, timeline) in world.switches.iter().zip(&world.timelines[1..]) {
            let first = segment_start(*switch);
            let mut ticks = first..=first + TICKS;
            let missing = ticks.find(|tick| !world.is_stored(*timeline, *tick)).unwrap();
            let timeline = Timeline(*timeline);
            let expected = Start { timeline, lsn: lsn(first), first_missing: lsn(missing) };
            prop_assert_eq!(start_at_switch(&coverage, timeline, lsn(*switch), small()), expected);
        }
    }
}
