"""
Metrics against hand-made answers and scipy; the proxy scores do what their definition says.

Run     python -m pytest tests/test_metrics.py        # 3 s
"""
import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from common import degrade, images, metrics
from common.images import resize, to_uint8
from conftest import load_stage

rng = np.random.default_rng(0)
IMAGE = resize(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (64, 64), "bicubic")
LR = to_uint8(metrics.down(IMAGE, 4))


def noisy(sigma, image=IMAGE, seed=1):
    return to_uint8(image / 255 + sigma * np.random.default_rng(seed).standard_normal(image.shape))


def test_psnr_and_ssim():
    black, gray = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    assert metrics.psnr(black, gray) == pytest.approx(-20 * math.log10(0.2))
    assert metrics.psnr(gray, gray) == 100 and metrics.ssim(gray, gray) == pytest.approx(1)
    assert metrics.psnr(gray, gray / 255) == 100                              # uint8 and float agree
    other = noisy(0.1)
    assert metrics.ssim(IMAGE, other) == pytest.approx(structural_similarity(
        IMAGE, other, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False), abs=1e-6)
    with pytest.raises(AssertionError):
        metrics.psnr(black, gray[:8])


def test_down_and_lr_psnr():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.allclose(metrics.down(image, 2)[0, 0] * 255, image[:2, :2].mean(axis=(0, 1)))
    assert metrics.lr_psnr(np.repeat(np.repeat(LR, 4, 0), 4, 1), LR, 4) == 100
    assert metrics.lr_psnr(IMAGE, LR, 4) > 50 and metrics.lr_psnr(noisy(0.2), LR, 4) < 35


def test_srcc_is_scipys_and_nan_for_constants():
    a, b = rng.standard_normal(20), rng.standard_normal(20)
    assert metrics.srcc(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert metrics.srcc([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert math.isnan(metrics.srcc([1, 1, 1], [1, 2, 3]))


def test_bootstrap_interval():
    values = np.random.default_rng(2).normal(3, 1, 400)
    low, high = metrics.bootstrap_ci(values, seed=0)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
    assert (low, high) == metrics.bootstrap_ci(values, seed=0) != metrics.bootstrap_ci(values, seed=1)
    counts = np.tile([1.0, 9.0], 200)
    low, high = metrics.bootstrap_ci(counts * 0.7, seed=0, counts=counts)     # a constant share: no spread
    assert low == pytest.approx(0.7) and high == pytest.approx(0.7)
    assert all(math.isnan(end) for end in metrics.bootstrap_ci([1.0], seed=0))


def test_ranks():
    assert metrics.ranks([0.9, 0.2, 0.5], 0.05) == [1, 3, 2]
    assert metrics.ranks([0.9, 0.88, 0.5, 0.5], 0.05) == [1, 1, 2, 2]
    assert metrics.ranks([0.86, 0.9, 0.82], 0.05) == [1, 1, 2]               # no chain: 0.08 apart is no tie
    assert metrics.ranks([0.3], 0.05) == [1]


def slow_pairs(scores, ranks):
    hits = []
    for i in range(len(scores)):
        for j in range(len(scores)):
            if ranks[i] < ranks[j]:
                hits.append(1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return hits


def test_pairs_agree_with_two_loops():
    draws = np.random.default_rng(4)
    groups = [(draws.integers(0, 4, 6).astype(float), draws.integers(1, 4, 6)) for _ in range(20)]
    slow = [slow_pairs(*group) for group in groups]
    accuracy, right, pairs = metrics.pair_accuracy(*zip(*groups))
    assert accuracy == pytest.approx(np.mean(np.concatenate(slow)))
    assert right.tolist() == [sum(hits) for hits in slow] and pairs.tolist() == [len(hits) for hits in slow]
    hits, better, worse = metrics.pair_hits([3, 1, 2], [1, 2, 2])
    assert hits.tolist() == [1, 1] and better.tolist() == [0, 0] and worse.tolist() == [1, 2]
    assert math.isnan(metrics.pair_accuracy([[1, 2]], [[1, 1]])[0])
    with pytest.raises(ValueError):
        metrics.pair_accuracy([[1, 2]], [])


# the proxy scores: plain loops, with the constants written out ------------------------------------------------

def slow_blur(plane, sigma):
    """Gaussian of up to 4 sigma; the image is mirrored at its border, edge pixels doubled."""
    radius = int(4 * sigma + 0.5)
    taps = [math.exp(-x**2 / (2 * sigma**2)) for x in range(-radius, radius + 1)]
    padded, result = np.pad(plane, radius, mode="symmetric"), np.zeros(plane.shape)
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            for v, down in enumerate(taps):
                for u, right in enumerate(taps):
                    result[y, x] += down * right * padded[y + v, x + u] / sum(taps) ** 2
    return result


def slow_blocks(plane, side=4):
    return np.array([[plane[y:y + side, x:x + side].mean() for x in range(0, plane.shape[1] - side + 1, side)]
                     for y in range(0, plane.shape[0] - side + 1, side)])


def slow_consistency(candidate, hr, lr):
    """1 / (1 + E / 0.2), E: root mean square of the error to HR at LR size that the LR image does not have there."""
    def error(small):
        return slow_blur(sum((small[c] - truth[c]) ** 2 for c in range(3)) / 3, 1)
    truth, restored = ([slow_blocks(image[..., c] / 255) for c in range(3)] for image in (hr, candidate))
    excess = error(restored) - error([lr[..., c] / 255 for c in range(3)])
    return 1 / (1 + math.sqrt(np.mean([max(0, value) for value in excess.flat])) / 0.2)


def slow_detail(candidate, reference):
    """Mean over four bands of structure - 0.11 deficit, 4 / 255 squared counts as nothing; not below 0."""
    def bands(image):
        luma = 0.299 * image[..., 0] / 255 + 0.587 * image[..., 1] / 255 + 0.114 * image[..., 2] / 255
        smooth = [luma, *(slow_blur(luma, width) for width in (0.7, 1.4, 2.8, 5.6))]
        return [smooth[i] - smooth[i + 1] for i in range(4)]
    total, floor = 0.0, (4 / 255) ** 2
    for x, y in zip(bands(candidate), bands(reference)):
        vx, vy, vxy = slow_blur(x * x, 3), slow_blur(y * y, 3), slow_blur(x * y, 3)
        for a, b, c in zip(vx.flat, vy.flat, vxy.flat):
            total += (2 * c + floor) / (a + b + floor) - 0.11 * max(0, math.log((b + floor) / (a + floor)))
    return max(0, total / (4 * vx.size))


def test_proxy_scores_are_those_of_plain_loops():
    draw = np.random.default_rng(7)
    for _ in range(2):
        hr, other = (resize(draw.integers(0, 256, (6, 7, 3), dtype=np.uint8), (28, 24), "bicubic") for _ in range(2))
        candidate = noisy(0.05, (0.7 * hr + 0.3 * other).astype(np.uint8))
        lr = noisy(0.03, to_uint8(metrics.down(hr, 4)))
        consistency, detail = slow_consistency(candidate, hr, lr), slow_detail(candidate, hr)
        assert metrics.proxy_consistency(candidate, hr, lr) == pytest.approx(consistency, rel=1e-9)
        assert metrics.detail_score(candidate, hr) == pytest.approx(detail, rel=1e-9)
        wanted = (min(consistency, detail), consistency, detail)
        assert metrics.gold(candidate, lr, hr) == pytest.approx(wanted, rel=1e-9)


def test_an_error_that_the_lr_image_has_there_is_forgiven_and_no_other():
    bad_lr = noisy(0.1, LR)
    assert metrics.proxy_consistency(np.repeat(np.repeat(bad_lr, 4, 0), 4, 1), IMAGE, bad_lr) == pytest.approx(1)
    patched, wrong = IMAGE.copy(), LR.copy()
    patched[:16, :16], wrong[8:] = 255 - patched[:16, :16], 255 - wrong[8:]
    alone = metrics.proxy_consistency(patched, IMAGE, LR)
    assert metrics.proxy_consistency(patched, IMAGE, wrong) == pytest.approx(alone, abs=0.01) and alone < 0.85


# the ladder: the label orders what everybody orders alike -------------------------------------------------------

def grain_like(image, draw, *, replaces):
    """The image with noise of the local energy of its fine detail, on top or in place of that detail."""
    sharp = image / 255
    base = np.stack([gaussian_filter(sharp[..., c], 1, mode="reflect") for c in range(3)], 2)
    energy = np.sqrt(gaussian_filter((images.luma(sharp) - images.luma(base)) ** 2, 1.5, mode="reflect"))
    speckle = draw.standard_normal(energy.shape)
    speckle -= gaussian_filter(speckle, 1, mode="reflect")
    return to_uint8((base if replaces else sharp) + (energy * speckle / speckle.std())[..., None])


def test_the_ladder():
    """The demo's test crops: less of the missing detail is worse, bicubic beats nearest, grain is worse than none."""
    draw, wins, stage = np.random.default_rng(0), [], load_stage("01")
    photos = [images.read_image(path) for name, path in images.find("skimage", "") if name in ("chelsea", "coffee")]
    for number in range(40):
        hr, _ = stage.draw_crop(stage.Config(run="", hr_size=64), photos[number % 2], f"test_{number:05d}")
        lr = degrade.apply(hr, degrade.sample_params(number, "mild", 4))
        bicubic = resize(lr, (64, 64), "bicubic")
        steps = [to_uint8((bicubic + part * (hr.astype(float) - bicubic)) / 255) for part in (1, 0.75, 0.5, 0.25, 0)]
        steps.append(resize(lr, (64, 64), "nearest"))
        overall = [metrics.gold(image, lr, hr)[0] for image in steps]
        wins.append([better > worse for better, worse in zip(overall, overall[1:])])
        for i, replaces in ((0, True), (0, False), (2, True), (2, False), (4, True)):   # on bicubic it is hardly seen
            wins[-1].append(overall[i] > metrics.gold(grain_like(steps[i], draw, replaces=replaces), lr, hr)[0])
    assert np.mean(wins, 0).min() >= 0.9, np.mean(wins, 0)
