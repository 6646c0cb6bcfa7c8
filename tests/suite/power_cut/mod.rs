//! Power that goes away at any moment: every state that the disk may be in afterwards is made, and must be good.
//!
//! A command runs under strace; [`disk`] builds from what it asked of the system all that its directories may hold after a
//! power cut at any of its steps; each of these images is then used as the directory it stands for. What was confirmed
//! before must be there, what was not is whole or absent, and the same command again must succeed.

mod disk;
mod operations;
mod store;
mod trace;

use disk::{Disk, Image};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::harness::{Random, rounds};

/// A command that was watched.
struct Recording {
    roots: Vec<PathBuf>,
    disk: Disk,
}

impl Recording {
    /// Remembers what the directories hold before a command changes them.
    fn begin(roots: &[PathBuf]) -> Self {
        Self { roots: roots.to_vec(), disk: Disk::of(roots) }
    }

    /// Takes in what the command did.
    fn finish(mut self, trace: &Path) -> Self {
        self.disk.apply(&trace::read(trace, &self.roots));
        self
    }

    /// Every image of every moment, and of each all its moments.
    fn all_images(&self, random: u64) -> Vec<(Image, Vec<usize>)> {
        let mut images: BTreeMap<[u8; 32], (Image, Vec<usize>)> = BTreeMap::new();
        for moment in self.disk.moments() {
            for image in self.disk.images_at(moment, &self.disk.choices_at(moment, random)) {
                let key = *image.digest.as_bytes();
                images.entry(key).or_insert_with(|| (image, Vec::new())).1.push(moment);
            }
        }
        images.into_values().collect()
    }

    /// About so many images (ten times as many in `make soak`) of random moments, and all of the moment at which the
    /// command has ended; each once.
    fn some_images(&self, what: &str, usual: u64) -> Vec<Image> {
        let mut random = Random::new(what);
        let wanted = if rounds(0) == 0 { usual } else { usual * 10 };
        let moments = self.disk.moments();
        let end = self.disk.end();
        let mut images = self.disk.images_at(end, &self.disk.choices_at(end, 4));
        // Most moments differ from the one before in nothing that a disk keeps, so that more are drawn than wanted.
        for _ in 0..wanted * 4 {
            let moment = *random.one_of(&moments);
            let choices = self.disk.choices_at(moment, 8);
            let choice = random.one_of(&choices).clone();
            let mut drawn = self.disk.images_at(moment, &[choice]);
            drawn.retain(|image| images.iter().all(|known| known.digest != image.digest));
            images.extend(drawn);
            if images.len() as u64 >= wanted {
                break;
            }
        }
        eprintln!("{what}: {} images of {} moments", images.len(), moments.len());
        images
    }
}
