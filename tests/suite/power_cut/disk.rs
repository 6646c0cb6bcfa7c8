//! What a disk may hold after the power went away: a model of what POSIX promises, and not more.
//!
//! Owns: from the effects of a trace, every state that the watched directories may be in. Never here: how a trace is
//! read, what an image must be good for.
//!
//! The rules, which are weaker than what ext4 and xfs do (their journals keep some order; here there is none), so that
//! what stands here stands there:
//!
//! * A name in a directory is what an fsync(2) of that directory found, or anything it was given after that. Each name
//!   is by itself: of two that were given one after the other, the second may be there and the first not. A rename is one step.
//! * A file's bytes are what an fsync of the file found. What was written after that may be there, or be missing, cut,
//!   or zeros.
//! * An fsync counts once it has returned, and covers what was done before it began.
//! * An fsync of a file makes none of its names durable, and one of a directory no bytes.

use super::trace::{Act, Data, Effect};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A file, directory or link, whatever it is called.
type NodeId = usize;

/// A name in a directory.
type Name = (NodeId, String);

/// Bytes and their digest.
#[derive(Debug)]
pub struct Blob {
    pub bytes: Vec<u8>,
    digest: blake3::Hash,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Rc<Self> {
        let digest = blake3::hash(&bytes);
        Rc::new(Self { bytes, digest })
    }
}

/// Which bytes: of a file, so many changes that are synced, so many that were begun, and what became of the rest.
type BlobKey = (NodeId, usize, usize, Unsynced);

/// The most images of one moment that differ in a single name.
const SINGLE_MAX: usize = 12;

#[derive(Debug, Clone)]
struct Span {
    begin: usize,
    end: usize,
}

#[derive(Debug)]
enum Node {
    Directory,
    Link(PathBuf),
    File { base: Rc<Blob>, changes: Vec<(Span, Change)> },
}

#[derive(Debug)]
enum Change {
    Write(u64, Data),
    Truncate(u64),
}

/// What is on the disk before the trace begins: all of it durable.
#[derive(Debug, Default)]
pub struct Disk {
    nodes: Vec<Node>,
    /// Where the watched directories hang.
    roots: BTreeMap<PathBuf, NodeId>,
    /// What each name stood for, one after the other.
    names: BTreeMap<Name, Vec<(Span, Option<NodeId>)>>,
    /// When which file or directory was synced.
    syncs: BTreeMap<NodeId, Vec<Span>>,
    syncs_of_all: Vec<Span>,
    /// Renames: the name that goes, the name that comes, and the place of each in its history.
    renames: Vec<(Name, usize, Name, usize)>,
    offsets: BTreeMap<PathBuf, u64>,
    /// Lines behind which a machine may stop.
    moments: BTreeSet<usize>,
    marks: Vec<(usize, String)>,
    sent: Vec<(usize, Vec<u8>)>,
    blobs: RefCell<HashMap<BlobKey, Rc<Blob>>>,
}

/// What a name may stand for.
#[derive(Debug, Clone)]
pub enum Entry {
    Directory,
    Link(PathBuf),
    File(Rc<Blob>),
}

/// What the watched directories may hold: by absolute path.
#[derive(Debug, Clone)]
pub struct Image {
    /// The last line of the trace before the power went away.
    pub moment: usize,
    pub entries: BTreeMap<PathBuf, Entry>,
    /// The digest of all entries.
    pub digest: blake3::Hash,
    /// How it was chosen, for messages.
    pub how: String,
}

/// What becomes of what was not synced.
#[derive(Debug, Clone)]
pub enum Choice {
    /// Every name is as new as it can be, and bytes that were not synced are so.
    Newest(Unsynced),
    /// Only what was synced.
    Oldest,
    /// One name is as new as it can be, the others as old.
    OnlyThis(Name),
    /// One name is as old as it can be, the others as new.
    AllButThis(Name),
    /// Each by chance.
    Random(u64),
}

/// Bytes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unsynced {
    Written,
    Missing,
    Half,
    Zeros,
}

impl Disk {
    /// Reads what the roots hold now.
    pub fn of(roots: &[PathBuf]) -> Self {
        let mut disk = Self::default();
        for root in roots {
            let id = disk.add(Node::Directory);
            disk.roots.insert(root.clone(), id);
            if root.exists() {
                disk.read_directory(root, id);
            }
        }
        disk
    }

    /// A directory that is there and holds nothing.
    pub fn empty(root: &Path) -> Self {
        let mut disk = Self::default();
        let id = disk.add(Node::Directory);
        disk.roots.insert(root.to_path_buf(), id);
        disk
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn read_directory(&mut self, path: &Path, id: NodeId) {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            self.read_entry(&path, id);
        }
    }

    fn read_entry(&mut self, path: &Path, parent: NodeId) {
        let kind = std::fs::symlink_metadata(path).unwrap().file_type();
        let node = if kind.is_dir() {
            Node::Directory
        } else if kind.is_symlink() {
            Node::Link(std::fs::read_link(path).unwrap())
        } else if kind.is_file() {
            Node::File { base: Blob::new(std::fs::read(path).unwrap()), changes: Vec::new() }
        } else {
            return;
        };
        let is_directory = matches!(node, Node::Directory);
        let id = self.add(node);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let first = Span { begin: 0, end: 0 };
        self.names.insert((parent, name), vec![(first, Some(id))]);
        if is_directory {
            self.read_directory(path, id);
        }
    }

    /// Takes in what others have put there meanwhile, which nobody watched: whatever stands now and is not known is
    /// durable from the beginning on.
    pub fn add_from_others(&mut self) {
        for (root, id) in self.roots.clone() {
            self.add_others_below(&root, id);
        }
    }

    fn add_others_below(&mut self, path: &Path, id: NodeId) {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            match self.names.get(&(id, name)).and_then(|history| history.last()?.1) {
                None => self.read_entry(&path, id),
                Some(known) if path.is_dir() => self.add_others_below(&path, known),
                Some(_) => {}
            }
        }
    }

    /// Takes in a trace, in the order in which things were done.
    pub fn apply(&mut self, effects: &[Effect]) {
        for effect in effects {
            let span = Span { begin: effect.begin, end: effect.end };
            match &effect.act {
                Act::Mark(mark) => self.marks.push((effect.end, mark.clone())),
                Act::Sent(bytes) => self.sent.push((effect.begin, bytes.clone())),
                Act::Seen(_) => {}
                act => {
                    self.moments.extend([effect.begin, effect.end]);
                    self.change(span, act);
                }
            }
        }
    }

    fn change(&mut self, span: Span, act: &Act) {
        match act {
            Act::CreateFile(path) => {
                self.offsets.insert(path.clone(), 0);
                let standing = self.find(path);
                match standing.map(|id| &mut self.nodes[id]) {
                    Some(Node::File { changes, .. }) => changes.push((span, Change::Truncate(0))),
                    Some(other) => panic!("{} is {other:?}", path.display()),
                    None => {
                        let node = Node::File { base: Blob::new(Vec::new()), changes: Vec::new() };
                        self.make(span, path, node);
                    }
                }
            }
            Act::OpenOrCreate(path) if self.find(path).is_some() => {}
            Act::OpenOrCreate(path) => {
                let node = Node::File { base: Blob::new(Vec::new()), changes: Vec::new() };
                self.make(span, path, node);
            }
            Act::CreateDirectory(path) if self.roots.contains_key(path) => {}
            Act::CreateDirectory(path) => self.make(span, path, Node::Directory),
            Act::CreateLink(target, path) => self.make(span, path, Node::Link(target.clone())),
            Act::Write(path, at, data) => {
                let offset = self.offsets.entry(path.clone()).or_default();
                let at = at.unwrap_or_else(|| {
                    *offset += data.len();
                    *offset - data.len()
                });
                self.file(path).push((span, Change::Write(at, data.clone())));
            }
            Act::Truncate(path, length) => self.file(path).push((span, Change::Truncate(*length))),
            Act::Sync(path) => {
                if let Some(id) = self.find(path) {
                    self.syncs.entry(id).or_default().push(span);
                }
            }
            Act::SyncAll => self.syncs_of_all.push(span),
            Act::HardLink(from, to) => {
                let id = self.known(from);
                let name = self.name_of(to);
                self.names.entry(name).or_default().push((span, Some(id)));
            }
            Act::Rename(from, to) => {
                let (from, to) = (self.name_of(from), self.name_of(to));
                let id = self.names[&from].last().and_then(|(_, id)| *id);
                let mut push = |name: &Name, id| {
                    let history = self.names.entry(name.clone()).or_default();
                    history.push((span.clone(), id));
                    history.len() - 1
                };
                let (gone, here) = (push(&from, None), push(&to, id));
                self.renames.push((from, gone, to, here));
            }
            Act::Remove(path) | Act::RemoveDirectory(path) => {
                let name = self.name_of(path);
                self.names.entry(name).or_default().push((span, None));
            }
            Act::Sent(_) | Act::Mark(_) | Act::Seen(_) => {}
        }
    }

    fn make(&mut self, span: Span, path: &Path, node: Node) {
        let id = self.add(node);
        let name = self.name_of(path);
        self.names.entry(name).or_default().push((span, Some(id)));
    }

    fn file(&mut self, path: &Path) -> &mut Vec<(Span, Change)> {
        let id = self.known(path);
        match &mut self.nodes[id] {
            Node::File { changes, .. } => changes,
            other => panic!("{} is {other:?}", path.display()),
        }
    }

    fn known(&self, path: &Path) -> NodeId {
        self.find(path).unwrap_or_else(|| panic!("nobody made {}", path.display()))
    }

    /// What a path stands for now.
    fn find(&self, path: &Path) -> Option<NodeId> {
        let (root, mut id) = self.roots.iter().find(|(root, _)| path.starts_with(root))?;
        for part in path.strip_prefix(root).unwrap() {
            let name = (*id, part.to_string_lossy().into_owned());
            id = self.names.get(&name)?.last()?.1.as_ref()?;
        }
        Some(*id)
    }

    fn name_of(&self, path: &Path) -> Name {
        let parent = self.known(path.parent().unwrap());
        (parent, path.file_name().unwrap().to_string_lossy().into_owned())
    }

    /// Marks that were left before this moment, in order.
    pub fn marks_until(&self, moment: usize) -> impl Iterator<Item = &str> {
        self.marks.iter().filter(move |(line, _)| *line <= moment).map(|(_, mark)| mark.as_str())
    }

    /// What had been sent, or was being sent, at this moment.
    pub fn sent_until(&self, moment: usize) -> impl Iterator<Item = &[u8]> {
        self.sent.iter().filter(move |(line, _)| *line <= moment).map(|(_, bytes)| bytes.as_slice())
    }

    /// The moments at which the power may go away, but for those at which nothing differs.
    pub fn moments(&self) -> Vec<usize> {
        let marks = self.marks.iter().map(|(line, _)| *line);
        let sent = self.sent.iter().map(|(line, _)| *line);
        let mut moments: BTreeSet<usize> =
            self.moments.iter().copied().chain(marks).chain(sent).collect();
        moments.insert(0);
        moments.into_iter().collect()
    }

    /// The moment after all: the command has ended, and somebody was told.
    pub fn end(&self) -> usize {
        self.moments().last().copied().unwrap_or(0)
    }

    fn names_in(
        &self,
        directory: NodeId,
    ) -> impl Iterator<Item = (&Name, &Vec<(Span, Option<NodeId>)>)> {
        self.names.range((directory, String::new())..(directory + 1, String::new()))
    }

    fn is_synced(&self, id: NodeId, change: &Span, moment: usize) -> bool {
        let covers = |sync: &Span| sync.begin >= change.end && sync.end <= moment;
        change.end == 0
            || self.syncs_of_all.iter().any(covers)
            || self.syncs.get(&id).is_some_and(|syncs| syncs.iter().any(covers))
    }

    /// The oldest and the newest place in its history in which a name may be found; 0 is before them all.
    fn range(&self, name: &Name, moment: usize) -> (usize, usize) {
        let history = &self.names[name];
        let newest = history.iter().filter(|(span, _)| span.begin <= moment).count();
        let synced = |(span, _): &(Span, _)| self.is_synced(name.0, span, moment);
        let oldest = history[..newest].iter().rposition(synced).map_or(0, |at| at + 1);
        (oldest, newest)
    }

    fn ranges(&self, moment: usize) -> BTreeMap<&Name, (usize, usize)> {
        self.names.keys().map(|name| (name, self.range(name, moment))).collect()
    }

    /// What may have become of a moment: the ends, each single name out of step, and `random` by chance.
    pub fn choices_at(&self, moment: usize, random: u64) -> Vec<Choice> {
        use Unsynced::{Half, Missing, Written, Zeros};
        let ranges = self.ranges(moment).into_iter();
        let loose = ranges.filter(|(_, (oldest, newest))| oldest != newest).map(|(name, _)| name);
        let loose: Vec<&Name> = loose.collect();
        let mut choices: Vec<Choice> = [Written, Missing, Half, Zeros].map(Choice::Newest).into();
        choices.push(Choice::Oldest);
        if loose.len() > 1 {
            for name in loose.iter().rev().take(SINGLE_MAX) {
                choices.push(Choice::OnlyThis((*name).clone()));
                choices.push(Choice::AllButThis((*name).clone()));
            }
            let seed = u64::try_from(moment).unwrap() << 16;
            choices.extend((0..random).map(|number| Choice::Random(seed + number)));
        }
        choices
    }

    /// Builds the images of a moment, each only once.
    pub fn images_at(&self, moment: usize, choices: &[Choice]) -> Vec<Image> {
        let ranges = self.ranges(moment);
        let mut images: Vec<Image> = Vec::new();
        for choice in choices {
            let image = self.image(moment, choice, &ranges);
            if !images.iter().any(|known| known.digest == image.digest) {
                images.push(image);
            }
        }
        images
    }

    fn image(
        &self,
        moment: usize,
        choice: &Choice,
        ranges: &BTreeMap<&Name, (usize, usize)>,
    ) -> Image {
        let mut chosen: BTreeMap<&Name, usize> = BTreeMap::new();
        for (name, (oldest, newest)) in ranges {
            let place = match choice {
                Choice::Newest(_) => *newest,
                Choice::Oldest => *oldest,
                Choice::OnlyThis(this) => *if this == *name { newest } else { oldest },
                Choice::AllButThis(this) => *if this == *name { oldest } else { newest },
                Choice::Random(_) if oldest == newest => *oldest,
                Choice::Random(seed) => {
                    let span = u64::try_from(newest - oldest + 1).unwrap();
                    oldest + usize::try_from(mixed(*seed, name.0, &name.1) % span).unwrap()
                }
            };
            chosen.insert(name, place);
        }
        // A file that lost its old name in a rename has its new one.
        for (from, gone, to, here) in &self.renames {
            if chosen[from] > *gone && chosen[to] <= *here {
                *chosen.get_mut(to).unwrap() = here + 1;
            }
        }
        let mut entries = BTreeMap::new();
        let view = View { disk: self, moment, choice, chosen };
        for (root, id) in &self.roots {
            view.collect(root, *id, &mut entries);
        }
        let digest = digest_of(&entries);
        Image { moment, entries, digest, how: format!("{choice:?} after line {moment}") }
    }

    /// Files below `root` that do not yet stand as they are written, at this moment, whatever was lost: by path.
    pub fn not_durable(&self, moment: usize) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for (root, id) in &self.roots {
            self.find_loose(root, *id, moment, &mut found);
        }
        found
    }

    fn find_loose(&self, path: &Path, directory: NodeId, moment: usize, found: &mut Vec<PathBuf>) {
        for (name, history) in self.names_in(directory) {
            let (oldest, newest) = self.range(name, moment);
            let path = path.join(&name.1);
            if oldest != newest {
                found.push(path.clone());
            }
            let Some(id) = newest.checked_sub(1).and_then(|at| history[at].1) else { continue };
            match &self.nodes[id] {
                Node::Directory => self.find_loose(&path, id, moment, found),
                Node::File { changes, .. } => {
                    let begun = changes.iter().filter(|(span, _)| span.begin <= moment);
                    if begun.into_iter().any(|(span, _)| !self.is_synced(id, span, moment)) {
                        found.push(path);
                    }
                }
                Node::Link(_) => {}
            }
        }
    }

    /// The places that one name of a path may have at this moment: whether it may be missing, and whether it may be there.
    pub fn may_exist(&self, path: &Path, moment: usize) -> bool {
        let Some(parent) = path.parent().and_then(|parent| self.find(parent)) else { return false };
        let name = (parent, path.file_name().unwrap().to_string_lossy().into_owned());
        let Some(history) = self.names.get(&name) else { return false };
        let (oldest, newest) = self.range(&name, moment);
        (oldest..=newest)
            .any(|place| place.checked_sub(1).is_some_and(|at| history[at].1.is_some()))
    }
}

/// A disk at a moment, with a place chosen for each name.
struct View<'a> {
    disk: &'a Disk,
    moment: usize,
    choice: &'a Choice,
    chosen: BTreeMap<&'a Name, usize>,
}

impl View<'_> {
    fn collect(&self, path: &Path, directory: NodeId, entries: &mut BTreeMap<PathBuf, Entry>) {
        for (name, history) in self.disk.names_in(directory) {
            let Some(place) = self.chosen[name].checked_sub(1) else { continue };
            let Some(id) = history[place].1 else { continue };
            let path = path.join(&name.1);
            match &self.disk.nodes[id] {
                Node::Directory => {
                    entries.insert(path.clone(), Entry::Directory);
                    self.collect(&path, id, entries);
                }
                Node::Link(target) => {
                    entries.insert(path, Entry::Link(target.clone()));
                }
                Node::File { base, changes } => {
                    entries.insert(path, Entry::File(self.content(id, base, changes)));
                }
            }
        }
    }

    fn content(&self, id: NodeId, base: &Rc<Blob>, changes: &[(Span, Change)]) -> Rc<Blob> {
        let begun = changes.partition_point(|(span, _)| span.begin <= self.moment);
        let synced = changes[..begun]
            .iter()
            .rposition(|(span, _)| self.disk.is_synced(id, span, self.moment));
        let synced = synced.map_or(0, |at| at + 1);
        if begun == 0 {
            return Rc::clone(base);
        }
        let fate = match self.choice {
            _ if synced == begun => Unsynced::Written,
            Choice::Newest(fate) => *fate,
            Choice::Oldest => Unsynced::Missing,
            Choice::OnlyThis(_) | Choice::AllButThis(_) => Unsynced::Half,
            Choice::Random(seed) => {
                use Unsynced::{Half, Missing, Written, Zeros};
                let all = [Written, Missing, Half, Zeros];
                all[usize::try_from(mixed(*seed, id, "") % 4).unwrap()]
            }
        };
        let key = (id, synced, begun, fate);
        if let Some(known) = self.disk.blobs.borrow().get(&key) {
            return Rc::clone(known);
        }
        let blob = Blob::new(built(&base.bytes, &changes[..begun], synced, fate));
        self.disk.blobs.borrow_mut().insert(key, Rc::clone(&blob));
        blob
    }
}

/// The bytes of a file of which the first `synced` changes are durable.
fn built(base: &[u8], changes: &[(Span, Change)], synced: usize, fate: Unsynced) -> Vec<u8> {
    let mut bytes = base.to_vec();
    changes[..synced].iter().for_each(|(_, change)| change.make(&mut bytes));
    let before = bytes.len();
    if fate != Unsynced::Missing {
        changes[synced..].iter().for_each(|(_, change)| change.make(&mut bytes));
    }
    match fate {
        Unsynced::Written | Unsynced::Missing => {}
        Unsynced::Half => {
            let length = before.min(bytes.len()) + bytes.len().saturating_sub(before) / 2;
            bytes.truncate(length);
        }
        Unsynced::Zeros => bytes.iter_mut().skip(before).for_each(|byte| *byte = 0),
    }
    bytes
}

fn digest_of(entries: &BTreeMap<PathBuf, Entry>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for (path, entry) in entries {
        hasher.update(path.as_os_str().as_encoded_bytes());
        match entry {
            Entry::Directory => hasher.update(b"/"),
            Entry::Link(target) => {
                hasher.update(b">").update(target.as_os_str().as_encoded_bytes())
            }
            Entry::File(blob) => hasher.update(b"=").update(blob.digest.as_bytes()),
        };
    }
    hasher.finalize()
}

impl Change {
    fn make(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, data) => {
                let start = usize::try_from(*at).unwrap();
                let end = start + usize::try_from(data.len()).unwrap();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                match data {
                    Data::Bytes(data) => bytes[start..end].copy_from_slice(data),
                    Data::Length(_) => panic!("the trace holds no content"),
                }
            }
            Self::Truncate(length) => bytes.resize(usize::try_from(*length).unwrap(), 0),
        }
    }
}

/// A number that depends on all of these and on nothing else.
fn mixed(seed: u64, id: NodeId, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&id.to_le_bytes()).update(name.as_bytes());
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().unwrap())
}

impl Image {
    /// Writes the image below `to` instead of `from`, for the owner of `to`'s parent.
    pub fn write(&self, from: &Path, to: &Path) {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let above = std::fs::metadata(to.parent().unwrap()).unwrap();
        let give = |path: &Path| {
            std::os::unix::fs::lchown(path, Some(above.uid()), Some(above.gid())).unwrap();
        };
        std::fs::create_dir(to).unwrap();
        give(to);
        for (path, entry) in &self.entries {
            let Ok(below) = path.strip_prefix(from) else { continue };
            let path = to.join(below);
            match entry {
                Entry::Directory => {
                    std::fs::create_dir(&path).unwrap();
                    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o750)).unwrap();
                }
                Entry::Link(target) => std::os::unix::fs::symlink(target, &path).unwrap(),
                Entry::File(blob) => {
                    std::fs::write(&path, &blob.bytes).unwrap();
                    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
                }
            }
            give(&path);
        }
    }
}
