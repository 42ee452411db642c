"""GPU tests and measurements in stages: the programs behind `benchmarks/gpu.sh`, and the goals of its results."""
