"""Write the README's tables from the result files: `python -m benchmarks.tables`; `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu import goals, ran
from fast_spatial.config.modes import row_name
from fast_spatial.pipelines.placement import HW_DECODER_LOAD
from fast_spatial.reporting.tables import grid_note, published_table, results_table
from fast_spatial.runtime.text import aligned

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def digits(content: dict[str, Any]) -> str:
    """The digits' table, the published one beside it for the trend."""
    rows = content["results"]
    seeds = len({row["seed"] for row in rows})
    published = published_table([(row["mode"], row["degrees"]) for row in rows])
    note = grid_note((row_name(row["mode"], row["degrees"]), row) for row in rows)
    minutes = sum(row["seconds_train"] + row["seconds_evaluate"] for row in rows) / seeds / 60
    return (
        f"{results_table(rows, 'ours, digits')}\n\n{published}\n\n"
        f"(Top-1 accuracy in percent, judged at 30 degrees and 24 px; mean of {seeds} seeds ± half their range; "
        f"{minutes:.0f} minutes a seed on {content['hardware']}.{note and ' ' + note})"
    )


def speed(content: dict[str, Any]) -> str:
    """Ours against what it replaces."""
    rows = [["part", "ours", "theirs", "times faster", "they are"]]
    for found in content["comparisons"]:
        unit = found["unit"]
        ratio = f"**{found['ratio']:.1f}** ({found['ratio_min']:.1f} to {found['ratio_max']:.1f})"
        rates = [f"{number(found[side]['median'])} {unit}" for side in ("ours", "baseline")]
        rows.append([f"`{found['name']}`", *rates, ratio, found["baseline"]["what"]])
    rows.insert(1, ["---", "---:", "---:", "---:", "---"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rounds = {found["rounds"] for found in content["comparisons"]}
    about = (
        f"(Median and range of {' or '.join(map(str, sorted(rounds)))} rounds in which all took turns, on "
        f"{content['hardware']} ({', '.join(content['cpu_flags'])}), torch {content['versions']['torch']}: "
        f"`{content['command']}`.)"
    )
    return "\n".join([*lines, "", about])


def faults(content: dict[str, Any]) -> str:
    """What the fault drill found, in words."""
    return (
        f"A drill killed {content['kills']} runs of the digits, in one and in two processes, at every kind of moment "
        f"({', '.join(content['by_phase'])}) and in every way ({', '.join(content['by_way'])}). "
        f"{content['resumed']} were continued to their end, {content['bit_identical']} of them to the same bits as a "
        f"run that nothing interrupted. With a checkpoint every {content['checkpoint_every_steps']} steps, "
        f"{content['lost_steps_max']} steps were lost at most, and {content['lost_steps_max_sigterm']} to SIGTERM.\n\n"
        f"(On {content['hardware']}: `{content['command']}`.)"
    )


def budgets(content: dict[str, Any]) -> str:
    """How budgets were kept, in words, and what a table came to."""
    runs, table, killed = content["runs"], content["table"], content["killed"]
    slow = sum(bool(run["slow"]) for run in runs)
    used = [run["took_sec"] for run in runs]
    epochs = ", ".join(f"{row['mode']} {row['epochs']:.1f}" for row in table["results"])
    return (
        f"Timed from outside, start-up and report included: {len(runs)} reproductions of one row within "
        f"{runs[0]['budget_sec']:.0f} s, {slow} of them while other processes took all cores for a part of it, ended "
        f"after {min(used):.1f} to {max(used):.1f} s. The table of the digits, within {table['budget_sec']:.0f} s, "
        f"ended after {table['took_sec']:.1f} s; killed half-way without a warning and started again, after "
        f"{killed['took_sec']:.1f} s in use. It came to (epochs: {epochs}):\n\n"
        f"{results_table(table['results'], 'ours, digits')}\n\n"
        f"(On {content['hardware']}: `{content['command']}`.)"
    )


def foresight(content: dict[str, Any]) -> str:
    """What plans expected of steps, and what they took."""
    rows = [["row", "side", "step, planned", "step, measured", "off"]]
    for found in content["steps"]:
        seconds = [f"{found[f'{name}_step_sec']:.3g} s" for name in ("planned", "measured")]
        rows.append([found["row"], str(found["side"]), *seconds, f"{round(found['off_pct']):+d} %"])
    return (
        f"{aligned(rows)}\n\n(1,000 classes of synthetic JPEG files, {content['batch']} images a step, measured in a "
        f"process of its own after the plan was made, on {content['hardware']}: `{content['command']}`.)"
    )


def gpus(results: Sequence[dict[str, Any]]) -> str:
    """The closing tables of `benchmarks/gpu.sh`, of every card."""
    if not results:
        return "(No result file of a GPU yet.)"
    tables = []
    for result in results:
        lines = [["", "result", "ceiling", "goal", ""]]
        for row in goals.rows(result):
            name = row.verdict.partition(": ")
            lines.append([row.what, row.result, row.ceiling, row.goal, name[0] if row.met is not None else ""])
        about = result["environment"]
        tables.append(f"{aligned(lines)}\n\n(On {about['hardware']}, {ran.versions(about)}: `benchmarks/gpu.sh OUT`.)")
        if placed := placements(result):
            tables.append(
                "Images per second on the same machine, by where images are decoded and views made (blank: not "
                f"measured):\n\n{placed}"
            )
    return "\n\n".join(tables)


_PLACED = r"(?P<on>[a-z-]+)(_engine_(?P<share>[.0-9]+))?(_warp)?_(?P<warp>[a-z]+)"
# Of what, in which stage, by which names.
_PLACEMENTS = (
    ("loader alone", "loader", rf"loader_(?P<mode>[a-z0-9]+)_{_PLACED}"),
    ("training", "placements", rf"train_(?P<mode>[a-z0-9]+)_decode_{_PLACED}"),
)


def placements(result: dict[str, Any]) -> str:
    """Images per second of loaders and trainings, by where images are decoded and views made; "" if none."""
    rates: dict[str, dict[str, str]] = {}
    for what, stage, pattern in _PLACEMENTS:
        for name, figures in goals.measurements(result, (stage,), pattern):
            about = re.fullmatch(pattern, name)
            if about and "images_per_sec" in figures:
                usual = HW_DECODER_LOAD if about["on"] == "gpu" else 0  # where the name does not tell
                share = float(about["share"] or usual)
                engine = f", {share:.0%} by the JPEG engine" if about["on"] == "gpu" else ""
                row = rates.setdefault(f"`--decode {about['on']} --warp {about['warp']}`{engine}", {})
                row[f"{about['mode']}, {what}"] = number(figures["images_per_sec"])
    columns = list(dict.fromkeys(column for row in rates.values() for column in row))
    lines = [[label, *(row.get(column, "") for column in columns)] for label, row in rates.items()]
    return aligned([["", *columns], *lines]) if lines else ""


def number(value: float) -> str:
    """Three digits are enough."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "digits": digits,
    "cpu": speed,
    "grid-224": speed,
    "faults": faults,
    "budget": budgets,
    "plan": foresight,
}


# Of all result files of GPUs, `gpu-CARD.json`, be they none.
OF_GPUS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {"gpus": gpus, "gpus-ran": ran.what_ran}


def gpu_results() -> list[dict[str, Any]]:
    """The result files of GPUs.

    Raises:
        ValueError: if one is a trial on a CPU.

    """
    found = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")))
        if found[-1]["dry"]:
            raise ValueError(f"{path}: a trial on a CPU shows nothing about GPUs; remove it")
    return found


def fill(text: str) -> str:
    """The text with every table between `<!-- results: NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name in OF_GPUS:
            made = OF_GPUS[name](gpu_results())
        else:
            made = TABLES[name](json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        return f"<!-- results: {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- results: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if fill(text) == text else "README.md is stale: run python -m benchmarks.tables")
    try:
        readme.write_text(fill(text), encoding="utf-8")
    except ValueError as error:
        sys.exit(str(error))
