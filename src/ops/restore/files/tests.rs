//! Files of more than one map: recorded, referenced by a later backup, restored.
//! Contents are made from seeds, so that a gigabyte costs neither memory nor time.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::Path;

mod delta;

use super::*;
use crate::format::{
    BackupId, Begun, Codec, FORMAT_VERSION, FileContent, FileIndex, FrameRef, INLINE_CHUNKS_MAX,
    MAP_CHUNKS_MAX, PAGE_BYTES, PAGES, PageMap, Run, digest_pages,
};
use crate::ops::Silent;
use crate::pg::{PgTimestamp, SystemId};
use crate::pgdata::{Access, Owner};
use crate::plan::backup::{ChunkFate, changed_parts, chunk_fate};
use crate::repo::{BackupWriter, FileMeta, FileRecorder, FrameFetcher, KnownMaps, ParentFiles};
use crate::store::memory::MemoryStore;

const SYSTEM_ID: SystemId = SystemId(7);
const CHUNK: u64 = CHUNK_BYTES as u64;
const MAP: u64 = MAP_CHUNKS_MAX as u64;

/// A file: its size, the seeds of the chunks that are not zeros, and those of pages that have changed in them.
#[derive(Clone)]
struct Content {
    size: u64,
    seeds: BTreeMap<u64, u64>,
    /// By chunk and page.
    pages: BTreeMap<(u64, usize), u64>,
}

impl Content {
    fn new(size: u64, seeds: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self { size, seeds: seeds.into_iter().collect(), pages: BTreeMap::new() }
    }

    /// The bytes of a chunk; `None` for zeros.
    fn chunk(&self, number: u64) -> Option<Vec<u8>> {
        let seed = self.seeds.get(&number)?;
        let mut bytes = vec![0; chunk_len(self.size, number) as usize];
        let noise = |seed: u64, out: &mut [u8]| {
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(out);
        };
        noise(*seed, &mut bytes);
        for ((_, page), seed) in self.pages.range((number, 0)..(number + 1, 0)) {
            noise(*seed, &mut bytes.chunks_mut(PAGE_BYTES as usize).nth(*page).unwrap()[..]);
        }
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
    let mut known_pages = PageMap::default();
    for number in 0..chunks_of(size) {
        let in_map = usize::try_from(number % MAP).unwrap();
        if let (0, Some(parents), Some(parent)) = (in_map, &parents, &parent) {
            let map = usize::try_from(number / MAP).unwrap();
            known = parents.chunks(parent, map).await.unwrap();
            known_pages = parents.pages(parent, map).await.unwrap();
            let page_maps = parent.page_maps.get(map).map(Vec::as_slice).unwrap_or_default();
            recorder.begin_map(page_maps).await.unwrap();
        }
        let len = chunk_len(size, number);
        let bytes = content.chunk(number);
        let (digest, pages) = match &bytes {
            Some(bytes) => digest_pages(bytes),
            None if len == CHUNK_BYTES => (zeros, None),
            None => (digest_chunk(&vec![0; len as usize]), None),
        };
        let parents_chunk = known.get(in_map);
        unchanged &= parents_chunk.is_some_and(|chunk| chunk.digest == digest);
        match chunk_fate(digest, bytes.is_none(), len, parents_chunk) {
            ChunkFate::Zeros => {
                recorder.reference(ChunkEntry { digest, runs: Vec::new() }, 0).await.unwrap();
            }
            ChunkFate::Referenced(entry) => recorder.reference(entry, len.into()).await.unwrap(),
            ChunkFate::Stored => {
                let old = parents_chunk.and_then(|chunk| known_pages.chunks.get(&chunk.digest));
                let parts = parents_chunk.zip(old).zip(pages);
                let parts = parts.and_then(|((chunk, old), new)| changed_parts(chunk, old, &new));
                match parts {
                    Some(parts) => {
                        recorder.store_parts(digest, &bytes.unwrap(), parts).await.unwrap();
                    }
                    None => recorder.store(digest, &bytes.unwrap()).await.unwrap(),
                }
                if let Some(pages) = pages {
                    recorder.set_pages(digest, pages);
                }
            }
        }
    }
    let maps = parent.filter(|_| unchanged).and_then(|parent| KnownMaps::of(&parent));
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
    let list = FileList::open(repository, &backup.id).await.unwrap();
    let restored = restoring.run(list).await.unwrap();
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
    let list = FileList::open(repository, &backup.id).await.unwrap();
    for frame in list.frames() {
        note(frame);
        for entry in fetcher.entries(frame).await.unwrap() {
            entry.page_maps.iter().flatten().for_each(|frame| {
                note(frame);
            });
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

/// Ten backups, each of a file of which some pages have changed: all of them restore, each stores about what
/// has changed, and each names every pack that it needs.
#[tokio::test]
async fn changed_pages_are_stored_alone_and_joined_again_whatever_lies_between() {
    let repository = repository();
    let chunks = 300;
    let mut files = Files::from([
        ("base/1/1", Content::new(chunks * CHUNK + 9000, (0..=chunks).map(|n| (n, n + 10)))),
        ("global/pg_control", Content::new(8192, [(0, 600)])),
    ]);
    let first = back_up(&repository, 1, &files, None).await;
    let mut backups = vec![(first.clone(), files.clone())];
    let (mut parent, mut runs) = (first.clone(), BTreeSet::new());
    for attempt in 2..12 {
        let table = files.get_mut("base/1/1").unwrap();
        let mut changed = 0;
        for number in (u64::from(attempt) % 7..=chunks).step_by(7) {
            // One page in the first of them, four in the last, now and then neighbours.
            for n in 0..=number * 4 / (chunks + 1) {
                let page = usize::try_from(number + n * u64::from(attempt)).unwrap() % PAGES;
                if number < chunks
                    && table
                        .pages
                        .insert(
                            (number, page),
                            (number * 8 + page as u64) * 1000 + u64::from(attempt),
                        )
                        .is_none_or(|old| old % 1000 != u64::from(attempt))
                {
                    changed += 1;
                }
            }
        }
        let next = back_up(&repository, attempt, &files, Some(&parent.id)).await;
        let pages = changed * u64::from(PAGE_BYTES);
        // Noise does not compress; a chunk that is joined from too many frames is stored whole.
        assert!(
            next.stored_bytes > pages && next.stored_bytes < 2 * pages + 200_000,
            "{attempt}: {} of {pages}",
            next.stored_bytes
        );
        assert_names_every_pack(&repository, &next).await;
        runs.extend(runs_of(&repository, &next, "base/1/1").await);
        backups.push((next.clone(), files.clone()));
        parent = next;
    }
    assert!(
        runs.contains(&1) && runs.contains(&3) && runs.iter().any(|runs| *runs > 5),
        "{runs:?}"
    );
    for (backup, files) in backups {
        assert_restores(&repository, &backup, &files).await;
    }
}

/// The numbers of runs that chunks of a file have.
async fn runs_of(repository: &Repository, backup: &Committed, path: &str) -> BTreeSet<usize> {
    let mut files = ParentFiles::load(repository, &backup.id, 1 << 20, |_| false).await.unwrap();
    let entry = files.entry(path.as_bytes()).await.unwrap().unwrap();
    let chunks = files.chunks(&entry, 0).await.unwrap();
    chunks.iter().map(|chunk| chunk.runs.len()).collect()
}

/// A frame of changed pages that says something else is noticed, although no digest covers it alone.
#[tokio::test]
async fn a_joined_chunk_that_is_not_what_it_was_ends_the_restore_and_names_its_packs() {
    let repository = repository();
    let mut files = Files::from([
        ("base/1/1", Content::new(9 * CHUNK, (0..9).map(|n| (n, n + 10)))),
        ("global/pg_control", Content::new(8192, [(0, 600)])),
    ]);
    let first = back_up(&repository, 1, &files, None).await;
    files.get_mut("base/1/1").unwrap().pages.insert((3, 2), 5);
    let parent = |digest| ChunkEntry { digest, runs: Vec::new() };
    let mut known = ParentFiles::load(&repository, &first.id, 1 << 20, |_| false).await.unwrap();
    let entry = known.entry(b"base/1/1").await.unwrap().unwrap();
    let mut chunks = known.chunks(&entry, 0).await.unwrap();
    // The digest of the chunk with the changed page, and the runs of the one without.
    let changed = files["base/1/1"].chunk(3).unwrap();
    let whole = chunks[3].runs[0].clone();
    let half = u32::try_from(CHUNK / 2).unwrap();
    let two = [0, half].map(|at| Run {
        in_frame: whole.in_frame + at,
        in_chunk: at,
        bytes: half,
        ..whole.clone()
    });
    chunks[3] = ChunkEntry { runs: two.to_vec(), ..parent(digest_chunk(&changed)) };
    let restored = restore_chunks(&repository, &chunks).await;
    let error = restored.unwrap_err().to_string();
    assert!(error.contains("/pack/00000000") && error.contains("joined"), "{error}");
    chunks[3].digest = digest_chunk(
        &Files::from([("x", Content::new(9 * CHUNK, [(3, 13)]))])["x"].chunk(3).unwrap(),
    );
    restore_chunks(&repository, &chunks).await.unwrap();
}

/// Brings these chunks, as those of one file, by way of a window.
async fn restore_chunks(repository: &Repository, chunks: &[ChunkEntry]) -> Result<(), FillError> {
    let directory = tempfile::tempdir().unwrap();
    let pgdata = directory.path().join("data");
    let plan = delta::plan(&pgdata, None);
    let marker =
        RestoreMarker { backup: "x".to_owned(), started: "now".to_owned(), took_over: None };
    let tree = NewTree::open(&plan, &marker).unwrap();
    let size = chunks.len() as u64 * CHUNK;
    let attributes = FileAttributes { size_bytes: size, mode: 0o600, mtime_unix: 0 };
    let new = tree.create_file(Path::new("base/1/1"), attributes).unwrap();
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    let finisher = Arc::new(Mutex::new(Finisher::start(1)));
    let file = Arc::new(OpenFile::new(new, permit, size, finisher));
    let fetcher = FrameFetcher::new(repository.clone());
    let mut window = Window::new(fetcher, Arc::new(Silent), 2, 1 << 20);
    for (number, chunk) in (0..).zip(chunks) {
        window.want(&file, number * CHUNK, CHUNK_BYTES, chunk.clone()).await?;
    }
    window.finish().await
}
