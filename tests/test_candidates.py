"""
Candidates with a known fault: stronger ones score lower, on the axis that they hurt.

Run     python -m pytest tests/test_candidates.py     # 4 s
"""
import numpy as np
import pytest

from common import candidates, metrics
from common.images import to_float
from test_sources import textured


@pytest.mark.parametrize("method", candidates.INCONSISTENT)
def test_stronger_inconsistency_is_less_consistent(monkeypatch, method):
    monkeypatch.setattr(candidates, "INCONSISTENT", (method,))
    hr, foreign = (to_float(textured(i, 64, 64)) for i in (1, 2))
    scores = []
    for limit in (0.0, 0.5, 1.0):
        monkeypatch.setattr(candidates, "amount", lambda _, low, high, at=limit: low * (high / low) ** at)
        image, record = candidates.inconsistent(hr, foreign, np.random.default_rng(3))
        assert record["method"] == method and image.min() >= 0 and image.max() <= 1
        scores.append(metrics.proxy_consistency(image, hr, metrics.down(hr, 4)))
    assert 1 > scores[0] > scores[1] > scores[2]


@pytest.mark.parametrize("method", candidates.UNNATURAL)
def test_stronger_fault_is_less_natural_and_stays_consistent(monkeypatch, method):
    monkeypatch.setattr(candidates, "UNNATURAL", (method,))
    hr = to_float(textured(1, 64, 64))
    rng = np.random.default_rng
    faulty = [candidates.add_fault(hr, strength, rng(3))[0] for strength in (0.0, 0.5, 1.0)]
    scores = [metrics.proxy_naturalness(image, hr) for image in faulty]
    assert 1 > scores[0] > scores[1] > scores[2]
    image, record = candidates.unnatural(hr, 4, rng(3))
    assert record["method"] == method and 0 <= record["strength"] <= 1
    assert metrics.rmse(metrics.down(image, 4), metrics.down(hr, 4)) < 0.05


def test_kernels_and_masks():
    for length, angle in ((1.5, 0.3), (12, 2.0)):
        weights = candidates.line_kernel(length, angle)
        assert abs(weights.sum() - 1) < 1e-12 and np.allclose(weights, weights[::-1, ::-1])
    mask = candidates.soft_mask((64, 64), 0.3, np.random.default_rng(0))
    assert mask.shape == (64, 64, 1) and abs(mask.mean() - 0.3) < 0.03
