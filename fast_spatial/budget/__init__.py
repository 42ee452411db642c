"""Training within a budget: the clock, the plan, and each task's share of the time."""
