//! Walking the directories of a local repository, in bounded memory.
//!
//! Owns: which directory entries are objects, and the order of the walk. Never
//! here: whether the repository is there at all (`file` looks first).
//!
//! Names that no key can have (`.staging`, `lost+found`, `.nfs…`) are passed
//! over, so a repository may be the root of a file system.

use std::fs::{self, DirEntry, ReadDir};
use std::io;
use std::path::Path;

use super::contract::is_key_part;
use super::file_errors::is_no_such_file;
use super::{Key, Level, Listed};

/// A deeper tree than this is not one that we wrote.
const DEPTH_MAX: usize = 64;

/// A walk through all objects below a directory. Holds one open directory per
/// level, never a list of files.
#[derive(Debug)]
pub(super) struct Walk {
    /// The open directories from the top down, each with the prefix of its keys.
    open: Vec<(ReadDir, String)>,
}

impl Walk {
    /// Begins a walk. A directory that does not exist is empty.
    pub(super) fn new(directory: &Path, prefix: &Key) -> io::Result<Self> {
        let mut walk = Self { open: Vec::new() };
        walk.enter(directory, prefix.as_str().to_owned())?;
        Ok(walk)
    }

    /// Returns up to `count` further objects; none means that the walk is over.
    pub(super) fn page(&mut self, count: usize) -> io::Result<Vec<Listed>> {
        let mut page = Vec::new();
        while page.len() < count {
            let Some((entries, prefix)) = self.open.last_mut() else { break };
            let Some(entry) = entries.next() else {
                self.open.pop();
                continue;
            };
            let entry = entry?;
            let prefix = prefix.clone();
            match look_at(&entry, &prefix)? {
                Entry::Object(listed) => page.push(listed),
                Entry::Directory(name) => self.enter(&entry.path(), join(&prefix, &name))?,
                Entry::Other => {}
            }
        }
        Ok(page)
    }

    fn enter(&mut self, directory: &Path, prefix: String) -> io::Result<()> {
        if self.open.len() >= DEPTH_MAX {
            return Err(io::Error::other(format!(
                "`{}` lies more than {DEPTH_MAX} directories deep",
                directory.display()
            )));
        }
        match fs::read_dir(directory) {
            Ok(entries) => self.open.push((entries, prefix)),
            // Removed since its parent was read, or never there.
            Err(error) if is_no_such_file(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Adds one level below `directory` to `level`, unsorted. Directories without
/// any object below them, as deletes leave them, are passed over.
pub(super) fn read_level(directory: &Path, prefix: &Key, level: &mut Level) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_no_such_file(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        match look_at(&entry, prefix.as_str())? {
            Entry::Object(listed) => level.objects.push(listed),
            Entry::Directory(name) => {
                let below = Key::new(join(prefix.as_str(), &name));
                if !Walk::new(&entry.path(), &below)?.page(1)?.is_empty() {
                    level.directories.push(name);
                }
            }
            Entry::Other => {}
        }
    }
    Ok(())
}

enum Entry {
    Object(Listed),
    Directory(String),
    Other,
}

fn look_at(entry: &DirEntry, prefix: &str) -> io::Result<Entry> {
    let name = entry.file_name();
    let Some(name) = name.to_str().filter(|name| is_key_part(name)) else {
        return Ok(Entry::Other);
    };
    // Follows symbolic links, as opening the object would.
    let metadata = match fs::metadata(entry.path()) {
        Ok(metadata) => metadata,
        Err(error) if is_no_such_file(&error) => return Ok(Entry::Other),
        Err(error) => return Err(error),
    };
    if metadata.is_dir() {
        return Ok(Entry::Directory(name.to_owned()));
    }
    if !metadata.is_file() {
        return Ok(Entry::Other);
    }
    Ok(Entry::Object(Listed {
        key: Key::new(join(prefix, name)),
        size_bytes: metadata.len(),
        modified: metadata.modified()?,
    }))
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") }
}
