//! The driver for S3, Google Cloud Storage and Azure Blob Storage.
//!
//! Owns: the contract of [`Store`] over `object_store`: conditional creates,
//! exact bodies, deadlines, listings page by page. Never here: how a client is
//! built (`clients`), what an answer means (`cloud_errors`), repetitions (`retry`).
//!
//! Every request has a deadline of its own instead of one for the whole
//! transfer: an upload has `stall_timeout` plus the time of its size at
//! 128 KiB/s, a download may pause for `stall_timeout` between any two pieces.
//!
//! A listing that fails at some page may be polled again and asks for the same
//! page; it ends after an error that no retry cures.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use object_store::list::PaginatedListOptions;
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, GetOptions, GetRange, ListResult, ObjectMeta, ObjectStoreExt, PutMode,
    PutOptions, PutPayload,
};
use tokio::sync::OnceCell;

use super::clients::{Backend, Setup};
use super::cloud_errors::{During, classify};
use super::contract::{check_key, check_prefix, is_key_part, rest_below, time_limit};
use super::options::spec;
use super::{Body, Cause, Key, Level, Listed, Reading, Store, StoreError};

/// A [`Store`] in a bucket. Cheap to clone. The client is built at the first
/// call, so that a command that needs no store pays for none.
#[derive(Clone)]
pub(super) struct CloudStore {
    inner: Arc<Inner>,
}

struct Inner {
    setup: Setup,
    /// What stands before every key, without a slash at either end; may be empty.
    prefix: Key,
    url: String,
    stall_timeout: Duration,
    conditional_put: bool,
    attributes: Attributes,
    client: OnceCell<Arc<dyn Backend>>,
}

impl fmt::Debug for CloudStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudStore").field("url", &self.inner.url).finish_non_exhaustive()
    }
}

impl CloudStore {
    /// Makes a store below `prefix` of a bucket; touches nothing.
    pub(super) fn new(setup: Setup, prefix: &str, url: String) -> Self {
        let mut attributes = Attributes::new();
        if let Some(class) = setup.options.text(&spec::STORAGE_CLASS) {
            attributes.insert(Attribute::StorageClass, class.to_owned().into());
        }
        let inner = Inner {
            prefix: Key::new(prefix),
            url,
            stall_timeout: setup.options.duration(&spec::STALL_TIMEOUT),
            conditional_put: setup.options.word(&spec::CONDITIONAL_PUT) != "off",
            attributes,
            setup,
            client: OnceCell::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    async fn client(&self, key: &Key) -> Result<&Arc<dyn Backend>, StoreError> {
        // Boxed, because what `aws-config` may do on the way makes it a very large future.
        let built = self.inner.client.get_or_try_init(|| Box::pin(self.inner.setup.build()));
        let refuse = |cause: Cause| StoreError::Refused { key: key.clone(), cause };
        self.within(key, 0, "preparing the client", built).await?.map_err(refuse)
    }

    /// Waits for a request that moves `bytes`, no longer than they may take.
    async fn within<T>(
        &self,
        key: &Key,
        bytes: u64,
        what: &str,
        work: impl Future<Output = T> + Send,
    ) -> Result<T, StoreError> {
        let limit = time_limit(self.inner.stall_timeout, bytes);
        tokio::time::timeout(limit, work).await.map_err(|_| {
            let cause = format!("{what} took longer than {limit:?}").into();
            StoreError::Unavailable { key: key.clone(), cause }
        })
    }

    /// Returns the full name of an object in the bucket.
    fn path(&self, key: &Key) -> Result<Path, StoreError> {
        check_key(key)?;
        Path::parse(join(&self.inner.prefix, key))
            .map_err(|e| StoreError::Refused { key: key.clone(), cause: Box::new(e) })
    }

    /// Returns what a full name in the bucket is called here, if we could have written it.
    fn key_of(&self, location: &Path) -> Option<Key> {
        let full = Key::new(location.as_ref());
        let rest = rest_below(&self.inner.prefix, &full)?;
        rest.split('/').all(is_key_part).then(|| Key::new(rest))
    }

    fn listed(&self, meta: &ObjectMeta) -> Option<Listed> {
        let key = self.key_of(&meta.location)?;
        Some(Listed { key, size_bytes: meta.size, modified: SystemTime::from(meta.last_modified) })
    }

    async fn page(
        &self,
        prefix: &Key,
        token: Option<String>,
        delimiter: Option<&'static str>,
    ) -> Result<(ListResult, Option<String>), StoreError> {
        check_prefix(prefix)?;
        let full = join(&self.inner.prefix, prefix);
        // With its slash, for `a/b` must not list `a/bc`.
        let full = (!full.is_empty()).then(|| format!("{full}/"));
        let client = self.client(prefix).await?;
        let options = PaginatedListOptions {
            delimiter: delimiter.map(Into::into),
            page_token: token.clone(),
            ..Default::default()
        };
        let request = client.list_paginated(full.as_deref(), options);
        let page = self
            .within(prefix, 0, "a page of the listing", request)
            .await?
            .map_err(|e| classify(During::List, prefix, &e))?;
        // An empty token is one that some stores send with the last page.
        let next = page.page_token.filter(|next| !next.is_empty());
        if next.is_some() && next == token {
            let cause = "the listing does not advance: the store gave the same page token twice";
            return Err(StoreError::Refused { key: prefix.clone(), cause: cause.into() });
        }
        Ok((page.result, next))
    }

    /// Creates by looking first, for stores without conditional put. Between
    /// the look and the write another writer may come: safe with one writer only.
    async fn create_unconditionally(
        &self,
        client: &Arc<dyn Backend>,
        key: &Key,
        path: &Path,
        body: &Body,
    ) -> Result<(), StoreError> {
        match self.within(key, 0, "the look before the write", client.head(path)).await? {
            Ok(_) => return Err(StoreError::Exists { key: key.clone() }),
            Err(error) => match classify(During::Look, key, &error) {
                StoreError::Absent { .. } => {}
                error => return Err(error),
            },
        }
        self.put(client, key, path, body, PutMode::Overwrite).await
    }

    async fn put(
        &self,
        client: &Arc<dyn Backend>,
        key: &Key,
        path: &Path,
        body: &Body,
        mode: PutMode,
    ) -> Result<(), StoreError> {
        let payload = body.pieces().iter().cloned().collect::<PutPayload>();
        let options =
            PutOptions { mode, attributes: self.inner.attributes.clone(), ..Default::default() };
        let request = client.put_opts(path, payload, options);
        self.within(key, body.len(), "the upload", request)
            .await?
            .map_err(|e| classify(During::Create, key, &e))?;
        Ok(())
    }
}

/// Joins two keys of which either may be empty.
fn join(prefix: &Key, key: &Key) -> String {
    match (prefix.as_str(), key.as_str()) {
        ("", key) => key.to_owned(),
        (prefix, "") => prefix.to_owned(),
        (prefix, key) => format!("{prefix}/{key}"),
    }
}

#[async_trait]
impl Store for CloudStore {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let client = self.client(key).await?;
        if self.inner.conditional_put {
            self.put(client, key, &path, &body, PutMode::Create).await
        } else {
            self.create_unconditionally(client, key, &path, &body).await
        }
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        let path = self.path(key)?;
        if let Some(range) = range.as_ref().filter(|range| range.is_empty()) {
            let cause = format!("the range {}..{} is empty", range.start, range.end);
            return Err(StoreError::Refused { key: key.clone(), cause: cause.into() });
        }
        let client = self.client(key).await?;
        let options = GetOptions { range: range.map(GetRange::Bounded), ..Default::default() };
        let result = self
            .within(key, 0, "the beginning of the answer", client.get_opts(&path, options))
            .await?
            .map_err(|e| classify(During::Read, key, &e))?;
        let (size_bytes, left) = (result.meta.size, result.range.end - result.range.start);
        let body =
            Arriving { store: self.clone(), key: key.clone(), left, pieces: result.into_stream() };
        let bytes = stream::try_unfold(body, |mut body| async move {
            Ok(body.next().await?.map(|piece| (piece, body)))
        });
        Ok(Reading { size_bytes, bytes: bytes.boxed() })
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        let pages = Pages { store: self.clone(), prefix: prefix.clone(), token: None, over: false };
        stream::unfold(pages, |mut pages| async move {
            let items = pages.next().await?;
            Some((stream::iter(items), pages))
        })
        .flatten()
        .boxed()
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        let mut level = Level::default();
        let mut directories = BTreeSet::new();
        let mut token = None;
        loop {
            let (page, next) = self.page(prefix, token, Some("/")).await?;
            let names = page.common_prefixes.iter().filter_map(|path| self.key_of(path));
            directories.extend(names.map(|key| key.file_name().to_owned()));
            level.objects.extend(page.objects.iter().filter_map(|meta| self.listed(meta)));
            token = next;
            if token.is_none() {
                break;
            }
        }
        level.directories = directories.into_iter().collect();
        level.objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(level)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let client = self.client(key).await?;
        match self.within(key, 0, "the delete", client.delete(&path)).await? {
            Ok(()) => Ok(()),
            Err(error) => match classify(During::Delete, key, &error) {
                StoreError::Absent { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    fn describe(&self) -> String {
        self.inner.url.clone()
    }
}

/// A body on its way, counted to the byte.
struct Arriving {
    store: CloudStore,
    key: Key,
    /// How many bytes are still to come.
    left: u64,
    pieces: BoxStream<'static, object_store::Result<Bytes>>,
}

impl Arriving {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let piece = self.pieces.next();
        match self.store.within(&self.key, 0, "the next piece of the body", piece).await? {
            Some(Ok(piece)) if piece.len() as u64 <= self.left => {
                self.left -= piece.len() as u64;
                Ok(Some(piece))
            }
            Some(Ok(_)) => Err(self.broken("the body is longer than announced")),
            Some(Err(error)) => Err(match classify(During::Read, &self.key, &error) {
                // Half an object cannot be absent, and whatever broke off may pass.
                StoreError::Refused { key, cause } => StoreError::Unavailable { key, cause },
                error => error,
            }),
            None if self.left > 0 => {
                Err(self.broken(&format!("the body ended {} bytes early", self.left)))
            }
            None => Ok(None),
        }
    }

    fn broken(&self, what: &str) -> StoreError {
        StoreError::Unavailable { key: self.key.clone(), cause: what.to_owned().into() }
    }
}

/// A listing on its way.
struct Pages {
    store: CloudStore,
    prefix: Key,
    token: Option<String>,
    over: bool,
}

impl Pages {
    async fn next(&mut self) -> Option<Vec<Result<Listed, StoreError>>> {
        if self.over {
            return None;
        }
        match self.store.page(&self.prefix, self.token.clone(), None).await {
            Ok((page, next)) => {
                self.over = next.is_none();
                self.token = next;
                let listed = page.objects.iter().filter_map(|meta| self.store.listed(meta));
                Some(listed.map(Ok).collect())
            }
            Err(error) => {
                self.over = !error.is_transient();
                Some(vec![Err(error)])
            }
        }
    }
}
