//! Trials of the use cases on a store that fails or whose objects are damaged.

mod archive;
mod damage;
mod expire;
mod faults;
mod large_segments;
mod resume;
mod rivals;
mod stall;
mod streamed;
mod verify;
