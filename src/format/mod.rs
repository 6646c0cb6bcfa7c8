//! Every byte and every name that Highwater stores, versioned.
//!
//! Owns the grammar of keys, the sealed object, the JSON documents, chunk maps
//! and the file list. Never here: I/O, listing, deciding. `docs/format.md`
//! draws what this room defines; change both together.

mod chunks;
mod codec;
mod documents;
mod drill;
mod encrypted;
mod file_list;
mod gap;
mod keys;
mod names;
mod pack_index;
mod page_map;
mod pins;
mod sealed;
mod verification;
mod wal_summary;

pub use chunks::{
    CHUNK_BYTES, ChunkDigest, ChunkEntry, ChunkMap, ChunkMapError, ChunkPart, FrameRef,
    MAP_CHUNKS_MAX, RUNS_MAX, Run, digest_chunk,
};
pub use codec::{
    Codec, CodecError, FrameCompressor, FrameWriter, Packing, read_frames, read_whole,
};
pub use documents::{
    Begun, Committed, DAMAGED_PAGES_NAMED_MAX, DamagedPage, DamagedPages, Document, DocumentError,
    ENCRYPTED_IDENTITY_VERSION, FORMAT_VERSION, FileIndex, Identity, PackUse, Reference,
    ServerLimits, TablespaceAt,
};
pub use drill::{
    CheckOutcome, DRILL_TEXT_BYTES_MAX, Drill, DrillCheck, DrillFailure, DrillOutcome, DrillPhase,
    DrillReached, drill_text,
};
pub use encrypted::{
    BLOCK_BYTES, BLOCK_PLAIN_BYTES, BlockCipher, ENCRYPTED_HEAD_BYTES, EncryptedHead,
    EncryptionError, KeyId, KeyIdError, SecretKey, WRAPPED_KEY_BYTES, block_offset, blocks_of,
    decrypted_bytes, encrypted_bytes,
};
pub use file_list::{
    EntryKind, FileContent, FileEntry, FileStamp, INLINE_CHUNKS_MAX, LIST_FRAME_BYTES, ListError,
    parse_line, write_line,
};
pub use gap::{WalGap, parse_gap};
pub use keys::{Encryption, KeyMark, KeyObject, Made, RepositoryKeyName, WrappedKey};
pub use names::{
    BackupId, BackupObject, ClusterName, NameError, Place, WalObject, parse_acknowledged,
    parse_backup_object, parse_drill, parse_pin, parse_proof, parse_wal_object,
};
pub use pack_index::{
    INDEXED_BYTES_MIN, IndexedFrame, PackIndexError, Piece, decode_pack_index, encode_pack_index,
};
pub use page_map::{
    PAGE_BYTES, PAGES, PageDigests, PageMap, PageMapError, digest_pages, encode_page_map,
    page_map_bytes,
};
pub use pins::{PIN_REASON_BYTES_MAX, Pin};
pub use sealed::{
    HEADER_PROBE_BYTES, Header, IndexAt, Kind, PACK_HEADER_BYTES, RestorePointMark, SealError,
    WalSummary, encode_header, encode_header_padded, parse_header,
};
pub use verification::{
    Acknowledgement, Depth, FINDINGS_NAMED_MAX, PROOFS_MAX, Proof, ProofsError, REASON_BYTES_MAX,
    StoredFinding, Verification, decode_proofs, encode_proofs, finding_id, is_finding_id,
};
pub use wal_summary::SummaryBuilder;
