//! What a cloud store's answer means.
//!
//! Owns: the way from `object_store`'s errors to [`StoreError`], and a cause
//! that a person can read. Never here: sending requests, repeating them.
//!
//! `object_store` keeps the status and the body of an answer inside a private
//! type, so they are taken from its text; the test battery runs every case
//! against real servers, so a change of wording cannot pass unseen.
//!
//! The rule that matters most: [`StoreError::Absent`] needs the store's own word
//! for "no such key". A bare 404 may come from a proxy, a wrong endpoint or a
//! missing bucket, and is refused.

use std::error::Error as StdError;
use std::fmt;

use object_store::client::{HttpError, HttpErrorKind};

use super::{Cause, Key, StoreError};

/// Which request was being made, for codes whose meaning depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum During {
    Create,
    Read,
    /// A request for the object's metadata, whose answers have no body.
    Look,
    List,
    Delete,
}

/// The codes by which stores say that a key does not exist: S3 and GCS, Azure.
const NO_SUCH_KEY: [&str; 2] = ["NoSuchKey", "BlobNotFound"];

/// The codes that mean "later", whatever the status they come with.
const BUSY: [&str; 8] = [
    "RequestTimeout",
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "ServerBusy",
    "OperationTimedOut",
    "Busy",
    "TooManyRequests",
];

/// The codes of a store that has no room for us.
const FULL: [&str; 5] = [
    "QuotaExceeded",
    "XMinioStorageFull",
    "InsufficientStorage",
    "XMinioAdminBucketQuotaExceeded",
    "StorageQuotaExceeded",
];

/// The codes of wrong credentials that come with other statuses than 401 and 403.
const NOT_LET_IN: [&str; 6] = [
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthenticationFailed",
    "TokenRefreshRequired",
];

/// How much of a server's own message is kept.
const MESSAGE_CHARS_MAX: usize = 300;

/// What was found in an error from `object_store`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    /// The HTTP status, if there was an answer.
    status: Option<u16>,
    /// The store's own code, such as `NoSuchKey`.
    code: Option<String>,
    /// The store's own message.
    message: Option<String>,
    /// What failed on the way, if there was no answer.
    transport: Option<HttpErrorKind>,
    /// The innermost text.
    root: String,
    /// Whether the request was one for credentials at an instance's metadata service.
    at_metadata_service: bool,
}

/// Returns what an error means for the caller of the store.
pub(super) fn classify(during: During, key: &Key, error: &object_store::Error) -> StoreError {
    let answer = Answer::of(error);
    tracing::debug!(?during, %key, %error, "an answer of the store");
    let key = key.clone();
    let cause: Cause = Box::new(answer.explain(error));
    if let Some(identity) = find::<super::aws_credentials::IdentityError>(error) {
        return if identity.may_pass() {
            StoreError::Unavailable { key, cause }
        } else {
            StoreError::Denied { key, cause }
        };
    }
    let code = answer.code.as_deref().unwrap_or_default();
    if BUSY.contains(&code) {
        return StoreError::Unavailable { key, cause };
    }
    if FULL.contains(&code) {
        return StoreError::NoRoom { key, cause };
    }
    if NOT_LET_IN.contains(&code) {
        return StoreError::Denied { key, cause };
    }
    if answer.transport.is_some() {
        return if answer.at_metadata_service {
            StoreError::Denied { key, cause }
        } else if is_about_certificates(&answer.root) {
            StoreError::Refused { key, cause }
        } else {
            StoreError::Unavailable { key, cause }
        };
    }
    match answer.status {
        Some(404) if is_about_the_key(error) && says_absent(during, code) => {
            StoreError::Absent { key }
        }
        Some(409 | 412 | 304)
            if during == During::Create
                && is_about_the_key(error)
                && code != "ContainerBeingDeleted" =>
        {
            StoreError::Exists { key }
        }
        // Immutability policies answer deletes this way on Azure.
        Some(401 | 403) => StoreError::Denied { key, cause },
        Some(409) if during == During::Delete => StoreError::Denied { key, cause },
        Some(507) => StoreError::NoRoom { key, cause },
        Some(501) => StoreError::Refused { key, cause },
        Some(408 | 425 | 429 | 500..) => StoreError::Unavailable { key, cause },
        Some(_) => StoreError::Refused { key, cause },
        None => without_answer(during, key, error, cause),
    }
}

/// Returns whether the answer was one about the object itself, not about
/// credentials that had to be fetched from somewhere else first.
fn is_about_the_key(error: &object_store::Error) -> bool {
    use object_store::Error::{AlreadyExists, NotFound, NotModified, Precondition};
    matches!(
        error,
        NotFound { .. } | AlreadyExists { .. } | Precondition { .. } | NotModified { .. }
    )
}

/// Returns whether a 404 with this code says that there is no such key.
fn says_absent(during: During, code: &str) -> bool {
    match during {
        During::Read | During::Delete => NO_SUCH_KEY.contains(&code),
        During::Look => true,
        During::Create | During::List => false,
    }
}

/// Sorts errors that hold no HTTP answer, as `object_store` makes them itself.
fn without_answer(
    during: During,
    key: Key,
    error: &object_store::Error,
    cause: Cause,
) -> StoreError {
    match error {
        object_store::Error::NotFound { .. } if during == During::Delete => {
            StoreError::Absent { key }
        }
        object_store::Error::AlreadyExists { .. } if during == During::Create => {
            StoreError::Exists { key }
        }
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => StoreError::Denied { key, cause },
        _ => StoreError::Refused { key, cause },
    }
}

impl Answer {
    fn of(error: &(dyn StdError + 'static)) -> Self {
        let mut answer = Self::default();
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            if let Some(rest) = text
                .strip_prefix("Server returned non-2xx status code: ")
                .or_else(|| text.strip_prefix("Server returned error response: "))
            {
                answer.read_status(rest);
            }
            // Azure's deletes go as a batch, whose parts have only a reason phrase.
            if answer.status.is_none() && text.contains("The specified container does not exist") {
                answer.status = Some(404);
                answer.code = Some("ContainerNotFound".to_owned());
            }
            if text.starts_with("Received redirect") {
                answer.status = Some(301);
            }
            if let Some(http) = error.downcast_ref::<HttpError>() {
                answer.transport = Some(http.kind());
            }
            answer.at_metadata_service |=
                text.contains("169.254.169.254") || text.contains("computeMetadata");
            if !text.is_empty() {
                answer.root = text;
            }
            next = error.source();
        }
        answer
    }

    /// Reads `404 Not Found: <?xml …><Error><Code>NoSuchKey</Code>…`.
    fn read_status(&mut self, text: &str) {
        self.status = text.get(..3).and_then(|digits| digits.parse().ok()).or(Some(500));
        self.code = element(text, "Code");
        self.message = element(text, "Message").map(|message| {
            // Azure adds the request's identity and time in further lines.
            let line = message.lines().next().unwrap_or_default().to_owned();
            line.chars().take(MESSAGE_CHARS_MAX).collect()
        });
    }

    fn explain(&self, error: &object_store::Error) -> Explained {
        let mut text = match (self.status, &self.code) {
            (Some(301), None) => "the store answered with a redirect".to_owned(),
            (Some(status), _) if self.at_metadata_service => {
                format!("the instance's metadata service answered {status}")
            }
            (Some(status), Some(code)) => format!("the store answered {status} {code}"),
            (Some(status), None) => format!("the store answered {status}"),
            (None, _) if self.transport.is_some() => self.transport_text(),
            (None, _) => root_of(error),
        };
        if let Some(message) = &self.message {
            text.push_str(": ");
            text.push_str(message);
        }
        if let Some(hint) = self.hint() {
            text.push_str(" (");
            text.push_str(hint);
            text.push(')');
        }
        Explained(text)
    }

    fn transport_text(&self) -> String {
        let what = match self.transport {
            Some(HttpErrorKind::Connect) => "could not connect",
            Some(HttpErrorKind::Timeout) => "timed out",
            Some(HttpErrorKind::Interrupted) => "the connection was lost",
            _ => "the request failed",
        };
        format!("{what}: {}", self.root)
    }

    /// What a person can do about the answer, where that is known.
    fn hint(&self) -> Option<&'static str> {
        match (self.status, self.code.as_deref()) {
            (_, Some("NoSuchBucket" | "ContainerNotFound")) => {
                Some("create it, or correct the repository's URL")
            }
            (_, Some("RequestTimeTooSkewed")) => Some("the clock of this machine is wrong"),
            (
                Some(301 | 400),
                None | Some("AuthorizationHeaderMalformed" | "PermanentRedirect"),
            ) => Some("is `region` that of the bucket?"),
            (Some(501), _) => Some(
                "if the store has no conditional put, set `conditional_put = off` and keep to a single writer",
            ),
            (Some(404), None) => {
                Some("without naming a missing key; is `endpoint` that of the store?")
            }
            _ if self.at_metadata_service => {
                Some("no credentials are set, and this machine has no instance identity")
            }
            _ if self.transport.is_some() && is_about_certificates(&self.root) => {
                Some("`ca_file` names the authority of a store with a certificate of its own")
            }
            _ => None,
        }
    }
}

/// Returns the text of the first `<name>` element.
fn element(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (value, _) = rest.split_once("</")?;
    Some(value.trim().to_owned()).filter(|value| !value.is_empty())
}

fn is_about_certificates(text: &str) -> bool {
    text.contains("certificate") || text.contains("UnknownIssuer")
}

fn root_of(error: &object_store::Error) -> String {
    let mut deepest: &dyn StdError = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// A cause in one sentence. The whole text of `object_store`, which repeats each
/// layer, goes to the debug log.
#[derive(Debug)]
struct Explained(String);

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Explained {}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(String);

    fn answered(text: &str) -> object_store::Error {
        let source = Box::new(Said(format!("Server returned non-2xx status code: {text}")));
        let path = "a/b".to_owned();
        // As `object_store` sorts answers about an object.
        match &text[..3] {
            "404" => object_store::Error::NotFound { path, source },
            "409" => object_store::Error::AlreadyExists { path, source },
            "412" => object_store::Error::Precondition { path, source },
            _ => object_store::Error::Generic { store: "S3", source },
        }
    }

    fn meaning(during: During, text: &str) -> StoreError {
        classify(during, &Key::new("a/b"), &answered(text))
    }

    fn kind(error: &StoreError) -> &'static str {
        match error {
            StoreError::Absent { .. } => "absent",
            StoreError::Exists { .. } => "exists",
            StoreError::Denied { .. } => "denied",
            StoreError::NoRoom { .. } => "no room",
            StoreError::NotConfirmed { .. } => "not confirmed",
            StoreError::Unavailable { .. } => "unavailable",
            StoreError::Refused { .. } => "refused",
        }
    }

    #[test]
    fn every_answer_has_its_meaning() {
        use During::{Create, Delete, List, Look, Read};
        let xml = |status: &str, code: &str| {
            format!(
                "{status}: <?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>"
            )
        };
        for (during, text, expected) in [
            (Read, xml("404 Not Found", "NoSuchKey"), "absent"),
            (Read, xml("404 Not Found", "BlobNotFound"), "absent"),
            (Look, "404 Not Found: ".to_owned(), "absent"),
            // Absence is never concluded from an answer that does not name the key.
            (Read, "404 Not Found: <html>nginx</html>".to_owned(), "refused"),
            (Read, xml("404 Not Found", "NoSuchBucket"), "refused"),
            (Create, xml("404 Not Found", "NoSuchBucket"), "refused"),
            (Create, xml("404 Not Found", "NoSuchKey"), "refused"),
            (List, xml("404 Not Found", "ContainerNotFound"), "refused"),
            (List, xml("404 Not Found", "NoSuchKey"), "refused"),
            (Delete, xml("404 Not Found", "NoSuchBucket"), "refused"),
            (Create, xml("412 Precondition Failed", "PreconditionFailed"), "exists"),
            (Create, xml("409 Conflict", "ConditionalRequestConflict"), "exists"),
            (Create, xml("409 Conflict", "ContainerBeingDeleted"), "refused"),
            (Delete, xml("409 Conflict", "BlobImmutableDueToPolicy"), "denied"),
            (Read, xml("403 Forbidden", "SignatureDoesNotMatch"), "denied"),
            (Read, xml("400 Bad Request", "ExpiredToken"), "denied"),
            (Create, xml("403 Forbidden", "QuotaExceeded"), "no room"),
            (Create, xml("507 Insufficient Storage", "XMinioStorageFull"), "no room"),
            (Create, xml("501 Not Implemented", "NotImplemented"), "refused"),
            (Create, xml("400 Bad Request", "RequestTimeout"), "unavailable"),
            (Read, xml("503 Service Unavailable", "SlowDown"), "unavailable"),
            (Read, "429 Too Many Requests: ".to_owned(), "unavailable"),
            (Read, "500 Internal Server Error: ".to_owned(), "unavailable"),
            (Read, "416 Range Not Satisfiable: ".to_owned(), "refused"),
            (List, "301 Moved Permanently: ".to_owned(), "refused"),
        ] {
            assert_eq!(kind(&meaning(during, &text)), expected, "{during:?} {text}");
        }
    }

    #[test]
    fn the_cause_says_in_one_sentence_what_the_store_said_and_what_to_do() {
        let text = "404 Not Found: <Error><Code>NoSuchBucket</Code><Message>The bucket is not there</Message></Error>";
        let error = meaning(During::List, text);
        let cause = error.source().unwrap().to_string();
        assert_eq!(
            cause,
            "the store answered 404 NoSuchBucket: The bucket is not there (create it, or correct the repository's URL)"
        );
        let error = meaning(During::Create, "501 Not Implemented: ");
        assert!(error.source().unwrap().to_string().contains("conditional_put = off"));
    }

    #[test]
    fn an_answer_about_credentials_is_never_one_about_the_key() {
        for status in ["404 Not Found: ", "409 Conflict: ", "412 Precondition Failed: "] {
            let text =
                format!("Server returned non-2xx status code: {status}<Code>NoSuchKey</Code>");
            let error = object_store::Error::Generic { store: "STS", source: Box::new(Said(text)) };
            for during in [During::Read, During::Look, During::Create] {
                assert_eq!(kind(&classify(during, &Key::new("k"), &error)), "refused", "{status}");
            }
        }
    }

    #[test]
    fn an_error_response_in_a_body_is_a_failure_that_may_pass() {
        let text =
            "Server returned error response: <Error><Code>SlowDown</Code></Error>".to_owned();
        let error = object_store::Error::Generic { store: "S3", source: Box::new(Said(text)) };
        assert_eq!(kind(&classify(During::List, &Key::new("k"), &error)), "unavailable");
    }
}
