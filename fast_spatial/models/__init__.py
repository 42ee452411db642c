"""Networks and their files: classifiers, changes to them, checkpoints, EMA, exports."""
