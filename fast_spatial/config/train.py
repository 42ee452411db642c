"""The options of a training, those of a budget, and how processes are started."""

from __future__ import annotations

import re
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
    show_numbers,
)
from fast_spatial.config.modes import MODES
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.pipelines.placement import DECODERS, WARPS

SCHEDULES = ("milestones", "linear")
# The options that are a budget each.
BUDGETS = ("hours", "gpu_hours", "budget", "until")
SIDE_STEP = 16  # progressive sides are so many pixels apart, or twice as many
DTYPES = ("auto", "bfloat16", "float16", "float32", "tf32")


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
        check_choice(self, "decode", "warp")


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
        check_at_least(self, 0, "price")
        given = [flag(name) for name in BUDGETS if getattr(self, name) not in (None, "")]
        for name in ("hours", "gpu_hours", "budget"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{flag(name)} {value:g}: it must be more than 0")
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: give one budget")
        if self.budget and not self.price:
            raise UserError(f"--budget {self.budget:g}: the price of a GPU-hour is needed, too; add --price")
        if self.plan_only and not given:
            raise UserError(f"--plan-only: there is nothing to plan; add one of {', '.join(map(flag, BUDGETS))}")

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
        check_given(self, "data", "mode", "out")
        if self.replay and self.is_limited:
            raise UserError(f"--replay {self.replay}: it repeats what a budget came to; leave the budget away")
        check_choice(self, "mode", "schedule", "dtype", "optimizer", "compile", "resume", "on_bad_image")
        self.limits, self.checkpoint_steps  # noqa: B018  (validates them)
        check_at_least(self, 1, "epochs", "global_batch_size", "accumulate", "views", "log_every", "side")
        check_at_least(self, 0, "lr", "momentum", "weight_decay", "lighting", "bn_group", "score_chunk", "classes")
        check_at_least(
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
        check_seed(self)
        check_side(self)
        smallest = "start_side" if self.start_side else "side"
        if self.start_side and (self.start_side >= self.side or (self.side - self.start_side) % SIDE_STEP):
            raise UserError(
                f"--start-side {self.start_side}: it must be below --side {self.side}, by a multiple of {SIDE_STEP}"
            )
        if self.score_side and not 8 <= self.score_side < getattr(self, smallest):
            raise UserError(
                f"--score-side {self.score_side}: it must be at least 8 and below {flag(smallest)} "
                f"{getattr(self, smallest)}"
            )
        if self.warmup_epochs and self.schedule != "linear":
            raise UserError(f"--warmup-epochs {self.warmup_epochs:g}: it is for --schedule linear")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs:g}: it must be below --epochs {self.epochs}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name):g}: it must be at least 0 and below 1")
        if self.classes == 1:
            raise UserError("--classes 1: a classifier needs at least 2")
        if self.momentum >= 1:
            raise UserError(f"--momentum {self.momentum:g}: it must be below 1")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"--milestones {show_numbers(self.milestones)}: they must increase")
        for name, low, high in (("crop_scale", 0.0, 1.0), ("crop_ratio", 0.0, 100.0)):
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                raise UserError(
                    f"{flag(name)} {show_numbers((first, last))}: expected {low:g} < MIN <= MAX <= {high:g}"
                )
        if not 0 <= self.flip_prob <= 1:
            raise UserError(f"--flip-prob {self.flip_prob:g}: a probability lies between 0 and 1")
        if min(self.jitter) < 0 or max(self.jitter) > 1:
            raise UserError(f"--jitter {show_numbers(self.jitter)}: each must lie between 0 and 1")

    @property
    def limits(self) -> SpatialLimits:
        """The limits of the training attack."""
        return limits_of(self)

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
            raise UserError(
                f"--checkpoint-every {self.checkpoint_every}: expected a number of steps, as in 500, or minutes, "
                f"as in 15min"
            )
        return int(found[1] or 0), 60 * float(found[2] or 0)

    def is_compiled(self, *, on_gpu: bool) -> bool:
        """Whether torch.compile is to fuse the networks."""
        return (self.compile == "true" or (self.compile == "auto" and on_gpu)) and not self.deterministic

    def view_limits(self) -> Any:
        """Each training view's limits, float64 [V, 2]."""
        from fast_spatial.kernels.sampling import view_limits  # imports numba

        mode = MODES[self.mode]
        warps = self.views if mode.warps is None else mode.warps
        return view_limits(
            warps, untouched_first=mode.untouched, degrees=self.limits.degrees, translate=self.limits.translate
        )
