"""The training loop, its step and schedule, and a run's folder."""
