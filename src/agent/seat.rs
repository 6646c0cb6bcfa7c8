//! The agent's place beside the cluster: one agent for each spool, and the socket by which commands find it.
//!
//! Owns who may sit there and whom a command may trust. Never here: what is said (`message`).
//!
//! ```text
//! pg_wal/highwater.spool/agent.lock     held while the agent lives; the kernel gives it back however it ends
//! pg_wal/highwater.spool/agent.sock     made under the lock, over one that a dead agent has left
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::geteuid;
use tokio::net::UnixListener;

use crate::failure::{Failure, Kind};
use crate::ops::ahead::Ahead;
use crate::pgdata::{Spool, SpoolLock};

const SOCKET: &str = "agent.sock";
const LOCK: &str = "agent.lock";

/// The longest path of a socket, in bytes, without the zero that ends it (`sun_path` in `unix(7)`).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// How often the agent looks whether its socket still stands where it was made.
const LOOK_EVERY: Duration = Duration::from_secs(2);

const ROOT: u32 = 0;

const UNHARMED: &str =
    "Archiving and recovery go on without an agent, and nothing was read from the repository.";

/// The right to serve a spool, and the socket. Both go when it is dropped.
pub(super) struct Seat {
    pub(super) listener: UnixListener,
    socket: PathBuf,
    inode: (u64, u64),
    _lock: SpoolLock,
}

impl Seat {
    /// Takes the seat; the spool is made if it is not there. Must be called inside a runtime.
    ///
    /// # Errors
    /// Another agent sits there ([`Kind::Usage`]), or the spool cannot be used ([`Kind::Disk`]).
    pub(super) fn take(ahead: &Ahead) -> Result<Self, Failure> {
        let spool = Spool::open(&ahead.spool).map_err(|error| {
            let next = "Run the agent as the user who runs PostgreSQL, or choose another directory with the setting `spool`.";
            Failure::new(Kind::Disk, "the agent's place beside the WAL cannot be used", UNHARMED, next)
                .because(error)
        })?;
        let lock = spool.lock_file(LOCK).map_err(|error| {
            let next = "Check the disk, and that this user may write to the spool.";
            Failure::new(Kind::Disk, "the spool cannot be locked", UNHARMED, next).because(error)
        })?;
        let lock = lock.ok_or_else(|| {
            let next = "One agent serves a data directory. Stop the other one first.";
            Failure::new(Kind::Usage, "another agent serves this data directory", UNHARMED, next)
        })?;
        let socket = spool.path(SOCKET);
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let what = format!("`{}` is too long for a socket's path", socket.display());
            let next = "Choose a shorter directory with the setting `spool`.";
            return Err(Failure::new(Kind::Usage, what, UNHARMED, next));
        }
        let (listener, inode) = listen(&socket).map_err(|error| {
            let what = format!("could not listen on `{}`", socket.display());
            let next = "Check the disk, and that this user may write to the spool.";
            Failure::new(Kind::Disk, what, UNHARMED, next).because(error)
        })?;
        Ok(Self { listener, socket, inode, _lock: lock })
    }

    /// Waits until commands find the socket no more, since it was removed or replaced; perhaps for ever.
    pub(super) async fn lost(&self) -> Failure {
        while self.is_ours() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Failure::new(
            Kind::Disk,
            format!("the agent's socket `{}` was removed", self.socket.display()),
            "Archiving and recovery go on without an agent.",
            "Start the agent again, as service managers do by themselves. If the data directory was replaced, that is all there is to it.",
        )
    }

    fn is_ours(&self) -> bool {
        inode_of(&self.socket).is_ok_and(|inode| inode == self.inode)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.is_ours()
            && let Err(error) = fs::remove_file(&self.socket)
        {
            tracing::debug!("the socket stays: {error}");
        }
    }
}

/// Listens there in place of whoever did before; the caller holds the lock.
fn listen(socket: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok((listener, inode_of(socket)?))
}

fn inode_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Returns the socket on which an agent may listen whom this user can trust: in a spool that nobody else can write
/// to, and made by this user or root. `None`: there is none.
pub(super) fn trusted_socket(spool: &Spool) -> Option<PathBuf> {
    let socket = spool.path(SOCKET);
    let metadata = fs::symlink_metadata(&socket).ok()?;
    let is_ours = [geteuid().as_raw(), ROOT].contains(&metadata.uid());
    if metadata.file_type().is_socket() && is_ours {
        return Some(socket);
    }
    tracing::info!("`{}` is no socket of this user and is left alone", socket.display());
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn ahead(place: &tempfile::TempDir) -> Ahead {
        Ahead { spool: place.path().join("spool"), place: "here".to_owned(), room_bytes: 0 }
    }

    fn refused(ahead: &Ahead) -> Failure {
        match Seat::take(ahead) {
            Err(failure) => failure,
            Ok(_) => panic!("it was not refused"),
        }
    }

    #[tokio::test]
    async fn one_agent_sits_there_and_leaves_nothing_that_looks_like_one() {
        let place = tempfile::tempdir().unwrap();
        let ahead = ahead(&place);
        let seat = Seat::take(&ahead).unwrap();
        let spool = Spool::find(&ahead.spool).unwrap();
        let socket = trusted_socket(&spool).unwrap();
        assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
        assert_eq!(refused(&ahead).kind, Kind::Usage);
        UnixStream::connect(&socket).unwrap();
        drop(seat);
        assert_eq!(trusted_socket(&spool), None);
        Seat::take(&ahead).unwrap();
    }

    #[tokio::test]
    async fn what_a_killed_agent_has_left_is_replaced() {
        let place = tempfile::tempdir().unwrap();
        let ahead = ahead(&place);
        let spool = Spool::open(&ahead.spool).unwrap();
        drop(std::os::unix::net::UnixListener::bind(spool.path(SOCKET)).unwrap());
        let socket = trusted_socket(&spool).unwrap();
        assert!(UnixStream::connect(&socket).is_err());
        let _seat = Seat::take(&ahead).unwrap();
        UnixStream::connect(&socket).unwrap();
    }

    #[tokio::test]
    async fn a_seat_that_was_taken_away_is_noticed_and_the_next_ones_socket_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let ahead = ahead(&place);
        let seat = Seat::take(&ahead).unwrap();
        fs::remove_dir_all(&ahead.spool).unwrap();
        assert_eq!(seat.lost().await.kind, Kind::Disk);
        let next = Seat::take(&ahead).unwrap();
        drop(seat);
        assert!(next.is_ours());
    }

    #[test]
    fn a_plain_file_or_a_link_is_no_socket() {
        let place = tempfile::tempdir().unwrap();
        let spool = Spool::open(&ahead(&place).spool).unwrap();
        assert_eq!(trusted_socket(&spool), None);
        fs::write(spool.path(SOCKET), "").unwrap();
        assert_eq!(trusted_socket(&spool), None);
        fs::remove_file(spool.path(SOCKET)).unwrap();
        let elsewhere = place.path().join("elsewhere");
        let _listener = std::os::unix::net::UnixListener::bind(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, spool.path(SOCKET)).unwrap();
        assert_eq!(trusted_socket(&spool), None, "who can place a link decides where it leads");
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_told() {
        let place = tempfile::tempdir().unwrap();
        let spool = place.path().join("x".repeat(110));
        let failure = refused(&Ahead { spool, ..ahead(&place) });
        assert!(failure.what.contains("too long"), "{failure}");
    }
}
