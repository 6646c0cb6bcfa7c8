//! The `highwater` binary: parse, dispatch, exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    keep_one_arena();
    highwater::cli::run(std::env::args_os())
}

/// Lets all threads share one heap, before there is a second thread.
///
/// glibc gives each thread an arena of its own, up to eight for each processor, and reserves 64 MiB of
/// address space for each, 128 MiB for a moment (`malloc/arena.c`, `HEAP_MAX_SIZE`). Hosts that never
/// overcommit count that as used, and containers are sized by it. Measured: `backup --jobs 2` 870 MiB
/// of address space with arenas and 100 MiB with one heap, `archive-push` of a backlog 355 and 44 MiB,
/// with the same resident memory and, within the noise, in the same time: large buffers are passed on and used
/// again here, not allocated in loops.
///
/// Safe Rust has no way to say it, and the variable `MALLOC_ARENA_MAX` is read before `main`.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)] // the only one in this crate: one call, two numbers, no pointer
fn keep_one_arena() {
    // SAFETY: `mallopt(3)` takes two integers and may be called at any time; no other thread runs yet.
    // It fails only for a parameter that it does not know; then all is as it was.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Other C libraries have one heap by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_one_arena() {}
