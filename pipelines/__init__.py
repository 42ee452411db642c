"""From JPEG files to a `Batch`: knows DALI, not torch.nn; plain arguments, no configuration objects."""

from fast_spatial.pipelines.nvjpeg import load_before_torchvision

load_before_torchvision()
