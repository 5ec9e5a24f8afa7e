"""
Calibration: a monotone map per axis from the judge's expected score, 1..9, to the scale of the labels.

Fitted on the validation split by isotonic regression (least squares among all maps that never fall), so it changes no
ranking beyond making ties. Between its knots the map is linear, and outside of them constant: it never leaves the range
of the labels that it saw. A score becomes "the label that candidates with such scores had on average". Stage 02 fits it
and keeps it beside the judge, as judge/calibration.json; stage 03 tests it.
"""
import numpy as np
from scipy.optimize import isotonic_regression

from common.groups import Labels
from common.metrics import AXES

LEAST = 20                              # candidates with labels; with fewer there is no map


def fit(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Knots {score, label}, both rising, of the isotonic map from scores [n] to labels [n]."""
    x, at, count = np.unique(scores, return_inverse=True, return_counts=True)       # one score has one label: the mean
    found = isotonic_regression(np.bincount(at, labels) / count, weights=count)
    starts = found.blocks[:-1]
    middles = np.add.reduceat(x * count, starts) / np.add.reduceat(count, starts)
    return {"score": middles.round(4).tolist(), "label": found.x[starts].round(4).tolist()}


def apply(knots: dict[str, list[float]], scores: np.ndarray) -> np.ndarray:
    """The map of fit, at scores of any shape."""
    return np.interp(scores, knots["score"], knots["label"])


def errors(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean absolute and root mean square error."""
    return {"mae": round(float(np.abs(found - labels).mean()), 4),
            "rmse": round(float(np.sqrt(((found - labels) ** 2).mean())), 4)}


def calibrate(scores: np.ndarray, labels: Labels) -> dict:
    """
    Axis -> {knots, range: of the labels, fitted_on}, from scores [G, C, 3] and labels of the validation split; None on
    an axis without label scores, or where there are too few.
    """
    result = {}
    for a, axis in enumerate(AXES):
        known = ~np.isnan(labels.scores[..., a])
        x, y = scores[..., a][known], labels.scores[..., a][known]
        enough = len(x) >= LEAST and np.ptp(x) > 0
        result[axis] = {"knots": fit(x, y), "range": [float(y.min()), float(y.max())],
                        "fitted_on": len(x)} if enough else None
    return result


def check(maps: dict, scores: np.ndarray, labels: Labels) -> dict:
    """
    The maps of calibrate with {tested_on, before, after}: errors on another split, scores [G, C, 3]; before: 1..9 is
    stretched over the range of the labels in validation. None on an axis without map, or with too few labels.
    """
    result = {}
    for a, axis in enumerate(AXES):
        known = ~np.isnan(labels.scores[..., a])
        x, y, own = scores[..., a][known], labels.scores[..., a][known], maps[axis]
        if not own or len(x) < LEAST:
            result[axis] = None
            continue
        low, high = own["range"]
        result[axis] = own | {"tested_on": len(x), "before": errors(low + (x - 1) / 8 * (high - low), y),
                              "after": errors(apply(own["knots"], x), y)}
    return result
