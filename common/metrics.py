"""
Numbers that compare images and rankings.

Images are [H, W, 3] RGB, uint8 (0..255) or float (0..1); no border is cropped; PSNR and SSIM are over RGB. The proxy
scores stand in for human labels and need the ground truth. Ranks: 1 is best.
"""
import math

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import bootstrap, spearmanr
from skimage.metrics import structural_similarity

from common.images import luma, to_float

AXES = ("consistency", "naturalness", "overall")
OVERALL = AXES.index("overall")
# found by a search among about 170 variants, for people's votes on half-size images (with all widths halved, as the
# votes were given at full size) and for the ladder of test_metrics.py
CONSISTENCY_SCALE = 0.2      # RMSE (of 1) between the down-sampled images at which the score is 1/2
DETAIL_EDGES = (0, 0.7, 1.4, 2.8, 5.6)  # px, widths of the Gaussians whose differences are the bands
DETAIL_WINDOW = 3.0          # px, Gaussian in which detail is compared
DETAIL_FLOOR = (4 / 255)**2  # detail of this strength counts as nothing
DEFICIT_WEIGHT = 0.11        # of missing detail, in units of log energy


def down(image: np.ndarray, scale: int) -> np.ndarray:
    """Area average: [H, W, 3] -> float64 [H/scale, W/scale, 3], 0..1."""
    height, width = image.shape[0] // scale, image.shape[1] // scale
    return to_float(image).reshape(height, scale, width, scale, 3).mean(axis=(1, 3))   # ValueError if not divisible


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.sqrt(np.mean((to_float(a) - to_float(b)) ** 2)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB over RGB; 100 for equal images."""
    return min(100.0, -20 * math.log10(max(rmse(a, b), 1e-12)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over RGB with the 11-px Gaussian window of Wang et al. 2004."""
    return float(structural_similarity(to_float(a), to_float(b), data_range=1.0, channel_axis=2,
                                       gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


def lr_psnr(sr: np.ndarray, lr: np.ndarray, scale: int) -> float:
    """PSNR between the area-averaged SR image and its LR input."""
    return psnr(down(sr, scale), to_float(lr))


def srcc(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman rank correlation; NaN when one side is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else math.nan


def bootstrap_ci(values: np.ndarray, seed: int, *, counts: np.ndarray | None = None) -> tuple[float, float]:
    """95 % percentile interval of mean(values), or of sum(values) / sum(counts), resampling groups [G]."""
    values, counts = np.asarray(values, float), np.asarray(np.ones(len(values)) if counts is None else counts)
    if len(values) < 2:
        return math.nan, math.nan
    result = bootstrap((values, counts), lambda v, c, axis: v.sum(axis=axis) / c.sum(axis=axis), paired=True,
                       n_resamples=5000, method="percentile", rng=np.random.default_rng(seed))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def rate(right: np.ndarray, pairs: np.ndarray, seed: int, units: np.ndarray | None = None) -> dict:
    """
    {value, ci95}: sum(right [G]) / sum(pairs [G]) and its interval over groups, or over units [G]: groups of one number
    (crops of one photograph) are resampled together. What has no pairs does not count: ci95 is None if only one is
    left, and so is value if none is left.
    """
    if units is not None:
        right, pairs = (np.bincount(units, values) for values in (right, pairs))
    right, pairs = right[pairs > 0], pairs[pairs > 0]
    if not len(pairs):
        return {"value": None, "ci95": None}
    ends = [round(end, 4) for end in bootstrap_ci(right, seed, counts=pairs)] if len(pairs) > 1 else None
    return {"value": round(float(right.sum() / pairs.sum()), 4), "ci95": ends}


def mean_srcc(scores: np.ndarray, ranks: np.ndarray) -> float | None:
    """
    Mean over groups of Spearman's correlation of scores [G, C] with minus the ranks [G, C].

    A group that ties everything, or has no label (NaN), has none and is left out; None without any.
    """
    values = [srcc(s, -r) for s, r in zip(scores, ranks) if not np.isnan(r).any()]
    values = [value for value in values if not math.isnan(value)]
    return round(float(np.mean(values)), 4) if values else None


def ranks(scores: list[float], margin: float) -> list[int]:
    """1 = best; a candidate shares a rank with better ones if less than margin below the best of them."""
    result, rank, best = [1] * len(scores), 1, max(scores)
    for score, index in sorted((-score, index) for index, score in enumerate(scores)):
        if best + score >= margin:
            rank, best = rank + 1, -score
        result[index] = rank
    return result


def pair_hits(scores: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    One group: scores [K] (higher is better) against ranks [K] (1 is best). Returns hits [P] (1 right, 0
    wrong, 1/2 equal scores) and the indices better [P], worse [P] of the P pairs that the ranks do not tie.
    """
    scores, ranks = np.asarray(scores, dtype=np.float64), np.asarray(ranks)
    better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
    return 0.5 * (1 + np.sign(scores[better] - scores[worse])), better, worse


def pair_accuracy(scores: list, ranks: list) -> tuple[float, np.ndarray, np.ndarray]:
    """Lists over G groups -> (accuracy over all pairs, NaN if there are none; hits [G], pairs [G])."""
    hits = [pair_hits(s, r)[0] for s, r in zip(scores, ranks, strict=True)]
    right, pairs = np.array([h.sum() for h in hits]), np.array([len(h) for h in hits], dtype=np.float64)
    return float(right.sum() / pairs.sum()) if pairs.sum() else math.nan, right, pairs


def proxy_consistency(candidate: np.ndarray, hr: np.ndarray, lr: np.ndarray) -> float:
    """
    1 / (1 + E / CONSISTENCY_SCALE), in (0, 1], E^2 = mean over px of max(0, e(candidate) - e(LR)), e squared error
    to the HR image at LR size (area-averaged), smoothed by 1 px: an error that the LR image has *there* is forgiven.
    """
    truth = down(hr, len(hr) // len(lr))
    error, unavoidable = (gaussian_filter(((to_float(image) - truth) ** 2).mean(axis=2), 1, mode="reflect")
                          for image in (down(candidate, len(hr) // len(lr)), lr))
    return 1 / (1 + math.sqrt(np.maximum(0, error - unavoidable).mean()) / CONSISTENCY_SCALE)


def bands(image: np.ndarray) -> list[np.ndarray]:
    """Luma in bands of falling fineness: differences of Gaussians, each [H, W]."""
    brightness = luma(to_float(image))
    smooth = [gaussian_filter(brightness, width, mode="reflect") if width else brightness for width in DETAIL_EDGES]
    return [fine - coarse for fine, coarse in zip(smooth, smooth[1:])]


def detail_score(candidate: np.ndarray, reference: np.ndarray) -> float:
    """
    How much of a natural image's detail a candidate has: mean over bands of structure - DEFICIT_WEIGHT deficit, 0..1.

    structure: mean of (2 vxy + C) / (vx + vy + C), as in SSIM, of local second moments; grain lowers it more than blur.
    deficit: mean of max(0, log((vy + C) / (vx + C))): detail that is missing; what is too much costs structure alone.
    """
    scores = []
    for x, y in zip(bands(candidate), bands(reference)):
        vx, vy, vxy = (gaussian_filter(product, DETAIL_WINDOW, mode="reflect") for product in (x * x, y * y, x * y))
        structure = ((2 * vxy + DETAIL_FLOOR) / (vx + vy + DETAIL_FLOOR)).mean()
        deficit = np.maximum(0, np.log((vy + DETAIL_FLOOR) / (vx + DETAIL_FLOOR))).mean()
        scores.append(structure - DEFICIT_WEIGHT * deficit)
    return max(0.0, float(np.mean(scores)))


def gold(image: np.ndarray, lr: np.ndarray, hr: np.ndarray) -> tuple[float, float, float]:
    """The proxy label of a restored uint8 image [H, W, 3]: the lower of consistency and detail score, and these two."""
    consistency, detail = proxy_consistency(image, hr, lr), detail_score(image, hr)
    return min(consistency, detail), consistency, detail
