"""The stages of `benchmarks/gpu.sh`: none stops another, no measurement is lost, and all pass a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
NEED_DALI = ("decoder", "stream", "loader", "train", "resume", "train_compiled", "reproduce", "placements")
HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["nvidia", "dali"]:
            raise {error}

sys.meta_path.insert(0, Hidden())
"""


def answer(code: str, *words: str) -> Any:
    """The JSON that a program prints last. Benchmarks run in a subprocess: tests do not import them."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


STAGES = """
import json, subprocess, sys, time
from pathlib import Path
from benchmarks.on_gpu import gpu_stages
from benchmarks.on_gpu.gpu_stages import Session, Stage

WORK = {
    "prepare": "pass",
    "first": "keep('a', {'images_per_sec': 3}); keep('b', {'error': 'ValueError: it broke'})",
    "hangs": "keep('a', {'ms': 5}); subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)",
    "crashes": "keep('a', {'ms': 5}); os.kill(os.getpid(), 11)",
    "lacks": "keep('a', {'skipped': 'needs cake'})",
    "cake": "keep('a', {})",
    "last": "keep('a', {'ms': 7}); keep('n', {'note': 'all well'})",
    "late": "keep('a', {})",
}
HEAD = '''
import json, os, subprocess, sys, time
found = {}
def keep(name, values):
    found[name] = values
    json.dump({"measured": found}, open(sys.argv[1], "w"))
'''

def spawn(self, name):
    path = self.out / f"{name}.json"
    process = subprocess.Popen([sys.executable, "-c", HEAD + WORK[name], str(path)], start_new_session=True)
    while name == "hangs" and "a" not in self.measured(name):  # its time-out counts from what it hangs with
        assert process.poll() is None
        time.sleep(0.01)
    return process

Session._spawn = spawn
gpu_stages.STAGES = {
    "first": Stage(900, 0), "hangs": Stage(0.5, 0), "crashes": Stage(900, 0), "lacks": Stage(900, 0),
    "cake": Stage(900, 0, ("a_package_that_is_not_there",)), "last": Stage(900, 0, waits=True),
    "late": Stage(900, 10_000),
}
out = Path(sys.argv[1])
"""


def test_a_stage_that_fails_hangs_or_crashes_keeps_its_figures_and_stops_no_other(tmp_path):
    found = answer(
        STAGES
        + """
session = gpu_stages.opened(gpu_stages.parse([str(out), "--seconds", "5000"]))
gpu_stages.go(session, list(gpu_stages.STAGES))
print(json.dumps([json.loads((out / f"{name}.json").read_text()) for name in ("hangs", "last")]))
""",
        str(tmp_path),
    )
    whole = json.loads((tmp_path / "gpu.json").read_text())
    states = {name: about["state"] for name, about in whole["stages"].items()}
    assert states == {
        "prepare": "ok",
        "first": "failed",
        "hangs": "cut off",
        "crashes": "failed",
        "lacks": "skipped",
        "cake": "skipped",
        "last": "ok",
        "late": "not run: time",
    }
    stages = whole["stages"]
    assert stages["first"]["why"] == "b: ValueError: it broke"
    assert stages["first"]["measured"]["a"] == {"images_per_sec": 3}
    assert stages["hangs"]["measured"] == {"a": {"ms": 5}}
    assert stages["crashes"]["measured"] == {"a": {"ms": 5}}
    assert stages["cake"]["why"] == "needs a_package_that_is_not_there"
    assert stages["late"]["why"] == "run later: --only late"
    assert stages["last"]["why"] == "all well"
    assert [about["state"] for about in found] == ["cut off", "ok"]
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert stages["hangs"]["commit"] == stages["last"]["commit"] == (here.stdout.strip() or None)
    assert "commit" not in stages["late"]


def test_what_a_stopped_go_had_measured_is_kept(tmp_path):
    code = """
import os, signal
gpu_stages.obstacle = lambda session: ""
gpu_stages.STAGES = {"last": Stage(900, 0), "hangs": Stage(900, 0), "late": Stage(900, 0)}
wait = subprocess.Popen.wait

def stopped_in_wait(self, timeout=None):
    if "a" in Session(out, False, 9, {}).measured("hangs"):
        subprocess.Popen.wait = wait
        os.kill(os.getpid(), signal.SIGTERM)
    return wait(self, timeout)

subprocess.Popen.wait = stopped_in_wait
try:
    gpu_stages.main([str(out)])
except SystemExit as stopped:
    print(stopped.code)
"""
    assert answer(STAGES + code, str(tmp_path)) == 143
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    states = {name: (about["state"], about["why"]) for name, about in stages.items() if name != "prepare"}
    assert states == {"last": ("ok", "all well"), "hangs": ("cut off", "interrupted")}
    assert stages["hangs"]["measured"] == {"a": {"ms": 5}}


def test_only_goes_on_with_what_the_folder_holds(tmp_path):
    (tmp_path / "gpu.json").write_text(
        json.dumps(
            {
                "dry": False,
                "started": "2026-01-02T03:04:05+00:00",
                "stages": {"grid": {"state": "ok", "measured": {}}},
                "goals": [],
            }
        )
    )
    code = STAGES + "print(json.dumps(gpu_stages.opened(gpu_stages.parse([str(out), *sys.argv[2:]])).result['stages']))"
    gone_on = answer(code.replace("gpu_stages.STAGES = {", "gpu_stages.STAGES |= {"), str(tmp_path), "--only", "first")
    assert gone_on == {"grid": {"state": "ok", "measured": {}}}
    kept = (tmp_path / "gpu.json").read_text()
    holds = f"{tmp_path}/gpu.json contains measurements of 2026-01-02T03:04:05+00:00"
    for words, said in (
        (("--only", "grid"), f"{holds}. Choose another folder\n"),
        ((), f"{holds}. Add stages to it with --only STAGE,..., or choose another folder\n"),
    ):
        refused = script("--dry", *words, str(tmp_path), sys.executable)
        assert (refused.returncode, refused.stderr) == (1, said)
    assert (tmp_path / "gpu.json").read_text() == kept
    (tmp_path / "gpu.json").write_text("{broken")
    refused = script("--dry", "--only", "grid", str(tmp_path), sys.executable)
    assert refused.returncode == 1 and "gpu.json cannot be read. Choose another folder, or remove it" in refused.stderr
    assert (tmp_path / "gpu.json").read_text() == "{broken"


def test_tests_that_were_all_skipped_are_no_success():
    found = answer("""
import json
from benchmarks.on_gpu.gpu_stages import outcome
skipped = {"outcome": "skipped", "why": "Skipped: no GPU"}
tests = [{"a": skipped, "note": {"note": "1 skipped"}}, {"a": skipped, "b": {"outcome": "passed"}}]
print(json.dumps([outcome(0, measured) for measured in tests]))
""")
    assert found == [["skipped", "no GPU"], ["ok", ""]]


def test_an_interrupted_go_says_how_to_go_on(tmp_path):
    code = (
        STAGES
        + """
import os, signal
WORK["first"] = "os.kill(os.getppid(), 2); time.sleep(600)"
status = gpu_stages.main([str(out)])
print(json.dumps(status))
"""
    )
    code = code.replace("gpu_stages.STAGES", "gpu_stages.obstacle = lambda _: ''; gpu_stages.STAGES")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "130", done.stderr
    assert "interrupted. Run the rest later: --only first,hangs,crashes,lacks,cake,last,late" in done.stdout
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"]["first"]["state"] == "cut off"


def test_a_process_is_ended_with_what_it_started_in_sessions_of_their_own():
    alive = answer("""
import json, os, subprocess, sys, time
from benchmarks.on_gpu.gpu_stages import end
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
parent = f'''
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
'''
process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True)
pid = int(process.stdout.readline())
end(process)
def lives(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
give_up = time.monotonic() + 200  # what was killed may need a moment on a busy machine; nothing here ends by itself
while time.monotonic() < give_up and (lives(process.pid) or lives(pid)):
    time.sleep(0.01)
alive = [lives(process.pid), lives(pid)]
if lives(pid):
    os.kill(pid, 9)
print(json.dumps(alive))
""")
    assert alive == [False, False]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            "import time; time.sleep(600)",
            "importing torch with {python} takes longer than 0.5 s: nothing was run",
        ),
        (
            "raise ImportError('it is broken')",
            "torch cannot be imported by {python} (ImportError: it is broken): nothing ",
        ),
    ],
)
def test_a_torch_that_is_broken_or_silent_is_told_from_a_machine_without_a_gpu(tmp_path, module, said):
    (tmp_path / "torch.py").write_text(module)
    code = """
import json, os, sys
from pathlib import Path
from benchmarks.on_gpu import gpu_stages
os.environ["PYTHONPATH"] = sys.argv[1]
gpu_stages.IMPORT_SEC = 0.5 if "sleep" in Path(sys.argv[1], "torch.py").read_text() else 600
print(json.dumps(gpu_stages.obstacle(gpu_stages.Session(Path(sys.argv[1]), False, 9, {}))))
"""
    assert answer(code, str(tmp_path)).startswith(said.format(python=sys.executable))


def test_wrong_words_and_no_gpu_end_in_one_clear_error(tmp_path):
    unknown = script("--only", "grid,nonsense", str(tmp_path), sys.executable)
    assert unknown.returncode == 2
    assert "--only nonsense: unknown stage. Choose from machine, decoder," in unknown.stderr
    for words, said in (
        ((sys.executable, "more"), "benchmarks/gpu.sh: more: unexpected arguments after OUT and PYTHON\n"),
        ((str(tmp_path / "none"),), f"benchmarks/gpu.sh: PYTHON {tmp_path}/none: no such program\n"),
    ):
        refused = script(str(tmp_path / "out"), *words)
        assert (refused.returncode, refused.stderr) == (2, said)
    out = tmp_path / "out"
    none = script(str(out), sys.executable, CUDA_VISIBLE_DEVICES="")
    assert none.returncode == 1
    assert none.stderr.startswith("torch in ")
    assert len(none.stderr.splitlines()) == 1
    assert not out.exists()


def result(**stages: dict[str, Any]) -> dict[str, Any]:
    about = {"gpus": ["NVIDIA Test"], "hardware": "16 cores, NVIDIA Test", "versions": {"torch": "2.11.0"}}
    ended = {name: {"state": "ok", "measured": measured} for name, measured in stages.items()}
    return {"dry": False, "environment": about, "stages": ended}


def test_goals_are_met_or_missed_by_the_best_that_was_measured():
    whole = result(
        eager={
            "train_standard_224px_batch_256": {"images_per_sec": 9000, "ceiling_images_per_sec": 36000},
            "dali_views": {"ms": 12.5},
            "triton_warp": {"error": "RuntimeError: no"},
        },
        compiled={
            "train_standard_224px_batch_256_compiled": {"images_per_sec": 12500, "ceiling_images_per_sec": 36000}
        },
        loader={"loader_standard_gpu": {"images_per_sec": 7000}, "loader_standard_cpu": {"images_per_sec": 7500}},
        train={
            "train_worst10": {"images_per_sec": 3000, "data_wait_pct": 0.5},
            "train_standard": {"images_per_sec": 7000, "data_wait_pct": 40},
        },
    )
    whole["stages"]["grid"] = {"state": "not run: time", "measured": {}}
    rows = answer(
        "import json, sys; from benchmarks.on_gpu.goals import rows; "
        "print(json.dumps({row.what: row[1:] for row in rows(json.loads(sys.argv[1]))}))",
        json.dumps(whole),
    )
    assert rows["standard, in memory"][:4] == [
        "12,500 images/s, compiled",
        "36,000",
        "12,000",
        "met: train_standard_224px_batch_256_compiled",
    ]
    assert rows["DALI warp, a batch"][:4] == ["12.5 ms", "", "at most 10", "missed (1.2 x the goal): dali_views"]
    assert rows["Triton warp, of a fill"][3] == "error: triton_warp: RuntimeError: no"
    assert rows["standard, from files"][:4] == [
        "7,000 images/s",
        "7,500",
        "8,000",
        "missed (88 % of the goal): train_standard",
    ]
    assert rows["worst10, from files"][3:] == ["missed (86 % of the goal): train_worst10", 3000, False]
    assert rows["wait for data, worst10"][3:] == ["met: train_worst10", 0.5, True]
    assert rows["grid, bfloat16"][3:] == ["grid: not run: time", None, None]
    (tried,) = answer(
        "import json, sys; from benchmarks.on_gpu.goals import rows; "
        "print(json.dumps([row[4:] for row in rows(json.loads(sys.argv[1])) if 'wait' in row.what]))",
        json.dumps({**whole, "dry": True}),
    )
    assert tried == ["dry run: train_worst10", 0.5, None]


def test_what_ran_is_what_result_files_show():
    code = "import json, sys; from benchmarks.on_gpu.ran import what_ran; "
    code += "print(json.dumps(what_ran(json.loads(sys.argv[1]))))"
    assert answer(code, "[]").startswith("**No part has run on a GPU yet.** Not tried:")
    whole = result(
        eager={"triton_warp": {"ms": 0.7}, "dali_views": {"error": "RuntimeError: no"}},
        tests={"test_steps_lower_the_loss_in_every_dtype[1-dtype0]": {"outcome": "passed"}},
        compiled={"train": {"out_of_memory": True}},
        loader={"loader_standard_gpu_dali": {"images_per_sec": 9}, "loader_worst10_gpu_dali": {"error": "it crashed"}},
    )
    whole["stages"]["resume"] = {"state": "cut off", "measured": {}}
    text = answer(code, json.dumps([whole]))
    ran, partly, failed, begun, untried = text.split("\n\n")[1::2]
    assert begun == "- stop and resume of a run (`fast_spatial/training/run_folder.py`)"
    assert partly == "- decoding on the GPU (`pipelines/graph.py`)"
    assert text.startswith("Ran on NVIDIA Test with torch 2.11.0:")
    assert ran.splitlines() == [
        "- the Triton kernels (`kernels/warp_cuda.py`)",
        "- `GradScaler`, and training steps in every dtype",
    ]
    assert failed == "- DALI's warp (`dali_views` in `pipelines/ops.py`)"
    assert "- `torch.compile` of the trained network" in untried.splitlines()
    assert "- apex (`fast_spatial/training/optim.py`)" in untried.splitlines()


def test_rates_are_told_by_placement():
    found = result(
        loader={
            "loader_standard_gpu_engine_0.65_dali": {"images_per_sec": 14079.7},
            "loader_worst10_cpu_numba": {"images_per_sec": 3450.9},
            "loader_worst10_gpu-full_engine_0_triton": {"error": "it crashed"},
        },
        placements={"train_worst10_decode_gpu-full_warp_triton": {"images_per_sec": 3000}},
    )
    code = "import json, sys; from benchmarks.tables import placements; "
    code += "print(json.dumps([placements(json.loads(word)) for word in sys.argv[1:]]))"
    table, nothing = answer(code, json.dumps(found), json.dumps(result(loader={})))
    assert nothing == ""
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "---" not in line] == [
        ["", "standard, loader alone", "worst10, loader alone", "worst10, training"],
        ["`--decode gpu --warp dali`, 65% by the JPEG engine", "14,100", "", ""],
        ["`--decode cpu --warp numba`", "", "3,450", ""],
        ["`--decode gpu-full --warp triton`", "", "", "3,000"],
    ]


def test_a_trial_on_a_cpu_is_no_result_of_a_gpu(tmp_path):
    (tmp_path / "gpu-x.json").write_text(json.dumps({"dry": True}))
    said = answer(
        """
import json, sys
from pathlib import Path
from benchmarks import tables
tables.RESULTS = Path(sys.argv[1])
try:
    tables.gpu_results()
except ValueError as error:
    print(json.dumps(str(error)))
""",
        str(tmp_path),
    )
    assert said == f"{tmp_path}/gpu-x.json: a dry run on a CPU, not a GPU result. Remove it"


def test_a_record_keeps_what_was_measured_before_and_after_an_error(tmp_path):
    kept = answer(
        """
import json, sys
from pathlib import Path
from benchmarks.on_gpu.record import Record

record = Record(Path(sys.argv[1]))
record.measure("right", lambda: {"ms": 3})
record.measure("wrong", lambda: 1 / 0)
record.measure("lacks", lambda: {"ms": 4}, needs="a_package_that_is_not_there")
record.put("after", {"ms": 5})
print(json.dumps(json.loads(record.path.read_text())["measured"]))
""",
        str(tmp_path / "x.json"),
    )
    assert kept == {
        "right": {"ms": 3},
        "wrong": {"error": "ZeroDivisionError: division by zero"},
        "lacks": {
            "skipped": "needs a_package_that_is_not_there "
            "(ModuleNotFoundError: No module named 'a_package_that_is_not_there')"
        },
        "after": {"ms": 5},
    }


def test_synthetic_images_are_made_once_with_links_that_a_loader_reads(tmp_path):
    times = answer(
        """
import json, sys, time
from pathlib import Path
from benchmarks.jpegs import make_images
from fast_spatial.pipelines.dataset import read_index

folder, spent = Path(sys.argv[1]), []
for _ in range(2):
    start = time.monotonic()
    make_images(folder, 2, {"train": 2, "val": 1}, links=3)
    spent.append((folder / "train" / "class_0" / "000.jpg").stat().st_mtime_ns)
print(json.dumps([len(read_index(folder, "train")), len(read_index(folder, "val")), spent[0] == spent[1]]))
""",
        str(tmp_path / "images"),
    )
    assert times == [16, 2, True]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("dry")
    start = time.monotonic()
    done = script(str(out), "--dry", sys.executable)
    print(f"{time.monotonic() - start:.0f} s\n{done.stdout}")
    return done, json.loads((out / "gpu.json").read_text())


@pytest.mark.slow
def test_every_stage_runs_dry_and_none_fails(dry):
    done, whole = dry
    assert done.returncode == 0, done.stdout + done.stderr
    states = {name: about["state"] for name, about in whole["stages"].items()}
    skipped = {name for name, state in states.items() if state == "skipped"}
    assert skipped == {"stream", "tests", "nccl", "compile_tests"}, done.stdout  # there is no GPU
    assert set(states.values()) == {"ok", "skipped"}, done.stdout
    assert set(NEED_DALI) < set(states)
    assert len(states) == 19
    measured = {name: about["measured"] for name, about in whole["stages"].items()}
    assert measured["resume"]["resume"]["epochs"] > measured["resume"]["resume"]["stopped_after_epochs"] > 0
    assert measured["train"]["train_worst10"]["profile"]["largest"][0]["ms"] > 0
    assert all(row["verdict"] for row in whole["goals"])
    assert {row["what"] for row in whole["goals"] if row["value"] is None} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["ModuleNotFoundError(f'No module named {name!r}', name=name)", "OSError('no libcuda')"]
)
def test_without_dali_or_with_a_broken_one_all_that_can_runs(tmp_path, error):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.replace("{error}", error))
    out = tmp_path / "out"
    done = script(str(out), sys.executable, "--dry", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((out / "gpu.json").read_text())["stages"]
    for name, about in stages.items():
        if name in ("tests", "nccl", "compile_tests"):
            assert about["state"] == "skipped" and about["why"] == "no GPU"
        elif name in NEED_DALI:
            assert (about["state"], about["why"]) == ("skipped", "needs nvidia.dali")
        else:
            assert about["state"] == "ok", (name, about["why"])
    assert stages["eager"]["measured"]["dali_views"]["skipped"].startswith("needs nvidia.dali (")
    assert stages["eager"]["measured"]["triton_warp"]["ms"] > 0
