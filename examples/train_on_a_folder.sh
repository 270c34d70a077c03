#!/usr/bin/env bash
# Train a codec on your own recordings, fit its entropy tables, and use it.
#
#   examples/train_on_a_folder.sh RECORDINGS MODEL [RECIPE [SECTION.FIELD=VALUE ...]]
#
# RECORDINGS is a folder of any audio that libsndfile reads; MODEL is the model folder to make. The
# default recipe is recipes/speech_3k.yaml, an hour or two on two CPU cores. Interrupt and repeat the
# command to resume. Needs: pip install '.[train]'.
set -euo pipefail
recordings=$1 model=$2 recipe=${3:-recipes/speech_3k.yaml}
shift $(($# < 3 ? $# : 3))

run=runs/$(basename "$model")
vpcodec train "$recipe" "data.train=$recordings" --run "$run" "$@"
vpcodec export "$run" -o "$model" --force
vpcodec models tables "$model" "$recordings" ${TABLES_OPTIONS:-}

first=$(find "$recordings" -type f \( -name '*.wav' -o -name '*.flac' \) | head -n 1)
vpcodec encode "$first" "$model/example.tok" --model "$model"
vpcodec decode "$model/example.tok" "$model/example.wav" --model "$model"
