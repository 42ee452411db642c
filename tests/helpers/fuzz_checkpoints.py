"""Read checkpoints with a thousand random faults, and hostile ones, in a process with limited memory.

    python -m tests.helpers.fuzz_checkpoints FOLDER

Prints the outcomes as JSON. `tests/models/test_hostile.py` runs it and asserts them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save
from torch import nn

from fast_spatial.errors import UserError
from fast_spatial.models import classifier
from fast_spatial.models.checkpoint import FORMAT, build_classifier, read_weights

CLASSES = ["a", "b", "c"]
MEMORY_BYTES = 512 * 2**20  # more than the libraries take: far above any file here, far below the bombs
CASE_SEC = 10
Case = tuple[str, bytes]


class Tiny(nn.Module):
    """A classifier with a few hundred weights, instead of torchvision's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)


def torch_bytes(content: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def ours() -> dict[str, Any]:
    state = Tiny(len(CLASSES)).state_dict()
    content = {"format": FORMAT, "model": state, "arch": "tiny", "classes": CLASSES, "config": {"side": 32}}
    return {**content, "epoch": 3, "best_pct": 50.0, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4)}}}}


def original() -> dict[str, Any]:
    state = Tiny(len(CLASSES)).state_dict()
    numbers = {"new_mean": torch.full((3, 1, 1), 0.5), "new_std": torch.full((3, 1, 1), 0.2)}
    wrapped = {f"module.normalizer.{name}": value for name, value in numbers.items()}
    wrapped |= {f"module.model.{name}": value for name, value in state.items()}
    return {"model": wrapped | {f"module.attacker.model.{name}": value for name, value in state.items()}, "epoch": 1}


def about() -> dict[str, str]:
    fields = {"classes": CLASSES, "side": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    return {"format": FORMAT, "arch": "tiny", **{name: json.dumps(value) for name, value in fields.items()}}


def bases() -> dict[str, bytes]:
    """Whole files by name."""
    plain = Tiny(len(CLASSES)).state_dict()
    return {
        "ours.pt": torch_bytes(ours()),
        "original.pt.best": torch_bytes(original()),
        "plain.pth": torch_bytes(plain),
        "legacy.pt": torch_bytes(ours(), legacy=True),
        "ours.safetensors": save(plain, about()),
    }


# --- what an accident does


def bit_flips(rng: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncation(rng: random.Random, whole: bytes) -> bytes:
    return whole[: rng.choice([rng.randrange(len(whole)), rng.randrange(9), len(whole) - 1 - rng.randrange(30)])]


def splice(rng: random.Random, whole: bytes) -> bytes:
    start, stop, to = rng.randrange(len(whole)), rng.randrange(len(whole)), rng.randrange(len(whole))
    piece = whole[min(start, stop) : max(start, stop)][: rng.choice([4, 64, 4096])]
    kept = rng.choice([to, min(to + len(piece), len(whole))])  # inserted, or written over what was there
    return whole[:to] + piece + whole[kept:]


# --- what an accident does not do: everything else about the file is right


def records_of(whole: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def archive_of(records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(whole: bytes, data: bytes) -> bytes:
    return archive_of([(name, data if name.endswith(".pkl") else old) for name, old in records_of(whole)])


def opcodes(rng: random.Random, whole: bytes) -> bytes:
    """One to three opcodes of the pickle replaced, removed or repeated, or their arguments changed."""
    if whole[:2] != b"PK":
        return _changed_opcodes(rng, whole)
    (data,) = (data for name, data in records_of(whole) if name.endswith(".pkl"))
    return with_pickle(whole, _changed_opcodes(rng, data))


def _changed_opcodes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 3])):
        starts: list[int] = []
        with contextlib.suppress(Exception):  # an earlier change may have broken it
            for _, _, position in pickletools.genops(data):
                starts.append(position or 0)
        starts = starts or [0]
        which = rng.randrange(len(starts))
        start, stop = starts[which], (*starts, len(data))[which + 1]
        instruction = data[start:stop]
        changed = rng.choice(
            [
                bytes([rng.choice(pickletools.opcodes).code.encode("latin1")[0]]) + instruction[1:],
                b"",
                instruction * 2,
                instruction[:1] + rng.randbytes(max(0, len(instruction) - 1)),
                instruction[:1] + b"\xff" * (len(instruction) - 1),
            ]
        )
        data = data[:start] + changed + data[stop:]
    return data


def records(rng: random.Random, whole: bytes) -> bytes:
    """Records removed, swapped, emptied, made longer, doubled, renamed, or compressed."""
    found = records_of(whole)
    one, other = rng.sample(range(len(found)), 2)
    (name, data), (other_name, other_data) = found[one], found[other]
    what = rng.randrange(7)
    if what == 0:
        del found[one]
    elif what == 1:
        found[one], found[other] = (name, other_data), (other_name, data)
    elif what == 6:
        return archive_of(found, zipfile.ZIP_DEFLATED)
    else:
        found[one] = {2: (name, b""), 3: (name, data * 3), 4: (other_name, data), 5: (name + "x", data)}[what]
    return archive_of(found)


def header(rng: random.Random, whole: bytes) -> bytes:
    """A field of a safetensors header changed."""
    length = struct.unpack("<Q", whole[:8])[0]
    fields, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = rng.choice(list(fields))
    if name == "__metadata__":
        key = rng.choice(list(fields[name]))
        fields[name][key] = rng.choice(["", "{", "null", "[]", "3", "1e999", "[" * 5000, '"x"', "NaN", '{"side": -1}'])
    else:
        key = rng.choice(list(fields[name]))
        fields[name][key] = rng.choice(
            [None, "", "F64", "I8", "C64", "F8_E4M3", "BOOL", [], [2**62], [0, 2**62], [2**62, 2**62], [-1], [1, 1e300]]
        )
    text = json.dumps(fields).encode()
    claimed = rng.choice([len(text)] * 8 + [0, 2**63, len(whole), len(text) - 1])
    return struct.pack("<Q", claimed) + text + data


def fields() -> Iterator[Case]:
    """Every field of our files missing or of a wrong type."""
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = 0
    for _ in range(200):
        deep = [deep]
    values: list[Any] = [None, True, -1, 0, 10**30, 0.5, float("nan"), "", "x\n\x1b[1m", [], ["a", "a", "b"], {}]
    values += [["a", "b", 3], ["a", "b"], [str(n) for n in range(1000)], {"side": True}, {"side": 10**9}, {1: 2}]
    values += [torch.zeros(()), torch.zeros(3), torch.Size([3]), torch.float32, deep, endless, {"conv1.weight": 3}]
    for name in ("format", "model", "arch", "classes", "config", "mean", "std"):
        for number, value in enumerate(values):
            yield f"field.{name}.{number}.pt", torch_bytes({**ours(), name: value})
        yield f"field.{name}.missing.pt", torch_bytes({k: v for k, v in ours().items() if k != name})
    tensors: list[Any] = [torch.zeros(()), torch.zeros(0), torch.zeros(3, 4, dtype=torch.complex64), 7, "weights"]
    tensors += [torch.zeros(3, 4, dtype=kind) for kind in (torch.int64, torch.bool, torch.int8, torch.float64)]
    tensors += [torch.zeros(3, 4, dtype=torch.float8_e4m3fn), torch.full((3, 4), 1e300, dtype=torch.float64)]
    tensors += [torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4, device="meta"), torch.zeros(1).expand(2**40, 4)]
    tensors += [torch.quantize_per_tensor(torch.zeros(3, 4), 0.1, 0, torch.qint8), torch.zeros(1).expand(3, 4)]
    tensors += [torch.full((3, 4), float("nan")), torch.zeros(12).as_strided((3, 4), (1, 1)), torch.zeros(0, 4)]
    for key in ("fc.weight", "fc.bias", "bn1.num_batches_tracked", "conv1.weight"):
        for number, tensor in enumerate(tensors):
            plain = {**Tiny(3).state_dict(), key: tensor}
            yield f"tensor.{key}.{number}.pt", torch_bytes({**ours(), "model": plain})
            yield f"plain.{key}.{number}.pt", torch_bytes(plain)
    for number, tensor in enumerate([torch.zeros(3), torch.zeros(2), torch.zeros(()), torch.full((3,), float("nan"))]):
        wrapped = original()
        wrapped["model"]["module.normalizer.new_std"] = tensor
        yield f"normalizer.{number}.pt", torch_bytes(wrapped)
    keys: list[Any] = [3, None, (1, 2), "x" * 10**6, "\n\x1b[2J"]
    for number, key in enumerate(keys):
        yield f"key.{number}.pt", torch_bytes({**ours(), "model": {key: torch.zeros(3)}})


# --- what an enemy does


class Calls:
    """Its pickle calls a function if it is loaded without checks."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def canaries(ran: Path) -> Iterator[Case]:
    """Files that would create the file `ran`."""
    command = f"touch {ran}"
    calls = {
        "system": Calls(os.system, command),
        "eval": Calls(eval, f"open({str(ran)!r}, 'w')"),
        "popen": Calls(subprocess.Popen, ["touch", str(ran)]),
        "path": Calls(Path.touch, ran),
        "setstate": Calls(OrderedDict, state=Calls(os.system, command)),
        "as_key": {Calls(os.system, command): 1},
        "load": Calls(torch.load, str(ran)),
    }
    for name, call in calls.items():
        for where, content in {
            "top": call,
            "model": {"model": call},
            "beside": {**ours(), "epoch": call},
            "in_state": {**Tiny(3).state_dict(), "fc.weight": call},
        }.items():
            for legacy in (False, True):
                yield f"canary.{name}.{where}.{legacy}.pt", torch_bytes(content, legacy=legacy)
            for protocol in (0, 2, 4):
                yield f"canary.{name}.{where}.protocol{protocol}.pt", pickle.dumps(content, protocol)
    whole = torch_bytes(Tiny(3).state_dict())
    (data,) = (data for name, data in records_of(whole) if name.endswith(".pkl"))
    system = b"cposix\nsystem\n" + pickle.dumps(command, 2)[2:-1] + b"\x85R"
    hooks = b"ccollections\nOrderedDict\n"
    at = data.index(hooks)
    yield "canary.in_a_tensor.pt", with_pickle(whole, data[:at] + system + data[at:])  # instead of its hooks
    build = data[:-1] + b"}" + pickle.dumps("__setstate__", 2)[2:-1] + system + b"sb."
    yield "canary.build.pt", with_pickle(whole, build)
    yield "canary.instance.pt", with_pickle(whole, b"(S" + repr(command).encode() + b"\niposix\nsystem\n.")
    yield "canary.stack_global.pt", with_pickle(whole, b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + system[14:] + b".")
    dill = b"\x80\x02cdill._dill\n_create_function\n" + system[14:] + b"\x85R."
    yield "canary.dill.pt", with_pickle(whole, dill)
    yield "canary.dill_bare.pt", dill
    code = f"def forward(self):\n    return open({str(ran)!r}, 'w')\n".encode()
    root = records_of(whole)[0][0].partition("/")[0]
    script = [(f"{root}/code/__torch__.py", code), (f"{root}/constants.pkl", b"\x80\x02)."), *records_of(whole)]
    yield "canary.torchscript.pt", archive_of(script)
    for number, (name, data) in enumerate([("evil.safetensors", pickle.dumps(calls["system"], 2)), ("e.pt", code)]):
        yield f"canary.{number}.{name}", data


def bombs() -> Iterator[Case]:
    """Files of a few bytes that ask for endless memory, time or stack."""
    whole = torch_bytes(Tiny(3).state_dict())

    def text(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def named(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + text(108) + b"tQ"
    # Each a pair of the pair before.
    endless = b")q\x00" + b"".join(bytes([104, n, 104, n, 134, 113, n + 1]) for n in range(60))
    nested = b")" + b"\x85" * 300_000
    tensor = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + text(0)
    rest = b"\x89" + named("collections", "OrderedDict") + b")RtR"
    programs = {
        "bytearray": named("__builtin__", "bytearray") + text(2**34) + b"\x85R",
        "tensor": named("torch", "Tensor") + text((2**17, 2**17)) + b"R",
        "storage": named("torch", "FloatStorage") + text(2**33) + b"\x85R",
        "new": named("torch", "FloatStorage") + text(2**33) + b"\x85\x81",
        "deep_key": b"}" + nested + b"K\x01s",
        "deep_value": b"}" + text("model") + b")" + b"\x85" * 10_000 + b"s",
        "deep_list": b"}" + text("model") + b"]" * 10_000 + b"a" * 9_999 + b"s",
        "deep_persistent": b")" + b"\x85" * 10_000 + b"Q",
        "endless_key": b"}" + endless + b"K\x01s",
        "endless_callee": endless + b")R",
        "endless_value": b"}" + text("fc.weight") + b"(" + endless + b"ts",
        "endless_ordered": named("collections", "OrderedDict") + b"]" + endless + b"K\x01\x86a\x85R",
        "encode": named("_codecs", "encode") + text("a" * 10**6) + text("idna") + b"\x86R",
        "size": b"}" + text("fc.weight") + tensor + text((2**40, 4)) + text((4, 1)) + rest + b"s",
        "size_that_fits": b"}" + text("fc.weight") + tensor + text((2**25, 1)) + text((1, 1)) + rest + b"s",
        "methods": named("collections", "OrderedDict") + b")R}" + text("items") + b"K\x01sb",
        "long_memo": b"}r\xff\xff\xff\x7f",
        "long_string": b"X\xff\xff\xff\x7fabc",
        "long_bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    }
    magic = pickle.dumps(119547037146038801333356, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    for name, program in programs.items():
        yield f"bomb.{name}.pt", with_pickle(whole, b"\x80\x02" + program + b".")
        yield f"bomb.{name}.legacy.pt", magic + b"\x80\x02" + program + b"." + pickle.dumps([], 2)
    claimed = storage.replace(text(108), text(2**24)).replace(b"tQ", b"NtQ")  # and no bytes for it
    tensor = named("torch._utils", "_rebuild_tensor_v2") + b"(" + claimed + text(0) + text((2**24,)) + text((1,))
    program = b"\x80\x02}" + text("fc.weight") + tensor + rest + b"s."
    yield "bomb.numel.legacy.pt", magic + program + pickle.dumps([], 2)
    zeros = archive_of([("x/data.pkl", bytes(2**28))], zipfile.ZIP_DEFLATED)
    yield "bomb.zip.pt", zeros
    at = zeros.index(b"PK\x01\x02")
    yield "bomb.zip_said_stored.pt", zeros[: at + 10] + b"\0\0" + zeros[at + 12 :]
    small = archive_of([("x/data.pkl", b"\x80\x02}."), ("x/data/0", b"abcd")])
    at = small.rindex(b"PK\x01\x02")
    yield "bomb.claim.pt", small[: at + 16] + struct.pack("<III", zlib.crc32(b"abcd"), 2**31, 2**31) + small[at + 28 :]
    yield "bomb.two_archives.pt", with_pickle(whole, b"\x80\x02" + programs["deep_key"] + b".") + whole
    for arch in ("regnet_y_128gf", "vit_h_14"):
        yield f"bomb.{arch}.pt", torch_bytes({**ours(), "arch": arch})


def cases(folder: Path) -> Iterator[Case]:
    rng = random.Random(0)
    for name, whole in bases().items():
        yield f"whole.{name}", whole
        for change, times in {bit_flips: 40, truncation: 20, splice: 20}.items():
            for number in range(times):
                yield f"{change.__name__}.{number}.{name}", change(rng, whole)
        for change, times in {opcodes: 50, records: 25}.items():
            for number in range(times):
                if not name.endswith(".safetensors") and (change is opcodes or whole[:2] == b"PK"):
                    yield f"{change.__name__}.{number}.{name}", change(rng, whole)
        for number in range(80 if name.endswith(".safetensors") else 0):
            yield f"header.{number}.{name}", header(rng, whole)
    yield from fields()
    yield from canaries(folder / "ran")
    yield from bombs()


def read(path: Path) -> str:
    """The outcome of a file: "read", the first line of a proper refusal, or a description of a failure."""
    try:
        weights = read_weights(path)
        build_classifier(path, weights, weights.arch or "tiny")
    except UserError as error:
        lines = str(error).replace(str(path), "PATH").split("\n")
        proper = len(lines) == 2 and lines[0].startswith("--checkpoint PATH: ") and all(map(str.isprintable, lines))
        return lines[0] if proper and max(map(len, lines)) < 1000 else f"BAD {error}"
    except BaseException as error:
        return f"BAD {type(error).__name__} {error}"
    return "read"


def stand_in() -> None:
    """Add `tiny` as the only small architecture; the others are torchvision's."""
    real, known = torchvision.models.get_model, classifier.known_archs()
    classifier.known_archs = lambda: ["tiny", *known]
    torchvision.models.get_model = lambda arch, weights=None, num_classes=0: (
        Tiny(num_classes) if arch == "tiny" else real(arch, weights=weights, num_classes=num_classes)
    )


def main(folder: Path) -> None:
    stand_in()
    for name, whole in bases().items():  # what is loaded lazily
        (folder / name).write_bytes(whole)
        read(folder / name)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    every = list(cases(folder))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES + sum(len(data) for _, data in every),) * 2)
    ends, slowest_sec = {}, 0.0
    for name, data in every:
        path = folder / name
        path.write_bytes(data)
        print(name, file=sys.stderr, flush=True)  # the last line of a process that died
        signal.setitimer(signal.ITIMER_PROF, CASE_SEC)  # ends this process
        start = time.process_time()
        ends[name] = read(path)
        slowest_sec = max(slowest_sec, time.process_time() - start)
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.unlink()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    left = sorted(file.name for file in folder.iterdir() if file.name not in bases())
    print(json.dumps({"ends": ends, "slowest_sec": slowest_sec, "grown_mib": grown_kib / 1024, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
