#!/usr/bin/env bash
# Every GPU test and every GPU benchmark in one go, in minutes: benchmarks/gpu.sh OUT [PYTHON]
#
# Writes OUT/tests.txt and OUT/gpu.json. Runs with what PYTHON has: other versions of torch than the pinned ones, and
# without DALI; what had to be skipped for it is printed, and listed in the JSON.
set -uo pipefail
out=${1:?give a folder for the results: benchmarks/gpu.sh OUT [PYTHON]}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${2:+$(command -v "$2")}
python=${python:+$(realpath -s "$python")}
cd "$(dirname "$0")/.."
python=${python:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
status=0

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU is visible to torch in $python: nothing was run" >&2
    exit 1
fi
for package in pytest nvidia.dali cv2 sklearn fire; do
    "$python" -c "import $package" 2>/dev/null || echo "missing here: $package; what needs it is skipped"
done
if "$python" -c 'import pytest' 2>/dev/null; then
    "$python" -m pytest -p no:cacheprovider -m gpu -rs tests/test_gpu.py 2>&1 | tee "$out/tests.txt" || status=1
fi
"$python" -m benchmarks.bench "{\"what\": \"all\", \"seconds\": 0.3, \"json\": \"$out/gpu.json\"}" || status=1
exit $status
