"""The wheel: everything below one name, so that it can be installed beside anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder: Path = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools leaves its own folders beside the sources.
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
    words = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*PIP, *words], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_it_owns_one_name_and_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"fast_spatial", about}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fast_spatial").rglob("*.py")}
    for folder in ("kernels", "pipelines"):
        expected |= {f"fast_spatial/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    for pattern in ("fast_spatial/config/recipes/*.toml", "fast_spatial/reporting/templates/*"):
        data = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert data and data <= {*names}


@pytest.mark.slow
def test_it_works_beside_the_package_kernels(wheel, tmp_path):
    """PyPI has a package named kernels; each finds its own modules, wherever the checkout is."""
    target = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), "kernels", str(wheel)], check=True)
    code = (
        f"import importlib.util, sys; sys.path.insert(0, {str(target)!r})\n"
        "import fast_spatial, fast_spatial.kernels.warp, fast_spatial.pipelines.loader\n"
        "from fast_spatial.config.recipes import names\n"
        "print(importlib.util.find_spec('kernels').origin)  # it cannot be imported: what it needs is not installed\n"
        "print(fast_spatial.kernels.warp.__file__, fast_spatial.pipelines.loader.__file__)\n"
        "print(*names(), fast_spatial.evaluate.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    *files, words = done.stdout.split("\n", maxsplit=2)
    assert " ".join(files).split() == [
        str(target / name)
        for name in ("kernels/__init__.py", "fast_spatial/kernels/warp.py", "fast_spatial/pipelines/loader.py")
    ]
    assert words.startswith("reference ") and words.endswith(" evaluate\n")
