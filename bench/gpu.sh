#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: tests/gpu, then the CUDA benchmark. Results go to ${OUT:-bench/results}/.
# Uses the torch, transformers and onnx of the environment it runs in; onnxruntime-gpu and TensorRT-RTX are used when installed.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m pytest tests/gpu -rs -p no:cacheprovider
"$PYTHON" -m bench.cuda --output "$OUT/cuda.json"
