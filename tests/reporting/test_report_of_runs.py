"""The report of runs: its numbers against made-up folders whose numbers are known, and what it says of gaps."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fast_spatial.config.modes import PUBLISHED
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.spatial import grid
from fast_spatial.reporting import deviations
from fast_spatial.reporting.document import Code, Section, Table, Text, to_html, to_markdown
from fast_spatial.reporting.report import write_report
from fast_spatial.reporting.runs import find_runs, rows_of
from fast_spatial.reporting.statistics import Interval, difference, mean, paired_difference, wilson
from fast_spatial.reporting.tables import points, signed
from tests.golden.report_runs import write_all, write_evaluation, write_landscape, write_run

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "report.md"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder, page, Markdown) of the made-up runs' report."""
    folder = tmp_path_factory.mktemp("report")
    runs = write_all(folder / "runs")
    write_report([runs], runs, price=2.5)
    page, text = ((runs / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    return folder, page, text


def report_of(*runs: Path) -> str:
    out = runs[0].parent / "out"
    write_report(runs, out)
    return (out / "report.md").read_text(encoding="utf-8")


def cells(text: str, first: str, number: int = 0) -> list[str]:
    """The cells of the row of that name in the n-th table that has one."""
    lines = [line for line in text.splitlines() if re.match(rf"\| +{re.escape(first)} +\|", line)]
    return [cell.strip() for cell in lines[number].strip("|").split("|")][1:]


def shown(interval: Interval) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in interval))


def test_the_markdown_is_the_stored_one(report):
    """If this is stale on purpose: python -m tests.golden.report_runs, and read what changed."""
    folder, _, text = report
    assert text.replace(str(folder), "FOLDER") == GOLDEN.read_text(encoding="utf-8")


def test_accuracies_have_their_intervals(report):
    _, _, text = report
    assert cells(text, "standard")[:4] == [shown(wilson(right, 50)) for right in (45, 30, 20, 5)]
    natural, grid = (mean([a / 50, b / 50]) for a, b in ((40, 42), (20, 22)))
    seeds = [shown(natural._replace(high=1.0)), "70.0", "60.0", shown(grid)]  # equal seeds know no spread
    assert cells(text, "random, 30 degrees (2 seeds)") == seeds


def test_rows_are_compared_on_the_same_images(report):
    _, _, text = report
    # Of the first seed 40 images are right and of standard 45, the same 40 among them; and so on.
    expected = [
        paired_difference(40, 0, 5, 5),
        paired_difference(30, 5, 0, 15),
        paired_difference(20, 10, 0, 20),
        paired_difference(5, 15, 0, 30),
    ]
    assert cells(text.split("Points gained over standard")[1], "random, 30 degrees") == [points(d) for d in expected]


def test_cost_is_of_the_logs(report):
    _, _, text = report
    cost = text.split("## Cost")[1]
    # Two GPUs: an hour of training, a quarter of evaluation, a tenth of landscape; 4 records of 0.25 kWh.
    assert cells(cost, "standard") == ["2", "60.0 min", "15.0 min", "2.70", "6.75", "1,050", "1.000"]
    assert cells(cost, "worst10, 40 degrees") == ["2", "60.0 min", "–", "2.00", "5.00", "1,050", "1.000"]
    assert "9.90 GPU-hours, landscapes and the evaluations above included, which come to 24.75 at 2.5 each" in cost


def test_robustness_is_of_the_landscape(report):
    _, _, text = report
    table = text.split("The same in numbers")[1]
    assert cells(table, "standard") == [shown(wilson(right, 4)) for right in (4, 1, 1, 1, 4, 4, 1)]
    assert cells(table, "random, 30 degrees") == [shown(wilson(right, 4)) for right in (4, 4, 3, 2, 4, 4, 2)]


def test_the_page_stands_alone_and_is_well_formed(report):
    folder, page, _ = report

    class Check(HTMLParser):
        open: list[str]

        def __init__(self) -> None:
            super().__init__()
            self.open, self.sources, self.anchors, self.ids = [], [], [], []  # type: ignore[var-annotated]

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)
            about = dict(attrs)
            self.sources += [about[name] for name in ("src", "href") if name in about]
            self.ids += [about["id"]] if tag == "section" else []
            assert tag not in ("link", "iframe")
            if tag == "img":
                assert about["alt"]

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    check = Check()
    check.feed(page)
    assert check.open == []
    anchors = [source[1:] for source in check.sources if source.startswith("#")]
    assert anchors == check.ids and len(anchors) == 9
    pictures = [source for source in check.sources if not source.startswith("#")]
    assert len(pictures) == 4  # untouched and worst, of two rows
    stored = (folder / "runs/standard/seed_0/landscape/00000_worst.jpg").read_bytes()
    assert pictures[1] == "data:image/jpeg;base64," + base64.b64encode(stored).decode()
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(chart)
    values = [json.loads(found) for found in re.findall(r"data-values='(.*?)'", page)]
    assert len(values) == 6 + 6 + 2 * 3 + 2
    for found in values:
        assert [len(found["columns"])] * len(found["rows"]) == [len(row) for row in found["texts"]]
        assert (len(found["columns"]), len(found["rows"])) == (len(found["xs"]), len(found["ys"]))
    assert "http" not in re.sub(r"http://www\.w3\.org/(2000/svg|1999/xlink)", "", page)


def test_the_page_and_the_markdown_say_the_same(report):
    _, page, text = report
    for number in re.findall(r"\d+\.\d \[[^\]]+\]", text):
        value, interval = number.split(" ", 1)
        assert f'{value} <span class="interval">{interval}</span>' in page


def values_of(page: str) -> dict[str, dict[str, Any]]:
    """The pointer's values of each figure, by its caption."""
    shown = re.findall(r"data-values='(.*?)'><figcaption>(.*?)</figcaption>", page)
    return {re.sub("<.*?>", "", caption): json.loads(found) for found, caption in shown}


def test_rotations_are_compared_with_how_often_they_were_drawn(report):
    found = values_of(report[1])["Rotations of the worst views in the last epoch, untouched ones aside"]
    shown = [text.removeprefix("worst10, 40 degrees: ") for text in found["texts"][0]]
    times = [1.5, 1.0, 0.5, 0.5, 1.0, 1.5]  # of 120 counts in 6 bins
    assert shown == [f"{one:.3f} times as often as drawn" for one in times]
    assert (found["columns"][0], found["columns"][-1]) == ("−33.33 degrees", "33.33 degrees")  # middles of bins


def test_the_pointer_reads_the_landscapes(report):
    values = values_of(report[1])
    curve = values["Right on every view: rotations alone"]
    first = dict(zip(curve["columns"], curve["texts"][0]))["up to 10°"]
    assert first == "standard: 25.0 [4.6, 69.9] %\nrandom, 30 degrees: 100.0 [51.0, 100.0] %"
    dots = values["Right on every view: translations, all rotations"]
    assert dots["columns"] == ["up to 0 px", "up to 12 px", "up to 24 px"]
    assert dots["texts"][0][0] == "standard: 25.0 [4.6, 69.9] %\nrandom, 30 degrees: 50.0 [15.0, 85.0] %"
    model = values["standard: accuracy, mean over ty"]
    assert dict(zip(model["columns"], model["texts"][2]))["−4°"] == "75.0 %"
    assert model["rows"][0] == "tx −24 px"
    image = values["random, 30 degrees: val/cat/0.jpg, class cat"]
    assert (image["rows"][0], image["columns"][0], image["texts"][0][0]) == ("ty 24 px", "tx 24 px, −30°", "3.000 nats")
    assert image["texts"][4][-2] == "2.801 nats"


def test_a_panel_of_an_image_lies_where_the_content_moves(tmp_path):
    """Wrong at tx 24 and ty -12 alone, at the first angle: far left, and below the middle."""
    run = write_run(tmp_path / "run", "standard")
    write_landscape(run, [30.0, 30.0])
    (view,) = np.flatnonzero((grid(SpatialLimits.from_px(30)) * [1, 224, 224] == [-30, 24, -12]).all(axis=1))
    correct = np.ones((2, GRID_VIEWS), dtype=bool)
    correct[0, view] = False
    loss = np.zeros((2, GRID_VIEWS), dtype=np.float16)
    np.savez(run / "landscape.npz", loss=loss, correct=np.packbits(correct, axis=1))
    write_report([run], tmp_path, 0.0)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    values = json.loads(re.findall(r"data-values='(.*?)'", page)[-1])
    wrong = [(r, c) for r, row in enumerate(values["texts"]) for c, text in enumerate(row) if "wrong" in text]
    assert wrong == [(3, 0)]
    assert (values["rows"][3], values["columns"][0]) == ("ty −12 px", "tx 24 px, −30°")


def test_it_is_rebuilt_from_the_folders_alone(report, tmp_path):
    folder, page, _ = report
    shutil.copytree(folder / "runs", tmp_path / "moved")
    write_report([tmp_path / "moved"], tmp_path / "out", price=2.5)
    again = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert again.replace(str(tmp_path / "moved"), str(folder / "runs")) == page


# --- against the published table


def test_all_of_imagenet_is_compared_with_the_published_numbers(tmp_path):
    run = write_run(tmp_path / "run", "worst10")
    right = {"natural": 34_000, "random": 34_000, "worst10": 30_000, "grid": 24_000}
    write_evaluation(run, right, images=50_000, listed=False)
    text = report_of(run)
    published = PUBLISHED["worst10", 30.0]
    assert cells(text, "published, ImageNet") == [f"{value:.1f}" for value in published]
    expected = [
        difference(wilson(n, 50_000), wilson(round(500 * p), 50_000)) for n, p in zip(right.values(), published)
    ]
    assert cells(text, "ours less published") == [points(d) for d in expected]
    assert cells(text, "ours less published")[0] == "−1.1 [−1.7, −0.5]"


@pytest.mark.parametrize(("key", "value"), [("num_images", 49_999), ("partial", True), ("degrees", 40.0)])
def test_anything_else_is_not(tmp_path, key, value):
    run = write_run(tmp_path / "run", "worst10")
    write_evaluation(run, dict.fromkeys(("natural", "random", "worst10", "grid"), 9), images=50_000, listed=False)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["summary"][key] = value
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = report_of(run)
    assert "ours less published" not in text
    assert "published, ImageNet" in text


def test_images_in_subfolders_are_of_their_class(tmp_path):
    run = write_run(tmp_path / "run", "worst10")
    write_evaluation(run, {"natural": 3, "random": 3, "worst10": 3, "grid": 3}, images=4)
    evaluation = json.loads((run / "evaluation.json").read_text())
    for number, image in enumerate(evaluation["images"]):
        image["path"] = f"val/{'cat' if number < 3 else 'dog'}/day/{number}.jpg"
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = report_of(run)
    assert cells(text, "cat")[0] == "3" and cells(text, "dog")[0] == "1"
    assert "| day" not in text


# --- rows and gaps


def test_runs_of_one_recipe_are_a_row_and_others_are_told_apart(tmp_path):
    for name, seed, epochs in (("a", 0, 2), ("b", 1, 2), ("c", 0, 3)):
        write_run(tmp_path / name, "random", seed=seed, epochs=epochs)
    rows = rows_of(find_runs([tmp_path / name for name in "abc"]))
    assert [[run.folder.name for run in row.runs] for row in rows] == [["a", "b"], ["c"]]
    assert [row.name for row in rows] == [f"random, 30 degrees ({tmp_path / name})" for name in "ac"]


def test_a_folder_named_twice_is_read_once(tmp_path):
    run = write_run(tmp_path / "runs" / "standard" / "seed_0", "standard")
    assert len(find_runs([tmp_path / "runs", run])) == 1


def test_a_run_that_has_only_begun_is_said_to_be_so(tmp_path):
    run = write_run(tmp_path / "run", "standard")
    for name in ("log.jsonl", "environment.jsonl"):
        (run / name).unlink()
    text = report_of(run)
    for sentence in (
        "was not evaluated (0 of 2 epochs are in its log)",
        "No run here was evaluated, so there is no table.",
        "No run here has a log yet.",
        "No run here has finished two epochs.",
        "No run here has a landscape: `launch.py landscape",
        "No run here has verdicts or losses of single images.",
        "The command is not known",
        "what it ran on is not known",
    ):
        assert sentence in text


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("evaluation.json", "{", "evaluation.json: it is damaged"),
        ("evaluation.json", "{}", "evaluation.json: it is damaged (no summary)"),
        ("evaluation.json", '{"summary": 5}', "evaluation.json: it is damaged (no summary)"),
        ("landscape.json", "{}", "landscape.json: it cannot be read"),
        ("landscape.json", "[]", "landscape.json: it cannot be read"),
        ("landscape.npz", "", "landscape.json: it cannot be read"),
        ("log.jsonl", "[]\n", "log.jsonl: it is damaged"),
        ("landscape.npz", "no archive", "landscape.json: it cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_shown(tmp_path, name, content, sentence):
    run = write_run(tmp_path / "run", "standard")
    write_evaluation(run, {"natural": 45, "random": 30, "worst10": 20, "grid": 5})
    write_landscape(run, [30.0, 4.0, 4.0, 0.0])
    (run / name).write_text(content)
    text = report_of(run)
    assert sentence in text
    assert ("90.0 [78.6, 95.7]" in text) == (name != "evaluation.json")


@pytest.mark.parametrize(
    "changed",
    [{"crop_scale": [0.1, 0.5, 1.0]}, {"crop_ratio": [1.0]}, {"jitter": 0}, {"mode": "worst11"}, {"epochs": "x"}],
)
def test_a_damaged_configuration_is_named(tmp_path, changed):
    file = write_run(tmp_path / "run", "standard") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(UserError, match=r"config\.json: not the file of a run"):
        find_runs([tmp_path / "run"])


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    run = write_run(tmp_path / "run", "standard")
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event": "tra')
    (found,) = find_runs([run])
    assert len(found.log) == 4 and found.problems == []


def test_a_grid_on_few_images_is_said_to_be_so_and_has_their_interval(tmp_path):
    run = write_run(tmp_path / "run", "standard")
    write_evaluation(run, {"natural": 45, "random": 30, "worst10": 20, "grid": 5})
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["summary"] |= {"grid_top1_pct": 25.0, "grid_num_images": 20}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = report_of(run)
    assert cells(text, "standard") == [shown(wilson(n, count)) for n, count in ((45, 50), (30, 50), (20, 50), (5, 20))]
    assert "The grid met fewer images than the other attacks: 20 of 50 (standard)." in text


def test_no_grid_no_gpu_and_no_energy_are_dashes_or_left_out(tmp_path):
    run = write_run(tmp_path / "run", "standard")
    write_evaluation(run, {"natural": 45, "random": 30, "worst10": 20, "grid": 5})
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["summary"] |= {"grid_top1_pct": None, "grid_num_images": 0}
    for image in evaluation["images"]:
        image["grid"] = None
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    for name in ("log.jsonl", "environment.jsonl"):
        text = (run / name).read_text().replace('"energy_kwh"', '"x"').replace('["NVIDIA H100", "NVIDIA H100"]', "[]")
        (run / name).write_text(text)
    text = report_of(run)
    assert cells(text, "standard")[3] == "–"
    assert "| trained as | training | evaluation | images/s |" in text
    assert "used no GPU" in text and "NVML gave none" in text
    assert cells(text, "cat") == ["25", "88 / –"]


# --- deviations


def test_the_built_in_deviations_are_those_of_the_documents():
    text = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")
    text = text.split("## Deviations from the reference")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    rows = tuple(tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines)
    assert rows == deviations.BUILT_IN


def test_options_that_are_not_the_references_are_listed_with_whose_they_are():
    def config(**options: Any) -> TrainConfig:
        return TrainConfig(**{"data": "d", "out": "o", "mode": "standard", "dtype": "float32", **options})

    assert deviations.options({"a": config(), "b": config(mode="worst10", degrees=40.0, seed=3)}) == []
    changed = {
        "a": config(epochs=16, max_train_images=1000, dtype="auto"),
        "b": config(epochs=16, lr=0.2, dtype="auto"),
    }
    assert deviations.options(changed) == [
        ("--epochs", "110", "16"),
        ("--lr", "0.1", "0.1 (a); 0.2 (b)"),
        ("--max-train-images", "all", "1000 (a); all (b)"),
        ("--dtype", "float32", "auto: half precision where the hardware has it"),
    ]


# --- the document


def test_texts_are_escaped_in_both():
    sections = [Section("A & b", [Text("1 < 2, `x<y` [0, 1]"), Table(["a|b"], [["<c>"]]), Code("a && b")])]
    page, text = to_html("<t>", sections), to_markdown("<t>", sections)
    assert "1 &lt; 2, <code>x&lt;y</code>" in page and "&lt;c&gt;" in page and "a &amp;&amp; b" in page
    assert "<c>" not in page and "<t>" not in page.replace("<th>", "")
    assert "| a\\|b |" in text and "    a && b" in text


@pytest.mark.parametrize(
    ("value", "plain", "plus"),
    [(1.26, "1.3", "+1.3"), (-0.51, "−0.5", "−0.5"), (-0.04, "0.0", "0.0"), (0, "0.0", "0.0")],
)
def test_zero_has_no_sign(value, plain, plus):
    assert signed(value, ".1f") == plain
    assert signed(value, ".1f", plus=True) == plus


# --- what it needs


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("fast_spatial.reporting.report", ["torch", "torchvision", "nvidia.dali", "scipy.stats", "matplotlib.pyplot"]),
        ("fast_spatial.reporting.tables", ["numpy", "scipy", "matplotlib", "jinja2"]),
        ("fast_spatial.commands", ["numpy", "scipy", "matplotlib", "jinja2"]),
    ],
)
def test_large_packages_are_imported_only_where_they_are_needed(module, unneeded):
    code = f"import sys, {module}; print([name for name in {unneeded} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
