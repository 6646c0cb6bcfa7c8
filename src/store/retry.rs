//! The one place where a failed request is tried again.
//!
//! Owns: how often, how long apart, and how a body or a listing goes on in the
//! middle. Never here: which failures may pass ([`StoreError::is_transient`]
//! says so), settling a create whose answer was lost (the caller reads the
//! object back).
//!
//! Delays grow twofold from `DELAY_FIRST` to `DELAY_MAX` and are drawn from
//! the whole interval ("full jitter"), so that a hundred archivers that lost the
//! same store do not come back in step.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::time::Instant;

use super::random::random_u64;
use super::{Body, Key, Level, Listed, Reading, Store, StoreError};
use crate::causes::in_one_line;

/// The longest delay before the first repetition.
const DELAY_FIRST: Duration = Duration::from_millis(200);

/// The longest delay before any repetition.
const DELAY_MAX: Duration = Duration::from_secs(15);

/// Repetitions that may last this long are worth a warning when they begin.
const WORTH_A_WARNING: Duration = Duration::from_secs(10);

/// How persistent [`Retrying`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How often a request is repeated after its first attempt.
    pub repetitions: u32,
    /// No attempt begins later than this after the first one. A body or a
    /// listing that makes progress starts its count and its time anew.
    pub deadline: Duration,
}

/// Repeats the calls of a store when they fail in a way that may pass.
///
/// - `create` is repeated too: if an earlier attempt took effect and its answer
///   was lost, the repetition is told [`StoreError::Exists`] and so is the
///   caller, who settles it.
/// - A body goes on at the byte where it broke off, if the object still has the
///   same size.
/// - A listing that fails is asked to go on where it stood. A driver that can
///   (the cloud drivers know the token of the page) does so; for one that
///   cannot, whose listing ends after an error, the error is final. Starting
///   anew after the first item would give some objects twice.
#[derive(Debug)]
pub struct Retrying<S: Store + ?Sized> {
    inner: Arc<S>,
    policy: RetryPolicy,
}

impl<S: Store + ?Sized> Retrying<S> {
    /// Wraps a store.
    pub fn new(inner: Arc<S>, policy: RetryPolicy) -> Self {
        Self { inner, policy }
    }
}

/// The state of one request that is being repeated.
#[derive(Debug)]
struct Attempts {
    policy: RetryPolicy,
    repeated: u32,
    since: Instant,
}

impl Attempts {
    fn new(policy: RetryPolicy) -> Self {
        Self { policy, repeated: 0, since: Instant::now() }
    }

    /// Notes progress, so that a long transfer over a bad line is not given up.
    fn progress(&mut self) {
        self.repeated = 0;
        self.since = Instant::now();
    }

    /// Waits before the next attempt, or gives the error back if there is to be none.
    async fn again(&mut self, call: &'static str, error: StoreError) -> Result<(), StoreError> {
        if !error.is_transient() || self.repeated >= self.policy.repetitions {
            return Err(error);
        }
        let delay = jittered(self.repeated);
        if self.since.elapsed() + delay >= self.policy.deadline {
            return Err(error);
        }
        self.repeated += 1;
        let attempts_max = self.policy.repetitions + 1;
        let (attempt, cause) = (self.repeated, in_one_line(&error));
        // Said once: an outage of an hour must not fill the server's log with the same line. A caller with little
        // patience comes again by itself, and says so itself.
        if attempt == 1 && self.policy.deadline >= WORTH_A_WARNING {
            tracing::warn!(
                call, attempts_max, %cause,
                "a request to the store failed and will be repeated"
            );
        } else {
            let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
            tracing::debug!(
                call, attempt, attempts_max, delay_ms, %cause,
                "a request to the store failed again and will be repeated"
            );
        }
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

/// Draws the delay before repetition number `repeated` (from 0).
fn jittered(repeated: u32) -> Duration {
    let longest = DELAY_FIRST.saturating_mul(1 << repeated.min(16)).min(DELAY_MAX);
    let millis = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX).max(1);
    Duration::from_millis(random_u64() % (millis + 1))
}

async fn open<S: Store + ?Sized>(
    inner: &S,
    attempts: &mut Attempts,
    key: &Key,
    range: Option<Range<u64>>,
) -> Result<Reading, StoreError> {
    loop {
        match inner.read(key, range.clone()).await {
            Ok(reading) => return Ok(reading),
            Err(error) => attempts.again("read", error).await?,
        }
    }
}

/// A body that is opened again at the byte where it broke off.
struct Resumed<S: Store + ?Sized> {
    inner: Arc<S>,
    key: Key,
    size_bytes: u64,
    /// What is still to come, in bytes of the object, end excluded.
    rest: Range<u64>,
    bytes: BoxStream<'static, Result<Bytes, StoreError>>,
    attempts: Attempts,
}

impl<S: Store + ?Sized + 'static> Resumed<S> {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        while !self.rest.is_empty() {
            let error = match self.bytes.next().await {
                Some(Ok(piece)) if piece.len() as u64 <= self.rest.end - self.rest.start => {
                    self.rest.start += piece.len() as u64;
                    self.attempts.progress();
                    return Ok(Some(piece));
                }
                Some(Ok(_)) => return Err(self.changed("it gave more bytes than it has")),
                Some(Err(error)) => error,
                None => {
                    let cause =
                        format!("the body ended {} bytes early", self.rest.end - self.rest.start);
                    StoreError::Unavailable { key: self.key.clone(), cause: cause.into() }
                }
            };
            self.attempts.again("read", error).await?;
            let rest = Some(self.rest.clone());
            let reading = open(&*self.inner, &mut self.attempts, &self.key, rest).await?;
            if reading.size_bytes != self.size_bytes {
                return Err(self.changed("its size is another now"));
            }
            self.bytes = reading.bytes;
        }
        Ok(None)
    }

    fn changed(&self, what: &str) -> StoreError {
        let cause = format!("the object changed while it was being read: {what}");
        StoreError::Refused { key: self.key.clone(), cause: cause.into() }
    }
}

#[async_trait]
impl<S: Store + ?Sized + 'static> Store for Retrying<S> {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        let mut attempts = Attempts::new(self.policy);
        loop {
            match self.inner.create(key, body.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.again("create", error).await?,
            }
        }
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        let mut attempts = Attempts::new(self.policy);
        let Reading { size_bytes, bytes } =
            open(&*self.inner, &mut attempts, key, range.clone()).await?;
        let rest = super::contract::clip(key, size_bytes, range)?;
        let inner = Arc::clone(&self.inner);
        let resumed = Resumed { inner, key: key.clone(), size_bytes, rest, bytes, attempts };
        let bytes = stream::try_unfold(resumed, |mut resumed| async move {
            Ok(resumed.next().await?.map(|piece| (piece, resumed)))
        });
        Ok(Reading { size_bytes, bytes: bytes.boxed() })
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        let listing = Listing {
            inner: Arc::clone(&self.inner),
            prefix: prefix.clone(),
            items: self.inner.list(prefix),
            attempts: Attempts::new(self.policy),
            gave_any: false,
        };
        stream::try_unfold(listing, |mut listing| async move {
            Ok(listing.next().await?.map(|item| (item, listing)))
        })
        .boxed()
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        let mut attempts = Attempts::new(self.policy);
        loop {
            match self.inner.list_level(prefix).await {
                Ok(level) => return Ok(level),
                Err(error) => attempts.again("list", error).await?,
            }
        }
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let mut attempts = Attempts::new(self.policy);
        loop {
            match self.inner.delete(key).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.again("delete", error).await?,
            }
        }
    }

    async fn discard(&self, key: &Key) -> Result<(), StoreError> {
        let mut attempts = Attempts::new(self.policy);
        loop {
            match self.inner.discard(key).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.again("discard", error).await?,
            }
        }
    }

    async fn settle(&self, prefix: &Key) -> Result<(), StoreError> {
        let mut attempts = Attempts::new(self.policy);
        loop {
            match self.inner.settle(prefix).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.again("settle", error).await?,
            }
        }
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// A listing that goes on after a failure.
struct Listing<S: Store + ?Sized> {
    inner: Arc<S>,
    prefix: Key,
    items: BoxStream<'static, Result<Listed, StoreError>>,
    attempts: Attempts,
    gave_any: bool,
}

impl<S: Store + ?Sized> Listing<S> {
    async fn next(&mut self) -> Result<Option<Listed>, StoreError> {
        let mut failed: Option<StoreError> = None;
        loop {
            match (self.items.next().await, failed.take()) {
                (Some(Ok(item)), _) => {
                    self.gave_any = true;
                    self.attempts.progress();
                    return Ok(Some(item));
                }
                (Some(Err(error)), _) => {
                    let kept = copy(&error, &self.prefix);
                    self.attempts.again("list", error).await?;
                    failed = Some(kept);
                }
                (None, None) => return Ok(None),
                // The listing ended because of the error, not because it was
                // complete: to call it complete would hide objects.
                (None, Some(error)) if self.gave_any => return Err(error),
                (None, Some(_)) => self.items = self.inner.list(&self.prefix),
            }
        }
    }
}

/// Causes cannot be cloned, and the original is consumed by the decision to go on.
fn copy(error: &StoreError, prefix: &Key) -> StoreError {
    StoreError::Unavailable { key: prefix.clone(), cause: in_one_line(error).into() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use futures_util::TryStreamExt;

    use super::super::faults::{Call, Fault, FaultStore, Symptom};
    use super::super::memory::MemoryStore;
    use super::*;

    const POLICY: RetryPolicy = RetryPolicy { repetitions: 2, deadline: Duration::from_mins(1) };

    fn stores() -> (MemoryStore, FaultStore, Retrying<FaultStore>) {
        let memory = MemoryStore::new();
        let faulty = FaultStore::new(Arc::new(memory.clone()));
        let retrying = Retrying::new(Arc::new(faulty.clone()), POLICY);
        (memory, faulty, retrying)
    }

    fn key() -> Key {
        Key::new("a/b")
    }

    #[tokio::test]
    async fn a_passing_failure_is_repeated_and_a_lasting_one_given_back() {
        let (memory, faulty, store) = stores();
        faulty.inject(Fault::on(Call::Create));
        store.create(&key(), vec![1].into()).await.unwrap();
        assert_eq!(memory.bytes("a/b").unwrap().as_ref(), [1]);
        assert_eq!(faulty.count(Call::Create), 2);
        faulty.inject(Fault::on(Call::Delete).for_ever());
        assert!(store.delete(&key()).await.unwrap_err().is_transient());
        assert_eq!(faulty.count(Call::Delete), 3);
        assert!(store.discard(&key()).await.unwrap_err().is_transient());
        assert_eq!(faulty.count(Call::Delete), 6);
    }

    #[tokio::test]
    async fn what_no_retry_cures_is_not_repeated() {
        for symptom in [Symptom::Denied, Symptom::NoRoom, Symptom::Refused] {
            let (_, faulty, store) = stores();
            faulty.inject(Fault::anywhere().for_ever().symptom(symptom));
            store.create(&key(), vec![1].into()).await.unwrap_err();
            assert!(store.list(&key()).try_next().await.is_err());
            assert_eq!(faulty.calls().len(), 2, "{symptom:?}");
        }
    }

    #[tokio::test]
    async fn a_create_whose_answer_was_lost_comes_back_as_exists() {
        let (memory, faulty, store) = stores();
        faulty.inject(Fault::on(Call::Create).after_effect());
        let error = store.create(&key(), vec![1].into()).await.unwrap_err();
        assert!(matches!(error, StoreError::Exists { .. }), "{error}");
        assert_eq!(memory.bytes("a/b").unwrap().as_ref(), [1]);
    }

    #[tokio::test]
    async fn a_body_goes_on_where_it_broke_off() {
        let (memory, faulty, store) = stores();
        let content: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        memory.overwrite("a/b", content.clone());
        // More cuts than repetitions: progress starts the count anew.
        faulty.inject(Fault::on(Call::Read).for_ever().symptom(Symptom::CutAfter(200_001)));
        let reading = store.read(&key(), Some(5..999_999)).await.unwrap();
        assert_eq!(reading.size_bytes, 1_000_000);
        let pieces: Vec<Bytes> = reading.bytes.try_collect().await.unwrap();
        assert_eq!(pieces.concat(), content[5..999_999]);
        assert!(faulty.count(Call::Read) >= 5, "{}", faulty.count(Call::Read));
    }

    #[tokio::test]
    async fn a_body_that_never_moves_ends_with_an_error() {
        let (memory, faulty, store) = stores();
        memory.overwrite("a/b", vec![1; 1000]);
        faulty.inject(Fault::on(Call::Read).for_ever().symptom(Symptom::CutAfter(0)));
        let reading = store.read(&key(), None).await.unwrap();
        let error = reading.bytes.try_collect::<Vec<_>>().await.unwrap_err();
        assert!(error.is_transient());
        assert_eq!(faulty.count(Call::Read), 3);
    }

    #[tokio::test]
    async fn an_object_of_another_size_is_not_pieced_together() {
        let (memory, faulty, store) = stores();
        memory.overwrite("a/b", vec![1; 1000]);
        faulty.inject(Fault::on(Call::Read).symptom(Symptom::CutAfter(10)));
        let reading = store.read(&key(), None).await.unwrap();
        memory.overwrite("a/b", vec![2; 1001]);
        let error = reading.bytes.try_collect::<Vec<_>>().await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_listing_starts_anew_only_before_its_first_item() {
        let (memory, faulty, store) = stores();
        for name in ["a/1", "a/2", "a/3"] {
            memory.overwrite(name, vec![1]);
        }
        faulty.inject(Fault::on(Call::List));
        let all: Vec<Listed> = store.list(&Key::new("a")).try_collect().await.unwrap();
        assert_eq!(all.len(), 3);
        // Cut in the middle, and its driver cannot go on: an error, not a short list.
        faulty.inject(Fault::on(Call::List).symptom(Symptom::CutAfter(2)));
        let mut items = store.list(&Key::new("a"));
        assert!(items.try_next().await.unwrap().is_some());
        assert!(items.try_next().await.unwrap().is_some());
        assert!(items.try_next().await.unwrap_err().is_transient());
    }

    #[tokio::test]
    async fn no_attempt_begins_after_the_deadline() {
        let (_, faulty, _) = stores();
        let policy = RetryPolicy { repetitions: 100, deadline: Duration::from_millis(50) };
        let store = Retrying::new(Arc::new(faulty.clone()), policy);
        faulty.inject(Fault::anywhere().for_ever());
        let begun = Instant::now();
        store.delete(&key()).await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(faulty.count(Call::Delete) < 100);
    }

    #[test]
    fn delays_are_drawn_from_the_whole_growing_interval() {
        for repeated in [0, 1, 5, 40] {
            let longest = DELAY_FIRST.saturating_mul(1 << repeated.min(16)).min(DELAY_MAX);
            let drawn: Vec<Duration> = (0..200).map(|_| jittered(repeated)).collect();
            assert!(drawn.iter().all(|delay| *delay <= longest));
            assert!(drawn.iter().any(|delay| *delay < longest / 2));
            assert!(drawn.iter().any(|delay| *delay > longest / 2));
        }
    }
}
