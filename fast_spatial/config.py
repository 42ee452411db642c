"""What can be asked for: the modes and every option, as flat frozen dataclasses.

Imports neither torch nor numba, so that help and errors about options are instant. Raw strings from the command line
become typed values here and nowhere else; a bad one is a ValueError that names the flag, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kernels.limits import MAX_SIDE, NOMINAL_SIDE, SpatialLimits
from pipelines.placement import DECODERS, WARPS

MAX_SEED = 2**31 - 1

DIGITS = "digits"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Mode:
    """How a model is trained: the crop and the views the pipeline emits. Nothing branches on the mode after this.

    Attributes:
        center: Resize(256) and CenterCrop(224) instead of RandomResizedCrop.
        untouched: whether the first view is the untouched image.
        warps: the number of randomly warped views; None means the `--views` option.

    """

    center: bool
    untouched: bool
    warps: int | None


MODES = {
    "nocrop": Mode(center=True, untouched=True, warps=0),
    "standard": Mode(center=False, untouched=True, warps=0),
    "random": Mode(center=False, untouched=False, warps=1),
    "worst10": Mode(center=False, untouched=True, warps=None),
}

# Top-1 accuracy in percent, ResNet-18 on ImageNet, judged at 30 degrees / 24 px: (mode, degrees) to natural, random,
# worst-of-10 and grid, from "Exploring the Landscape of Spatial Robustness" (degrees 0: trained without warps).
PUBLISHED = {
    ("standard", 0.0): (71.3, 60.6, 39.9, 20.9),
    ("nocrop", 0.0): (65.4, 54.1, 30.5, 11.8),
    ("random", 30.0): (68.9, 68.0, 54.6, 38.1),
    ("random", 40.0): (68.3, 67.7, 54.9, 38.8),
    ("worst10", 30.0): (69.1, 68.0, 59.4, 48.1),
    ("worst10", 40.0): (68.6, 67.2, 59.3, 48.4),
}

SCHEDULES = ("milestones", "linear")
# The options that are a budget each.
BUDGETS = ("hours", "gpu_hours", "budget", "until")
SIDE_STEP = 16  # progressive sides are so many pixels apart, or twice as many
DTYPES = ("auto", "bfloat16", "float16", "float32", "tf32")
# Fields that may change between the parts of one run: where and how it runs, not what it computes.
_NOT_IDENTITY = "not_identity"


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), identity: bool = True) -> Any:
    """A dataclass field that is an option of the command line; `identity` marks what decides a run's numbers."""
    return field(default=default, metadata={"help": help, "choices": choices, _NOT_IDENTITY: not identity})


@dataclass(frozen=True)
class LaunchOptions:
    """How processes are started."""

    nproc_per_node: int = option(0, "processes on this node; 0: one per GPU, or one without a GPU", identity=False)
    nnodes: str = option("1", "number of nodes, or MIN:MAX, as torchrun takes it", identity=False)
    node_rank: int = option(0, "this node's rank, with static rendezvous", identity=False)
    rdzv_backend: str = option("c10d", "rendezvous backend of torchrun", identity=False)
    rdzv_endpoint: str = option("", "HOST:PORT of the rendezvous; needed for several nodes", identity=False)
    rdzv_id: str = option("fast_spatial", "name of the job at the rendezvous", identity=False)
    max_restarts: int = option(0, "how often torchrun restarts all processes after one failed", identity=False)
    in_process: bool = option(False, "run in this process, without torchrun, for a debugger", identity=False)
    stall_minutes: float = option(
        20.0, "no progress for so long: every process prints its stacks and the run ends", identity=False
    )
    workers: int = option(0, "decoding threads per process; 0: this process's share of the CPUs", identity=False)
    decode: str = option(
        "auto",
        "where JPEG files are decoded; gpu: the region that a crop needs; gpu-full: whole images; cpu: the region, on "
        "CPUs; auto: the first that is right when tried on this GPU. Naming one skips the trial",
        choices=("auto", *DECODERS),
        identity=False,
    )
    warp: str = option(
        "auto",
        "what makes the rotated views: DALI's operators, our Triton kernels on a GPU, or our CPU kernels (numba), for "
        "images decoded on CPUs; auto: dali on GPUs, numba on CPUs",
        choices=("auto", *WARPS),
        identity=False,
    )

    def __post_init__(self) -> None:
        _choice(self, "decode", "warp")


@dataclass(frozen=True)
class BudgetOptions(LaunchOptions):
    """What may be spent."""

    hours: float | None = option(
        None,
        "budget: hours in use, from start to end of the command; a restart counts on, the time between does not",
        identity=False,
    )
    gpu_hours: float | None = option(None, "budget: hours in use times GPUs", identity=False)
    budget: float | None = option(None, "budget: money, at --price", identity=False)
    price: float = option(0.0, "price of a GPU-hour, in a currency of your choice; 0: not told", identity=False)
    until: str = option(
        "", "budget: be done by this time of the clock, as in 18:30 or 2030-01-31T06:00", identity=False
    )
    plan_only: bool = option(
        False,
        "measure, print and write down (OUT/plan.json) what would be done with the budget, and stop",
        identity=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 0, "price")
        given = [flag(name) for name in BUDGETS if getattr(self, name) not in (None, "")]
        for name in ("hours", "gpu_hours", "budget"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{flag(name)} {value:g}: it must be more than 0")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one budget")
        if self.budget and not self.price:
            raise ValueError(f"--budget {self.budget:g}: the price of a GPU-hour is needed, too; add --price")
        if self.plan_only and not given:
            raise ValueError(f"--plan-only: there is nothing to plan; add one of {', '.join(map(flag, BUDGETS))}")

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget."""
        return any(getattr(self, name) not in (None, "") for name in BUDGETS)


@dataclass(frozen=True)
class TrainConfig(BudgetOptions):
    """Train one model. The defaults are the reference recipe (110 epochs of ImageNet, ResNet-18)."""

    data: str = option(
        "",
        "folder with train/ and val/ (a folder per class), or digits, which bring a small recipe of their own",
        identity=False,  # the images are: a run's folder knows which they were
    )
    out: str = option(
        "", "folder of this run: checkpoints, logs; created, or continued if it is the same run", identity=False
    )
    mode: str = option("", "how to train", choices=tuple(MODES))
    recipe: str = option(
        "",
        "values of options, which flags override: a name (`launch.py recipes` lists them) or a TOML file; "
        "default reference, digits for --data digits, or one that suits a budget",
        identity=False,  # its values are
    )
    degrees: float = option(30.0, "largest rotation of random and worst10, either way")
    translate_px: float | None = option(
        None, "largest translation, pixels at side 224; default 24 for 30 degrees, 32 for 40"
    )
    views: int = option(10, "random views that compete in worst10, besides the untouched image")
    epochs: int = option(110, "passes over the training images")
    global_batch_size: int = option(256, "images per step over all processes")
    lr: float = option(0.1, "the highest learning rate")
    schedule: str = option(
        "milestones",
        "milestones: the learning rate drops at epochs; linear: it rises to --lr step by step and falls to 0",
        choices=SCHEDULES,
    )
    milestones: tuple[int, ...] = option((30, 60, 85, 95, 105), "epochs at whose start the learning rate drops")
    gamma: float = option(0.1, "factor of each drop")
    warmup_epochs: float = option(0.0, "linear schedule: epochs in which the learning rate rises from 0")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay")
    bn_weight_decay: bool = option(
        True, "also decay parameters of one dimension: BatchNorm's and biases (the reference does)"
    )
    label_smoothing: float = option(
        0.0, "share of the training target spread over all classes; worst views and logs keep the plain loss"
    )
    ema: float = option(
        0.0, "judge and save as best a moving average of the weights: what it keeps of itself in a step; 0: off"
    )
    optimizer: str = option("sgd", "torch's fused SGD, or FusedSGD of NVIDIA's apex", choices=("sgd", "apex"))
    arch: str = option("resnet18", "a torchvision classifier")
    blurpool: bool = option(
        False, "blur before convolutions with a stride (BlurPool); it changes the robustness that is being measured"
    )
    side: int = option(224, "side of the training views, pixels, and of the evaluation's without --eval-side")
    start_side: int = option(
        0, "progressive sides: train on views of this side first, on those of --side from three quarters on; 0: never"
    )
    eval_side: int = option(0, "side of the evaluation's views; 0: --side")
    eval_flip: bool = option(False, "evaluations average the logits of every view and of its mirror image")
    crop_scale: tuple[float, float] = option((0.08, 1.0), "area of RandomResizedCrop, share of the image: MIN,MAX")
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "aspect ratio of RandomResizedCrop: MIN,MAX")
    flip_prob: float = option(0.5, "probability of a horizontal flip")
    jitter: tuple[float, float, float] = option((0.1, 0.1, 0.1), "brightness, contrast, saturation of ColorJitter")
    lighting: float = option(0.05, "standard deviation of the PCA lighting")
    bn_group: int = option(0, "BatchNorm over groups of so many images (the reference: 32); 0: each process's batch")
    dtype: str = option(
        "auto",
        "arithmetic of training; auto: bfloat16 where the hardware has it, else float16 on a GPU, float32 on a CPU",
        choices=DTYPES,
        identity=False,  # what it came to is, and stands in the checkpoint
    )
    accumulate: int = option(1, "split each process's batch into so many parts, for small GPUs")
    score_chunk: int = option(
        0, "views judged in one forward pass; 0: on GPUs all of a batch, less if memory runs out", identity=False
    )
    score_side: int = option(0, "choose the worst view from a forward pass at this smaller side; 0: at --side")
    compile: str = option(
        "auto",
        "let torch.compile fuse the trained network, and the judging one where cuDNN cannot (on CPUs it needs a C++ "
        "compiler); auto: on GPUs; never if --deterministic",
        choices=("auto", "true", "false"),
        identity=False,
    )
    seed: int = option(0, "seed of the weights and of every draw of the stream")
    classes: int = option(0, "pilot run: only the first so many classes; 0: all")
    max_train_images: int = option(0, "pilot run: only so many training images; 0: all")
    exclude: str = option(
        "", "file of images to leave out, a path per line, as `check --write-exclusions` writes it", identity=False
    )
    deterministic: bool = option(False, "repeatable to the bit on one kind of machine, slower on GPUs")
    resume: str = option(
        "auto",
        "auto: continue the run that --out holds, if it is the same one; never: refuse a folder that holds a run",
        choices=("auto", "never"),
        identity=False,
    )
    replay: str = option(
        "",
        "folder of a training that kept to a budget: repeat it step by step, its lengths of segments included",
        identity=False,  # the segments are
    )
    checkpoint_every: str = option(
        "15min",
        "save after every so many steps (500) or minutes (15min), besides the ends of epochs; 0: only there",
        identity=False,
    )
    on_bad_image: str = option(
        "stop",
        "what to do about a training image that cannot be decoded: name it and stop, or skip it, which takes the next "
        "image of the data set in its place; evaluations always stop",
        choices=("stop", "skip"),
        identity=False,
    )
    max_bad_images: int = option(50, "stop if more training images than so many had to be skipped", identity=False)
    eval_every: int = option(
        1, "evaluate after every so many epochs, and after the last; 0: only after the last", identity=False
    )
    log_every: int = option(20, "steps between updates of the progress bar and TensorBoard", identity=False)
    profile: int = option(
        0, "trace so many steps after the tenth into OUT/profile.json, for a trace viewer", identity=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _needed(self, "data", "mode", "out")
        if self.replay and self.is_limited:
            raise ValueError(f"--replay {self.replay}: it repeats what a budget came to; leave the budget away")
        _choice(self, "mode", "schedule", "dtype", "optimizer", "compile", "resume", "on_bad_image")
        self.limits, self.checkpoint_steps  # noqa: B018  (validates them)
        _at_least(self, 1, "epochs", "global_batch_size", "accumulate", "views", "log_every", "side")
        _at_least(self, 0, "lr", "momentum", "weight_decay", "lighting", "bn_group", "score_chunk", "classes")
        _at_least(
            self,
            0,
            "max_train_images",
            "eval_every",
            "workers",
            "nproc_per_node",
            "seed",
            "profile",
            "gamma",
            "max_bad_images",
            "warmup_epochs",
            "start_side",
            "eval_side",
        )
        _seed(self)
        _side(self)
        smallest = "start_side" if self.start_side else "side"
        if self.start_side and (self.start_side >= self.side or (self.side - self.start_side) % SIDE_STEP):
            raise ValueError(
                f"--start-side {self.start_side}: it must be below --side {self.side}, by a multiple of {SIDE_STEP}"
            )
        if self.score_side and not 8 <= self.score_side < getattr(self, smallest):
            raise ValueError(
                f"--score-side {self.score_side}: it must be at least 8 and below {flag(smallest)} "
                f"{getattr(self, smallest)}"
            )
        if self.warmup_epochs and self.schedule != "linear":
            raise ValueError(f"--warmup-epochs {self.warmup_epochs:g}: it is for --schedule linear")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs:g}: it must be below --epochs {self.epochs}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(self, name):g}: it must be at least 0 and below 1")
        if self.classes == 1:
            raise ValueError("--classes 1: a classifier needs at least 2")
        if self.momentum >= 1:
            raise ValueError(f"--momentum {self.momentum:g}: it must be below 1")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"--milestones {_show(self.milestones)}: they must increase")
        for name, low, high in (("crop_scale", 0.0, 1.0), ("crop_ratio", 0.0, 100.0)):
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                raise ValueError(f"{flag(name)} {_show((first, last))}: expected {low:g} < MIN <= MAX <= {high:g}")
        if not 0 <= self.flip_prob <= 1:
            raise ValueError(f"--flip-prob {self.flip_prob:g}: a probability lies between 0 and 1")
        if min(self.jitter) < 0 or max(self.jitter) > 1:
            raise ValueError(f"--jitter {_show(self.jitter)}: each must lie between 0 and 1")

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the training attack."""
        return _limits(self)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints; 0: they come by time, or with epochs alone."""
        return self._checkpoint_interval()[0]

    @property
    def checkpoint_sec(self) -> float:
        """Seconds between checkpoints; 0: they come by steps, or with epochs alone."""
        return self._checkpoint_interval()[1]

    def _checkpoint_interval(self) -> tuple[int, float]:
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)min", self.checkpoint_every)
        if found is None:
            raise ValueError(
                f"--checkpoint-every {self.checkpoint_every}: expected a number of steps, as in 500, or minutes, "
                f"as in 15min"
            )
        return int(found[1] or 0), 60 * float(found[2] or 0)

    def is_compiled(self, *, on_gpu: bool) -> bool:
        """Whether torch.compile is to fuse the networks."""
        return (self.compile == "true" or (self.compile == "auto" and on_gpu)) and not self.deterministic

    def view_limits(self) -> Any:
        """Each training view's limits, float64 [V, 2]."""
        from kernels.sampling import view_limits  # imports numba

        mode = MODES[self.mode]
        warps = self.views if mode.warps is None else mode.warps
        return view_limits(
            warps, untouched_first=mode.untouched, degrees=self.limits.degrees, translate=self.limits.translate
        )


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
        _needed(self, "checkpoint", "data")
        _choice(self, "dtype")
        self.limits  # noqa: B018
        _at_least(self, 1, "views", "batch_size_per_process")
        _at_least(self, 0, "side", "seed", "max_images", "grid_per_class", "judge_batch", "workers", "nproc_per_node")
        _seed(self)
        if self.grid_per_class and (self.grid_images or not self.grid):
            other = (
                "--grid-images names the images that meet the grid, too" if self.grid else "--no-grid leaves it away"
            )
            raise ValueError(f"--grid-per-class {self.grid_per_class}: {other}\ngive one of the two")
        _side(self)

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the attacks."""
        return _limits(self)


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
        _needed(self, "checkpoint", "data", "out")
        _choice(self, "dtype")
        self.limits  # noqa: B018
        _at_least(self, 0, "images_per_class", "side", "judge_batch", "workers", "nproc_per_node")
        _side(self)

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the grid."""
        return _limits(self)

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
            raise ValueError("a folder of train or reproduce is needed, as in launch.py report /runs/table")
        if len(self.runs) > 1 and not self.out:
            raise ValueError("--out is needed: where the report of several runs goes")
        _at_least(self, 0, "price")


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
        _needed(self, "checkpoint")
        if not self.safetensors and not self.onnx:
            raise ValueError("--safetensors or --onnx is needed: the file to write, or both")
        for name in ("safetensors", "onnx"):
            file = getattr(self, name)
            if file and not file.endswith(f".{name}"):
                raise ValueError(f"{flag(name)} {file}: the name must end in .{name}")
        _at_least(self, 0, "side")
        _side(self)


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
        _needed(self, "data")
        _at_least(self, 0, "workers")
        if not self.splits or len({*self.splits} & {*SPLITS}) < len(self.splits):
            raise ValueError(f"--splits {','.join(self.splits)}: choose one or both of {', '.join(SPLITS)}")


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
        _choice(self, "what")
        _at_least(self, 1, "rounds", "grid_images")
        _at_least(self, 16, "side")
        _side(self)
        _at_least(self, 0, "workers")
        if self.read_latency_ms < 0 or (self.read_latency_ms and self.what != "pipeline"):
            raise ValueError(
                f"--read-latency-ms {self.read_latency_ms:g}: it must be at least 0, and is for bench pipeline alone"
            )
        if self.seconds <= 0:
            raise ValueError(f"--seconds {self.seconds:g}: it must be more than 0")
        if self.checkpoint and self.data == SYNTHETIC:
            raise ValueError(f"--checkpoint {self.checkpoint}: its images are needed; name their folder with --data")


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes, and what each costs on this machine."""

    data: str = option("", "folder with train/ and val/, or digits: their number of images; default ImageNet's")
    seconds: float = option(1.0, "how long each kind of step is timed, at the least")

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"--seconds {self.seconds:g}: it must be more than 0")


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine can do, what is missing, and what to do about it."""

    data: str = option("", "also look at this folder of images: its layout, and how fast it is read")
    out: str = option("", "also look whether results can be written to this folder")
    json: str = option("", "write the findings, with versions and hardware, to this file")


Config = TypeVar("Config")


def flag(name: str) -> str:
    """A field's flag: global_batch_size is --global-batch-size."""
    return "--" + name.replace("_", "-")


def parse(kind: type[Config], raw: dict[str, str], preset: dict[str, Any] | None = None) -> Config:
    """Build a configuration from raw strings by field name; the preset replaces defaults, never what was given.

    Raises:
        ValueError: naming the flag, the value and what is allowed.

    """
    hints = typing.get_type_hints(kind)
    given = {name: _convert(name, text, hints[name]) for name, text in raw.items()}
    return kind(**{**(preset or {}), **given})


def decides_numbers(option: dataclasses.Field[Any]) -> bool:
    """Whether an option decides a run's numbers, so that two parts of one run must agree on it."""
    return not option.metadata.get(_NOT_IDENTITY, False)


def identity(config: Any) -> dict[str, Any]:
    """The fields that decide a run's numbers."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if decides_numbers(f)}


def to_json(config: Any) -> dict[str, Any]:
    """All fields as JSON values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `to_json`; fields this version does not know are left out."""
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _convert(name: str, text: str, hint: Any) -> Any:
    kind = hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kind = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)
        parts = [p for p in text.split(",") if p.strip()]
        if of[-1] is not Ellipsis and len(parts) != len(of):
            raise ValueError(f"{flag(name)} {text}: expected {len(of)} numbers separated by commas")
        return tuple(_convert(name, part.strip(), of[0]) for part in parts)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{flag(name)} {text}: expected true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{flag(name)} {text}: expected {what}") from None
        if not math.isfinite(value):
            raise ValueError(f"{flag(name)} {text}: expected a finite number")
        return value
    return text


def _needed(config: Any, *names: str) -> None:
    missing = [flag(name) for name in names if not getattr(config, name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")


def _limits(config: Any) -> SpatialLimits:
    if not 0 <= config.degrees <= 180:
        raise ValueError(f"--degrees {config.degrees:g}: rotations reach from 0 to 180 degrees")
    px = config.translate_px
    if px is not None and not 0 <= px <= NOMINAL_SIDE:
        raise ValueError(f"--translate-px {px:g}: translations reach from 0 to {NOMINAL_SIDE} pixels")
    return SpatialLimits.from_px(config.degrees, px)


def _seed(config: Any) -> None:
    if config.seed > MAX_SEED:
        raise ValueError(f"--seed {config.seed}: it must be at most {MAX_SEED}")


def _side(config: Any) -> None:
    for name in ("side", "eval_side"):
        if getattr(config, name, 0) > MAX_SIDE:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: it must be at most {MAX_SIDE}")


def _choice(config: Any, *names: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in names:
        choices = fields[name].metadata["choices"]
        if getattr(config, name) not in choices:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: choose one of {', '.join(choices)}")


def _at_least(config: Any, low: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: it must be at least {low}")


def _show(values: tuple[Any, ...]) -> str:
    return ",".join(f"{v:g}" for v in values)
