"""Speed by number of processes is measured in processes that train together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What the launcher prints when a process fails, shortened.
FAILED = """\
[rank0]: Traceback (most recent call last):
[rank0]:   File "processes.py", line 7, in main
[rank0]: torch.OutOfMemoryError: CUDA out of memory.
E1125 18:12:27.000000 77 torch/distributed/elastic/multiprocessing/api.py:1000] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
benchmarks.processes FAILED
"""


def printed(code: str) -> Any:
    """The JSON that a program prints. Benchmarks run in a subprocess: tests do not import them."""
    head = """
import json
from pathlib import Path
from benchmarks import processes
from benchmarks.processes import Work, counts_up_to, measure
TINY = Work(side=32, batches={"standard": 2, "worst10": 2}, seconds=0.01)
"""
    done = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.slow
def test_one_and_two_processes_train_and_two_of_them_form_one_group():
    facts, skipped = printed("found = measure([1, 2], TINY); print(json.dumps([found.facts, found.skipped]))")
    assert skipped == {}
    assert list(facts) == [f"train_{m}_32px_{n}_processes" for n in (1, 2) for m in ("standard", "worst10")]
    for name, about in facts.items():
        assert about["world_size"] == int(name.split("_")[-2])
        assert about["batch_per_process"] == 2
        assert about["images_per_sec"] > 0
        assert about["efficiency_pct"] > 0
    assert facts["train_standard_32px_1_processes"]["efficiency_pct"] == 100


def test_counts_efficiencies_and_what_fails(tmp_path):
    launcher = tmp_path / "torch" / "distributed" / "run.py"
    launcher.parent.mkdir(parents=True)
    for package in (launcher.parent, launcher.parent.parent):
        (package / "__init__.py").touch()
    launcher.write_text(f"import sys; print({FAILED!r}, file=sys.stderr); sys.exit(1)")
    found = printed(f"""
counts = [counts_up_to(most) for most in (1, 2, 3, 6, 8)]
real, rates = processes._job, {{1: 100.0, 2: 180.0, 8: 400.0}}
processes._job = lambda n, _: {{"world_size": n, "images_per_sec": {{"standard": rates[n]}}}}
efficiencies = [about["efficiency_pct"] for about in measure([1, 2, 8], TINY).facts.values()]
processes._job, processes.ROOT, processes.TIMEOUT_SEC = real, Path({str(tmp_path)!r}), 900
failed = measure([2, 4], TINY)
Path({str(launcher)!r}).write_text("import time; time.sleep(600)")
processes.TIMEOUT_SEC, popen, started = 2, processes.subprocess.Popen, []
processes.subprocess.Popen = lambda *words, **options: started.append(popen(*words, **options)) or started[-1]
hung = measure([1], TINY)
alive = Path("/proc", str(started[0].pid)).exists()
print(json.dumps([counts, efficiencies, failed.facts, failed.skipped, hung.skipped, alive]))
""")
    counts, efficiencies, facts, failed, hung, alive = found
    assert counts == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert efficiencies == [100.0, 90.0, 50.0]
    assert facts == {}
    reason = "processes failed: torch.OutOfMemoryError: CUDA out of memory."
    assert failed == {"processes_2": f"2 {reason}", "processes_4": f"4 {reason}"}
    assert hung == {"processes_1": "1 process took longer than 2 s"}
    assert not alive
