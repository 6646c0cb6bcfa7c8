//! The documents of an encrypted cluster's keys.
//!
//! A *user key* is held outside of the repository, in a key file for instance. It opens *repository keys*, each of
//! which stands here once for every user key, wrapped. A repository key opens the data keys in the heads of objects
//! ([`super::EncryptedHead`]).
//!
//! ```text
//! key/<number>-<repository key>/<user key>.json     the repository key, wrapped under a user key
//! key/<number>-<repository key>/in-use.json         created behind all of these: objects are stored under it from now on
//! key/leaving/<user key>-<8 hex digits>.json        a user key that somebody is removing
//! ```
//!
//! The first repository key is in use because the identity names it.

use serde::{Deserialize, Serialize};

use super::encrypted::{bytes_of_hex, hex_of_bytes};
use super::{ClusterName, Document, EncryptionError, KeyId, SecretKey, WRAPPED_KEY_BYTES};
use crate::pg::{PgTimestamp, SystemId};

/// What the proof in an identity is made for.
const IN_IDENTITY: &str = "highwater identity";
/// What the proof in a wrapped key is made for.
const IN_WRAPPED_KEY: &str = "highwater wrapped key";

/// Which repository key, and the how manieth of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepositoryKeyName {
    /// 1 for the first one.
    pub number: u32,
    /// Its id.
    pub id: KeyId,
}

/// One object below `key/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyObject {
    /// A repository key, wrapped under a user key.
    Wrapped {
        /// The repository key.
        key: RepositoryKeyName,
        /// The user key.
        user_key: KeyId,
    },
    /// Objects are stored under this repository key.
    InUse(RepositoryKeyName),
    /// Somebody is removing this user key.
    Leaving {
        /// The user key.
        user_key: KeyId,
        /// Tells one who removes from another.
        remover: u32,
    },
}

const IN_USE: &str = "in-use.json";
const LEAVING: &str = "leaving";

impl KeyObject {
    /// Returns the tail of the key below `<cluster>/key/`.
    pub fn tail(self) -> String {
        match self {
            Self::Wrapped { key, user_key } => format!("{}/{user_key}.json", key.directory()),
            Self::InUse(key) => format!("{}/{IN_USE}", key.directory()),
            Self::Leaving { user_key, remover } => {
                format!("{LEAVING}/{user_key}-{remover:08x}.json")
            }
        }
    }

    /// Parses the tail of a key below `<cluster>/key/`; `None` for anything that this version does not store.
    pub fn parse(tail: &str) -> Option<Self> {
        let (directory, name) = tail.split_once('/')?;
        let user_key = || name.strip_suffix(".json")?.parse::<KeyId>().ok();
        let object = if directory == LEAVING {
            let (user_key, remover) = name.strip_suffix(".json")?.split_once('-')?;
            let remover = u32::from_str_radix(remover, 16).ok()?;
            Self::Leaving { user_key: user_key.parse().ok()?, remover }
        } else {
            let (number, id) = directory.split_once('-')?;
            let key = RepositoryKeyName { number: number.parse().ok()?, id: id.parse().ok()? };
            if name == IN_USE {
                Self::InUse(key)
            } else {
                Self::Wrapped { key, user_key: user_key()? }
            }
        };
        // Only the one spelling that `tail` writes is ours.
        (object.tail() == tail).then_some(object)
    }
}

impl RepositoryKeyName {
    fn directory(self) -> String {
        format!("{:04}-{}", self.number, self.id)
    }
}

impl std::fmt::Display for RepositoryKeyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (number {})", self.id, self.number)
    }
}

/// What the identity of an encrypted cluster says about that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encryption {
    /// The repository key that was in use when the place was claimed.
    pub repository_key: KeyId,
    /// Its number.
    pub number: u32,
    /// Proof that the claimer had it: another key under the same id is noticed.
    pub proof: String,
}

impl Encryption {
    /// Returns what the identity of `system_id` says.
    pub fn new(
        cluster: &ClusterName,
        system_id: SystemId,
        name: RepositoryKeyName,
        key: &SecretKey,
    ) -> Self {
        let RepositoryKeyName { number, id } = name;
        let parts = [cluster.as_str(), &system_id.to_string(), &number.to_string()];
        Self { repository_key: id, number, proof: key.proof(IN_IDENTITY, &parts) }
    }

    /// Returns which repository key it is.
    pub fn name(&self) -> RepositoryKeyName {
        RepositoryKeyName { number: self.number, id: self.repository_key }
    }

    /// Returns whether the claimer had this very key.
    pub fn is_proven_by(
        &self,
        cluster: &ClusterName,
        system_id: SystemId,
        key: &SecretKey,
    ) -> bool {
        let parts = [cluster.as_str(), &system_id.to_string(), &self.number.to_string()];
        key.proves(&self.proof, IN_IDENTITY, &parts)
    }
}

/// A repository key, wrapped under a user key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// The format version.
    pub format: u32,
    /// The repository key.
    pub repository_key: KeyId,
    /// Its number.
    pub number: u32,
    /// The user key under which it is wrapped.
    pub user_key: KeyId,
    /// The repository key, AES-256 key wrap (RFC 3394), 80 hex digits.
    pub wrapped: String,
    /// Proof that the repository key was at hand when this was made, for this cluster.
    pub proof: String,
    /// When the repository key was wrapped, by the clock of the host that did it.
    pub wrapped_at: PgTimestamp,
    /// That host.
    pub host: String,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for WrappedKey {
    const WHAT: &'static str = "wrapped key";

    fn format(&self) -> u32 {
        self.format
    }
}

/// Who made a document, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// When, by the clock of the host.
    pub at: PgTimestamp,
    /// The host.
    pub host: String,
    /// The version of Highwater.
    pub tool: String,
}

impl WrappedKey {
    /// Wraps a repository key.
    ///
    /// # Errors
    /// [`EncryptionError::Failed`].
    pub fn new(
        cluster: &ClusterName,
        name: RepositoryKeyName,
        key: &SecretKey,
        user_key: &SecretKey,
        made: Made,
    ) -> Result<Self, EncryptionError> {
        Ok(Self {
            format: super::FORMAT_VERSION,
            repository_key: name.id,
            number: name.number,
            user_key: user_key.id(),
            wrapped: hex_of_bytes(&user_key.wrap(key)?),
            proof: key.proof(IN_WRAPPED_KEY, &[cluster.as_str(), &name.number.to_string()]),
            wrapped_at: made.at,
            host: made.host,
            tool: made.tool,
        })
    }

    /// Returns the repository key; `None` if this is not what [`Self::new`] made of it for this cluster.
    pub fn open(&self, cluster: &ClusterName, user_key: &SecretKey) -> Option<SecretKey> {
        let wrapped = bytes_of_hex::<WRAPPED_KEY_BYTES>(&self.wrapped)?;
        let key = user_key.unwrap_key(&wrapped)?;
        let parts = [cluster.as_str(), &self.number.to_string()];
        let fits =
            key.id() == self.repository_key && key.proves(&self.proof, IN_WRAPPED_KEY, &parts);
        fits.then_some(key)
    }
}

/// `in-use.json` and `leaving/…`: who said so, and when. What is said is in the object's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyMark {
    /// The format version.
    pub format: u32,
    /// The key that it is about.
    pub key: KeyId,
    /// When, by the clock of the host that said so.
    pub at: PgTimestamp,
    /// That host.
    pub host: String,
    /// Its process, so that two hosts never write the same bytes.
    pub pid: u32,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for KeyMark {
    const WHAT: &'static str = "mark of a key";

    fn format(&self) -> u32 {
        self.format
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn name(number: u32, key: &SecretKey) -> RepositoryKeyName {
        RepositoryKeyName { number, id: key.id() }
    }

    #[test]
    fn names_come_back_and_others_are_not_ours() {
        let (a, b) = (SecretKey::new([1; 32]), SecretKey::new([2; 32]));
        for object in [
            KeyObject::Wrapped { key: name(1, &a), user_key: b.id() },
            KeyObject::InUse(name(12, &a)),
            KeyObject::Leaving { user_key: b.id(), remover: 0xAB },
        ] {
            assert_eq!(KeyObject::parse(&object.tail()), Some(object));
        }
        let id = a.id();
        for tail in [
            String::new(),
            "leaving".to_owned(),
            format!("leaving/{id}.json"),
            format!("leaving/{id}-+0000001.json"),
            format!("1-{id}/in-use.json"),
            format!("0001-{id}/in-use"),
            format!("0001-{id}/{}.json", b.id().to_string().to_uppercase()),
            format!("0001-{id}/a/{}.json", b.id()),
        ] {
            assert_eq!(KeyObject::parse(&tail), None, "{tail}");
        }
    }

    #[test]
    fn a_wrapped_key_opens_only_as_it_was_made() {
        let (key, user, other) =
            (SecretKey::new([1; 32]), SecretKey::new([2; 32]), SecretKey::new([3; 32]));
        let cluster: ClusterName = "main".parse().unwrap();
        let made = Made { at: PgTimestamp(0), host: "host".to_owned(), tool: "test".to_owned() };
        let wrapped = WrappedKey::new(&cluster, name(1, &key), &key, &user, made).unwrap();
        assert_eq!(wrapped.open(&cluster, &user).unwrap().to_hex(), key.to_hex());
        assert_eq!(WrappedKey::parse(&wrapped.to_json().unwrap()).unwrap(), wrapped);
        assert!(wrapped.open(&cluster, &other).is_none());
        assert!(wrapped.open(&"other".parse().unwrap(), &user).is_none());
        let changed = [
            WrappedKey { number: 2, ..wrapped.clone() },
            WrappedKey { repository_key: other.id(), ..wrapped.clone() },
            WrappedKey {
                wrapped: wrapped.wrapped.replace(['1', '2', '3'], "4"),
                ..wrapped.clone()
            },
            WrappedKey { wrapped: String::new(), ..wrapped.clone() },
            WrappedKey { proof: "0".repeat(64), ..wrapped },
        ];
        for changed in changed {
            assert!(changed.open(&cluster, &user).is_none(), "{changed:?}");
        }
    }

    #[test]
    fn the_proof_of_an_identity_holds_for_one_key_cluster_and_system() {
        let (key, other) = (SecretKey::new([1; 32]), SecretKey::new([2; 32]));
        let cluster: ClusterName = "main".parse().unwrap();
        let said = Encryption::new(&cluster, SystemId(7), name(1, &key), &key);
        assert!(said.is_proven_by(&cluster, SystemId(7), &key));
        assert!(!said.is_proven_by(&cluster, SystemId(8), &key));
        assert!(!said.is_proven_by(&"other".parse().unwrap(), SystemId(7), &key));
        assert!(!said.is_proven_by(&cluster, SystemId(7), &other));
    }
}
