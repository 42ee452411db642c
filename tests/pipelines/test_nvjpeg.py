"""DALI finds the installed nvJPEG, not torchvision's copy under the same name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fast_spatial.pipelines.nvjpeg import installed_libraries

VERSION = """
import ctypes
import {first}
import torchvision
library, number = ctypes.CDLL({name!r}), ctypes.c_int()
print([(library.nvjpegGetProperty(part, ctypes.byref(number)), number.value)[1] for part in range(2)])
"""


def version_by_name(first: str, name: str) -> str:
    code = VERSION.format(first=first, name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["pipelines", "fast_spatial.models.classifier", "benchmarks"])
def test_the_installed_library_is_found_by_its_name(first):
    found = {path.name: path for path in reversed(installed_libraries())}
    if not found:
        pytest.skip("no nvJPEG is installed")
    for name, installed in found.items():
        assert version_by_name(first, name) == version_by_name("torchvision", str(installed))
