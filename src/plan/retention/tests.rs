//! Plans in small worlds, in many random ones, and through a year.

use proptest::prelude::*;

use super::oracle::{World, at, check, id_at};
use super::*;

const DAY: i64 = 24;

fn policy() -> Policy {
    Policy::nothing_set()
}

fn days(days: u64) -> Duration {
    Duration::from_hours(24 * days)
}

fn ids<'a>(fates: impl Iterator<Item = &'a BackupFate>) -> Vec<String> {
    fates.map(|fate| fate.id.to_string()).collect()
}

/// Writes three segments and takes a backup each day.
fn daily_backups(world: &mut World, count: i64) {
    for _ in 0..count {
        world.pass(DAY);
        for _ in 0..3 {
            world.write(false);
        }
        world.back_up();
    }
    world.pass(1);
}

fn after(world: &World, plan: &Plan) -> World {
    let mut after = world.clone();
    after.carry_out(plan);
    after
}

#[test]
fn without_a_policy_everything_stays_and_with_one_something_goes() {
    assert!(!policy().is_set());
    assert!(Policy { weekly: Some(4), ..policy() }.is_set());
    let mut world = World::new();
    daily_backups(&mut world, 20);
    let plan = world.plan(&Policy { window: Some(days(7)), ..policy() });
    // The window begins 7 days before the last thing was stored: just where the 13th backup began.
    assert_eq!(plan.kept().count(), 9);
    assert_eq!(
        plan.kept().next().unwrap().id,
        id_at(12 * DAY),
        "the anchor lies before the window"
    );
}

#[test]
fn the_newest_are_kept_with_all_wal_since_the_oldest_of_them() {
    let mut world = World::new();
    daily_backups(&mut world, 10);
    let policy = Policy { backups: Some(3), ..policy() };
    let plan = world.plan(&policy);
    assert_eq!(ids(plan.kept()), [8, 9, 10].map(|day| id_at(day * DAY).to_string()));
    let after = after(&world, &plan);
    check(&world, &after, &policy, &plan);
    let first = world.backups[7].1.start_lsn;
    let stored: Vec<u64> = after.clusters[0].stored.keys().map(|(_, number)| *number).collect();
    let first = segment_of(first);
    assert_eq!(stored[0], first, "what lies before is gone");
    assert!(stored.iter().zip(first..).all(|(stored, wanted)| *stored == wanted), "no hole");
}

fn segment_of(lsn: crate::pg::Lsn) -> u64 {
    crate::plan::examples::SIZE.segment_of(lsn)
}

#[test]
fn a_backup_of_a_tier_keeps_its_own_wal_and_no_more() {
    let mut world = World::new();
    daily_backups(&mut world, 40);
    let policy = Policy { window: Some(days(3)), weekly: Some(4), ..policy() };
    let plan = world.plan(&policy);
    let after = after(&world, &plan);
    check(&world, &after, &policy, &plan);
    let weekly: Vec<&BackupFate> = plan.kept().filter(|fate| !fate.is_for_recovery()).collect();
    assert_eq!(weekly.len(), 2, "the last of this week and of the one before are in the window");
    for fate in weekly {
        assert!(matches!(fate.reasons[..], [Reason::Weekly(_)]), "{fate:?}");
        let own = after.backups.iter().find(|(_, backup)| backup.id == fate.id).unwrap();
        let own = segment_of(own.1.start_lsn);
        let has = |number| after.clusters[0].stored.contains_key(&(Timeline::FIRST, number));
        assert_eq!([own - 1, own, own + 1, own + 2].map(has), [false, true, true, false]);
    }
}

#[test]
fn backups_that_stopped_coming_do_not_grow_too_old() {
    let mut world = World::new();
    daily_backups(&mut world, 10);
    let policy = Policy { window: Some(days(3)), ..policy() };
    let plan = world.plan(&policy);
    let then = ids(plan.kept());
    world.carry_out(&plan);
    // The cluster is gone, or this host's clock is ten years ahead.
    world.pass(3650 * DAY);
    let plan = world.plan(&policy);
    assert_eq!(ids(plan.kept()), then);
    assert_eq!(plan.expiring().count(), 0);
}

#[test]
fn a_backup_of_the_future_stays_and_is_not_counted() {
    let mut world = World::new();
    daily_backups(&mut world, 5);
    world.pass(365 * DAY);
    let ahead = world.back_up();
    // The clock is put right again. The store's was right all the time.
    world.pass(-365 * DAY);
    let hour = world.hour;
    for stored in world.clusters[0].stored.values_mut() {
        *stored = hour.min(*stored);
    }
    let plan = world.plan(&Policy { backups: Some(2), ..policy() });
    let fate = plan.kept().last().unwrap();
    assert_eq!((fate.id.clone(), &fate.reasons[..]), (ahead, &[Reason::Future][..]));
    assert_eq!(plan.kept().count(), 3);
}

#[test]
fn what_cannot_be_read_keeps_all_wal_and_what_it_may_lean_on() {
    let mut world = World::new();
    daily_backups(&mut world, 8);
    let mut stock = world.stock();
    let lost = stock.incarnations[0].backups.remove(3).id;
    let parent = stock.incarnations[0].backups[2].id.clone();
    let leans_on = Some(vec![parent.clone()]);
    stock.unreadable.push(Unreadable { id: lost.clone(), leans_on });
    let policy = Policy { backups: Some(1), ..policy() };
    let plan_of = |stock: &Stock| plan(stock, &policy, at(world.hour), &BTreeMap::new());
    let plan = plan_of(&stock);
    assert!(plan.protected.covers(&parent) && plan.protected.covers(&lost));
    assert!(!plan.protected.covers(&id_at(DAY)));
    assert!(plan.wal.values().all(|wal| wal.keeps_all(Timeline::FIRST, 0..u64::MAX)));
    stock.unreadable[0].leans_on = None;
    assert!(plan_of(&stock).protected.covers(&id_at(DAY)), "nobody knows");
    assert!(!plan_of(&stock).protected.covers(&id_at(5 * DAY)), "it is younger");
}

#[test]
fn a_running_backup_keeps_its_parent_and_young_wal_until_it_is_dead() {
    let mut world = World::new();
    daily_backups(&mut world, 4);
    world.fail_to_back_up();
    let policy = Policy { backups: Some(1), ..policy() };
    let parent = id_at(4 * DAY);
    let first = world.plan(&policy);
    assert_eq!(first.unfinished[0].fate, Unfinishedness::Running);
    assert!(first.protected.covers(&parent));
    assert_eq!(first.wal_untouched_since, Some(at(world.hour - DAY)));
    daily_backups(&mut world, 8);
    let second = world.plan(&policy);
    assert_eq!(second.unfinished[0].fate, Unfinishedness::Dead);
    assert!(!second.protected.covers(&parent) && second.wal_untouched_since.is_none());
}

#[test]
fn a_timeline_left_behind_stays_while_a_backup_of_the_window_leads_to_it() {
    let mut world = World::new();
    daily_backups(&mut world, 3);
    world.fork(2);
    let policy = Policy { window: Some(days(5)), ..policy() };
    let mut gone_after = None;
    for day in 1..20 {
        daily_backups(&mut world, 1);
        let plan = world.plan(&policy);
        let after = after(&world, &plan);
        check(&world, &after, &policy, &plan);
        world = after;
        let left =
            world.clusters[0].stored.keys().any(|(timeline, _)| *timeline == Timeline::FIRST);
        if !left && gone_after.is_none() {
            gone_after = Some(day);
        }
    }
    let gone_after = gone_after.unwrap_or(i64::MAX);
    assert!((5..=8).contains(&gone_after), "{gone_after}");
}

#[test]
fn after_an_upgrade_the_old_cluster_stays_until_the_new_one_covers_the_window() {
    let mut world = World::new();
    daily_backups(&mut world, 5);
    world.upgrade();
    let policy = Policy { window: Some(days(4)), backups: Some(2), ..policy() };
    world.pass(1);
    world.write(false);
    let plan = world.plan(&policy);
    assert!(plan.kept().count() >= 2, "right after it, the old backups are all there is");
    for _ in 0..30 {
        daily_backups(&mut world, 1);
        let plan = world.plan(&policy);
        let after = after(&world, &plan);
        check(&world, &after, &policy, &plan);
        world = after;
    }
    assert!(world.clusters[0].stored.is_empty(), "in the end nothing of the old one is left");
    assert!(world.backups.iter().all(|(of, _)| *of == 1));
}

#[test]
fn wal_of_a_timeline_without_history_stays() {
    let mut world = World::new();
    daily_backups(&mut world, 3);
    world.fork(0);
    daily_backups(&mut world, 5);
    world.clusters[0].histories.clear();
    let plan = world.plan(&Policy { backups: Some(1), ..policy() });
    let wal = plan.wal.values().next().unwrap();
    assert!(wal.keeps_all(Timeline(2), 0..u64::MAX));
    assert_eq!(plan.kept().filter(|fate| fate.reasons == [Reason::NoHistory]).count(), 5);
}

#[test]
fn what_goes_and_what_stays_of_a_timeline_are_all_of_it() {
    let mut world = World::new();
    daily_backups(&mut world, 40);
    let plan = world.plan(&Policy { window: Some(days(3)), weekly: Some(4), ..policy() });
    let wal = plan.wal.values().next().unwrap();
    let going = wal.going(Timeline::FIRST, 0..300);
    for number in 0..300 {
        let goes = going.iter().any(|range| range.contains(&number));
        let name = crate::pg::SegmentName::new(Timeline::FIRST, number, wal.segment_size);
        assert_eq!(wal.keeps(name), !goes, "{number}");
    }
    assert!(going.len() > 2);
}

/// One thing that happens.
#[derive(Debug, Clone)]
enum Event {
    Pass(i64),
    Write { lost: bool },
    BackUp,
    Fail,
    Fork(u64),
    OldPrimary,
    Upgrade,
    Pin { back: usize, hours: i64 },
}

fn happen(world: &mut World, event: &Event) {
    match event {
        Event::Pass(hours) => world.pass(*hours),
        Event::Write { lost } => world.write(*lost),
        Event::BackUp => {
            world.pass(1);
            world.back_up();
        }
        Event::Fail => {
            world.pass(1);
            world.fail_to_back_up();
        }
        Event::Fork(back) => world.fork(*back),
        Event::OldPrimary => {
            let current = world.clusters.last().unwrap().current;
            let old = Timeline(current.0.saturating_sub(1));
            if world.was_written_within(old, 6 * DAY) {
                world.write_on(old, false);
            }
        }
        Event::Upgrade => world.upgrade(),
        Event::Pin { back, hours } => {
            let until = at(world.hour + hours);
            let place = world.backups.len().checked_sub(1 + back);
            if let Some((_, backup)) = place.and_then(|place| world.backups.get(place)) {
                world.pins.insert(backup.id.clone(), Pinned::Until(until));
            }
        }
    }
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let one = prop_oneof![
        6 => (1i64..30).prop_map(Event::Pass),
        8 => prop::bool::weighted(0.07).prop_map(|lost| Event::Write { lost }),
        5 => Just(Event::BackUp),
        1 => Just(Event::Fail),
        1 => (0u64..12).prop_map(Event::Fork),
        1 => Just(Event::OldPrimary),
        1 => prop::bool::weighted(0.2).prop_map(|yes| if yes { Event::Upgrade } else { Event::BackUp }),
        1 => (0usize..5, 1i64..300).prop_map(|(back, hours)| Event::Pin { back, hours }),
    ];
    prop::collection::vec(one, 1..80)
}

fn policies() -> impl Strategy<Value = Policy> {
    let count = || prop::option::of(1usize..6);
    (prop::option::of(1u64..400), count(), count(), count(), count(), 1usize..4).prop_map(
        |(window, backups, daily, weekly, monthly, min_backups)| Policy {
            window: window.map(Duration::from_hours),
            backups,
            daily,
            weekly,
            monthly,
            min_backups,
            unfinished: days(3),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_kept_backup_and_no_moment_of_the_window_is_harmed(
        events in events(), policy in policies(),
    ) {
        let mut world = World::new();
        for event in &events {
            happen(&mut world, event);
        }
        let plan = world.plan(&policy);
        check(&world, &after(&world, &plan), &policy, &plan);
    }

    #[test]
    fn a_plan_carried_out_leaves_nothing_to_the_same_plan(
        events in events(), policy in policies(),
    ) {
        let mut world = World::new();
        for event in &events {
            happen(&mut world, event);
        }
        let first = world.plan(&policy);
        world.carry_out(&first);
        let second = world.plan(&policy);
        prop_assert_eq!(ids(second.expiring()), [""; 0]);
        let once = world.clone();
        world.carry_out(&second);
        for (once, twice) in once.clusters.iter().zip(&world.clusters) {
            prop_assert_eq!(&once.stored, &twice.stored);
        }
    }

    /// What is needed later was never let go earlier: to plan now and then comes to the same as to plan then.
    #[test]
    fn planning_in_between_changes_nothing_of_what_is_left_later(
        events in events(), policy in policies(), cut in 0usize..80,
    ) {
        let (mut often, mut once) = (World::new(), World::new());
        for (place, event) in events.iter().enumerate() {
            let event = match event {
                // Counted from the newest, a pin would be put on different backups.
                Event::Pin { .. } if place > cut => continue,
                // Nobody goes back to a moment that was let go.
                Event::Fork(_) if place > cut => &Event::Fork(0),
                event => event,
            };
            happen(&mut often, event);
            happen(&mut once, event);
            if place == cut {
                let plan = often.plan(&policy);
                often.carry_out(&plan);
            }
        }
        let (plan_of_often, plan_of_once) = (often.plan(&policy), once.plan(&policy));
        let whole = once.clone();
        often.carry_out(&plan_of_often);
        once.carry_out(&plan_of_once);
        check(&whole, &often, &policy, &plan_of_once);
    }
}

/// A simple generator, so that the year is the same each time.
struct Dice(u64);

impl Dice {
    fn one_in(&mut self, sides: u64) -> bool {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33).is_multiple_of(sides)
    }
}

/// 365 days with a backup on most of them, promotions, returns to the past, lost segments, failed backups, pins
/// and an upgrade, and `expire` every day. A second world, in which nothing is ever deleted, says what must be reachable.
#[test]
fn a_year_of_daily_backups_keeps_every_promise() {
    let policy = Policy {
        window: Some(days(14)),
        daily: Some(20),
        weekly: Some(8),
        monthly: Some(12),
        min_backups: 3,
        ..policy()
    };
    let (mut whole, mut pruned) = (World::new(), World::new());
    let mut dice = Dice(7);
    let (mut most, mut expired, mut forks) = (0, 0, 0);
    for day in 1..=365 {
        let mut events = vec![Event::Pass(DAY)];
        for _ in 0..3 {
            events.push(Event::Write { lost: dice.one_in(60) });
        }
        if dice.one_in(30) {
            forks += 1;
            events.push(Event::Fork(if dice.one_in(2) { 0 } else { 7 }));
            events.push(Event::Write { lost: false });
        }
        if dice.one_in(40) {
            events.push(Event::OldPrimary);
        }
        events.push(if dice.one_in(12) { Event::Fail } else { Event::BackUp });
        if dice.one_in(25) {
            events.push(Event::Pin { back: 2, hours: 60 * DAY });
        }
        if day == 200 {
            events.push(Event::Upgrade);
        }
        for event in &events {
            happen(&mut whole, event);
            happen(&mut pruned, event);
        }
        let plan = pruned.plan(&policy);
        expired += plan.expiring().count();
        pruned.carry_out(&plan);
        check(&whole, &pruned, &policy, &plan);
        most = most.max(pruned.backups.len());
    }
    assert!(forks > 5 && expired > 200, "{forks} forks, {expired} expired: nothing was tried");
    // 15 of the window, 5 more days, 8 weeks, 12 months, pins; more while two timelines are alive.
    assert!(most < 80, "{most} backups are too many");
    let stored = |world: &World| world.clusters.iter().map(|one| one.stored.len()).sum::<usize>();
    assert!(stored(&pruned) * 4 < stored(&whole), "{} of {}", stored(&pruned), stored(&whole));
}
