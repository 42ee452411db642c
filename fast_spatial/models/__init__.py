"""Networks and their files: classifiers, changes to them, checkpoints, averages, exports."""
