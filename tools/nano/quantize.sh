#!/bin/sh
# The types of the shipped file: sh quantize.sh DS4 CHECKPOINT IMATRIX OUT.gguf
# Those of the q2 recipe, but Q8_0 also where the recipe keeps F16, to stay below 16 MB.
set -eu
"$1" quantize "$2" "$4" --recipe q2 --imatrix "$3" --force \
    --tensor 'token_embd.weight=Q8_0' --tensor '*indexer.*=Q8_0' \
    --tensor '*compressor_kv.weight=Q8_0' --tensor '*compressor_gate.weight=Q8_0'
