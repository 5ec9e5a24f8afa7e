"""
detail_view: a large image as four tiles, whole and in three full-size crops, for the tokens of one image.

Run     python -m pytest tests/test_views.py        # 5 s
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import mllm
from common.images import resize
from common.mllm import detail_mosaic
from conftest import build_judge, load_stage, make_images, run_stage


PROCESSOR = SimpleNamespace(size={"shortest_edge": 256, "longest_edge": 64 * 96}, patch_size=8, merge_size=2)


def test_tiles_are_the_image_made_smaller_and_three_places_as_they_are():
    image = np.random.default_rng(9).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    shown = detail_mosaic(image, PROCESSOR)
    assert shown.shape == (64, 96, 3)
    tiles = [shown[y:y + 32, x:x + 48] for y in (0, 32) for x in (0, 48)]
    assert np.array_equal(tiles[0], resize(image, (48, 32), "bicubic"))
    for tile, (y, x) in zip(tiles[1:], [(32, 0), (64, 0), (64, 144)]):           # 4, 8 and 11 of 0..15, by rows of 4
        assert np.array_equal(tile, image[y:y + 32, x:x + 48])


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64), (100, 110), (20, 4000), (64, 2000)])
def test_images_below_twice_the_budget_or_too_thin_stay_as_they_are(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    assert detail_mosaic(image, PROCESSOR) is image


@pytest.mark.parametrize("height, width", [(128, 97), (200, 120), (333, 1000)])
def test_never_more_than_the_budget(height, width):
    shown = detail_mosaic(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8), PROCESSOR)
    assert 256 <= shown.shape[0] * shown.shape[1] <= 64 * 96 and shown.shape[0] % 32 == shown.shape[1] % 32 == 0
    tight = SimpleNamespace(**vars(PROCESSOR) | {"size": {"shortest_edge": 64 * 96, "longest_edge": 64 * 96}})
    kept = detail_mosaic(np.zeros((height, width, 3), np.uint8), tight)
    assert kept.shape[:2] in ((height, width), (64, 96)), "the processor would enlarge a mosaic below its least size"


@pytest.mark.parametrize("view", ["image", "clip"])
def test_the_judge_sees_detail_at_the_cost_of_one_image_and_scores_as_alone(view, tmp_path):
    judge, _ = build_judge(view, detail_view=True, max_pixels=4096)
    plain, _ = build_judge(view, max_pixels=4096)
    groups = [make_images(seed, *size) for seed, size in enumerate([(128, 192), (32, 32), (256, 96)])]
    for group in groups:
        assert mllm.pixel_patches(judge, [group])[1].prod(1).max() <= 4096 // 8**2
    fine = [image.copy() for image in groups[0]]
    fine[1][1::2, ::2], fine[1][::2, 1::2] = 255 - fine[1][1::2, ::2], fine[1][::2, 1::2]      # near the pixel grid
    lrs, candidates = [group[0] for group in groups], [group[1:] for group in groups]
    together = mllm.expected_scores(judge, lrs, candidates)
    for lr, own, scores in zip(lrs, candidates, together):
        alone = torch.cat([mllm.expected_scores(judge, [lr], [[image]]) for image in own], 1)[0]
        assert torch.allclose(alone, scores, atol=1e-5)
    change = [mllm.expected_scores(one, lrs[:1] * 2, [fine[1:2], groups[0][1:2]]).diff(dim=0).abs().max()
              for one in (judge, plain)]
    assert change[0] > 2 * change[1], "what shrinking hides, tiles show"
    mllm.save_judge(judge, tmp_path / "02" / "judge", base="none")
    again = mllm.load_judge(tmp_path / "02", torch.device("cpu"))
    assert again.detail_view and torch.equal(mllm.expected_scores(again, lrs, candidates), together)


def test_it_needs_the_lr_image_on_the_same_grid():
    with pytest.raises(AssertionError, match="detail_view needs lr_view=resized"):
        load_stage("02").Config(run="", detail_view=True, lr_view="native")


def test_02_refuses_it_where_it_would_change_nothing(toy_run, toy_config, tmp_path):
    (tmp_path / "01_build_dataset").symlink_to(toy_run / "01_build_dataset")
    done = run_stage("02", toy_config, f"run={tmp_path}", "detail_view=true", "max_pixels=1024")
    assert done.returncode == 2 and "candidates of 32x32 are less than twice max_pixels=1024" in done.stderr
