"""
Stages 04 and 05 as a user runs them, at toy size.

Run     python -m pytest tests/test_sr_stages.py        # 3 min, of which stages 01 and 02 take one
"""
import csv
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import mllm, restoring, run, sr_policy, sr_reward
from common.config import load_config
from common.groups import image_batch, load_groups, require_one_size
from common.images import to_pixels, write_png
from conftest import ROOT, build_judge, load_stage, make_images, run_stage
from test_sr_policy import tiny_policy

MORE = ("hybrid=0.5", "eval_steps=2")                       # compared in 05, too
POLICY = Path("policy") / "diffusion_pytorch_model.safetensors"


def copy_of(toy_run: Path, target: Path) -> Path:
    """A run folder that shares the finished stages but may get its own 04 and 05."""
    target.mkdir(parents=True)
    for stem in ("01_build_dataset", "02_train_reward"):
        (target / stem).symlink_to(toy_run / stem)
    return target


def finish(number: str, config: Path, folder: Path, *overrides: str, processes: int = 1) -> str:
    done = run_stage(number, config, f"run={folder}", *overrides, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tuned(toy_config, toy_run, tmp_path_factory) -> Path:
    """A run folder with 04 finished, too."""
    folder = copy_of(toy_run, tmp_path_factory.mktemp("sr") / "run")
    finish("04", toy_config, folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(toy_config, tuned) -> Path:
    finish("05", toy_config, tuned, *MORE)
    return tuned


def files_of(folder: Path) -> dict[str, bytes]:
    """The results of 04 that must not depend on how often it was interrupted; curves.png shows seconds, too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".png") and path.name != "curves.png" or path.name == "sampler.json"}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# 04 --------------------------------------------------------------------------------------------------------

def test_04_leaves_what_it_promises(tuned, toy_config):
    folder = tuned / "04_train_sr_grpo"
    results = run.read_json(folder / "manifest.json")["results"]
    wanted = {"reward_start", "reward_end", "lr_psnr_start", "lr_psnr_end", "ratio_error_max",
              "samples_per_second"}
    assert wanted <= set(results) and results["reward_end"] >= results["reward_start"]
    assert results["ratio_error_max"] < 1e-5
    rows = rows_of(folder)
    logged = {"reward_mean", "reward_std", "zero_std_groups", "policy_kl", "ref_kl", "clip_frac_low", "lr",
              "clip_frac_high", "ratio_max", "grad_norm", "lr_psnr", "seconds_sample", "seconds_score",
              "seconds_update", "peak_memory_gb"}
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(logged <= set(row) for row in rows)
    assert {"val_reward", "val_lr_psnr", "val_heldout"} <= set(rows[1]) and "val_reward" not in rows[0]
    assert results["heldout_end"] >= results["heldout_start"]
    assert results["lr_psnr_end"] > results["lr_psnr_start"] - 0.3
    assert rows[0]["ref_kl"] == 0 < rows[3]["ref_kl"]
    sheets = sorted(path.name for path in (folder / "samples").iterdir())
    assert sheets == ["step_0000.png", "step_0002.png", "step_0004.png"]
    cold, last = load_file(folder / "cold_start" / POLICY.name), folder / "checkpoints" / "step_000004"
    assert cold.keys() == load_file(folder / POLICY).keys()
    trained = load_file(last / "model.safetensors")
    assert all("lora" in name for name in trained)                      # nothing else is trained


def test_04_again_is_a_no_op_and_other_settings_are_refused(tuned, toy_config):
    before = files_of(tuned / "04_train_sr_grpo")
    assert "is finished" in finish("04", toy_config, tuned)
    assert files_of(tuned / "04_train_sr_grpo") == before
    done = run_stage("04", toy_config, f"run={tuned}", "lr=0.5")
    assert done.returncode == 2 and "lr:" in done.stderr and done.stderr.count("\n") == 1


def test_04_needs_the_earlier_stages(toy_config, tmp_path):
    done = run_stage("04", toy_config, f"run={tmp_path}")
    assert done.returncode == 2 and "python 01_build_dataset.py" in done.stderr


@pytest.mark.parametrize("override", [
    "channels=30", "denoise_steps=7", "window_width=4", "samples_per_input=1"])
def test_04_refuses_settings_that_cannot_work(toy_config, toy_run, tmp_path, override):
    done = run_stage("04", toy_config, f"run={tmp_path}", override)
    assert done.returncode == 2 and override.split("=")[0] in done.stderr and done.stderr.count("\n") == 1


def test_04_resumed_after_a_checkpoint_is_the_same_to_the_byte(tuned, toy_config, tmp_path):
    folder = tmp_path / "run" / "04_train_sr_grpo"
    shutil.copytree(tuned, tmp_path / "run", symlinks=True)
    shutil.rmtree(folder / "policy")                        # as if it was killed while saving the last step
    (folder / "manifest.json").unlink()
    (folder / "checkpoints" / "step_000004").rename(folder / "checkpoints" / "step_000004.tmp")
    finish("04", toy_config, tmp_path / "run")
    assert files_of(folder) == files_of(tuned / "04_train_sr_grpo")
    clock = ("time", "seconds", "peak_memory_gb")
    ours, theirs = ([{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows_of(one)]
                    for one in (folder, tuned / "04_train_sr_grpo"))
    assert ours == theirs


def test_a_killed_cold_start_goes_on_to_the_same_bytes(tuned, toy_config, toy_run, tmp_path):
    target = copy_of(toy_run, tmp_path / "run")
    saved = target / "04_train_sr_grpo" / "cold_start" / "checkpoints" / "step_000020"
    command = [sys.executable, "04_train_sr_grpo.py", str(toy_config), f"run={target}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not saved.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (target / "04_train_sr_grpo" / "manifest.json").exists()
    finish("04", toy_config, target)
    assert files_of(target / "04_train_sr_grpo") == files_of(tuned / "04_train_sr_grpo")


def test_04_with_three_processes_trains_the_same_weights(tuned, toy_config, toy_run, tmp_path):
    target = copy_of(toy_run, tmp_path / "run")
    finish("04", toy_config, target, processes=3)           # each has an LR image; the cold start's four are uneven
    one, two = (load_file(folder / "04_train_sr_grpo" / "checkpoints" / "step_000004" / "model.safetensors")
                for folder in (tuned, target))
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name       # moved by some 1e-3


# 05 --------------------------------------------------------------------------------------------------------

class Page(HTMLParser):
    """Collects tags, their sources, and whether every tag that was opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("img", "meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_05_compares_on_the_test_split(evaluated):
    folder = evaluated / "05_eval_sr"
    results = run.read_json(folder / "manifest.json")["results"]
    pairs = {f"{name}_{variant}" for name in ("reward", "heldout", "psnr", "ssim", "lr_psnr")
             for variant in ("base", "tuned")}
    assert pairs | {"reward_gain_ci95", "heldout_gain_ci95", "win_rate", "seconds_per_image"} <= set(results)
    assert 0 <= results["win_rate"] <= 1 and results["seconds_per_image"] > 0
    lines = [json.loads(line) for line in (folder / "per_image.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["source"] for line in lines} <= {"chelsea", "coffee"}
    mean = sum(line["tuned"]["reward"] for line in lines) / len(lines)
    assert abs(mean - results["reward_tuned"]) < 1e-3
    gain = sum(line["tuned"]["reward"] - line["base"]["reward"] for line in lines) / len(lines)
    assert results["reward_gain_ci95"][0] - 1e-3 <= gain <= results["reward_gain_ci95"][1] + 1e-3
    assert all(line["hr"]["heldout"] == 1 and line["hr"]["psnr"] == 100 for line in lines)
    assert Image.open(folder / "images" / f"{lines[0]['id']}_tuned.png").size == (32, 32)
    assert (folder / "table.md").read_text().count("|") > 20
    full = run.read_json(folder / "results.json")
    assert full["denoise_steps"] == 4 and list(full["steps"]) == ["2"] and "reward_hybrid" in results
    for part in (full["steps"]["2"], *full["by_strength"]):
        assert set(part["gain"]) == {"tuned", "hybrid"} and set(part["mean"]) == {"base", "tuned", "hybrid"}
    assert full["steps"]["2"]["mean"]["base"]["psnr"] != full["mean"]["base"]["psnr"]
    assert full["draws"]["reward"]["best"]["base"][0] == full["mean"]["base"]["reward"]     # of one seed
    cost = full["seconds_per_sample"]
    assert set(cost) == {"denoise", "decode", "judge"} and min(cost.values()) > 0
    assert cost["denoise"] + cost["decode"] == pytest.approx(results["seconds_per_image"], abs=1e-3)


@pytest.mark.parametrize("settings, message", [
    (["eval_steps=2,7"], "7 denoising steps: they should divide the 1000"), (["eval_steps=0"], "should be at least 1"),
    (["eval_steps=2", "hybrid=0.8"], "hybrid=0.8: 2 of 2 steps"), (["large_size=98"], "large_size=98: should be a")])
def test_05_refuses_what_it_cannot_compare_before_it_measures(tuned, toy_config, tmp_path, capsys, settings, message):
    for stem in ("01_build_dataset", "02_train_reward", "04_train_sr_grpo"):
        (tmp_path / stem).symlink_to(tuned / stem)
    stage = load_stage("05")
    with pytest.raises(SystemExit) as stop:
        stage.main(load_config(stage.Config, stage.__file__, [str(toy_config), f"run={tmp_path}", *settings]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error.splitlines()[-1]
    assert not list(tmp_path.glob("05_eval_sr/images"))


def test_05_begun_with_other_larger_crops_is_the_same_run(evaluated, toy_config):
    stage = load_stage("05")
    argv = [str(toy_config), f"run={evaluated}", *MORE, "large_crops=0", "large_size=64"]
    with pytest.raises(SystemExit) as finished:
        stage.main(load_config(stage.Config, stage.__file__, argv))
    assert finished.value.code == 0


def test_05_judges_in_the_crops_that_04_optimized(toy_run):
    stage, judge, source = load_stage("05"), build_judge()[0], toy_run / "01_build_dataset"
    groups = load_groups(source, "test")[:2]
    lr, hr = (to_pixels(image_batch(source, groups, key)) for key in ("lr", "hr"))
    rewarded = {"weight_consistency": 0.0, "weight_naturalness": 0.0, "weight_overall": 1.0, "crops_per_image": 4}
    policies = {"base": tiny_policy(), "tuned": tiny_policy()}
    for crop in (0, 16):
        cfg = stage.Config(run="unused", seeds_per_image=1)
        found = stage.measure_all(cfg, policies, judge, rewarded=rewarded | {"crop": crop}, source=source,
                                  groups=groups, measures=[], folder=None).values[:, -1, 0]
        wanted = sr_reward.expected_scores(judge, lr, hr[:, None], crop=crop, limit=4)[:, 0, 2]
        assert torch.allclose(found.float(), wanted, atol=1e-4)
    assert not torch.allclose(mllm.expected_scores(judge, list(lr), [[one] for one in hr])[:, 0, 2], wanted, atol=1e-4)


def test_05_restores_a_folder_and_the_judge_scores_it(evaluated, toy_config, tmp_path):
    for name in ("a", "sub/b"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").resize((30, 22)).save(tmp_path / "photos" / f"{name}.png")
    finish("05", toy_config, evaluated, f"lr_dir={tmp_path / 'photos'}", f"out={tmp_path / 'out'}")
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["variant"]) for row in rows] == [
        (image, variant) for image in ("a.png", "sub/b.png") for variant in ("bicubic", "tuned")]
    assert all(1 <= float(row[axis]) <= 9 for row in rows for axis in ("overall", "consistency", "naturalness"))
    assert Image.open(tmp_path / "out" / "tuned" / "sub" / "b.png").size == (120, 88)


def test_the_report_is_whole_and_needs_nothing_else(evaluated):
    text = (evaluated / "05_eval_sr" / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.tags.count("img") > 10 and "table" in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text and "nan" not in text.lower().split()


def test_05_again_and_with_two_processes_gives_the_same(evaluated, toy_config, tmp_path):
    for processes in (1, 2):
        target = tmp_path / str(processes)
        shutil.copytree(evaluated, target, symlinks=True)
        shutil.rmtree(target / "05_eval_sr")
        finish("05", toy_config, target, *MORE, processes=processes)
        ours, theirs = (run.read_json(one / "05_eval_sr" / "results.json") for one in (target, evaluated))
        assert ours.pop("seconds_per_sample").keys() == theirs.pop("seconds_per_sample").keys()
        assert processes == 2 or ours == theirs
        for key, value in theirs["headline"].items():
            assert ours["headline"][key] == pytest.approx(value, abs=2e-3), key


@pytest.fixture(scope="module")
def imported(tuned, toy_config, toy_run, tmp_path_factory) -> Path:
    """A run folder whose 01 is an import of some of toy_run's images, 32 px large, with 04 finished."""
    source, folder = toy_run / "01_build_dataset", tmp_path_factory.mktemp("imported")
    names = ["lr", "candidate", "method", "rank_overall", "source", "split", "hr"]
    groups = load_groups(source, "test") + load_groups(source, "train")[:2]
    rows = [[group["lr"], one["path"], one["method"], rank, group["source"], group["split"], group["hr"]]
            for group in groups for rank, one in enumerate(group["candidates"][:2], 1)]
    (folder / "set").mkdir()
    for kind in {Path(name).parts[0] for row in rows for name in (*row[:2], row[-1])}:
        (folder / "set" / kind).symlink_to(source / kind)
    with open(folder / "set" / "set.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    finish("01", toy_config, folder / "run", f"import_from={folder / 'set' / 'set.csv'}", "hr_dir=null",
           "hr_size=64", "scale=2", "val_sources=", "test_sources=", "val_fraction=0", "test_fraction=0")
    for stem in ("02_train_reward", "04_train_sr_grpo"):
        (folder / "run" / stem).symlink_to(tuned / stem)
    return folder / "run"


def test_05_compares_on_an_imported_set_and_shows_no_larger_crops(imported, toy_config):
    """An import knows no folder of photographs that larger crops could come from."""
    finish("05", toy_config, imported)
    assert run.read_json(imported / "05_eval_sr" / "results.json")["images"] == 8
    assert "Larger crops" not in (imported / "05_eval_sr" / "report.html").read_text()


def test_the_judge_of_an_import_sees_crops_of_the_size_it_learned_on(imported, toy_config, tmp_path):
    """In 05 and 03, whatever hr_size says, which an import does not use."""
    lr, image, _ = make_images(0, 64, 96, count=2)
    for name, pixels in (("lr", lr), ("sr", image)):
        (tmp_path / name).mkdir()
        write_png(tmp_path / name / "a.png", pixels)
    judge = mllm.load_judge(imported / "02_train_reward", torch.device("cpu"))
    smooth = to_pixels(sr_policy.upsample(torch.from_numpy(lr).permute(2, 0, 1)[None] / 255, 4).clamp(0, 1))
    wanted, other = (restoring.score(judge, side, lr, {"bicubic": smooth[0]}, limit=16)["bicubic"] for side in (32, 64))
    for number, more in (("05", ()), ("03", (f"sr_dirs={tmp_path / 'sr'}", "example_groups=1"))):
        stage, out = load_stage(number), tmp_path / number
        stage.main(load_config(stage.Config, stage.__file__, [
            str(toy_config), f"run={imported}", f"lr_dir={tmp_path / 'lr'}", f"out={out}", *more]))
    line = json.loads((tmp_path / "05" / "restored.jsonl").read_text())
    assert line["scores"]["bicubic"] == pytest.approx(wanted, abs=1e-3)
    assert line["scores"]["bicubic"] != pytest.approx(other, abs=1e-3)
    notes = " ".join(run.read_json(tmp_path / "03" / "results.json")["notes"])
    assert "judged in crops of 32 x 32 px" in notes and "in crops of 32 px at scale 4" in notes


def test_larger_crops_are_of_the_photographs_that_stage_01_found(tmp_path, capsys):
    """Sub-folders, names with brackets, other files of the same name, and one photograph that broke since."""
    stage, policies = load_stage("05"), {"base": tiny_policy(), "tuned": tiny_policy()}
    (tmp_path / "a [1]").mkdir()
    write_png(tmp_path / "a [1]" / "IMG_1.png", make_images(0, 96, 64)[1])
    for suffix in ("CR2", "json"):
        (tmp_path / "a [1]" / f"IMG_1.{suffix}").write_bytes(b"raw")
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    made_with = {"hr_dir": str(tmp_path), "scale": 4, "degradation": "mild"}
    cfg = stage.Config(run="unused", seeds_per_image=1, large_crops=4, large_size=64)
    found = stage.photographs(cfg, made_with, policies["tuned"])
    crops = stage.large_crops(cfg, policies, made_with, found=found, sources=["a [1]/IMG_1", "gone", "torn"])
    assert [caption.split(",")[0] for caption in crops] == ["a [1]/IMG_1"] * 2
    assert all(image.shape == (64, 64, 3) for images in crops.values() for key, image in images.items() if key != "LR")
    text = capsys.readouterr().out
    assert text.count("no larger crop of gone") == text.count("no larger crop of torn") == 1
    assert {"motorcycle", "grace_hopper"} <= set(stage.photographs(cfg, made_with | {"hr_dir": "skimage"},
                                                                   policies["tuned"]))
    (tmp_path / "empty").mkdir()
    for other, changes in ((made_with | {"hr_dir": None}, {}), (made_with | {"hr_dir": str(tmp_path / "no")}, {}),
                           (made_with | {"hr_dir": str(tmp_path / "empty")}, {}),
                           (made_with | {"scale": 3}, {"large_crops": 0})):
        cut = replace(cfg, **changes)
        assert stage.photographs(cut, other, policies["tuned"]) == {}
        assert stage.large_crops(cut, policies, other, found={}, sources=["torn"]) == {}


@pytest.mark.parametrize("scale, size, unit", [(3, 256, 6), (4, 100, 8)])
def test_a_size_of_larger_crops_that_the_policy_cannot_restore_is_refused_first(scale, size, unit, capsys):
    stage = load_stage("05")
    with pytest.raises(SystemExit):
        stage.photographs(stage.Config(run="unused", large_size=size), {"hr_dir": "skimage", "scale": scale},
                          tiny_policy())
    assert f"large_size={size}: should be a multiple of {unit}" in capsys.readouterr().err


def test_groups_of_several_sizes_or_scales_are_named(tmp_path, capsys):
    for name, side in (("a", 16), ("b", 24), ("c", 16)):
        Image.new("RGB", (side, 16)).save(tmp_path / f"{name}.png")
    a, b, c = ({"lr": f"{name}.png", "scale": scale} for name, scale in (("a", 4), ("b", 4), ("c", 2)))
    require_one_size(tmp_path, [a] * 2)
    for other, found in ((b, "b.png is 24x16, scale 4"), (c, "c.png is 16x16, scale 2")):
        with pytest.raises(SystemExit):
            require_one_size(tmp_path, [a, other])
        assert f"{found}, but a.png is 16x16, scale 4: 04 and 05 need LR images of one size" in capsys.readouterr().err


def test_05_needs_04(toy_config, toy_run, tmp_path):
    target = copy_of(toy_run, tmp_path / "run")
    done = run_stage("05", toy_config, f"run={target}")
    assert done.returncode == 2 and "python 04_train_sr_grpo.py" in done.stderr
