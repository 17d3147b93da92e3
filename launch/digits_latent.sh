#!/usr/bin/env bash
# The latent path end to end on real digits: autoencoder, encode, DiT, samples, evaluation.
# usage: bash launch/digits_latent.sh [--config.KEY=VALUE ...]    WORKDIR may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh requirements.txt

run=${WORKDIR:-runs/digits_latent}
recipe=experiments/digits_latent.py
dit=(--config="$recipe" --config.autoencoder.path="$run/autoencoder" "$@")

"$PY" -m ditjax.train --config="$recipe:autoencoder" --workdir="$run/autoencoder" "$@"
"$PY" -m ditjax.evaluate --workdir="$run/autoencoder"
"$PY" -m ditjax.encode "${dit[@]}" --out="$run/latents"
"$PY" -m ditjax.train "${dit[@]}" --workdir="$run/dit" --config.data.name="latents:$run/latents"
"$PY" -m ditjax.sample --workdir="$run/dit" --classes=0,1,2,3,4,5,6,7,8,9
"$PY" -m ditjax.evaluate --workdir="$run/dit"
