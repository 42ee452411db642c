"""The GPU group of `launch.py bench`. `benchmarks/gpu.sh` measures the same and more, in stages."""

from __future__ import annotations

from benchmarks import processes
from benchmarks.jobs import Findings, Job
from benchmarks.on_gpu import rates
from benchmarks.on_gpu.record import Record


def run(job: Job) -> Findings:
    """Measure ceilings, training (compiled and eager), scoring and warps, and training by number of processes."""
    found, record = Findings.none(), Record()
    bench = rates.Bench(record, job.device, rates.GPU, job.config.image_size)
    rates.ceilings(bench)
    rates.networks(bench, compiled=False)
    rates.warps(bench)
    rates.dali_views(bench)
    rates.networks(bench, compiled=True)
    found.facts |= record.found
    found.add(processes.run(job))
    return found
