//! Where a repository is: the URL that a user writes.
//!
//! Owns: the four accepted forms, how one is parsed and shown. Never here:
//! credentials (a URL with one in it is refused, because URLs are printed),
//! opening anything.
//!
//! ```text
//! file:///srv/highwater          a local directory, absolute
//! s3://bucket/some/prefix        Amazon S3 and everything that speaks its protocol
//! gs://bucket/some/prefix        Google Cloud Storage
//! az://container/some/prefix     Azure Blob Storage
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::contract::is_key_part;
use crate::spelling::nearest;

/// The forms named in every error about a URL.
pub const ACCEPTED_FORMS: &str =
    "file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";

/// The longest URL accepted, in bytes. An S3 key alone may have 1024.
const URL_BYTES_MAX: usize = 2048;

const SCHEMES: [&str; 4] = ["file", "s3", "gs", "az"];

/// Which driver a URL asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Driver {
    /// A local directory.
    File,
    /// Amazon S3 or a store that speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

impl Driver {
    /// Returns the scheme of this driver's URLs.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
        }
    }
}

/// Where a repository is. Never holds a secret; `Display` gives the URL back.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RepoUrl {
    /// `file:///path`.
    File {
        /// The absolute directory.
        directory: PathBuf,
    },
    /// `s3://`, `gs://` or `az://`.
    Bucket {
        /// One of the three cloud drivers.
        driver: Driver,
        /// The bucket, or the container on Azure.
        bucket: String,
        /// What stands before every key: no slash at either end, may be empty.
        prefix: String,
    },
}

/// Why a text is not the URL of a repository. No retry cures one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// There is no `scheme://`.
    #[error("`{url}` is not a repository URL; write {ACCEPTED_FORMS}")]
    NoScheme {
        /// What was written.
        url: String,
    },
    /// The scheme is none of ours.
    #[error("`{scheme}://` is not a kind of repository{hint}; write {ACCEPTED_FORMS}")]
    UnknownScheme {
        /// The scheme written.
        scheme: String,
        /// A ready phrase that names the nearest scheme, or nothing.
        hint: String,
    },
    /// `file:` without an absolute path.
    #[error(
        "a local repository needs an absolute path: `file:///srv/highwater` (three slashes), not `{url}`"
    )]
    RelativePath {
        /// What was written.
        url: String,
    },
    /// The bucket is missing, or is not a name that a store allows.
    #[error(
        "`{scheme}://` must be followed by the name of a {noun}, as in `{scheme}://{noun}/prefix`"
    )]
    BadBucket {
        /// The scheme written.
        scheme: &'static str,
        /// `bucket` or `container`.
        noun: &'static str,
    },
    /// A password, key, query or fragment. The text is not repeated, for it may be a secret.
    #[error(
        "a repository URL holds no user, password, query or fragment; put credentials into the settings or the environment"
    )]
    Secret,
    /// A character or a part (`.`, `..`, empty) that a key cannot have.
    #[error(
        "the path of a repository URL is made of A-Z a-z 0-9 . _ - and single slashes, without `.` or `..` as a part"
    )]
    BadPath,
    /// Longer than any store accepts.
    #[error("the repository URL is longer than {URL_BYTES_MAX} bytes")]
    TooLong,
}

impl RepoUrl {
    /// Returns the driver that this URL asks for.
    pub fn driver(&self) -> Driver {
        match self {
            Self::File { .. } => Driver::File,
            Self::Bucket { driver, .. } => *driver,
        }
    }

    /// Returns the local directory, if this is one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::File { directory } => Some(directory),
            Self::Bucket { .. } => None,
        }
    }
}

impl FromStr for RepoUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        if text.len() > URL_BYTES_MAX {
            return Err(UrlError::TooLong);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            if text.starts_with("file:") {
                return Err(UrlError::RelativePath { url: text.to_owned() });
            }
            if text.contains(['@', '?', '#']) {
                return Err(UrlError::Secret);
            }
            return Err(UrlError::NoScheme { url: text.to_owned() });
        };
        match scheme {
            "file" => parse_file(text, rest),
            "s3" => parse_bucket(Driver::S3, rest),
            "gs" => parse_bucket(Driver::Gcs, rest),
            "az" => parse_bucket(Driver::Azure, rest),
            other => {
                let hint = likely_scheme(other)
                    .map_or_else(String::new, |scheme| format!(" (did you mean `{scheme}://`?)"));
                Err(UrlError::UnknownScheme { scheme: other.chars().take(32).collect(), hint })
            }
        }
    }
}

impl fmt::Display for RepoUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { directory } => write!(f, "file://{}", directory.display()),
            Self::Bucket { driver, bucket, prefix } => {
                write!(f, "{}://{bucket}", driver.scheme())?;
                if !prefix.is_empty() {
                    write!(f, "/{prefix}")?;
                }
                Ok(())
            }
        }
    }
}

/// Names that other tools use for the same stores come before mere spelling.
fn likely_scheme(scheme: &str) -> Option<&'static str> {
    match scheme.to_ascii_lowercase().as_str() {
        "s3a" | "s3n" | "minio" | "aws" => Some("s3"),
        "gcs" | "google" => Some("gs"),
        "azure" | "abfs" | "abfss" | "wasb" | "adl" | "blob" => Some("az"),
        "local" | "posix" | "dir" | "fs" => Some("file"),
        other => nearest(other, SCHEMES),
    }
}

fn parse_file(text: &str, rest: &str) -> Result<RepoUrl, UrlError> {
    // `file://server/share` would name another machine; only `file:///` is local.
    if !rest.starts_with('/') {
        return Err(UrlError::RelativePath { url: text.to_owned() });
    }
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() || parts.iter().any(|part| matches!(*part, "." | "..")) {
        return Err(UrlError::BadPath);
    }
    // A directory may have any name that the system allows, but a control
    // character in one is always a mistake and would upset every log line.
    if rest.contains(char::is_control) {
        return Err(UrlError::BadPath);
    }
    Ok(RepoUrl::File { directory: PathBuf::from(format!("/{}", parts.join("/"))) })
}

fn parse_bucket(driver: Driver, rest: &str) -> Result<RepoUrl, UrlError> {
    if rest.contains(['@', '?', '#']) {
        return Err(UrlError::Secret);
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let noun = if driver == Driver::Azure { "container" } else { "bucket" };
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '$');
    if bucket.is_empty() || bucket.starts_with('.') || !bucket.chars().all(allowed) {
        return Err(UrlError::BadBucket { scheme: driver.scheme(), noun });
    }
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    if !prefix.is_empty() && !prefix.split('/').all(is_key_part) {
        return Err(UrlError::BadPath);
    }
    Ok(RepoUrl::Bucket { driver, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_four_forms_are_read_and_shown_again() {
        for text in ["file:///srv/hw", "s3://b", "s3://b/p/q", "gs://b-1/p", "az://box/p"] {
            assert_eq!(text.parse::<RepoUrl>().unwrap().to_string(), text);
        }
        let url: RepoUrl = "s3://b/p/".parse().unwrap();
        assert_eq!(url.to_string(), "s3://b/p");
        assert_eq!(url.driver(), Driver::S3);
        let url: RepoUrl = "file:///srv//hw/".parse().unwrap();
        assert_eq!(url.directory(), Some(Path::new("/srv/hw")));
    }

    #[test]
    fn a_relative_directory_is_refused_with_the_right_form() {
        for text in ["file://srv/hw", "file:srv", "file:/srv", "file://"] {
            let error = text.parse::<RepoUrl>().unwrap_err();
            assert!(error.to_string().contains("file:///"), "{text}: {error}");
        }
        assert_eq!("file:///".parse::<RepoUrl>(), Err(UrlError::BadPath));
        assert_eq!("file:///a/../b".parse::<RepoUrl>(), Err(UrlError::BadPath));
    }

    #[test]
    fn an_unknown_scheme_names_the_nearest_one() {
        for (text, nearest) in [
            ("s4://b", "s3://"),
            ("gcs://b", "gs://"),
            ("azure://b", "az://"),
            ("fiel:///b", "file://"),
        ] {
            let error = text.parse::<RepoUrl>().unwrap_err().to_string();
            assert!(error.contains(&format!("did you mean `{nearest}`")), "{error}");
        }
        let error = "/srv/hw".parse::<RepoUrl>().unwrap_err().to_string();
        assert!(error.contains("file:///path"), "{error}");
    }

    #[test]
    fn a_secret_in_the_url_is_refused_and_not_repeated() {
        for text in
            ["s3://KEY:hunter2@b/p", "s3://b/p?token=hunter2", "gs://b#hunter2", "KEY:hunter2@b"]
        {
            let error = text.parse::<RepoUrl>().unwrap_err();
            assert_eq!(error, UrlError::Secret);
            assert!(!error.to_string().contains("hunter2"));
        }
    }

    #[test]
    fn a_bad_bucket_or_prefix_is_refused() {
        assert!(matches!("s3://".parse::<RepoUrl>(), Err(UrlError::BadBucket { .. })));
        assert!(matches!(
            "az:///p".parse::<RepoUrl>(),
            Err(UrlError::BadBucket { noun: "container", .. })
        ));
        for text in ["s3://b//p", "s3://b/../p", "s3://b/p q", "s3://b/.p", "s3://b/p//"] {
            assert_eq!(text.parse::<RepoUrl>(), Err(UrlError::BadPath), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_it_accepts_survives_a_round_trip(text in ".{0,80}") {
            if let Ok(url) = text.parse::<RepoUrl>() {
                prop_assert_eq!(url.to_string().parse::<RepoUrl>().unwrap(), url);
            }
        }

        #[test]
        fn every_plain_bucket_url_is_accepted(text in "(s3|gs|az)://[a-z0-9]{3,10}(/[A-Za-z0-9_-]{1,8}){0,3}") {
            prop_assert_eq!(text.parse::<RepoUrl>().unwrap().to_string(), text);
        }
    }
}
