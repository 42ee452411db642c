"""Training within a budget: the budget and its use, the plan, and each task's share of the time."""
