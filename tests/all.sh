#!/usr/bin/env bash
# Every check there is: format, lints, documentation, Rust tests, the real server, the Python client against it.
# Needs Rust 1.95 and Python 3.10 or newer; Python packages go into .venv.
# FREETUMOR_TEST_FRAMEWORKS=1 also installs PyTorch, MONAI, nnU-Net, Lightning and JAX (7 GB into .venv-frameworks, four
# minutes or more) and runs the tests that train with them, and pyright; without it those tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$1"; }

step "format"
cargo fmt --all --check

step "lints"
cargo clippy --release --all-targets --quiet -- -D warnings

step "features"
cargo clippy --release --features otlp --test otlp --bin freetumor --quiet -- -D warnings
# The crate itself with less optimization: only what is sent is looked at.
cargo test --release --config 'profile.release.package.freetumor.opt-level=1' --features otlp --test otlp --quiet

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --document-private-items --quiet

step "Rust tests"
cargo test --release --quiet

step "fuzz targets compile"
cargo check --manifest-path fuzz/Cargo.toml --target-dir target/fuzz --quiet

step "operator's tools"
# promtool, wrk and node are asked for by python/tests/test_operator.py, which skips what is absent.
if ! command -v promtool wrk >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends prometheus wrk; } >/dev/null 2>&1 || true
fi
command -v promtool || echo "promtool is not installed: metrics and alerts are not checked by it"

step "Python tests"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -e './python[test,fuzz]'
cargo build --release --quiet
.venv/bin/python -m pytest -q -rs python/tests

step "faults"
.venv/bin/python -m pytest -q -rs tests/faults

if [ "${FREETUMOR_TEST_FRAMEWORKS:-0}" = 1 ]; then
    step "Python tests with the frameworks"
    [ -x .venv-frameworks/bin/python ] || python3 -m venv .venv-frameworks
    .venv-frameworks/bin/pip install --quiet --disable-pip-version-check -e './python[test-frameworks]'
    .venv-frameworks/bin/pyright --project python --pythonpath .venv-frameworks/bin/python
    .venv-frameworks/bin/python -m pytest -q -rs python/tests/test_{torch,monai,nnunet,examples}.py
    step "networks of full size, written by PyTorch, MONAI and nnU-Net"
    FREETUMOR_TORCH_PYTHON=$PWD/.venv-frameworks/bin/python cargo test --release --quiet --test import -- --ignored
fi

step "demo --check"
./target/release/freetumor demo --check --dir "$(mktemp -d)"
