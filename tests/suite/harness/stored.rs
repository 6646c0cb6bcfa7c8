//! What a repository holds, seen and changed past Highwater: files of a local directory, or objects on the S3 server.

use super::binary::Highwater;
use super::lab::files_below;
use super::script;
use futures_util::TryStreamExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::{ObjectStore as _, ObjectStoreExt as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tokio::runtime::{Builder, Runtime};

/// The bytes of one repository, by their names below its root.
pub enum Stored {
    Directory(PathBuf),
    Bucket { server: Box<AmazonS3>, prefix: String },
}

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());

impl Stored {
    /// Opens what is stored in this repository.
    pub fn of(repository: &Highwater) -> Self {
        let bucket = format!("s3://{}/", script::BUCKET);
        let Some(prefix) = repository.repo_url().strip_prefix(&bucket) else {
            return Self::Directory(repository.repo_directory());
        };
        let server = AmazonS3Builder::new()
            .with_endpoint(format!("http://127.0.0.1:{}", script::rgw().port))
            .with_allow_http(true)
            .with_virtual_hosted_style_request(false)
            .with_bucket_name(script::BUCKET)
            .with_access_key_id(script::RGW_KEY)
            .with_secret_access_key(script::RGW_SECRET);
        Self::Bucket { server: Box::new(server.build().unwrap()), prefix: prefix.to_owned() }
    }

    /// Lists the names of everything, sorted.
    pub fn names(&self) -> Vec<PathBuf> {
        let (server, prefix) = match self {
            Self::Directory(root) => return files_below(root),
            Self::Bucket { server, prefix } => (server, prefix),
        };
        let listed = server.list(Some(&Key::from(prefix.as_str()))).try_collect::<Vec<_>>();
        let listed = RUNTIME.block_on(listed).unwrap();
        let name = |key: &str| PathBuf::from(key.strip_prefix(prefix).unwrap().trim_matches('/'));
        let mut names: Vec<_> = listed.iter().map(|one| name(one.location.as_ref())).collect();
        names.sort();
        names
    }

    /// Reads one.
    pub fn read(&self, name: &Path) -> Vec<u8> {
        match self {
            Self::Directory(root) => std::fs::read(root.join(name)).unwrap(),
            Self::Bucket { server, prefix } => {
                let key = Key::from(format!("{prefix}/{}", name.display()));
                let read = async { server.get(&key).await?.bytes().await };
                RUNTIME.block_on(read).unwrap().to_vec()
            }
        }
    }

    /// Puts other bytes in the place of one, as a fault of the store would.
    pub fn replace(&self, name: &Path, bytes: Vec<u8>) {
        match self {
            Self::Directory(root) => {
                let path = root.join(name);
                std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
                std::fs::write(path, bytes).unwrap();
            }
            Self::Bucket { server, prefix } => {
                let key = Key::from(format!("{prefix}/{}", name.display()));
                RUNTIME.block_on(server.put(&key, bytes.into())).unwrap();
            }
        }
    }
}
