//! The manifest of a backup whose files we read ourselves, until its end is known.
//!
//! It comes last in the backup and grows with every file, so it is kept compressed: about
//! twelve bytes for a file.

use super::super::UNHARMED;
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Packing, read_whole};
use crate::pg::{MajorVersion, ManifestWriter, ManifestedFile, SystemId, WalRange};

/// What is compressed at a time.
const PART_BYTES: usize = 1 << 20;

/// A manifest in the making.
pub(super) struct ManifestDraft {
    writer: ManifestWriter,
    open: Vec<u8>,
    /// Compressed, each with its plain length.
    closed: Vec<(Vec<u8>, usize)>,
}

impl ManifestDraft {
    pub(super) fn new(version: MajorVersion, system_id: SystemId) -> Self {
        let writer = ManifestWriter::new(version, system_id);
        Self { writer, open: Vec::new(), closed: Vec::new() }
    }

    /// Lists a file.
    pub(super) fn file(&mut self, file: &ManifestedFile<'_>) -> Result<(), Failure> {
        self.writer.file(file, &mut self.open);
        if self.open.len() >= PART_BYTES {
            let packed = Codec::DEFAULT.frame(&self.open).map_err(broken)?;
            self.closed.push((packed, self.open.len()));
            self.open.clear();
        }
        Ok(())
    }

    /// Ends the manifest and returns it in parts, each made when it is asked for.
    pub(super) fn finish(
        mut self,
        ranges: &[WalRange],
    ) -> impl Iterator<Item = Result<Vec<u8>, Failure>> {
        self.writer.finish(ranges, &mut self.open);
        let last = self.open;
        self.closed
            .into_iter()
            .map(|(packed, plain_bytes)| unpack(&packed, plain_bytes))
            .chain(std::iter::once(Ok(last)))
    }
}

fn unpack(packed: &[u8], plain_bytes: usize) -> Result<Vec<u8>, Failure> {
    read_whole(Packing::Zstd, packed, plain_bytes).map_err(broken)
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::new(
        Kind::Bug,
        "the manifest could not be kept in memory",
        UNHARMED,
        "Suspect this host's memory; if there is enough of it, please report this.",
    )
    .because(error)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::{Lsn, ManifestReader, Timeline};

    #[test]
    fn a_manifest_of_many_files_comes_out_whole() {
        let mut draft = ManifestDraft::new(MajorVersion(18), SystemId(7));
        for number in 0..20_000u32 {
            let path = format!("base/5/{number}");
            let checksum = ("CRC32C", &number.to_le_bytes()[..]);
            draft
                .file(&ManifestedFile {
                    path: path.as_bytes(),
                    size: 1,
                    modified_unix: 2,
                    checksum,
                })
                .unwrap();
        }
        assert!(draft.closed.len() > 1, "compressed on the way");
        let range = WalRange { timeline: Timeline(1), start_lsn: Lsn(1), end_lsn: Lsn(2) };
        let (mut reader, mut count) = (ManifestReader::new(), 0);
        for part in draft.finish(&[range]) {
            reader.feed(&part.unwrap(), &mut |_| count += 1).unwrap();
        }
        assert_eq!((count, reader.finish().unwrap().wal_ranges), (20_000, vec![range]));
    }
}
