#!/usr/bin/env bash
# Every check there is: format, lints, documentation, Rust tests, the real server, the Python client against it.
# Needs Rust 1.95 and Python 3.10 or newer; Python packages go into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$1"; }

step "format"
cargo fmt --all --check

step "lints"
cargo clippy --release --all-targets --quiet -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --document-private-items --quiet

step "Rust tests"
cargo test --release --quiet

step "Python tests"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -e './python[test]'
cargo build --release --quiet
.venv/bin/python -m pytest -q python/tests

step "demo --check"
./target/release/freetumor demo --check --dir "$(mktemp -d)"
