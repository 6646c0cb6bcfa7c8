//! Bringing objects from one repository of a cluster into another, byte for byte as they are.
//!
//! Owns: that what is brought was read whole and proven before a byte of it is stored, that nothing which stands at the
//! destination is ever replaced, and the order in which a backup comes to exist there (`begun.json` first,
//! `committed.json` last). Encryption is each repository's own: what is read is plain, what is stored is encrypted with
//! the destination's key, if it has one. Never here: what is to be brought, and whether the destination would keep it.

use std::collections::BTreeMap;

use super::backup_writer::settle_pack;
use super::proving::{expected_of, of_cluster};
use super::wal_compare::Complete;
use super::{Put, RepoError, Repository, SealedObject};
use crate::format::{
    BackupId, Begun, Committed, Document, FileIndex, Header, Kind, PACK_HEADER_BYTES, WalObject,
};
use crate::pg::{SegmentSize, SystemId, TimelineHistory, WalFileName};
use crate::store::{Body, Key, StoreError};

/// Which of two repositories an error came from.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The one that is read.
    #[error(transparent)]
    From(RepoError),
    /// The one that is stored into.
    #[error(transparent)]
    To(RepoError),
}

impl CopyError {
    /// Returns the error of whichever repository it was.
    pub fn into_inner(self) -> RepoError {
        let (Self::From(error) | Self::To(error)) = self;
        error
    }
}

/// Two repositories of one cluster: one to read, one to store into.
#[derive(Debug, Clone, Copy)]
pub struct Transfer<'a> {
    /// The one that is read; nothing is changed in it.
    pub from: &'a Repository,
    /// The one that is stored into.
    pub to: &'a Repository,
}

impl Transfer<'_> {
    /// Brings one object of WAL; returns what was found and its length as stored, before encryption.
    ///
    /// Its header and digest are checked first. May be repeated.
    ///
    /// # Errors
    /// [`CopyError::From`] with absence if it is gone (pieces go when something larger stands for them); with
    /// [`RepoError::Damaged`] if it cannot be believed: then nothing was stored. [`CopyError::To`] with
    /// [`RepoError::Conflict`] if the name, or a piece of that segment, holds other content there.
    pub async fn wal(
        self,
        system_id: SystemId,
        size: SegmentSize,
        object: WalObject,
    ) -> Result<(Put, u64), CopyError> {
        let (sealed, body) =
            self.read_wal(system_id, size, object).await.map_err(CopyError::From)?;
        let bytes = body.len();
        let key = self.to.wal_key(system_id, object);
        if let Some(complete) = Complete::of(object, sealed.header.plain_bytes) {
            self.to.vet_pieces(&key, complete, &sealed).await.map_err(CopyError::To)?;
        }
        let header = sealed.header;
        let put = self.to.put_encoded(&key, &header, body).await.map_err(CopyError::To)?;
        Ok((put, bytes))
    }

    async fn read_wal(
        self,
        system_id: SystemId,
        size: SegmentSize,
        object: WalObject,
    ) -> Result<(SealedObject, Body), RepoError> {
        let key = self.from.wal_key(system_id, object);
        let (body, fetched) = self.from.fetch_encoded(&key).await?;
        let frames = fetched.body();
        expected_of(object, size).check(&key, &fetched.header, system_id)?;
        let mut history = Vec::new();
        let unsealed = tokio::task::spawn_blocking(move || {
            let header = fetched.unseal(|block| {
                if matches!(object, WalObject::File(WalFileName::History(_))) {
                    history.extend_from_slice(block);
                }
                Ok(())
            })?;
            Ok::<_, RepoError>((header, history))
        });
        let (header, history) = unsealed.await.map_err(RepoError::task)??;
        if let WalObject::File(WalFileName::History(timeline)) = object {
            TimelineHistory::parse(timeline, &history)
                .map_err(|error| RepoError::damaged(&key, error))?;
        }
        Ok((SealedObject { header, body: frames }, body))
    }

    /// Returns the packs of a backup that stand on both sides and look the same, by number, with their length. One of
    /// the same name that is another is an error.
    ///
    /// Both are listed; where `is_same_backup` is not known, each header is compared too.
    ///
    /// # Errors
    /// [`CopyError::To`] with [`RepoError::Conflict`] if a pack of the same name is another.
    pub async fn packs_on_both_sides(
        self,
        id: &BackupId,
        wanted: &[u32],
        is_same_backup: bool,
    ) -> Result<BTreeMap<u32, u64>, CopyError> {
        let there = self.to.pack_sizes(id).await.map_err(CopyError::To)?;
        if there.is_empty() {
            return Ok(there);
        }
        let here = self.from.pack_sizes(id).await.map_err(CopyError::From)?;
        let mut same = BTreeMap::new();
        for number in wanted {
            let (Some(size), Some(other)) = (there.get(number), here.get(number)) else { continue };
            let key = Key::new(self.to.place().pack(id, *number));
            if size != other {
                return Err(CopyError::To(other_content(&key, *size, *other)));
            }
            if !is_same_backup {
                let stored = match self.to.header(&key).await {
                    Ok(header) => header,
                    // Somebody has deleted it since it was listed.
                    Err(error) if error.is_absent() => continue,
                    Err(error) => return Err(CopyError::To(error)),
                };
                let ours = self.from.header(&key).await.map_err(CopyError::From)?;
                if stored != ours {
                    return Err(CopyError::To(other_content(&key, *size, *other)));
                }
            }
            same.insert(*number, *size);
        }
        Ok(same)
    }

    /// Brings one pack, once every piece of data in it was proven; returns its length.
    ///
    /// # Errors
    /// As [`Self::wal`].
    pub async fn pack(
        self,
        system_id: SystemId,
        id: &BackupId,
        number: u32,
    ) -> Result<u64, CopyError> {
        let key = Key::new(self.to.place().pack(id, number));
        let bytes = self.from.proven_pack(system_id, id, number).await.map_err(CopyError::From)?;
        let body = Body::from(bytes);
        let store = self.to.store();
        self.to.vet_before_storing(&key).await.map_err(CopyError::To)?;
        match store.create(&key, body.clone()).await {
            Ok(()) => {}
            Err(StoreError::Exists { .. }) => {
                settle_pack(&**store, &key, &body).await.map_err(CopyError::To)?;
            }
            Err(error) => return Err(CopyError::To(error.into())),
        }
        Ok(body.len())
    }

    /// Returns whether packs of a backup stand at the destination, whatever it is there.
    ///
    /// # Errors
    /// [`CopyError::To`].
    pub async fn has_packs(self, id: &BackupId) -> Result<bool, CopyError> {
        Ok(!self.to.pack_sizes(id).await.map_err(CopyError::To)?.is_empty())
    }

    /// Announces the backup at the destination, or finds that an earlier copy has; returns what stands there. From then
    /// on retention there keeps its hands off everything that it leans on.
    ///
    /// What is to be announced names the backup itself where packs of it stood before: whoever goes on from there knows
    /// then that these may be what a deleted one has left.
    ///
    /// # Errors
    /// [`CopyError::To`] with [`RepoError::Conflict`] if what has begun there under this id leans on less: then it is
    /// another backup.
    pub async fn begin(self, begun: &Begun) -> Result<Begun, CopyError> {
        let key = self.to.begun_key(&begun.id);
        match self.to.put_document(&key, begun).await {
            Ok(_) => return Ok(begun.clone()),
            Err(RepoError::Conflict { .. }) => {}
            Err(error) => return Err(CopyError::To(error)),
        }
        let standing = self.to.begun(&begun.id).await.map_err(CopyError::To)?;
        let leans_on_all = |standing: &Begun| {
            let known = |id| standing.leans_on.contains(id) || standing.parent.as_ref() == Some(id);
            begun.leans_on.iter().all(|id| *id == begun.id || known(id))
        };
        if let Some(standing) = standing.filter(leans_on_all) {
            return Ok(standing);
        }
        let (stored, ours) = ("another backup".to_owned(), "the one to be copied".to_owned());
        Err(CopyError::To(RepoError::Conflict { key, stored, ours }))
    }

    /// Returns whether what was announced stands at the destination still, and is not somebody else's who announced it
    /// anew since.
    ///
    /// # Errors
    /// [`CopyError::To`].
    pub async fn is_announced(self, begun: &Begun) -> Result<bool, CopyError> {
        Ok(self.to.begun(&begun.id).await.map_err(CopyError::To)?.as_ref() == Some(begun))
    }

    /// Brings the index of a committed backup's file list, unless one stands there.
    ///
    /// # Errors
    /// As [`Self::wal`].
    pub async fn file_list(self, committed: &Committed) -> Result<(), CopyError> {
        if self.to.has_file_list(&committed.id).await.map_err(CopyError::To)? {
            return Ok(());
        }
        self.put_file_list(committed).await
    }

    async fn put_file_list(self, committed: &Committed) -> Result<(), CopyError> {
        let id = &committed.id;
        let key = Key::new(self.from.place().files(id));
        let (header, body) = self.read_index(id, committed.system_identifier).await?;
        self.to.put_encoded(&key, &header, body).await.map_err(CopyError::To)?;
        Ok(())
    }

    /// Brings the index of the file list and then `committed.json`, unchanged: from here on the backup exists at the
    /// destination. Everything else must stand there; `begun` is what [`Self::begin`] returned.
    ///
    /// # Errors
    /// [`CopyError::To`] with absence of `begun.json` if retention there took the copy for dead meanwhile: then
    /// what it has stored may be gone, and it does not come to exist.
    pub async fn commit(self, committed: &Committed, begun: &Begun) -> Result<(), CopyError> {
        let id = &committed.id;
        self.put_file_list(committed).await?;
        // As a backup that is made here: if `begun.json` is deleted only after this look, whoever deletes it finds the
        // file list, and spares everything. Another copy may have announced it anew since: what it counts from is later.
        if !self.is_announced(begun).await? {
            let key = self.to.begun_key(id);
            return Err(CopyError::To(StoreError::Absent { key }.into()));
        }
        self.to.put_document(&self.to.committed_key(id), committed).await.map_err(CopyError::To)?;
        Ok(())
    }

    async fn read_index(
        self,
        id: &BackupId,
        system_id: SystemId,
    ) -> Result<(Header, Body), CopyError> {
        let key = Key::new(self.from.place().files(id));
        let read = async {
            let (body, fetched) = self.from.fetch_encoded(&key).await?;
            of_cluster(&key, &fetched.header, Kind::Files, system_id)?;
            let mut json = Vec::new();
            let header = fetched.unseal(|block| {
                json.extend_from_slice(block);
                Ok(())
            })?;
            let index = FileIndex::parse(&json).map_err(|e| RepoError::of_document(&key, e))?;
            if index.id != *id {
                return Err(RepoError::damaged(&key, "it is the index of another backup"));
            }
            Ok((header, body))
        };
        read.await.map_err(CopyError::From)
    }

    /// Reads `committed.json` on both sides; `None` at the destination where it is not there.
    ///
    /// # Errors
    /// [`CopyError::From`] with absence if there is no such backup; [`CopyError::To`] with [`RepoError::Conflict`] if
    /// another backup has its id there.
    pub async fn committed(self, id: &BackupId) -> Result<(Committed, bool), CopyError> {
        let key = self.from.committed_key(id);
        let ours = self.from.committed(id).await.map_err(CopyError::From)?;
        let ours = ours.ok_or_else(|| {
            CopyError::From(RepoError::Store(StoreError::Absent { key: key.clone() }))
        })?;
        match self.to.committed(id).await.map_err(CopyError::To)? {
            None => Ok((ours, false)),
            Some(stored) if stored == ours => Ok((ours, true)),
            Some(_) => {
                let (stored, ours) = ("another backup".to_owned(), "this one".to_owned());
                Err(CopyError::To(RepoError::Conflict { key, stored, ours }))
            }
        }
    }

    /// Returns whether a backup is committed on both sides, and is the same.
    ///
    /// # Errors
    /// As [`Self::committed`], but for absence, and damage: both are "no".
    pub async fn is_on_both_sides(self, id: &BackupId) -> Result<bool, CopyError> {
        match self.committed(id).await {
            Ok((_, there)) => Ok(there),
            Err(CopyError::From(error) | CopyError::To(error))
                if error.is_absent()
                    || matches!(
                        error,
                        RepoError::Damaged { .. } | RepoError::NotReadable { .. }
                    ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

impl Repository {
    /// Returns whether the index of a backup's file list stands, whatever it says.
    async fn has_file_list(&self, id: &BackupId) -> Result<bool, RepoError> {
        let files = Key::new(self.place().files(id));
        let level = self.store().list_level(&Key::new(self.place().backup_dir(id))).await?;
        Ok(level.objects.iter().any(|object| object.key == files))
    }

    /// Lists the packs that stand below a backup's name, with their length before encryption.
    async fn pack_sizes(&self, id: &BackupId) -> Result<BTreeMap<u32, u64>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().packs_dir(id))).await?;
        let known = level.objects.iter().filter_map(|object| {
            let number = object.key.file_name().parse().ok()?;
            (object.size_bytes > PACK_HEADER_BYTES as u64).then_some((number, object.size_bytes))
        });
        Ok(known.collect())
    }
}

fn other_content(key: &Key, stored: u64, ours: u64) -> RepoError {
    let told = |bytes: u64| format!("a pack of {bytes} bytes");
    RepoError::Conflict { key: key.clone(), stored: told(stored), ours: told(ours) }
}
