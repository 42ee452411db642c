"""Broken and hostile checkpoints end in two lines: no code runs, nothing hangs, memory stays bounded."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_spatial.errors import UserError
from fast_spatial.models import untrusted
from fast_spatial.models.checkpoint import build_classifier, load, read_weights
from tests.helpers.fuzz_checkpoints import CASE_SEC, Tiny, archive_of, ours, records_of, stand_in, torch_bytes


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.helpers.fuzz_checkpoints", str(tmp_path_factory.mktemp("fuzz"))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1500, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_mutated_checkpoint_is_read_or_refused_in_two_lines(fuzzed):
    assert len(fuzzed["ends"]) > 1000
    assert {name: end for name, end in fuzzed["ends"].items() if end.startswith("BAD")} == {}


def test_no_code_in_a_checkpoint_ran_and_nothing_was_left_behind(fuzzed):
    canaries = {name: end for name, end in fuzzed["ends"].items() if name.startswith("canary.")}
    assert len(canaries) > 100
    assert [name for name, end in canaries.items() if end == "read"] == []
    assert fuzzed["left"] == []


def test_time_and_memory_stay_bounded(fuzzed):
    assert fuzzed["slowest_sec"] < CASE_SEC  # of this process alone, whatever else the machine does
    assert fuzzed["grown_mib"] < 256  # the bombs ask for a quarter of a GiB to 16 TiB


def test_what_is_asked_for_too_much_is_refused(fuzzed):
    bombs = {name: end for name, end in fuzzed["ends"].items() if name.startswith("bomb.")}
    assert len(bombs) > 40
    assert [name for name, end in bombs.items() if end == "read"] == []
    assert "its records are compressed" in bombs["bomb.zip.pt"]
    assert "it is more than one zip archive" in bombs["bomb.two_archives.pt"]
    for name in ("zip_said_stored", "claim", "numel.legacy"):
        assert "claim more bytes than it has" in bombs[f"bomb.{name}.pt"]


def test_mutations_reach_every_check(fuzzed):
    kinds = Counter(name.split(".")[0] for name, end in fuzzed["ends"].items() if end == "read")
    assert kinds["whole"] == 5
    assert min(kinds["bit_flips"], kinds["opcodes"], kinds["records"]) > 0  # not everything is noticed, or matters
    texts = " ".join(fuzzed["ends"].values())
    for part in ("checksum", "header", "imports", "NaN or inf", "do not match", "nested too deeply", "claims"):
        assert part in texts


@pytest.fixture
def tiny(monkeypatch):
    import torchvision

    from fast_spatial.models import classifier

    monkeypatch.setattr(classifier, "known_archs", classifier.known_archs)
    monkeypatch.setattr(torchvision.models, "get_model", torchvision.models.get_model)
    stand_in()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError, match="--checkpoint") as caught:
        build_classifier(path, read_weights(path), "tiny")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    return lines[0].removeprefix(f"--checkpoint {path}: ") + "\n" + lines[1]


def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path, tiny):
    whole = torch_bytes(ours())
    start = whole.index(ours_weights := dict(records_of(whole))["archive/data/0"])
    for bit in range(0, 8 * len(ours_weights), 7):
        data = bytearray(whole)
        data[start + bit // 8] ^= 1 << bit % 8
        assert refusal(tmp_path / "w.pt", bytes(data)).startswith(
            "damaged: its record data/0 does not match its checksum\ncopy it again"
        )


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        whole = torch_bytes(ours())
    finally:
        torch.serialization.set_crc32_options(True)
    (tmp_path / "w.pt").write_bytes(whole)
    assert torch.equal(load(tmp_path / "w.pt")["optimizer"]["state"][0]["momentum_buffer"], torch.ones(4))


def test_a_directory_that_readers_could_look_for_in_two_places_is_refused(tmp_path):
    whole = torch_bytes(ours())
    at = whole.rindex(b"PK\6\7") + 8  # torch ends archives as large ones end, with the place of a second end record
    (place,) = struct.unpack("<Q", whole[at : at + 8])
    assert whole[place : place + 4] == b"PK\6\6"
    moved = whole[:at] + struct.pack("<Q", place - 1) + whole[at + 8 :]
    assert "it is more than one zip archive" in refusal(tmp_path / "w.pt", moved)
    rewritten = archive_of(records_of(whole))  # as small ones end
    assert b"PK\6\7" not in rewritten
    (tmp_path / "w.pt").write_bytes(rewritten)
    assert load(tmp_path / "w.pt")["epoch"] == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, tiny, dtype):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in ours()["model"].items()}
    (tmp_path / "w.pt").write_bytes(torch_bytes(state))
    net = build_classifier(tmp_path / "w.pt", read_weights(tmp_path / "w.pt"), "tiny").net
    assert net.state_dict()["fc.weight"].dtype == torch.float32
    assert torch.equal(net.state_dict()["fc.weight"], state["fc.weight"].float())


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ours().items() if key != name}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (without("config"), "missing or invalid: config.image_size"),
        (without("classes"), "missing or invalid: classes"),
        ({**ours(), "classes": ["a", "a", "b"]}, "missing or invalid: classes"),
        ({**ours(), "classes": None, "arch": "resnet"}, "missing or invalid: arch, classes"),
        ({**ours(), "config": {"side": True}}, "missing or invalid: config.image_size"),
        ({**ours(), "model": [3]}, "missing or invalid: model"),
        ({**ours(), "model": {"fc.weight": 3}}, "its model has entries that are not tensors: fc.weight\n"),
        (
            {**ours(), "format": "fast_spatial 2"},
            "its format is fast_spatial 2, but this version reads fast_spatial 1\nuse",
        ),
        (
            {**ours(), "classes": ["a", "b"]},
            "the weights do not match tiny with 2 classes\n"
            "2 of another shape: fc.weight [3, 4] instead of [2, 4], fc.bias [3] instead of [2]; "
            "the file is inconsistent; use another checkpoint",
        ),
        (
            {**Tiny(3).state_dict(), "conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int64)},
            "the weights do not match tiny with 3 classes\n"
            "1 of another type: conv1.weight torch.int64 instead of torch.float32; set --arch to its architecture",
        ),
        ({**Tiny(3).state_dict(), "fc.weight": torch.zeros(())}, "no classifier weights found (keys: conv1"),
        (
            {**Tiny(3).state_dict(), "fc.bias": torch.tensor([1e300] * 3, dtype=torch.float64)},
            "some weights are NaN or inf",
        ),
        ({"model\n\x1b[1m": 3}, "no classifier weights found (keys: 'model\\n\\x1b[1m')"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path, tiny, content, expected):
    assert refusal(tmp_path / "w.pt", torch_bytes(content)).startswith(expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(UserError, match="permission denied\n"):
        load(path)


def test_a_pickle_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "_LONGEST", 1000)
    whole = archive_of([("x/data.pkl", b"\x80\x02" + b"]" * 1000 + b"."), ("x/version", b"3\n")])
    assert "its pickle has more opcodes than a checkpoint needs" in refusal(tmp_path / "w.pt", whole)


def test_networks_that_ask_for_a_version_of_their_weights_are_read(tmp_path):
    import torchvision

    state = torchvision.models.mnasnet0_5(num_classes=2).state_dict()
    (tmp_path / "w.pt").write_bytes(torch_bytes(dict(state)))
    net = build_classifier(tmp_path / "w.pt", read_weights(tmp_path / "w.pt"), "mnasnet0_5").net
    assert torch.equal(net.state_dict()["classifier.1.weight"], state["classifier.1.weight"])
