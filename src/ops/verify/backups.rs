//! Looking at backups: documents, file lists, packs, and with every digest also what their files are made of.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;

use super::Verifying;
use super::crew::{Job, Subject, look_of};
use super::findings::{About, Fault, Raw};
use crate::causes::in_one_line;
use crate::failure::Failure;
use crate::format::{BackupId, BackupObject, Committed, Depth, Proof, parse_backup_object};
use crate::pg::SystemId;
use crate::plan::retention::{BegunState, NeededPacks};
use crate::repo::{ContentProver, KeyError, RepoError};
use crate::store::{Key, Listed, StoreError};

/// An object of a backup that cannot be believed, or is not there.
#[derive(Debug, Clone)]
pub(super) struct FaultyObject {
    pub(super) owner: BackupId,
    /// `None` for the file list.
    pub(super) pack: Option<u32>,
    pub(super) key: Key,
    pub(super) fault: Fault,
    pub(super) why: String,
}

/// How the objects of backups look: eight bytes for each pack.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// By number; 0 for one that is not there.
    packs: BTreeMap<BackupId, Vec<u64>>,
    /// `committed.json`
    committed: BTreeMap<BackupId, u64>,
}

impl Looks {
    fn pack(&self, id: &BackupId, number: u32) -> Option<u64> {
        self.packs.get(id)?.get(number as usize).copied().filter(|look| *look != 0)
    }

    fn set_pack(&mut self, id: &BackupId, number: u32, look: u64) {
        let packs = self.packs.entry(id.clone()).or_default();
        let number = number as usize;
        if packs.len() <= number {
            packs.resize(number + 1, 0);
        }
        packs[number] = look.max(1);
    }

    /// Returns the look of all that the content of a backup rests on; `None` if something of it is not there.
    fn content_of(&self, backup: &Committed) -> Option<u64> {
        let own = *self.committed.get(&backup.id)?;
        let mut all = vec![own];
        for reference in &backup.references {
            for pack in &reference.packs {
                all.push(self.pack(&reference.backup, pack.pack)?);
            }
        }
        Some(Proof::look_of_all(all.into_iter()))
    }
}

impl Verifying<'_> {
    /// Looks at all backups.
    pub(super) async fn look_at_backups(&mut self) -> Result<(), Failure> {
        let doing = "list backups";
        let listed = self.repository.backup_ids().await;
        let ids = listed.map_err(|error| self.failed(error, doing))?;
        let mut needed = NeededPacks::default();
        let mut committed: BTreeMap<BackupId, SystemId> = BTreeMap::new();
        for id in &ids {
            self.check_stop().await?;
            if let Some(backup) = self.look_at_documents(id).await? {
                needed.add(&backup);
                committed.insert(id.clone(), backup.system_identifier);
            }
        }
        self.backups = committed.len() as u64;
        let mut looks = Looks::default();
        for id in &ids {
            self.progress.note(&format!("backup {id}"));
            self.look_at_objects(id, committed.get(id).copied(), &needed, &mut looks).await?;
        }
        self.settle_all().await?;
        for id in committed.keys() {
            self.look_for_missing(id, &looks).await?;
        }
        let unread = self.attribute_faults(&committed).await?;
        if self.request.depth == Depth::Whole {
            self.prove_contents(&committed, &unread, &looks).await?;
        }
        Ok(())
    }

    /// Reads the documents of a backup; returns it if it is one.
    async fn look_at_documents(&mut self, id: &BackupId) -> Result<Option<Committed>, Failure> {
        let doing = "read a backup";
        let place = self.repository.place();
        let (key, begun_key) = (Key::new(place.committed(id)), Key::new(place.begun(id)));
        let begun = crate::ops::stock::begun_state(self.repository, id).await;
        let begun = begun.map_err(|error| self.failed(error, doing))?;
        let committed = match self.repository.committed(id).await {
            Ok(committed) => committed,
            Err(error) => {
                let found = Fault::of(error).map_err(|error| self.failed(error, doing))?;
                self.raw.push(Raw {
                    about: About::Committed(id.clone(), key),
                    fault: found.0,
                    why: found.1,
                });
                return Ok(None);
            }
        };
        let fault = match begun {
            BegunState::Readable(begun) if begun.id != *id => {
                Some((Fault::Damaged, "is another backup's"))
            }
            BegunState::Readable(_) => None,
            BegunState::Unreadable => Some((Fault::Damaged, "is damaged")),
            BegunState::Absent => committed.as_ref().map(|_| (Fault::Missing, "is not there")),
        };
        // Deleted by `expire` since: it goes directly after `committed.json`.
        let is_there = self.repository.has_committed(id).await;
        let is_there = is_there.map_err(|error| self.failed(error, doing))?;
        if let Some((fault, what)) = fault
            && (is_there || committed.is_none())
        {
            let why = format!("`{begun_key}` {what}");
            self.raw.push(Raw { about: About::Begun(id.clone(), begun_key), fault, why });
        }
        self.checked += 2;
        let Some(backup) = committed else {
            self.unfinished += 1;
            return Ok(None);
        };
        if backup.cluster != *self.repository.cluster() {
            let why = format!("`{key}` is of the cluster `{}`", backup.cluster);
            let about = About::Committed(id.clone(), key);
            self.raw.push(Raw { about, fault: Fault::Damaged, why });
            return Ok(None);
        }
        Ok(Some(backup))
    }

    /// Looks at what is stored of a backup.
    async fn look_at_objects(
        &mut self,
        id: &BackupId,
        system_id: Option<SystemId>,
        needed: &NeededPacks,
        looks: &mut Looks,
    ) -> Result<(), Failure> {
        let directory = self.repository.place().backup_dir(id);
        let listing = self.repository.store().list(&Key::new(directory.clone()));
        let mut listing = listing.try_chunks(LISTED_AT_A_TIME);
        // One that is referenced, and is none itself any more, is of the same incarnation as those around it.
        let owner = system_id.or_else(|| self.owner_of_remains(id));
        while let Some(listed) = listing
            .try_next()
            .await
            .map_err(|error| self.failed(RepoError::from(error.1), "list a backup"))?
        {
            for listed in listed {
                let tail = listed.key.as_str().strip_prefix(&directory);
                let object = tail.and_then(|t| t.strip_prefix('/')).and_then(parse_backup_object);
                self.look_at_object(id, (system_id, owner), object, &listed, needed, looks).await?;
            }
        }
        Ok(())
    }

    async fn look_at_object(
        &mut self,
        id: &BackupId,
        (committed_of, owner): (Option<SystemId>, Option<SystemId>),
        object: Option<BackupObject>,
        listed: &Listed,
        needed: &NeededPacks,
        looks: &mut Looks,
    ) -> Result<(), Failure> {
        match (object, committed_of, owner) {
            (Some(BackupObject::Committed), ..) => {
                looks.committed.insert(id.clone(), look_of(listed));
            }
            (Some(BackupObject::Begun), ..) => {}
            (Some(BackupObject::Files), Some(system_id), _) => {
                self.files_seen.insert(id.clone());
                let subject = Subject::Files { system_id, id: id.clone() };
                self.prove(Job::of(subject, listed)).await?;
            }
            (Some(BackupObject::Pack(number)), _, Some(system_id)) if needed.needs(id, number) => {
                looks.set_pack(id, number, look_of(listed));
                let subject = Subject::Pack { system_id, id: id.clone(), number };
                self.prove(Job::of(subject, listed)).await?;
            }
            (Some(BackupObject::Pack(_) | BackupObject::Files), ..) => {
                self.unneeded += 1;
                self.unneeded_bytes += listed.size_bytes;
            }
            (None, ..) => self.stray(&listed.key),
        }
        Ok(())
    }

    /// Returns whose backup something was that exists no more.
    fn owner_of_remains(&self, id: &BackupId) -> Option<SystemId> {
        let all = self.gathered.stock.incarnations.iter().flat_map(|one| &one.backups);
        let mut leaning = all.filter(|b| b.references.iter().any(|needed| needed.backup == *id));
        leaning.next().map(|backup| backup.system_identifier)
    }

    /// Looks whether everything is there that a backup needs.
    async fn look_for_missing(&mut self, id: &BackupId, looks: &Looks) -> Result<(), Failure> {
        let Some(backup) = self.read_again(id).await? else { return Ok(()) };
        let place = self.repository.place();
        let mut missing = Vec::new();
        if !self.files_seen.contains(id) {
            missing.push((id.clone(), None, Key::new(place.files(id))));
        }
        for reference in &backup.references {
            for pack in &reference.packs {
                if looks.pack(&reference.backup, pack.pack).is_none() {
                    let key = Key::new(place.pack(&reference.backup, pack.pack));
                    missing.push((reference.backup.clone(), Some(pack.pack), key));
                }
            }
        }
        for (owner, pack, key) in missing {
            if self.faulty.iter().any(|known| known.key == key) {
                continue;
            }
            // A listing of several pages may miss what another run of `backup` stores beside it.
            match self.repository.header(&key).await {
                Ok(_) => {}
                Err(error) => {
                    let found = Fault::of(error);
                    let (fault, why) = found.map_err(|e| self.failed(e, "read a backup"))?;
                    self.faulty.push(FaultyObject { owner, pack, key, fault, why });
                }
            }
        }
        Ok(())
    }

    /// Reads `committed.json` once more; `None` if the backup was deleted meanwhile, or is told as damaged already.
    async fn read_again(&mut self, id: &BackupId) -> Result<Option<Committed>, Failure> {
        match self.repository.committed(id).await {
            Ok(backup) => Ok(backup),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(self.failed(error, "read a backup")),
        }
    }

    /// Says which backups cannot be restored because of what was found; returns them.
    async fn attribute_faults(
        &mut self,
        committed: &BTreeMap<BackupId, SystemId>,
    ) -> Result<Vec<BackupId>, Failure> {
        let mut harmed = Vec::new();
        let faulty = std::mem::take(&mut self.faulty);
        if faulty.is_empty() {
            return Ok(harmed);
        }
        for id in committed.keys() {
            let Some(backup) = self.read_again(id).await? else { continue };
            for object in &faulty {
                let needs = |pack| {
                    let of_owner =
                        backup.references.iter().filter(|one| one.backup == object.owner);
                    of_owner.flat_map(|one| &one.packs).any(|one| one.pack == pack)
                };
                let is_harmed = match object.pack {
                    None => object.owner == *id,
                    Some(pack) => needs(pack),
                };
                if is_harmed {
                    let about = About::Backup(id.clone(), object.key.clone());
                    let (fault, why) = (object.fault, object.why.clone());
                    self.raw.push(Raw { about, fault, why });
                    harmed.push(id.clone());
                }
            }
        }
        harmed.dedup();
        Ok(harmed)
    }

    /// Proves that the files of each backup come back.
    async fn prove_contents(
        &mut self,
        committed: &BTreeMap<BackupId, SystemId>,
        harmed: &[BackupId],
        looks: &Looks,
    ) -> Result<(), Failure> {
        let mut provers: BTreeMap<SystemId, ContentProver> = BTreeMap::new();
        for (id, system_id) in committed {
            self.check_stop().await?;
            if harmed.contains(id) {
                continue;
            }
            let Some(backup) = self.read_again(id).await? else { continue };
            let object =
                Proof::object_of(&format!("{} content", self.repository.place().backup_dir(id)));
            let Some(look) = looks.content_of(&backup) else { continue };
            if let Some(proof) = self.ledger.believed(object, look) {
                self.ledger.keep(proof);
                self.skipped += 1;
                continue;
            }
            self.progress.note(&format!("files of backup {id}"));
            let prover = provers.entry(*system_id);
            let prover = prover.or_insert_with(|| ContentProver::new(self.repository, *system_id));
            let (mut stop, pace) = (self.stop.clone(), &mut self.pace);
            let mut proven = prover.prove(id).await;
            if matches!(proven, Err(RepoError::Damaged { .. })) {
                proven = prover.prove(id).await;
            }
            match proven {
                Ok(took) => {
                    pace.spend(took.read_bytes, &mut stop).await;
                    self.checked += 1;
                    self.read_bytes += took.read_bytes;
                    self.progress.advance(took.read_bytes);
                    self.ledger.add(object, look, None, Depth::Whole);
                }
                Err(error) => self.wrong_content(id, error).await?,
            }
            self.store_proofs_now_and_then().await?;
        }
        Ok(())
    }

    async fn wrong_content(&mut self, id: &BackupId, error: RepoError) -> Result<(), Failure> {
        let key = match &error {
            RepoError::Damaged { key, .. }
            | RepoError::NotReadable { key, .. }
            | RepoError::Key(KeyError::Unreadable { document: key, .. })
            | RepoError::Store(StoreError::Absent { key }) => key.clone(),
            _ => return Err(self.failed(error, "read the files of a backup")),
        };
        if self.read_again(id).await?.is_none() {
            return Ok(());
        }
        let why = in_one_line(&error);
        let (fault, _) = Fault::of(error).map_err(|error| self.failed(error, "read a backup"))?;
        self.raw.push(Raw { about: About::Backup(id.clone(), key), fault, why });
        Ok(())
    }
}

/// Objects of a listing that are taken at a time, so that it is not held open by what is done with them.
const LISTED_AT_A_TIME: usize = 1000;
