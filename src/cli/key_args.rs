//! Arguments of `key`.

use std::path::PathBuf;

use clap::Subcommand;

use super::args::usage;
use super::requests::KeyRequest;
use crate::failure::Failure;
use crate::format::KeyId;

/// What can be done with keys.
#[derive(Subcommand)]
pub enum KeyCommand {
    /// Make a key, in a new file
    New {
        /// A file that does not exist yet
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Show which user keys open the cluster, and what they open
    List,
    /// Let a second key open everything too
    Add {
        /// The file that holds it
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Store everything from now on under a new repository key; what is stored stays readable
    Rotate {
        /// The file of another user key that shall open it; may be repeated
        #[arg(long, value_name = "FILE")]
        also: Vec<PathBuf>,
        /// A user key that shall not open it; may be repeated
        #[arg(long, value_name = "ID")]
        leave_out: Vec<String>,
    },
    /// Put a new key in the place of the one that is set, which opens nothing any more
    Rewrap {
        /// The file that holds the new one
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Make a key open nothing any more; the one that is set must be another that opens everything
    Remove {
        /// The key, as list shows it
        #[arg(value_name = "ID")]
        key: String,
    },
}

impl KeyCommand {
    pub(super) fn into_request(self) -> Result<KeyRequest, Failure> {
        Ok(match self {
            Self::New { file } => KeyRequest::New(file),
            Self::List => KeyRequest::List,
            Self::Add { file } => KeyRequest::Add(file),
            Self::Rotate { also, leave_out } => KeyRequest::Rotate {
                also,
                left_out: leave_out.iter().map(|text| key_id(text)).collect::<Result<_, _>>()?,
            },
            Self::Rewrap { file } => KeyRequest::Rewrap(file),
            Self::Remove { key } => KeyRequest::Remove(key_id(&key)?),
        })
    }
}

fn key_id(text: &str) -> Result<KeyId, Failure> {
    let next = "`highwater key list` shows the user keys";
    text.parse().map_err(|_| usage(&format!("`{text}` is not the id of a key"), next))
}
