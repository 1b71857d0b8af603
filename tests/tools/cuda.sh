#!/usr/bin/env bash
# Measures the project on a graphics card: bash tests/tools/cuda.sh OUT [--small] [--only PART ...]
# Writes OUT/cuda.json after every result and OUT/cuda.log; TOTAL_SECONDS (480) limits the whole.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false GRADIO_ANALYTICS_ENABLED=False
exec python3 tests/tools/cuda/run.py "$@"
