"""Fill the generated blocks of README.md and docs/ from result files: `python -m benchmarks.tables`.

With `--check`, compare only and name the documents that are stale.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.on_gpu import goals, ran
from fast_spatial.config.modes import row_name
from fast_spatial.config.recipes import PUBLISHED_CONDITIONS, PUBLISHED_LADDER, todays_command
from fast_spatial.pipelines.placement import HW_DECODER_LOAD
from fast_spatial.reporting.tables import grid_note, published_table, results_table
from fast_spatial.runtime.text import aligned

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The speed table of the README: one line per part of the program.
_CHOSEN = ("warp.opencv", "pipeline.standard", "pipeline.ffcv_jpg", "step.worst10", "grid")
_TRAINING_IMAGES, _EPOCHS = 1_281_167, 110  # ImageNet, the reference recipe


def digits(content: dict[str, Any]) -> str:
    """The table of the digits, followed by the published one."""
    rows = content["results"]
    seeds = len({row["seed"] for row in rows})
    published = published_table([(row["mode"], row["degrees"]) for row in rows])
    note = grid_note((row_name(row["mode"], row["degrees"]), row) for row in rows)
    minutes = sum(row["seconds_train"] + row["seconds_evaluate"] for row in rows) / seeds / 60
    return (
        f"{results_table(rows, 'ours, digits')}\n\n{published}\n\n"
        f"(Top-1 accuracy in percent, evaluated at 30 degrees and 24 px. Ours: mean of {seeds} seeds ± half their "
        f"range, {minutes:.0f} minutes of training and evaluation per seed on {content['hardware']}."
        f"{note and ' ' + note})"
    )


def _command(content: dict[str, Any]) -> str:
    """The command that made a result file, under today's names of its flags."""
    command: str = content["command"]
    return todays_command(command) if "launch.py" in command.split(maxsplit=1)[0] else command


def speed(content: dict[str, Any]) -> str:
    """All comparisons of a result file of `launch.py bench`."""
    rounds = {found["rounds"] for found in content["comparisons"]}
    return (
        f"{_comparisons(content['comparisons'])}\n\n(Median and range of {' or '.join(map(str, sorted(rounds)))} "
        f"interleaved rounds on {content['hardware']} ({', '.join(content['cpu_flags'])}), torch "
        f"{content['versions']['torch']}: `{_command(content)}`.)"
    )


def chosen_speed(content: dict[str, Any]) -> str:
    """One comparison per part of the program."""
    by_name = {found["name"]: found for found in content["comparisons"]}
    return _comparisons([by_name[name] for name in _CHOSEN], f"on {content['hardware']}")


def _comparisons(comparisons: Sequence[dict[str, Any]], head: str = "part") -> str:
    rows = [[head, "ours", "baseline", "speedup", "baseline setup"], ["---", "---:", "---:", "---:", "---"]]
    for found in comparisons:
        unit = found["unit"]
        ratio = f"**{found['ratio']:.1f}** ({found['ratio_min']:.1f} to {found['ratio_max']:.1f})"
        rates = [f"{number(found[side]['median'])} {unit}" for side in ("ours", "baseline")]
        rows.append([f"`{found['name']}`", *rates, ratio, found["baseline"]["what"]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def faults(content: dict[str, Any]) -> str:
    """The result of the fault drill, in words."""
    same, resumed = content["bit_identical"], content["resumed"]
    identical = "all" if same == resumed else f"{same} of them"
    return (
        f"A drill killed {content['kills']} runs of the digits, in one and in two processes. Runs were killed in each "
        f"phase ({', '.join(content['by_phase'])}) and in each way ({', '.join(content['by_way'])}). "
        f"{resumed} of {content['kills']} resumed and finished, {identical} bit-identical to an uninterrupted run. "
        f"With a checkpoint every {content['checkpoint_every_steps']} steps, a kill lost at most "
        f"{content['lost_steps_max']} steps; SIGTERM lost {content['lost_steps_max_sigterm']}.\n\n"
        f"(On {content['hardware']}: `{_command(content)}`.)"
    )


def budgets(content: dict[str, Any]) -> str:
    """The time budgets used, in words, and the table of results of one budget."""
    runs, table, killed = content["runs"], content["table"], content["killed"]
    slow = sum(bool(run["slow"]) for run in runs)
    used = [run["took_sec"] for run in runs]
    epochs = ", ".join(f"{row['mode']} {row['epochs']:.1f}" for row in table["results"])
    return (
        f"Timed from outside, start-up and report included: {len(runs)} reproductions of one row with a budget of "
        f"{runs[0]['budget_sec']:.0f} s ended after {min(used):.1f} to {max(used):.1f} s. During {slow} of them, other "
        f"processes used all cores for part of the time. The table of the digits, with a budget of "
        f"{table['budget_sec']:.0f} s, ended after {table['took_sec']:.1f} s. Killed half-way and restarted, it ended "
        f"after {killed['took_sec']:.1f} s of use. Epochs trained: {epochs}.\n\n"
        f"{results_table(table['results'], 'ours, digits')}\n\n"
        f"(On {content['hardware']}: `{_command(content)}`.)"
    )


def foresight(content: dict[str, Any]) -> str:
    """Step times: planned and measured."""
    rows = [["row", "image size", "step, planned", "step, measured", "error"]]
    for found in content["steps"]:
        seconds = [f"{found[f'{name}_step_sec']:.3g} s" for name in ("planned", "measured")]
        rows.append([found["row"], str(found["side"]), *seconds, f"{round(found['off_pct']):+d} %"])
    return (
        f"{aligned(rows)}\n\n(1,000 classes of synthetic JPEG files, {content['batch']} images per step. Measured "
        f"after the plan, in a separate process, on {content['hardware']}: `{_command(content)}`.)"
    )


def second_read(content: dict[str, Any]) -> str:
    """The cost of reading images twice, in words."""
    parts = [
        f"{found['share_pct']:.2g} % for {found['network']} ({found['read_twice']} of {found['images']} images are "
        f"read twice, {found['grid_views_per_image']:.0f} of the grid's views judged per image)"
        for found in content["networks"]
    ]
    return (
        f"The second read takes a small part of an evaluation's CPU time: {', and '.join(parts)}.\n\n"
        f"(Median of {content['rounds']} interleaved rounds on {content['hardware']}: `{_command(content)}`.)"
    )


_COMPARED = ("standard", "random", "worst10")


class _Cost(NamedTuple):
    """One measurement of the cost of worst10: values by mode, and the slowdown of worst10."""

    what: str
    where: str
    values: Sequence[str]  # standard, random, worst10
    ratio: float


def _costs() -> list[_Cost]:
    """The cost in every result file that has it, CPUs first."""
    found = []
    digits_ = read("digits")
    for kind, what in (("train", "training on the digits"), ("evaluate", "all four attacks on 300 digits")):
        times = [
            statistics.fmean(row[f"seconds_{kind}"] for row in digits_["results"] if row["mode"] == mode)
            for mode in _COMPARED
        ]
        shown = [f"{value:.0f} s" for value in times]
        found.append(_Cost(what, digits_["hardware"], shown, times[2] / times[0]))
    plan = read("plan")
    size = max(step["side"] for step in plan["steps"])
    steps = {step["row"].split(",")[0]: step["measured_step_sec"] for step in plan["steps"] if step["side"] == size}
    shown = [f"{steps[mode]:.1f} s" for mode in _COMPARED]
    what = f"a step of {plan['batch']} images at {size} px"
    found.append(_Cost(what, plan["hardware"], shown, steps["worst10"] / steps["standard"]))
    for result in gpu_results():
        trained = result["stages"].get("train", {}).get("measured", {})  # one after the other, with the same settings
        standard, worst = (trained.get(f"train_{mode}", {}).get("images_per_sec") for mode in ("standard", "worst10"))
        if standard and worst:
            where, ratio = f"one {result['environment']['gpus'][0]}", standard / worst
            shown = [f"{rate:,.0f} images/s" for rate in (standard, worst)]
            found.append(_Cost("training from files", where, [shown[0], "", shown[1]], ratio))
            shown = [f"{_EPOCHS * _TRAINING_IMAGES / rate / 3600:.1f} h" for rate in (standard, worst)]
            what = f"{_EPOCHS} epochs of ImageNet (extrapolated from that rate)"
            found.append(_Cost(what, where, [shown[0], "", shown[1]], ratio))
    return found


def cost() -> str:
    """The cost of worst-of-10 training, compared with standard training."""
    rows = [[found.what, found.where, *found.values, f"{found.ratio:.1f}"] for found in _costs()]
    return aligned([["measured", "on", *_COMPARED, "worst10 / standard"], *rows])


def cost_in_short() -> str:
    """The cost of worst-of-10 training in a few sentences, without evaluations."""
    costs = [found for found in _costs() if "attacks" not in found.what]
    sentences = []
    for where in dict.fromkeys(found.where for found in costs):
        parts = [
            f"{found.what} takes {found.ratio:.1f} times as long ({found.values[2]} against {found.values[0]})"
            for found in costs
            if found.where == where
        ]
        sentences.append(f"On {where}, {'; '.join(parts)}.")
    return f"**What does worst10 cost**, compared with `standard`? {' '.join(sentences)}"


def ladder() -> str:
    """Accuracy by epochs, as published elsewhere."""
    rows = [["epochs", "natural accuracy", "minutes on one A100"]]
    rows += [[str(epochs), f"{run.top1_pct:.1f} %", f"{run.minutes:.0f}"] for epochs, run in PUBLISHED_LADDER.items()]
    return f"{aligned(rows)}\n\nConditions: {PUBLISHED_CONDITIONS}."


def status(results: Sequence[dict[str, Any]]) -> str:
    """The parts that have run on a GPU, in a few sentences."""
    if not results:
        return "- **GPU**: no part has run on a GPU yet."
    words = {"ran in part": "Failed in part", "failed": "Failed", "cut off": "Cut off", "untried": "Not run"}
    lines = []
    for result in results:
        about = result["environment"]
        by_state: dict[str, list[str]] = {}
        for part in ran.PARTS:
            by_state.setdefault(ran.state(part, result), []).append(re.sub(r" \(`[^`]*`\)$", "", part.what))
        others = "".join(f" {word}: {', '.join(by_state[kind])}." for kind, word in words.items() if kind in by_state)
        lines.append(
            f"- **GPU**: {len(by_state.get('ran', []))} of {len(ran.PARTS)} parts ran on {', '.join(about['gpus'])} "
            f"({ran.versions(about)}).{others}"
        )
    return "\n".join(lines)


def gpus(results: Sequence[dict[str, Any]]) -> str:
    """The tables of results and goals of `benchmarks/gpu.sh`, one per GPU model."""
    if not results:
        return "(No GPU results yet.)"
    tables = []
    for result in results:
        lines = [["", "result", "ceiling", "goal", ""]]
        for row in goals.rows(result):
            name = row.verdict.partition(": ")
            lines.append([row.what, row.result, row.ceiling, row.goal, name[0] if row.met is not None else ""])
        about = result["environment"]
        tables.append(f"{aligned(lines)}\n\n(On {about['hardware']}, {ran.versions(about)}: `benchmarks/gpu.sh OUT`.)")
        if placed := placements(result):
            tables.append(f"Images per second on the same machine, by placement (blank: not measured):\n\n{placed}")
    return "\n\n".join(tables)


_PLACED = r"(?P<on>[a-z-]+)(_engine_(?P<share>[.0-9]+))?(_warp)?_(?P<warp>[a-z]+)"
# (what is measured, stage, pattern of the measurement's name)
_PLACEMENTS = (
    ("loader alone", "loader", rf"loader_(?P<mode>[a-z0-9]+)_{_PLACED}"),
    ("training", "placements", rf"train_(?P<mode>[a-z0-9]+)_decode_{_PLACED}"),
)


def placements(result: dict[str, Any]) -> str:
    """Images per second of loading and training, by placement; "" if none."""
    rates: dict[str, dict[str, str]] = {}
    for what, stage, pattern in _PLACEMENTS:
        for name, figures in goals.measurements(result, (stage,), pattern):
            about = re.fullmatch(pattern, name)
            if about and "images_per_sec" in figures:
                usual = HW_DECODER_LOAD if about["on"] == "gpu" else 0  # default if the name does not contain it
                share = float(about["share"] or usual)
                engine = f", {share:.0%} by the JPEG engine" if about["on"] == "gpu" else ""
                row = rates.setdefault(f"`--decode {about['on']} --warp {about['warp']}`{engine}", {})
                row[f"{about['mode']}, {what}"] = number(figures["images_per_sec"])
    columns = list(dict.fromkeys(column for row in rates.values() for column in row))
    lines = [[label, *(row.get(column, "") for column in columns)] for label, row in rates.items()]
    return aligned([["", *columns], *lines]) if lines else ""


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


# Block name to (result file, function that renders it).
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "digits": ("digits", digits),
    "cpu": ("cpu", speed),
    "cpu-chosen": ("cpu", chosen_speed),
    "grid-224": ("grid-224", speed),
    "faults": ("faults", faults),
    "budget": ("budget", budgets),
    "plan": ("plan", foresight),
    "second-read": ("second-read", second_read),
}
# Blocks rendered from all GPU result files (`gpu-CARD.json`); there may be none.
OF_GPUS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "gpus": gpus,
    "gpus-ran": ran.what_ran,
    "status": status,
}
# Blocks rendered from several sources.
OTHERS: dict[str, Callable[[], str]] = {"cost": cost, "cost-short": cost_in_short, "ladder": ladder}


def read(name: str) -> dict[str, Any]:
    """A result file's content."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def gpu_results() -> list[dict[str, Any]]:
    """The content of all GPU result files.

    Raises:
        ValueError: if one is a dry run on a CPU.

    """
    found = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")))
        if found[-1]["dry"]:
            raise ValueError(f"{path}: a dry run on a CPU, not a GPU result. Remove it")
    return found


def fill(text: str) -> str:
    """The text with every block between `<!-- results: NAME -->` and `<!-- end -->` regenerated."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name in OF_GPUS:
            made = OF_GPUS[name](gpu_results())
        elif name in OTHERS:
            made = OTHERS[name]()
        else:
            file, made_of = TABLES[name]
            made = made_of(read(file))
        return f"<!-- results: {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- results: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def documents() -> list[Path]:
    """The documents that may hold generated blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(words: Sequence[str]) -> int | str:
    """Fill or check all documents; returns 0 or an error message."""
    try:
        made = {path: fill(path.read_text(encoding="utf-8")) for path in documents()}
    except ValueError as error:
        return str(error)
    stale = [path for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    if [*words] == ["--check"]:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        return f"{names}: stale. Run python -m benchmarks.tables" if stale else 0
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
