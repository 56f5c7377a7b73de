#!/usr/bin/env bash
# Compares the logits of `ds4 logits` with golden vectors, for every model in FOLDER/models.
# FOLDER/compare.py judges; FOLDER/vectors/MODEL.json lists the sequences.
set -euo pipefail
folder=$1
here=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --manifest-path "$here/Cargo.toml" -p ds4
ds4=${CARGO_TARGET_DIR:-$here/target}/release/ds4

# judge VECTORS MODEL TOLERANCES... -- FLAGS OF ds4 logits...
judge() {
    local vectors=$1 model=$2 tolerances=() failed=0
    shift 2
    while [ "$1" != -- ]; do tolerances+=("$1"); shift; done
    shift
    for ids in "$out/$vectors"/*.ids; do
        "$ds4" logits -m "$folder/models/$model.gguf" --token-ids "$ids" "$@" -o "$out/logits.f32" 2>"$out/log" ||
            { cat "$out/log" >&2; return 1; }
        python3 "$folder/compare.py" "$folder/vectors/$vectors.safetensors" "$out/logits.f32" "${tolerances[@]}" ||
            failed=1
    done
    return $failed
}

# The token ids of every sequence of VECTORS, one file each.
sequences() {
    mkdir -p "$out/$1"
    python3 - "$folder" "$1" "$out/$1" <<'PY'
import sys
folder, vectors, out = sys.argv[1:]
sys.path.insert(0, folder)
import compare
for key, tokens in compare.load_safetensors(f"{folder}/vectors/{vectors}.safetensors").items():
    if key.endswith(".tokens"):
        with open(f"{out}/{key[:-7]}.ids", "w") as f:
            f.write(" ".join(map(str, tokens)))
PY
}

status=0
for model in "$folder"/models/*.gguf; do
    model=$(basename "$model" .gguf)
    sequences "$model"
    echo "== $model, reference"
    judge "$model" "$model" -- --reference --cache-rounding off || status=1
    echo "== $model, SIMD"
    # Rounding activations flips choices on random weights; f16 weights see none of it.
    case $model in
        *f16*) judge "$model" "$model" --max-abs 5e-3 --kl-mean 1e-4 --kl-max 1e-2 --top1 0.995 -- --cache-rounding off || status=1 ;;
        *) judge "$model" "$model" --max-abs 10 --kl-mean 4e-2 --kl-max 3 --top1 0.6 -- --cache-rounding off || status=1 ;;
    esac
    if [ -e "$folder/vectors/$model-qat.safetensors" ]; then
        sequences "$model-qat"
        echo "== $model, rounded cache"
        judge "$model-qat" "$model" --max-abs 5 --kl-mean 1e-2 --kl-max 1 --top1 0.95 -- --reference --cache-rounding on || status=1
    fi
done
exit $status
