"""
Stage 01: real photographs, folders of bad files, other programs' outputs, LR images alone.

Run     python -m pytest tests/test_build_dataset.py        # 30 s on two free cores
"""
import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from common import candidates, metrics, run
from common.config import load_config
from common.groups import SPLITS, all_groups, group_images, load_groups
from common.images import luma, read_image, write_png
from conftest import load_stage, run_stage, tree
from test_sources import textured

TEST = ["chelsea", "coffee"]
KEYS = {"id", "split", "source", "scale", "lr", "hr", "crop", "degradation", "candidates", "labels", "sha256"}


def write_config(folder, **settings):
    """A config of stage 01 for 8 tiny groups in `folder`."""
    values = {"hr_dir": "skimage", "hr_size": 32, "scale": 4, "degradation": "mild", "train_groups": 5,
              "val_groups": 1, "test_groups": 2, "val_sources": ["rocket"], "test_sources": TEST,
              "candidates": ["hr|unnatural", "resample", "inconsistent"], "tie_margin": 0.02,
              "workers": 1} | settings
    path = folder / "config.yaml"
    path.write_text(json.dumps({"run": str(folder / "run"), "seed": 0, "01_build_dataset": values}))
    return path


def run_here(config, *overrides):
    """Run stage 01 inside this process, without the seconds that imports take; returns the exit status."""
    module = load_stage("01")
    try:
        module.main(load_config(module.Config, module.__file__, [str(config), *overrides]))
    except SystemExit as stop:
        return stop.code or 0
    return 0


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def stage(capfd):
    return lambda config, *overrides: Done(run_here(config, *overrides), *capfd.readouterr())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    assert run_here(write_config(folder)) == 0
    return folder / "run" / "01_build_dataset"


def test_lines_and_files(built):
    lines = [json.loads(line) for line in (built / "groups.jsonl").read_text().splitlines()]
    names = [line["id"] for line in lines]
    assert names == [*(f"train_{i:05d}" for i in range(5)), "val_00000", "test_00000", "test_00001"]
    for line in lines:
        assert set(line) == KEYS
        assert set(line["sha256"]) == {line["lr"], line["hr"], *(c["path"] for c in line["candidates"])}
        assert all(run.sha256(built / path) == digest for path, digest in line["sha256"].items())
        assert read_image(built / line["lr"]).shape == (8, 8, 3)
        assert {read_image(built / c["path"]).shape for c in line["candidates"]} == {(32, 32, 3)}
    assert {line["source"] for line in lines if line["split"] == "test"} <= set(TEST)
    assert not {line["source"] for line in lines if line["split"] == "train"} & {*TEST, "rocket"}
    results = json.loads((built / "manifest.json").read_text())["results"]
    assert results["groups"] == 8 and results["candidates"] == 24 and results["label_source"] == "proxy"
    assert results["pairs"] == sum(len(metrics.pair_hits(r, r)[0]) for r in
                                   (line["labels"]["overall"]["ranks"] for line in lines))
    assert read_image(built / "contact_sheet.png").shape[1] > 500
    assert not (built / "progress").exists()


def test_label_follows_the_recorded_images(built):
    """The scores of the ground truth and of resampled candidates can be computed again from the files."""
    for group in load_groups(built, "train"):
        lr, images, hr = group_images(built, group)
        scores = {axis: label["scores"] for axis, label in group["labels"].items()}
        for index, candidate in enumerate(group["candidates"]):
            consistency = metrics.proxy_consistency(images[index], hr, lr)
            assert abs(consistency - scores["consistency"][index]) < 1e-4
            if candidate["method"] in ("hr", *candidates.RESAMPLERS, *candidates.UNNATURAL):
                naturalness = metrics.detail_score(images[index], hr)
                assert abs(naturalness - scores["naturalness"][index]) < 1e-4
                assert abs(min(consistency, naturalness) - scores["overall"][index]) < 1e-4
            elif "+" not in candidate["method"]:
                assert scores["naturalness"][index] == 1


def test_two_workers_give_the_same_bytes_and_a_finished_set_stays(built, stage, tmp_path):
    config = write_config(tmp_path, workers=2)
    done = run_stage("01", config)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "run" / "01_build_dataset") == tree(built)
    again = stage(config, "workers=1")
    assert again.returncode == 0 and "is finished" in again.stdout
    other = stage(config, "tie_margin=0.1")
    assert other.returncode == 2 and "tie_margin: 0.02 -> 0.1" in other.stderr


def test_bad_files_are_skipped_and_named(stage, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for index in range(3):
        write_png(pictures / f"good{index}.png", textured(index))
    write_png(pictures / "sub" / "good0.png", textured(9))             # same stem, another source
    shutil.copy(pictures / "good1.png", pictures / "twin.png")
    (pictures / "truncated.png").write_bytes((pictures / "good0.png").read_bytes()[:900])
    write_png(pictures / "dot.png", np.zeros((1, 1, 3), np.uint8))
    write_png(pictures / "flat.png", np.full((64, 64, 3), 90, np.uint8))
    (pictures / "notes.txt").write_text("not looked at")
    done = stage(write_config(tmp_path, hr_dir=str(pictures), val_sources=[], test_sources=[]))
    assert done.returncode == 0 and "4 pictures, 4 skipped" in done.stdout, done.stderr
    folder = tmp_path / "run" / "01_build_dataset"
    skipped = {json.loads(line)["path"].rsplit("/", 1)[1]: json.loads(line)["reason"]
               for line in (folder / "skipped.jsonl").read_text().splitlines()}
    assert set(skipped) == {"truncated.png", "dot.png", "flat.png", "twin.png"}
    assert "smaller than one crop" in skipped["dot.png"] and "flat" in skipped["flat.png"]
    assert "same pixels" in skipped["twin.png"]
    sources = {split: {group["source"] for group in load_groups(folder, split)} for split in SPLITS}
    assert all(sources.values()) and sum(map(len, sources.values())) == len(set.union(*sources.values()))


@pytest.mark.parametrize("override, words", [
    ("hr_dir=/nowhere", "hr_dir: /nowhere is not a folder"),
    ("val_sources=rokcet", "did you mean 'rocket'"),
    ("test_sources=rocket", "'rocket' is given twice"),
    ("val_sources=", "val_groups=1, but no picture is for val"),
    ("hr_size=30", "should be a multiple of scale 4"),
    ("degradation=heavy", "degradation should be one of realesrgan, light, mild, bicubic"),
    ("candidates=hr", "at least two"),
    ("candidates=hr,folder:x", "should look like folder:NAME=PATH"),
    ("candidates=hr,hf:a=m?guidance=4", "needs hf_prompt"),
    ("lr_dir=/tmp", "set one of hr_dir and lr_dir"),
    ("tie_margin=-1", "tie_margin should be in 0..1"),
    ("workers=-1", "workers should be 0 or more"),
])
def test_wrong_settings_get_one_line_and_cost_nothing(stage, tmp_path, override, words):
    """Also not what people said: judgements.jsonl may be put back before a set is built again."""
    folder = tmp_path / "run" / "01_build_dataset"
    folder.mkdir(parents=True)
    (folder / "judgements.jsonl").write_text("hours of work\n")
    done = stage(write_config(tmp_path, val_fraction=0), override)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr
    assert [path.name for path in folder.iterdir()] == ["judgements.jsonl"], "a corrected setting must be accepted"


def test_folder_source_in_two_passes(stage, tmp_path):
    """Outputs of another SR program: asked for, checked, then used; what was made before is kept."""
    outputs = tmp_path / "mynet"
    config = write_config(tmp_path, candidates=["hr", "resample", f"folder:mynet={outputs}"])
    folder = tmp_path / "run" / "01_build_dataset"
    first = stage(config)
    assert first.returncode == 2 and f"on {folder / 'lr'}" in first.stderr and "lacks 8 of 8" in first.stderr
    before = (folder / "lr" / "train_00000.png").stat().st_mtime_ns
    outputs.mkdir()
    for path in (folder / "lr").glob("*.png"):                              # a very simple SR program
        Image.open(path).resize((32, 32), Image.BICUBIC).save(outputs / f"{path.stem}.jpg", quality=95)
    Image.new("RGB", (31, 32)).save(outputs / "train_00002.jpg")
    second = stage(config)
    assert second.returncode == 2 and "train_00002.jpg is 31x32, expected 32x32" in second.stderr
    shutil.copy(folder / "lr" / "train_00001.png", outputs)
    twice = stage(config)
    assert twice.returncode == 2 and "train_00001.jpg and train_00001.png are both" in twice.stderr
    (outputs / "train_00001.png").unlink()
    for path in (folder / "lr").glob("*.png"):                              # a better one: nothing of the first is left
        Image.open(path).resize((32, 32), Image.LANCZOS).save(outputs / f"{path.stem}.jpg", quality=90)
    third = stage(config)
    assert third.returncode == 0, third.stderr
    assert (folder / "lr" / "train_00000.png").stat().st_mtime_ns == before
    for group in all_groups(folder):
        index = [candidate["method"] for candidate in group["candidates"]].index("mynet")
        lr, images, hr = group_images(folder, group)
        assert np.array_equal(images[index], read_image(outputs / f"{group['id']}.jpg"))
        assert group["labels"]["naturalness"]["scores"][index] < 1
        score = metrics.proxy_consistency(images[index], hr, lr)
        assert abs(score - group["labels"]["consistency"]["scores"][index]) < 1e-4


def test_a_photograph_that_changed_during_a_build_is_named(stage, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        write_png(pictures / f"{index}.png", textured(index))
    config = write_config(tmp_path, hr_dir=str(pictures), val_sources=[], test_sources=[],
                          candidates=["hr", f"folder:mynet={tmp_path / 'none'}"])
    assert "lacks 8 of 8" in stage(config).stderr
    (pictures / "0.png").touch()
    assert "lacks 8 of 8" in stage(config).stderr, "the same pixels"
    for index in range(4):
        write_png(pictures / f"{index}.png", textured(index + 10))
    changed = stage(config)
    assert changed.returncode == 2 and "the pictures changed since" in changed.stderr


def test_lr_only_pictures_have_no_labels(stage, tmp_path):
    pictures = tmp_path / "lr"
    pictures.mkdir()
    for index in range(4):
        write_png(pictures / f"{index}.png", textured(index, 20, 24))
    config = write_config(tmp_path, hr_dir=None, lr_dir=str(pictures), val_sources=[], test_sources=[],
                          candidates=["resample", "resample"])
    done = stage(config)
    assert done.returncode == 0 and "warning: no labels" in done.stdout, done.stderr
    folder = tmp_path / "run" / "01_build_dataset"
    assert json.loads((folder / "manifest.json").read_text())["results"]["label_source"] == "none"
    group = load_groups(folder, "train")[0]
    lr, images, hr = group_images(folder, group)
    assert group["labels"] == {} and hr is None and lr.shape == (8, 8, 3) and images[0].shape == (32, 32, 3)
    refused = stage(config, f"run={tmp_path / 'r'}", "candidates=hr,resample")
    assert refused.returncode == 2 and "need ground truth" in refused.stderr


# the parts -----------------------------------------------------------------------------------------------

def test_shares_follow_the_area_up_to_the_cap():
    areas, shares = (("a", 800), ("b", 100), ("b", 50), ("c", 50)), load_stage("01").shares
    pictures = [{"source": name, "area": area} for name, area in areas]
    assert shares(pictures, 100, 1.0) == [80, 10, 5, 5]
    capped = shares(pictures, 100, 0.5)
    assert capped == [50, 25, 13, 12] and sum(shares(pictures, 7, 0.4)) == 7
    assert shares(pictures[:1], 9, 0.1) == [9]                              # one source: it gives everything
    assert shares([], 0, 0.5) == []
    assert shares(pictures, 100, 0.4, ("a",)) == [9, 30, 16, 45]            # a texture: a fifth; all lifted by 1 / 0.88


def test_split_by_hash_is_stable_and_fills_every_split():
    module, names = load_stage("01"), [f"picture{i}" for i in range(40)]

    def split(names, seed=0):
        return module.split_sources(module.Config(run="", seed=seed), names)
    counts = [list(split(names).values()).count(part) for part in SPLITS]
    assert counts == [34, 2, 4] and split(names) == split(names[::-1]) != split(names, seed=1)
    with pytest.raises(SystemExit):
        split(["a", "b"])


def test_flat_crops_are_drawn_again():
    module = load_stage("01")
    image = np.full((200, 200, 3), 128, np.uint8)
    image[:, 140:] = textured(0, 200, 60)
    cfg = module.Config(run="", hr_size=32, train_groups=1)
    crops = [module.draw_crop(cfg, image, f"train_{i:05d}")[0] for i in range(30)]
    assert all(luma(crop).std() >= 8 for crop in crops)


def test_quality_warns_where_names_say_everything(capsys):
    def group(split, ranks):
        label = {"ranks": ranks, "source": "import", "votes": None}
        return {"split": split, "candidates": [{"method": name} for name in "abc"], "labels": {"overall": label}}
    rng, quality = np.random.default_rng(0), load_stage("01").quality
    facts = quality([group("train", [1, 2, 3])] * 4 + [group("test", [1, 2, 3]), group("test", [1, 2, 2])])
    assert facts["pairs"] == 3 * 5 + 2 and facts["label_source"] == "import"
    assert facts["method_prior"]["overall"] == 1 and np.isnan(facts["method_prior"]["naturalness"])
    printed = capsys.readouterr().out
    assert "the name alone orders 100% of the test pairs rightly" in printed and "no val groups" in printed
    random = [group(SPLITS[i % 3], rng.permutation([1, 2, 3]).tolist()) for i in range(60)]
    assert abs(quality(random)["method_prior"]["overall"] - 0.5) < 0.2 and not capsys.readouterr().out


def test_workers_are_as_many_as_the_cores_that_may_be_used(monkeypatch):
    """As under taskset, in a container or a cluster's job."""
    monkeypatch.setattr(load_stage("01").os, "sched_getaffinity", lambda _: {3})
    assert load_stage("01").start_pool(0) is None


def test_jobs_do_only_the_rest(tmp_path):
    run_jobs, log, read = load_stage("01").run_jobs, tmp_path / "log.jsonl", tmp_path / "read.txt"
    jobs = [{"id": str(x), "x": x} for x in range(5)]

    def values(jobs):
        done = run_jobs(None, lambda job: {"value": job["x"] ** 2}, jobs, log)
        return {name: result["value"] for name, result in done.items()}
    log.write_text('\n{"id": "1", "stamps": [], "result": {"value": 99}}\n{"id": "2", "resu')    # killed while it wrote
    assert values(jobs[:3]) == {"0": 0, "1": 99, "2": 4}
    assert values(jobs) == {"0": 0, "1": 99, "2": 4, "3": 9, "4": 16}
    read.write_text("one")
    jobs = [job | {"files": [str(read)]} for job in jobs]
    assert values(jobs[:2]) == {"0": 0, "1": 1}, "the log knows them without that file"
    log.write_text(log.read_text().replace('"value": 1}', '"value": 98}'))
    assert values(jobs[:2]) == {"0": 0, "1": 98}
    read.write_text("another")
    assert values(jobs[:2]) == {"0": 0, "1": 1}
