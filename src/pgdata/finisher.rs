//! Finishing the files of a [`NewTree`](super::NewTree) side by side.
//!
//! Owns: threads that wait for fsync, so that whoever fetches and writes does not. The
//! more files are fsynced at once, the more of them share one commit of the file
//! system's journal. Never here: what is written.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::tree::NewFile;
use super::tree_plan::TreeError;

/// The threads only wait for the kernel.
const STACK_BYTES: usize = 128 << 10;

/// Finishes files, each together with a `T` that is dropped once its file is done.
///
/// The queue has no bound of its own: whoever fills it must bound the files that
/// are open, for instance by a permit as `T`.
#[derive(Debug)]
pub struct Finisher<T> {
    queue: Option<Sender<(NewFile, T)>>,
    threads: Vec<JoinHandle<()>>,
    failure: Arc<Mutex<Option<TreeError>>>,
}

impl<T: Send + 'static> Finisher<T> {
    /// Starts so many threads, or fewer where the system gives no more; without any, files are
    /// finished by whoever sends them. The threads end when the finisher is dropped and the queue is done.
    pub fn start(threads: usize) -> Self {
        let (queue, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let failure = Arc::new(Mutex::new(None));
        let mut started = Vec::new();
        for _ in 0..threads {
            let (receiver, failure) = (Arc::clone(&receiver), Arc::clone(&failure));
            let builder = Builder::new().name("fsync".to_owned()).stack_size(STACK_BYTES);
            let Ok(thread) = builder.spawn(move || finish_all(&receiver, &failure)) else { break };
            started.push(thread);
        }
        let queue = (!started.is_empty()).then_some(queue);
        Self { queue, threads: started, failure }
    }

    /// Queues a file whose every byte is written.
    ///
    /// # Errors
    /// The failure of this file or one before it: the tree cannot become whole any more.
    pub fn finish(&self, file: NewFile, until_done: T) -> Result<(), TreeError> {
        self.failed()?;
        match &self.queue {
            // A file that no thread receives any more stays unfinished, which `sync_all` refuses.
            Some(queue) => drop(queue.send((file, until_done))),
            None => file.finish()?,
        }
        Ok(())
    }

    /// Waits until every file is done.
    ///
    /// # Errors
    /// The first failure of any file; a second call does not repeat it.
    pub fn join(&mut self) -> Result<(), TreeError> {
        self.queue = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked left its file unfinished, which `sync_all` refuses.
            let _ = thread.join();
        }
        self.failed()
    }

    fn failed(&self) -> Result<(), TreeError> {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.take().map_or(Ok(()), Err)
    }
}

fn finish_all<T>(queue: &Mutex<Receiver<(NewFile, T)>>, failure: &Mutex<Option<TreeError>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((file, until_done)) = next else { return };
        if let Err(error) = file.finish() {
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        drop(until_done);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::*;
    use crate::pgdata::DiskError;
    use crate::pgdata::{
        Access, FileAttributes, NewTree, Owner, RestoreMarker, TablespaceTarget, TreePlan,
    };

    fn tree(directory: &Path) -> NewTree {
        let root = rustix::process::geteuid().is_root();
        let plan = TreePlan {
            pgdata: directory.join("data"),
            tablespaces: Vec::<TablespaceTarget>::new(),
            access: Access::Owner,
            owner: root.then_some(Owner { uid: 65534, gid: 65533 }),
            take_over: None,
        };
        NewTree::open(&plan, &RestoreMarker::default()).unwrap()
    }

    fn file(tree: &NewTree, name: &str) -> NewFile {
        let attributes = FileAttributes { size_bytes: 1, mode: 0o640, mtime_unix: 1_000_000_000 };
        let file = tree.create_file(Path::new(name), attributes).unwrap();
        file.write_at(b"x", 0).unwrap();
        file
    }

    #[test]
    fn every_file_is_finished_before_join_returns_and_lets_go_of_its_permit() {
        for threads in [0, 1, 3] {
            let dir = tempfile::tempdir().unwrap();
            let tree = tree(dir.path());
            let mut finisher = Finisher::start(threads);
            let permit = Arc::new(());
            for n in 0..50 {
                finisher.finish(file(&tree, &format!("base/{n}")), Arc::clone(&permit)).unwrap();
            }
            finisher.join().unwrap();
            assert_eq!(Arc::strong_count(&permit), 1);
            tree.sync_all().unwrap();
            let facts = std::fs::metadata(dir.path().join("data/base/49")).unwrap();
            assert_eq!(facts.mtime(), 1_000_000_000);
        }
    }

    #[test]
    fn a_file_that_could_not_be_finished_is_told_and_keeps_the_tree_from_becoming_a_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let mut finisher = Finisher::start(2);
        // No file at hand fails at fsync, so the failure is put where a thread would put it.
        let lost = DiskError::new("fsync", Path::new("base/1"), std::io::Error::other("EIO"));
        *finisher.failure.lock().unwrap() = Some(lost.into());
        let error = finisher.finish(file(&tree, "base/1"), ()).unwrap_err();
        assert!(error.to_string().contains("base/1"), "{error}");
        finisher.join().unwrap();
        assert!(matches!(tree.sync_all(), Err(TreeError::Unfinished { count: 1 })));
    }
}
