//! Two stores that are away: what was acknowledged is in one of them, in the spool, or recorded as lost in both.

use super::archive::{Archive, SIZE_BYTES};
use super::expire::back_up;
use super::stall::{ENDS, HISTORY, Host, is_spooled};
use crate::failure::Kind;
use crate::ops::Which;
use crate::ops::archive_push::Pushed;
use crate::store::faults::Fault;

impl Host {
    fn of(&self, which: Which) -> &Archive {
        match which {
            Which::First => &self.archive,
            Which::Second => &self.second.as_ref().unwrap().0,
        }
    }

    fn away(&self, which: Which) {
        self.of(which).faults.inject(Fault::anywhere().for_ever());
    }

    fn both_away(&self) {
        self.away(Which::First);
        self.away(Which::Second);
    }

    fn both_well(&self) {
        self.all_is_well();
        self.of(Which::Second).faults.heal();
    }

    fn open_gaps(&self) -> Vec<(bool, Option<Which>)> {
        let gaps = self.stall.host_state().unwrap().open_gaps;
        gaps.into_iter().map(|gap| (gap.stored, gap.closed_in)).collect()
    }
}

const BOTH: [Which; 2] = [Which::First, Which::Second];

/// A history file and some segments.
fn files() -> Vec<(String, Vec<u8>)> {
    let archive = Archive::empty(SIZE_BYTES);
    let mut files = vec![(HISTORY.0.to_owned(), HISTORY.1.to_vec())];
    files.extend((2..5).map(|number| archive.segment(number)));
    files
}

async fn assert_holds(archive: &Archive, files: &[(String, Vec<u8>)]) {
    for (name, bytes) in files {
        assert_eq!(archive.get(name).await.1.as_deref(), Some(&**bytes), "{name}");
    }
}

#[tokio::test]
async fn while_both_are_away_the_spool_has_it_and_whichever_returns_first_takes_it() {
    for near in BOTH {
        let host = Host::with_two(true).await;
        host.both_away();
        for (name, bytes) in &files() {
            assert!(is_spooled(&host.push(name, bytes).await), "{name}");
        }
        assert_eq!(host.drain().await.unwrap_err().kind, Kind::Store);
        assert_eq!(host.held(), 4);
        assert!(host.stall.is_away());
        host.both_well();
        host.away(near.other());
        let drained = host.drain().await.unwrap();
        assert_eq!((drained.stored, drained.refused), (4, Vec::new()), "{near:?}");
        assert!(!host.stall.is_pending() && !host.stall.is_away());
        assert_holds(host.of(near), &files()).await;
        assert_eq!(host.of(near.other()).keys_below("/wal/"), [""; 0]);
        // What follows goes to the one that is there, and not into the spool.
        let (name, bytes) = host.archive.segment(5);
        assert!(matches!(host.push(&name, &bytes).await, Ok(Pushed::Stored(_))));
        assert_eq!(host.held(), 0);
    }
}

#[tokio::test]
async fn both_that_return_hold_what_the_spool_had() {
    let host = Host::with_two(true).await;
    host.both_away();
    for (name, bytes) in &files() {
        assert!(is_spooled(&host.push(name, bytes).await), "{name}");
    }
    host.both_well();
    assert_eq!(host.drain().await.unwrap().stored, 4);
    for which in BOTH {
        assert_holds(host.of(which), &files()).await;
    }
}

#[tokio::test]
async fn where_both_copies_are_wanted_the_spool_keeps_what_one_of_them_lacks() {
    for away in BOTH {
        let host = Host::with_two(false).await;
        host.away(away);
        for (name, bytes) in &files() {
            assert!(is_spooled(&host.push(name, bytes).await), "{name}");
        }
        assert_eq!(host.drain().await.unwrap_err().kind, Kind::Store);
        assert_eq!(host.held(), 4, "{away:?} lacks it");
        assert_holds(host.of(away.other()), &files()[..1]).await;
        host.both_well();
        assert_eq!(host.drain().await.unwrap().stored, 4);
        for which in BOTH {
            assert_holds(host.of(which), &files()).await;
        }
    }
}

#[tokio::test]
async fn another_content_in_either_is_put_aside_and_replaces_nothing() {
    for differs in BOTH {
        let host = Host::with_two(true).await;
        let other = b"1\t0/400000\tno recovery target specified\n";
        host.of(differs).push(HISTORY.0, other).await.unwrap();
        host.both_away();
        assert!(is_spooled(&host.push(HISTORY.0, HISTORY.1).await));
        host.both_well();
        let drained = host.drain().await.unwrap();
        assert_eq!((drained.stored, drained.refused.len()), (0, 1), "{differs:?}");
        assert!(drained.refused[0].is_conflict && drained.refused[0].kept_at.exists());
        assert_eq!(host.of(differs).get(HISTORY.0).await.1.as_deref(), Some(&other[..]));
    }
}

#[tokio::test]
async fn a_drain_into_two_that_stops_anywhere_has_lost_nothing_and_the_next_ends_it() {
    let files = files();
    for one_is_enough in [true, false] {
        for which in BOTH {
            for end in ENDS {
                for n in 1.. {
                    let host = Host::with_two(one_is_enough).await;
                    host.both_away();
                    for (name, bytes) in &files {
                        assert!(is_spooled(&host.push(name, bytes).await));
                    }
                    host.both_well();
                    let faults = &host.of(which).faults;
                    let before = faults.calls().len() as u64;
                    faults.inject(end(n));
                    let drained = host.drain().await;
                    let struck = faults.calls().len() as u64 - before >= n;
                    assert!(!struck || one_is_enough || drained.is_err(), "call {n}");
                    assert!(!one_is_enough || drained.unwrap().stored == 4, "call {n}");
                    host.both_well();
                    host.drain().await.unwrap();
                    assert_eq!((host.held(), host.files("refused")), (0, 0), "call {n}");
                    assert_holds(host.of(which.other()), &files).await;
                    if !one_is_enough {
                        assert_holds(host.of(which), &files).await;
                    }
                    if !struck {
                        assert!(n > 4, "the fault never struck");
                        break;
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn wal_is_let_go_only_while_neither_takes_it_and_is_a_gap_in_each_until_each_has_a_backup() {
    for away in BOTH {
        let mut host = Host::with_two(true).await;
        host.lets_go(1 << 20);
        host.away(away);
        let (name, bytes) = host.archive.segment(2);
        assert!(matches!(host.push(&name, &bytes).await, Ok(Pushed::Stored(_))), "{away:?}");
        host.away(away.other());
        let (name, bytes) = host.archive.segment(3);
        assert!(matches!(host.push(&name, &bytes).await, Ok(Pushed::LetGo { .. })), "{away:?}");
        assert_eq!(host.open_gaps(), [(false, None)]);
        assert_eq!(host.drain().await.unwrap_err().kind, Kind::Store);
        // One returns: it has the record, and needs a backup.
        let back = away.other();
        host.of(back).faults.heal();
        assert_eq!(host.drain().await.unwrap().gaps_open.len(), 1);
        assert_eq!(host.of(back).keys_below("/gap/").len(), 1);
        assert_eq!(host.open_gaps(), [(true, None)]);
        back_up(&host.of(back).calm, 9, None, 4).await;
        let drained = host.drain().await.unwrap();
        assert_eq!((drained.gaps_open.len(), drained.gaps_closed), (0, 0), "the other is away");
        assert_eq!(host.open_gaps(), [(true, Some(back))]);
        assert!(host.stall.is_pending());
        // And the other, which has one of its own to get.
        host.both_well();
        let drained = host.drain().await.unwrap();
        assert_eq!((drained.gaps_recorded, drained.gaps_open.len()), (1, 1));
        assert_eq!(host.of(away).keys_below("/gap/").len(), 1);
        back_up(&host.of(away).calm, 9, None, 4).await;
        assert_eq!(host.drain().await.unwrap().gaps_closed, 1);
        assert!(host.open_gaps().is_empty() && !host.stall.is_pending());
    }
}
