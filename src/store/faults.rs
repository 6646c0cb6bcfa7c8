//! A store that fails on demand: equipment for the tests of every room.
//!
//! Owns: which call fails, when, how, and a record of all calls. Never here:
//! anything that a user's repository goes through; `open` never builds one.
//!
//! ```
//! # use std::sync::Arc;
//! use highwater::store::faults::{Call, Fault, FaultStore};
//! use highwater::store::memory::MemoryStore;
//! // The third create takes effect, but its answer is lost.
//! let store = FaultStore::new(Arc::new(MemoryStore::new()));
//! store.inject(Fault::on(Call::Create).nth(3).after_effect());
//! ```

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use super::{Body, Key, Level, Listed, Reading, Store, StoreError};

/// The calls of a [`Store`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Store::create`].
    Create,
    /// [`Store::read`], up to the first byte.
    Read,
    /// [`Store::list`], at its beginning.
    List,
    /// [`Store::list_level`].
    ListLevel,
    /// [`Store::delete`].
    Delete,
}

/// What a caller gets to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Symptom {
    /// [`StoreError::Unavailable`].
    Unavailable,
    /// [`StoreError::Denied`].
    Denied,
    /// [`StoreError::NoRoom`].
    NoRoom,
    /// [`StoreError::Refused`].
    Refused,
    /// A read or a listing that gives this many bytes or items and then breaks
    /// off as [`StoreError::Unavailable`]. Other calls are just unavailable.
    CutAfter(u64),
    /// No error, only a delay.
    Slow(Duration),
}

/// Called with the call and its key when a fault strikes, before it does.
pub type Hook = Arc<dyn Fn(Call, &Key) + Send + Sync>;

/// One planned failure. Begins with [`Fault::on`] or [`Fault::anywhere`].
#[derive(Clone)]
pub struct Fault {
    call: Option<Call>,
    key_part: Option<String>,
    nth: u64,
    for_ever: bool,
    after_effect: bool,
    symptom: Symptom,
    hook: Option<Hook>,
    seen: u64,
}

impl Fault {
    /// Plans that the next `call` fails once, before its effect, as unavailable.
    pub fn on(call: Call) -> Self {
        Self { call: Some(call), ..Self::anywhere() }
    }

    /// Plans the same for the next call of any kind.
    pub fn anywhere() -> Self {
        Self {
            call: None,
            key_part: None,
            nth: 1,
            for_ever: false,
            after_effect: false,
            symptom: Symptom::Unavailable,
            hook: None,
            seen: 0,
        }
    }

    /// Counts only calls whose key or prefix contains `part`.
    #[must_use]
    pub fn key_contains(mut self, part: impl Into<String>) -> Self {
        self.key_part = Some(part.into());
        self
    }

    /// Strikes at the `nth` call that fits, from 1.
    #[must_use]
    pub fn nth(mut self, nth: u64) -> Self {
        self.nth = nth.max(1);
        self
    }

    /// Strikes from then on every time.
    #[must_use]
    pub fn for_ever(mut self) -> Self {
        self.for_ever = true;
        self
    }

    /// Lets the call take effect and loses the answer.
    #[must_use]
    pub fn after_effect(mut self) -> Self {
        self.after_effect = true;
        self
    }

    /// Chooses what the caller gets to see.
    #[must_use]
    pub fn symptom(mut self, symptom: Symptom) -> Self {
        self.symptom = symptom;
        self
    }

    /// Calls `hook` when the fault strikes.
    #[must_use]
    pub fn hook(mut self, hook: impl Fn(Call, &Key) + Send + Sync + 'static) -> Self {
        self.hook = Some(Arc::new(hook));
        self
    }

    /// Counts a call and tells whether the fault strikes at it.
    fn strikes(&mut self, call: Call, key: &Key) -> bool {
        let fits = self.call.is_none_or(|wanted| wanted == call)
            && self.key_part.as_ref().is_none_or(|part| key.as_str().contains(part.as_str()));
        if !fits {
            return false;
        }
        self.seen += 1;
        self.seen == self.nth || (self.for_ever && self.seen > self.nth)
    }

    fn error(&self, key: &Key) -> StoreError {
        let (key, cause) = (key.clone(), "an injected fault".into());
        match self.symptom {
            Symptom::Denied => StoreError::Denied { key, cause },
            Symptom::NoRoom => StoreError::NoRoom { key, cause },
            Symptom::Refused => StoreError::Refused { key, cause },
            Symptom::Unavailable | Symptom::CutAfter(_) | Symptom::Slow(_) => {
                StoreError::Unavailable { key, cause }
            }
        }
    }
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fault")
            .field("call", &self.call)
            .field("nth", &self.nth)
            .field("seen", &self.seen)
            .field("symptom", &self.symptom)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Plan {
    faults: Vec<Fault>,
    calls: Vec<(Call, Key)>,
}

/// A store that records its calls and fails as planned. Clones share both.
#[derive(Debug, Clone)]
pub struct FaultStore {
    inner: Arc<dyn Store>,
    plan: Arc<Mutex<Plan>>,
}

impl FaultStore {
    /// Wraps a store; nothing fails until [`FaultStore::inject`].
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, plan: Arc::default() }
    }

    /// Adds a planned failure. If several strike at one call, the first added wins.
    pub fn inject(&self, fault: Fault) {
        self.plan().faults.push(fault);
    }

    /// Forgets all planned failures; the record of calls stays.
    pub fn heal(&self) {
        self.plan().faults.clear();
    }

    /// Returns every call so far with its key or prefix, in order.
    pub fn calls(&self) -> Vec<(Call, Key)> {
        self.plan().calls.clone()
    }

    /// Returns how often `call` was made.
    pub fn count(&self, call: Call) -> usize {
        self.plan().calls.iter().filter(|(made, _)| *made == call).count()
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a call; returns the fault that strikes, after its hook ran.
    fn note(&self, call: Call, key: &Key) -> Option<Fault> {
        let fault = {
            let mut plan = self.plan();
            plan.calls.push((call, key.clone()));
            // Every fault counts the call, so `any` must not stop at the first.
            let struck: Vec<bool> =
                plan.faults.iter_mut().map(|fault| fault.strikes(call, key)).collect();
            struck.iter().position(|s| *s).map(|index| plan.faults[index].clone())
        };
        if let Some(hook) = fault.as_ref().and_then(|fault| fault.hook.as_ref()) {
            hook(call, key);
        }
        fault
    }

    /// Makes a call that fails as planned; `effect` is the real call.
    async fn call<T: Send>(
        &self,
        call: Call,
        key: &Key,
        effect: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        match self.note(call, key) {
            None => effect.await,
            Some(Fault { symptom: Symptom::Slow(delay), .. }) => {
                tokio::time::sleep(delay).await;
                effect.await
            }
            Some(fault) if fault.after_effect => {
                effect.await?;
                Err(fault.error(key))
            }
            Some(fault) => Err(fault.error(key)),
        }
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        self.call(Call::Create, key, self.inner.create(key, body)).await
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        match self.note(Call::Read, key) {
            None => self.inner.read(key, range).await,
            Some(Fault { symptom: Symptom::Slow(delay), .. }) => {
                tokio::time::sleep(delay).await;
                self.inner.read(key, range).await
            }
            Some(fault) => {
                let Symptom::CutAfter(bytes_max) = fault.symptom else {
                    return Err(fault.error(key));
                };
                let Reading { size_bytes, bytes } = self.inner.read(key, range).await?;
                let error = fault.error(key);
                let mut left = bytes_max;
                let cut = bytes.map(move |piece| {
                    piece.map(|piece| {
                        let keep = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
                        left -= keep as u64;
                        piece.slice(..keep)
                    })
                });
                let kept = cut.take_while(|piece| {
                    let goes_on = piece.as_ref().map_or(true, |piece| !piece.is_empty());
                    std::future::ready(goes_on)
                });
                let bytes = kept.chain(stream::iter([Err(error)])).boxed();
                Ok(Reading { size_bytes, bytes })
            }
        }
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        match self.note(Call::List, prefix) {
            None => self.inner.list(prefix),
            Some(fault) => {
                let items = match fault.symptom {
                    Symptom::CutAfter(items) => usize::try_from(items).unwrap_or(usize::MAX),
                    Symptom::Slow(delay) => {
                        let inner = self.inner.list(prefix);
                        let wait = stream::once(tokio::time::sleep(delay));
                        return wait.flat_map(|()| stream::empty()).chain(inner).boxed();
                    }
                    _ => 0,
                };
                let error = stream::iter([Err(fault.error(prefix))]);
                self.inner.list(prefix).take(items).chain(error).boxed()
            }
        }
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        self.call(Call::ListLevel, prefix, self.inner.list_level(prefix)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.call(Call::Delete, key, self.inner.delete(key)).await
    }

    async fn settle(&self, prefix: &Key) -> Result<(), StoreError> {
        self.inner.settle(prefix).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
