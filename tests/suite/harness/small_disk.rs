//! A file system of 4 MiB, for the tests that fill a disk.

use super::trees::{as_server_user, server_user};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Why there is none, in the report of what was not run.
pub const NO_SMALL_DISK: &str = "this system lets the test mount no small file system to fill \
    (a container without privileges, or Ubuntu's restriction of user namespaces: as root, or \
    after `sysctl kernel.apparmor_restrict_unprivileged_userns=0`, it runs)";

/// How this system lets a test mount something that nobody else sees.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// The server's user does, in a user namespace.
    UserNamespace,
    /// Root does, and the command then runs as the server's user.
    Root,
}

/// Returns a command that mounts an empty file system of 4 MiB at `directory`,
/// in a mount namespace of its own, and runs a shell script there as the
/// server's user. In the script `$0` is the directory, and `$@` the arguments
/// that the caller adds. `None` where the system forbids it.
pub fn on_small_disk(directory: &Path, script: &str) -> Option<Command> {
    static WAY: OnceLock<Option<Way>> = OnceLock::new();
    let way = (*WAY.get_or_init(|| {
        [Way::UserNamespace, Way::Root].into_iter().find(|way| {
            let probe =
                command(*way, Path::new("/tmp"), "exit 42").and_then(|mut c| c.output().ok());
            probe.is_some_and(|output| output.status.code() == Some(42))
        })
    }))?;
    command(way, directory, script)
}

fn command(way: Way, directory: &Path, script: &str) -> Option<Command> {
    let (mut command, owner, become_user) = match way {
        Way::UserNamespace => {
            let mut command = as_server_user("/usr/bin/unshare");
            command.arg("--map-root-user");
            (command, String::new(), String::new())
        }
        Way::Root => {
            let (uid, gid) = server_user()?;
            let mut command = Command::new("/usr/bin/unshare");
            command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
            let become_user = format!("setpriv --reuid {uid} --regid {gid} --clear-groups");
            (command, format!(",uid={uid},gid={gid}"), become_user)
        }
    };
    let outer = format!(
        "mount -t tmpfs -o size=4m,mode=700{owner} tmpfs \"$0\" || exit 99; \
         exec {become_user} /bin/sh -c \"$SCRIPT\" \"$0\" \"$@\""
    );
    command.args(["--mount", "/bin/sh", "-c", &outer]).arg(directory).env("SCRIPT", script);
    Some(command)
}
