"""
A score belongs to its (LR, candidate) alone: not to the batch, the order, the padding, or the number of processes.

Run     python -m pytest tests/test_invariance.py       # 20 s
"""
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import mllm
from common.images import read_image, write_png
from conftest import ROOT, build_judge, make_images

TOLERANCE = 1e-5                        # of a score in 1..9, float32
BFLOAT16 = 0.05                         # with bfloat16 weights; measured 0.0004 here, 0.023 with the demo judge
SIZES = ((32, 32), (32, 64), (64, 32), (48, 48), (32, 48), (64, 64))
# every rank scores its share of the groups in sys.argv[1]; rank 0 writes all scores to sys.argv[2]
SHARES = """
import sys
import torch
sys.path[:0] = ["tests", "."]
from common import dist, mllm
from common.dist import mine
from conftest import build_judge, make_images
dist.init()
judge, _ = build_judge()
groups = mine([make_images(seed, *size) for seed, size in enumerate(eval(sys.argv[1]))])
scores = torch.zeros(0, 3, 3)
if groups:
    scores = mllm.expected_scores(judge, [g[0] for g in groups], [g[1:] for g in groups])
scores = dist.gather_rows(scores)
if dist.is_main():
    torch.save(scores, sys.argv[2])
dist.finish()
"""


def score(judge: mllm.Judge, groups: list[list], size: int = 16) -> torch.Tensor:
    return mllm.expected_scores(judge, [g[0] for g in groups], [g[1:] for g in groups], groups_per_forward=size)


def differences(judge: mllm.Judge) -> list[float]:
    """How far scores move: alone, in batches, behind more padding, with groups and candidates in other orders."""
    groups = [make_images(seed, *size) for seed, size in enumerate(SIZES)]
    whole = score(judge, groups)                                                     # padded to the longest row
    order, turn = [3, 0, 5, 1, 4, 2], [2, 0, 1]
    alone = torch.cat([score(judge, [[lr, image]]).view(1, 1, 3) for lr, *own in groups for image in own])
    shuffled = score(judge, [[groups[g][0], *(groups[g][1 + c] for c in turn)] for g in order], size=4)
    long = make_images(9, 128, 128)
    padded = torch.cat([score(judge, [group, long])[:1] for group in groups])
    twice = score(judge, [[group[0], group[1], group[1], group[1]] for group in groups])
    return [float((found - whole).abs().max()) for found in (
        alone.view_as(whole), score(judge, groups, size=2), shuffled[np.argsort(order)][:, np.argsort(turn)], padded,
        twice[:, :1].expand(-1, 3, -1) - twice + whole)]


@pytest.mark.parametrize("view", ["image", "clip"])
def test_a_score_alone_is_its_score_in_any_batch_order_and_padding(view):
    judge, _ = build_judge(view)
    assert max(differences(judge)) <= TOLERANCE
    groups = [make_images(seed) for seed in range(3)]
    assert torch.equal(score(judge, groups), score(judge, groups)) and score(judge, groups).std() > 1e-3


def test_in_bfloat16_a_score_moves_by_no_more_than_the_stated_tolerance():
    judge, _ = build_judge("clip")
    exact = score(judge, [make_images(0)])
    judge.model.to(torch.bfloat16)
    moved, rounded = differences(judge), score(judge, [make_images(0)])
    print("largest difference in bfloat16:", max(moved), "to float32:", float((rounded - exact).abs().max()))
    assert max(moved) <= BFLOAT16


def test_the_same_file_twice_has_the_same_score(tmp_path):
    judge, _ = build_judge()
    lr, image, *_ = make_images(2)
    write_png(tmp_path / "a.png", image)
    write_png(tmp_path / "b.png", image)
    first, second = (read_image(tmp_path / name) for name in ("a.png", "b.png"))
    found = mllm.expected_scores(judge, [lr], [[first, second]])[0]
    assert torch.equal(score(judge, [[lr, first]]), score(judge, [[lr, second]]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("processes", [3])
def test_any_number_of_processes_gives_the_same_scores(processes, tmp_path):
    out = tmp_path / "scores.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    (tmp_path / "shares.py").write_text(SHARES)
    done = subprocess.run([*launcher, str(tmp_path / "shares.py"), str(SIZES[:5]), str(out)], cwd=ROOT, timeout=600,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    judge, _ = build_judge()
    wanted = score(judge, [make_images(seed, *size) for seed, size in enumerate(SIZES[:5])])
    torch.testing.assert_close(torch.load(out, weights_only=True), wanted, rtol=0, atol=TOLERANCE)
