"""The options of every other command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fast_spatial.config.fields import (
    check_at_least,
    check_choice,
    check_given,
    check_seed,
    check_side,
    flag,
    limits_of,
    option,
)
from fast_spatial.config.modes import SPLITS, split_row
from fast_spatial.config.train import BudgetOptions, LaunchOptions
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import SpatialLimits


@dataclass(frozen=True)
class EvaluateConfig(LaunchOptions):
    """Judge a checkpoint on natural, random, worst-of-10 and exhaustive (775-view) attacks, in one pass."""

    checkpoint: str = option("", "ours, the original code's, or a plain state dict (.pt or .safetensors)")
    data: str = option("", "folder with val/ (a folder per class), or digits")
    json: str = option("", "write the summary and every image's verdicts to this file", identity=False)
    degrees: float = option(30.0, "largest rotation, either way")
    translate_px: float | None = option(
        None, "largest translation, pixels at side 224; default 24 for 30 degrees, 32 for 40"
    )
    views: int = option(10, "random views of worst-of-10")
    grid: bool = option(True, "also the exhaustive grid of 31 x 5 x 5 views")
    side: int = option(0, "side of the views, pixels; 0: the one the checkpoint was judged at, or 224")
    flip: bool = option(False, "average the logits of every view and of its mirror image (not the published protocol)")
    arch: str = option("", "a torchvision classifier; default the checkpoint's, or resnet18")
    dtype: str = option("float32", "arithmetic of the verdicts", choices=("float32", "tf32", "bfloat16", "float16"))
    seed: int = option(0, "another seed draws other random views; every run uses the same unless told otherwise")
    exclude: str = option(
        "", "file of images to leave out, a path per line, as `check --write-exclusions` writes it", identity=False
    )
    max_images: int = option(0, "judge only so many images (the result is partial); 0: all", identity=False)
    grid_images: str = option("", "file of paths (as in the JSON, one a line): only these meet the grid (partial)")
    grid_per_class: int = option(0, "only so many images of every class, a fixed choice, meet the grid; 0: all")
    allow_partial_classes: bool = option(False, "the folder may hold fewer classes than the model has outputs")
    batch_size_per_process: int = option(128, "images loaded at a time; never changes a verdict", identity=False)
    judge_batch: int = option(0, "views in one forward pass; 0: 1024 on a GPU, 2^20 pixels' worth on a CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given(self, "checkpoint", "data")
        check_choice(self, "dtype")
        self.limits  # noqa: B018
        check_at_least(self, 1, "views", "batch_size_per_process")
        check_at_least(
            self, 0, "side", "seed", "max_images", "grid_per_class", "judge_batch", "workers", "nproc_per_node"
        )
        check_seed(self)
        if self.grid_per_class and (self.grid_images or not self.grid):
            other = (
                "--grid-images names the images that meet the grid, too" if self.grid else "--no-grid leaves it away"
            )
            raise UserError(f"--grid-per-class {self.grid_per_class}: {other}", "give one of the two")
        check_side(self)

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the attacks."""
        return limits_of(self)


@dataclass(frozen=True)
class LandscapeConfig(LaunchOptions):
    """Judge all 775 views of a fixed, class-balanced subset: how loss and accuracy depend on angle and translation."""

    checkpoint: str = option("", "ours, the original code's, or a plain state dict (.pt or .safetensors)")
    data: str = option("", "folder with val/ (a folder per class), or digits")
    out: str = option("", "folder for landscape.json, landscape.npz and sample pictures, such as the run's own")
    images_per_class: int = option(0, "images of every class; 0: enough for 100 in all, at least one")
    degrees: float = option(30.0, "largest rotation, either way")
    translate_px: float | None = option(
        None, "largest translation, pixels at side 224; default 24 for 30 degrees, 32 for 40"
    )
    side: int = option(0, "side of the views, pixels; 0: the checkpoint's, or 224")
    arch: str = option("", "a torchvision classifier; default the checkpoint's, or resnet18")
    dtype: str = option("float32", "arithmetic of the network", choices=("float32", "tf32", "bfloat16", "float16"))
    exclude: str = option("", "file of images to leave out, a path per line, as `check --write-exclusions` writes it")
    allow_partial_classes: bool = option(False, "the folder may hold fewer classes than the model has outputs")
    judge_batch: int = option(0, "views in one forward pass; 0: 1024 on a GPU, 2^20 pixels' worth on a CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given(self, "checkpoint", "data", "out")
        check_choice(self, "dtype")
        self.limits  # noqa: B018
        check_at_least(self, 0, "images_per_class", "side", "judge_batch", "workers", "nproc_per_node")
        check_side(self)

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the grid."""
        return limits_of(self)

    @property
    def judged(self) -> EvaluateConfig:
        """The evaluation of the same model on the same folder."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(EvaluateConfig)}
        return EvaluateConfig(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.md from what runs left in their folders."""

    runs: tuple[str, ...] = option((), "folders of train or reproduce; may come first, without their flag")
    out: str = option("", "folder for the report; default the run's, if it is one")
    price: float = option(0.0, "price of a GPU-hour, in a currency of your choice; 0: not told")

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("a folder of train or reproduce is needed, as in launch.py report /runs/table")
        if len(self.runs) > 1 and not self.out:
            raise UserError("--out is needed: where the report of several runs goes")
        check_at_least(self, 0, "price")


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's model for other programs; each file is read back, and its logits are compared."""

    checkpoint: str = option("", "ours, the original code's, or a plain state dict (.pt or .safetensors)")
    safetensors: str = option("", "write torchvision's state dict to this new file; normalization is in its metadata")
    onnx: str = option(
        "", "write a network that takes RGB images in [0, 1], float32 [N, 3, side, side], and normalizes by itself"
    )
    side: int = option(0, "side of the images, pixels; 0: the checkpoint's, or 224")
    arch: str = option("", "a torchvision classifier; default the checkpoint's, or resnet18")

    def __post_init__(self) -> None:
        check_given(self, "checkpoint")
        if not self.safetensors and not self.onnx:
            raise UserError("--safetensors or --onnx is needed: the file to write, or both")
        for name in ("safetensors", "onnx"):
            file = getattr(self, name)
            if file and not file.endswith(f".{name}"):
                raise UserError(f"{flag(name)} {file}: the name must end in .{name}")
        check_at_least(self, 0, "side")
        check_side(self)


@dataclass(frozen=True)
class CheckConfig:
    """Read and decode every file, and list what would end a run or change its result."""

    data: str = option("", "folder with train/ and val/ (a folder per class), or digits")
    splits: tuple[str, ...] = option(SPLITS, "which splits, separated by commas")
    json: str = option("", "write the report to this file")
    write_exclusions: str = option(
        "",
        "write the files that would end a run, and the training images that are in val/ too, to this new file, "
        "for --exclude of train, evaluate and reproduce",
    )
    workers: int = option(0, "decoding processes; 0: one per CPU, at most 4 on a GPU")

    def __post_init__(self) -> None:
        check_given(self, "data")
        check_at_least(self, 0, "workers")
        if not self.splits or len({*self.splits} & {*SPLITS}) < len(self.splits):
            raise UserError(f"--splits {','.join(self.splits)}: choose one or both of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class CalibrateConfig(LaunchOptions):
    """Measure how fast trainings, and the judging of their models, are here; what a plan is made from.

    Attributes:
        trainings: as JSON values.
        sides: of the training views, pixels.
        json: the file to write.
        seconds: how long each is timed, at the least.

    """

    trainings: tuple[dict[str, Any], ...] = ()
    sides: tuple[int, ...] = ()
    json: str = ""
    seconds: float = 1.0


BENCH_GROUPS = ("warp", "pipeline", "score", "step", "grid", "gpu", "all")
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class BenchConfig:
    """Measure the hot parts of training and evaluation side by side with what they replace."""

    what: str = option(
        "all",
        "the part: warps, the pipeline from files to views, scoring of views, a training step, the grid attack, "
        "or rates on GPUs; may come first, without its flag",
        choices=BENCH_GROUPS,
    )
    data: str = option(
        SYNTHETIC, "folder with train/ and val/, digits, or synthetic: JPEG files of ImageNet's size, made once"
    )
    json: str = option("", "write the comparisons, with hardware, versions and commit, to this file")
    checkpoint: str = option(
        "",
        "a model for grid and score, its images at --data; default a small one, trained once on the digits",
    )
    rounds: int = option(7, "rounds, in each of which ours and the others take turns; results are medians over them")
    seconds: float = option(1.0, "seconds that each is timed in a round; at least one batch")
    side: int = option(224, "side of the views, pixels (the grid's: the checkpoint's)")
    grid_images: int = option(16, "grid: images in a round; at 224 pixels without a GPU, 2 take a minute")
    workers: int = option(0, "threads of ours, and worker processes of torchvision; 0: one per CPU")
    read_latency_ms: float = option(
        0.0, "pipeline: pretend that every file takes so many ms to come from the disk (needs a C compiler)"
    )
    ffcv_python: str = option(
        "", "pipeline: also compare with FFCV; a Python that has it, in an environment of its own"
    )

    def __post_init__(self) -> None:
        check_choice(self, "what")
        check_at_least(self, 1, "rounds", "grid_images")
        check_at_least(self, 16, "side")
        check_side(self)
        check_at_least(self, 0, "workers")
        if self.read_latency_ms < 0 or (self.read_latency_ms and self.what != "pipeline"):
            raise UserError(
                f"--read-latency-ms {self.read_latency_ms:g}: it must be at least 0, and is for bench pipeline alone"
            )
        if self.seconds <= 0:
            raise UserError(f"--seconds {self.seconds:g}: it must be more than 0")
        if self.checkpoint and self.data == SYNTHETIC:
            raise UserError(f"--checkpoint {self.checkpoint}: its images are needed; name their folder with --data")


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes, and what each costs on this machine."""

    data: str = option("", "folder with train/ and val/, or digits: their number of images; default ImageNet's")
    seconds: float = option(1.0, "how long each kind of step is timed, at the least")

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise UserError(f"--seconds {self.seconds:g}: it must be more than 0")


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine can do, what is missing, and what to do about it."""

    data: str = option("", "also look at this folder of images: its layout, and how fast it is read")
    out: str = option("", "also look whether results can be written to this folder")
    json: str = option("", "write the findings, with versions and hardware, to this file")


# As many images as make the 95 % interval of an accuracy at most 20 points wide; minutes on a CPU.
DEFAULT_IMAGES = 100


@dataclass(frozen=True)
class ReproduceConfig(BudgetOptions):
    """Train and evaluate the rows of the published table, and print ours beside it."""

    data: str = option("", "folder with train/ and val/ (a folder per class), or digits")
    out: str = option("", "folder of the reproduction: a run per row, results.json; rows already there are skipped")
    rows: tuple[str, ...] = option((), "rows as MODE:DEGREES, separated by commas; default all of the table")
    seeds: tuple[int, ...] = option((0,), "train every row once per seed, separated by commas")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "out"):
            if not getattr(self, name):
                raise UserError(f"--{name} is needed")
        if not self.seeds:
            raise UserError("--seeds: at least one is needed")
        rows = [split_row(row) for row in self.rows]
        for name, values in (("rows", rows), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise UserError(f"--{name} {','.join(map(str, getattr(self, name)))}: one of them is named twice")
