"""
Stage 04's advantages and its guards: what is not finite, what is rejected, and a run that stops when it is fooled.

Run     python -m pytest tests/test_sr_reward.py        # 1.5 min, of which stages 01 and 02 take one
"""
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import metrics, mllm, run, sr_latent, sr_policy, sr_reward
from common.config import load_config
from common.images import to_pixels
from common.sr_training import trainable
from conftest import build_judge, load_stage, run_stage
from test_sr_policy import add_lora, images, noise, settings, shrink, tiny_policy

NAN, INF = math.nan, math.inf


# advantages ------------------------------------------------------------------------------------------------

def loops(cfg, judged: list[list[float]], fidelity: list[list[float]]) -> list[list[float]]:
    """
    Advantages of finite scores, in plain Python. batch: flow_grpo's per_prompt_stat_tracking with global_std, that is
    the mean of a prompt's own rewards and np.std of all rewards of the step.
    """
    def z(groups):
        centered = [[r - sum(row) / len(row) for r in row] for row in groups]
        stds = {"group": [math.sqrt(sum(c * c for c in row) / len(row)) for row in centered], "none": [1] * len(groups),
                "batch": [float(np.std([r for row in groups for r in row]))] * len(groups)}[cfg.advantage_std]
        return [[c / s for c in row] for row, s in zip(centered, stds)]
    weight, pairs = cfg.guard_weight, list(zip(judged, fidelity))
    if cfg.aggregate == "rewards":
        total = z([[a + weight * b for a, b in zip(*pair)] for pair in pairs])
    else:
        total = [[a + weight * b for a, b in zip(*pair)] for pair in zip(z(judged), z(fidelity))]
    clip = cfg.advantage_clip
    return [[min(max(value, -clip), clip) for value in row] for row in total]


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregate", ["advantages", "rewards"])
def test_aggregation_agrees_with_plain_loops(aggregate, std):
    cfg = settings(aggregate=aggregate, advantage_std=std, guard_weight=0.7, advantage_clip=0.6)
    torch.manual_seed(0)
    judged = torch.tensor([[3.0], [5], [8]]) + torch.randn(3, 6) * torch.tensor([[0.2], [1], [3]])
    fidelity = torch.tensor([[24.0], [30], [36]]) + 2 * torch.randn(3, 6)
    found, useful, rejected = sr_reward.advantages_of(cfg, judged, fidelity)
    assert useful.all() and not rejected.any() and (found.abs() == found.new_tensor(0.6)).any()     # the clip acts
    assert (found.abs() < 0.6).any()
    assert torch.allclose(found, torch.tensor(loops(cfg, judged.tolist(), fidelity.tolist())), atol=1e-4)


def test_a_group_whose_scores_tie_is_masked_and_counted():
    judged = torch.tensor([[1.0, 2.0, 4.0], [5.0, 5.0, 5.0]])
    fidelity = torch.tensor([[30.0, 31.0, 33.0]] * 2)
    for aggregate in ("advantages", "rewards"):
        found, useful, rejected = sr_reward.advantages_of(settings(aggregate=aggregate), judged, fidelity)
        assert useful.tolist() == [True, False] and not found[1].any() and found[0].any()
    row = sr_reward.summary(judged, fidelity, useful=useful, rejected=rejected)
    assert row["zero_std_groups"] == 1 and row["bad_rewards"] == 0 and row["rejected_samples"] == 0


def test_meaningless_differences_of_lr_psnr_do_not_outvote_the_judge():
    """The first group's LR-PSNRs spread by 0.0003 dB, the second's by more than the floor."""
    judged = torch.tensor([[4.0, 5.0, 6.0, 7.0]] * 2)
    fidelity = torch.tensor([[30.0005, 30.0009, 30.0003, 30.0001], [30.5, 30.9, 30.3, 30.1]])
    cfg = settings(guard_weight=1.5)
    found, alone = (sr_reward.advantages_of(one, judged, fidelity)[0] for one in (cfg, replace(cfg, guard_weight=0.0)))
    gap = [dB - sum(fidelity[0].tolist()) / 4 for dB in fidelity[0].tolist()]
    assert found[0].tolist() == pytest.approx([a + 1.5 * g / 0.02 for a, g in zip(alone[0].tolist(), gap)], abs=1e-4)
    assert found[0].argsort().tolist() == [0, 1, 2, 3]
    assert found[1].tolist() == pytest.approx(loops(cfg, judged[1:].tolist(), fidelity[1:].tolist())[0], abs=1e-4)
    assert found[1].argsort().tolist() != [0, 1, 2, 3]
    level = torch.full((2, 4), 30.0)                                           # without a floor: as the judge says
    found = sr_reward.advantages_of(replace(cfg, fidelity_std_floor=0.0), judged, level)[0]
    assert torch.allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["advantages", "rewards"])
@pytest.mark.parametrize("std", ["group", "batch"])
def test_a_sample_without_a_finite_reward_gets_no_advantage_and_is_counted(aggregate, std):
    cfg = settings(aggregate=aggregate, advantage_std=std)
    judged = torch.tensor([[1.0, 2.0, 4.0, NAN, INF], [3.0, NAN, NAN, NAN, NAN], [NAN] * 5, [1.0, 2, 3, 4, 5]])
    fidelity = torch.tensor([[30.0, 31.0, 33.0, 35.0, 10.0]] * 3 + [[30.0, 31.0, 32.0, 33.0, -INF]])
    found, useful, rejected = sr_reward.advantages_of(cfg, judged, fidelity)
    assert found.isfinite().all() and not found[0, 3:].any() and not found[1:3].any() and found[3, 4] == 0
    assert useful.tolist() == [True, False, False, True]
    if std == "group":                                  # the others are compared as if it had never been drawn
        alone = sr_reward.advantages_of(cfg, judged[:1, :3], fidelity[:1, :3])[0]
        assert torch.allclose(found[:1, :3], alone, atol=1e-5)
    row = sr_reward.summary(judged, fidelity, useful=useful, rejected=rejected)
    assert row["bad_rewards"] == 12 and row["zero_std_groups"] == 2
    assert all(math.isfinite(float(row[key])) for key in ("reward_mean", "reward_std", "lr_psnr"))


def test_a_rejected_sample_never_gets_a_positive_advantage():
    judged, fidelity = torch.tensor([[1.0, 2.0, 9.0, 3.0]]), torch.tensor([[31.0, 30.0, 24.0, 25.0]])
    cfg = settings(guard_weight=0.0, max_sample_drop=0.5)
    free, _, _ = sr_reward.advantages_of(cfg, judged, fidelity)
    found, useful, rejected = sr_reward.advantages_of(cfg, judged, fidelity, torch.tensor([29.5]))
    assert rejected.tolist() == [[False, False, True, True]] and free[0, 2] > 1
    assert found[0, 2] == 0 and torch.equal(found[0, [0, 1, 3]], free[0, [0, 1, 3]])    # a negative one stays
    assert sr_reward.summary(judged, fidelity, useful=useful, rejected=rejected)["rejected_samples"] == 2


def test_the_floor_is_the_lr_psnr_of_the_policy_before_grpo():
    policy, lr = tiny_policy(), shrink(images(2, seed=1))
    assert sr_reward.fidelity_floor(policy, settings(), lr, ["a", "b"]) is None
    floor = sr_reward.fidelity_floor(policy, settings(max_sample_drop=0.5, samples_per_gpu=1), lr, ["a", "b"])
    for i, name in enumerate("ab"):
        start = sr_policy.draw_noise([(0, "base", name)], noise(1).shape[2:], lr.device)
        sr = to_pixels(sr_policy.restore(policy, lr[i:i + 1], start))[0]
        assert float(floor[i]) == pytest.approx(metrics.lr_psnr(sr, to_pixels(lr)[i], 4) - 0.5, abs=1e-3)


def test_the_floor_of_a_tuned_lora_policy_is_still_that_of_its_base():
    lr, cfg = shrink(images(2, seed=1)), settings(max_sample_drop=0.5)
    floor = sr_reward.fidelity_floor(tiny_policy(), cfg, lr, ["a", "b"])
    tuned = add_lora(tiny_policy())
    with torch.no_grad():
        for p in trainable(tuned.unet).values():
            p.add_(0.05)
    assert torch.equal(sr_reward.fidelity_floor(tuned, cfg, lr, ["a", "b"]), floor)


# scores ----------------------------------------------------------------------------------------------------

def test_large_images_are_judged_in_aligned_crops():
    judge, _ = build_judge()
    sr = images(4, size=64)                             # 2 samples of each of 2 LR images of 16 px
    lr = shrink(sr[::2])
    lrs, samples = sr_reward.by_input(lr, sr)
    found = sr_reward.expected_scores(judge, lrs, samples, crop=32, limit=4)
    assert found.shape == (2, 2, 3)
    for g in range(2):
        for k in range(2):
            low, high = lrs[g], samples[g, k]
            parts = [mllm.expected_scores(judge, [np.ascontiguousarray(low[y:y + 8, x:x + 8])],
                                          [[np.ascontiguousarray(high[4 * y:4 * y + 32, 4 * x:4 * x + 32])]])[0, 0]
                     for y in (0, 8) for x in (0, 8)]
            assert torch.allclose(found[g, k], torch.stack(parts).mean(0), atol=1e-4)
    whole = sr_reward.expected_scores(judge, lrs, samples, crop=0, limit=4)
    assert not torch.allclose(whole, found, atol=1e-4)
    assert torch.equal(whole, sr_reward.expected_scores(judge, lrs, samples, crop=64, limit=4))


def test_an_image_that_is_not_finite_has_no_score():
    judge, _ = build_judge()
    sr = images(4, size=32)
    sr[1, 0, 3, 3], sr[2, 2, 0, 0] = NAN, INF
    judged, fidelity = load_stage("04").score(judge, settings(), shrink(images(2)), sr)
    for found in (judged, fidelity):
        assert found.isfinite().tolist() == [[True, False], [False, True]]


# the stop --------------------------------------------------------------------------------------------------

def evaluation(reward: float, psnr: float = 30.0, held: float = 0.5) -> dict[str, float]:
    return {"val_reward": reward, "val_lr_psnr": psnr, "val_heldout": held}


def test_the_stop_needs_patience_a_broken_bound_and_a_reward_that_rose():
    cfg, start = settings(patience=2, max_lr_psnr_drop=0.3, max_heldout_drop=0.0), evaluation(5.0)
    assert sr_reward.below_bounds(cfg, start, evaluation(6, 29.7)) == []
    assert "LR-PSNR 30 -> 29.6" in sr_reward.below_bounds(cfg, start, evaluation(6, 29.6))[0]
    assert "held-out" in sr_reward.below_bounds(cfg, start, evaluation(6, 30, 0.49))[0]
    assert len(sr_reward.below_bounds(cfg, start, evaluation(NAN, NAN, NAN))) == 2
    fooled, worse, good = evaluation(6.0, 29.0), evaluation(4.0, 29.0), evaluation(5.5)
    for history, stops in (([fooled, fooled], True), ([fooled, worse, fooled], False), ([fooled, good, fooled], False),
                           ([worse] * 5, False), ([good, fooled, fooled], True)):
        state = {"best": start, "best_step": 0, "fooled": 0, "stopped_at": None, "stop_reason": None}
        for i, values in enumerate(history, 1):
            sr_reward.watch(cfg, state, start, values, i)
        assert (state["stopped_at"] == len(history)) == stops, history
        assert state["best"] == (good if good in history else start)
    assert "reward 5 -> 6" in state["stop_reason"] and "LR-PSNR 30 -> 29" in state["stop_reason"]
    never = {"best": start, "best_step": 0, "fooled": 0, "stopped_at": None}
    for i in range(9):
        sr_reward.watch(replace(cfg, patience=0), never, start, fooled, i)
    assert never["stopped_at"] is None


# the stage -------------------------------------------------------------------------------------------------

def sharpness(sr: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of neighbors: easily raised by noise."""
    return 1000 * (sr[..., 1:] - sr[..., :-1]).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def started(toy_config, toy_run, tmp_path_factory) -> Path:
    """A run folder in which only the cold start of 04 is done."""
    folder = tmp_path_factory.mktemp("started") / "run"
    folder.mkdir()
    for stem in ("01_build_dataset", "02_train_reward"):
        (folder / stem).symlink_to(toy_run / stem)
    done = run_stage("04", toy_config, f"run={folder}", "steps=0")
    assert done.returncode == 0, done.stderr
    return folder


def tune(config: Path, started: Path, folder: Path, *overrides: str) -> dict:
    """04 in this process, in a copy of `started`; results."""
    stage = load_stage("04")
    if not folder.exists():
        shutil.copytree(started, folder, symlinks=True)
        for path in (folder / "04_train_sr_grpo").iterdir():
            if path.name != "cold_start":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage.main(load_config(stage.Config, stage.__file__, [str(config), f"run={folder}", *overrides]))
    return run.read_json(folder / "04_train_sr_grpo" / "manifest.json")["results"]


def hackable(judge, cfg, lr, sr):
    return sharpness(sr).view(len(lr), -1), sr_reward.lr_psnrs(lr, sr)


def rescored(config: Path, folder: Path) -> float:
    """val_reward of policy/ as it lies on disk."""
    stage, source = load_stage("04"), folder / "01_build_dataset"
    cfg, val = load_config(stage.Config, stage.__file__, [str(config), f"run={folder}"]), stage.paired(source, "val")
    fixed = [val[i] for i in sorted(run.np_rng(cfg.seed, "evaluate").permutation(len(val))[:cfg.eval_inputs])]
    policy = sr_latent.load_policy(folder / "04_train_sr_grpo" / "policy", torch.device("cpu"))
    return stage.evaluate(policy, None, cfg, source=source, groups=fixed)[0]["val_reward"]


HACK = ("guard_weight=0", "lr=0.02", "steps=16", "eval_every=1", "warmup_steps=1", "kl_weight=0", "ema=0.5",
        "std_floor=0")


def test_a_policy_that_fools_its_reward_is_stopped_and_rolled_back(toy_config, started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_stage("04"), "score", hackable)
    free = tune(toy_config, started, tmp_path / "free", *HACK, "max_lr_psnr_drop=100", "max_heldout_drop=1")
    assert free["reward_end"] > 1.01 * free["reward_start"] and free["stopped_at"] is None
    assert rescored(toy_config, tmp_path / "free") == pytest.approx(free["reward_end"], rel=1e-3)
    lost = (free["lr_psnr_start"] - free["lr_psnr_end"], free["heldout_start"] - free["heldout_end"])
    print("lost without the guard:", lost, free)
    assert lost[0] > 0.3 or lost[1] > 0, "the reward should be hackable"        # without the guard this is kept

    capsys.readouterr()
    kept = tune(toy_config, started, tmp_path / "kept", *HACK, "patience=3")
    assert 3 <= kept["stopped_at"] < 16 and kept["best_step"] < kept["stopped_at"]
    assert kept["stop_reason"].startswith("reward ") and " -> " in kept["stop_reason"]
    line, = (text for text in capsys.readouterr().out.splitlines() if text.startswith("stopped after step"))
    assert f"the weights of step {kept['best_step']} are kept" in line
    assert rescored(toy_config, tmp_path / "kept") == pytest.approx(kept["reward_end"], rel=1e-3)
    assert kept["lr_psnr_end"] >= kept["lr_psnr_start"] - 0.3 and kept["heldout_end"] >= kept["heldout_start"]
    rows = [json.loads(text) for text in (tmp_path / "kept/04_train_sr_grpo/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == kept["stopped_at"] and rows[-1]["val_reward"] > kept["reward_start"]

    # the same command again, as if it had been killed before the manifest: it does not go on
    folder = tmp_path / "kept" / "04_train_sr_grpo"
    weights = (folder / "policy" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "manifest.json").unlink()
    again = tune(toy_config, started, tmp_path / "kept", *HACK, "patience=3")
    assert again["stopped_at"] == kept["stopped_at"] and again["stop_reason"] == kept["stop_reason"]
    assert (folder / "policy" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    with pytest.raises(SystemExit) as finished:
        tune(toy_config, started, tmp_path / "kept", *HACK, "patience=3")
    assert finished.value.code == 0


def test_a_cold_start_of_another_run_denoises_as_the_settings_say(toy_config, started, tmp_path, capsys):
    """Its weights fit any steps and solver, but no other network."""
    tune(toy_config, started, tmp_path / "run", "steps=0", "denoise_steps=5", "step_list=999,700,500,300,100",
         "solver=dpm")
    for name in ("cold_start", "policy"):
        found = run.read_json(tmp_path / "run" / "04_train_sr_grpo" / name / "sampler.json")
        assert (found["steps"], found["times"], found["solver"]) == (5, [999, 700, 500, 300, 100], "dpm")
    weights = [path / "04_train_sr_grpo/cold_start/diffusion_pytorch_model.safetensors"
               for path in (started, tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for i, (setting, before, now) in enumerate((("channels=64", "[32]", "[64]"), ("layers=2", "1", "2"),
                                                ("contrast_power=0.5", "0.7", "0.5"))):
        with pytest.raises(SystemExit) as stop:
            tune(toy_config, started, tmp_path / str(i), "steps=0", setting)
        assert stop.value.code == 2
        key = setting.partition("=")[0]
        assert f"cold_start was trained with {key}={before}, the setting is {now}" in capsys.readouterr().err
    (tmp_path / "linked" / "04_train_sr_grpo").mkdir(parents=True)
    for name in ("01_build_dataset", "02_train_reward", "04_train_sr_grpo/cold_start"):
        (tmp_path / "linked" / name).symlink_to(started / name)
    kept = (started / "04_train_sr_grpo/cold_start/sampler.json").read_bytes()
    with pytest.raises(SystemExit):
        tune(toy_config, started, tmp_path / "linked", "steps=0", "solver=dpm")
    assert "copy that folder" in capsys.readouterr().err
    assert (started / "04_train_sr_grpo/cold_start/sampler.json").read_bytes() == kept


@pytest.mark.parametrize("steps", [1, 2])
def test_nft_needs_no_room_for_random_steps(toy_config, started, tmp_path, steps):
    results = tune(toy_config, started, tmp_path / "run", "algorithm=nft", f"denoise_steps={steps}", "window_width=3",
                   "std_floor=0", "steps=2")
    rows = [json.loads(line) for line in (tmp_path / "run/04_train_sr_grpo/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and row["bad_rewards"] == 0 for row in rows)
    assert math.isfinite(results["reward_end"])


def test_three_steps_without_a_finite_reward_end_the_run_and_name_the_checkpoint(toy_config, started, tmp_path,
                                                                                  monkeypatch, capsys):
    stage, calls = load_stage("04"), []

    def broken(judge, cfg, lr, sr):
        calls.append(len(sr))
        judged, fidelity = hackable(judge, cfg, lr, sr)
        return (judged if len(calls) <= 3 else judged * NAN), fidelity          # evaluation, two steps, then NaN

    monkeypatch.setattr(stage, "score", broken)
    with pytest.raises(SystemExit) as stop:
        tune(toy_config, started, tmp_path / "run", "steps=9", "eval_every=9", "std_floor=0")
    assert stop.value.code == 2
    message, = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error: "))
    folder = tmp_path / "run" / "04_train_sr_grpo"
    assert "three steps in a row" in message and str(folder / "checkpoints" / "step_000004") in message
    rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_rewards"] for row in rows] == [0, 0, 9, 9, 9] and rows[-1]["reward_mean"] is None
    assert [row["skipped_updates"] for row in rows] == [0] * 5


def test_nft_resumed_after_a_checkpoint_is_the_same(toy_config, started, tmp_path, monkeypatch):
    """The policy that samples, the averaged and the best weights go on where they were."""
    monkeypatch.setattr(load_stage("04"), "score", hackable)
    folder, found = tmp_path / "run" / "04_train_sr_grpo", []
    last = folder / "checkpoints" / "step_000004"
    for _ in range(2):
        tune(toy_config, started, tmp_path / "run", *HACK, "algorithm=nft", "steps=4", "save_every=2",
             "max_lr_psnr_drop=100", "max_heldout_drop=1")
        state = run.read_json(last / "state.json")
        found.append((load_file(last / "model.safetensors"), {key: state[key] for key in ("best", "best_step")}))
        shutil.rmtree(last)                             # as if it was killed while saving the last step
        shutil.rmtree(folder / "policy")
        (folder / "manifest.json").unlink()
    (once, best), (again, best_again) = found
    assert once.keys() == again.keys() and all(torch.equal(again[name], tensor) for name, tensor in once.items())
    assert best == best_again and best["best_step"] > 0 and any(name.startswith("old.") for name in once)


def test_a_plan_says_what_there_is_to_do_and_writes_nothing(toy_config, toy_run, tmp_path, capsys):
    for stem in ("01_build_dataset", "02_train_reward"):
        (tmp_path / stem).symlink_to(toy_run / stem)
    stage, before = load_stage("04"), sorted(toy_run.rglob("*"))
    for extra in ([], ["lora_rank=0"], ["algorithm=nft", "kl_weight=0"], ["gradient_checkpointing=true"]):
        stage.main(load_config(stage.Config, stage.__file__, [str(toy_config), f"run={tmp_path}", "plan=true", *extra]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01_build_dataset", "02_train_reward"]
    assert sorted(toy_run.rglob("*")) == before
    text = capsys.readouterr().out
    lora, full, nft, saving = text.split("nothing was written")[:4]
    assert "3 LR images x 3 samples = 9 images" in lora and "36 passes of the UNet to sample, 18 with" in lora
    assert "4 steps, 36 samples, 4 updates; 3 evaluations of 3 images" in lora and "latent 16 x 8 x 8" in lora
    assert "as many of the reference" in lora and "of the reference" not in nft
    assert "frozen copy" in full and "(all)" in full and "3 copies" in nft

    def kept(text: str) -> float:
        return float(text.split("activations: ")[1].split(" MB")[0])
    assert 0 < kept(saving) < 0.7 * kept(lora)
