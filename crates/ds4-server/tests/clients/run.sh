#!/bin/sh
# Runs the client tests: installs the clients into a throw-away directory, or uses the one named in
# DS4_CLIENTS, which then holds `py` (a virtual environment) and `node_modules`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${DS4_CLIENTS:-}" ]; then
    DS4_CLIENTS=$(mktemp -d)
    trap 'rm -rf "$DS4_CLIENTS"' EXIT
    python3 -m venv "$DS4_CLIENTS/py"
    "$DS4_CLIENTS/py/bin/pip" install -q openai==3.57.0 anthropic==2.13.0
    (cd "$DS4_CLIENTS" && npm install --silent --no-audit --no-fund openai@6.49.0 @anthropic-ai/sdk@1.13.0 \
        playwright-core@1.65.1 opencode-ai@1.18.33 @mariozechner/pi-coding-agent@0.73.1 \
        @openai/codex@0.169.0 @anthropic-ai/claude-code@2.1.331)
fi
export DS4_CLIENTS
cp "$here"/*.mjs "$DS4_CLIENTS"
cd "$here/../../../.."
# The whole workspace, as all tests build it.
cargo build --release
DS4_PROGRAM=${CARGO_TARGET_DIR:-$PWD/target}/release/ds4
export DS4_PROGRAM
cargo test --release --test clients -- --ignored --nocapture --test-threads 1
