//! Trials of the use cases on a store that fails or whose objects are damaged.

mod archive;
mod beside_pieces;
mod copy;
mod copy_beside_expire;
mod copy_beside_expire_wal;
mod damage;
mod drill;
mod expire;
mod faults;
mod large_segments;
mod resume;
mod rivals;
mod smaller_faults;
mod stall;
mod stall_two;
mod streamed;
mod two_repos;
mod verify;
mod verify_pieces;
