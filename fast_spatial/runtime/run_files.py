"""The names of the files in a run's folder, and in that of a reproduction."""

from __future__ import annotations

CONFIG, ENVIRONMENT, LOG = "config.json", "environment.jsonl", "log.jsonl"
TENSORBOARD, PROFILE = "tensorboard", "profile.json"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
# Images that were skipped, images of which a part can be decoded, batches that a GPU failed to decode (rank 0's are
# in the log).
BAD_IMAGES, DAMAGED_IMAGES, DECODING_FAILURES = (
    "bad_images.rank_{}.txt",
    "damaged_images.rank_{}.txt",
    "decoding.rank_{}.jsonl",
)
# Left beside a run by evaluations of it.
EVALUATION, RESULT = "evaluation.json", "result.json"
LANDSCAPE, LANDSCAPE_ARRAYS, LANDSCAPE_PICTURES = "landscape.json", "landscape.npz", "landscape"
# Of a budget.
PLAN, CALIBRATION, USAGE = "plan.json", "calibration.json", "usage.json"
# Of a reproduction, and of a report.
RESULTS, RESULTS_TABLE = "results.json", "results.md"
REPORT, REPORT_MARKDOWN = "report.html", "report.md"
