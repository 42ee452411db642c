"""Untrusted torch.save files: checked before and after torch reads them.

torch.load(weights_only=True) runs no foreign code, but trusts the sizes and structures in a file. A few bytes can make
it allocate gigabytes, print an exponential structure, or overflow the stack while hashing a key. So only the pickle
opcodes that torch.save needs for tensors and plain values are accepted.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fast_spatial.errors import UserError
from fast_spatial.pipelines.text import some

_LEGACY_PICKLES = 5  # in a file of torch < 1.6: magic number, version, machine, content, storage keys
_DEEPEST = 32  # levels of nesting
_LONGEST = 2**22  # opcodes of a pickle; a checkpoint has 35 per tensor
# The names that a pickle may import (GLOBAL) and call (REDUCE).
_CALLABLE = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
}
_ATOMS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_ATOMS |= {"SHORT_BINSTRING"}
# Number of values that an opcode pops before it pushes one. Those of _TO_MARK also pop all values above the mark.
_TAKES = {"EMPTY_LIST": 0, "EMPTY_DICT": 0, "EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1}
_TAKES |= {"APPEND": 2, "SETITEM": 3, "REDUCE": 2, "BUILD": 2}
_TO_MARK = {"TUPLE": 0, "APPENDS": 1, "SETITEMS": 1}
_EXPECTED = "use a .safetensors file, or a torch.save file that holds only tensors and plain values"
_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


class Refused(UserError):
    """The error of a rejected file; the caller adds its path."""


def unsafe(reason: str = "") -> Refused:
    """The error for a file that is not a checkpoint, or has more in it than a checkpoint needs."""
    return Refused(f"unsafe or damaged checkpoint{reason and f': {reason}'}", _EXPECTED)


def check_file(path: Path) -> None:
    """Raise a Refused if a file is damaged, or uses more of the format than torch.save needs."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            try:
                archive = zipfile.ZipFile(file)
            except zipfile.BadZipFile:
                raise unsafe("it is damaged or truncated") from None
            size = path.stat().st_size
            if archive.comment or archive.start_dir != _directory_offset(file, size):
                raise unsafe("it is more than one zip archive, or damaged")
            _check_archive(archive, size)
        else:
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                check_pickle(file)


def _directory_offset(file: IO[bytes], size: int) -> int:
    """Offset of a zip archive's directory by its own record. zipfile corrects it for leading bytes; torch does not."""
    file.seek(max(0, size - 98))
    tail = file.read()[-98:]  # the end record, 22 bytes; in large files after another of 56 and its locator of 20
    if tail[-42:-38] == b"PK\x06\x07":
        (at,) = struct.unpack("<Q", tail[-34:-26])
        return int(struct.unpack("<Q", tail[48:56])[0]) if at == size - 98 else -1
    return int(struct.unpack("<I", tail[-6:-2])[0])


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Check that records are uncompressed, fit the file, and match their checksums; torch ignores the checksums."""
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise unsafe("it has two records with the same name")
    if any(record.filename.endswith("constants.pkl") for record in records):
        raise unsafe("it is a TorchScript program; save the state_dict() of its module")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise unsafe("its records are compressed, which torch.save never does")
    if sum(record.file_size for record in records) > size:
        raise unsafe("its records claim more bytes than it has")
    for record in records:
        name = record.filename.partition("/")[2]  # without the name of the file
        if not record.CRC:
            del record.CRC  # torch.save can omit checksums
        try:
            with archive.open(record) as stream:
                if name.endswith(".pkl"):
                    check_pickle(io.BytesIO(stream.read()))
                while stream.read(1 << 20):
                    pass
        except (zipfile.BadZipFile, EOFError) as error:
            what = "checksum" if "CRC" in str(error) else "header"
            raise Refused(
                f"damaged: its record {some([name])} does not match its {what}",
                "copy it again, or use another checkpoint",
            ) from None


def check_pickle(file: IO[bytes]) -> None:
    """Raise a Refused at the first opcode that tensors and plain values do not need; the rest is not read.

    It simulates the stack without building objects. A value is "atom", "empty" or "flat" (a tuple of atoms and names),
    "other", or an imported name itself ("module name").
    """
    frames: list[list[str]] = [[]]  # a stack per open mark
    memo: dict[int, str] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == _LONGEST:
            raise unsafe("its pickle has more opcodes than a checkpoint needs")
        name, stack = opcode.name, frames[-1]
        if name in _ATOMS:
            stack.append("atom")
        elif name == "MARK":
            frames.append([])
        elif name == "GLOBAL":
            stack.append(_known_name(str(argument)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]  # type: ignore[index]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])  # type: ignore[index]
        elif name in _TAKES:
            start = len(stack) - _TAKES[name]
            stack[start:] = [_result(name, stack[start:])]
        elif name in _TO_MARK:
            above = frames.pop()
            stack = frames[-1]
            start = len(stack) - _TO_MARK[name]
            stack[start:] = [_result(name, stack[start:] + above)]
        elif name == "PROTO" and argument != 2:
            raise unsafe(f"it was saved with pickle_protocol={argument}; only 2, torch.save's default, is supported")
        elif name not in ("PROTO", "STOP"):
            raise unsafe(f"unexpected pickle opcode {name}")


def _known_name(name: str) -> str:
    module, _, attribute = name.partition(" ")
    data_type = module == "torch" and (
        attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    )
    if name not in _CALLABLE and not data_type:
        raise unsafe(f"its pickle imports {some([name.replace(' ', '.')])}")
    return name


def _result(name: str, taken: list[str]) -> str:
    """The value that an opcode pushes for the popped ones. Nested keys and callees are refused: they may be endless."""
    right = True
    if name == "REDUCE":
        right = taken[0] in _CALLABLE and (taken[0] != "collections OrderedDict" or taken[1] == "empty")
    elif name in ("SETITEM", "SETITEMS"):
        right = all(key == "atom" for key in taken[1::2])
    elif name == "BINPERSID":
        right = taken == ["flat"]
    if not right:
        raise unsafe(f"unexpected operands of pickle opcode {name}")
    if name == "EMPTY_TUPLE":
        return "empty"
    return "flat" if name.startswith("TUPLE") and all(kind == "atom" or " " in kind for kind in taken) else "other"


def check_content(content: Any, size: int) -> None:
    """Raise a Refused unless a file of `size` bytes holds plain values, and tensors with no more bytes than that."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    layer = [content]
    for _ in range(_DEEPEST):
        values = [value for value in layer if not (id(value) in seen or seen.add(id(value)))]  # type: ignore[func-returns-value]
        layer = []
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                if value.numel() * value.element_size() > storage.nbytes():
                    raise unsafe(f"a tensor claims the shape {list(value.shape)}, but has {storage.nbytes()} bytes")
            elif isinstance(value, dict):
                attributes = getattr(value, "__dict__", {})  # an OrderedDict's could hide its methods
                if attributes.keys() - {"_metadata"}:
                    raise unsafe("a dictionary has attributes")
                layer += [*value.values(), *attributes.values()]
            elif isinstance(value, (list, tuple)):
                layer += value
            elif not isinstance(value, _PLAIN):
                raise unsafe(f"it holds a {type(value).__name__}, which is neither a tensor nor a plain value")
    if layer:
        raise unsafe("its values are nested too deeply")
    if sum(storages.values()) > size:
        raise unsafe("its tensors claim more bytes than it has")
