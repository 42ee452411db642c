"""From `--data` and the options to a Loader: which images, decoded and warped where."""
