"""The options of a training, of a budget, and of the processes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fast_spatial.config.fields import as_typed, check_fields, flag, option
from fast_spatial.config.modes import MODES
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import MAX_SIDE, NOMINAL_SIDE, SpatialLimits
from fast_spatial.pipelines.placement import DECODERS, WARPS

MAX_SEED = 2**31 - 1
SCHEDULES = ("milestones", "linear")
# Options that each set a budget; they exclude each other.
BUDGETS = ("hours", "gpu_hours", "max_cost", "until")
SIZE_STEP = 16  # progressive image sizes differ by this number of pixels, or by twice that
DTYPES = ("auto", "bfloat16", "float16", "float32", "tf32")
DATA_FOLDER = "folder with train/ and val/, each with a folder per class; or digits"
EXCLUDE = "file of images to leave out, one path per line, as written by check-data --write-exclusions"
TRANSLATE = "largest translation in pixels at size 224; by default 0.8 per degree: 24 at 30 degrees, 32 at 40"


@dataclass(frozen=True)
class LaunchOptions:
    """How processes are started, and where images are decoded."""

    nproc_per_node: int = option(
        0,
        "processes on this node (0: one per GPU, or one without a GPU)",
        section="processes",
        minimum=0,
        identity=False,
    )
    nnodes: str = option(
        "1", "number of nodes, or MIN:MAX, as in torchrun", section="processes", metavar="N", identity=False
    )
    node_rank: int = option(
        0, "rank of this node, for a static rendezvous", section="processes", minimum=0, identity=False
    )
    rdzv_backend: str = option("c10d", "rendezvous backend of torchrun", section="processes", identity=False)
    rdzv_endpoint: str = option(
        "", "rendezvous endpoint; required with several nodes", section="processes", metavar="HOST:PORT", identity=False
    )
    rdzv_id: str = option("fast_spatial", "rendezvous id: the job's name", section="processes", identity=False)
    max_restarts: int = option(
        0, "restarts of all processes after one has failed", section="processes", minimum=0, identity=False
    )
    in_process: bool = option(
        False,
        "run in this process, without torchrun: for a debugger, or for many short tasks",
        section="processes",
        identity=False,
    )
    stall_minutes: float = option(
        20.0,
        "watchdog timeout in minutes: print all stacks and abort if no step completes",
        section="processes",
        identity=False,
    )
    workers: int = option(
        0,
        "decoding threads per process (0: this process's share of the CPUs)",
        section="processes",
        minimum=0,
        identity=False,
    )
    decode: str = option(
        "auto",
        "JPEG decoder: gpu decodes the cropped region, gpu-full the whole image, cpu the region on CPUs; auto tries "
        "them on this GPU and takes the first with right pixels. Naming one skips the trial",
        section="processes",
        choices=("auto", *DECODERS),
        identity=False,
    )
    warp: str = option(
        "auto",
        "implementation of the warps: DALI's operators, Triton kernels on a GPU, or numba kernels on CPUs for images "
        "decoded there; auto is dali on GPUs, numba on CPUs",
        section="processes",
        choices=("auto", *WARPS),
        identity=False,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stall_minutes <= 0:
            raise UserError(f"--stall-minutes {self.stall_minutes:g}: must be more than 0")


@dataclass(frozen=True)
class BudgetOptions(LaunchOptions):
    """The options of a budget."""

    hours: float | None = option(
        None,
        "budget in hours, from start to end of the command; a restart continues the count",
        section="budget",
        metavar="HOURS",
        identity=False,
    )
    gpu_hours: float | None = option(
        None, "budget in GPU-hours: hours times GPUs", section="budget", metavar="HOURS", identity=False
    )
    max_cost: float | None = option(
        None, "budget in money, at --price per GPU-hour", section="budget", metavar="MONEY", identity=False
    )
    price: float = option(
        0.0,
        "price of a GPU-hour, in any currency (0: unknown)",
        section="budget",
        metavar="MONEY",
        minimum=0,
        identity=False,
    )
    until: str = option(
        "",
        "budget as a wall-clock time to be done by, as in 18:30 or 2030-01-31T06:00",
        section="budget",
        metavar="TIME",
        identity=False,
    )
    plan_only: bool = option(
        False, "measure, print the plan, write it to OUT/plan.json, and stop", section="budget", identity=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [flag(name) for name in BUDGETS if getattr(self, name) not in (None, "")]
        for name in ("hours", "gpu_hours", "max_cost"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{flag(name)} {value:g}: must be more than 0")
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other", "keep one budget")
        if self.max_cost and not self.price:
            raise UserError(f"--max-cost {self.max_cost:g}: the price of a GPU-hour is unknown", "add --price")
        if self.plan_only and not given:
            raise UserError("--plan-only: no budget to plan for", f"add one of {', '.join(map(flag, BUDGETS))}")

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget."""
        return any(getattr(self, name) not in (None, "") for name in BUDGETS)


@dataclass(frozen=True)
class TrainConfig(BudgetOptions):
    """Train one model. The defaults are the reference recipe: 110 epochs of ImageNet, ResNet-18."""

    data: str = option(
        "",
        DATA_FOLDER,
        section="data",
        metavar="FOLDER",
        required=True,
        identity=False,  # the names of its images are compared instead
    )
    mode: str = option(
        "",
        "training mode: center crops; random crops; one random warp; the worst of the untouched view and --views warps",
        section="attack",
        choices=tuple(MODES),
        required=True,
    )
    out: str = option(
        "",
        "folder of the run: checkpoints and logs; created, or continued if it holds the same run",
        section="output",
        metavar="FOLDER",
        required=True,
        identity=False,
    )
    recipe: str = option(
        "",
        "recipe: reference, fast, digits, digits_linear (see launch.py recipes) or a TOML file; flags override it. "
        "By default reference, digits for --data digits, or one that suits the budget",
        section="schedule",
        metavar="NAME",
        identity=False,  # its values are compared instead
    )
    degrees: float = option(30.0, "largest rotation of random and worst10, in degrees either way", section="attack")
    translate_px: float | None = option(None, TRANSLATE, section="attack", metavar="PX")
    views: int = option(10, "number of random views in worst10, besides the untouched one", section="attack", minimum=1)
    score_size: int = option(
        0,
        "image size of the forward pass that chooses the worst view (0: --image-size)",
        section="attack",
        metavar="PX",
        minimum=0,
    )
    views_per_forward: int = option(
        0,
        "views per scoring forward pass (0: as many as are fastest and fit into memory)",
        section="attack",
        minimum=0,
        identity=False,
    )
    epochs: int = option(110, "passes over the training images", section="schedule", minimum=1)
    global_batch_size: int = option(256, "images per step over all processes", section="schedule", minimum=1)
    grad_accum_steps: int = option(
        1, "parts that each process's batch is split into, to save memory", section="schedule", minimum=1
    )
    schedule: str = option(
        "milestones",
        "learning rate schedule: drops at --milestones; or linear warm-up to --lr, then linear decay to 0",
        section="schedule",
        choices=SCHEDULES,
    )
    milestones: tuple[int, ...] = option(
        (30, 60, 85, 95, 105), "epochs at whose start the learning rate drops", section="schedule", metavar="N,N,..."
    )
    gamma: float = option(0.1, "factor of each drop", section="schedule", minimum=0)
    warmup_epochs: float = option(0.0, "epochs of linear warm-up, for --schedule linear", section="schedule", minimum=0)
    image_size: int = option(
        224,
        "size of the training views in pixels, and of evaluation without --eval-size",
        section="schedule",
        metavar="PX",
        minimum=1,
    )
    start_size: int = option(
        0,
        "initial image size; grows to --image-size at 75 % of training (0: constant)",
        section="schedule",
        metavar="PX",
        minimum=0,
    )
    lr: float = option(0.1, "peak learning rate", section="optimization", minimum=0)
    momentum: float = option(0.9, "momentum of SGD", section="optimization", minimum=0)
    weight_decay: float = option(1e-4, "weight decay", section="optimization", minimum=0)
    bn_weight_decay: bool = option(
        True, "weight decay of BatchNorm parameters and biases too, as in the reference", section="optimization"
    )
    label_smoothing: float = option(
        0.0, "label smoothing; worst views and logs use the plain loss", section="optimization"
    )
    ema: float = option(
        0.0, "EMA decay per step; evaluates and saves the averaged weights (0: off)", section="optimization"
    )
    optimizer: str = option(
        "sgd", "torch's fused SGD, or FusedSGD of NVIDIA's apex", section="optimization", choices=("sgd", "apex")
    )
    dtype: str = option(
        "auto",
        "training precision; auto is bfloat16 if supported, else float16 on GPUs and float32 on CPUs",
        section="optimization",
        choices=DTYPES,
        identity=False,  # the resolved precision is compared instead: the checkpoint holds it
    )
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "area of RandomResizedCrop, as a share of the image", section="augmentation", metavar="MIN,MAX"
    )
    crop_ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "aspect ratio of RandomResizedCrop", section="augmentation", metavar="MIN,MAX"
    )
    flip_prob: float = option(0.5, "probability of a horizontal flip", section="augmentation")
    jitter: tuple[float, float, float] = option(
        (0.1, 0.1, 0.1), "brightness, contrast and saturation of ColorJitter", section="augmentation", metavar="X,X,X"
    )
    lighting: float = option(0.05, "standard deviation of PCA lighting", section="augmentation", minimum=0)
    arch: str = option("resnet18", "torchvision classifier", section="network", metavar="NAME")
    blurpool: bool = option(
        False, "BlurPool: blur before strided convolutions; changes the robustness under study", section="network"
    )
    bn_group_size: int = option(
        0, "ghost-BatchNorm group size in images (reference: 32; 0: the local batch)", section="network", minimum=0
    )
    compile: str = option(
        "auto",
        "torch.compile of the training network; auto is on for GPUs; off with --deterministic; needs a C++ compiler on "
        "CPUs",
        section="network",
        choices=("auto", "true", "false"),
        identity=False,
    )
    seed: int = option(0, "seed of the weights and of all random draws", section="run", minimum=0)
    deterministic: bool = option(False, "bit-identical runs on one kind of machine; slower on GPUs", section="run")
    resume: str = option(
        "auto",
        "auto continues the same run in --out; never refuses a folder that holds a run",
        section="run",
        choices=("auto", "never"),
        identity=False,
    )
    replay: str = option(
        "",
        "folder of a budgeted training to repeat step by step",
        section="run",
        metavar="FOLDER",
        identity=False,  # not part of the identity: only the replayed segments are
    )
    max_classes: int = option(0, "first classes only, for a pilot run (0: all)", section="data", minimum=0)
    max_train_images: int = option(0, "training images, for a pilot run (0: all)", section="data", minimum=0)
    exclude: str = option("", EXCLUDE, section="data", metavar="FILE", identity=False)
    on_bad_image: str = option(
        "stop",
        "training images that cannot be decoded: stop and name the image, or skip to the next image of the data set; "
        "evaluations always stop",
        section="data",
        choices=("stop", "skip"),
        identity=False,
    )
    max_bad_images: int = option(
        50, "skipped training images beyond which the run stops", section="data", minimum=0, identity=False
    )
    eval_every: int = option(
        1, "epochs between evaluations (0: after the last epoch only)", section="evaluation", minimum=0, identity=False
    )
    eval_size: int = option(
        0, "image size of evaluation (0: --image-size)", section="evaluation", metavar="PX", minimum=0
    )
    eval_flip: bool = option(
        False, "evaluation with logits averaged over each view and its mirror image", section="evaluation"
    )
    checkpoint_every: str = option(
        "15min",
        "checkpoint interval in steps (500) or minutes (15min), besides the ends of epochs (0: these only)",
        section="output",
        metavar="N|Nmin",
        identity=False,
    )
    log_every: int = option(
        20, "steps between updates of the progress bar and TensorBoard", section="output", minimum=1, identity=False
    )
    profile: int = option(
        0,
        "steps to profile into OUT/profile.json, after 10 warm-up steps (0: none)",
        section="output",
        minimum=0,
        identity=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay and self.is_limited:
            raise UserError("--replay conflicts with a budget: it repeats an earlier one", "remove one of them")
        check_limits(self.degrees, self.translate_px)
        self._checkpoint_interval()
        check_seed(self.seed)
        check_sizes(image_size=self.image_size, eval_size=self.eval_size)
        self._check_sizes()
        if self.warmup_epochs and self.schedule != "linear":
            raise UserError(f"--warmup-epochs {self.warmup_epochs:g}: requires --schedule linear")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs:g}: must be below --epochs {self.epochs}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name):g}: must be at least 0 and below 1")
        if self.max_classes == 1:
            raise UserError("--max-classes 1: a classifier needs at least 2")
        if self.momentum >= 1:
            raise UserError(f"--momentum {self.momentum:g}: must be below 1")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"--milestones {as_typed(self.milestones)}: must increase")
        for name, low, high in (("crop_scale", 0.0, 1.0), ("crop_ratio", 0.0, 100.0)):
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                given = as_typed((first, last))
                raise UserError(f"{flag(name)} {given}: expected {low:g} < MIN <= MAX <= {high:g}")
        if not 0 <= self.flip_prob <= 1:
            raise UserError(f"--flip-prob {self.flip_prob:g}: must lie between 0 and 1")
        if min(self.jitter) < 0 or max(self.jitter) > 1:
            raise UserError(f"--jitter {as_typed(self.jitter)}: each must lie between 0 and 1")

    def _check_sizes(self) -> None:
        smallest = "start_size" if self.start_size else "image_size"
        least = getattr(self, smallest)
        if self.start_size and (self.start_size >= self.image_size or (self.image_size - self.start_size) % SIZE_STEP):
            raise UserError(
                f"--start-size {self.start_size}: must be below --image-size {self.image_size}, by a multiple of "
                f"{SIZE_STEP}"
            )
        if self.score_size and not 8 <= self.score_size < least:
            raise UserError(f"--score-size {self.score_size}: must be at least 8 and below {flag(smallest)} {least}")

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the training attack."""
        return SpatialLimits.from_px(self.degrees, self.translate_px)

    @property
    def num_views(self) -> int:
        """Views of an image that the pipeline emits: the untouched one, if the mode has it, and random warps."""
        mode = MODES[self.mode]
        return mode.untouched + (self.views if mode.warps is None else mode.warps)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints; 0: by time, or only at the ends of epochs."""
        return self._checkpoint_interval()[0]

    @property
    def checkpoint_sec(self) -> float:
        """Seconds between checkpoints; 0: by steps, or only at the ends of epochs."""
        return self._checkpoint_interval()[1]

    def _checkpoint_interval(self) -> tuple[int, float]:
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)min", self.checkpoint_every)
        if found is None:
            raise UserError(
                f"--checkpoint-every {self.checkpoint_every}: expected steps, as in 500, or minutes, as in 15min"
            )
        return int(found[1] or 0), 60 * float(found[2] or 0)

    def is_compiled(self, *, on_gpu: bool) -> bool:
        """Whether torch.compile compiles the networks."""
        return (self.compile == "true" or (self.compile == "auto" and on_gpu)) and not self.deterministic


def check_limits(degrees: float, translate_px: float | None) -> None:
    """Check the limits of an attack.

    Raises:
        UserError: naming the one that is out of range.

    """
    if not 0 <= degrees <= 180:
        raise UserError(f"--degrees {degrees:g}: must lie between 0 and 180")
    if translate_px is not None and not 0 <= translate_px <= NOMINAL_SIDE:
        raise UserError(f"--translate-px {translate_px:g}: must lie between 0 and {NOMINAL_SIDE}")


def check_seed(seed: int) -> None:
    """Raise a UserError if a seed is too large."""
    if seed > MAX_SEED:
        raise UserError(f"--seed {seed}: must be at most {MAX_SEED}")


def check_sizes(**sizes: int) -> None:
    """Raise a UserError if an image size, by the name of its option, is too large."""
    for name, size in sizes.items():
        if size > MAX_SIDE:
            raise UserError(f"{flag(name)} {size}: must be at most {MAX_SIDE}")
