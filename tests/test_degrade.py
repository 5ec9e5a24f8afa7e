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
def test_a_degradation_is_its_parameters(kind):
    """apply() draws nothing: what groups.jsonl holds gives the same bytes again, and the input stays as it was."""
    for seed in range(12):
        scale, rows = (2, 3, 4)[seed % 3], 19 + seed
        image = np.random.default_rng(seed).integers(0, 256, (rows * scale, 40 * scale, 3), dtype=np.uint8)
        params, before = degrade.sample_params(seed, kind, scale), image.copy()
        loaded = json.loads(json.dumps(params, allow_nan=False))
        assert params == loaded == degrade.sample_params(seed, kind, scale)
        lr = degrade.apply(image, params)
        assert lr.dtype == np.uint8 and lr.shape == (rows, 40, 3)
        assert lr.tobytes() == degrade.apply(image, loaded).tobytes() and np.array_equal(image, before)
        assert (degrade.sample_params(seed + 1, kind, scale) != params) == (kind != "bicubic")


def test_the_tables_are_the_published_ones():
    """Real-ESRGAN's training configuration, and the lighter one of SeeSR: written out, not read from the code."""
    assert degrade.PASSES["realesrgan"] == (
        {"blur": 1.0, "sigma": 3.0, "resize": (0.15, 1.5), "gauss": (1, 30), "poisson": (0.05, 3.0), "jpeg": (30, 95)},
        {"blur": 0.8, "sigma": 1.5, "resize": (0.3, 1.2), "gauss": (1, 25), "poisson": (0.05, 2.5), "jpeg": (30, 95)})
    assert degrade.PASSES["light"] == (
        {"blur": 1.0, "sigma": 3.0, "resize": (0.3, 1.5), "gauss": (1, 15), "poisson": (0.05, 2.0), "jpeg": (60, 95)},
        {"blur": 0.5, "sigma": 1.5, "resize": (0.6, 1.2), "gauss": (1, 12), "poisson": (0.05, 1.0), "jpeg": (60, 100)})
    assert dict(zip(degrade.SHAPES, degrade.SHAPE_ODDS, strict=True)) == {
        "iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12,
        "plateau_aniso": 0.03}
    assert degrade.WAYS == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
    assert degrade.BETAS == {"generalized": ((0.5, 1), (1, 4)), "plateau": ((1, 1), (1, 2))}
    assert degrade.LAST_CUTOFF["realesrgan"] == degrade.LAST_CUTOFF["light"] == math.pi / 3


def fills(values, low, high) -> bool:
    """Whether they lie in the range and come near both of its ends."""
    near = 0.06 * (high - low)
    return low <= min(values) <= low + near and high - near <= max(values) <= high


def parted(steps: list[dict]) -> tuple[list, list, list]:
    """[blur | None, resize, noise, jpeg] of both passes, and [resize, blur | None, whether JPEG comes last]."""
    rest = steps[4:] if steps[4]["op"] == "blur" else [None, *steps[4:]]
    last = {step["op"]: step for step in rest[3:]}
    return steps[:4], [*rest[:3], last["jpeg"]], [last["resize"], last.get("blur"), rest[-1]["op"] == "jpeg"]


@pytest.fixture(scope="module", params=degrade.PASSES)
def drawn(request):
    """(kind, first passes, second passes, ends) of 1500 seeds."""
    return request.param, *zip(*(parted(degrade.sample_params(seed, request.param, 4)["steps"])
                                 for seed in range(1500)))


@pytest.mark.parametrize("which", [0, 1])
def test_draws_follow_the_table(drawn, which):
    kind, table, ways = drawn[0], degrade.PASSES[drawn[0]][which], degrade.WAYS[which]
    blurs, resizes, noises, jpegs = zip(*drawn[1 + which])
    made = [step for step in blurs if step]
    assert abs(len(made) / len(blurs) - table["blur"]) < 0.04
    plain = [step for step in made if step["shape"] != "sinc"]
    assert 0.07 < 1 - len(plain) / len(made) < 0.13
    for shape, odds in zip(degrade.SHAPES, degrade.SHAPE_ODDS):
        assert abs(np.mean([step["shape"] == shape for step in plain]) - odds) < 0.05
    assert {step["size"] for step in made} == set(range(7, 22, 2))
    assert fills([step["sigma_x"] for step in plain], 0.2, table["sigma"])
    uneven = [step for step in plain if step["shape"].endswith("aniso")]
    assert fills([step["sigma_y"] for step in uneven], 0.2, table["sigma"])
    assert fills([step["angle"] for step in uneven], -math.pi, math.pi)
    assert all(step["sigma_x"] == step["sigma_y"] and not step["angle"] for step in plain if step not in uneven)

    sizes = np.array([step["part"] for step in resizes]) * (1, 4)[which]
    assert abs((sizes > 1).mean() - ways[0]) < 0.04 and abs((sizes < 1).mean() - ways[1]) < 0.04
    assert abs((sizes == 1).mean() - ways[2]) < 0.04 and fills(sizes, *table["resize"])
    assert fills(sizes[sizes > 1], 1, table["resize"][1]) and fills(sizes[sizes < 1], table["resize"][0], 1)
    for mode in ("area", "bilinear", "bicubic"):
        assert abs(np.mean([step["mode"] == mode for step in resizes]) - 1 / 3) < 0.04

    gaussian = [step["amount"] * 255 for step in noises if step["type"] == "gaussian"]
    assert abs(len(gaussian) / len(noises) - 0.5) < 0.04 and fills(gaussian, *table["gauss"])
    assert fills([step["amount"] for step in noises if step["type"] == "poisson"], *table["poisson"])
    assert abs(np.mean([step["gray"] for step in noises]) - 0.4) < 0.04
    assert len({step["seed"] for step in noises}) == len(noises)
    qualities = [step["quality"] for step in jpegs]
    assert (min(qualities), max(qualities)) == table["jpeg"], kind


def test_exponents_and_cutoffs_of_kernels(drawn):
    blurs = [steps[0] for way in drawn[1:3] for steps in way if steps[0]]
    betas = {start: np.array([step["beta"] for step in blurs if step["shape"].startswith(start)])
             for start in ("iso", "aniso", "generalized", "plateau")}
    assert set(betas["iso"]) == set(betas["aniso"]) == {1}
    low, high = (betas["generalized"][own] for own in (betas["generalized"] < 1, betas["generalized"] > 1))
    assert fills(low, 0.5, 1) and fills(high, 1, 4) and 0.4 < len(low) / len(betas["generalized"]) < 0.6
    plateau = betas["plateau"]
    assert 0.4 < (plateau == 1).mean() < 0.6 and fills(plateau[plateau > 1], 1, 2)
    for small, lowest in ((True, math.pi / 3), (False, math.pi / 5)):
        cutoffs = [step["cutoff"] for step in blurs if step["shape"] == "sinc" and (step["size"] < 13) == small]
        assert fills(cutoffs, lowest, math.pi)


def test_the_end_is_a_resize_often_a_sinc_filter_and_jpeg_before_or_after(drawn):
    resizes, sincs, jpeg_last = zip(*drawn[3])
    assert {step["part"] for step in resizes} == {0.25}
    made = [step for step in sincs if step]
    assert abs(len(made) / len(sincs) - 0.8) < 0.04 and {step["shape"] for step in made} == {"sinc"}
    assert fills([step["cutoff"] for step in made], degrade.LAST_CUTOFF[drawn[0]], math.pi)
    assert {step["size"] for step in made} == set(range(7, 22, 2))
    assert abs(np.mean(jpeg_last) - 0.5) < 0.04


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
    steep = degrade.kernel(narrow | {"shape": "plateau_iso", "beta": 2.0})
    assert steep[10, 14] / steep[10, 10] == pytest.approx(1 / (1 + 4**2))
    boxy = degrade.kernel(narrow | {"shape": "generalized_iso", "beta": 2.0})
    assert boxy[10, 14] / boxy[10, 10] == pytest.approx(math.exp(-0.5 * 4**2))
    whole = degrade.kernel({"op": "blur", "shape": "sinc", "size": 21, "cutoff": math.pi})
    half = degrade.kernel({"op": "blur", "shape": "sinc", "size": 21, "cutoff": math.pi / 2})
    assert whole.max() == pytest.approx(whole[10, 10]) and half[10, 10] < whole[10, 10] / 3


def test_blur_of_constant_and_impulse():
    for seed in range(20):
        weights = degrade.kernel(degrade.blur_step(np.random.default_rng(seed), 2.0))
        assert np.allclose(weights, weights[::-1, ::-1])
        assert np.allclose(degrade.blur(CONSTANT, weights), 0.5, atol=1e-6)      # also at the border
        impulse = np.zeros((41, 41, 3), np.float32)
        impulse[20, 20] = 1
        half = weights.shape[0] // 2
        answer = degrade.blur(impulse, weights)[20 - half:21 + half, 20 - half:21 + half]
        assert np.allclose(answer, weights[..., None], atol=1e-6)


def test_gaussian_noise():
    image = np.full((128, 128, 3), 0.5, np.float32)
    for gray in (False, True):
        step = {"op": "noise", "type": "gaussian", "gray": gray, "amount": 0.05, "seed": 3}
        added = degrade.noise(image, step) - image
        assert added.std() == pytest.approx(0.05, rel=0.03) and abs(added.mean()) < 0.002
        assert (np.ptp(added, axis=2).max() < 1e-6) == gray                 # the same in all channels
        assert not np.array_equal(degrade.noise(image, step | {"seed": 4}) - image, added)


def test_poisson_noise_has_the_variance_of_its_levels_and_the_asked_scale():
    image = np.tile(np.linspace(0.35, 0.65, 128, dtype=np.float32)[None, :, None], (128, 1, 3))
    step = {"op": "noise", "type": "poisson", "gray": False, "seed": 3}
    half, whole = (degrade.noise(image, step | {"amount": amount}) - image for amount in (0.5, 1.0))
    assert np.allclose(whole, 2 * half, atol=1e-6)
    levels = 128                                                             # 77 different values of 255
    assert whole.std() == pytest.approx(math.sqrt(0.5 / levels), rel=0.03)
    gray = degrade.noise(image, step | {"amount": 1.0, "gray": True}) - image
    assert np.ptp(gray, axis=2).max() < 1e-6 < np.ptp(whole, axis=2).max()


def test_lower_jpeg_quality_is_a_larger_error():
    image = IMAGE.astype(np.float32) / 255
    errors = [np.abs(degrade.jpeg(image, quality) - image).mean() for quality in (95, 60, 20)]
    assert errors[0] < errors[1] < errors[2]


def test_refusals():
    with pytest.raises(ValueError, match="realesrgan, light, mild, bicubic"):
        degrade.sample_params(0, "heavy", 4)
    with pytest.raises(AssertionError):
        degrade.apply(IMAGE[:46], degrade.sample_params(0, "bicubic", 4))
