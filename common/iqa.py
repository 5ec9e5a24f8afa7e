"""
Quality metrics of the package pyiqa by name: what pyiqa_metrics of 03 and 05 opens.

It is no dependency, its license is its own, and it downloads weights that it lacks.
"""
import numpy as np
import torch

from common.config import fail
from common.images import from_pixels


def load(names: list[str], device: torch.device) -> dict[str, torch.nn.Module]:
    """Name -> metric; stops with one line if pyiqa is not installed, or knows no such name."""
    if not names:
        return {}
    try:
        import pyiqa
        if unknown := sorted(set(names) - set(pyiqa.list_models())):
            fail(f"pyiqa_metrics: pyiqa has no metric {unknown[0]!r}; `pyiqa.list_models()` lists all")
        return {name: pyiqa.create_metric(name, device=device) for name in names}
    except (ImportError, OSError, RuntimeError) as error:
        fail(f"pyiqa_metrics: {error}: install pyiqa (mind its license) and its weights, or leave the setting empty")


def needs_truth(metric: torch.nn.Module) -> bool:
    """Whether it compares with the ground truth."""
    return metric.metric_mode == "FR"


@torch.no_grad()
def measure(metrics: dict[str, torch.nn.Module], image: np.ndarray, hr: np.ndarray | None,
            device: torch.device) -> list[float]:
    """The value of each metric for a uint8 image [H, W, 3]; NaN where it needs the ground truth and hr is None."""
    x, y = (None if pixels is None else from_pixels(pixels).to(device) for pixels in (image, hr))
    return [(float(metric(x, y)) if y is not None else float("nan")) if needs_truth(metric) else float(metric(x))
            for metric in metrics.values()]
