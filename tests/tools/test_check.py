"""`launch.py check-data` finds what would end a run or change its result, caches it, and writes exclusions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fast_spatial import commands, preflight
from fast_spatial.config.commands import CheckConfig
from fast_spatial.errors import UserError
from fast_spatial.kernels.host import usable_cpus
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import ImageIndex, list_classes, read_exclusions, read_index
from fast_spatial.pipelines.inspection.decoding import Report, inspect_files
from fast_spatial.pipelines.inspection.findings import (
    CHANGES,
    KILLS,
    KINDS,
    NOTE,
    Content,
    Finding,
    inspect_header,
    read_regular,
    survey,
)
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.sampler import BatchSampler
from fast_spatial.tools import check_data as check
from fast_spatial.tools.check_data import check_data
from tests.config.test_cli import refused
from tests.helpers.nasty_images import FILES, encode, jpeg, picture, write_files, write_others
from tests.pipelines.test_decoding import children_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A separate cache folder, on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)
    return folder / "fast_spatial"


@pytest.fixture
def data(tmp_path):
    """A valid folder: two classes, six training and two validation images, all different."""
    for seed, name in enumerate(("train/a/1", "train/a/2", "train/a/3", "train/b/1", "train/b/2", "train/b/3")):
        write(tmp_path / "data" / f"{name}.jpg", jpeg(seed))
    write(tmp_path / "data/val/a/1.jpg", jpeg(10))
    write(tmp_path / "data/val/b/1.jpg", jpeg(11))
    return tmp_path / "data"


@pytest.fixture
def undecoded(monkeypatch):
    """Files are not opened: for findings of folders alone."""
    monkeypatch.setattr(check, "inspect_files", lambda paths, **_: (Report(path, []) for path in paths))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def found_in(data: Path, **options) -> dict[str, list[str]]:
    """The kinds of findings of a check, by path; exit status and report must agree with them."""
    report = data.parent / "report.json"
    status = check_data(CheckConfig(data=str(data), json=str(report), **{"workers": 1, **options}))
    content = json.loads(report.read_text())
    assert status == any(finding["severity"] != NOTE for finding in content["findings"])
    found: dict[str, list[str]] = {}
    for finding in content["findings"]:
        assert finding["severity"] == KINDS[finding["kind"]].severity
        assert finding["detail"]
        found.setdefault(finding["path"], []).append(finding["kind"])
    assert sum(content["counts"].values()) == len(content["findings"])
    return found


def training_survives(paths: list[Path]) -> bool:
    """Whether training's loader decodes these files. The crop is the whole image if it has 96 x 64 pixels."""
    names = np.array([os.fsencode(path) for path in paths])
    width = names.dtype.itemsize + 1
    matrix = names.astype(f"S{width}").view(np.uint8).reshape(len(paths), width)
    images = ImageIndex(paths[0].parent, matrix, np.zeros(len(paths), np.int64), ("all",))
    loader = Loader(
        BatchSampler(images, global_batch_size=len(paths), seed=0, train=True),
        augmentation=Augmentation(center=False, scale=(1.0, 1.0), ratio=(1.5, 1.5)),
        views=Views(0),
        side=32,
        threads=1,
    )
    try:
        next(iter(loader.epoch(0)))
    except (RuntimeError, UserError):
        return False
    return True


# --- files


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """The corpus: expected kinds and reports, by path."""
    folder = tmp_path_factory.mktemp("nasty")
    expected = write_files(folder) | write_others(folder)
    reports = {Path(report.path): report for report in inspect_files(map(str, expected), processes=2)}
    return expected, reports


def test_the_corpus_is_nasty_enough():
    kinds = [kind for _, kinds in FILES.values() for kind in kinds]
    assert len(FILES) >= 22
    assert len([kind for kind in kinds if KINDS[kind].severity == KILLS]) >= 12


def test_every_nasty_file_has_its_verdict(nasty):
    expected, reports = nasty
    found = {path.name: [finding.kind for finding in report.findings] for path, report in reports.items()}
    assert found == {path.name: kinds for path, kinds in expected.items()}


def test_training_survives_exactly_the_files_that_a_check_lets_pass(nasty):
    expected, reports = nasty
    # A too large image is refused by its header; training would decode it, and run out of memory.
    decoded = [path for path in expected if path.name in FILES and expected[path] != ["too_large"]]
    good = [path for path in decoded if not reports[path].problem]
    assert training_survives(good)
    survivors = [path.name for path in decoded if reports[path].problem and training_survives([good[0], path])]
    assert survivors == []


def test_a_verdict_says_what_the_decoder_said(nasty):
    _, reports = nasty
    details = {path.name: report.problem for path, report in reports.items()}
    assert details["cut_half_way.jpg"] == ("cannot be decoded: Premature end of JPEG data. Stopped at line 14/64")
    assert details["giant_header.jpg"] == "65000 x 65000 pixels in its header"
    assert details["error_page.jpg"] == "cannot be decoded: format unknown to the decoder"
    assert details["dangling.jpg"] == "unreadable: No such file or directory"
    assert details["fine.jpg"] is None


@contextmanager
def nobody_special():
    """Without root's rights."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_is_forbidden_cannot_be_read():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "train" / "forbidden.jpg"
        write(file, jpeg())
        assert isinstance(read_regular(str(file)), Content)
        file.chmod(0)
        with nobody_special():
            assert read_regular(str(file)) == Finding("unreadable", "unreadable: Permission denied")
        file.parent.chmod(0)
        with nobody_special(), pytest.raises(UserError, match=r"cannot read .*/train \(Permission denied\)"):
            list_classes(Path(folder), "train")


def test_what_was_found_in_a_header_counts_even_if_the_rest_of_it_is_broken():
    content = encode(picture().convert("CMYK"), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert inspect_header("x.png", content) == [
        Finding("wrong_extension", "the content is JPEG"),
        Finding("cmyk", "CMYK"),
    ]


def test_every_kind_says_in_a_sentence_what_to_do():
    assert {kind.severity for kind in KINDS.values()} == {KILLS, CHANGES, NOTE}
    for name, kind in KINDS.items():
        assert 30 < len(kind.advice) < 100, name
        assert not kind.advice.endswith("."), name


# --- folders


def test_a_good_folder_has_no_findings(data, capsys):
    assert found_in(data) == {}
    assert "no findings: every image decodes" in capsys.readouterr().out


@pytest.mark.usefixtures("undecoded")
def test_classes_that_differ_and_empty_ones_are_found(data):
    write(data / "train/c/1.jpg", jpeg(20))
    (data / "train/d").mkdir()
    write(data / "val/e/notes.txt", b"nothing")
    assert found_in(data) == {
        "train/c": ["classes_differ"],
        "train/d": ["classes_differ", "empty_class"],
        "val": ["ignored"],
        "val/e": ["classes_differ", "empty_class"],
    }


def test_a_flat_split_is_found_and_the_other_is_checked(data):
    shutil.rmtree(data / "val")
    write(data / "val/1.jpg", jpeg())
    write(data / "train/a/4.jpg", b"")
    assert found_in(data) == {"val": ["no_classes"], "train/a/4.jpg": ["empty"]}
    assert found_in(data, splits=("train",)) == {"train/a/4.jpg": ["empty"]}
    ((_, flat),) = survey(data, "val").findings
    assert flat.detail.startswith(f"{data / 'val'} contains 1 images but no class folders")
    assert "\n" not in flat.detail


@pytest.mark.usefixtures("undecoded")
def test_a_link_to_a_folder_above_is_found_and_refused_in_training(data):
    (data / "train/a/again").symlink_to("..")
    (data / "train/b/elsewhere").symlink_to("../a")  # leads to the loop, which is named where it is met
    found = found_in(data)
    assert found.pop("train/a/again") == found.pop("train/b/elsewhere/again") == ["bad_folder"]
    assert found == {}
    with pytest.raises(UserError, match=r"^--data: cannot read .*train/a/again: symbolic link loop"):
        read_index(data, "train")


@pytest.mark.usefixtures("undecoded")
def test_links_that_end_are_followed(data):
    (data / "train/c").symlink_to("a")
    (data / "val/c").symlink_to("a")
    assert found_in(data) == {}
    assert len(read_index(data, "train")) == 9


@pytest.mark.usefixtures("undecoded")
def test_files_that_are_not_used_are_counted(data):
    for name in ("train/a/notes.txt", "train/b/more.txt", "train/a/old.gif", "train/loose.jpg", "train/README"):
        write(data / name, b"something")
    report = data.parent / "report.json"
    assert found_in(data) == {"train": ["ignored"]}
    (finding,) = json.loads(report.read_text())["findings"]
    assert finding["detail"] == "not used: .txt 2, .gif 1, .jpg 1, no extension 1"


@pytest.mark.usefixtures("undecoded")
def test_names_that_count_in_another_order_than_numbers_are_noted(data):
    for split in ("train", "val"):
        for name in ("a", "b"):
            shutil.rmtree(data / split / name)
        for number in (1, 2, 10):
            write(data / split / f"{number}" / "1.jpg", jpeg(number + 50 * (split == "val")))
    assert found_in(data) == {"train": ["class_order"], "val": ["class_order"]}
    for split in ("train", "val"):
        (data / split / "10").rename(data / split / "3")
    assert found_in(data) == {}


def test_a_training_image_that_is_in_val_too_is_found_whatever_its_name(data):
    shutil.copy(data / "val/a/1.jpg", data / "train/b/copy.JPEG")
    write(data / "train/b/nearly.jpg", jpeg(10) + b"x")
    shutil.copy(data / "train/a/1.jpg", data / "train/a/4.jpg")  # twice in train is nobody's affair
    assert found_in(data) == {"train/b/copy.JPEG": ["duplicate"]}
    assert found_in(data, splits=("train",)) == {}


def test_a_training_image_that_is_decoded_before_its_copy_in_val_is_found(data):
    write(
        data / "val/a/0.jpg", encode(Image.new("RGB", (7000, 7000)), "JPEG")
    )  # keeps one process busy while the other goes on
    for number in range(2, 40):
        write(data / f"val/b/{number}.jpg", jpeg(100 + number))
    shutil.copy(data / "val/a/1.jpg", data / "train/a/0.jpg")
    assert found_in(data, workers=2) == {"train/a/0.jpg": ["duplicate"]}


# --- the command


def test_names_of_any_bytes_are_printed_and_those_with_line_breaks_are_not_excluded(data, capsys):
    write(data / "train/a/odd \udcff.jpg", b"")
    write(data / "train/a/two\nlines.jpg", b"")
    listing = data.parent / "exclude.txt"
    found_in(data, write_exclusions=str(listing))
    out = capsys.readouterr().out
    assert r"    'train/a/odd \udcff.jpg': cannot be decoded: empty file" in out
    assert r"'train/a/two\nlines.jpg' cannot be excluded: its name contains a line break. Rename or remove it" in out
    assert read_exclusions(listing) == ["train/a/odd \udcff.jpg"]
    assert r"'train/a/odd \udcff.jpg'" in read_index(data, "train").without(listing).describe_left_out()


def test_the_summary_counts_names_and_advises(data, capsys):
    for number in range(5):
        write(data / f"train/a/bad_{number}.jpg", b"")
    write(data / "val/a/turned.jpg", FILES["rotated.jpg"][0]())
    write(data / "val/a/cmyk.jpg", FILES["cmyk.jpg"][0]())
    with pytest.raises(SystemExit) as ended:
        commands.main(["check-data", "--data", str(data)])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{data}: decoding 15 images in {usable_cpus()} processes"
    assert lines[1:-2] == [
        "Ends a run:",
        f"  5 empty: {KINDS['empty'].advice}",
        *(f"    train/a/bad_{number}.jpg: cannot be decoded: empty file" for number in range(3)),
        "    and 2 more",
        "Changes a result:",
        f"  1 rotated: {KINDS['rotated'].advice}",
        "    val/a/turned.jpg: EXIF orientation 6",
        "Harmless:",
        f"  1 cmyk: {KINDS['cmyk'].advice}",
        "    val/a/cmyk.jpg: CMYK",
    ]
    assert lines[-1] == "5 images can be excluded: write a list with --write-exclusions FILE, use it as --exclude FILE"


@pytest.mark.parametrize(("kind", "status"), [("cmyk", 0), ("rotated", 1), ("empty", 1)])
def test_notes_alone_are_no_failure(data, monkeypatch, kind, status):
    monkeypatch.setattr(check, "inspect_files", lambda paths, **_: (Report(p, [Finding(kind, "it is")]) for p in paths))
    with pytest.raises(SystemExit) as ended:
        commands.main(["check-data", "--data", str(data)])
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing required flag: --data"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", "data", "--splits", "test"], "--splits test: choose one or both of train, val"),
        (["--data", "data", "--splits", "val,val"], "--splits val,val: choose one or both of train, val"),
        (["--data", "data", "--workers", "-1"], "--workers -1: must be at least 0"),
        (["--data", "data/train"], "--data data/train: no folder train/ in it (found: a, b)"),
        (["--data", "data", "--write-exclusions", "mine.txt"], "--write-exclusions mine.txt: file exists"),
        (
            ["--data", "data", "--write-exclusions", "data/x.txt"],
            "--write-exclusions data/x.txt: must be outside the data",
        ),
        (["--data", "data", "--json", "data/train/a/x.json"], "--json data/train/a/x.json: must be outside the data"),
        (["--data", "data", "--json", "data/train/a/1.jpg/x.json"], "data/train/a/1.jpg is a file, not a folder"),
    ],
)
def test_a_check_that_cannot_work_is_refused(data, monkeypatch, capsys, words, message):
    monkeypatch.chdir(data.parent)
    Path("mine.txt").write_text("precious")
    assert message in refused(capsys, "check-data", *words)[0]
    assert Path("mine.txt").read_text() == "precious"


# --- what was found is remembered


def test_a_second_check_decodes_what_has_changed_and_finds_the_same(data, monkeypatch, capsys):
    write(data / "train/a/bad.jpg", b"")
    write(data / "train/a/cmyk.jpg", FILES["cmyk.jpg"][0]())
    shutil.copy(data / "val/a/1.jpg", data / "train/b/copy.jpg")
    (data / "train/a/dangling.jpg").symlink_to("nowhere.jpg")
    first = found_in(data)
    assert "; 0 reused" in capsys.readouterr().out
    write(data / "train/a/2.jpg", bytes((data / "train/a/2.jpg").stat().st_size))
    assert found_in(data) == {**first, "train/a/2.jpg": ["not_an_image"]}
    # Neither the changed file nor the unreadable one, which may have been fixed since.
    assert "; 10 reused" in capsys.readouterr().out
    (data / "train/a/dangling.jpg").unlink()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    del first["train/a/dangling.jpg"]
    assert found_in(data) == {**first, "train/a/2.jpg": ["not_an_image"]}


def test_a_memory_that_cannot_be_used_is_named(data, cache, capsys):
    found_in(data)
    (file,) = cache.glob("check-*.sqlite")
    file.write_bytes(b"no database at all" * 100)
    assert "file is not a database" in refused_late(capsys, "check-data", "--data", str(data))


def refused_late(capsys, *words: str) -> str:
    capsys.readouterr()
    assert commands.main(list(words)) == 2
    return str(capsys.readouterr().err)


# Comes to no end with the hundredth file.
STUCK = """
import itertools, pathlib, signal, time
import fast_spatial.pipelines.inspection.findings
def inspect(*file, really=fast_spatial.pipelines.inspection.findings.inspect_header, number=itertools.count(1)):
    if next(number) == 100:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        pathlib.Path("stuck/now").touch()
        time.sleep(HANG_SEC)
    return really(*file)
fast_spatial.pipelines.inspection.findings.inspect_header = inspect
"""
HANG_SEC = 600


def test_ctrl_c_ends_it_at_once_and_it_continues(tmp_path, cache, capsys):
    for number in range(600):
        write(tmp_path / f"data/val/a/{number}.jpg", jpeg(number % 7) + bytes(number))
    write(tmp_path / "stuck/sitecustomize.py", STUCK.replace("HANG_SEC", str(HANG_SEC)).encode())
    stuck = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'stuck'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "check-data",
        "--data",
        "data",
        "--splits",
        "val",
        "--workers",
        "1",
    ]
    with subprocess.Popen(command, cwd=tmp_path, env=stuck, process_group=0, stderr=subprocess.PIPE) as running:
        try:
            give_up = time.monotonic() + HANG_SEC / 2
            while not (tmp_path / "stuck/now").exists():
                assert running.poll() is None and time.monotonic() < give_up
                time.sleep(0.05)
            children = children_of(running.pid)
            assert children
            os.killpg(running.pid, signal.SIGINT)
            assert running.wait(HANG_SEC / 2) == 130  # it waits for no verdict
        finally:
            running.kill()
        assert running.stderr is not None and running.stderr.read() == b""
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    kept = remembered_in(cache)
    assert kept == 96  # all batches of 32 before
    assert check_data(CheckConfig(data=str(tmp_path / "data"), splits=("val",))) == 0
    assert f"{kept} reused" in capsys.readouterr().out


def remembered_in(cache: Path) -> int:
    """Number of files in a cache."""
    for file in cache.glob("check-*.sqlite"):
        with closing(sqlite3.connect(file)) as database, suppress(sqlite3.OperationalError):
            return int(database.execute("SELECT COUNT(*) FROM files").fetchone()[0])
    return 0


# --- leaving out


def test_what_ends_a_run_and_training_copies_are_listed_and_the_data_folder_is_left_as_it_was(data):
    write(data / "train/a/bad.jpg", b"")
    write(data / "val/b/bad #1.jpg", b"text")
    write(data / "train/a/cmyk.jpg", FILES["cmyk.jpg"][0]())
    write(data / "train/a/turned.jpg", FILES["rotated.jpg"][0]())
    write(data / "train/c/1.jpg", jpeg(40))
    shutil.copy(data / "val/a/1.jpg", data / "train/b/copy.jpg")
    listing = data.parent / "new" / "exclude.txt"
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    found_in(data, write_exclusions=str(listing))
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    lines = listing.read_text().splitlines()
    names = ["train/a/bad.jpg", "train/b/copy.jpg", "val/b/bad #1.jpg"]
    assert [line for line in lines if not line.startswith("#")] == names
    assert "# duplicate: identical to val/a/1.jpg" in lines
    assert read_index(data, "train").without(listing).left_out.names == tuple(names[:2])
    assert read_index(data, "val").without(listing).left_out.names == tuple(names[2:])
