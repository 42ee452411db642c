"""From JPEG files to a `Batch`. Uses DALI, not torch.nn; takes plain arguments, no configuration objects."""

from fast_spatial.pipelines.nvjpeg import load_before_torchvision

load_before_torchvision()
