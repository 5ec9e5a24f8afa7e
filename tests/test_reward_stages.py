"""
Stage 02 as a user runs it: interrupted, on two processes, with labels missing, and wrongly called.

Run     python -m pytest tests/test_reward_stages.py        # 2 min
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import calibration, metrics, mllm, token_tree
from common.cohorts import scores_of
from common.config import load_config
from common.groups import Cohort, label_arrays, load_cohorts, load_groups
from common.metrics import AXES
from common.reward_training import optimizers
from conftest import ROOT, build_judge, load_stage, make_images, run_stage, tree

CPU = torch.device("cpu")
COLD_STEPS = 40                         # cold_start_steps of toy_config
# runs a script with its arguments, and kills it without warning once it has logged the step given last
KILLER = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from common import run
log_metrics, deadly = run.log_metrics, int(sys.argv.pop())
def log_and_die(folder, step, values, name="metrics.jsonl"):
    log_metrics(folder, step, values, name)
    if name == "metrics.jsonl" and step == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
run.log_metrics = log_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def copy_run(source: Path, target: Path, *stages: str) -> Path:
    """A new run folder with these finished stages of another."""
    for stage in stages:
        shutil.copytree(source / stage, target / stage)
    return target


def rows(path: Path) -> list[dict]:
    """Lines of a .jsonl file without what depends on the clock or the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("time", "seconds", "peak"))}
            for line in lines]


def assert_close(a, b, tolerance: float, where: str = "") -> None:
    """Same structure, same words, and numbers that differ by no more than the tolerance."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_close(x, y, tolerance, f"{where}[{i}]")
    elif isinstance(a, float):
        assert abs(a - b) <= tolerance * max(1, abs(b)), f"{where}: {a} and {b}"
    else:
        assert a == b, where


# 02 --------------------------------------------------------------------------------------------------------

def test_what_02_leaves_behind(toy_run, toy_config, capsys):
    folder = toy_run / "02_train_reward"
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert {"val_pair_accuracy_cold_start", "val_pair_accuracy", "parse_rate",
            "samples_per_second"} <= set(results)
    found = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(COLD_STEPS + 5))
    assert [row["phase"] for row in found] == ["cold_start"] * COLD_STEPS + ["grpo"] * 5
    for row in found[COLD_STEPS:]:
        assert row["ratio_max"] == 1 and row["clip_frac_low"] == row["clip_frac_high"] == 0
        assert row["grad_norm"] > 0 and 0 <= row["ref_kl"] < 1 and abs(row["policy_kl"]) < 1e-9
    assert found[COLD_STEPS]["ref_kl"] == 0 and found[-1]["ref_kl"] > 0     # it begins as the reference itself
    assert found[0]["loss_reply"] > 2 * found[COLD_STEPS - 1]["loss_reply"] and results["parse_rate"] > 0
    assert {"group", "reply", "reward"} <= rows(folder / "samples.jsonl")[0].keys()
    maps, val = json.loads((folder / "judge" / "calibration.json").read_text()), toy_run / "01_build_dataset"
    labels = label_arrays(load_groups(val, "val")).scores
    wanted = scores_of(mllm.load_judge(folder, CPU), load_cohorts(val, "val")[0])
    for a, axis in enumerate(AXES):
        assert maps[axis]["fitted_on"] == labels[..., a].size == 20
        mean = calibration.apply(maps[axis]["knots"], wanted[..., a]).mean()        # isotonic regression keeps it
        assert mean == pytest.approx(labels[..., a].mean(), abs=0.02)
    card = (folder / "judge" / "README.md").read_text()
    assert f"{results['val_pair_accuracy']:.3f} after" in card and "LoRA of rank 16" in card and "proxy" in card

    stage = load_stage("02")
    with pytest.raises(SystemExit) as stop:                         # the same command again
        stage.main(load_config(stage.Config, stage.__file__, [str(toy_config)]))
    assert stop.value.code == 0 and "02_train_reward is finished" in capsys.readouterr().out


def test_merged_it_scores_as_with_its_adapter(toy_run, toy_config, tmp_path):
    again = copy_run(toy_run, tmp_path / "again", "01_build_dataset", "02_train_reward")
    before = tree(again)
    for said in ("judge/merged", "02_train_reward is finished"):
        done = run_stage("02", toy_config, f"run={again}", "merge=true")
        assert done.returncode == 0 and said in done.stdout, done.stderr
    merged = again / "02_train_reward" / "judge" / "merged"
    new = {f"02_train_reward/judge/merged/{name}": value for name, value in tree(merged).items()}
    assert tree(again) == before | new
    judge = mllm.load_judge(again / "02_train_reward", CPU)
    plain = mllm.load_model(merged, CPU, dtype="float32", lr_view=judge.lr_view, candidate_view=judge.candidate_view)
    groups = [make_images(seed) for seed in range(3)]
    scores = [mllm.expected_scores(one, [g[0] for g in groups], [g[1:] for g in groups]) for one in (judge, plain)]
    assert torch.allclose(*scores, atol=1e-4)
    with mllm.adapter_off(judge):
        without = mllm.expected_scores(judge, [g[0] for g in groups], [g[1:] for g in groups])
    assert not torch.allclose(without, scores[1], atol=1e-4)


def test_interrupted_twice_and_resumed_gives_the_same_bytes(toy_run, toy_config, tmp_path):
    again = copy_run(toy_run, tmp_path / "again", "01_build_dataset")
    command = ["02_train_reward.py", str(toy_config), f"run={again}"]
    for step in ("4", str(COLD_STEPS + 2)):             # one step after a checkpoint: in the cold start, in GRPO
        done = subprocess.run([sys.executable, "-c", KILLER, *command, step], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_stage("02", toy_config, f"run={again}")
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr
    ours, theirs = again / "02_train_reward", toy_run / "02_train_reward"
    assert rows(ours / "metrics.jsonl") == rows(theirs / "metrics.jsonl")
    assert rows(ours / "samples.jsonl") == rows(theirs / "samples.jsonl")
    kinds = ("judge/**/*.*", "cold_start/model/*.*", "**/*.safetensors")
    files = {path.relative_to(theirs) for kind in kinds for path in theirs.glob(kind)}
    assert Path("judge/adapter/adapter_model.safetensors") in files and Path("best.safetensors") in files
    for path in files:                                      # PEFT writes the path of the base into its files
        own = (ours / path).read_bytes().replace(bytes(again), bytes(toy_run))
        assert own == (theirs / path).read_bytes(), path


def test_two_processes_train_what_one_does(toy_run, toy_config, tmp_path):
    folders = []
    for processes in (1, 2):                # without Muon, which orthogonalizes in bfloat16 and so magnifies rounding
        again = copy_run(toy_run, tmp_path / str(processes), "01_build_dataset")
        done = run_stage("02", toy_config, f"run={again}", "cold_start_muon_lr=0", "cold_start_steps=6",
                         processes=processes)
        assert done.returncode == 0, done.stderr
        folders.append(again / "02_train_reward")
        assert json.loads((folders[-1] / "manifest.json").read_text())["world_size"] == processes
    one, two = folders
    # A loss shows the weights after all earlier updates. Later steps magnify the last bit of a sum over ranks.
    losses = [[[row[key] for key in ("loss_direct", "loss_reply")] for row in rows(path / "metrics.jsonl")[:4]]
              for path in folders]
    assert_close(losses[1], losses[0], 2e-3)
    assert losses[0][0] != losses[0][3]
    assert len(rows(two / "metrics.jsonl")) == len(rows(one / "metrics.jsonl"))


def test_two_processes_train_in_shards_and_one_goes_on(toy_run, toy_config, tmp_path):
    again = copy_run(toy_run, tmp_path / "again", "01_build_dataset")
    settings = [f"run={again}", "fsdp=true", "lora_rank=0", "cold_start_muon_lr=0", "muon_lr=0", "cold_start_steps=2",
                "cold_start_lr=1e-3", "steps=3", "save_every=1"]
    done = run_stage("02", toy_config, *settings, "gradient_checkpointing=true", processes=2)
    assert done.returncode == 0, done.stderr
    folder = again / "02_train_reward"
    found, best = rows(folder / "metrics.jsonl"), load_file(folder / "best.safetensors")
    saved = load_file(folder / "checkpoints" / "step_000002" / "model.safetensors")
    assert all(saved[name].shape == saved[f"averaged.{name}"].shape == value.shape for name, value in best.items())
    shutil.rmtree(folder / "checkpoints" / "step_000003")           # as if killed in the last step of GRPO
    shutil.rmtree(folder / "judge")
    (folder / "manifest.json").unlink()
    done = run_stage("02", toy_config, *settings)
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr
    assert_close(rows(folder / "metrics.jsonl"), found, 1e-3)
    judge = mllm.load_judge(folder, CPU)                            # plain files of transformers, like any other
    assert all(torch.equal(p, best[name]) for name, p in judge.model.named_parameters())


@pytest.mark.parametrize("number, overrides, says", [
    ("02", ["fsdp=true"], "set lora_rank=0 or fsdp=false"),
    ("02", ["fsdp=true", "lora_rank=0", "muon_lr=0"], "set cold_start_muon_lr=0 muon_lr=0"),
    ("02", ["lora_rank=0", "dtype=bfloat16"], "dtype=bfloat16 would round its updates away; set dtype=float32"),
    ("02", ["warmup_steps=0"], "warmup_steps=0: should be at least 1"),
    ("02", ["save_every=0"], "save_every=0: should be at least 1"),
    ("04", ["eval_every=0"], "eval_every=0: should be at least 1")])
def test_settings_that_cannot_work_are_refused(toy_config, capsys, number, overrides, says):
    stage = load_stage(number)
    with pytest.raises(SystemExit):
        load_config(stage.Config, stage.__file__, [str(toy_config), *overrides])
    assert says in capsys.readouterr().err


def test_the_supervised_baseline_resumes_and_leaves_what_grpo_leaves(toy_run, toy_config, tmp_path):
    overrides, folders = ["algorithm=sft_rank", "cold_start_steps=4"], []
    for name in ("whole", "killed"):
        again = copy_run(toy_run, tmp_path / name, "01_build_dataset")
        command = ["02_train_reward.py", str(toy_config), f"run={again}", *overrides]
        if name == "killed":                                        # one step after a checkpoint
            done = subprocess.run([sys.executable, "-c", KILLER, *command, "6"], cwd=ROOT, capture_output=True,
                                  text=True)
            assert done.returncode == -signal.SIGKILL, done.stderr
        done = run_stage("02", toy_config, f"run={again}", *overrides)
        assert done.returncode == 0 and ("at step 2" in done.stdout) == (name == "killed"), done.stderr
        folders.append(again / "02_train_reward")
    whole, killed = folders
    assert rows(whole / "metrics.jsonl") == rows(killed / "metrics.jsonl")
    assert (whole / "best.safetensors").read_bytes() == (killed / "best.safetensors").read_bytes()
    found = rows(whole / "metrics.jsonl")
    assert [row["phase"] for row in found] == ["cold_start"] * 4 + ["sft_rank"] * 5
    assert all(row["grad_norm"] > 0 and 0 < row["loss_rank"] < 1 for row in found[4:])
    results = [json.loads((path / "manifest.json").read_text())["results"]
               for path in (whole, toy_run / "02_train_reward")]
    assert results[0].keys() == results[1].keys()
    assert mllm.load_judge(whole, CPU).device == CPU                # stages 03 and 04 read it as they read GRPO's


@pytest.fixture
def trainee(toy_run, toy_config) -> tuple:
    """(stage 02, cfg, judge with LoRA, training cohorts), ready for a GRPO step."""
    stage = load_stage("02")
    cfg = load_config(stage.Config, stage.__file__, [str(toy_config), "warmup_steps=1", "lr=0.01"])
    judge = stage.load_base(cfg, toy_run / "02_train_reward" / "cold_start" / "model", CPU)
    judge.model = stage.add_lora(judge.model, cfg)
    return stage, cfg, judge, load_cohorts(toy_run / "01_build_dataset", "train")[0]


def test_a_grpo_step_changes_the_adapter_and_nothing_else(trainee, toy_run):
    stage, cfg, judge, cohorts = trainee
    reference = stage.load_base(cfg, toy_run / "02_train_reward" / "cold_start" / "model", CPU)
    images = [cohorts[0].lr], [cohorts[0].images]
    plain = mllm.expected_scores(reference, *images)
    assert torch.equal(mllm.expected_scores(judge, *images), plain)     # a new adapter does nothing
    before = {name: p.detach().clone() for name, p in judge.model.named_parameters()}
    chosen = optimizers(judge, cfg.lr, cfg.weight_decay)
    row, _ = stage.grpo_step(judge, judge, cfg, chosen, cohorts, 0)
    assert row["ratio_max"] == 1 and row["grad_norm"] > 0
    changed = [name for name, p in judge.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all("lora_B" in name or "lora_A" in name for name in changed)
    assert {name for name, p in judge.model.named_parameters() if p.requires_grad} >= set(changed)
    assert not torch.equal(mllm.expected_scores(judge, *images), plain)
    with mllm.adapter_off(judge):
        assert torch.equal(mllm.expected_scores(judge, *images), plain)


def test_a_second_update_per_rollout_is_off_policy(trainee):
    stage, cfg, judge, cohorts = trainee
    cfg.updates_per_rollout = 2
    row, _ = stage.grpo_step(judge, judge, cfg, optimizers(judge, cfg.lr, cfg.weight_decay), cohorts, 0)
    assert row["ratio_max"] > 1.001 and row["policy_kl"] + row["digit_policy_kl"] > 0


def gray_cohorts(best: int) -> list[Cohort]:
    """Eight LR images with two plain gray candidates each, in turn; best: the gray value that ranks first."""
    cohorts = []
    for i in range(8):
        values = (40, 215) if i % 2 else (215, 40)
        grays = [np.full((32, 32, 3), value, np.uint8) for value in values]
        ranks = np.repeat([[1.0 + (value != best)] for value in values], 3, axis=1)
        cohorts.append(Cohort(f"gray{i}", make_images(i)[0], grays, ["", ""], ranks, ranks))
    return cohorts


@pytest.mark.parametrize("best", [40, 215])
def test_grpo_finds_out_by_itself_which_of_two_plain_candidates_is_better(best):
    judge, cfg = build_judge(groups_per_step=4, reasoned_groups=1, replies=2, max_reply_tokens=2, steps=24,
                             direct_replies=24, lora_rank=0, muon_lr=0.01, lr=1e-3, warmup_steps=4)
    stage, cohorts = load_stage("02"), gray_cohorts(best)
    make_digits_likely(judge, cohorts[0])
    judge.model.requires_grad_(True)
    chosen = optimizers(judge, cfg.lr, cfg.weight_decay, muon_lr=cfg.muon_lr)
    reward = [stage.grpo_step(judge, judge, cfg, chosen, cohorts, step)[0]["digit_reward_mean"]
              for step in range(cfg.steps)]
    assert reward[-1] > 0.9 and reward[-1] > reward[0] + 0.1, reward
    scores = mllm.expected_scores(judge, [c.lr for c in cohorts], [c.images for c in cohorts]).numpy()
    for a in range(3):
        assert metrics.pair_accuracy(scores[..., a], [c.ranks[:, a] for c in cohorts])[0] == 1


@torch.no_grad()
def make_digits_likely(judge: mllm.Judge, cohort: Cohort) -> None:
    """In place of a cold start: the head turns towards digits behind the stems."""
    features, grids = mllm.image_features(judge, [[cohort.lr, *cohort.images]])
    row = mllm.prompt_row(judge, grids[0], grids[1:])
    stems = mllm.add_stems(judge, row, [1, 2])
    rows = token_tree.collate([row], judge.device)
    hidden = mllm.hidden_states(judge, rows, features)[token_tree.last_tokens(rows, [stems])].mean(0)
    judge.net.lm_head.weight[judge.digit_ids] += 10 * hidden / hidden.square().sum()


# called wrongly --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, missing", [("02", "01_build_dataset"), ("03", "01_build_dataset"),
                                             ("03", "02_train_reward")])
def test_a_missing_stage_names_the_command(number, missing, *, toy_config, tmp_path, monkeypatch, capsys):
    if missing == "02_train_reward":
        (tmp_path / "run" / "01_build_dataset").mkdir(parents=True)
        (tmp_path / "run" / "01_build_dataset" / "manifest.json").write_text("{}")
    stage = load_stage(number)
    arguments = [str(toy_config), f"run={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", [stage.__file__, *arguments])
    with pytest.raises(SystemExit) as stop:
        stage.main(load_config(stage.Config, stage.__file__, arguments))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert f"python {missing}.py {toy_config} run={tmp_path / 'run'}" in message


@pytest.mark.parametrize("number, wrong, right", [("02", "groups_per_stp", "groups_per_step"),
                                                  ("03", "sampled_reply", "sampled_replies")])
def test_a_typo_is_refused_with_the_right_name(number, wrong, right, toy_config, capsys):
    stage = load_stage(number)
    with pytest.raises(SystemExit) as stop:
        load_config(stage.Config, stage.__file__, [str(toy_config), f"{wrong}=3"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and wrong in message and right in message and message.count("\n") == 1
