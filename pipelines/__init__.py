"""From JPEG files to a `Batch`: knows DALI, not torch.nn; plain arguments, no configuration objects."""
