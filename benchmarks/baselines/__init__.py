"""The baselines of the benchmarks."""
