//! How long each part of a drill takes.
//!
//! Never here: what the parts do.

use std::time::{Duration, Instant};

use crate::format::DrillPhase;

/// The parts of a drill, timed.
#[derive(Debug, Default)]
pub(super) struct Phases {
    over: Vec<DrillPhase>,
    now: Option<(&'static str, Instant)>,
}

impl Phases {
    /// Ends the part that is under way, and begins another.
    pub(super) fn begin(&mut self, name: &'static str) {
        if let Some((name, began)) = self.now.replace((name, Instant::now())) {
            self.over.push(DrillPhase { name: name.to_owned(), millis: millis(began.elapsed()) });
        }
    }

    pub(super) fn now(&self) -> String {
        self.now.map_or("", |(name, _)| name).to_owned()
    }

    /// Returns how long the part under way has taken so far.
    pub(super) fn elapsed(&self) -> Duration {
        self.now.map_or(Duration::ZERO, |(_, began)| began.elapsed())
    }

    pub(super) fn end(mut self) -> Vec<DrillPhase> {
        if let Some((name, began)) = self.now {
            self.over.push(DrillPhase { name: name.to_owned(), millis: millis(began.elapsed()) });
        }
        self.over
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
