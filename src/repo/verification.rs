//! What runs of `verify` have proven, their reports, and losses that somebody has acknowledged.
//!
//! Never here: what is proven, or whether a proof is believed.

use futures_util::{StreamExt, TryStreamExt};

use super::backup_writer::seal_bytes;
use super::{Put, RepoError, Repository};
use crate::format::{
    Acknowledgement, BackupId, Codec, Header, Kind, Proof, Verification, decode_proofs,
    encode_proofs, parse_acknowledged,
};
use crate::pg::SystemId;
use crate::store::Key;

/// How many documents are read at a time.
const IN_FLIGHT: usize = 8;

impl Repository {
    /// Stores proofs of one run; durable when it returns.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if another run has taken that name.
    pub async fn put_proofs(
        &self,
        system_id: SystemId,
        run: &BackupId,
        number: u32,
        proofs: &[Proof],
    ) -> Result<Key, RepoError> {
        let key = Key::new(self.place().proof(run, number));
        // Hashes do not compress; but the codec's checksum covers them.
        let codec = Codec::DEFAULT;
        let header = Header::new(Kind::Proof, self.below(&key), system_id, codec.packing());
        let object = seal_bytes(&encode_proofs(proofs), codec, header)?;
        self.put_sealed(&key, &object).await?;
        Ok(key)
    }

    /// Reads the proofs in one object.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] and the like, and absence, cost nothing but proving again.
    pub async fn proofs(&self, key: &Key) -> Result<Vec<Proof>, RepoError> {
        let mut bytes = Vec::new();
        let take = |block: &[u8]| {
            bytes.extend_from_slice(block);
            Ok(())
        };
        self.fetch(key, take).await?;
        decode_proofs(&bytes).map_err(|error| RepoError::damaged(key, error))
    }

    /// Lists the runs of `verify` that have left anything, newest first.
    pub async fn verify_runs(&self) -> Result<Vec<BackupId>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().verify_dir())).await?;
        let mut runs: Vec<BackupId> =
            level.directories.iter().filter_map(|name| name.parse().ok()).collect();
        runs.sort_unstable_by(|one, other| other.cmp(one));
        Ok(runs)
    }

    /// Lists the objects of proofs of one run, in order.
    pub async fn proof_keys(&self, run: &BackupId) -> Result<Vec<Key>, RepoError> {
        let directory = format!("{}/{run}/proof", self.place().verify_dir());
        let level = self.store().list_level(&Key::new(directory)).await?;
        Ok(level.objects.into_iter().map(|object| object.key).collect())
    }

    /// Stores the report of a run.
    pub async fn put_verification(&self, report: &Verification) -> Result<(), RepoError> {
        self.put_document(&Key::new(self.place().verification(&report.id)), report).await?;
        Ok(())
    }

    /// Reads the newest reports, at most `count`, newest first. Runs that did not end have none, and
    /// one that cannot be read is passed over.
    pub async fn verifications(&self, count: usize) -> Result<Vec<Verification>, RepoError> {
        let mut found = Vec::new();
        for run in self.verify_runs().await? {
            if found.len() == count {
                break;
            }
            let key = Key::new(self.place().verification(&run));
            match self.document::<Verification>(&key).await {
                Ok(report) => found.push(report),
                Err(error) if error.is_absent() => {}
                Err(error) if error.is_damage() => {
                    tracing::warn!("an earlier report of verify is passed over: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Reads all acknowledgements, in order of their keys. One that cannot be read is told as an error of its own: it
    /// acknowledges nothing.
    ///
    /// # Errors
    /// The store's only.
    pub async fn acknowledgements(
        &self,
    ) -> Result<Vec<(Key, Result<Acknowledgement, RepoError>)>, RepoError> {
        let root = Key::new(self.place().acknowledged_dir());
        let keys = self.store().list_level(&root).await?.objects.into_iter().map(|one| one.key);
        let keys = keys.filter(|key| parse_acknowledged(key.file_name()).is_some());
        let mut reading = futures_util::stream::iter(keys)
            .map(|key| async move {
                let id = parse_acknowledged(key.file_name()).unwrap_or_default();
                match self.document::<Acknowledgement>(&key).await {
                    Ok(one) if one.finding != id => {
                        let why = format!("it acknowledges `{}`", one.finding);
                        let error = RepoError::damaged(&key, why);
                        Ok(Some((key, Err(error))))
                    }
                    Ok(one) => Ok(Some((key, Ok(one)))),
                    Err(error) if error.is_absent() => Ok(None),
                    Err(error) if error.is_damage() => Ok(Some((key, Err(error)))),
                    Err(error) => Err(error),
                }
            })
            .buffered(IN_FLIGHT);
        let mut found = Vec::new();
        while let Some(one) = reading.try_next().await? {
            found.extend(one);
        }
        Ok(found)
    }

    /// Stores an acknowledgement; durable when it returns.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if the finding was acknowledged before.
    pub async fn put_acknowledgement(&self, one: &Acknowledgement) -> Result<Put, RepoError> {
        self.put_document(&Key::new(self.place().acknowledged(&one.finding)), one).await
    }
}
