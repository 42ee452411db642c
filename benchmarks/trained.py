"""A trained model with evaluation images: the user's, or a small one on the digits, trained once."""

from __future__ import annotations

import dataclasses
import json
import zlib

import torch
from torch import Tensor

from benchmarks.jobs import Job
from fast_spatial.config import recipes
from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.config.fields import identity, to_json
from fast_spatial.config.modes import DIGITS
from fast_spatial.config.train import TrainConfig
from fast_spatial.evaluation.inputs import load_model_and_images
from fast_spatial.kernels.host import cache_folder
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.sampler import BatchSampler

# Large enough for a realistic grid attack, small enough to train in a minute or two.
SIDE = 64


def trained(job: Job, count: int) -> tuple[Classifier, Tensor, Tensor]:
    """(model, images uint8 [B, S, S, 3], labels [B]) of up to `count` random validation images.

    They come from `--checkpoint` and `--data`. Without a checkpoint, the model is a ResNet-18 trained on random warps
    of the digits.
    """
    if job.config.checkpoint:
        asked = EvaluateConfig(checkpoint=job.config.checkpoint, data=str(job.images), allow_partial_classes=True)
    else:
        asked = EvaluateConfig(checkpoint=digits_checkpoint(), data=DIGITS)
    model, images, _, side = load_model_and_images(asked)
    loader = Loader(
        BatchSampler(images.random_subset(min(count, len(images))), global_batch_size=32, seed=0, train=False),
        augmentation=Augmentation(center=True),
        views=Views(0),
        side=side,
        threads=job.threads,
        device=job.device,
    )
    batches = list(loader.epoch(0))
    model.to(job.device)
    return model, torch.cat([b.views[:, 0] for b in batches]), torch.cat([b.labels for b in batches])


def digits_checkpoint() -> str:
    """A ResNet-18 trained on random warps of the digits; trained once, and kept in the cache folder."""
    # Crops of many sizes, as on ImageNet: a network trained at one scale fails at a smaller image size.
    preset = {**recipes.load(DIGITS), "image_size": SIDE, "crop_scale": (0.15, 1.0), "eval_every": 0}
    asked = TrainConfig(data=DIGITS, mode="random", out="bench", **preset)
    out = cache_folder() / f"bench-digits-{zlib.crc32(json.dumps(identity(asked)).encode()):08x}"
    config = dataclasses.replace(asked, out=str(out))
    if not (out / "best.pt").is_file():
        from fast_spatial.worker import run

        print("training a small model on the digits, once, for the grid and for --score-size", flush=True)
        run("train", to_json(config))
    return str(out / "best.pt")
