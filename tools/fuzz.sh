#!/usr/bin/env bash
# Fuzzes every target for SECONDS each (default 60). Installs cargo-fuzz if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
# Sanitizers are an unstable feature, which the stable compiler has too.
export RUSTC_BOOTSTRAP=1
targets=(read_gguf load_model chat_request messages_request responses_request completions_request)
for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target"
    cargo fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- -max_total_time="$seconds" -rss_limit_mb=2048
done
