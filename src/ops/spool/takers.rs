//! The repositories into which a spool is drained: the only one, or both.
//!
//! ```text
//! the only one, or wal_copies = "all"    each confirms before anything is removed here
//! wal_copies = "any"                     one confirms; the other, being away, lacks it until `copy` brings it
//! one refuses                            a failure, whatever the other says
//! ```
//!
//! One that was away is not asked again in the same run: each question may take as long as its store's patience. Never
//! here: what is brought, and what becomes of what is refused.

use std::collections::BTreeSet;

use futures_util::future::join_all;

use crate::failure::{Failure, Kind};
use crate::ops::Which;
use crate::repo::Repository;

/// Where that is kept for good which lies on this host.
#[derive(Debug, Clone)]
pub struct Destinations {
    /// The repository, or the first of two.
    pub first: Repository,
    /// The second, where there is one.
    pub second: Option<Repository>,
    /// Whether one of two is enough, while the other is away.
    pub one_is_enough: bool,
}

impl Destinations {
    /// Returns the only one there is.
    pub fn only(repository: &Repository) -> Self {
        Self { first: repository.clone(), second: None, one_is_enough: false }
    }
}

/// They, in one run.
pub(super) struct Takers<'a> {
    all: Vec<Taker<'a>>,
    one_is_enough: bool,
}

struct Taker<'a> {
    which: Which,
    repository: &'a Repository,
    away: Option<Failure>,
}

impl<'a> Takers<'a> {
    pub(super) fn new(into: &'a Destinations) -> Self {
        let first = Taker { which: Which::First, repository: &into.first, away: None };
        let second = into.second.as_ref();
        let second =
            second.map(|repository| Taker { which: Which::Second, repository, away: None });
        let all = [Some(first), second].into_iter().flatten().collect();
        Self { all, one_is_enough: into.one_is_enough }
    }

    /// Returns whether there are two.
    pub(super) fn are_two(&self) -> bool {
        self.all.len() > 1
    }

    /// Returns which there are, those included that are away.
    pub(super) fn names(&self) -> BTreeSet<Which> {
        self.all.iter().map(|taker| taker.which).collect()
    }

    /// Returns one that was found away, and why.
    pub(super) fn away(&self) -> Option<(Which, &Failure)> {
        self.all.iter().find_map(|taker| Some((taker.which, taker.away.as_ref()?)))
    }

    /// Does something with each that is not known to be away, at the same time; returns what came of it where that was
    /// possible.
    ///
    /// # Errors
    /// That of one that refuses: it is not away, and the other's success does not make up for it.
    pub(super) async fn each<T>(
        &mut self,
        work: impl AsyncFn(Which, &Repository) -> Result<T, Failure>,
    ) -> Result<Vec<(Which, T)>, Failure> {
        let are_two = self.are_two();
        let asked = self.all.iter_mut().filter(|taker| taker.away.is_none());
        let asked = asked.map(async |taker| {
            let outcome = work(taker.which, taker.repository).await;
            (taker, outcome)
        });
        let mut done = Vec::new();
        let mut refused = None;
        for (taker, outcome) in join_all(asked).await {
            let named = |failure: Failure| {
                let place = format!("in the {} repository", taker.which.word());
                if are_two { failure.so(place) } else { failure }
            };
            match outcome {
                Ok(value) => done.push((taker.which, value)),
                Err(failure) if failure.kind == Kind::Store => taker.away = Some(named(failure)),
                Err(failure) => refused = refused.or(Some(named(failure))),
            }
        }
        refused.map_or(Ok(done), Err)
    }

    /// Fails unless as many have done something as must, and ends the run: with the failure of one that is away.
    pub(super) fn require<T>(&mut self, done: &[(Which, T)]) -> Result<(), Failure> {
        let is_enough =
            if self.one_is_enough { !done.is_empty() } else { done.len() == self.all.len() };
        if is_enough { Ok(()) } else { self.give_up() }
    }

    /// Fails if none has done something, and ends the run.
    pub(super) fn require_one<T>(&mut self, done: &[(Which, T)]) -> Result<(), Failure> {
        if done.is_empty() { self.give_up() } else { Ok(()) }
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        self.all.iter_mut().find_map(|taker| taker.away.take()).map_or(Ok(()), Err)
    }
}
