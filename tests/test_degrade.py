"""
HR to LR: the same parameters give the same bytes, and every step has its known answer.

Run     python -m pytest tests/test_degrade.py        # 3 s
"""
import json
import math

import numpy as np
import pytest

from common import degrade

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
CONSTANT = np.full((32, 32, 3), 0.5, np.float32)


@pytest.mark.parametrize("kind", degrade.KINDS)
@pytest.mark.parametrize("scale", [2, 4])
def test_same_params_same_bytes(kind, scale):
    for seed in range(8):
        params = degrade.sample_params(seed, kind, scale)
        lr = degrade.apply(IMAGE, params)
        assert lr.shape == (48 // scale, 64 // scale, 3) and lr.dtype == np.uint8
        assert params == degrade.sample_params(seed, kind, scale)
        loaded = json.loads(json.dumps(params, allow_nan=False))             # what groups.jsonl holds
        assert np.array_equal(degrade.apply(IMAGE, loaded), lr)
    assert (degrade.sample_params(1, kind, scale) != degrade.sample_params(2, kind, scale)) == (kind != "bicubic")


def test_apply_leaves_the_image_alone():
    before = IMAGE.copy()
    degrade.apply(IMAGE, degrade.sample_params(0))
    assert np.array_equal(IMAGE, before)


def test_order_of_steps():
    """blur resize noise jpeg, [blur] resize noise, then jpeg before or after the last resize [and sinc]."""
    ends = set()
    for seed in range(300):
        steps = degrade.sample_params(seed, "realesrgan", 4)["steps"]
        ops = [step["op"] for step in steps]
        assert ops[:4] == ["blur", "resize", "noise", "jpeg"]
        rest = ops[5:] if ops[4] == "blur" else ops[4:]
        assert rest[:2] == ["resize", "noise"]
        ends.add(tuple(rest[2:]))
        assert [step["part"] for step in steps if step["op"] == "resize"][-1] == 0.25
    assert ends == {("jpeg", "resize"), ("jpeg", "resize", "blur"), ("resize", "jpeg"), ("resize", "blur", "jpeg")}


@pytest.mark.parametrize("kind", degrade.PASSES)
def test_draws_follow_the_table(kind):
    params = [degrade.sample_params(seed, kind, 4)["steps"] for seed in range(800)]
    first, second = degrade.PASSES[kind]
    blurs = [steps[0] for steps in params]
    assert 0.07 < np.mean([step["shape"] == "sinc" for step in blurs]) < 0.13
    plain = [step for step in blurs if step["shape"] != "sinc"]
    for shape, odds in zip(degrade.SHAPES, degrade.SHAPE_ODDS):
        assert abs(np.mean([step["shape"] == shape for step in plain]) - odds) < 0.06
    assert {step["size"] for step in blurs} == set(range(7, 22, 2))
    assert all(0.2 <= step["sigma_x"] <= first["sigma"] for step in plain)
    assert all(step["sigma_x"] == step["sigma_y"] for step in plain if not step["shape"].endswith("aniso"))
    sizes = np.array([steps[1]["part"] for steps in params])
    assert abs((sizes > 1).mean() - 0.2) < 0.06 and abs((sizes < 1).mean() - 0.7) < 0.06
    assert first["resize"][0] <= sizes.min() and sizes.max() <= first["resize"][1]
    noises = [steps[2] for steps in params]
    gaussian = [step["amount"] * 255 for step in noises if step["type"] == "gaussian"]
    assert abs(len(gaussian) / len(noises) - 0.5) < 0.06
    assert first["gauss"][0] <= min(gaussian) and max(gaussian) <= first["gauss"][1]
    assert abs(np.mean([step["gray"] for step in noises]) - 0.4) < 0.06
    qualities = [steps[3]["quality"] for steps in params]
    assert (min(qualities), max(qualities)) == first["jpeg"]
    assert abs(np.mean([steps[4]["op"] == "blur" for steps in params]) - second["blur"]) < 0.06
    assert len({step["seed"] for step in noises}) == len(noises)


def test_kernels_sum_to_one_and_are_symmetric():
    for seed in range(200):
        step = degrade.blur_step(np.random.default_rng(seed), 3.0)
        weights = degrade.kernel(step)
        assert weights.shape == (step["size"], step["size"])
        assert abs(weights.sum() - 1) < 1e-9 and np.allclose(weights, weights[::-1, ::-1])
        assert step["shape"] == "sinc" or weights.min() >= 0


def test_kernel_shapes():
    narrow = {"op": "blur", "shape": "iso", "size": 21, "sigma_x": 2.0, "sigma_y": 2.0, "angle": 0.0, "beta": 1.0}
    x = np.arange(-10, 11)
    row = np.exp(-x**2 / 8) / np.exp(-x**2 / 8).sum()
    assert np.allclose(degrade.kernel(narrow), np.outer(row, row))
    turned = narrow | {"shape": "aniso", "sigma_y": 0.5, "angle": math.pi / 2}
    weights = degrade.kernel(turned)                                         # the long side stands upright
    assert (weights.sum(1) * x**2).sum() > 5 * (weights.sum(0) * x**2).sum()
    plateau = degrade.kernel(narrow | {"shape": "plateau_iso"})
    assert plateau[10, 14] / plateau[10, 10] == pytest.approx(1 / (1 + 4))   # (4 px / sigma 2)^2 = 4
    whole = degrade.kernel({"op": "blur", "shape": "sinc", "size": 21, "cutoff": math.pi})
    half = degrade.kernel({"op": "blur", "shape": "sinc", "size": 21, "cutoff": math.pi / 2})
    assert whole.max() == pytest.approx(whole[10, 10]) and half[10, 10] < whole[10, 10] / 3


def test_blur_of_constant_and_impulse():
    weights = degrade.kernel(degrade.blur_step(np.random.default_rng(5), 2.0))
    assert np.allclose(degrade.blur(CONSTANT, weights), 0.5, atol=1e-6)      # also at the border
    impulse = np.zeros((41, 41, 3), np.float32)
    impulse[20, 20] = 1
    half = weights.shape[0] // 2
    answer = degrade.blur(impulse, weights)[20 - half:21 + half, 20 - half:21 + half]
    assert np.allclose(answer, weights[..., None], atol=1e-6)


def test_resizing_keeps_a_constant_and_averages():
    for mode in ("area", "bilinear", "bicubic"):
        image = degrade.apply(np.full((32, 32, 3), 77, np.uint8), {"kind": "", "scale": 4, "steps": [
            {"op": "resize", "part": 0.3, "mode": mode}, {"op": "resize", "part": 0.25, "mode": mode}]})
        assert image.shape == (8, 8, 3) and (image == 77).all()
    small = degrade.apply(IMAGE, {"kind": "", "scale": 4, "steps": [{"op": "resize", "part": 0.25, "mode": "area"}]})
    blocks = IMAGE.reshape(12, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - blocks).max() <= 0.51                              # rounded


@pytest.mark.parametrize("kind, gray", [("gaussian", False), ("gaussian", True), ("poisson", False), ("poisson", True)])
def test_noise(kind, gray):
    image = np.full((128, 128, 3), 0.5, np.float32)
    image[:, 64:] = 0.25
    step = {"op": "noise", "type": kind, "gray": gray, "amount": 0.05 if kind == "gaussian" else 1.0, "seed": 3}
    added = degrade.noise(image, step) - image
    assert np.array_equal(degrade.noise(image, step) - image, added)
    assert not np.array_equal(degrade.noise(image, step | {"seed": 4}) - image, added)
    assert (np.ptp(added, axis=2).max() < 1e-6) == gray
    # Poisson with 2 different values in the image: 2 levels, variance value / 2; clipped at 0 and 1, so only its sign
    if kind == "gaussian":
        assert added.std() == pytest.approx(0.05, rel=0.03) and abs(added.mean()) < 0.002
    else:
        assert added[:, :64].std() > 1.1 * added[:, 64:].std()


def test_jpeg():
    assert np.allclose(degrade.jpeg(CONSTANT, 50), 0.5, atol=1.5 / 255)
    image = IMAGE.astype(np.float32) / 255
    errors = [np.abs(degrade.jpeg(image, quality) - image).mean() for quality in (95, 60, 20)]
    assert errors[0] < errors[1] < errors[2]


def test_refusals():
    with pytest.raises(ValueError, match="realesrgan, light, mild, bicubic"):
        degrade.sample_params(0, "heavy", 4)
    with pytest.raises(AssertionError):
        degrade.apply(IMAGE[:46], degrade.sample_params(0, "bicubic", 4))
