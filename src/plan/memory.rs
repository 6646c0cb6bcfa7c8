//! How the ceiling of memory (`memory_max`) is divided before a backup or a restore begins.
//!
//! Every stage has its share from the start, and waits where it is in use. What each share is worth is measured:
//! `tests/suite/memory.rs` holds the whole process to its ceiling.

use super::file_reading::{ReadingPlan, STRETCH_BYTES, reading_plan};

/// What the program takes by itself: the resident part of its code and libraries (13 MiB), connections, the runtime.
const PROGRAM_BYTES: u64 = 20 << 20;

/// What passes between the stages of a backup, waits for its place in a pack, the earlier backup's maps of one gigabyte,
/// a few frames of its file list, and what is known of the packs of unfinished backups.
const RECORDING_BYTES: u64 = 14 << 20;

/// A frame of 512 KiB that waits, its compressed form in the room that the worst case needs, and that form again.
const FRAME_BYTES: u64 = 3 << 19;

/// A pack is closed when its frames reach this size, if memory allows. The format's limit is 64 MiB.
const PACK_BYTES_MAX: u64 = 8 << 20;

/// Packs are never smaller than this, or there would be too many of them.
const PACK_BYTES_MIN: u64 = 4 << 20;

/// Packs in memory: one is filled, and two are on their way to the store.
const PACKS: u64 = 3;

/// The same where a pack on its way is held once more, encrypted.
const PACKS_ENCRYPTED: u64 = 5;

/// The least for looking up files of the earlier backup: 87,000 of them.
const INDEX_BYTES_MIN: u64 = 2 << 20;

/// Stored bytes fetched in one request, if memory allows, and at least.
const RANGE_BYTES_MAX: u64 = 2 << 20;
const RANGE_BYTES_MIN: u64 = 256 << 10;

/// Ranges for each job of a restore: two on their way or fetched.
pub const FETCHES_PER_JOB: u32 = 2;

/// What a restore holds of lists (16 MiB of them for a second reading, `repo/frames.rs`), maps and places, and of files
/// that it compares.
const FILLING_BYTES: u64 = 28 << 20;

/// Frames that a job of a restore has decompressed, and what the codec needs for it.
const DECODING_BYTES: u64 = 1 << 20;

/// The ceiling is too low for so many jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{jobs} jobs need a memory_max of at least {} MiB", least_bytes.div_ceil(1 << 20))]
pub struct TooLittle {
    /// The jobs that were asked for.
    pub jobs: usize,
    /// The lowest ceiling that works with them, in bytes.
    pub least_bytes: u64,
    /// How many jobs the ceiling that was given is enough for; 0 if not even for one.
    pub jobs_max: usize,
}

/// What the stages of a backup may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupMemory {
    /// A pack is closed before it is larger, in bytes.
    pub pack_bytes: usize,
    /// How files are read, where that is done here.
    pub reading: ReadingPlan,
    /// For looking up files of the earlier backup, in bytes.
    pub index_bytes: u64,
}

/// Divides the ceiling of a backup. `codec_bytes` is what compressing one frame takes; `is_encrypted` says whether packs
/// are encrypted on their way.
///
/// # Errors
/// [`TooLittle`].
pub fn backup_memory(
    memory_max_bytes: u64,
    jobs: usize,
    codec_bytes: u64,
    is_encrypted: bool,
) -> Result<BackupMemory, TooLittle> {
    let packs = if is_encrypted { PACKS_ENCRYPTED } else { PACKS };
    let least = PROGRAM_BYTES
        + RECORDING_BYTES
        + packs * PACK_BYTES_MIN
        + INDEX_BYTES_MIN
        + 2 * STRETCH_BYTES as u64;
    let free = rest(memory_max_bytes, jobs, least, codec_bytes + FRAME_BYTES)?;
    // Half of what is left over goes to packs, a quarter each to reading and to looking up.
    let pack = (PACK_BYTES_MIN + free / 2 / packs).min(PACK_BYTES_MAX);
    Ok(BackupMemory {
        pack_bytes: usize::try_from(pack).unwrap_or(usize::MAX),
        reading: reading_plan(2 * STRETCH_BYTES as u64 + free / 4, jobs),
        index_bytes: INDEX_BYTES_MIN + free / 4,
    })
}

/// Returns how many stored bytes a restore fetches in one request.
///
/// # Errors
/// [`TooLittle`].
pub fn restore_range_bytes(memory_max_bytes: u64, jobs: usize) -> Result<u32, TooLittle> {
    let least = PROGRAM_BYTES + FILLING_BYTES;
    let of_job = DECODING_BYTES + u64::from(FETCHES_PER_JOB) * RANGE_BYTES_MIN;
    let free = rest(memory_max_bytes, jobs, least, of_job)?;
    let share = free / 2 / u64::from(FETCHES_PER_JOB) / jobs.max(1) as u64;
    let range = (RANGE_BYTES_MIN + share).min(RANGE_BYTES_MAX);
    Ok(u32::try_from(range).unwrap_or(u32::MAX))
}

/// Returns what is left over once everything has its least.
fn rest(memory_max_bytes: u64, jobs: usize, least: u64, of_job: u64) -> Result<u64, TooLittle> {
    let least_bytes = least.saturating_add(of_job.saturating_mul(jobs.max(1) as u64));
    memory_max_bytes.checked_sub(least_bytes).ok_or_else(|| {
        let jobs_max = memory_max_bytes.saturating_sub(least) / of_job;
        TooLittle { jobs, least_bytes, jobs_max: usize::try_from(jobs_max).unwrap_or(usize::MAX) }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_lowest_ceiling_is_enough_for_the_jobs_that_are_the_default() {
        for jobs in 1..=4 {
            assert!(backup_memory(64 * MIB, jobs, 2 * MIB, false).is_ok(), "{jobs}");
            assert!(restore_range_bytes(64 * MIB, jobs).is_ok(), "{jobs}");
        }
    }

    #[test]
    fn the_default_ceiling_gives_packs_and_ranges_their_full_size() {
        let memory = backup_memory(256 * MIB, 4, 2 * MIB, true).unwrap();
        assert_eq!(memory.pack_bytes as u64, PACK_BYTES_MAX);
        assert_eq!(memory.reading.readers, 4);
        assert_eq!(u64::from(restore_range_bytes(256 * MIB, 4).unwrap()), RANGE_BYTES_MAX);
    }

    #[test]
    fn too_little_says_the_least_that_works_and_how_many_jobs_would() {
        let refused = backup_memory(64 * MIB, 64, 2 * MIB, false).unwrap_err();
        assert!(backup_memory(refused.least_bytes, 64, 2 * MIB, false).is_ok());
        assert!(backup_memory(refused.least_bytes - 1, 64, 2 * MIB, false).is_err());
        assert!(backup_memory(64 * MIB, refused.jobs_max, 2 * MIB, false).is_ok());
        assert!(backup_memory(64 * MIB, refused.jobs_max + 1, 2 * MIB, false).is_err());
        assert_eq!(refused.to_string(), "64 jobs need a memory_max of at least 274 MiB");
    }

    proptest! {
        #[test]
        fn no_division_is_worth_more_than_the_ceiling(
            memory: u64,
            jobs: usize,
            codec in 0..64 * MIB,
            is_encrypted: bool,
        ) {
            let packs = if is_encrypted { PACKS_ENCRYPTED } else { PACKS };
            if let Ok(shares) = backup_memory(memory, jobs, codec, is_encrypted) {
                let reading = shares.reading.stretches_max * STRETCH_BYTES;
                let worth = u128::from(PROGRAM_BYTES + RECORDING_BYTES + shares.index_bytes)
                    + u128::from(packs) * shares.pack_bytes as u128
                    + reading as u128
                    + (jobs.max(1) as u128) * u128::from(codec + FRAME_BYTES);
                prop_assert!(worth <= u128::from(memory));
                prop_assert!(shares.pack_bytes as u64 >= PACK_BYTES_MIN);
            }
            if let Ok(range) = restore_range_bytes(memory, jobs) {
                let of_job = u128::from(DECODING_BYTES + u64::from(FETCHES_PER_JOB) * u64::from(range));
                let worth = u128::from(PROGRAM_BYTES + FILLING_BYTES) + (jobs.max(1) as u128) * of_job;
                prop_assert!(worth <= u128::from(memory));
            }
        }
    }
}
