"""
What a newcomer sees: curves.png.

Run     python -m pytest tests/test_guide.py        # 3 s, and a toy run of 01 and 02 if there is none yet
"""

import numpy as np
import pytest
from PIL import Image

from common import report
from test_readme import documented


def test_curves_show_only_keys_that_the_readme_explains():
    for stem, number in (("02_train_reward", "02"), ("04_train_sr_grpo", "04")):
        keys = {key for own in report.PLOTS[stem].values() for key in own}
        assert keys <= documented(number), keys - documented(number)


def test_curves_of_a_toy_run_are_drawn(toy_run):
    with Image.open(toy_run / "02_train_reward" / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    wanted = tuple(int(report.COLORS[0][i:i + 2], 16) for i in (1, 3, 5))
    assert (pixels == wanted).all(1).sum() > 200                        # lines, not only empty axes


def test_running_mean_and_points_against_loops():
    values = np.random.default_rng(0).random(30)
    for i, mean in enumerate(report.running_mean(values, 4)):
        reach = min(4, i, 29 - i)
        assert mean == pytest.approx(np.mean([values[j] for j in range(i - reach, i + reach + 1)]))
    rows = [{"step": 0, "a": 1.0}, {"step": 1, "a": None}, {"step": 2}, {"step": 3, "a": 4}]
    assert report.points(rows, "a").tolist() == [[0, 1], [3, 4]]
    assert report.points(rows, "b").shape == (0, 2)
