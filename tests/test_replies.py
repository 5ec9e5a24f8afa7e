"""
How the pictures of a cohort are shown to the reward model in training.

Run     python -m pytest tests/test_replies.py          # 1 s
"""
import numpy as np

from common.replies import turned


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
