#!/usr/bin/env bash
# All GPU tests and measurements, in minutes, in independent stages:
#
#   benchmarks/gpu.sh [--dry] [--seconds 480] [--only STAGE,...] OUT [PYTHON]
#
# Writes OUT/gpu.json and, for each stage, OUT/STAGE.json and OUT/STAGE.log. Uses the packages of PYTHON; the checkout
# need not be installed. --dry runs every stage on the CPU.
set -euo pipefail
flags=() places=()
while [ $# -gt 0 ]; do
    case $1 in
        --seconds | --only)
            if [ $# -lt 2 ]; then
                echo "benchmarks/gpu.sh: $1 takes a value" >&2
                exit 2
            fi
            flags+=("$1" "$2") && shift
            ;;
        -*) flags+=("$1") ;;
        *) places+=("$1") ;;
    esac
    shift
done
if [ ${#places[@]} -gt 2 ]; then
    echo "benchmarks/gpu.sh: ${places[*]:2}: unexpected arguments after OUT and PYTHON" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
[ ${#places[@]} -lt 1 ] || flags+=("$(realpath -m "${places[0]}")")
python=${places[1]:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
if ! [ -x "$(command -v "$python")" ]; then
    echo "benchmarks/gpu.sh: PYTHON $python: no such program" >&2
    exit 2
fi
case $python in */*) python=$(realpath -s "$python") ;; esac
cd "$root"
exec "$python" -m benchmarks.on_gpu.gpu_stages "${flags[@]}"
