"""File names in the folders of a run and of a reproduction."""

from __future__ import annotations

CONFIG, ENVIRONMENT, LOG = "config.json", "environment.jsonl", "log.jsonl"
TENSORBOARD, PROFILE = "tensorboard", "profile.json"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
# One file per rank: undecodable images, partly decodable images, and batches that a GPU failed to decode (rank 0's
# are in the log).
BAD_IMAGES, DAMAGED_IMAGES, DECODING_FAILURES = (
    "bad_images.rank_{}.txt",
    "damaged_images.rank_{}.txt",
    "decoding.rank_{}.jsonl",
)
# Written into a run's folder by its evaluations.
EVALUATION, RESULT = "evaluation.json", "result.json"
LANDSCAPE, LANDSCAPE_ARRAYS, LANDSCAPE_PICTURES = "landscape.json", "landscape.npz", "landscape"
# Files of a budget.
PLAN, CALIBRATION, USAGE = "plan.json", "calibration.json", "usage.json"
# Files of a reproduction and of a report.
RESULTS, RESULTS_TABLE = "results.json", "results.md"
REPORT, REPORT_MARKDOWN = "report.html", "report.md"
