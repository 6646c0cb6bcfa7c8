//! Files of more than one map: recorded, referenced by a later backup, restored.
//! Contents are made from seeds, so that a gigabyte costs neither memory nor time.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::Path;

mod delta;

use super::*;
use crate::format::{
    BackupId, Begun, Codec, FORMAT_VERSION, FileContent, INLINE_CHUNKS_MAX, MAP_CHUNKS_MAX,
};
use crate::ops::Silent;
use crate::pg::{PgTimestamp, SystemId};
use crate::pgdata::{Access, Owner};
use crate::plan::backup::{ChunkFate, chunk_fate};
use crate::repo::{BackupWriter, FileMeta, FileRecorder, ParentFiles};
use crate::store::memory::MemoryStore;

const SYSTEM_ID: SystemId = SystemId(7);
const CHUNK: u64 = CHUNK_BYTES as u64;
const MAP: u64 = MAP_CHUNKS_MAX as u64;

/// A file: its size, and the seeds of the chunks that are not zeros.
#[derive(Clone)]
struct Content {
    size: u64,
    seeds: BTreeMap<u64, u64>,
}

impl Content {
    fn new(size: u64, seeds: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self { size, seeds: seeds.into_iter().collect() }
    }

    /// The bytes of a chunk; `None` for zeros.
    fn chunk(&self, number: u64) -> Option<Vec<u8>> {
        let seed = self.seeds.get(&number)?;
        let mut bytes = vec![0; chunk_len(self.size, number) as usize];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        Some(bytes)
    }
}

type Files = BTreeMap<&'static str, Content>;

fn repository() -> Repository {
    Repository::new(Arc::new(MemoryStore::new()), "main".parse().unwrap())
}

/// Records a backup chunk by chunk, as they come from a server.
async fn back_up(
    repository: &Repository,
    attempt: u32,
    files: &Files,
    parent: Option<&BackupId>,
) -> Committed {
    let id = BackupId::at(jiff::Timestamp::UNIX_EPOCH, attempt);
    let at = PgTimestamp::from_unix_seconds(0);
    let begun = Begun {
        format: FORMAT_VERSION,
        id: id.clone(),
        begun_at: at,
        host: "here".to_owned(),
        pid: 1,
        parent: parent.cloned(),
        leans_on: Vec::new(),
        tool: "test".to_owned(),
    };
    let writer = BackupWriter::begin(repository, &begun, SYSTEM_ID, Codec::DEFAULT, 2).await;
    let mut recorder = FileRecorder::new(writer.unwrap());
    let mut parents = match parent {
        Some(parent) => {
            Some(ParentFiles::load(repository, parent, 1 << 20, |_| false).await.unwrap())
        }
        None => None,
    };
    for (path, content) in files {
        record(&mut recorder, path, content, &mut parents).await;
    }
    let (writer, recorded) = recorder.finish().await.unwrap();
    let index = FileIndex::new(id.clone(), recorded.entries, recorded.list_frames);
    let committed = Committed {
        cluster: repository.cluster().clone(),
        system_identifier: SYSTEM_ID,
        files: recorded.files,
        size_bytes: recorded.size_bytes,
        stored_bytes: writer.stored_bytes(),
        packs: writer.packs(),
        references: recorded.references,
        parent: parent.cloned(),
        ..Committed::example(id)
    };
    writer.commit(&index, &committed).await.unwrap();
    committed
}

async fn record(
    recorder: &mut FileRecorder,
    path: &str,
    content: &Content,
    parents: &mut Option<ParentFiles>,
) {
    let zeros = digest_chunk(&vec![0; CHUNK_BYTES as usize]);
    let size = content.size;
    let (path, kind) = (path.as_bytes().to_vec(), EntryKind::File);
    let parent = match parents {
        Some(parents) => parents.entry(&path).await.unwrap(),
        None => None,
    };
    recorder.begin(FileMeta { path, kind, mode: 0o600, mtime: 0, size });
    let mut unchanged = parent.as_ref().is_some_and(|parent| parent.size == size);
    let mut known = Vec::new();
    for number in 0..chunks_of(size) {
        let in_map = usize::try_from(number % MAP).unwrap();
        if let (0, Some(parents), Some(parent)) = (in_map, &parents, &parent) {
            let map = usize::try_from(number / MAP).unwrap();
            known = parents.chunks(parent, map).await.unwrap();
        }
        let len = chunk_len(size, number);
        let bytes = content.chunk(number);
        let digest = match &bytes {
            Some(bytes) => digest_chunk(bytes),
            None if len == CHUNK_BYTES => zeros,
            None => digest_chunk(&vec![0; len as usize]),
        };
        let parents_chunk = known.get(in_map);
        unchanged &= parents_chunk.is_some_and(|chunk| chunk.digest == digest);
        match chunk_fate(digest, bytes.is_none(), len, parents_chunk) {
            ChunkFate::Zeros => {
                recorder.reference(ChunkEntry { digest, runs: Vec::new() }, 0).await.unwrap();
            }
            ChunkFate::Referenced(entry) => recorder.reference(entry, len.into()).await.unwrap(),
            ChunkFate::Stored => recorder.store(digest, &bytes.unwrap()).await.unwrap(),
        }
    }
    let maps = match parent.map(|parent| parent.content) {
        Some(FileContent::Maps(maps)) if unchanged => Some(maps),
        _ => None,
    };
    recorder.end(Some("crc32c:00000000".to_owned()), maps).await.unwrap();
}

/// Restores a backup and compares every byte.
async fn assert_restores(repository: &Repository, backup: &Committed, files: &Files) {
    let directory = tempfile::tempdir().unwrap();
    let pgdata = directory.path().join("data");
    let tree_plan = TreePlan {
        pgdata: pgdata.clone(),
        tablespaces: Vec::new(),
        access: Access::Owner,
        // PostgreSQL's server refuses to run as root, so restore gives the files away.
        owner: rustix::process::geteuid().is_root().then_some(Owner { uid: 65534, gid: 65534 }),
        take_over: None,
    };
    let restoring = Restoring {
        repository,
        backup,
        tree_plan: &tree_plan,
        jobs: 2,
        range_bytes_max: 1 << 20,
        progress: Arc::new(Silent),
    };
    let index = repository.file_index(&backup.id).await.unwrap();
    let restored = restoring.run(&index).await.unwrap();
    let control = &files["global/pg_control"];
    assert_eq!(restored.control, control.chunk(0).unwrap());
    for (path, content) in files.iter().filter(|(path, _)| **path != "global/pg_control") {
        assert_holds(&pgdata.join(path), content);
    }
}

fn assert_holds(path: &Path, content: &Content) {
    let file = std::fs::File::open(path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), content.size, "{}", path.display());
    let zeros = vec![0; CHUNK_BYTES as usize];
    let mut found = vec![0; CHUNK_BYTES as usize];
    for number in 0..chunks_of(content.size) {
        let len = chunk_len(content.size, number) as usize;
        file.read_exact_at(&mut found[..len], number * CHUNK).unwrap();
        let wanted = content.chunk(number);
        let same = found[..len] == wanted.as_ref().unwrap_or(&zeros)[..len];
        assert!(same, "chunk {number} of {}", path.display());
    }
}

/// Every pack that a restore reads, found by reading the list and all maps.
async fn packs_read(repository: &Repository, backup: &Committed) -> BTreeSet<(BackupId, u32)> {
    let fetcher = FrameFetcher::new(repository.clone());
    let mut packs = BTreeSet::new();
    let mut note = |frame: &FrameRef| packs.insert((frame.backup.clone(), frame.pack));
    for frame in repository.file_index(&backup.id).await.unwrap().frames {
        note(&frame);
        for entry in repository.file_entries(&frame).await.unwrap() {
            let mut chunks = Vec::new();
            match entry.content {
                FileContent::Inline(inline) => chunks = inline,
                FileContent::Maps(maps) => {
                    for map in &maps {
                        note(map);
                        chunks.extend(fetcher.map(map).await.unwrap().chunks);
                    }
                }
            }
            chunks.iter().flat_map(|chunk| &chunk.runs).for_each(|run| {
                note(&run.frame);
            });
        }
    }
    packs
}

async fn assert_names_every_pack(repository: &Repository, backup: &Committed) {
    let named = backup.references.iter().flat_map(|reference| {
        reference.packs.iter().map(|pack| (reference.backup.clone(), pack.pack))
    });
    assert_eq!(named.collect::<BTreeSet<_>>(), packs_read(repository, backup).await);
}

/// Small files of every kind, and one that goes 3 chunks and 5 bytes into its second map.
fn first_files() -> Files {
    let inline = INLINE_CHUNKS_MAX as u64;
    let around_the_border = [0, 1, 9, MAP - 2, MAP - 1, MAP, MAP + 1, MAP + 3];
    BTreeMap::from([
        ("base/1/1", Content::new(inline * CHUNK, (0..inline).map(|n| (n, n + 100)))),
        ("base/1/2", Content::new((inline + 1) * CHUNK, (0..=inline).map(|n| (n, n + 200)))),
        ("base/1/3", Content::new(5, [(0, 300)])),
        ("base/1/4", Content::new(0, [])),
        ("base/1/5", Content::new(3 * CHUNK, [])),
        ("base/2/big", Content::new((MAP + 3) * CHUNK + 5, around_the_border.map(|n| (n, n)))),
        ("base/2/exactly", Content::new(MAP * CHUNK, [(MAP - 1, 400)])),
        ("base/2/small", Content::new(CHUNK + 1, [(0, 500), (1, 501)])),
        ("global/pg_control", Content::new(8192, [(0, 600)])),
    ])
}

#[tokio::test]
async fn files_of_more_than_one_map_come_back_and_are_named_by_the_next_backup() {
    let repository = repository();
    let files = first_files();
    let first = back_up(&repository, 1, &files, None).await;
    assert_names_every_pack(&repository, &first).await;
    assert_restores(&repository, &first, &files).await;

    // Nothing changed: the maps are named, and next to nothing is stored.
    let second = back_up(&repository, 2, &files, Some(&first.id)).await;
    assert!(second.stored_bytes * 10 < first.stored_bytes, "{}", second.stored_bytes);
    assert_names_every_pack(&repository, &second).await;
    let big = entry_of(&repository, &second, "base/2/big").await;
    let FileContent::Maps(maps) = big.content else { panic!("a large file has maps") };
    assert_eq!(maps.len(), 2);
    assert!(maps.iter().all(|map| map.backup == first.id), "{maps:?}");

    // Known, new and zeros on both sides of the border; the file grows, another shrinks.
    let mut changed = files.clone();
    let big = changed.get_mut("base/2/big").unwrap();
    big.size = (MAP + 7) * CHUNK;
    big.seeds.extend([(2, 1000), (MAP - 1, 1001), (MAP + 2, 1002), (MAP + 6, 1003)]);
    big.seeds.remove(&MAP);
    changed.get_mut("base/2/exactly").unwrap().size = (MAP - 1) * CHUNK;
    changed.get_mut("base/2/exactly").unwrap().seeds = BTreeMap::from([(0, 400)]);
    changed.remove("base/2/small");
    let third = back_up(&repository, 3, &changed, Some(&second.id)).await;
    assert_names_every_pack(&repository, &third).await;
    assert_restores(&repository, &third, &changed).await;
    assert!(third.references.iter().any(|reference| reference.backup == first.id));
}

async fn entry_of(repository: &Repository, backup: &Committed, path: &str) -> FileEntry {
    let mut files = ParentFiles::load(repository, &backup.id, 1 << 20, |_| false).await.unwrap();
    files.entry(path.as_bytes()).await.unwrap().unwrap()
}
