//! When the agent's own runs are due: backups, `expire`, `verify`, drills.
//!
//! Decided by the age of what the repository holds: so a restart forgets nothing, runs that were missed are made up for
//! once, and of several agents for one cluster the first that looks does it. What this agent tried itself only ever
//! puts a run off. Never here: clocks, the repository, processes.

use std::time::Duration;

/// The pause after the first failure; each further one doubles it.
const PAUSE_FIRST: Duration = Duration::from_mins(1);

/// The longest pause after failures; shorter where a run is wanted more often.
const PAUSE_LAST: Duration = Duration::from_hours(1);

const DAY_SECONDS: u64 = 24 * 3_600;

/// What can be run, in the order in which it is where all are due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// `backup`
    Backup,
    /// `expire`
    Expire,
    /// `verify --deep`
    Verify,
    /// `drill`
    Drill,
}

impl Task {
    /// All of them; each one's place is its number.
    pub const ALL: [Self; 4] = [Self::Backup, Self::Expire, Self::Verify, Self::Drill];

    /// Returns the command and its flags.
    pub fn words(self) -> &'static [&'static str] {
        match self {
            Self::Backup => &["backup"],
            Self::Expire => &["expire"],
            Self::Verify => &["verify", "--deep"],
            Self::Drill => &["drill"],
        }
    }
}

/// A time of day, in UTC: no day has it twice or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeOfDay {
    /// Since midnight; below a day.
    seconds: u64,
}

impl TimeOfDay {
    /// Reads `HH:MM`, from `00:00` to `23:59`.
    pub fn parse(text: &str) -> Option<Self> {
        let (hours, minutes) = text.split_once(':')?;
        let number = |text: &str, below: u64| -> Option<u64> {
            let is_number = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u64>().ok().filter(|number| is_number && *number < below)
        };
        Some(Self { seconds: number(hours, 24)? * 3_600 + number(minutes, 60)? * 60 })
    }

    /// Returns the first moment from this one on (included) that has this time; both in seconds since the Unix epoch.
    fn first_from(self, moment: u64) -> u64 {
        let today = moment - moment % DAY_SECONDS + self.seconds;
        if today < moment { today.saturating_add(DAY_SECONDS) } else { today }
    }
}

impl std::fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02}:{:02}", self.seconds / 3_600, self.seconds / 60 % 60)
    }
}

/// How often something is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// From one run to the next; not zero.
    pub every: Duration,
    /// Only at this time of day; `every` is then a number of whole days.
    pub at: Option<TimeOfDay>,
}

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Schedule {
    /// By task, in the order of [`Task::ALL`].
    pub rhythms: [Option<Rhythm>; 4],
    /// Take backups of a standby too.
    pub backup_on_standby: bool,
}

impl Schedule {
    /// Returns whether anything is wanted.
    pub fn is_set(&self) -> bool {
        self.rhythms.iter().any(Option::is_some)
    }

    /// Returns what is wanted of an agent beside a standby: backups only if they were asked for there.
    #[must_use]
    pub fn beside(mut self, is_standby: bool) -> Self {
        if is_standby && !self.backup_on_standby {
            self.rhythms[Task::Backup as usize] = None;
        }
        self
    }
}

/// What this agent tried last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// How long ago it began.
    pub began_ago: Duration,
    /// How long ago it ended.
    pub ended_ago: Duration,
    /// How many failed in a row, this one included; 0: it succeeded.
    pub failures: u32,
}

/// What is known of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Known {
    /// The age of the newest that is on record, whoever made it; `None`: there is none.
    pub age: Option<Duration>,
    /// What this agent tried last.
    pub last: Option<Attempt>,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// What.
    pub task: Task,
    /// How long until then; zero: now.
    pub wait: Duration,
}

/// Decides what comes next; `None` if nothing is wanted. `now` is in seconds since the Unix epoch.
///
/// Of what is due already, that which this agent began longest ago comes first, so that nothing is put off for ever by
/// something that takes longer than its period.
pub fn next(schedule: &Schedule, known: &[Known; 4], now: u64) -> Option<Due> {
    let due = Task::ALL.into_iter().filter_map(|task| {
        let rhythm = schedule.rhythms[task as usize]?;
        Some(Due { task, wait: wait(rhythm, known[task as usize], now) })
    });
    due.min_by_key(|due| {
        let last = known[due.task as usize].last;
        (due.wait, last.map(|last| std::cmp::Reverse(last.began_ago)))
    })
}

fn wait(rhythm: Rhythm, known: Known, now: u64) -> Duration {
    let by_record = known.age.map_or(Duration::ZERO, |age| rest(rhythm, age, now));
    let by_attempt = match known.last {
        None => Duration::ZERO,
        // What succeeds and leaves nothing on record is not run without end.
        Some(Attempt { failures: 0, began_ago, .. }) => rest(rhythm, began_ago, now),
        Some(Attempt { failures, ended_ago, .. }) => {
            pause(failures).min(rhythm.every).saturating_sub(ended_ago)
        }
    };
    by_record.max(by_attempt)
}

/// Returns how long it is until the next one is due, if the last one has this age.
fn rest(rhythm: Rhythm, age: Duration, now: u64) -> Duration {
    let Some(at) = rhythm.at else { return rhythm.every.saturating_sub(age) };
    let last = now.saturating_sub(age.as_secs());
    // Half a day of grace, so that one which came late puts off none.
    let from = last + rhythm.every.as_secs().saturating_sub(DAY_SECONDS / 2);
    Duration::from_secs(at.first_from(from).saturating_sub(now))
}

fn pause(failures: u32) -> Duration {
    let doubled = 2u32.saturating_pow(failures.saturating_sub(1).min(16));
    PAUSE_FIRST.saturating_mul(doubled).min(PAUSE_LAST)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: Duration = Duration::from_hours(24);
    /// 2026-11-22T00:00:00Z
    const MIDNIGHT: u64 = 1_795_305_600;

    fn every(every: Duration) -> Schedule {
        let rhythm = Some(Rhythm { every, at: None });
        Schedule { rhythms: [rhythm; 4], backup_on_standby: false }
    }

    fn only(task: Task, rhythm: Rhythm) -> Schedule {
        let mut schedule = Schedule::default();
        schedule.rhythms[task as usize] = Some(rhythm);
        schedule
    }

    fn aged(age: Duration) -> [Known; 4] {
        [Known { age: Some(age), last: None }; 4]
    }

    fn tried(failures: u32, ended_ago: Duration) -> Attempt {
        Attempt { began_ago: ended_ago, ended_ago, failures }
    }

    #[test]
    fn what_is_not_on_record_is_due_at_once_and_nothing_that_is_not_wanted() {
        let first = next(&every(DAY), &[Known::default(); 4], MIDNIGHT).unwrap();
        assert_eq!(first, Due { task: Task::Backup, wait: Duration::ZERO });
        assert_eq!(next(&Schedule::default(), &[Known::default(); 4], MIDNIGHT), None);
        assert!(!Schedule::default().is_set() && every(DAY).is_set());
    }

    #[test]
    fn runs_that_were_missed_are_made_up_for_once() {
        let schedule = only(Task::Verify, Rhythm { every: DAY, at: None });
        let due = |known: &[Known; 4]| next(&schedule, known, MIDNIGHT).unwrap().wait;
        assert_eq!(due(&aged(DAY * 9)), Duration::ZERO);
        assert_eq!(due(&aged(Duration::ZERO)), DAY);
        assert_eq!(due(&aged(Duration::from_hours(23))), Duration::from_hours(1));
    }

    #[test]
    fn a_standbys_agent_takes_backups_only_when_asked() {
        let schedule = every(DAY);
        assert_eq!(schedule.beside(true).rhythms[Task::Backup as usize], None);
        assert_eq!(schedule.beside(true).rhythms[1..], schedule.rhythms[1..]);
        assert_eq!(schedule.beside(false), schedule);
        let asked = Schedule { backup_on_standby: true, ..schedule };
        assert_eq!(asked.beside(true), asked);
    }

    #[test]
    fn failures_are_tried_again_with_growing_pauses_and_never_later_than_the_period() {
        let known = |failures| {
            let mut known = aged(DAY * 2);
            known[0].last = Some(tried(failures, Duration::ZERO));
            known
        };
        let wait_of = |period, failures| {
            let schedule = only(Task::Backup, Rhythm { every: period, at: None });
            next(&schedule, &known(failures), MIDNIGHT).unwrap().wait
        };
        let minutes: Vec<u64> =
            (1..9).map(|failures| wait_of(DAY, failures).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(wait_of(DAY, u32::MAX), PAUSE_LAST);
        assert_eq!(wait_of(Duration::from_secs(10), 5), Duration::from_secs(10));
    }

    #[test]
    fn a_success_that_is_not_on_record_is_not_repeated_before_its_time() {
        let mut known = [Known::default(); 4];
        known[Task::Expire as usize].last = Some(tried(0, Duration::from_hours(1)));
        let schedule = only(Task::Expire, Rhythm { every: DAY, at: None });
        let wait = next(&schedule, &known, MIDNIGHT).unwrap().wait;
        assert_eq!(wait, Duration::from_hours(23));
    }

    #[test]
    fn a_time_of_day_is_kept_though_runs_come_late_and_one_that_was_missed_is_made_up_for() {
        let at = TimeOfDay::parse("02:30");
        let moment = MIDNIGHT + 2 * 3_600 + 1_800;
        let schedule = only(Task::Backup, Rhythm { every: DAY, at });
        let wait = |last: u64, now: u64| {
            let age = Duration::from_secs(now - last);
            next(&schedule, &aged(age), now).unwrap().wait.as_secs()
        };
        // In time, 5 min late, 9 h late: the next is that of tomorrow.
        for late in [0, 300, 9 * 3_600] {
            let now = moment + late + 60;
            assert_eq!(wait(moment + late, now), moment + DAY_SECONDS - now, "{late}");
        }
        // By hand in the evening: that of the night still comes.
        assert_eq!(wait(moment - 10 * 3_600, moment - 3_600), DAY_SECONDS + 3_600);
        assert_eq!(wait(moment - 15 * 3_600, moment - 3_600), 3_600);
        // The host slept for three days.
        assert_eq!(wait(moment, moment + 3 * DAY_SECONDS + 5_000), 0);
        let weekly = only(Task::Backup, Rhythm { every: DAY * 7, at });
        let known = aged(Duration::from_secs(100));
        let now = moment + 100;
        assert_eq!(next(&weekly, &known, now).unwrap().wait.as_secs(), 7 * DAY_SECONDS - 100);
    }

    #[test]
    fn a_time_of_day_is_read_strictly_and_shown_as_it_was_said() {
        for good in ["00:00", "02:30", "23:59"] {
            assert_eq!(TimeOfDay::parse(good).unwrap().to_string(), good);
        }
        for bad in ["24:00", "2:30", "02:60", "02:3", "0230", "+2:30", "02:30:00", "", ":"] {
            assert_eq!(TimeOfDay::parse(bad), None, "{bad}");
        }
    }

    fn durations() -> impl Strategy<Value = Duration> {
        (0u64..40 * DAY_SECONDS).prop_map(Duration::from_secs)
    }

    fn attempts() -> impl Strategy<Value = Option<Attempt>> {
        proptest::option::of((durations(), durations(), 0u32..20).prop_map(
            |(one, other, failures)| Attempt {
                began_ago: one.max(other),
                ended_ago: one.min(other),
                failures,
            },
        ))
    }

    fn rhythms() -> impl Strategy<Value = Option<Rhythm>> {
        let every = (1u64..40 * DAY_SECONDS)
            .prop_map(|seconds| Rhythm { every: Duration::from_secs(seconds), at: None });
        let at = (1u32..10, 0u64..DAY_SECONDS).prop_map(|(days, seconds)| Rhythm {
            every: DAY * days,
            at: Some(TimeOfDay { seconds }),
        });
        proptest::option::of(prop_oneof![every, at])
    }

    proptest! {
        /// Whatever is known: something that is wanted comes, never later than a period (and a day, where there is a
        /// time of day), and what is on record as younger than half of its period is never run.
        #[test]
        fn everything_comes_in_its_time_and_nothing_too_soon(
            rhythms in proptest::array::uniform4(rhythms()),
            ages in proptest::array::uniform4(proptest::option::of(durations())),
            lasts in proptest::array::uniform4(attempts()),
            now in MIDNIGHT..MIDNIGHT + 100 * DAY_SECONDS,
        ) {
            let schedule = Schedule { rhythms, backup_on_standby: false };
            let known = std::array::from_fn(|n| Known { age: ages[n], last: lasts[n] });
            match next(&schedule, &known, now) {
                None => prop_assert!(!schedule.is_set()),
                Some(due) => {
                    let rhythm = rhythms[due.task as usize].unwrap();
                    prop_assert!(due.wait <= rhythm.every + DAY);
                    if let Some(age) = ages[due.task as usize] && age * 2 < rhythm.every {
                        prop_assert!(due.wait > Duration::ZERO);
                    }
                }
            }
        }

        /// A year of one agent or two that run whatever is due, with runs that take long: all tasks come, none much
        /// later than the longest run allows, and two agents make no more runs than one.
        #[test]
        fn nothing_is_put_off_for_ever(
            hours in proptest::array::uniform4(1u64..200),
            takes in 0u64..30,
            agents in 1usize..3,
        ) {
            let rhythms = hours.map(|hours| {
                Some(Rhythm { every: Duration::from_hours(hours), at: None })
            });
            let schedule = Schedule { rhythms, backup_on_standby: false };
            let mut recorded: [Option<u64>; 4] = [None; 4];
            let mut own = vec![[None::<u64>; 4]; agents];
            let mut runs = [0u64; 4];
            let (begin, hour) = (MIDNIGHT, 3_600);
            let end = begin + 365 * DAY_SECONDS;
            let mut now = begin;
            while now < end {
                for own in &mut own {
                    let known = std::array::from_fn(|n| Known {
                        age: recorded[n].map(|at| Duration::from_secs(now - at)),
                        last: own[n].map(|at| Attempt {
                            began_ago: Duration::from_secs(now - at),
                            ended_ago: Duration::ZERO,
                            failures: 0,
                        }),
                    });
                    let due = next(&schedule, &known, now).unwrap();
                    if due.wait.is_zero() {
                        let task = due.task as usize;
                        recorded[task] = Some(now);
                        own[task] = Some(now);
                        runs[task] += 1;
                        now += takes * hour;
                    }
                }
                now += hour;
            }
            for (n, runs) in runs.into_iter().enumerate() {
                // All four may wait for all others, each time.
                let longest = hours[n] + 5 * (takes + 1);
                prop_assert!(runs >= 365 * 24 / longest - 1, "{n}: {runs} runs");
                prop_assert!(runs <= 365 * 24 / hours[n] + 2, "{n}: {runs} runs");
            }
        }
    }
}
