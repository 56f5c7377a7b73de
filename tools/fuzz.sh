#!/usr/bin/env bash
# Fuzzes every target with libFuzzer, for SECONDS each (default 60). Installs cargo-fuzz if it is
# missing.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
cargo run --release --bin make_seeds -- fuzz/seeds
# Sanitizers are an unstable feature, which the stable compiler has too.
export RUSTC_BOOTSTRAP=1
for target in fuzz/fuzz_targets/*.rs; do
    target=$(basename "$target" .rs)
    mkdir -p "fuzz/corpus/$target"
    cargo fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=2048
done
