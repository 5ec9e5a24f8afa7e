"""
Candidates with a known fault: stronger ones score lower, on the axis that they hurt.

Run     python -m pytest tests/test_candidates.py     # 4 s
"""
import numpy as np
import pytest

from common import candidates, metrics
from common.images import to_float, to_uint8
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
def test_stronger_fault_is_less_natural(monkeypatch, method):
    monkeypatch.setattr(candidates, "UNNATURAL", {method: 1})
    hr, foreign = (to_float(textured(i, 64, 64)) for i in (1, 2))
    faulty = [candidates.add_fault(hr, foreign, strength, np.random.default_rng(3)) for strength in (0.0, 0.5, 1.0)]
    assert {record["method"] for _, record in faulty} == {method}
    scores = [metrics.detail_score(image, hr) for image, _ in faulty]
    assert 1 > scores[0] > scores[1] > scores[2]


def test_what_a_fault_changes_at_lr_size_is_put_back(monkeypatch):
    natural = 0.3 + 0.4 * to_float(textured(1, 64, 64))
    coarse = np.kron(np.random.default_rng(0).choice([-0.2, 0.2], (4, 4, 3)), np.ones((16, 16, 1)))
    monkeypatch.setattr(candidates, "add_fault", lambda image, *_: (image + coarse, {}))
    image, _ = candidates.unnatural(natural, natural, 4, np.random.default_rng(3))
    assert metrics.rmse(metrics.down(natural + coarse, 4), metrics.down(natural, 4)) == pytest.approx(0.2)
    assert metrics.rmse(metrics.down(image, 4), metrics.down(natural, 4)) < 0.06


def test_kernels_and_masks():
    for length, angle in ((1.5, 0.3), (12, 2.0)):
        weights = candidates.line_kernel(length, angle)
        assert abs(weights.sum() - 1) < 1e-12 and np.allclose(weights, weights[::-1, ::-1])
    mask = candidates.soft_mask((64, 64), 0.3, np.random.default_rng(0))
    assert mask.shape == (64, 64, 1) and abs(mask.mean() - 0.3) < 0.03


def test_probes_hurt_the_axis_that_they_name():
    hr, other = textured(1, 64, 64), textured(2, 48, 64)                         # another size is resized
    lr = to_uint8(metrics.down(hr, 4))
    images = candidates.tamper(hr, lr, other, np.random.default_rng(0))
    for (axis, _), image in zip(candidates.PROBES.values(), images, strict=True):
        scores = dict(zip(("overall", "consistency", "naturalness"), metrics.gold(image, lr, hr)))
        assert image.dtype == np.uint8 and image.shape == hr.shape and scores[axis] < 0.92
    swapped, color = images[list(candidates.PROBES).index("swapped")], images[list(candidates.PROBES).index("color")]
    changed = (swapped != hr).any(2)
    assert changed[16:48, 16:48].mean() > 0.9 and changed.mean() < 0.26
    assert np.array_equal(color[..., 1], hr[..., 1]) and color[..., 0].mean() > hr[..., 0].mean()
