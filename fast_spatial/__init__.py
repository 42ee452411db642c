"""Train and judge image classifiers under rotations and translations.

`evaluate` is the Python API. It is imported on first access, since it needs torch.
"""

from typing import TYPE_CHECKING, Any

from fast_spatial import pipelines  # noqa: F401  (before torchvision: see pipelines/nvjpeg.py)

if TYPE_CHECKING:
    from fast_spatial.evaluation.evaluate import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from fast_spatial.evaluation.evaluate import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
