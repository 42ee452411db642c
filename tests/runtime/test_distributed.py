"""Two gloo processes against one: the same gradients, and the same BatchNorm buffers on both."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from fast_spatial.models import classifier
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.training.step import TrainStep

STEPS, PER_RANK, SIDE, VIEWS = 3, 4, 32, 3


def net_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "resnet18":
        return classifier.build("resnet18", 5)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 10 * 10, 5))


def batch_of(step: int, part: slice) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    views = torch.randint(0, 256, (2 * PER_RANK, VIEWS, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (2 * PER_RANK,), generator=generator)
    return Batch(views[part], labels[part], torch.arange(2 * PER_RANK)[part])


def step_of(model: Classifier) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    return TrainStep(model, optimizer, dtype=torch.float32, scored=True)


def rank_main(rank: int, port: int, kind: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = distributed.start(stall_minutes=2)
    states, choices = trained(kind, rank)
    gathered = distributed.gather(rank)
    torch.save({"states": states, "choices": choices, "gathered": gathered, "world": world.rank}, f"{out}/{rank}.pt")
    distributed.stop()


def trained(kind: str, rank: int) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """States and choices after each step; no DDP module remains."""
    model = Classifier(net_of(kind))
    step = step_of(model)
    states, choices = [], []
    for number in range(STEPS):
        result = step(batch_of(number, slice(rank * PER_RANK, (rank + 1) * PER_RANK)))
        states.append({name: value.clone() for name, value in model.net.state_dict().items()})
        choices.append(result.choice)
    return states, choices


def two_ranks(kind: str, out: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_main, (port, kind, str(out)), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def resnet_ranks(tmp_path_factory):
    return two_ranks("resnet18", tmp_path_factory.mktemp("resnet18"))


def test_without_batch_norm_two_ranks_equal_one_at_the_same_global_batch(tmp_path):
    ranks = two_ranks("plain", tmp_path)
    model = Classifier(net_of("plain"))
    step = step_of(model)
    for number in range(STEPS):
        choice = step(batch_of(number, slice(None))).choice
        assert torch.equal(choice, torch.cat([rank["choices"][number] for rank in ranks]))
        for rank in ranks:
            for name, value in model.net.state_dict().items():
                torch.testing.assert_close(rank["states"][number][name], value, rtol=1e-5, atol=1e-6)
    assert ranks[0]["gathered"] == [0, 1]
    assert ranks[1]["gathered"] == []


def test_buffers_and_weights_are_identical_on_both_ranks_after_each_step(resnet_ranks):
    for mine, other in zip(*(rank["states"] for rank in resnet_ranks)):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_with_batch_norm_two_ranks_equal_one_process_that_simulates_two_groups(resnet_ranks):
    """Each group normalizes by itself; gradients and running statistics are averaged."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: over so few images, BatchNorm magnifies the order of sums
    model = Classifier(net_of("resnet18"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    for number in range(STEPS):
        groups = []
        for rank in range(2):
            batch = batch_of(number, slice(rank * PER_RANK, (rank + 1) * PER_RANK))
            replica = copy.deepcopy(model)
            one = TrainStep(replica, torch.optim.SGD(replica.parameters(), lr=0.0), dtype=torch.float32, scored=True)
            choice = one(batch).choice
            assert torch.equal(choice, resnet_ranks[rank]["choices"][number])
            groups.append(replica)
        for target, *sources in zip(model.parameters(), *(g.parameters() for g in groups)):
            target.grad = torch.stack([s.grad for s in sources]).mean(dim=0)
        for target, *sources in zip(model.buffers(), *(g.buffers() for g in groups)):
            target.copy_(torch.stack([s.float() for s in sources]).mean(dim=0))
        optimizer.step()
        optimizer.zero_grad()
        for name, value in model.net.state_dict().items():
            torch.testing.assert_close(
                resnet_ranks[0]["states"][number][name].float(), value.float(), rtol=2e-3, atol=2e-4
            )
    torch.set_num_threads(threads)
