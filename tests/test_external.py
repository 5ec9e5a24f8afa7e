"""
hf: sources with several seeds, steps and guidances: batches, ranks and resuming change no image.

Run     python -m pytest tests/test_external.py     # 25 s on one core
"""
import json

import numpy as np
import pytest

from common import dist, external, images, sources
from common.config import load_config
from common.groups import load_groups
from common.images import read_image, write_png
from conftest import load_stage, run_stage, tree
from test_build_dataset import save_ldm, save_swin2sr, save_upscaler, textured

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with lr/, and tiny random models ldm, swin, up/model."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "lr").mkdir()
    for name in NAMES:
        write_png(folder / "lr" / f"{name}.png", textured(ord(name), 32, 32)[:32, :32])
    save_ldm(folder / "ldm"), save_swin2sr(folder / "swin"), save_upscaler(folder / "up")
    return folder


def made(saved, out, model, names=NAMES, **settings):
    external.restore_folder(str(saved / model), saved / "lr", out, names=names, steps=1, seed=0, **settings)
    return {path.stem: read_image(path) for path in out.glob("*.png")}


@pytest.mark.parametrize("model", ["ldm", "swin", "up/model"])
def test_an_image_does_not_depend_on_its_batch(saved, tmp_path, model):
    """Another partner and a filled-up batch: the same bytes; another batch size: up to rounding."""
    both = made(saved, tmp_path / "both", model, batch=2)
    other = made(saved, tmp_path / "other", model, names=["c", "a"], batch=2)
    assert all(np.array_equal(both[name], other[name]) for name in other) and len(both) == 3
    alone = made(saved, tmp_path / "alone", model, names=["b"])
    assert np.abs(alone["b"].astype(int) - both["b"]).max() <= 1
    (tmp_path / "both" / "b.png").unlink()
    again = made(saved, tmp_path / "both", model, batch=2)
    assert np.array_equal(again["b"], both["b"])


def test_seeds_steps_and_guidance_make_other_images(saved, tmp_path):
    first = made(saved, tmp_path / "1", "up/model", names=["a"])["a"]
    for number, options in enumerate(({"seeds": 2}, {"steps": 3}, {"guidance": 4.0, "prompt": "a b c"})):
        other = made(saved, tmp_path / f"o{number}", "up/model", names=["a"], options=options)["a"]
        assert not np.array_equal(first, other), options
    same = made(saved, tmp_path / "same", "up/model", names=["a"], options={"seeds": 1, "steps": 1, "guidance": 1.0})
    assert np.array_equal(first, same["a"])


def test_ranks_share_the_names(saved, tmp_path, monkeypatch):
    whole = made(saved, tmp_path / "whole", "swin")
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda own=rank: own)
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        own = made(saved, tmp_path / "shared", "swin")
        assert len(own) == (2, 3)[rank]
    assert all(np.array_equal(whole[name], own[name]) for name in NAMES)


@pytest.mark.parametrize("model, options, words", [
    ("swin", {"seeds": 2}, "is a network without randomness: remove seeds"),
    ("swin", {"steps": 2, "prompt": ""}, "is a network without randomness: remove steps"),
    ("ldm", {"guidance": 2.0}, "sees no text: remove guidance"),
])
def test_settings_that_a_model_does_not_have(saved, tmp_path, capfd, model, options, words):
    with pytest.raises(SystemExit):
        made(saved, tmp_path / "o", model, options=options)
    assert words in capfd.readouterr().err


# the setting `candidates` ----------------------------------------------------------------------------------------

def test_combinations():
    entries = ["hr", "folder:x=/y?z", "hf:up=some/model?seeds=2&steps=10+20&guidance=1+4.5", "hf:net=/m"]
    single = sources.expand(entries)
    assert len(single) == 2 + 8 + 1 and single[-1] == "hf:net=/m" and single[1] == "folder:x=/y?z"
    assert single[2] == "hf:up=some/model?seeds=1&steps=10&guidance=1"
    assert sources.record(single[5]) == {"method": "up-steps20-guidance4.5", "seed": 1, "steps": 20, "guidance": 4.5}
    assert len({sources.record(entry)["method"] for entry in single[2:10]}) == 4        # seeds are the same method
    assert len({sources.where(images.Path("run"), entry) for entry in single[2:10]}) == 8
    assert sources.record("hf:net=/m") == {"method": "net"}


@pytest.mark.parametrize("entry, words", [
    ("hf:a=m?seed=2", "'seed=2' should be one of seeds=, steps=, guidance="),
    ("hf:a=m?steps=0", "should hold numbers of at least 1"),
    ("hf:a=m?steps=ten", "should hold numbers of at least 1"),
    ("hf:a=m?seeds=1+2", "should hold numbers of at least 1"),
    ("hf:a=m?steps=1&steps=2", "each once"),
    ("hf:a=m?guidance=1+4", "needs hf_prompt"),
    ("hf:a=?steps=2", "should look like folder:NAME=PATH or hf:NAME=MODEL"),
])
def test_malformed_entries(entry, words):
    with pytest.raises(AssertionError, match=words.replace("+", r"\+").replace("?", r"\?")):
        sources.check(["hr", entry], True, "")


def test_the_stage_with_combinations_and_two_processes(saved, tmp_path):
    """The same bytes from one process and from two."""
    values = {"hr_dir": "skimage", "hr_size": 128, "train_groups": 2, "val_groups": 1, "test_groups": 1,
              "val_sources": ["rocket"], "test_sources": ["coffee"], "degradation": "mild", "workers": 1, "hf_steps": 1,
              "candidates": ["hr", f"hf:ldm={saved / 'ldm'}?seeds=2&steps=1+2", f"hf:swin={saved / 'swin'}"]}
    trees = []
    for processes in (1, 2):
        config = tmp_path / f"{processes}.yaml"
        config.write_text(json.dumps({"run": str(tmp_path / str(processes)), "seed": 0, "01_build_dataset": values}))
        if processes == 1:
            module = load_stage("01")
            module.main(load_config(module.Config, module.__file__, [str(config)]))
        else:
            done = run_stage("01", config, processes=2)
            assert done.returncode == 0, done.stderr
        trees.append(tree(tmp_path / str(processes) / "01_build_dataset"))
    assert trees[0] == trees[1]
    groups = load_groups(tmp_path / "1" / "01_build_dataset", "train")
    methods = sorted(candidate["method"] for candidate in groups[0]["candidates"])
    assert methods == ["hr", "ldm-steps1", "ldm-steps1", "ldm-steps2", "ldm-steps2", "swin"]
    assert {candidate.get("seed") for candidate in groups[0]["candidates"]} == {None, 1, 2}
