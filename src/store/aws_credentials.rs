//! AWS identities that need more than two environment variables.
//!
//! Owns: profiles, SSO, `credential_process`, chains of assumed roles and, last,
//! the instance's role, all through `aws-config`. Never here: keys from the
//! settings, web identity and container credentials, which `object_store` does
//! itself; this module is not even asked when one of those is there, because
//! loading it costs start-up time.
//!
//! `aws-config` reads the process's environment and `~/.aws` by itself; that is
//! the whole point of it, and the one exception to the rule that nothing below
//! `cli` reads the environment. Where the environment handed to us names the
//! files (`AWS_CONFIG_FILE`, `AWS_SHARED_CREDENTIALS_FILE`), they are passed on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::meta::region::ProvideRegion;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::profile::region::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::ProvideCredentials;
use aws_credential_types::provider::error::CredentialsError;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use tokio::sync::{Mutex, OnceCell};

use crate::causes::in_one_line;

/// Credentials are fetched anew this long before they end, so that none ends
/// during a request.
const EXPIRY_MARGIN: Duration = Duration::from_mins(5);

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub(super) enum IdentityError {
    /// A retry cannot cure it: nothing is configured, or what is configured is wrong.
    #[error("no usable AWS credentials: {0}")]
    None(String),
    /// The source of credentials did not answer.
    #[error("AWS credentials could not be fetched: {0}")]
    NotNow(String),
}

impl IdentityError {
    /// Returns whether a later attempt may succeed.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::NotNow(_))
    }

    fn of(error: &CredentialsError) -> Self {
        let text = in_one_line(error);
        // A provider that fails does not say whether for good; a connection
        // that failed is what may pass.
        let on_the_way = ["dispatch failure", "timed out", "timeout"];
        match error {
            CredentialsError::ProviderTimedOut(_) => Self::NotNow(text),
            CredentialsError::ProviderError(_) | CredentialsError::Unhandled(_)
                if on_the_way.iter().any(|word| text.contains(word)) =>
            {
                Self::NotNow(text)
            }
            _ => Self::None(format!(
                "{text} (set `access_key_id` and `secret_access_key`, correct `profile`, or give this machine a role)"
            )),
        }
    }
}

/// A lazy provider of credentials and of a region. Does nothing until asked.
#[derive(Debug)]
pub(super) struct AwsIdentity {
    profile: Option<String>,
    region: Option<String>,
    config_file: Option<String>,
    credentials_file: Option<String>,
    loaded: OnceCell<SdkConfig>,
    current: Mutex<Option<Current>>,
}

#[derive(Debug)]
struct Current {
    credential: Arc<AwsCredential>,
    expires: Option<SystemTime>,
}

impl Current {
    fn is_fresh(&self, now: SystemTime) -> bool {
        self.expires.is_none_or(|expires| now + EXPIRY_MARGIN < expires)
    }
}

impl AwsIdentity {
    /// Makes a provider for `profile` (the default one if `None`). A known
    /// `region` spares the search for one, which may ask the instance.
    pub(super) fn new(
        profile: Option<String>,
        region: Option<String>,
        environment: &BTreeMap<String, String>,
    ) -> Self {
        let variable = |name: &str| environment.get(name).filter(|v| !v.is_empty()).cloned();
        Self {
            profile: profile.or_else(|| variable("AWS_PROFILE")),
            region,
            config_file: variable("AWS_CONFIG_FILE"),
            credentials_file: variable("AWS_SHARED_CREDENTIALS_FILE"),
            loaded: OnceCell::new(),
            current: Mutex::new(None),
        }
    }

    /// Returns the region that was given, or that of the profile or the instance.
    pub(super) async fn region(&self) -> Option<String> {
        self.load().await.region().map(|region| region.as_ref().to_owned())
    }

    /// Returns the region that the profile names, from the files alone: an
    /// identity that is known otherwise must not wait for a metadata service.
    pub(super) async fn region_of_profile(&self) -> Option<String> {
        let mut provider = ProfileFileRegionProvider::builder();
        if let Some(profile) = &self.profile {
            provider = provider.profile_name(profile);
        }
        if let Some(files) = self.files() {
            provider = provider.profile_files(files);
        }
        provider.build().region().await.map(|region| region.as_ref().to_owned())
    }

    async fn load(&self) -> &SdkConfig {
        self.loaded
            .get_or_init(|| async {
                let mut loader = aws_config::defaults(BehaviorVersion::latest());
                if let Some(profile) = &self.profile {
                    loader = loader.profile_name(profile);
                }
                if let Some(region) = &self.region {
                    loader = loader.region(Region::new(region.clone()));
                }
                if let Some(files) = self.files() {
                    loader = loader.profile_files(files);
                }
                loader.load().await
            })
            .await
    }

    // `aws-config` keeps these names for types that moved to a crate which it
    // does not re-export otherwise.
    #[allow(deprecated)]
    fn files(&self) -> Option<aws_config::profile::profile_file::ProfileFiles> {
        use aws_config::profile::profile_file::{ProfileFileKind, ProfileFiles};
        if self.config_file.is_none() && self.credentials_file.is_none() {
            return None;
        }
        let mut files = ProfileFiles::builder();
        files = match &self.config_file {
            Some(path) => files.with_file(ProfileFileKind::Config, path),
            None => files.include_default_config_file(true),
        };
        files = match &self.credentials_file {
            Some(path) => files.with_file(ProfileFileKind::Credentials, path),
            None => files.include_default_credentials_file(true),
        };
        Some(files.build())
    }

    async fn fetch(&self) -> Result<Current, IdentityError> {
        let config = self.load().await;
        let found = if let Some(profile) = &self.profile {
            // Only this profile: the default chain would pass over a misspelt
            // one and write under the identity of the machine instead.
            let settings = ProviderConfig::without_region().with_region(config.region().cloned());
            let mut provider = ProfileFileCredentialsProvider::builder()
                .configure(&settings)
                .profile_name(profile);
            if let Some(files) = self.files() {
                provider = provider.profile_files(files);
            }
            provider.build().provide_credentials().await
        } else {
            match config.credentials_provider() {
                Some(provider) => provider.provide_credentials().await,
                None => Err(CredentialsError::not_loaded("no provider is configured")),
            }
        };
        let found = found.map_err(|error| IdentityError::of(&error))?;
        let credential = Arc::new(AwsCredential {
            key_id: found.access_key_id().to_owned(),
            secret_key: found.secret_access_key().to_owned(),
            token: found.session_token().map(str::to_owned),
        });
        Ok(Current { credential, expires: found.expiry() })
    }
}

#[async_trait]
impl CredentialProvider for AwsIdentity {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        // Held while fetching, so that many requests at once fetch only once.
        let mut current = self.current.lock().await;
        if let Some(known) = current.as_ref().filter(|known| known.is_fresh(SystemTime::now())) {
            return Ok(Arc::clone(&known.credential));
        }
        match self.fetch().await {
            Ok(fetched) => {
                let credential = Arc::clone(&fetched.credential);
                *current = Some(fetched);
                Ok(credential)
            }
            Err(error) => {
                Err(object_store::Error::Generic { store: "AWS", source: Box::new(error) })
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    /// An environment whose AWS files are `config` and an empty credentials file.
    fn environment(directory: &Path, config: &str) -> BTreeMap<String, String> {
        let (config_file, credentials_file) = (directory.join("config"), directory.join("none"));
        std::fs::write(&config_file, config).unwrap();
        std::fs::write(&credentials_file, "").unwrap();
        BTreeMap::from([
            ("AWS_CONFIG_FILE".to_owned(), config_file.display().to_string()),
            ("AWS_SHARED_CREDENTIALS_FILE".to_owned(), credentials_file.display().to_string()),
        ])
    }

    /// Writes a script that counts its runs and prints credentials until `expiration`.
    fn process(directory: &Path, expiration: &str) -> std::path::PathBuf {
        let script = directory.join("credentials.sh");
        let runs = directory.join("runs");
        let text = format!(
            "#!/bin/sh\necho run >> {}\necho '{{\"Version\":1,\"AccessKeyId\":\"PROCESSKEY\",\"SecretAccessKey\":\"s\",\"SessionToken\":\"t\",\"Expiration\":\"{expiration}\"}}'\n",
            runs.display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
        script
    }

    fn runs(directory: &Path) -> usize {
        std::fs::read_to_string(directory.join("runs")).unwrap_or_default().lines().count()
    }

    #[tokio::test]
    async fn a_static_profile_gives_its_keys_and_its_region() {
        let directory = tempfile::tempdir().unwrap();
        let config = "[profile backup]\nregion = eu-north-1\naws_access_key_id = PROFILEKEY\naws_secret_access_key = profilesecret\n";
        let identity = AwsIdentity::new(
            Some("backup".to_owned()),
            None,
            &environment(directory.path(), config),
        );
        let credential = identity.get_credential().await.unwrap();
        assert_eq!(credential.key_id, "PROFILEKEY");
        assert_eq!(credential.secret_key, "profilesecret");
        assert_eq!(identity.region().await.as_deref(), Some("eu-north-1"));
        assert_eq!(identity.region_of_profile().await.as_deref(), Some("eu-north-1"));
    }

    #[tokio::test]
    async fn a_credential_process_is_run_once_while_its_credentials_last() {
        let directory = tempfile::tempdir().unwrap();
        let script = process(directory.path(), "2099-01-01T00:00:00Z");
        let config = format!("[profile p]\ncredential_process = {}\n", script.display());
        let identity = AwsIdentity::new(
            Some("p".to_owned()),
            Some("eu-west-1".to_owned()),
            &environment(directory.path(), &config),
        );
        assert_eq!(runs(directory.path()), 0, "nothing may run before it is needed");
        for _ in 0..3 {
            let credential = identity.get_credential().await.unwrap();
            assert_eq!(credential.key_id, "PROCESSKEY");
            assert_eq!(credential.token.as_deref(), Some("t"));
        }
        assert_eq!(runs(directory.path()), 1);
        assert_eq!(identity.region().await.as_deref(), Some("eu-west-1"));
    }

    #[tokio::test]
    async fn credentials_about_to_end_are_fetched_again() {
        let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(120);
        let directory = tempfile::tempdir().unwrap();
        let script = process(directory.path(), &soon.to_string());
        let config = format!("[profile p]\ncredential_process = {}\n", script.display());
        let identity = AwsIdentity::new(
            Some("p".to_owned()),
            Some("eu-west-1".to_owned()),
            &environment(directory.path(), &config),
        );
        identity.get_credential().await.unwrap();
        identity.get_credential().await.unwrap();
        assert_eq!(runs(directory.path()), 2);
    }

    #[tokio::test]
    async fn an_unknown_profile_is_no_identity_and_no_retry_cures_it() {
        let directory = tempfile::tempdir().unwrap();
        let identity = AwsIdentity::new(
            Some("nobody".to_owned()),
            Some("eu-west-1".to_owned()),
            &environment(directory.path(), "[profile somebody]\nregion = x\n"),
        );
        let error = identity.fetch().await.unwrap_err();
        assert!(!error.may_pass(), "{error}");
        assert!(error.to_string().contains("nobody"), "{error}");
    }
}
