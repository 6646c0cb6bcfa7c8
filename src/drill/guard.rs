//! A process that outlives a drill which is killed, and clears up behind it.
//!
//! It is this program under another command (`drill-guard`), with a pipe from the drill as its stdin. When the pipe
//! ends without a word, the drill is gone: the guard stops the private server and removes the files. Where the guard
//! is killed too, the next drill in the same directory does the same.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::scratch::clear_after;

/// The command of a guard, as the command line knows it.
pub const GUARD_COMMAND: &str = "drill-guard";

/// What a drill says that needs its guard no more.
const DONE: &[u8] = b"done";

/// How long a drill that is dying may hold its directory.
const DYING_MAX: Duration = Duration::from_mins(1);

/// A guard at work.
pub(super) struct Guard {
    child: Child,
}

impl Guard {
    /// Starts the guard of a scratch directory. That it cannot be started is no reason not to drill.
    pub(super) fn start(program: &Path, root: &Path, keep: bool) -> Option<Self> {
        let mut command = Command::new(program);
        // No settings file, no variables: it needs none, and no secret.
        command.env_clear().args(["--config", "/dev/null", "--quiet", GUARD_COMMAND]);
        command.arg(root).args(keep.then_some("--keep"));
        command.current_dir("/").process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        match command.spawn() {
            Ok(child) => Some(Self { child }),
            Err(error) => {
                tracing::warn!(
                    "nobody will clear up if this drill is killed, until the next one: {error}"
                );
                None
            }
        }
    }

    /// Ends the guard: everything is cleared up.
    pub(super) fn dismiss(mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            let _ = stdin.write_all(DONE);
        }
        let _ = self.child.wait();
    }
}

/// Is a guard: waits for the end of a drill, and clears up behind one that said nothing. Returns what could not be
/// cleared up, as text: nobody is left to be told.
///
/// # Errors
/// A sentence.
pub fn guard(root: &Path, keep: bool) -> Result<(), String> {
    let mut said = Vec::new();
    let read = std::io::stdin().lock().take(DONE.len() as u64).read_to_end(&mut said);
    if read.is_ok() && said == DONE {
        return Ok(());
    }
    clear_after(root, keep, DYING_MAX).map_err(|error| error.to_string())
}
