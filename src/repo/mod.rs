//! The archive as verbs: put once, fetch verified, inventory, begin, commit
//! and forget a backup.
//!
//! Owns what every use of the repository must obey: create-if-absent, reading
//! back after a doubtful answer, checking an object's header against its own
//! name before a byte of it is believed, and that nothing is stored in plain where a cluster is encrypted. Never here: policy, which backup or
//! which WAL to choose, or connections to PostgreSQL.

mod assembly;
mod backup_files;
mod backup_list;
mod backup_proof;
mod backup_writer;
mod carrying;
mod copying;
mod drills;
mod encrypting;
mod error;
mod file_reading;
mod forgetting;
mod frames;
mod gaps;
mod identity;
mod inventory;
mod keyring;
mod keys;
mod leftovers;
mod objects;
mod parent;
pub mod path_index;
mod pins;
mod proving;
mod verification;
mod wal;
mod wal_compare;
mod wal_complete;
mod wal_fetch;
mod wal_tail;
mod wal_tidy;

use std::sync::Arc;

pub use assembly::{AssemblyError, FrameMaker, SealedPiece, SegmentAssembly, Unsealed};
pub use backup_files::{FileMeta, FileRecorder, KnownMaps, RecordedFiles};
pub use backup_list::{BackupState, CommittedBackups, UnfinishedBackup, UnreadableBackup};
pub use backup_proof::{ContentProver, ProvenContent};
pub use backup_writer::{BackupWriter, Uploads};
pub use copying::{CopyError, Transfer};
pub use error::{KeyError, RepoError};
pub use forgetting::{ListedBackupObject, ListedWalObject, WalGroup};
pub use frames::{FileList, FrameFetcher};
pub use gaps::StoredGap;
pub use identity::{Claim, claim_of};
pub use inventory::{TimelineWal, WalInventory};
pub use keyring::{KeySource, KeySourceError};
pub use keys::{KeyRing, KeyTaker, RepositoryKeyState};
pub use leftovers::Leftovers;
pub use objects::{Put, SealedObject};
pub use parent::{KnownFiles, ParentFiles};
pub use pins::StoredPin;
pub use proving::Proven;
pub use wal::{PIECE_BYTES, WHOLE_SEGMENT_BYTES_MAX, WalSealer};
pub use wal_compare::{Comparison, Rival};
pub use wal_fetch::{SegmentSource, StoredPrefix};
pub use wal_tail::StoredTail;
pub use wal_tidy::Tidied;

use tokio::sync::OnceCell;

use crate::format::{ClusterName, Place};
use crate::store::Store;
use encrypting::EncryptingStore;
use keyring::Keyring;

/// One cluster's place in a repository.
#[derive(Debug, Clone)]
pub struct Repository {
    store: Arc<dyn Store>,
    place: Place,
    /// Where the cluster is encrypted: `store` once more.
    encrypting: Option<Arc<EncryptingStore>>,
    /// Set once an identity says that the cluster is encrypted, or is not, as we are set up.
    vetted: Arc<OnceCell<()>>,
}

impl Repository {
    /// Makes the repository of `cluster` in `store`; nothing is read or written.
    pub fn new(store: Arc<dyn Store>, cluster: ClusterName) -> Self {
        Self { store, place: Place::new(cluster), encrypting: None, vetted: Arc::default() }
    }

    /// Makes the repository of an encrypted cluster in `store`; nothing is read or written, and the key is asked for
    /// when it is needed first.
    pub fn encrypted(
        store: Arc<dyn Store>,
        cluster: ClusterName,
        source: Arc<dyn KeySource>,
    ) -> Self {
        let place = Place::new(cluster);
        let keyring = Arc::new(Keyring::new(source, Arc::clone(&store), place.clone()));
        let store = Arc::new(EncryptingStore::new(store, keyring));
        let encrypting = Some(Arc::clone(&store));
        Self { store, place, encrypting, vetted: Arc::default() }
    }

    /// Returns whether what it stores is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.encrypting.is_some()
    }

    fn its_keyring(&self) -> Option<&Keyring> {
        self.encrypting.as_deref().map(EncryptingStore::keyring)
    }

    /// Returns the names of things in it.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Returns the cluster's name.
    pub fn cluster(&self) -> &ClusterName {
        self.place.cluster()
    }

    /// Returns the store below; that of an encrypted cluster encrypts and decrypts.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Returns the store's URL without secrets, for messages.
    pub fn describe(&self) -> String {
        self.store.describe()
    }
}
