//! The acknowledgement rule against a model that knows every byte.
//!
//! Uploads end in any order, twice, or never; objects overlap; a process is killed while its uploads
//! land later; the next one begins from what a listing shows.

use super::*;

/// Where the WAL of the model begins, and how long a unit of it is.
const START: u64 = 1000;
const UNIT: u64 = 64;

/// What can happen while objects travel.
#[derive(Debug, Clone)]
enum Event {
    Receive(u64),
    /// Hands everything that was received and not cut to an upload.
    Cut,
    /// Hands a complete unit to an upload, over whatever was cut of it.
    Unit(usize),
    /// Hands what lies between two stored pieces, both included, to an upload, if all of it is stored.
    Merge(usize, usize),
    /// The upload of that number (modulo those on their way) is confirmed.
    Confirm(usize),
    /// One that was confirmed before is once more.
    ConfirmAgain(usize),
    /// An upload fails, after its effect if so said, and is repeated.
    Fail(usize, bool),
    /// The process is killed; what was on its way may land later. The next begins.
    Kill,
    /// What a killed process had sent lands.
    LandLate(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (1u64..50).prop_map(Event::Receive),
        6 => Just(Event::Cut),
        2 => any::<usize>().prop_map(Event::Unit),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(one, other)| Event::Merge(one, other)),
        9 => any::<usize>().prop_map(Event::Confirm),
        2 => any::<usize>().prop_map(Event::ConfirmAgain),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(n, landed)| Event::Fail(n, landed)),
        1 => Just(Event::Kill),
        2 => any::<usize>().prop_map(Event::LandLate),
    ]
}

/// Bytes from [`START`] on, each there or not.
#[derive(Debug, Clone, Default)]
struct Bytes(Vec<bool>);

impl Bytes {
    fn put(&mut self, (start, end): (u64, u64)) {
        let (start, end) = (index(start), index(end));
        if self.0.len() < end {
            self.0.resize(end, false);
        }
        self.0[start..end].fill(true);
    }

    fn has(&self, (start, end): (u64, u64)) -> bool {
        (index(start)..index(end)).all(|at| self.0.get(at) == Some(&true))
    }

    fn unbroken_end(&self) -> u64 {
        START + self.0.iter().take_while(|is_there| **is_there).count() as u64
    }
}

fn index(position: u64) -> usize {
    usize::try_from(position - START).unwrap()
}

/// One process.
#[derive(Debug)]
struct Receiver {
    progress: Progress,
    received: u64,
    cut: u64,
    flying: Vec<(u64, u64)>,
    done: Vec<(u64, u64)>,
    /// What it was told is stored, by a confirmation or by the listing that it began with.
    confirmed: Bytes,
    acknowledged: u64,
}

impl Receiver {
    /// Begins from what a listing shows.
    fn begin(stored: &Bytes) -> Self {
        let (mut progress, end) = (Progress::begin(Lsn(START)), stored.unbroken_end());
        let mut confirmed = Bytes::default();
        progress.store(Lsn(START), Lsn(end));
        confirmed.put((START, end));
        let (flying, done) = (Vec::new(), Vec::new());
        Self { progress, received: START, cut: end, flying, done, confirmed, acknowledged: START }
    }

    fn confirm(&mut self, object: (u64, u64)) {
        self.progress.store(Lsn(object.0), Lsn(object.1));
        self.confirmed.put(object);
    }

    /// What must hold at any time, and the position that the server is told.
    fn check(&mut self) -> u64 {
        let flush = self.progress.flush_lsn().0;
        let unbroken = self.confirmed.unbroken_end();
        assert_eq!(flush, unbroken.min(self.received), "{self:?}");
        assert_eq!(self.progress.stored_lsn().0, unbroken);
        assert!(flush >= self.acknowledged, "it went back from {}", self.acknowledged);
        self.acknowledged = flush;
        flush
    }
}

/// The repository, and the uploads of processes that are no more.
#[derive(Debug, Default)]
struct Repository {
    stored: Bytes,
    late: Vec<(u64, u64)>,
}

fn step(repository: &mut Repository, receiver: &mut Receiver, event: &Event) {
    match *event {
        Event::Receive(bytes) => {
            receiver.received += bytes;
            receiver.progress.receive(Lsn(receiver.received));
        }
        Event::Cut if receiver.cut < receiver.received => {
            receiver.flying.push((receiver.cut, receiver.received));
            receiver.cut = receiver.received;
        }
        Event::Unit(n) => {
            let complete = (receiver.received - START) / UNIT;
            if complete > 0 {
                let start = START + n as u64 % complete * UNIT;
                receiver.flying.push((start, start + UNIT));
            }
        }
        Event::Merge(one, other) if !receiver.done.is_empty() => {
            let (one, other) = (pick(&receiver.done, one), pick(&receiver.done, other));
            let merged = (one.0.min(other.0), one.1.max(other.1));
            if repository.stored.has(merged) {
                receiver.flying.push(merged);
            }
        }
        Event::Confirm(n) if !receiver.flying.is_empty() => {
            let object = receiver.flying.swap_remove(n % receiver.flying.len());
            repository.stored.put(object);
            receiver.confirm(object);
            receiver.done.push(object);
        }
        Event::ConfirmAgain(n) if !receiver.done.is_empty() => {
            let object = pick(&receiver.done, n);
            receiver.confirm(object);
        }
        Event::Fail(n, true) if !receiver.flying.is_empty() => {
            repository.stored.put(pick(&receiver.flying, n));
        }
        Event::Kill => {
            repository.late.append(&mut receiver.flying);
            *receiver = Receiver::begin(&repository.stored);
        }
        Event::LandLate(n) if !repository.late.is_empty() => {
            let object = repository.late.swap_remove(n % repository.late.len());
            repository.stored.put(object);
        }
        _ => {}
    }
}

fn pick(objects: &[(u64, u64)], n: usize) -> (u64, u64) {
    objects[n % objects.len()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Whatever the order in which uploads end, fail and are repeated, and whenever a
    /// receiver dies: every byte that any of them acknowledged is stored and all before it, an acknowledgement is exactly
    /// what is known to be stored, and never goes back while a receiver lives.
    #[test]
    fn no_byte_is_acknowledged_before_it_and_all_before_it_are_stored(
        events in prop::collection::vec(event(), 1..200),
    ) {
        let mut repository = Repository::default();
        let mut receiver = Receiver::begin(&repository.stored);
        let mut acknowledged = START;
        for event in events {
            step(&mut repository, &mut receiver, &event);
            acknowledged = acknowledged.max(receiver.check());
            prop_assert!(acknowledged <= repository.stored.unbroken_end(), "{:?}", event);
        }
        // Once everything on its way is confirmed, everything cut and received is acknowledged.
        for object in std::mem::take(&mut receiver.flying).into_iter().rev() {
            receiver.confirm(object);
            receiver.check();
        }
        prop_assert!(receiver.acknowledged >= receiver.cut.min(receiver.received));
    }
}
