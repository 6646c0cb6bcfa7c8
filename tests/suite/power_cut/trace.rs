//! What a command asks of its directories, as strace sees it from outside: no line of the program knows of it.
//!
//! Owns: running under strace, reading its lines, which of them change a directory that is watched. Never here: what
//! a disk makes of it.
//!
//! strace prints a call that another thread interrupts in two lines, its beginning and its end; an effect may be seen from
//! the first on, and is certain from the second on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Calls that change files, make changes durable, or tell somebody something.
const CALLS: &str = "open,openat,openat2,creat,write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,\
     sync_file_range,syncfs,sync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,symlink,\
     symlinkat,truncate,ftruncate,fallocate,copy_file_range,sendfile,splice,sendto,sendmsg,statx,stat,newfstatat";

/// Of these, the ones that the model does not know: in a watched directory they fail the test.
const UNKNOWN: [&str; 7] =
    ["openat2", "pwritev", "pwritev2", "fallocate", "copy_file_range", "sendfile", "splice"];

/// The longest string that strace prints whole.
const STRING_BYTES_MAX: &str = "134217728";

/// Paths below this one exist nowhere; whoever looks for one puts a mark into the trace.
pub const MARKS: &str = "/power-cut-mark/";

/// One thing that was asked of the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// A file that was not there, or was cut to nothing.
    CreateFile(PathBuf),
    /// A file that may have been there.
    OpenOrCreate(PathBuf),
    CreateDirectory(PathBuf),
    CreateLink(PathBuf, PathBuf),
    Write(PathBuf, Option<u64>, Data),
    Truncate(PathBuf, u64),
    /// fsync(2) of a file or directory.
    Sync(PathBuf),
    /// Everything, everywhere.
    SyncAll,
    HardLink(PathBuf, PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    RemoveDirectory(PathBuf),
    /// Somebody saw that this is there.
    Seen(PathBuf),
    /// Something was sent over a connection.
    Sent(Vec<u8>),
    Mark(String),
}

/// What was written; only its length where strace was told not to print it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    Bytes(Vec<u8>),
    Length(u64),
}

impl Data {
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Length(length) => *length,
        }
    }
}

/// An act, from the line in which it began to the one in which it was done.
#[derive(Debug, Clone)]
pub struct Effect {
    pub begin: usize,
    pub end: usize,
    pub act: Act,
}

/// Puts strace before a command, which must be given to the returned one as arguments.
pub fn strace(mut command: Command, trace: &Path, with_content: bool) -> Command {
    let bytes_max = if with_content { STRING_BYTES_MAX } else { "0" };
    command.args(["-f", "-y", "-xx", "--seccomp-bpf", "-qq", "-s", bytes_max, "-o"]).arg(trace);
    command.args(["-e", "signal=none", "-e", &format!("trace={CALLS}"), "--"]);
    command
}

/// Reads a trace; only what happens below `roots`, marks, and what is sent.
pub fn read(trace: &Path, roots: &[PathBuf]) -> Vec<Effect> {
    let text =
        std::fs::read(trace).expect("strace wrote its trace: is the package `strace` installed?");
    let text = String::from_utf8_lossy(&text);
    let mut begun: HashMap<&str, (usize, &str)> = HashMap::new();
    let mut effects = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        let (pid, rest) = line.trim_start().split_once(' ').expect("a process id first");
        let rest = rest.trim_start();
        if let Some(beginning) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(pid, (number, beginning));
        } else if let Some((_, ending)) =
            rest.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>"))
        {
            let (begin, beginning) = begun.remove(pid).expect("what is resumed was begun");
            let call = format!("{beginning}{ending}");
            effects.extend(effect(&call, roots).map(|act| Effect { begin, end: number, act }));
        } else {
            let (begin, end) = (number, number);
            effects.extend(effect(rest, roots).map(|act| Effect { begin, end, act }));
        }
    }
    // What is left was going on when its process ended; all that are watched here wait for what they have begun.
    tighten(&mut effects);
    effects.sort_by_key(|effect| effect.end);
    effects
}

/// Where somebody saw what was being made before strace noticed that it was done, it was done by then.
fn tighten(effects: &mut [Effect]) {
    let seen: Vec<(PathBuf, usize)> = effects
        .iter()
        .filter_map(|effect| match &effect.act {
            Act::Seen(path) => Some((path.clone(), effect.end)),
            _ => None,
        })
        .collect();
    for effect in effects {
        let (Act::CreateFile(path) | Act::CreateDirectory(path) | Act::HardLink(_, path)) =
            &effect.act
        else {
            continue;
        };
        let before = |(there, line): &&(PathBuf, usize)| {
            there.starts_with(path) && *line > effect.begin && *line < effect.end
        };
        if let Some((_, line)) = seen.iter().filter(before).min_by_key(|(_, line)| *line) {
            effect.end = *line;
        }
    }
}

fn effect(line: &str, roots: &[PathBuf]) -> Option<Act> {
    let (name, rest) = line.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let arguments = split(arguments.trim_end().strip_suffix(')')?);
    let watched = |path: &PathBuf| roots.iter().any(|root| path.starts_with(root));
    if matches!(name, "statx" | "stat" | "newfstatat") {
        let path = arguments.iter().find(|part| part.starts_with('"'))?;
        let path = String::from_utf8(string(path)).ok()?;
        if let Some(mark) = path.strip_prefix(MARKS) {
            return Some(Act::Mark(mark.to_owned()));
        }
        let path = PathBuf::from(path);
        return (result.starts_with('0') && watched(&path)).then_some(Act::Seen(path));
    }
    if result.contains("EEXIST") {
        let seen = match name {
            "link" => plain(arguments[1]),
            "linkat" => at(arguments[2], arguments[3]),
            "mkdir" => plain(arguments[0]),
            "mkdirat" | "openat" => at(arguments[0], arguments[1]),
            _ => return None,
        };
        return watched(&seen).then_some(Act::Seen(seen));
    }
    if UNKNOWN.contains(&name) {
        let paths = arguments.iter().map(|argument| of_descriptor(argument));
        assert!(
            !paths.into_iter().any(|path| watched(&path)),
            "the model does not know `{line:.200}`"
        );
        return None;
    }
    let result = result.split(['<', ' ']).next()?;
    let result: i64 = result.parse().ok()?;
    let result = u64::try_from(result).ok()?;
    let act = act(name, &arguments, result)?;
    match &act {
        Act::CreateFile(path)
        | Act::OpenOrCreate(path)
        | Act::CreateDirectory(path)
        | Act::CreateLink(_, path)
        | Act::Write(path, ..)
        | Act::Truncate(path, _)
        | Act::Sync(path)
        | Act::Seen(path)
        | Act::Remove(path)
        | Act::RemoveDirectory(path) => watched(path).then_some(act),
        Act::HardLink(from, to) | Act::Rename(from, to) => {
            assert_eq!(watched(from), watched(to), "a name crosses the border: {act:?}");
            watched(to).then_some(act)
        }
        Act::SyncAll | Act::Sent(_) | Act::Mark(_) => Some(act),
    }
}

/// What a call that succeeded with `result` did.
fn act(name: &str, arguments: &[&str], result: u64) -> Option<Act> {
    let first = *arguments.first()?;
    Some(match name {
        "open" | "openat" | "creat" => {
            let (path, flags) = match name {
                "openat" => (at(first, arguments[1]), arguments[2]),
                _ => (plain(first), arguments.get(1).copied().unwrap_or("O_CREAT|O_TRUNC")),
            };
            assert!(!flags.contains("O_TMPFILE"), "a file without a name: {arguments:?}");
            match flags {
                flags if flags.contains("O_EXCL") || flags.contains("O_TRUNC") => {
                    Act::CreateFile(path)
                }
                flags if flags.contains("O_CREAT") => Act::OpenOrCreate(path),
                _ => Act::Seen(path),
            }
        }
        "write" | "pwrite64" => {
            let path = of_descriptor(first);
            let data = match string(arguments[1]) {
                bytes if bytes.len() as u64 >= result => {
                    Data::Bytes(bytes[..usize::try_from(result).unwrap()].to_vec())
                }
                _ => Data::Length(result),
            };
            if !path.is_absolute() {
                let Data::Bytes(bytes) = data else { return None };
                return Some(Act::Sent(bytes));
            }
            Act::Write(path, arguments.get(3).map(|at| at.parse().unwrap()), data)
        }
        "writev" | "sendmsg" | "sendto" => {
            let mut bytes: Vec<u8> = strings(arguments[1]);
            bytes.truncate(usize::try_from(result).unwrap());
            let path = of_descriptor(first);
            if path.is_absolute() && name == "writev" {
                return Some(Act::Write(path, None, Data::Bytes(bytes)));
            }
            Act::Sent(bytes)
        }
        "fsync" | "fdatasync" => Act::Sync(of_descriptor(first)),
        "sync" | "syncfs" => Act::SyncAll,
        "link" => Act::HardLink(plain(first), plain(arguments[1])),
        "linkat" => Act::HardLink(at(first, arguments[1]), at(arguments[2], arguments[3])),
        "rename" => Act::Rename(plain(first), plain(arguments[1])),
        "renameat" | "renameat2" => {
            Act::Rename(at(first, arguments[1]), at(arguments[2], arguments[3]))
        }
        "unlink" => Act::Remove(plain(first)),
        "unlinkat" if arguments[2].contains("AT_REMOVEDIR") => {
            Act::RemoveDirectory(at(first, arguments[1]))
        }
        "unlinkat" => Act::Remove(at(first, arguments[1])),
        "mkdir" => Act::CreateDirectory(plain(first)),
        "mkdirat" => Act::CreateDirectory(at(first, arguments[1])),
        "rmdir" => Act::RemoveDirectory(plain(first)),
        "symlink" => Act::CreateLink(plain(first), plain(arguments[1])),
        "symlinkat" => Act::CreateLink(plain(first), at(arguments[1], arguments[2])),
        "truncate" => Act::Truncate(plain(first), arguments[1].parse().unwrap()),
        "ftruncate" => Act::Truncate(of_descriptor(first), arguments[1].parse().unwrap()),
        // Makes nothing durable (sync_file_range(2): "this system call does not flush disk write caches").
        "sync_file_range" => return None,
        other => panic!("the model does not know `{other}`: {arguments:?}"),
    })
}

/// Splits arguments at commas that stand in no bracket; strings are hexadecimal and have none.
fn split(arguments: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_u32, 0);
    for (at, byte) in arguments.bytes().enumerate() {
        match byte {
            b'[' | b'{' | b'<' => depth += 1,
            b']' | b'}' | b'>' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(arguments[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(arguments[start..].trim());
    parts
}

/// Decodes `\x2f\x61` and leaves what is plain.
fn decode(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len() / 4), text.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        if *first == b'\\' && behind.first() == Some(&b'x') {
            let digit = |at: usize| char::from(behind[at]).to_digit(16).unwrap();
            bytes.push(u8::try_from(digit(1) * 16 + digit(2)).unwrap());
            rest = &behind[3..];
        } else {
            bytes.push(*first);
            rest = behind;
        }
    }
    bytes
}

/// The bytes of a quoted string, or nothing.
fn string(argument: &str) -> Vec<u8> {
    let Some(text) = argument.strip_prefix('"') else { return Vec::new() };
    decode(text.split('"').next().unwrap_or_default())
}

/// The bytes of all quoted strings in an argument, one after another: the parts of a vector.
fn strings(argument: &str) -> Vec<u8> {
    argument.split('"').skip(1).step_by(2).flat_map(decode).collect()
}

fn plain(argument: &str) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(&string(argument)).into_owned())
}

/// The path that strace shows for a descriptor; what a connection is called is no absolute path.
fn of_descriptor(argument: &str) -> PathBuf {
    let shown = argument.split_once('<').map_or("", |(_, path)| path);
    let path = decode(shown.strip_suffix('>').unwrap_or(shown));
    PathBuf::from(String::from_utf8_lossy(&path).into_owned())
}

fn at(directory: &str, path: &str) -> PathBuf {
    of_descriptor(directory).join(plain(path))
}

#[test]
fn lines_of_strace_are_read() {
    let hex = |text: &str| {
        let bytes: Vec<String> = text.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
        bytes.concat()
    };
    let (root, file, other) = (hex("/r"), hex("/r/a"), hex("/r/b"));
    let lines = format!(
        "7 openat(AT_FDCWD<{root}>, \"{file}\", O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC, 0640) = 3<{file}>\n\
         7 write(3<{file}>, \"\\x01\\x2c\\x22\", 3) = 3\n\
         7 fsync(3<{file}> <unfinished ...>\n\
         8 mkdir(\"{}\", 0750) = -1 EEXIST (File exists)\n\
         7 <... fsync resumed>)                 = 0\n\
         7 linkat(AT_FDCWD<{root}>, \"{file}\", 4<{root}>, \"\\x62\", 0) = 0\n\
         7 unlink(\"{other}\") = 0\n\
         7 sendto(9<{}>, \"\\x64\\x00\", 2, MSG_NOSIGNAL, NULL, 0) = 2\n\
         7 unlink(\"{}\") = 0\n\
         7 +++ exited with 0 +++\n",
        hex("/r/c"),
        hex("socket:[5]"),
        hex("/elsewhere/a"),
    );
    let trace = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(trace.path(), lines).unwrap();
    let effects = read(trace.path(), &[PathBuf::from("/r")]);
    let acts: Vec<Act> = effects.iter().map(|effect| effect.act.clone()).collect();
    let seen = Act::Seen(PathBuf::from("/r/c"));
    let (file, other) = (PathBuf::from("/r/a"), PathBuf::from("/r/b"));
    assert_eq!(
        acts,
        [
            Act::CreateFile(file.clone()),
            Act::Write(file.clone(), None, Data::Bytes(vec![1, 0x2c, 0x22])),
            seen,
            Act::Sync(file.clone()),
            Act::HardLink(file, other.clone()),
            Act::Remove(other),
            Act::Sent(vec![b'd', 0]),
        ]
    );
    assert_eq!((effects[3].begin, effects[3].end), (3, 5));
}
