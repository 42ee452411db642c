"""The parts that have run on a GPU, according to the result files of `benchmarks/gpu.sh`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.on_gpu.goals import measurements


@dataclass(frozen=True)
class Part:
    """A part of the program that needs a GPU test.

    Attributes:
        what: description, with its modules.
        stages: the stages whose measurements show that it runs; empty: none does.
        pattern: regular expression of these measurements' names.
        figure: a figure that they must have.

    """

    what: str
    stages: tuple[str, ...] = ()
    pattern: str = ".*"
    figure: str = ""


_MEMORY = ("eager", "compiled")
PARTS = (
    Part("the decoder probe (`pipelines/inspection/probe.py`)", ("decoder",), "decoder", "note"),
    Part("decoding on the GPU (`pipelines/graph.py`)", ("loader",), r"loader_.*_gpu.*", "images_per_sec"),
    Part("DALI's warp (`dali_views` in `pipelines/ops.py`)", ("eager",), "dali_views", "ms"),
    Part(
        "the stream's pixels, compared with the CPU's (`pipelines/loader.py`)", ("stream",), r"test_the_gpu_stream_.*"
    ),
    Part("the Triton kernels (`kernels/warp_cuda.py`)", ("eager",), r"triton_.*", "ms"),
    Part(
        "the Triton kernels' results, compared with the reference",
        ("tests", "stream"),
        r"test_the_gpu_warp_is_the_reference.*|test_views_are_normalized_.*|test_the_gpu_stream_.*triton.*",
    ),
    Part("training in half precision (`fast_spatial/training/step.py`)", ("eager",), r"train_.*", "images_per_sec"),
    Part(
        "evaluation in half precision (`fast_spatial/evaluation/forward.py`)", ("eager",), r"score_.*", "views_per_sec"
    ),
    Part(
        "the evaluation network's stem by pixel blocks (`fast_spatial/evaluation/fused.py`)",
        ("eager",),
        r"stem_by_blocks",
        "fused_ms",
    ),
    Part("max pooling without indices (`kernels/pool_cuda.py`)", ("eager",), r"max_pool_.*", "fused_ms"),
    Part("`GradScaler`, and training steps in every dtype", ("tests",), r"test_steps_lower_the_loss_in_every_dtype.*"),
    Part("`torch.compile` of the trained network", ("compiled",), r"train_.*", "ms"),
    Part("`launch.py train` from files", ("train",), r"train_.*", "images_per_sec"),
    Part("the measured wait for data (`fast_spatial/runtime/waiting.py`)", ("train",), r"train_.*", "data_wait_pct"),
    Part("the exhaustive attack (`fast_spatial/evaluation/attack.py`)", ("grid",), r"grid_.*", "views_per_sec"),
    Part("`fast_spatial.evaluate`, compared with the CPU", ("tests",), r"test_a_model_is_judged_.*"),
    Part(
        "NCCL and DDP with one process (`fast_spatial/runtime/distributed.py`)",
        ("nccl", "compile_tests"),
        r"test_nccl_.*",
    ),
    Part("stop and resume of a run (`fast_spatial/training/run_folder.py`)", ("resume",), "resume", "top1_pct"),
    Part(
        "a reproduction within a budget (`fast_spatial/budget/active_plan.py`)", ("reproduce",), "reproduce", "took_sec"
    ),
    Part("`launch.py export`", ("export",), r".*", "bytes"),
    Part("the query of nvJPEG (`fast_spatial/tools/doctor_checks.py`)", ("doctor",), "doctor", "jpeg_decoder"),
    Part("the energy meter (`fast_spatial/runtime/energy.py`)", ("train",), r"train_.*", "energy_kwh"),
    Part("NCCL between GPUs (`benchmarks/processes.py`)"),
    Part("apex (`fast_spatial/training/optim.py`)"),
)


def state(part: Part, result: dict[str, Any]) -> str:
    """State of a part: "ran", "ran in part", "failed", "cut off" or "untried"."""
    found = [figures for _, figures in measurements(result, part.stages, part.pattern)]
    wrong = any("error" in figures or figures.get("outcome") == "failed" for figures in found)
    right = any(part.figure in figures if part.figure else figures.get("outcome") == "passed" for figures in found)
    if right:
        return "ran in part" if wrong else "ran"
    cut_off = any(result["stages"].get(stage, {}).get("state") == "cut off" for stage in part.stages)
    return "failed" if wrong else "cut off" if cut_off else "untried"


def what_ran(results: Sequence[dict[str, Any]]) -> str:
    """The lists of docs/gpu.md, from all result files."""
    if not results:
        everything = "\n".join(f"- {part.what}" for part in PARTS)
        return f"**No part has run on a GPU yet.** Not tried:\n\n{everything}"
    paragraphs = []
    for result in results:
        about = result["environment"]
        named = {"ran": "Ran", "ran in part": "Ran in part and failed in part", "failed": "**Failed**"}
        named["cut off"] = "Cut off without a result"
        for kind, word in named.items():
            parts = [part.what for part in PARTS if state(part, result) == kind]
            if parts:
                listed = "\n".join(f"- {what}" for what in parts)
                paragraphs.append(f"{word} on {', '.join(about['gpus'])} with {versions(about)}:\n\n{listed}")
    untried = [part.what for part in PARTS if all(state(part, result) == "untried" for result in results)]
    if untried:
        paragraphs.append("Not tried on any GPU:\n\n" + "\n".join(f"- {what}" for what in untried))
    return "\n\n".join(paragraphs)


def versions(about: dict[str, Any]) -> str:
    """The versions of a result's main packages, as text."""
    names = {"torch": "torch", "triton": "Triton", "nvidia-dali-cuda130": "DALI", "nvidia-dali-cuda120": "DALI"}
    return ", ".join(f"{word} {about['versions'][name]}" for name, word in names.items() if name in about["versions"])
