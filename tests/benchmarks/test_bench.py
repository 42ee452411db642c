"""The output of benchmarks: text and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"


def said(code: str) -> str:
    """The output of a program. Benchmarks run in a subprocess: tests do not import them."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report():
    """The text output for the committed result of a whole benchmark."""
    return said(f"""
import json
from benchmarks.groups.verdict import table, verdict
result = json.load(open({str(RESULT)!r}))
result["skipped"], result["facts"]["other"] = {{"gpu": "it needs a GPU"}}, {{"images_per_sec": 3}}
print(table(result))
print(*verdict(result["stages_images_per_sec"], overlapping=False), sep="\\n")
""")


def test_every_comparison_has_its_ratio_its_rates_their_unit_and_what_it_is_with(report):
    lines = report.splitlines()
    comparisons = json.loads(RESULT.read_text())["comparisons"]
    assert len(comparisons) == 12
    for found in comparisons:
        (place,) = [n for n, line in enumerate(lines) if line.split()[:1] == [found["name"]]]
        assert f"{found['ratio']:.2f} ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})" in lines[place]
        assert lines[place].endswith(found["unit"])
        assert lines[place + 1] == f"    baseline: {found['baseline']['what']}"


def test_facts_are_sentences_and_lines_fit_a_screen(report):
    assert "  score_side: scoring at 32 px instead of 64 selects the same view for 20.3 % of 256 images, and" in report
    assert "\n  other: images per sec 3\n" in report
    assert "skipped: it needs a GPU" in report
    assert max(map(len, report.splitlines())) <= 120


def test_the_verdict_names_the_slowest_stage_and_what_to_do(report):
    assert "mode standard: train is the bottleneck, with 97 % of the time per image" in report
    assert "mode worst10: score is the bottleneck, with 74 % of the time per image" in report
    assert "what to do: score at a smaller image size" in report


@pytest.mark.slow
def test_the_workers_of_torchvisions_loader_are_ended_when_it_is_closed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing
from benchmarks.baselines import original
from benchmarks.jpegs import synthetic_images
from fast_spatial.kernels.limits import SpatialLimits

if __name__ == "__main__":
    limits = SpatialLimits.from_px(30)
    batches = original.loader(
        synthetic_images(), side=64, batch=4, workers=2, warps=1, limits=limits, in_workers=True
    )
    print(tuple(next(batches).shape))
    workers = multiprocessing.active_children()
    batches.close()
    print([worker.exitcode for worker in workers])
""")
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    assert said(code).splitlines()[-2:] == ["(4, 1, 3, 64, 64)", "[0, 0]"]


def test_a_group_that_fails_is_told_and_what_others_found_is_kept_after_each():
    kept = said("""
import json, types
from benchmarks import bench
from benchmarks.jobs import Findings
from fast_spatial.config.commands import BenchConfig

def group(name):
    def run(job):
        if name == "pipeline":
            raise OSError("libnvjpeg.so is broken")
        if name == "score":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return Findings([], {}, {name: {"rate": 3}}, {})
    return types.SimpleNamespace(run=run)

bench.importlib.import_module = lambda name: group(name.removeprefix("benchmarks.groups."))
seen = []
result = bench.run(BenchConfig(), lambda now: seen.append([sorted(now["facts"]), dict(now["skipped"])]))
print(json.dumps([seen, result["facts"]]))
""")
    seen, facts = json.loads(kept.splitlines()[-1])
    gpu = ["gpu"] if "gpu" in facts else []
    assert list(facts) == [*gpu, "warp", "step", "grid"]
    broken = {"pipeline": "failed: OSError: libnvjpeg.so is broken"}
    lacks = {"score": "needs sklearn, which is not installed"}
    assert seen[len(gpu) :] == [
        [[*gpu, "warp"], {}],
        [[*gpu, "warp"], broken],
        [[*gpu, "warp"], broken | lacks],
        [[*gpu, "step", "warp"], broken | lacks],
        [[*gpu, "grid", "step", "warp"], broken | lacks],
    ]
