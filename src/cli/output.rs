//! What a command prints: results on standard output, complaints on standard error.

use std::io::{self, Write};

use serde::Serialize;

/// Prints a line of a result.
///
/// # Errors
/// Where standard output is closed.
pub(super) fn line(text: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

/// Prints a result as one JSON line.
///
/// # Errors
/// Where standard output is closed.
pub(super) fn json_line(value: &impl Serialize) -> io::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// Prints a complaint.
pub(super) fn error_line(text: &str) {
    // With standard error closed there is nobody to tell.
    writeln!(io::stderr().lock(), "{text}").ok();
}
