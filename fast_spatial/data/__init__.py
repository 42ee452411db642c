"""From `--data` and the options to a Loader: the split, and where its images are decoded and warped."""
