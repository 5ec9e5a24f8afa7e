"""Metrics of pyiqa (IQA-PyTorch), if asked for; it is not a dependency, and its license is its own."""
import importlib.metadata
from dataclasses import dataclass

import numpy as np
import torch

from common.config import fail


@dataclass
class Measure:
    name: str                           # as pyiqa calls it
    model: torch.nn.Module
    weights: str                        # what it was trained as, from pyiqa's table of models
    sees_hr: bool                       # full reference
    lower_is_better: bool


def load(names: list[str], device: torch.device) -> list[Measure]:
    """The metrics with these names, or one line that says what is missing; pyiqa downloads weights that it lacks."""
    if not names:
        return []
    try:
        import pyiqa
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
    except ImportError as error:
        fail(f"pyiqa_metrics: {error}: install pyiqa (mind its license) or leave the setting empty")
    found = []
    for name in names:
        if name not in DEFAULT_CONFIGS:
            fail(f"pyiqa_metrics: pyiqa has no metric {name!r}; `pyiqa.list_models()` lists all")
        try:
            model = pyiqa.create_metric(name, device=device)
        except (OSError, RuntimeError) as error:
            fail(f"pyiqa_metrics: {name} cannot be loaded ({error}): its weights may be missing")
        known = DEFAULT_CONFIGS[name]
        weights = ", ".join(f"{key}={value}" for key, value in known["metric_opts"].items())
        found.append(Measure(name, model, f"pyiqa {importlib.metadata.version('pyiqa')}: {weights}",
                             model.metric_mode == "FR", model.lower_better))
    return found


@torch.no_grad()
def measure(measures: list[Measure], image: np.ndarray, hr: np.ndarray, device: torch.device) -> list[float]:
    """Each metric of uint8 image [H, W, 3]; those with full reference against hr."""
    own, other = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255).to(device) for pixels in (image, hr))
    return [float(one.model(own, other) if one.sees_hr else one.model(own)) for one in measures]


def describe(measures: list[Measure]) -> dict[str, tuple[str, str]]:
    """name -> (name in the report, what it means), as stage 05's METRICS."""
    return {one.name: (one.name, f"{'lower' if one.lower_is_better else 'higher'} is better, "
                       f"{'against the ground truth' if one.sees_hr else 'sees the image alone'}; {one.weights}")
            for one in measures}
