//! Building the HTTP client of one cloud store from options and environment.
//!
//! Owns: which option and which of the usual cloud variables becomes which
//! setting of `object_store`, and which certificates are trusted. Never here:
//! requests, meanings of answers, reading the process's environment.
//!
//! Options go before variables. Of the variables only those listed here count;
//! `object_store` knows many more words, some of which (`AWS_BUCKET`,
//! `AWS_TIMEOUT`) would quietly change what the repository's URL and our own
//! deadlines say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::list::PaginatedListStore;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, HeaderValue, ObjectStore, RetryConfig,
    StaticCredentialProvider,
};

use super::Cause;
use super::aws_credentials::AwsIdentity;
use super::options::{StoreOptions, spec};
use super::url::Driver;

/// The region that `object_store` and most S3-compatible stores assume.
const REGION_DEFAULT: &str = "us-east-1";

/// A CA file larger than this is not one.
const CA_FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What the drivers for clouds need of `object_store`.
pub(super) trait Backend: ObjectStore + PaginatedListStore {}

impl<T: ObjectStore + PaginatedListStore> Backend for T {}

/// The cloud variables, as `cli` found them in the environment.
pub type CloudEnvironment = BTreeMap<String, String>;

/// Returns whether a variable of the environment may matter to a cloud store,
/// so that `cli` knows what to hand over.
pub fn is_cloud_variable(name: &str) -> bool {
    ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix))
        || name == "IDENTITY_ENDPOINT"
}

/// What a client is built from.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) driver: Driver,
    pub(super) bucket: String,
    pub(super) options: StoreOptions,
    pub(super) environment: CloudEnvironment,
}

impl Setup {
    /// Builds the client. Reads the CA file and, for S3 without keys, perhaps the AWS files.
    pub(super) async fn build(&self) -> Result<Arc<dyn Backend>, Cause> {
        match self.driver {
            Driver::S3 => self.s3().await,
            Driver::Gcs => self.gcs().await,
            Driver::Azure => self.azure().await,
            Driver::File => Err("a local directory needs no client".into()),
        }
    }

    /// Returns a variable that is set to something.
    fn variable(&self, name: &str) -> Option<&str> {
        self.environment.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn endpoint(&self) -> Option<&str> {
        let names: &[&str] = match self.driver {
            Driver::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"],
            Driver::Azure => &["AZURE_STORAGE_ENDPOINT"],
            _ => &["GOOGLE_BASE_URL"],
        };
        self.options
            .text(&spec::ENDPOINT)
            .or_else(|| names.iter().find_map(|name| self.variable(name)))
    }

    /// Returns whether the client will talk to the endpoint and to nobody else:
    /// then no other certificates are needed, and loading the system's (about
    /// 5 ms of CPU, in every `archive-push`) is spared.
    fn talks_to_endpoint_only(&self) -> bool {
        let o = &self.options;
        let keys = match self.driver {
            Driver::S3 => {
                let variables = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
                o.text(&spec::ACCESS_KEY_ID).is_some()
                    || (o.text(&spec::PROFILE).is_none()
                        && variables.iter().all(|name| self.variable(name).is_some()))
            }
            Driver::Azure => {
                o.text(&spec::AZURE_KEY).is_some() || o.text(&spec::AZURE_SAS).is_some()
            }
            _ => false,
        };
        self.endpoint().is_some() && (keys || o.flag(&spec::ANONYMOUS))
    }

    async fn client_options(&self) -> Result<ClientOptions, Cause> {
        let o = &self.options;
        let allow_http = o.flag(&spec::ALLOW_HTTP)
            || self.variable("AWS_ALLOW_HTTP").is_some_and(|value| value == "true");
        // No total timeout, for it would kill slow but healthy transfers; and no
        // read timeout of the client, for `reqwest` counts the time of an upload
        // as time without an answer. `cloud` has deadlines for both.
        let mut client = ClientOptions::new()
            .with_timeout_disabled()
            .with_connect_timeout(o.duration(&spec::CONNECT_TIMEOUT))
            .with_allow_http(allow_http)
            .with_user_agent(HeaderValue::from_str(o.word(&spec::USER_AGENT))?);
        let mut pinned = self.endpoint().is_some_and(|url| url.starts_with("http://"));
        if let Some(path) = o.text(&spec::CA_FILE) {
            for certificate in read_ca_file(path).await? {
                client = client.with_root_certificate(certificate);
            }
            pinned = true;
        }
        if pinned && self.talks_to_endpoint_only() {
            client = client.with_no_system_certificates(true);
        }
        Ok(client)
    }

    async fn s3(&self) -> Result<Arc<dyn Backend>, Cause> {
        let o = &self.options;
        let mut builder = AmazonS3Builder::new()
            .with_client_options(self.client_options().await?)
            .with_retry(no_retry())
            .with_bucket_name(&self.bucket)
            .with_virtual_hosted_style_request(!o.flag(&spec::PATH_STYLE))
            .with_unsigned_payload(o.flag(&spec::UNSIGNED_PAYLOAD))
            // One key per request, which every compatible store knows.
            .with_disable_bulk_delete(true);
        if let Some(endpoint) = self.endpoint() {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(payer) = self.variable("AWS_REQUEST_PAYER") {
            builder = builder.with_config(AmazonS3ConfigKey::RequestPayer, payer);
        }
        builder = match o.word(&spec::CHECKSUM) {
            "sha256" => builder.with_checksum_algorithm(Checksum::SHA256),
            "crc64nvme" => builder.with_checksum_algorithm(Checksum::CRC64NVME),
            _ => builder,
        };
        // The keys for encryption have no public name, only their text.
        if o.word(&spec::SSE) != "none" {
            let kind = if o.word(&spec::SSE) == "aes256" { "AES256" } else { o.word(&spec::SSE) };
            builder = builder.with_config("aws_server_side_encryption".parse()?, kind);
        }
        if let Some(key) = o.text(&spec::SSE_KMS_KEY) {
            builder = builder.with_config("aws_sse_kms_key_id".parse()?, key);
        }
        Ok(Arc::new(self.s3_identity(builder).await.build()?))
    }

    /// Adds who we are and where, by the plainest way that the settings allow.
    async fn s3_identity(&self, mut builder: AmazonS3Builder) -> AmazonS3Builder {
        let o = &self.options;
        let known_region = o
            .text(&spec::REGION)
            .or_else(|| self.variable("AWS_REGION"))
            .or_else(|| self.variable("AWS_DEFAULT_REGION"))
            .map(str::to_owned);
        let profile = o.text(&spec::PROFILE).map(str::to_owned);
        // A store with its own endpoint rarely knows regions: none is searched for.
        let region_or_default =
            known_region.clone().or_else(|| self.endpoint().map(|_| REGION_DEFAULT.to_owned()));
        let identity =
            |region| Arc::new(AwsIdentity::new(profile.clone(), region, &self.environment));
        let plain = if o.flag(&spec::ANONYMOUS) {
            builder = builder.with_skip_signature(true);
            true
        } else if let (Some(id), Some(secret)) =
            (o.text(&spec::ACCESS_KEY_ID), o.text(&spec::SECRET_ACCESS_KEY))
        {
            builder = builder.with_access_key_id(id).with_secret_access_key(secret);
            if let Some(token) = o.text(&spec::SESSION_TOKEN) {
                builder = builder.with_token(token);
            }
            true
        } else if profile.is_some() {
            false
        } else {
            let found;
            (builder, found) = self.s3_identity_from_variables(builder);
            found
        };
        let region = if plain {
            match region_or_default {
                Some(region) => Some(region),
                None => identity(None).region_of_profile().await,
            }
        } else {
            let identity = identity(region_or_default);
            let region = identity.region().await;
            builder = builder.with_credentials(identity);
            region
        };
        builder.with_region(region.unwrap_or_else(|| REGION_DEFAULT.to_owned()))
    }

    /// Static keys, web identity (IRSA), ECS task role, EKS pod identity: the
    /// ways that `object_store` goes by itself. Tells whether one is open.
    fn s3_identity_from_variables(&self, mut builder: AmazonS3Builder) -> (AmazonS3Builder, bool) {
        let ways: [&[(&str, AmazonS3ConfigKey)]; 4] = [
            &[
                ("AWS_ACCESS_KEY_ID", AmazonS3ConfigKey::AccessKeyId),
                ("AWS_SECRET_ACCESS_KEY", AmazonS3ConfigKey::SecretAccessKey),
            ],
            &[
                ("AWS_WEB_IDENTITY_TOKEN_FILE", AmazonS3ConfigKey::WebIdentityTokenFile),
                ("AWS_ROLE_ARN", AmazonS3ConfigKey::RoleArn),
            ],
            &[(
                "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
            )],
            &[
                (
                    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                    AmazonS3ConfigKey::ContainerCredentialsFullUri,
                ),
                (
                    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
                    AmazonS3ConfigKey::ContainerAuthorizationTokenFile,
                ),
            ],
        ];
        for way in ways {
            let values: Option<Vec<_>> =
                way.iter().map(|(name, key)| Some((*key, self.variable(name)?))).collect();
            let Some(values) = values else { continue };
            for (key, value) in values {
                builder = builder.with_config(key, value);
            }
            let extras = [
                ("AWS_SESSION_TOKEN", AmazonS3ConfigKey::Token),
                ("AWS_ROLE_SESSION_NAME", AmazonS3ConfigKey::RoleSessionName),
                ("AWS_ENDPOINT_URL_STS", AmazonS3ConfigKey::StsEndpoint),
            ];
            for (name, key) in extras {
                if let Some(value) = self.variable(name) {
                    builder = builder.with_config(key, value);
                }
            }
            return (builder, true);
        }
        (builder, false)
    }

    async fn gcs(&self) -> Result<Arc<dyn Backend>, Cause> {
        let o = &self.options;
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_client_options(self.client_options().await?)
            .with_retry(no_retry());
        let variables = [
            ("GOOGLE_SERVICE_ACCOUNT", GoogleConfigKey::ServiceAccount),
            ("GOOGLE_SERVICE_ACCOUNT_KEY", GoogleConfigKey::ServiceAccountKey),
            ("GOOGLE_APPLICATION_CREDENTIALS", GoogleConfigKey::ApplicationCredentials),
        ];
        if o.flag(&spec::ANONYMOUS) {
            // Skipping the signature alone is not enough: writes would still ask
            // the metadata server for a token.
            let nobody = GcpCredential { bearer: String::new() };
            builder = builder
                .with_credentials(Arc::new(StaticCredentialProvider::new(nobody)))
                .with_skip_signature(true);
        } else if let Some(path) = o.text(&spec::GCS_SERVICE_ACCOUNT) {
            builder = builder.with_service_account_path(path);
        } else {
            for (name, key) in variables {
                if let Some(value) = self.variable(name) {
                    builder = builder.with_config(key, value);
                }
            }
        }
        if let Some(endpoint) = self.endpoint() {
            builder = builder.with_config(GoogleConfigKey::BaseUrl, endpoint.trim_end_matches('/'));
        }
        Ok(Arc::new(builder.with_bucket_name(&self.bucket).build()?))
    }

    async fn azure(&self) -> Result<Arc<dyn Backend>, Cause> {
        let o = &self.options;
        let mut builder = MicrosoftAzureBuilder::new()
            .with_client_options(self.client_options().await?)
            .with_retry(no_retry());
        let has_key = o.text(&spec::AZURE_KEY).is_some() || o.text(&spec::AZURE_SAS).is_some();
        // The first name of each is `object_store`'s, the second that of the `az` command.
        let secrets = [
            ("AZURE_STORAGE_ACCOUNT_KEY", AzureConfigKey::AccessKey),
            ("AZURE_STORAGE_KEY", AzureConfigKey::AccessKey),
            ("AZURE_STORAGE_SAS_KEY", AzureConfigKey::SasKey),
            ("AZURE_STORAGE_SAS_TOKEN", AzureConfigKey::SasKey),
            ("AZURE_CLIENT_SECRET", AzureConfigKey::ClientSecret),
        ];
        let others = [
            ("AZURE_STORAGE_ACCOUNT_NAME", AzureConfigKey::AccountName),
            ("AZURE_STORAGE_ACCOUNT", AzureConfigKey::AccountName),
            ("AZURE_CLIENT_ID", AzureConfigKey::ClientId),
            ("AZURE_TENANT_ID", AzureConfigKey::AuthorityId),
            ("AZURE_AUTHORITY_HOST", AzureConfigKey::AuthorityHost),
            ("AZURE_FEDERATED_TOKEN_FILE", AzureConfigKey::FederatedTokenFile),
            ("IDENTITY_ENDPOINT", AzureConfigKey::MsiEndpoint),
        ];
        let secrets = secrets.into_iter().filter(|_| !has_key);
        for (name, key) in secrets.chain(others) {
            if let Some(value) = self.variable(name) {
                builder = builder.with_config(key, value);
            }
        }
        for (option, key) in [
            (&spec::AZURE_ACCOUNT, AzureConfigKey::AccountName),
            (&spec::AZURE_KEY, AzureConfigKey::AccessKey),
            (&spec::AZURE_SAS, AzureConfigKey::SasKey),
        ] {
            if let Some(value) = o.text(option) {
                builder = builder.with_config(key, value);
            }
        }
        if let Some(endpoint) = self.endpoint() {
            builder = builder.with_endpoint(endpoint.to_owned());
        }
        Ok(Arc::new(
            builder
                .with_use_emulator(o.flag(&spec::AZURE_EMULATOR))
                .with_skip_signature(o.flag(&spec::ANONYMOUS))
                .with_container_name(&self.bucket)
                .build()?,
        ))
    }
}

/// `object_store` repeats nothing: `retry` is the single place for that.
fn no_retry() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: Duration::ZERO }
}

async fn read_ca_file(path: &str) -> Result<Vec<Certificate>, Cause> {
    let named = |error: &dyn std::fmt::Display| Cause::from(format!("`ca_file` `{path}`: {error}"));
    let metadata = tokio::fs::metadata(path).await.map_err(|e| named(&e))?;
    if metadata.len() > CA_FILE_BYTES_MAX {
        return Err(named(&"too large for a file of certificates"));
    }
    let pem = tokio::fs::read(path).await.map_err(|e| named(&e))?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|e| named(&e))?;
    if certificates.is_empty() {
        return Err(named(&"holds no certificate in PEM form"));
    }
    Ok(certificates)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn setup(driver: Driver, options: &[(&str, &str)], environment: &[(&str, &str)]) -> Setup {
        let mut set = StoreOptions::default();
        for (name, value) in options {
            set.set(name, value).unwrap();
        }
        let environment =
            environment.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Setup { driver, bucket: "bucket".to_owned(), options: set, environment }
    }

    #[test]
    fn system_certificates_are_needed_unless_only_the_endpoint_is_talked_to() {
        let endpoint = ("endpoint", "https://store.example");
        let keys = [endpoint, ("access_key_id", "a"), ("secret_access_key", "b")];
        assert!(setup(Driver::S3, &keys, &[]).talks_to_endpoint_only());
        assert!(!setup(Driver::S3, &keys[1..], &[]).talks_to_endpoint_only());
        assert!(!setup(Driver::S3, &[endpoint], &[]).talks_to_endpoint_only());
        let variables = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        assert!(setup(Driver::S3, &[endpoint], &variables).talks_to_endpoint_only());
        let profile = [endpoint, ("profile", "p")];
        assert!(!setup(Driver::S3, &profile, &variables).talks_to_endpoint_only());
    }

    #[test]
    fn an_option_goes_before_a_variable_and_an_empty_variable_is_none() {
        let variables = [("AWS_ENDPOINT_URL", "https://v"), ("AWS_ENDPOINT_URL_S3", "")];
        assert_eq!(setup(Driver::S3, &[], &variables).endpoint(), Some("https://v"));
        let option = [("endpoint", "https://o")];
        assert_eq!(setup(Driver::S3, &option, &variables).endpoint(), Some("https://o"));
    }

    #[tokio::test]
    async fn every_driver_can_be_built_without_touching_the_network() {
        let s3 = [
            ("access_key_id", "a"),
            ("secret_access_key", "b"),
            ("region", "eu-west-1"),
            ("sse", "aws:kms"),
            ("sse_kms_key", "k"),
            ("checksum", "crc64nvme"),
        ];
        setup(Driver::S3, &s3, &[]).build().await.unwrap();
        for sse in ["aes256", "aws:kms:dsse"] {
            let options =
                [("access_key_id", "a"), ("secret_access_key", "b"), ("region", "r"), ("sse", sse)];
            setup(Driver::S3, &options, &[]).build().await.unwrap();
        }
        setup(Driver::Gcs, &[("anonymous", "true")], &[]).build().await.unwrap();
        let azure = [("azure_account", "acc"), ("azure_key", "a2V5")];
        setup(Driver::Azure, &azure, &[]).build().await.unwrap();
        // A web identity is found in the variables, no AWS file is looked for.
        let irsa =
            [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn"), ("AWS_REGION", "r")];
        setup(Driver::S3, &[], &irsa).build().await.unwrap();
    }

    #[tokio::test]
    async fn a_ca_file_that_is_missing_or_empty_is_named_in_the_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        let path = path.to_str().unwrap();
        let build = || async move {
            let setup = setup(Driver::S3, &[("ca_file", path)], &[]);
            setup.build().await.map(|_| ()).unwrap_err().to_string()
        };
        let error = build().await;
        assert!(error.contains("ca_file") && error.contains(path), "{error}");
        std::fs::write(path, "not a certificate").unwrap();
        assert!(build().await.contains("no certificate"));
    }
}
