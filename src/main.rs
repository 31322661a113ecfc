//! The `freetumor` program: parses arguments and turns an error into an exit code.

use std::process::ExitCode;

use clap::Parser;
use freetumor::cli::Cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Wrong usage ends inside `parse` with exit code 2.
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            freetumor::cli::complain(&error);
            ExitCode::FAILURE
        }
    }
}
