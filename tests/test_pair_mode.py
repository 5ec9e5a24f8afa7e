"""
Pair mode and held-out methods: against plain loops, and as a user runs them.

Run     python -m pytest tests/test_pair_mode.py        # 20 s, and a toy run of 01 and 02
"""
import itertools
import json
import shutil

import numpy as np
import pytest

from common import mllm, mllm_labels, pair_mode
from common.config import load_config
from common.groups import Labels, has_method, load_cohorts, load_groups
from common.metrics import AXES
from conftest import build_judge, load_stage, make_images, run_stage


def test_accuracy_and_consistency_in_pair_mode_equal_plain_loops():
    rng, count = np.random.default_rng(0), 4
    pairs = list(itertools.combinations(range(count), 2))
    said = rng.choice([0, 0.5, 1], (5, 3, len(pairs), 2))                   # B, A and B equally likely, A
    ranks = rng.integers(1, 4, (5, count, 3)).astype(float)
    ranks[2, :, 1] = np.nan
    found = pair_mode.compare(said, rng.normal(size=(5, count, 3)), Labels(ranks, ranks), model="m", seed=0)
    for a, axis in enumerate(AXES):
        right, total, same, firm = 0.0, 0, 0, 0
        for g in range(5):
            for p, (i, j) in enumerate(pairs):
                first, second = said[g, a, p]                               # (i, j) as A, B; then (j, i)
                named = [{1: i, 0: j}.get(first), {1: j, 0: i}.get(second)]
                firm += None not in named
                same += None not in named and named[0] == named[1]
                if ranks[g, i, a] != ranks[g, j, a] and not np.isnan(ranks[g, i, a]):
                    total += 1
                    better = i if ranks[g, i, a] < ranks[g, j, a] else j
                    right += sum(0.25 if name is None else 0.5 * (name == better) for name in named)
        assert found["accuracy"][axis]["value"] == pytest.approx(right / total, abs=1e-4)
        assert found["swap_consistency"][axis]["value"] == pytest.approx(same / firm, abs=1e-4)
        assert found["first_place"][axis] == pytest.approx(said[:, a].mean(), abs=1e-4)


def test_a_model_that_always_says_a_is_right_half_the_time_and_never_consistent(monkeypatch):
    monkeypatch.setattr(mllm_labels, "answers", lambda asker, triples, question, batch: np.ones(len(triples), bool))
    lr, *images = make_images(0)
    said = mllm_labels.both_orders(None, lr, images, 1)[None].astype(float)
    ranks = np.repeat(np.array([[1.0, 2, 3]])[..., None], 3, 2)
    found = pair_mode.compare(said, -ranks, Labels(ranks, ranks), model="m", seed=0)
    assert found["accuracy"]["overall"]["value"] == 0.5 and found["swap_consistency"]["overall"]["value"] == 0
    assert found["first_place"]["overall"] == 1 and found["judge_accuracy"]["overall"]["value"] == 1


def test_candidates_of_a_held_out_method_are_no_part_of_training(toy_run):
    source, names = toy_run / "01_build_dataset", ["warp", "noise"]
    everyone, own = (load_cohorts(source, "train", held_out=held)[0] for held in ([], names))
    by_id = {cohort.id: cohort for cohort in everyone}
    assert len({len(cohort.images) for cohort in own}) > 1                  # groups are no longer of one size
    for cohort in own:
        whole = by_id[cohort.id]
        kept = [c for c, method in enumerate(whole.methods) if not {"warp", "noise"} & set(method.split("+"))]
        assert cohort.methods == [whole.methods[c] for c in kept]
        assert np.array_equal(cohort.ranks, whole.ranks[kept])
        assert all(np.array_equal(a, whole.images[c]) for a, c in zip(cohort.images, kept, strict=True))
    for cohort in load_cohorts(source, "val", held_out=names)[0]:           # shown, and not counted
        hidden = [bool({"warp", "noise"} & set(method.split("+"))) for method in cohort.methods]
        assert np.array_equal(np.isnan(cohort.ranks).all(1), hidden)
    assert has_method({"method": "warp+blur"}, ["blur"]) and not has_method({"method": "warp"}, ["war"])


def test_held_out_methods_are_tested_and_another_model_is_asked_in_pairs(toy_run, toy_config, tmp_path, capsys):
    shutil.copytree(toy_run / "01_build_dataset", tmp_path / "run" / "01_build_dataset")
    mllm.save_model(build_judge()[0], tmp_path / "model")
    run, short = f"run={tmp_path / 'run'}", ("cold_start_steps=30", "steps=2")
    wrong = run_stage("02", toy_config, run, "held_out_methods=wrap")
    assert wrong.returncode == 2 and "did you mean 'warp'?" in wrong.stderr
    done = run_stage("02", toy_config, run, *short, "held_out_methods=warp,noise")
    assert done.returncode == 0, done.stderr
    stage, more = load_stage("03"), [run, f"pair_model={tmp_path / 'model'}"]
    stage.main(load_config(stage.Config, stage.__file__, [str(toy_config), *more]))
    folder = tmp_path / "run" / "03_eval_reward"
    results = json.loads((folder / "results.json").read_text())
    groups = load_groups(tmp_path / "run" / "01_build_dataset", "test")
    pairs = 0
    for group in groups:
        ranks, held = group["labels"]["overall"]["ranks"], [has_method(c, ["warp", "noise"])
                                                            for c in group["candidates"]]
        pairs += sum((held[i] or held[j]) and ranks[i] != ranks[j]
                     for i, j in itertools.combinations(range(len(ranks)), 2))
    held_out = results["methods"]["held_out"]
    assert held_out["pairs"] == pairs > 0 and 0 <= held_out["value"] <= 1
    assert {row["method"] for row in results["methods"]["each"] if not row["in_training"]} >= {"warp", "noise"}
    found = results["pair_mode"]
    assert found["groups"] == 2 and 0 <= found["swap_consistency"]["overall"]["value"] <= 1
    table = (folder / "table.md").read_text()
    assert "asked for the better of each two candidates of 2 groups" in table and "never showed" in table
    with pytest.raises(SystemExit):
        (tmp_path / "run" / "03_eval_reward" / "manifest.json").unlink()
        (tmp_path / "run" / "03_eval_reward" / "config.yaml").unlink()
        stage.main(load_config(stage.Config, stage.__file__, [str(toy_config), run, "pair_model=/nowhere/at/all"]))
    assert "pair_model: /nowhere/at/all cannot be loaded" in capsys.readouterr().err
