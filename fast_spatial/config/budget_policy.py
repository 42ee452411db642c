"""The tuned constants of budgets, in one place: of the plan, of each task's share of the time, and of the pacer.

docs/budgets.md says what changes if one of them is doubled or halved. Imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetPolicy:
    """Constants of a budget. Shares are fractions of 1; an interval is the time between two decisions of the pacer.

    Attributes:
        fewest_rows: rows that are never left out, whatever the budget; 3 is the paper's comparison.
        grid_share: largest share of the budget for the grids of all rows.
        landscape_share: largest share of the budget for the landscapes of all rows.
        validation_share: largest share of the steps' time for validation between epochs.
        milestones_share: a requested recipe with milestones must fit into this share of the training time.
        reference_share: the reference recipe is chosen, unasked, if it fits into this share of the training time.
        views_of_broken_image: average number of grid views that are judged of an image that the grid breaks.
        finish_sec: time for a training's last checkpoint and exit, if no evaluation follows.
        report_sec: time to write the tables and the report.
        report_row_sec: the same, per row.
        end_sec: time for the exit of the command on a busy machine.
        end_share: reserve at the end, as a share of the budget.
        unused_share: the plan mentions unused time if it is more than this share of the budget.
        judging_patience: judging may exceed its expected time by this share if other rows follow.
        last_landscape_factor: the last landscape may use up to this multiple of the planned images.
        fewest_epochs: a row that would get fewer epochs is not started.
        interval_share: interval, as a share of the training's time.
        lead_steps: steps between a decision and its new segment; the processes agree one step later.
        lead_steps_of_sizes: the same while image sizes change, since loaded batches already have their size.
        settling_steps: untimed steps at each new image size, which compile kernels and allocate memory.
        half_life_intervals: half-life of measured step times, in intervals.
        shortest_half_life_sec: smallest half-life of measured step times.
        trust_recent: weight of the calibrated step time in the recent step time, in intervals.
        trust_overall: weight of the calibrated step time in the slowdown of the final work, in intervals.
        largest_slowdown: the final work is expected to be slower by at most this factor; it is never expected faster.
        most_shortened: a decision keeps at least this share of the remaining steps; a slow interval may be a hiccup.
        least_after: training stops at once if less than this share of the time of the final work is left.
        usage_interval_sec: time between two records of the running time.

    """

    fewest_rows: int = 3
    grid_share: float = 0.25
    landscape_share: float = 0.1
    validation_share: float = 0.05
    milestones_share: float = 0.95
    reference_share: float = 0.85
    views_of_broken_image: float = 30
    finish_sec: float = 3.0
    report_sec: float = 3.0
    report_row_sec: float = 0.5
    end_sec: float = 2.0
    end_share: float = 0.005
    unused_share: float = 0.05
    judging_patience: float = 0.5
    last_landscape_factor: int = 4
    fewest_epochs: float = 0.5
    interval_share: float = 0.01
    lead_steps: int = 2
    lead_steps_of_sizes: int = 10
    settling_steps: int = 2
    half_life_intervals: float = 3
    shortest_half_life_sec: float = 3.0
    trust_recent: float = 1
    trust_overall: float = 3
    largest_slowdown: float = 2.0
    most_shortened: float = 0.5
    least_after: float = 0.75
    usage_interval_sec: float = 1.0


DEFAULT_POLICY = BudgetPolicy()
