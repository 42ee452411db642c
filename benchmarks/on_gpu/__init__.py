"""All of a GPU in stages: what `benchmarks/gpu.sh` runs, and what its results are held against."""
