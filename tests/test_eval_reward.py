"""
Stage 03: every scorer is what its name says, its numbers are those of plain loops, and the real command leaves them.

Run     python -m pytest tests/test_eval_reward.py      # 1 min, most of it a toy run of 01 and 02
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import metrics, mllm, run, token_tree
from common.candidates import PROBES
from common.config import load_config
from common.groups import group_images, load_groups
from common.images import read_image
from common.metrics import AXES
from common.replies import sample_replies
from conftest import build_judge, load_stage, make_images, run_stage

CPU = torch.device("cpu")


def copy_run(source: Path, target: Path) -> Path:
    """A new run folder with the finished stages 01 and 02 of another."""
    for folder in (source / "01_build_dataset", *source.glob("02_train_reward*")):
        shutil.copytree(folder, target / folder.name)
    return target


@pytest.fixture(scope="module")
def evaluated(toy_run, toy_config, tmp_path_factory) -> Path:
    """The run folder of toy_run with a judge trained without LR, and 03 done by one process."""
    folder = copy_run(toy_run, tmp_path_factory.mktemp("eval") / "run")
    stage = load_stage("02")
    stage.main(load_config(stage.Config, stage.__file__, [str(toy_config), f"run={folder}", "blind=true"]))
    done = run_stage("03", toy_config, f"run={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "03_eval_reward" / "scores.jsonl").read_text().splitlines()]


def slow_accuracy(lines: list[dict], axis: str) -> float:
    """Pair accuracy from scores.jsonl, one pair at a time."""
    right, pairs = 0.0, 0
    for a in lines:
        for b in lines:
            if a["group"] == b["group"] and a["labels"][axis]["rank"] < b["labels"][axis]["rank"]:
                pairs += 1
                margin = a["expected"][axis] - b["expected"][axis]
                right += 0.5 if margin == 0 else float(margin > 0)
    return right / pairs


def slow_prior(groups: list[dict]) -> float:
    """Pair accuracy, naturalness, of minus the mean rank of a candidate's method over the other groups."""
    table = [[(candidate["method"], rank) for candidate, rank in zip(
        group["candidates"], group["labels"]["naturalness"]["ranks"])] for group in groups]
    right = []
    for g, group in enumerate(table):
        others, means = [row for rest in table[:g] + table[g + 1:] for row in rest], {}
        for method in {method for method, _ in others}:
            means[method] = np.mean([rank for name, rank in others if name == method])
        guess = [-means.get(method, np.mean(list(means.values()))) for method, _ in group]
        ranked = [(value, rank) for value, (_, rank) in zip(guess, group)]
        right += [(1 + np.sign(round(a - b, 9))) / 2 for a, i in ranked for b, j in ranked if i < j]
    return np.mean(right)


# the real command ------------------------------------------------------------------------------------------

def test_what_03_leaves_behind(evaluated):
    stage, folder = load_stage("03"), evaluated / "03_eval_reward"
    manifest, results = run.read_json(folder / "manifest.json"), run.read_json(folder / "results.json")
    assert set(manifest["inputs"]) == {"01_build_dataset", "02_train_reward"}
    assert set(manifest["results"]) == {
        "pair_accuracy", "pair_accuracy_ci95", "ci_over", "pair_accuracy_lr_blind", "pair_accuracy_lr_shuffled",
        "pair_accuracy_method_prior", "pair_accuracy_zero_shot", "pair_accuracy_reasoned",
        "margin_over_lr_blind_ci95", "margin_over_method_prior_ci95", "srcc",
        "consistency_accuracy", "naturalness_accuracy", "consistency_lr_blind", "naturalness_lr_blind",
        "consistency_lr_psnr", "naturalness_sharpness",
        "rater_agreement", "sampled_accuracy", "parse_rate", "digit_mass",
        "images_per_second", "probe_rate", "probe_rate_ci95", "held_out_method_accuracy"}
    assert list(results["accuracy"]) == [name for name in stage.SCORERS if name != "zero_shot"]    # of a small model
    assert len(results["notes"]) == 1 and "words of the small model carry nothing" in results["notes"][0]
    assert list(results["readouts"]["accuracy"]) == ["sampled", "reasoned", "expected"]
    lines = lines_of(evaluated)
    assert len(lines) == 8 * 4 and sum(line["reply"] is not None for line in lines) == 2 * 4
    assert manifest["results"]["parse_rate"] > 0 and results["readouts"]["groups"] == 2
    for axis in AXES:
        judge, prior = (results["accuracy"][name][axis] for name in ("judge", "method_prior"))
        assert judge["value"] == pytest.approx(slow_accuracy(lines, axis), abs=1e-4)
        assert judge["ci95"][0] <= judge["value"] <= judge["ci95"][1]
        margin = results["judge_minus"]["method_prior"][axis]["value"]
        assert margin == pytest.approx(judge["value"] - prior["value"], abs=2e-4)
    build = run.read_json(evaluated / "01_build_dataset" / "manifest.json")["results"]         # of training labels, too
    assert build["method_prior"] == {axis: results["accuracy"]["method_prior"][axis]["value"] for axis in AXES}
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    assert all(f"| {name} |" in table for name, _ in results["scorers"].values()) and "proxy" in table
    assert all(min(read_image(folder / name).shape[:2]) > 300 for name in ("examples.png", "probes.png"))
    assert page.count("data:image/png") == 2 and '="http' not in page


def test_two_processes_measure_what_one_does(evaluated, toy_config, tmp_path):
    done = run_stage("03", toy_config, f"run={copy_run(evaluated, tmp_path)}", processes=2)
    assert done.returncode == 0, done.stderr
    for one, two in zip(lines_of(evaluated), lines_of(tmp_path), strict=True):
        assert one | {"expected": None} == two | {"expected": None}             # replies, too
        assert one["expected"] == pytest.approx(two["expected"], abs=1.1e-4)
    one, two = (run.read_json(path / "03_eval_reward" / "results.json") for path in (evaluated, tmp_path))
    for name in one["accuracy"]:
        assert one["accuracy"][name]["overall"]["value"] == pytest.approx(two["accuracy"][name]["overall"]["value"])
    assert one["probes"]["all"]["value"] == pytest.approx(two["probes"]["all"]["value"])


@pytest.mark.parametrize("number, settings", [
    ("02", ["max_pixels=1000"]), ("03", ["crop=24"]), ("04", ["crop=24"]),
    ("03", ["crop=24", "sr_dirs=x", "lr_dir=x"])])
def test_images_that_the_judge_would_resample_stop_a_stage_at_its_start(toy_run, toy_config, tmp_path, capsys, number,
                                                                        settings):
    stage = load_stage(number)
    for stem in ("01_build_dataset", "02_train_reward")[:1 if number == "02" else 2]:
        (tmp_path / stem).symlink_to(toy_run / stem)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        stage.main(load_config(stage.Config, stage.__file__, [str(toy_config), f"run={tmp_path}", *settings]))
    assert "px resampled to" in capsys.readouterr().err


def test_a_test_split_alone_with_labels_of_people_on_one_axis_and_no_ground_truth_for_a_judge_without_stage_02(
        evaluated, toy_config, tmp_path):
    folder = copy_run(evaluated, tmp_path / "run")
    path = folder / "01_build_dataset" / "groups.jsonl"
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    groups = [group for group in groups if group["split"] == "test"]                    # as an import may have it
    for group in groups:
        del group["sha256"][group["hr"]]
        group["hr"] = None
        ranks = group["labels"]["naturalness"]["ranks"]
        group["labels"] = {} if group["id"] == "test_00001" else {
            "naturalness": {"ranks": ranks, "source": "human", "votes": 5}}
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    stage = load_stage("03")
    judge = shutil.copytree(folder / "02_train_reward" / "cold_start" / "model", folder / "judge")
    stage.main(load_config(stage.Config, stage.__file__, [
        str(toy_config), f"run={folder}", f"judge={judge}", "sampled_groups=0"]))
    results = run.read_json(folder / "03_eval_reward" / "results.json")
    assert results["summary"].startswith("7 LR groups") and "human" in results["summary"]
    wanted = slow_accuracy(lines_of(folder), "naturalness")
    assert results["accuracy"]["judge"]["naturalness"]["value"] == pytest.approx(wanted, abs=1e-4)
    assert results["accuracy"]["judge"]["overall"] == {"value": None, "ci95": None}
    assert not {"psnr", "ssim", "before_grpo", "lr_blind", "zero_shot"} & set(results["accuracy"])
    labeled = [group for group in groups if group["labels"]]
    assert results["accuracy"]["method_prior"]["naturalness"]["value"] == pytest.approx(slow_prior(labeled), abs=1e-4)
    assert results["scorers"]["method_prior"][0] == stage.PRIOR_LEFT_OUT
    assert results["readouts"] is None and results["probes"] is None
    notes = " ".join(results["notes"])
    assert "lack the ground truth" in notes and "came without stage 02" in notes and "no label on overall" in notes
    assert results["new_methods"]["pairs"] == 0


# scorers ---------------------------------------------------------------------------------------------------

def test_every_scorer_is_what_its_name_says(evaluated):
    stage, source, folder = load_stage("03"), evaluated / "01_build_dataset", evaluated / "02_train_reward"
    judge, settings = mllm.load_judge(folder, CPU), run.settings_of(folder, folder.name)
    groups = load_groups(source, "test")
    untouched = {"model": str(folder / "cold_start" / "model")}                 # as if it were a published one
    rivals = dict(stage.other_judges(judge, folder, settings | untouched, stage.blind_judge(folder, settings)))
    others, blind = stage.other_groups(groups, 0), rivals["lr_blind"]
    lrs, images, hrs = zip(*(group_images(source, group) for group in groups[:2]))
    wrong = [group_images(source, group)[0] for group in others[:2]]
    base = mllm.load_model(folder / "cold_start" / "model", CPU, dtype="float32", lr_view=judge.lr_view,
                           candidate_view=judge.candidate_view)
    assert blind.blind and not judge.blind
    for name, by, shown, wanted in (
            ("judge", judge, groups, mllm.expected_scores(judge, lrs, images)),
            ("lr_shuffled", judge, others, mllm.expected_scores(judge, wrong, images)),
            ("before_grpo", rivals["before_grpo"], groups, mllm.expected_scores(base, lrs, images)),
            ("zero_shot", rivals["zero_shot"], groups, mllm.expected_scores(base, lrs, images)),
            ("lr_blind", blind, groups, mllm.expected_scores(
                replace(blind, blind=False), [np.full_like(lr, 128) for lr in lrs], images))):
        scores, seconds = stage.score_groups(by, source, groups, shown, desc=name, batch=3, crop=0, limit=0)
        assert scores.shape == (8, 4, 3) and seconds > 0
        torch.testing.assert_close(scores[:2], wanted.double(), rtol=0, atol=1e-5)
    pixels = stage.measure_pixels(source, groups, {}, CPU)
    for g, (lr, hr) in enumerate(zip(lrs, hrs)):
        for c, image in enumerate(images[g]):
            wanted = [metrics.psnr(image, hr), metrics.ssim(image, hr), metrics.lr_psnr(image, lr, 4)]
            assert pixels[g, c, :3].tolist() == wanted
    flat, dots = np.full((8, 8, 3), 90, np.uint8), np.zeros((8, 8, 3), np.uint8)
    dots[::2, ::2] = 255
    assert stage.pixel_scores(flat, flat[:2, :2], None, scale=4)[3] < 1e-9
    assert stage.pixel_scores(dots, dots[:2, :2], None, scale=4)[3] > 1e4


def test_a_judge_trained_without_lr_never_sees_it_and_is_refused_if_it_learned_otherwise(evaluated, tmp_path, capsys):
    folder, stage = evaluated / "02_train_reward", load_stage("03")
    blind, settings = mllm.load_judge(evaluated / "02_train_reward_blind", CPU), run.settings_of(folder, folder.name)
    first, second = make_images(0), make_images(1)
    capsys.readouterr()                                                                 # transformers' progress bar
    assert torch.equal(*(mllm.expected_scores(blind, [lr], [first[1:]]) for lr in (first[0], second[0])))
    assert stage.blind_judge(tmp_path / folder.name, settings) is None                  # there is none
    both = copy_run(evaluated, tmp_path)
    for spoil, words in ((settings | {"steps": 6}, "steps 6 and 5"), (settings, "on other data")):
        if spoil == settings:
            manifest = run.read_json(both / "02_train_reward_blind" / "manifest.json")
            run.write_json(both / "02_train_reward_blind" / "manifest.json", manifest | {"inputs": {}})
        with pytest.raises(SystemExit):
            stage.blind_judge(both / folder.name, spoil)
        error = capsys.readouterr().err
        assert words in error and f"run={both} blind=true" in error and error.count("\n") == 1


def test_the_wrong_lr_and_the_foreign_photograph_are_of_another_photograph_where_possible():
    stage = load_stage("03")
    for counts in ((1, 1), (3, 3), (5, 2, 3), (1, 1, 1, 4), (6, 2), (7,)):
        groups = [{"id": f"{s}{i}", "source": s} for s, n in zip("abcd", counts) for i in range(n)]
        for seed in range(5):
            others = stage.other_groups(groups, seed)
            assert sorted(o["id"] for o in others) == sorted(g["id"] for g in groups)
            assert all(o["id"] != g["id"] for o, g in zip(others, groups))
            same = sum(o["source"] == g["source"] for o, g in zip(others, groups))
            assert same == max(0, 2 * max(counts) - len(groups)) or len(counts) == 1
        assert all(o["id"] != g["id"] for o, g in zip(stage.strangers(groups), groups))


def test_replies_and_digit_mass_are_those_of_each_candidate_alone(toy_run):
    stage, source = load_stage("03"), toy_run / "01_build_dataset"
    judge, group = mllm.load_judge(toy_run / "02_train_reward", CPU), load_groups(source, "test")[0]
    replies, mass, reasoned = stage.sample(judge, source, [group], seed=0, count=2, max_tokens=12)
    assert reasoned.isnan().all()                                               # too short to parse
    lr, images, _ = group_images(source, group)
    uniforms = torch.rand(4, 2, 12, generator=run.generator(0, "sampled", group["id"]))
    for c, image in enumerate(images):
        with torch.no_grad():
            features, grids = mllm.image_features(judge, [[lr, image]])
            row = mllm.prompt_row(judge, grids[0], grids[1:])
            stems = mllm.add_stems(judge, row, [1])
            rows = token_tree.collate([row], CPU)
            hidden = mllm.hidden_states(judge, rows, features)[token_tree.last_tokens(rows, [stems])]
            chances = mllm.policy_logits(judge, hidden).softmax(-1)
        wanted = [sum(float(chance[token]) for token in judge.digit_ids) for chance in chances]
        assert mass[0, c].tolist() == pytest.approx(wanted, abs=1e-4) and max(wanted) < 1
        alone, = sample_replies(judge, features, grids, uniforms[c:c + 1], [1])
        assert [[i for i in ids if i >= 0] for ids in replies[0, c].tolist()] == alone


# statistics ------------------------------------------------------------------------------------------------

def test_intervals_are_over_photographs_where_there_are_enough():
    """Four crops of each photograph, all ordered rightly in every other one: crops are no evidence of their own."""
    stage = load_stage("03")
    for photographs, kind, low in ((8, "photographs", 0.125), (7, "LR images", 11 / 28)):
        groups = [{"source": f"{i % photographs}"} for i in range(4 * photographs)]
        right = np.array([int(group["source"]) % 2 == 0 for group in groups])
        ranks = np.tile(np.array([1.0, 2])[:, None], (len(groups), 1, 3))
        over, units = stage.resampled(groups)
        rate = stage.accuracies({"judge": np.where(right[:, None, None], -ranks, ranks)}, ranks, 0, units)[0]
        assert over == kind and rate["judge"]["overall"]["value"] == round(right.mean(), 4)
        ends = rate["judge"]["overall"]["ci95"]
        assert ends[0] == pytest.approx(low, abs=0.04), ends


def test_read_outs_leave_out_what_did_not_parse():
    stage, nan = load_stage("03"), np.nan
    sampled = np.array([[[9, nan], [1, 3], [nan, nan]]] * 2)[..., None].repeat(3, -1)
    expected, ranks = (np.array([row] * 2)[..., None].repeat(3, 2) for row in ([2.0, 1, 5], [1.0, 2, 3]))
    found = stage.compare_readouts(sampled, -expected, expected, ranks, 0, np.arange(2))
    assert found["accuracy"]["reasoned"]["overall"]["value"] == 0
    assert found["parse_rate"] == 0.5 and found["accuracy"]["sampled"]["overall"]["value"] == 1
    assert found["accuracy"]["expected"]["overall"]["value"] == 1   # the third, wrong, is left out too


def test_accuracy_on_methods_that_training_never_showed():
    groups = [{"candidates": [{"method": name} for name in ("hr", "warp+blur", "new+blur")]}] * 2
    train = [{"candidates": [{"method": name} for name in ("hr", "warp", "blur+jpeg")]}]
    scores, ranks = np.array([[9.0, 5, 7]] * 2), np.array([[1.0, 2, 3]] * 2)            # the last pair is wrong
    found = load_stage("03").accuracy_on_new_methods(groups, train, scores, ranks, 0, np.arange(2))
    assert found == {"pairs": 4, "value": 0.5, "ci95": [0.5, 0.5]}


def test_probe_rates_count_ties_as_half():
    stage, scores = load_stage("03"), np.full((4, 1 + len(PROBES), 3), 5.0)
    scores[:, 1:] -= 1
    scores[:2, 1] = 6                                                        # the first probe fools it twice
    scores[0, 2] = 5                                                         # and the second ties once
    found = stage.probe_rates(scores, 0, np.arange(4))
    first, second = list(PROBES)[:2]
    assert found["each"][first]["overall"]["value"] == 0.5 and found["each"][second]["overall"]["value"] == 0.875
    assert found["all"]["value"] == pytest.approx((6 * 4 - 2.5) / 24, abs=1e-4)
    assert found["mean_scores"]["hr"] == dict.fromkeys(AXES, 5.0)


def test_raters_who_agree_and_raters_who_do_not():
    def group(votes: list | int | None, raters: int = 20) -> dict:
        return {"labels": {"overall": {"ranks": [1, 2, 2], "votes": votes, "raters": raters}}}

    agreement = load_stage("03").rater_agreement
    assert agreement([group([20, 0, 0])] * 3, seed=0) == 1
    assert agreement([group(None), group([30, 20, 5])], seed=0) is None         # no votes; several votes per rater
    assert agreement([group(5), group([0.5, 0.5, 1])], seed=0) is None          # no list; halves of votes
    rng, alike, pairs = np.random.default_rng(1), 0, 0
    for _ in range(4000):                                                       # two halves of 12 raters
        ballots = rng.permutation([0] * 7 + [1] * 4 + [2])
        half, other = ([list(part).count(c) for c in range(3)] for part in (ballots[:6], ballots[6:]))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            if half[i] != half[j] and other[i] != other[j]:
                alike, pairs = alike + ((half[i] > half[j]) == (other[i] > other[j])), pairs + 1
    assert agreement([group([7, 4, 1], 12)] * 20, seed=0) == pytest.approx(alike / pairs, abs=0.02)


def test_images_larger_than_those_the_judge_learned_on_are_judged_in_crops():
    judge, score = build_judge()[0], load_stage("03").expected_scores
    lr, *images = make_images(3, 64, 32)
    whole = [score(judge, [lr[at:at + 8]], [[image[4 * at:4 * at + 32] for image in images]], crop=0, limit=0,
                   batch=1) for at in (0, 8)]
    crops = score(judge, [lr], [images], crop=32, limit=9, batch=1)
    assert torch.allclose(crops, (whole[0] + whole[1]) / 2, atol=1e-5)
