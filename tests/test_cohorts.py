"""
How the pictures of a cohort are shown to the reward model in training.

Run     python -m pytest tests/test_cohorts.py          # 5 s, and a toy run of 01 and 02
"""
import numpy as np
import pytest
import torch

from common import supervised
from common.groups import Cohort
from common.replies import look_at, sample_answers, turned
from conftest import build_judge, make_images


# looks -----------------------------------------------------------------------------------------------------

def test_the_first_8_looks_keep_colors_and_all_48_differ():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    found = [turned(image, look) for look in range(48)]
    assert len({own.tobytes() for own in found}) == 48 and np.array_equal(found[0], image)
    colors = [sorted(map(tuple, own.reshape(-1, 3).tolist())) for own in found]
    assert colors[:8] == [colors[0]] * 8 and colors[0] not in colors[8:]
    rows = [turned(np.arange(12).reshape(2, 2, 3), look)[..., 0].tolist() for look in range(8)]
    assert rows == [[[0, 3], [6, 9]], [[3, 9], [0, 6]], [[9, 6], [3, 0]], [[6, 0], [9, 3]],
                    [[3, 0], [9, 6]], [[0, 6], [3, 9]], [[6, 9], [0, 3]], [[9, 3], [6, 0]]]


@pytest.mark.parametrize("looks", [1, 8, 48])
def test_training_draws_from_as_many_looks_as_are_set(looks):
    judge, cfg = build_judge(looks=looks, replies=2, direct_replies=2, max_reply_tokens=2)
    lr, *images = make_images(0)
    ranks = np.ones((3, 3))
    few = [Cohort(f"{i}", lr, images, [""] * 3, ranks, ranks) for i in range(24)]
    views = [look_at(judge, few[0], look).pixels for look in range(48)]
    shown = [item.images.pixels for item in sample_answers(judge, cfg, few, 0, set())]
    sampled = [next(look for look, own in enumerate(views) if torch.equal(own, pixels)) for pixels in shown]
    taught = [lesson.look for lesson in supervised.lessons_of(judge, cfg, few, phase="cold start", step=0)]
    for found in (sampled, taught):
        assert max(found) < looks and (max(found) >= looks // 2) and len(set(found)) > min(looks, 20) // 2
