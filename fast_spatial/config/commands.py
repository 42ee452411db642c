"""The options of all commands except train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fast_spatial.config.fields import as_typed, check_fields, flag, option
from fast_spatial.config.modes import split_row
from fast_spatial.config.train import (
    DATA_FOLDER,
    EXCLUDE,
    TRANSLATE,
    BudgetOptions,
    LaunchOptions,
    check_limits,
    check_seed,
    check_sizes,
)
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.pipelines.folder import SPLITS

CHECKPOINT = "checkpoint of this project or the original code, or a plain state dict (.pt or .safetensors)"
VAL_FOLDER = "folder with val/, with a folder per class; or digits"
ARCH = "torchvision classifier; by default the checkpoint's, or resnet18"
IMAGE_SIZE = "image size in pixels (0: the checkpoint's evaluation size, or 224)"
# Default number of images of a landscape, over all classes.
DEFAULT_IMAGES = 100
BENCH_GROUPS = ("warp", "pipeline", "score", "step", "grid", "gpu", "all")
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class JudgeOptions(LaunchOptions):
    """Options that evaluations and landscapes share: model, images and attack."""

    checkpoint: str = option("", CHECKPOINT, section="data", metavar="FILE", required=True)
    data: str = option("", VAL_FOLDER, section="data", metavar="FOLDER", required=True)
    exclude: str = option("", EXCLUDE, section="data", metavar="FILE", identity=False)
    allow_partial_classes: bool = option(
        False, "accept a folder with fewer classes than the model has outputs", section="data"
    )
    degrees: float = option(30.0, "largest rotation, in degrees either way", section="attack")
    translate_px: float | None = option(None, TRANSLATE, section="attack", metavar="PX")
    arch: str = option("", ARCH, section="network", metavar="NAME")
    image_size: int = option(0, IMAGE_SIZE, section="evaluation", metavar="PX", minimum=0)
    dtype: str = option(
        "float32",
        "precision of the forward passes",
        section="evaluation",
        choices=("float32", "tf32", "bfloat16", "float16"),
    )
    views_per_forward: int = option(
        0, "views per forward pass (0: 1024 on a GPU, 2^20 pixels' worth on a CPU)", section="evaluation", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.degrees, self.translate_px)
        check_sizes(image_size=self.image_size)

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the attacks."""
        return SpatialLimits.from_px(self.degrees, self.translate_px)


@dataclass(frozen=True)
class EvaluateConfig(JudgeOptions):
    """Judge a checkpoint on natural, random, worst-of-10 and exhaustive (775-view) attacks."""

    max_images: int = option(
        0,
        "size of a fixed random subset of the images; the result is partial (0: all)",
        section="data",
        minimum=0,
        identity=False,
    )
    views: int = option(10, "number of random views in worst-of-10", section="attack", minimum=1)
    seed: int = option(
        0, "seed of the random views; all runs share the default, so that they compare", section="attack", minimum=0
    )
    grid: bool = option(True, "the exhaustive grid of 31 x 5 x 5 views", section="attack")
    grid_per_class: int = option(
        0, "images of every class that meet the grid, a fixed choice (0: all)", section="attack", minimum=0
    )
    grid_images: str = option(
        "",
        "file of the images that meet the grid, one path per line as in the JSON; the result is partial",
        section="attack",
        metavar="FILE",
    )
    flip: bool = option(
        False,
        "logits averaged over each view and its mirror image; deviates from the published protocol",
        section="evaluation",
    )
    batch_size_per_process: int = option(
        128, "images loaded at a time; verdicts do not depend on it", section="evaluation", minimum=1, identity=False
    )
    json: str = option(
        "", "file for the summary and every image's verdicts", section="output", metavar="FILE", identity=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.grid_per_class and (self.grid_images or not self.grid):
            other = "--grid-images" if self.grid else "--no-grid"
            raise UserError(f"--grid-per-class {self.grid_per_class} conflicts with {other}", "remove one of them")
        if self.grid_images and not self.grid:
            raise UserError(f"--grid-images {self.grid_images} conflicts with --no-grid", "remove one of them")


@dataclass(frozen=True)
class LandscapeConfig(JudgeOptions):
    """Judge all 775 views of a fixed, class-balanced subset: how loss and accuracy depend on angle and translation."""

    out: str = option(
        "",
        "folder for landscape.json, landscape.npz and sample pictures, such as the run's own",
        section="output",
        metavar="FOLDER",
        required=True,
    )
    images_per_class: int = option(
        0, "images of every class (0: enough for 100 in all, at least one)", section="data", minimum=0
    )

    @property
    def judged(self) -> EvaluateConfig:
        """The evaluation of the same model on the same folder."""
        return EvaluateConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(JudgeOptions)})


@dataclass(frozen=True)
class ReproduceConfig(BudgetOptions):
    """Train and evaluate the rows of the published table, and print ours beside it."""

    data: str = option("", DATA_FOLDER, section="data", metavar="FOLDER", required=True, identity=False)
    out: str = option(
        "",
        "folder of the reproduction: a run per row, results.json, report.html; finished rows are skipped",
        section="output",
        metavar="FOLDER",
        required=True,
        identity=False,
    )
    rows: tuple[str, ...] = option(
        (),
        "rows of the table, such as standard,random:30,worst10:40; by default all",
        section="attack",
        metavar="MODE[:DEGREES],...",
    )
    seeds: tuple[int, ...] = option((0,), "seeds; every row is trained once per seed", section="run", metavar="N,N,...")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise UserError("--seeds: at least one is needed")
        rows = [split_row(row) for row in self.rows]
        for name, values in (("rows", rows), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise UserError(f"{flag(name)} {as_typed(getattr(self, name))}: a value is given twice")


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.md from the folders of runs."""

    runs: tuple[str, ...] = option(
        (),
        "folders written by train or reproduce; may come first, without the flag",
        section="data",
        metavar="FOLDER",
        required=True,
    )
    out: str = option(
        "", "folder for the report; by default the run's, if there is one", section="output", metavar="FOLDER"
    )
    price: float = option(
        0.0, "price of a GPU-hour, in any currency (0: unknown)", section="output", metavar="MONEY", minimum=0
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.runs) > 1 and not self.out:
            raise UserError("missing required flag: --out, the folder for a report of several runs")


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's model for other programs; each file is read back and its logits compared."""

    checkpoint: str = option("", CHECKPOINT, section="data", metavar="FILE", required=True)
    arch: str = option("", ARCH, section="network", metavar="NAME")
    image_size: int = option(0, IMAGE_SIZE, section="network", metavar="PX", minimum=0)
    safetensors: str = option(
        "",
        "new file for torchvision's state dict, with the normalization in its metadata",
        section="output",
        metavar="FILE.safetensors",
    )
    onnx: str = option(
        "",
        "new file for a network on RGB images in [0, 1], float32 [N, 3, size, size], normalization included",
        section="output",
        metavar="FILE.onnx",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.safetensors and not self.onnx:
            raise UserError("missing required flag: --safetensors or --onnx")
        for name in ("safetensors", "onnx"):
            file = getattr(self, name)
            if file and not file.endswith(f".{name}"):
                raise UserError(f"{flag(name)} {file}: the name must end in .{name}")
        check_sizes(image_size=self.image_size)


@dataclass(frozen=True)
class CheckConfig:
    """Read and decode every file, and list what would end a run or change its result."""

    data: str = option("", DATA_FOLDER, section="data", metavar="FOLDER", required=True)
    splits: tuple[str, ...] = option(SPLITS, "splits to check", section="data", metavar="SPLIT,...")
    json: str = option("", "file for the findings", section="output", metavar="FILE")
    write_exclusions: str = option(
        "",
        "new file for the images that would end a run, and training images that are in val/ too; for --exclude of "
        "train, evaluate and reproduce",
        section="output",
        metavar="FILE",
    )
    workers: int = option(0, "decoding processes (0: one per CPU)", section="processes", minimum=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.splits or len({*self.splits} & {*SPLITS}) < len(self.splits):
            raise UserError(f"--splits {as_typed(self.splits)}: choose one or both of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class CalibrateConfig(LaunchOptions):
    """Measure the speed of trainings and evaluations on this machine; the basis of a plan.

    Attributes:
        trainings: configurations of trainings, as JSON values.
        sides: image sizes of the training views, in pixels.
        json: the file to write.
        seconds: minimum duration of each measurement.

    """

    trainings: tuple[dict[str, Any], ...] = ()
    sides: tuple[int, ...] = ()
    json: str = ""
    seconds: float = 1.0


@dataclass(frozen=True)
class BenchConfig:
    """Measure the hot parts of training and evaluation side by side with what they replace."""

    what: str = option(
        "all",
        "what to measure: warps, the pipeline from files to views, scoring of views, a training step, the grid attack, "
        "rates on GPUs, or all; may come first, without the flag",
        section="run",
        choices=BENCH_GROUPS,
    )
    data: str = option(
        SYNTHETIC,
        "folder with train/ and val/, digits, or synthetic: JPEG files of ImageNet's size, made once",
        section="data",
        metavar="FOLDER",
    )
    checkpoint: str = option(
        "",
        "model for grid and score, with its images at --data; by default a small one, trained once on the digits",
        section="data",
        metavar="FILE",
    )
    read_latency_ms: float = option(
        0.0, "pipeline: simulated disk latency per file, in ms (needs a C compiler)", section="data", minimum=0
    )
    image_size: int = option(
        224, "image size in pixels (grid: the checkpoint's)", section="run", metavar="PX", minimum=16
    )
    rounds: int = option(7, "rounds in which all contenders take turns; results are medians", section="run", minimum=1)
    seconds: float = option(1.0, "seconds per contender and round; at least one batch", section="run")
    grid_images: int = option(
        16, "grid: images per round; at 224 pixels without a GPU, 2 take a minute", section="run", minimum=1
    )
    ffcv_python: str = option(
        "", "pipeline: Python of an environment with FFCV, to compare with", section="run", metavar="FILE"
    )
    json: str = option(
        "", "file for the comparisons, with hardware, versions and commit", section="output", metavar="FILE"
    )
    workers: int = option(
        0, "our threads, and torchvision's worker processes (0: one per CPU)", section="processes", minimum=0
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_sizes(image_size=self.image_size)
        if self.read_latency_ms and self.what != "pipeline":
            raise UserError(f"--read-latency-ms {self.read_latency_ms:g}: requires bench pipeline")
        if self.seconds <= 0:
            raise UserError(f"--seconds {self.seconds:g}: must be more than 0")
        if self.checkpoint and self.data == SYNTHETIC:
            raise UserError(f"--checkpoint {self.checkpoint}: requires --data, the folder of its images")


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes, and the options that each sets."""


@dataclass(frozen=True)
class DoctorConfig:
    """Report what this machine can do, what is missing, and the line that fixes it."""

    data: str = option(
        "", "folder of images to look at too: its layout and how fast it is read", section="data", metavar="FOLDER"
    )
    out: str = option("", "folder that results shall be written to", section="output", metavar="FOLDER")
    json: str = option("", "file for the findings, with versions and hardware", section="output", metavar="FILE")
