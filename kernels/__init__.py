"""Spatial transforms and how to apply them: no data set, no model, no configuration."""

from fast_spatial.kernels.host import keep_compiled_kernels

keep_compiled_kernels()
