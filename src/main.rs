//! The `freetumor` command: parses arguments and turns an error into an exit code.

use std::process::ExitCode;

/// glibc's allocator gives large tensors back to the system after every step; mimalloc keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    freetumor::cli::main()
}
