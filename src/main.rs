//! The `freetumor` command: parses arguments and turns an error into an exit code.

use std::process::ExitCode;

use libmimalloc_sys::{mi_option_set_default, mi_option_t};

/// Networks take and free the same large tensors at every step, so an allocator that gives memory back pays for it again.
/// A training step of a basic U-Net took 4.2 s with glibc as it comes, 4.6 s with jemalloc as it comes, 2.9 to 3.3 s with
/// mimalloc as it comes, and 2.7 to 3.2 s with any of the three told to keep what was freed (`docs/performance.md`). Of
/// the equally fast ones, mimalloc needs neither a build system of its own, as jemalloc does, nor huge pages that only the
/// environment can switch on, as glibc does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay`, which the bindings do not name: milliseconds until freed memory goes back, -1 for never.
const PURGE_DELAY: mi_option_t = 15;

fn main() -> ExitCode {
    // SAFETY: mimalloc asks that no other thread sets options meanwhile, and there is none yet. `MIMALLOC_PURGE_DELAY` in
    // the environment still wins.
    unsafe { mi_option_set_default(PURGE_DELAY, -1) };
    freetumor::cli::main()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_the_one_that_is_meant() {
        if std::env::var_os("MIMALLOC_PURGE_DELAY").is_some() {
            return;
        }
        // SAFETY: reads a number.
        let default = unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        // No other option starts with a second.
        assert_eq!(default, 1000);
    }
}
