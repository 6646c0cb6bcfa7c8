//! Where the user key comes from: a file, a command that prints it, a variable.
//!
//! Owns reading them, within bounds, and that nothing said about it holds a part of the key. Never here: what the key
//! opens.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::key_settings::KeyChoice;
use super::settings::NOTHING_DONE;
use crate::failure::{Failure, Kind};
use crate::format::SecretKey;
use crate::repo::{KeySource, KeySourceError};

/// A key has 64 digits and a line break; what is longer is something else.
const KEY_BYTES_MAX: u64 = 4 << 10;

/// How long a command may take to print the key.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// How often it is looked whether a command that has closed its output has ended.
const COMMAND_PAUSE: Duration = Duration::from_millis(10);

/// What a key looks like, for whoever gave something else.
const FORM: &str = "a key is 64 hex digits (`highwater key new FILE` makes one)";

/// Returns what reads the key that was chosen, when it is needed.
pub(super) fn source_of(choice: &KeyChoice) -> Arc<dyn KeySource> {
    match choice {
        KeyChoice::File(path) => Arc::new(KeyFile(path.clone())),
        KeyChoice::Command(command) => Arc::new(KeyCommand(command.clone())),
        KeyChoice::Variable(key) => Arc::new(KeyInHand(key.clone())),
    }
}

/// Reads the key in a file.
///
/// # Errors
/// [`Kind::Usage`].
pub(super) fn read_key(path: &Path) -> Result<SecretKey, Failure> {
    read_file(path).map_err(|error| {
        let next = "name a file that `highwater key new` made, and that this user may read";
        Failure::new(Kind::Usage, "a key file cannot be used", NOTHING_DONE, next).because(error)
    })
}

/// Writes a new key into a new file, durably, for its owner alone.
///
/// # Errors
/// [`Kind::Conflict`] if the file is there: a key that is overwritten is lost.
pub(super) fn make_key_file(path: &Path) -> Result<SecretKey, Failure> {
    let shown = path.display();
    let failed = |error: std::io::Error| {
        let kind = match error.kind() {
            std::io::ErrorKind::AlreadyExists => Kind::Conflict,
            _ => Kind::Disk,
        };
        let next = "name a file that does not exist, in a directory that this user may write to";
        let unharmed =
            "No file was replaced, and nothing was read from or written to the repository.";
        Failure::new(kind, format!("could not make the key file {shown}"), unharmed, next)
            .because(error)
    };
    let mut bytes = [0; 32];
    let random = aws_lc_rs::rand::fill(&mut bytes);
    random.map_err(|_| failed(std::io::Error::other("the system gives no random numbers")))?;
    let key = SecretKey::new(bytes);
    let mut options = File::options();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let written = writeln!(file, "{}", key.to_hex()).and_then(|()| file.sync_all());
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    written.and_then(|()| File::open(directory)?.sync_all()).map_err(failed)?;
    Ok(key)
}

#[derive(Debug)]
struct KeyInHand(SecretKey);

impl KeySource for KeyInHand {
    fn user_key(&self) -> Result<SecretKey, KeySourceError> {
        Ok(self.0.clone())
    }
}

#[derive(Debug)]
struct KeyFile(PathBuf);

impl KeySource for KeyFile {
    fn user_key(&self) -> Result<SecretKey, KeySourceError> {
        read_file(&self.0)
    }
}

fn read_file(path: &Path) -> Result<SecretKey, KeySourceError> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| KeySourceError(format!("{shown}: {error}"));
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    // As for the settings file: root may let one group read it.
    let forbidden = if metadata.uid() == 0 { 0o007 } else { 0o077 };
    if metadata.is_file() && metadata.mode() & forbidden != 0 {
        tracing::warn!(
            "{shown} holds a key and can be read by other users; chmod 600 (or 640 if root owns it)"
        );
    }
    let mut text = String::new();
    file.take(KEY_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
    SecretKey::parse(&text).ok_or_else(|| KeySourceError(format!("{shown} holds no key: {FORM}")))
}

struct KeyCommand(String);

impl std::fmt::Debug for KeyCommand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("key_command")
    }
}

impl KeySource for KeyCommand {
    fn user_key(&self) -> Result<SecretKey, KeySourceError> {
        key_of_command(&self.0, COMMAND_DEADLINE)
    }
}

/// Runs a command with the shell, as the leader of a process group of its own, so that all it starts can be ended.
/// What it says on stderr goes to ours.
fn key_of_command(command: &str, deadline: Duration) -> Result<SecretKey, KeySourceError> {
    let began = Instant::now();
    let failed = |what: String| KeySourceError(format!("key_command {what}"));
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = shell.spawn().map_err(|error| failed(format!("was not started: {error}")))?;
    let printed = printed_by(&mut child, deadline);
    let status = printed.and_then(|text| {
        while began.elapsed() < deadline {
            match child.try_wait() {
                Ok(Some(status)) => return Ok((text, status)),
                Ok(None) => std::thread::sleep(COMMAND_PAUSE),
                Err(error) => return Err(format!("was lost: {error}")),
            }
        }
        Err(format!("did not end within {} s", deadline.as_secs()))
    });
    let (text, status) = status.map_err(|why| {
        end(&mut child);
        failed(why)
    })?;
    if !status.success() {
        return Err(failed(format!("failed: {status}")));
    }
    SecretKey::parse(&text).ok_or_else(|| failed(format!("printed no key: {FORM}")))
}

/// Returns what a child prints until it closes its output. A thread reads it: a pipe has no deadline.
fn printed_by(child: &mut Child, deadline: Duration) -> Result<String, String> {
    let Some(output) = child.stdout.take() else { return Err("has no output".to_owned()) };
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = output.take(KEY_BYTES_MAX + 1).read_to_string(&mut text);
        // Nobody listens any more if the deadline has passed.
        let _ = sender.send(read.map(|_| text));
    });
    match receiver.recv_timeout(deadline) {
        Ok(Ok(text)) if text.len() as u64 > KEY_BYTES_MAX => {
            Err("printed more than a key".to_owned())
        }
        Ok(Ok(text)) => Ok(text),
        Ok(Err(_)) => Err("printed no text".to_owned()),
        Err(_) => Err(format!("did not end within {} s", deadline.as_secs())),
    }
}

/// Ends the command and whatever it has started.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended by itself meanwhile.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.wait();
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_made_key_is_read_again_and_never_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let key = make_key_file(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read_key(&path).unwrap(), key);
        assert_eq!(make_key_file(&path).unwrap_err().kind, Kind::Conflict);
        assert_eq!(read_key(&path).unwrap(), key);
        assert_ne!(make_key_file(&directory.path().join("other")).unwrap(), key);
    }

    #[test]
    fn what_is_no_key_is_refused_without_being_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let nearly = "5ec2e7".repeat(10);
        std::fs::write(&path, &nearly).unwrap();
        let failure = read_key(&path).unwrap_err();
        let told = format!("{failure} {:?}", failure.cause);
        assert!(told.contains("64 hex digits") && !told.contains("5ec2e7"), "{told}");
        let error = key_of_command(&format!("echo {nearly}"), 10 * SECOND).unwrap_err();
        assert!(error.0.contains("64 hex digits") && !error.0.contains("5ec2e7"), "{error}");
        assert!(read_key(&directory.path().join("absent")).is_err());
    }

    #[test]
    fn a_command_prints_the_key_or_says_why_not() {
        let text = "0123456789abcdef".repeat(4);
        let key = key_of_command(&format!("printf '%s\\n' {text}"), 10 * SECOND).unwrap();
        assert_eq!(key.to_hex(), text);
        let told = |command: &str| key_of_command(command, 10 * SECOND).unwrap_err().0;
        assert!(told(&format!("echo {text}; exit 3")).contains("failed"));
        assert!(told("exec yes").contains("more than a key"));
        assert!(told("/nonexistent/command 2>/dev/null").contains("failed"));
    }

    #[test]
    fn a_command_that_hangs_is_ended_with_what_it_started() {
        for command in ["sleep 100 & wait", "exec >&-; sleep 100"] {
            let began = Instant::now();
            let error = key_of_command(command, SECOND / 2).unwrap_err();
            assert!(error.0.contains("did not end"), "{error}");
            assert!(began.elapsed() < 50 * SECOND);
        }
    }
}
