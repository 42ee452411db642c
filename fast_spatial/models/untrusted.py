"""Files of torch.save that strangers wrote: what they may ask for, checked before and after torch reads them.

torch.load(weights_only=True) runs no foreign code, but it believes what a file claims: a few bytes make it allocate
gigabytes, print an exponential structure, or overflow the stack while it hashes a key. So only the few instructions
that torch.save needs for tensors and plain values get through.
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

_LEGACY_PICKLES = 5  # of torch.save before 1.6: magic number, version, machine, content, keys of the storages
_DEEPEST = 32  # levels of values
_LONGEST = 2**22  # instructions of a pickle; a checkpoint has 35 per tensor
# What a pickle may call. A call is written as REDUCE, on a name written as GLOBAL.
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
# Values that an instruction takes from the stack to push one; those of _TO_MARK take what lies above the mark, too.
_TAKES = {"EMPTY_LIST": 0, "EMPTY_DICT": 0, "EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1}
_TAKES |= {"APPEND": 2, "SETITEM": 3, "REDUCE": 2, "BUILD": 2}
_TO_MARK = {"TUPLE": 0, "APPENDS": 1, "SETITEMS": 1}
_EXPECTED = "expected a file written by torch.save that holds tensors and plain values, or .safetensors"
_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


class Refused(UserError):
    """What is wrong with a file, and what to do; whoever asked for the file names it."""


def unsafe(reason: str = "") -> Refused:
    """The refusal of a file that is no checkpoint, or asks for more than one does."""
    return Refused(f"not a checkpoint that can be read safely{reason and f': {reason}'}", _EXPECTED)


def check_file(path: Path) -> None:
    """Raise a Refused that says what is wrong if a file is damaged or asks for what torch.save does not need."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            try:
                archive = zipfile.ZipFile(file)
            except zipfile.BadZipFile:
                raise unsafe("it is damaged, or cut short") from None
            size = path.stat().st_size
            if archive.comment or archive.start_dir != _directory_offset(file, size):
                raise unsafe("it is more than one zip archive, or damaged")
            _check_archive(archive, size)
        else:
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                check_pickle(file)


def _directory_offset(file: IO[bytes], size: int) -> int:
    """Where a zip archive says its directory starts: zipfile looks elsewhere if other bytes precede, torch does not."""
    file.seek(max(0, size - 98))
    tail = file.read()[-98:]  # the end record of 22 bytes, in large files after one of 56 and its locator of 20
    if tail[-42:-38] == b"PK\x06\x07":
        (at,) = struct.unpack("<Q", tail[-34:-26])
        return int(struct.unpack("<Q", tail[48:56])[0]) if at == size - 98 else -1
    return int(struct.unpack("<I", tail[-6:-2])[0])


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Records are stored as they are, fit the file, and match their checksums, which torch does not look at."""
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise unsafe("it has two records of one name")
    if any(record.filename.endswith("constants.pkl") for record in records):
        raise unsafe("it is a TorchScript program; save the state_dict() of its module")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise unsafe("its records are compressed, which torch.save never does")
    if sum(record.file_size for record in records) > size:
        raise unsafe("its records claim more bytes than it has")
    for record in records:
        name = record.filename.partition("/")[2]  # without the name of the file
        if not record.CRC:
            del record.CRC  # torch.save was told to leave checksums away
        try:
            with archive.open(record) as stream:
                if name.endswith(".pkl"):
                    check_pickle(io.BytesIO(stream.read()))
                while stream.read(1 << 20):
                    pass
        except (zipfile.BadZipFile, EOFError) as error:
            what = "checksum" if "CRC" in str(error) else "header"
            raise Refused(
                f"damaged: its record {some([name])} does not match its {what}", "copy it again, or use another one"
            ) from None


def check_pickle(file: IO[bytes]) -> None:
    """Raise a Refused at the first instruction that tensors and plain values do not need; leaves the rest unread.

    It follows the stack, but builds nothing: a value is "atom", "flat" (a tuple of atoms and names), "other", or the
    name itself ("module name").
    """
    frames: list[list[str]] = [[]]  # a stack per open mark
    memo: dict[int, str] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == _LONGEST:
            raise unsafe("its pickle has more instructions than a checkpoint needs")
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
            raise unsafe(f"it was saved with pickle_protocol={argument}, of which torch reads little; 2 is usual")
        elif name not in ("PROTO", "STOP"):
            raise unsafe(f"it holds more than tensors and plain values: pickle's {name}")


def _known_name(name: str) -> str:
    module, _, attribute = name.partition(" ")
    data_type = module == "torch" and (
        attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    )
    if name not in _CALLABLE and not data_type:
        raise unsafe(f"it asks for {some([name.replace(' ', '.')])}")
    return name


def _result(name: str, taken: list[str]) -> str:
    """What an instruction makes of what it takes; keys and callees are no structures, which could be endless."""
    right = True
    if name == "REDUCE":
        right = taken[0] in _CALLABLE and (taken[0] != "collections OrderedDict" or taken[1] == "empty")
    elif name in ("SETITEM", "SETITEMS"):
        right = all(key == "atom" for key in taken[1::2])
    elif name == "BINPERSID":
        right = taken == ["flat"]
    if not right:
        raise unsafe(f"its pickle is none of torch.save's: {name}")
    if name == "EMPTY_TUPLE":
        return "empty"
    return "flat" if name.startswith("TUPLE") and all(kind == "atom" or " " in kind for kind in taken) else "other"


def check_content(content: Any, size: int) -> None:
    """Raise a Refused if what a file of `size` bytes held is more than tensors, backed by its bytes, and values."""
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
                    raise unsafe(f"a tensor claims {list(value.shape)} numbers and holds {storage.nbytes()} bytes")
            elif isinstance(value, dict):
                attributes = getattr(value, "__dict__", {})  # of an OrderedDict; they could hide its methods
                if attributes.keys() - {"_metadata"}:
                    raise unsafe("a dictionary has attributes")
                layer += [*value.values(), *attributes.values()]
            elif isinstance(value, (list, tuple)):
                layer += value
            elif not isinstance(value, _PLAIN):
                raise unsafe(f"it holds more than tensors and plain values: {type(value).__name__}")
    if layer:
        raise unsafe("its values are nested too deeply")
    if sum(storages.values()) > size:
        raise unsafe("its tensors claim more bytes than it has")
