"""Train and judge image classifiers under rotations and translations."""
