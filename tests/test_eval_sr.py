"""
Stage 05: before and after GRPO on the test split, as a user runs it, and its numbers against plain loops.

Run     python -m pytest tests/test_eval_sr.py        # 1 min, and one for stages 01 and 02
"""
import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from common import iqa, metrics, mllm, run, sr_policy, st_lpips
from common.config import config_text, load_config
from common.groups import group_images, image_batch, load_groups, require_one_size
from common.images import to_pixels, write_png
from common.sr_policy import Policy
from conftest import build_judge, load_stage, make_images, run_stage
from test_sr_policy import tiny_policy
from test_st_lpips import toy_weights

CPU = torch.device("cpu")


def lively(policy: Policy, seed: int = 5) -> Policy:
    """With larger weights: what it draws then depends on all of LR, by norms and attention."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in policy.unet.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return policy.requires_grad_(False)


def write_stage_04(folder: Path, config: Path, *settings: str) -> Path:
    """A finished stage 04, but for the training: two policies that differ."""
    stage = load_stage("04")
    for name, seed in (("base", 6), ("policy", 5)):
        (folder / name).mkdir(parents=True)
        lively(tiny_policy(), seed).save(folder / name)
    cfg = load_config(stage.Config, stage.__file__, [str(config), *settings])
    (folder / "config.yaml").write_text(config_text(cfg, "04_train_sr_grpo"))
    run.write_json(folder / "manifest.json", {"results": {}})
    return folder


def stage_05(config: Path, *settings: str) -> None:
    stage = load_stage("05")
    stage.main(load_config(stage.Config, stage.__file__, [str(config), *settings]))


def finish(config: Path, *settings: str, processes: int = 1) -> None:
    done = run_stage("05", config, *settings, processes=processes)
    assert done.returncode == 0, done.stderr


def run_with(target: Path, *stages: Path) -> Path:
    """A run folder of finished stages that lie elsewhere."""
    target.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (target / stage.name).symlink_to(stage)
    return target


@pytest.fixture(scope="module")
def stages(toy_config, toy_run, tmp_path_factory) -> list[Path]:
    """Finished stages 01, 02 and 04."""
    tuned = write_stage_04(tmp_path_factory.mktemp("other") / "04_train_sr_grpo", toy_config)
    return [toy_run / "01_build_dataset", toy_run / "02_train_reward", tuned]


@pytest.fixture(scope="module")
def compared(stages, toy_config, tmp_path_factory) -> Path:
    folder = run_with(tmp_path_factory.mktemp("run"), *stages)
    finish(toy_config, f"run={folder}")
    return folder / "05_eval_sr"


# the comparison ----------------------------------------------------------------------------------------------

def test_results_are_those_of_the_images(compared):
    results = run.read_json(compared / "manifest.json")["results"]
    assert set(results) == set(
        "psnr_bicubic psnr_base psnr_tuned ssim_bicubic ssim_base ssim_tuned stlpips_bicubic stlpips_base "
        "stlpips_tuned reward_bicubic reward_base reward_tuned reward_hr gold_base gold_tuned reward_gain_ci95 "
        "gold_gain_ci95 lr_psnr_base lr_psnr_tuned lr_psnr_hr win_rate seconds_per_image".split())
    lines = [json.loads(line) for line in (compared / "per_image.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["source"] for line in lines} <= {"chelsea", "coffee"}
    for name in ("reward", "gold", "psnr"):
        gains = [line["tuned"][name] - line["base"][name] for line in lines]
        assert results[f"{name}_tuned"] - results[f"{name}_base"] == pytest.approx(np.mean(gains), abs=2e-4)
        assert np.mean(gains) != 0
        if name != "psnr":
            assert results[f"{name}_gain_ci95"] == pytest.approx(metrics.bootstrap_ci(np.array(gains), 0), abs=1e-4)
    assert all(line["hr"]["gold"] == 1 and line["hr"]["psnr"] == 100 for line in lines)
    assert all(line["best_of_n"]["reward"] >= line["base"]["reward"] for line in lines)
    assert results["stlpips_tuned"] is None and all("stlpips" not in line["tuned"] for line in lines)
    assert results["win_rate"] == pytest.approx(np.mean([line["wins"] for line in lines]), abs=1e-4)
    assert Image.open(compared / "images" / f"{lines[0]['id']}_tuned.png").size == (32, 32)
    rows = [line.split("|")[1].strip() for line in (compared / "table.md").read_text().splitlines()]
    assert rows[2:] == ["bicubic", "regressor, sharpened", "base", "best of N", "tuned", "ground truth", "tuned - base"]


def test_every_number_is_the_one_of_a_plain_loop(stages, tmp_path):
    """One image and seed at a time; the reward is stage 04's: its crops, its weights of the axes."""
    stage, judge, source = load_stage("05"), build_judge()[0], stages[0]
    cfg = stage.Config(run="unused", seed=3, seeds_per_image=2, images_per_gpu=2)
    groups = load_groups(source, "test")[:3]
    policies = {"base": lively(tiny_policy(), 6), "tuned": lively(tiny_policy())}
    rewarded = {"weight_consistency": 0.25, "weight_naturalness": 0.0, "weight_overall": 0.75, "crop": 16,
                "crops_per_image": 4}
    weights, names = toy_weights(), stage.variants_of(policies["base"])
    values, wins, _ = stage.measure_all(cfg, policies, judge, groups, source=source, rewarded=rewarded, models={},
                                        pictures=tmp_path, stlpips=weights)
    values = dict(zip(names, values.transpose(0, 1)))

    def slow(image, low, truth):
        scores = mllm.expected_scores(
            judge, [low[y:y + 4, x:x + 4] for y in (0, 4) for x in (0, 4)],
            [[image[y:y + 16, x:x + 16]] for y in (0, 16) for x in (0, 16)])[:, 0].mean(0)
        pair = (torch.from_numpy(pixels / 255).permute(2, 0, 1)[None].float() for pixels in (image, truth))
        return [float(0.25 * scores[0] + 0.75 * scores[2]), *metrics.gold(image, low, truth),
                metrics.psnr(image, truth), metrics.ssim(image, truth), float(st_lpips.distance(weights, *pair)),
                metrics.lr_psnr(image, low, 4)]

    for n, group in enumerate(groups):
        lr, hr = (image_batch(source, [group], key) for key in ("lr", "hr"))
        low, truth, rewards = to_pixels(lr)[0], to_pixels(hr)[0], {}
        for variant in ("base", "tuned"):
            rows = []
            for m in range(2):
                noise = sr_policy.draw_noise([(3, "test", group["id"], m)], (16, 8, 8), CPU)
                image = to_pixels(sr_policy.restore(policies[variant], policies[variant].observe(lr), noise))[0]
                rows.append(slow(image, low, truth))
            rewards[variant] = [row[0] for row in rows]
            assert values[variant][n].tolist() == pytest.approx(np.mean(rows, 0), abs=1e-3)
            if variant == "base":
                assert values["best_of_n"][n].tolist() == pytest.approx(max(rows, key=lambda row: row[0]), abs=1e-3)
        image = policies["base"].regressor(lr)[0].numpy()
        wide, sharp = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge"), np.zeros((32, 32, 3))
        for y in range(32):
            for x in range(32):
                sharp[y, x] = 2 * image[:, y, x] - wide[:, y:y + 5, x:x + 5].mean((1, 2))
        sharp = np.round(255 * sharp.clip(0, 1)).astype(np.uint8)
        assert values["sharpened"][n].tolist() == pytest.approx(slow(sharp, low, truth), abs=0.02)
        won = [(after > before) + (after == before) / 2 for before, after in zip(rewards["base"], rewards["tuned"])]
        assert float(wins[n]) == np.mean(won)


def test_intervals_are_paired_over_images():
    stage, rng = load_stage("05"), np.random.default_rng(0)
    hardness = rng.normal(0, 5, (40, 1, 1))                 # of an image, for all variants: a paired gain leaves it out
    values = hardness + rng.normal(0, 0.1, (40, 4, 2)) + np.array([0, 1, 1.5, 2])[:, None]
    found = stage.summarize(values, ["bicubic", "base", "tuned", "hr"], ["reward", "psnr"], 0)
    resampled = []
    for _ in range(2000):
        picks = rng.integers(0, 40, 40)
        resampled.append(np.mean([values[i, 2, 1] - values[i, 1, 1] for i in picks]))
    assert found["gain_ci95"]["psnr"] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.01)
    assert found["gain"]["psnr"] == pytest.approx(np.mean(values[:, 2, 1] - values[:, 1, 1]), abs=1e-4)
    assert found["mean"]["hr"]["reward"] == pytest.approx(values[:, 3, 0].mean(), abs=1e-4)


def test_two_processes_give_the_same(compared, stages, toy_config, tmp_path):
    folder = run_with(tmp_path, *stages)
    finish(toy_config, f"run={folder}", processes=2)
    ours, theirs = (run.read_json(one / "results.json") for one in (folder / "05_eval_sr", compared))
    for variant, means in theirs["mean"].items():
        assert ours["mean"][variant] == pytest.approx(means, abs=2e-3)


def test_judge_and_policy_of_another_run(compared, stages, toy_config, tmp_path):
    """judge: a stage 02; policy: a stage 04, or a policy folder, compared with this run's policy before GRPO."""
    source, judged_by, tuned = stages
    folder = run_with(tmp_path / "a", source)
    stage_05(toy_config, f"run={folder}", f"judge={judged_by}", f"policy={tuned}", "large_crops=0")
    expected = run.read_json(compared / "results.json")["mean"]
    assert run.read_json(folder / "05_eval_sr" / "results.json")["mean"] == expected
    folder = run_with(tmp_path / "b", *stages)
    stage_05(toy_config, f"run={folder}", f"policy={tuned / 'base'}", "large_crops=0")
    means = run.read_json(folder / "05_eval_sr" / "results.json")["mean"]
    assert means["tuned"] == means["base"] == expected["base"]


def test_the_judge_is_the_one_that_stage_04_optimized(stages, toy_config, tmp_path):
    stage, tuned = load_stage("05"), write_stage_04(tmp_path / "04_train_sr_grpo", toy_config, "judge=elsewhere/02")
    for cfg, folder, wanted in ((stage.Config(run="a"), stages[2], stages[2].parent / "02_train_reward"),
                                (stage.Config(run="a"), tuned, "elsewhere/02"),
                                (stage.Config(run="a", judge="b"), tuned, "b")):
        assert stage.judge_folder(cfg, folder) == Path(wanted)


def test_a_policy_for_another_scale_is_refused(stages, capsys):
    with pytest.raises(SystemExit):
        load_stage("05").load_policies({"tuned": stages[2] / "policy"}, CPU, 2)
    assert "policy enlarges by 4, here 2 is needed" in capsys.readouterr().err


@pytest.mark.parametrize("settings, message", [
    (["large_size=98"], "large_size=98: should be a multiple of 4"), (["seeds_per_image=0"], "should be at least 1"),
    (["policy={run}"], "neither the folder of a finished stage 04"), (["run={run}/none"], "01_build_dataset.py"),
    (["out=x"], "out is for lr_dir"), (["pyiqa_metrics=musiq"], "install pyiqa")])
def test_what_cannot_be_compared_is_refused_in_one_line(stages, toy_config, tmp_path, capsys, monkeypatch, settings,
                                                        message):
    monkeypatch.setitem(sys.modules, "pyiqa", None)                         # its import fails
    folder = run_with(tmp_path, *stages)
    with pytest.raises(SystemExit) as stop:
        stage_05(toy_config, f"run={folder}", *(text.format(run=folder) for text in settings))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.glob("05_eval_sr/images"))


def test_groups_of_several_sizes_or_scales_are_named(tmp_path, capsys):
    for name, side in (("a", 16), ("b", 24)):
        Image.new("RGB", (side, 16)).save(tmp_path / f"{name}.png")
    a, b, c = {"lr": "a.png", "scale": 4}, {"lr": "b.png", "scale": 4}, {"lr": "a.png", "scale": 2}
    require_one_size(tmp_path, [a] * 2)
    for other, found in ((b, "b.png is 24x16, scale 4"), (c, "a.png is 16x16, scale 2")):
        with pytest.raises(SystemExit):
            require_one_size(tmp_path, [a, other])
        assert f"{found}, but a.png is 16x16, scale 4: 04 and 05 need LR images of one size" in capsys.readouterr().err


# pyiqa: the plumbing alone, with a made-up module; the package itself was never run here --------------------

def test_metrics_of_pyiqa_are_called_by_name(toy_run, monkeypatch, capsys):
    def sharp(image):
        return image.std()[None]

    def far(image, hr):
        return (image - hr).abs().mean()[None]
    sharp.metric_mode, far.metric_mode, sharp.lower_better, far.lower_better = "NR", "FR", False, True
    package = ModuleType("pyiqa")
    package.list_models = lambda: ["sharp", "far"]
    package.create_metric = lambda name, device: {"sharp": sharp, "far": far}[name]
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    stage, (lr, image, hr) = load_stage("05"), make_images(0, count=2)
    models = iqa.load(["sharp", "far"], CPU)
    *_, first, second = stage.measure(image, lr, hr, models, CPU)
    assert first == pytest.approx(np.std(image / 255, ddof=1), abs=1e-4)
    assert second == pytest.approx(np.abs(image / 255 - hr / 255).mean(), abs=1e-4)
    with pytest.raises(SystemExit):
        iqa.load(["shrap"], CPU)
    assert "no metric 'shrap'" in capsys.readouterr().err
    source = toy_run / "01_build_dataset"                                       # 03: higher is better
    group, (_, images, hr) = load_groups(source, "test")[0], group_images(source, load_groups(source, "test")[0])
    rivals = load_stage("03").measure_pixels(source, [group, group | {"hr": None}], models, CPU)[..., -2:]
    wanted = [[np.std(image / 255, ddof=1), -np.abs(image / 255 - hr / 255).mean()] for image in images]
    assert np.allclose(rivals[0], wanted, atol=1e-4) and np.allclose(rivals[1, :, 0], rivals[0, :, 0])
    assert rivals[1, :, 1].isnan().all()


# pictures and report -----------------------------------------------------------------------------------------

def test_the_report_is_whole_and_needs_nothing_else(compared):
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == page.count('src="data:image/png;base64,') >= 2 + 5 * 4 and "http" not in page
    assert "stlpips-pytorch==0.0.2" in page                                     # how to measure what was not
    assert page.count("<figure>") == page.count("</figure>") == 1 + 3 + 1       # slider, test images, a larger crop
    assert "<table>" in page and "nan" not in page.lower().split()
    assert Image.open(compared / "images" / "contact_sheet.png").width > 5 * 192
    assert 5 * 128 < Image.open(compared / "crops.png").width < 6 * 128


def test_larger_crops_are_of_the_photographs_that_stage_01_found(tmp_path, capsys):
    """Sub-folders, names with brackets, other files of the same name, and one photograph that broke since."""
    stage, policies = load_stage("05"), {"base": tiny_policy(), "tuned": tiny_policy()}
    (tmp_path / "a [1]").mkdir()
    photo = make_images(0, 64, 128)[1]
    photo[:, :64] = photo[:, :64].mean((0, 1))                          # flat: has less detail than what is beside it
    write_png(tmp_path / "a [1]" / "IMG_1.png", photo)
    (tmp_path / "a [1]" / "IMG_1.json").write_bytes(b"raw")
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    cfg = stage.Config(run="unused", seeds_per_image=1, large_crops=4, large_size=64)
    crops = stage.larger_crops(cfg, policies, ["a [1]/IMG_1", "gone", "torn"], hr_dir=str(tmp_path),
                               degradation="mild", scale=4)
    assert list(crops) == [f"a [1]/IMG_1, 64 x 64 px at {x}, 0 of the photograph at 100% of its size" for x in (64, 0)]
    for images, x in zip(crops.values(), (64, 0)):
        assert list(images) == ["LR", "bicubic", "base", "tuned", "ground truth"]
        assert np.array_equal(images["ground truth"], photo[:, x:x + 64])
        assert all(image.shape == (64, 64, 3) for key, image in images.items() if key != "LR")
    text = capsys.readouterr().out
    assert text.count("no larger crop of gone") == text.count("no larger crop of torn") == 1
    for hr_dir in (None, str(tmp_path / "no")):             # of an import; moved away since
        assert stage.larger_crops(cfg, policies, ["torn"], hr_dir=hr_dir, degradation="mild", scale=3) == {}


# a folder of yours; tests/test_restoring.py has the rest -----------------------------------------------------

def test_a_folder_is_restored_and_the_judge_scores_it_in_crops_of_the_size_it_learned_on(stages, toy_config, tmp_path):
    for name in ("a", "sub/b"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").resize((30, 22)).save(tmp_path / "photos" / f"{name}.png")
    out, folder = tmp_path / "out", run_with(tmp_path / "run", *stages)
    finish(toy_config, f"run={folder}", f"lr_dir={tmp_path / 'photos'}", f"out={out}")
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["variant"]) for row in rows] == [
        (image, variant) for image in ("a.png", "sub/b.png") for variant in ("bicubic", "tuned")]
    assert Image.open(out / "tuned" / "sub" / "b.png").size == (120, 88)
    judge, lr, image = mllm.load_judge(stages[1], CPU), *(np.array(Image.open(path).convert("RGB")) for path in (
        tmp_path / "photos" / "a.png", out / "tuned" / "a.png"))
    slow = [mllm.expected_scores(judge, [lr[y:y + 8, x:x + 8]], [[image[4 * y:4 * y + 32, 4 * x:4 * x + 32]]])[0, 0]
            for y in (0, 7, 14) for x in (0, 7, 15, 22)]
    wanted = torch.stack(slow).mean(0).tolist()
    assert [float(rows[1][axis]) for axis in metrics.AXES] == pytest.approx(wanted, abs=1e-3)
