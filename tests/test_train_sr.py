"""
Stage 04: one step of GRPO against plain loops and on a tiny policy, its guards, and the stage as a user runs it.

Run     python -m pytest tests/test_train_sr.py         # 2 min, of which stages 01 and 02 take one
"""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # torchrun starts this file, see the end
from common import dist, grpo, metrics, mllm, run, sr_pipelines, sr_policy
from common.config import load_config
from common.groups import load_groups
from common.images import read_image, to_pixels
from common.training import copied, trainable
from conftest import build_judge, load_stage, run_stage
from test_sr_policy import images, LATENT, noise, shrink, STEPS, tiny_policy

NAN, INF = math.nan, math.inf
STAGE = load_stage("04")


def settings(**changes):
    """Stage 04's settings for one step on the images of `lr`."""
    cfg = STAGE.Config(run="unused", denoise_steps=STEPS, inputs_per_step=4, samples_per_input=4, samples_per_gpu=8,
                       window_width=2, lora_rank=4)
    return replace(cfg, **changes)


@pytest.fixture
def lr() -> torch.Tensor:
    return shrink(images(4, seed=1))                                    # [4, 3, 8, 8]


def brightness(sr: torch.Tensor) -> torch.Tensor:
    return sr.mean((1, 2, 3))


def one_step(policy, reference, cfg, lr, *, step=0, optimizer, advantages=None) -> dict:
    """A step of stage 04 on brightness."""
    rollouts = STAGE.roll_out(policy, cfg, lr, ids=[str(i) for i in range(len(lr))], step=step)
    if advantages is None:
        rewards = brightness(torch.cat([rollout.images for rollout in rollouts])).view(len(lr), -1)
        advantages = grpo.group_advantages(rewards).flatten()
    return STAGE.learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages, optimizer=optimizer)


# roll out, score, advantages -----------------------------------------------------------------------------------

def test_a_group_shares_its_first_latent_and_samples_do_not_depend_on_the_batch(lr):
    policy, ids = tiny_policy(), ["a", "b", "c", "d"]
    rollouts = STAGE.roll_out(policy, settings(sampler="sde", window_start=1), lr, ids=ids, step=3)
    assert len(rollouts) == 2 and {(one.start, one.sampler) for one in rollouts} == {(1, "sde")}
    first = torch.cat([one.latents[:, 0] for one in STAGE.roll_out(policy, settings(), lr, ids=ids, step=3)])
    first = first.view(4, 4, *LATENT)                                   # group, sample
    assert torch.equal(first[:, 0], first[:, 3]) and not torch.equal(first[0, 0], first[1, 0])
    alone = STAGE.roll_out(policy, settings(sampler="sde", window_start=1), lr[2:3], ids=["c"], step=3)[0]
    assert (alone.images - rollouts[1].images[:4]).abs().max() < 1e-5
    assert alone.images.std(0).max() > 1e-3                             # the samples of a group differ


def test_large_images_are_judged_in_aligned_crops_and_nan_has_no_score():
    judge, _ = build_judge()
    sr = images(4, size=64)                                             # 2 samples of each of 2 LR images of 16 px
    lr = shrink(sr[::2])
    cfg = settings(crop=32, weight_consistency=0.5)
    judged, fidelity = STAGE.score(judge, cfg, lr, sr)
    lrs, srs = to_pixels(lr), to_pixels(sr)
    for i in range(4):
        low, high = lrs[i // 2], srs[i]
        parts = [mllm.expected_scores(judge, [np.ascontiguousarray(low[y:y + 8, x:x + 8])],
                                      [[np.ascontiguousarray(high[4 * y:4 * y + 32, 4 * x:4 * x + 32])]])[0, 0]
                 for y in (0, 8) for x in (0, 8)]
        axes = torch.stack(parts).mean(0)
        assert float(judged[i // 2, i % 2]) == pytest.approx(float(0.5 * axes[0] + axes[2]), abs=1e-4)
        assert float(fidelity[i // 2, i % 2]) == pytest.approx(metrics.lr_psnr(high, low, 4), abs=1e-4)
    whole, _ = STAGE.score(judge, replace(cfg, crop=0), lr, sr)
    assert not torch.allclose(whole, judged, atol=1e-4)
    sr[1, 0, 3, 3], sr[2, 2, 0, 0] = NAN, INF
    for values in STAGE.score(judge, cfg, lr, sr):
        assert values.isfinite().tolist() == [[True, False], [False, True]]


def z_scores(row: list[float], floor: float) -> list[float]:
    mean = sum(row) / len(row)
    std = math.sqrt(sum((r - mean) ** 2 for r in row) / len(row))
    return [(r - mean) / max(std, floor) for r in row]


def test_advantages_agree_with_plain_loops(monkeypatch):
    """What lacks to the floor costs by the dB, less the group's mean; above the floor likeness earns nothing."""
    monkeypatch.setattr(STAGE, "ADVANTAGE_CLIP", 1.2)
    cfg, rng = settings(guard_weight=0.7), torch.Generator().manual_seed(0)
    judged = torch.tensor([[3.0], [5], [8]]) + torch.randn(3, 6, generator=rng) * torch.tensor([[0.2], [1], [3]])
    fidelity = torch.tensor([[24.0], [30], [36]]) + torch.randn(3, 6, generator=rng)
    advantages, useful = STAGE.advantages_of(cfg, judged, fidelity, 30.0)
    expected = []
    for row, values in zip(judged.tolist(), fidelity.tolist()):
        guard = [min(0, dB - 30) for dB in values]
        totals = [a + 0.7 * (b - sum(guard) / 6) for a, b in zip(z_scores(row, 1e-4), guard)]
        expected.append([min(max(total, -1.2), 1.2) for total in totals])
    assert useful.all() and torch.allclose(advantages, torch.tensor(expected), atol=1e-3)
    assert (advantages.abs() == advantages.new_tensor(1.2)).any() and (advantages.abs() < 1.2).any()
    monkeypatch.setattr(STAGE, "ADVANTAGE_CLIP", 9.0)
    alone, _ = STAGE.advantages_of(cfg, judged[2:], fidelity[2:], 30.0)
    assert fidelity[2].min() > 30 and torch.equal(alone, grpo.group_advantages(judged[2:]))


def test_ties_and_rewards_that_are_not_finite_teach_nothing_and_are_counted():
    judged = torch.tensor([[1.0, 2.0, 4.0, NAN, INF], [3.0, NAN, NAN, NAN, NAN], [5.0] * 5, [1.0, 2, 3, 4, 5]])
    fidelity = torch.tensor([[30.0, 31.0, 33.0, 35.0, 10.0]] * 3 + [[30.0, 31.0, 32.0, 33.0, -INF]])
    advantages, useful = STAGE.advantages_of(settings(), judged, fidelity, 32.0)
    assert advantages.isfinite().all() and useful.tolist() == [True, False, False, True]
    assert not advantages[0, 3:].any() and not advantages[1:3].any() and advantages[3, 4] == 0
    alone, _ = STAGE.advantages_of(settings(), judged[:1, :3], fidelity[:1, :3], 32.0)  # as if never drawn
    assert torch.allclose(advantages[:1, :3], alone, atol=1e-5)
    row = STAGE.summary(judged, fidelity, useful)
    assert row["bad_rewards"] == 7 and row["zero_std_groups"] == 2
    assert float(row["reward_std"]) == pytest.approx(np.mean([np.std([1, 2, 4]), 0, 0, np.std([1, 2, 3, 4, 5])]))


# learn ---------------------------------------------------------------------------------------------------------

def log_density(x: torch.Tensor, mean: torch.Tensor, std: float) -> float:
    """Mean over the elements of a step, in float64."""
    pairs = zip(x.double().flatten().tolist(), mean.double().flatten().tolist())
    terms = [-(a - b) ** 2 / (2 * std ** 2) - math.log(std) - 0.5 * math.log(2 * math.pi) for a, b in pairs]
    return sum(terms) / len(terms)


def test_the_loss_agrees_with_plain_loops(lr):
    """Second pass on the same samples, so that ratios are not 1."""
    old, now, reference = (tiny_policy(sharpening=amount) for amount in (0.5, 0.6, 0.3))
    with torch.no_grad():
        now.unet.conv_out.bias.add_(0.02)
        reference.unet.conv_out.bias.add_(-0.03)
    cfg = settings(window_width=3, window_start=1, kl_weight=0.3, clip_range=1e-4)
    drawn = torch.randn(4, 1, 2, 2, generator=run.generator(0, "map"))
    rollout = sr_policy.sample(old, old.observe(lr), noise(4, 3), map_noise=drawn, start=1)
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.25])
    loss, logp, row = STAGE.loss_of(now, reference, cfg, rollout=rollout, advantages=advantages, old_logp=rollout.logp)
    gains, kls, clipped = [], [], 0
    for b in range(4):
        for w in (-1, 0, 1, 2):                                         # -1: the sharpening map
            seen, index, weight = rollout.seen[b:b + 1], torch.tensor([1 + w]), float(advantages[b])
            with torch.no_grad():
                if w == -1:
                    was, mean, base = (policy.map(seen) for policy in (old, now, reference))
                    x, std = rollout.map[b:b + 1], 0.4
                else:
                    (was, _), (mean, std), (base, _) = (
                        sr_policy.step(policy, rollout.latents[b:b + 1, w], index, seen, eta=1.0)
                        for policy in (old, now, reference))
                    x, std = rollout.latents[b:b + 1, w + 1], float(std)
            ratio = math.exp(log_density(x, mean, std) - log_density(x, was, std))
            bounded = min(max(ratio, 1 - 1e-4), 1 + 1e-4)
            clipped += weight * bounded < weight * ratio
            gains.append(min(weight * ratio, weight * bounded))
            kls.append(float((mean - base).double().square().mean()) / (2 * std ** 2))
    actions = cfg.inputs_per_step * cfg.samples_per_input * 4
    assert 0 < clipped < 16 and float(row["clip_frac_low"] + row["clip_frac_high"]) == pytest.approx(clipped / actions)
    assert float(row["loss"]) == pytest.approx(-sum(gains) / actions, rel=1e-4)
    assert float(row["ref_kl"]) == pytest.approx(sum(kls) / actions, rel=1e-3)
    assert float(loss.detach()) == pytest.approx(float(row["loss"] + 0.3 * row["ref_kl"]), rel=1e-5)


@pytest.mark.parametrize("rank, sharpening", [(0, None), (4, None), (4, 0.2)])
def test_grpo_raises_a_simple_reward_and_touches_trained_weights_only(lr, rank, sharpening):
    cfg = settings(lora_rank=rank, kl_weight=0.0, gradient_checkpointing=True)
    policy, _ = STAGE.with_reference(cfg, tiny_policy(sharpening=sharpening).requires_grad_(False))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    start = brightness(sr_policy.restore(policy, policy.observe(lr), noise(4)[:, 0])).mean()
    optimizer = torch.optim.AdamW(trainable(policy).values(), lr=1e-2 if rank else 3e-3)
    for step in range(8):
        row = one_step(policy, None, cfg, lr, step=step, optimizer=optimizer)
    assert row["ratio_error"] < 1e-5 and row["ratio_max"] == 1
    assert "ref_kl" not in row                                          # without a KL the reference is not asked
    assert brightness(sr_policy.restore(policy, policy.observe(lr), noise(4)[:, 0])).mean() > start + 0.005
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
        assert p.requires_grad == (("lora" in name if rank else name.startswith("unet.")) or name.startswith("map."))


def test_two_passes_move_the_ratio_and_a_tight_range_clips_it(lr):
    policy, cfg = tiny_policy(), settings(lora_rank=0, updates_per_rollout=3, clip_range=1e-7)
    row = one_step(policy, tiny_policy(), cfg, lr, optimizer=torch.optim.AdamW(policy.unet.parameters(), lr=1e-3))
    assert row["ratio_max"] > 1 and row["policy_kl"] > 0 and row["clip_frac_low"] + row["clip_frac_high"] > 0.3
    assert row["ratio_error"] < 1e-5                                    # of the first pass


def moved(cfg, lr) -> torch.Tensor:
    """What one step with plain SGD changes: minus the gradient."""
    policy, reference = STAGE.with_reference(cfg, tiny_policy(sharpening=0.2).requires_grad_(False))
    weights = trainable(policy)
    before = copied(weights)
    one_step(policy, reference, cfg, lr, optimizer=torch.optim.SGD(weights.values(), lr=1.0))
    return torch.cat([(p - before[name]).detach().flatten() for name, p in weights.items()])


@pytest.mark.parametrize("rank", [0, 4])
def test_micro_batches_and_checkpointing_change_memory_only(rank, lr):
    whole = moved(settings(lora_rank=rank, samples_per_gpu=16), lr)
    split = moved(settings(lora_rank=rank, samples_per_gpu=3), lr)
    again = moved(settings(lora_rank=rank, samples_per_gpu=16, gradient_checkpointing=True), lr)
    assert whole.norm() > 1e-3 and (split - whole).abs().max() < 1e-3 * whole.abs().max()
    assert (again - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_the_ratio_check_stops_a_policy_whose_training_path_differs(lr, capsys):
    policy, cfg = tiny_policy(dropout=0.2), settings()
    rollouts = STAGE.roll_out(policy, cfg, lr, ids=["a", "b", "c", "d"], step=0)
    assert STAGE.check_ratio(policy, cfg, rollouts) < cfg.ratio_tolerance
    policy.train()                                                      # now dropout perturbs every pass
    with pytest.raises(SystemExit):
        STAGE.check_ratio(policy, cfg, rollouts)
    assert "ratio check" in capsys.readouterr().err


def check_that_ranks_skip_together() -> None:
    """Rank 1 alone has a NaN, first; then none has. Runs on both ranks."""
    cfg, policy = settings(lora_rank=0), tiny_policy()
    lr, before = shrink(images(4, seed=1))[2 * dist.rank():][:2], copied(trainable(policy.unet))
    optimizer, advantages = torch.optim.SGD(policy.unet.parameters(), lr=0.1), torch.tensor([1.0, -1.0] * 4)
    for bad in (True, False):
        advantages[0] = NAN if bad and dist.rank() == 1 else 1.0
        row = one_step(policy, copy.deepcopy(policy), cfg, lr, optimizer=optimizer, advantages=advantages)
        same = all(torch.equal(p, before[name]) for name, p in trainable(policy.unet).items())
        assert row["skipped_updates"] == bad and same == bad
        dist.assert_same_weights(trainable(policy.unet).items())


def test_an_update_that_is_not_finite_is_skipped_by_all_ranks_together():
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           __file__], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# the stage -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overrides, message", [
    (["policy=ldm"], "needs one"), (["policy=x"], "should be pixel, ldm, upscaler, sd3"),
    (["controlnet=a/b"], "policy=sd3 alone"), (["prompt=a"], "only policy=upscaler and sd3"),
    (["denoise_steps=7"], "should divide 1000"), (["window_width=4"], "should be in 1..3"),
    (["sampler=x"], "should be ddim, sde, cps"), (["sampler=cps", "eta=1.5"], "at most 1 for ddim"),
    (["samples_per_input=1"], "should be at least 2"), (["eval_every=0"], "eval_every=0: should be at least 1"),
    (["kl_weight=-1"], "kl_weight=-1.0: should be at least 0"), (["lr=0"], "lr=0.0: should be above 0"),
    (["ema=1"], "ema=1.0: should be from 0 to below 1"), (["gain=0"], "gain=0.0: should be above 0")])
def test_04_refuses_settings_that_cannot_work(toy_config, tmp_path, capsys, overrides, message):
    with pytest.raises(SystemExit):
        load_config(STAGE.Config, STAGE.__file__, [str(toy_config), f"run={tmp_path}", *overrides])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def copy_of(toy_run: Path, target: Path) -> Path:
    """A run folder that shares the finished stages but may get its own 04."""
    target.mkdir(parents=True)
    for stem in ("01_build_dataset", "02_train_reward"):
        (target / stem).symlink_to(toy_run / stem)
    return target


@pytest.fixture(scope="module")
def tuned(toy_config, toy_run, tmp_path_factory) -> Path:
    """A run folder with 04 finished, too: the real command."""
    folder = copy_of(toy_run, tmp_path_factory.mktemp("sr") / "run")
    done = run_stage("04", toy_config, f"run={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def tune(config: Path, started: Path, target: Path, *overrides: str) -> dict:
    """04 in this process, in a copy of a run; its results."""
    if not target.exists():
        shutil.copytree(started, target, symlinks=True)
        shutil.rmtree(target / "04_train_sr_grpo")
    STAGE.main(load_config(STAGE.Config, STAGE.__file__, [str(config), f"run={target}", *overrides]))
    return run.read_json(target / "04_train_sr_grpo" / "manifest.json")["results"]


def files_of(folder: Path) -> dict[str, bytes]:
    """The results of 04 that must not depend on how often it was interrupted; curves.png shows seconds, too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".png") and path.name != "curves.png" or path.name == "sampler.json"}


def rows_of(folder: Path) -> list[dict]:
    clock = ("time", "seconds", "peak_memory_gb")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


def test_04_leaves_what_it_promises(tuned):
    folder = tuned / "04_train_sr_grpo"
    results, rows = run.read_json(folder / "manifest.json")["results"], rows_of(folder)
    assert results["ratio_error_max"] < 1e-5 and results["reward_end"] >= results["reward_start"]
    assert results["gold_end"] >= results["gold_start"]
    assert results["lr_psnr_end"] >= results["lr_psnr_floor"]
    for name in ("reward", "lr_psnr", "gold", "psnr"):                  # of the last, best or not
        assert results[f"{name}_last"] == round(rows[3][f"val_{name}"], 4)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[0]["ref_kl"] == 0 < rows[3]["ref_kl"]
    assert "val_reward" not in rows[0] and {"val_reward", "val_lr_psnr", "val_gold", "val_psnr"} <= set(rows[1])
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"step_000{i}.png" for i in (0, 2, 4)]
    trained = load_file(folder / "checkpoints" / "step_000004" / "weights.safetensors")
    assert all("lora" in name or ".map." in name for name in trained)   # nothing else is trained


def test_04_resumed_after_a_checkpoint_is_the_same_to_the_byte(tuned, toy_config, tmp_path):
    folder = tmp_path / "run" / "04_train_sr_grpo"
    shutil.copytree(tuned, tmp_path / "run", symlinks=True)
    shutil.rmtree(folder / "policy")                        # as if it was killed while saving the last step
    (folder / "manifest.json").unlink()
    (folder / "checkpoints" / "step_000004").rename(folder / "checkpoints" / "step_000004.tmp")
    tune(toy_config, tuned, tmp_path / "run")
    assert files_of(folder) == files_of(tuned / "04_train_sr_grpo")
    assert rows_of(folder) == rows_of(tuned / "04_train_sr_grpo")


def test_04_with_four_processes_trains_the_same_weights(tuned, toy_config, toy_run, tmp_path):
    settings = ["steps=2", "inputs_per_step=5", "eval_inputs=4", "warmup_steps=0"]      # one rank has two LR images
    tune(toy_config, tuned, tmp_path / "one", *settings)
    done = run_stage("04", toy_config, f"run={copy_of(toy_run, tmp_path / 'four')}", *settings, processes=4)
    assert done.returncode == 0, done.stderr
    one, four = (load_file(tmp_path / name / "04_train_sr_grpo" / "checkpoints" / "step_000002" / "weights.safetensors")
                 for name in ("one", "four"))
    for name, tensor in one.items():                                    # moved by some 1e-3; Adam magnifies rounding
        error = (four[name] - tensor).abs()
        assert error.mean() < 2e-5 and error.max() < 4e-3, name


def hackable(judge, cfg, lr, sr) -> tuple[torch.Tensor, torch.Tensor]:
    """As score(), of a judge that likes differences of neighbors: easily raised by noise."""
    sharp = 1000 * (sr[..., 1:] - sr[..., :-1]).square().mean((1, 2, 3))
    psnr = [metrics.lr_psnr(high, low, 4) for high, low in
            zip(to_pixels(sr), to_pixels(lr).repeat(len(sr) // len(lr), 0))]
    return sharp.view(len(lr), -1), torch.tensor(psnr).view(len(lr), -1)


def test_weights_that_fool_the_reward_are_not_kept(toy_config, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(STAGE, "score", hackable)
    results = tune(toy_config, tuned, tmp_path / "run", "guard_weight=0", "lr=0.01", "steps=12", "eval_every=1",
                   "kl_weight=0", "warmup_steps=1", "ema=0.5", "lora_rank=0", "save_every=50")
    highest = max(rows_of(tmp_path / "run" / "04_train_sr_grpo"), key=lambda row: row["val_reward"])
    assert highest["val_reward"] > 1.01 * results["reward_start"] and highest["val_reward"] > results["reward_end"]
    assert (highest["val_lr_psnr"] < results["lr_psnr_floor"]
            or highest["val_gold"] < results["gold_start"])               # so it was vetoed
    assert results["lr_psnr_end"] >= results["lr_psnr_floor"]
    assert results["gold_end"] >= results["gold_start"]
    cfg = load_config(STAGE.Config, STAGE.__file__, [str(toy_config), f"run={tmp_path}"])
    source = tuned / "01_build_dataset"
    val = load_groups(source, "val")
    fixed = [val[i] for i in sorted(run.np_rng(cfg.seed, "evaluate").permutation(len(val))[:cfg.eval_inputs])]
    policy = sr_pipelines.load_policy(tmp_path / "run" / "04_train_sr_grpo", torch.device("cpu"))
    on_disk, _ = STAGE.evaluate(policy, None, cfg, source=source, groups=fixed)
    assert on_disk["val_reward"] == pytest.approx(results["reward_end"], rel=1e-3)


@pytest.mark.parametrize("changes, best", [
    ({}, True), ({"val_lr_psnr": 29.7}, True), ({"val_lr_psnr": 29.6}, False), ({"val_gold": 0.49}, False),
    ({"val_reward": 5.4}, False), ({"val_lr_psnr": NAN}, False), ({"val_reward": NAN}, False)])
def test_two_vetoes_and_the_highest_score(changes, best):
    start = {"val_reward": 5.0, "val_lr_psnr": 30.0, "val_gold": 0.5}
    assert STAGE.is_best(settings(max_gold_drop=0.0), start | {"val_reward": 6.0} | changes,
                         start=start, best=start | {"val_reward": 5.5}, floor=29.7) is best
    low = start | {"val_lr_psnr": 20.0}                                 # a start below the floor: not to fall further
    assert STAGE.is_best(settings(), low | {"val_reward": 6.0}, start=low, best=low, floor=29.7)
    lower = low | {"val_reward": 6.0, "val_lr_psnr": 19.9}
    assert not STAGE.is_best(settings(), lower, start=low, best=low, floor=29.7)


def test_three_steps_without_a_finite_reward_end_the_run_and_name_the_checkpoint(toy_config, tuned, tmp_path, capsys,
                                                                                  monkeypatch):
    calls = []

    def broken(judge, cfg, lr, sr):
        calls.append(len(sr))
        judged, fidelity = hackable(judge, cfg, lr, sr)
        return (judged if len(calls) <= 3 else judged * NAN), fidelity          # evaluation, two steps, then NaN

    monkeypatch.setattr(STAGE, "score", broken)
    with pytest.raises(SystemExit) as stop:
        tune(toy_config, tuned, tmp_path / "run", "steps=9", "eval_every=9", "std_floor=0")
    message, = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error: "))
    folder = tmp_path / "run" / "04_train_sr_grpo"
    assert stop.value.code == 2 and "three steps in a row" in message and "no reward is finite" in message
    assert str(folder / "checkpoints" / "step_000004") in message
    assert [row["bad_rewards"] for row in rows_of(folder)] == [0, 0, 9, 9, 9]


def test_the_judge_and_the_base_policy_of_another_run(toy_config, tuned, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    shutil.copytree(tuned / "01_build_dataset", tmp_path / "own" / "01_build_dataset")
    (tmp_path / "own" / "01_build_dataset" / "base").rename(tmp_path / "base")      # as if base_steps had been 0
    manifest = tmp_path / "own" / "01_build_dataset" / "manifest.json"
    run.write_json(manifest, run.read_json(manifest) | {"weights": {}})
    judge = f"judge={tuned / '02_train_reward'}"
    with pytest.raises(SystemExit):
        tune(toy_config, tuned, tmp_path / "own", judge, "steps=0")
    assert "holds no policy: build the set with base_steps above 0" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "own" / "04_train_sr_grpo")
    results = tune(toy_config, tuned, tmp_path / "own", judge, "steps=0", f"model={tmp_path / 'base'}")
    assert results["reward_last"] == results["reward_start"] and results["psnr_start"] > 10
    assert results["reward_start"] == run.read_json(tuned / "04_train_sr_grpo/manifest.json")["results"]["reward_start"]
    sampler = run.read_json(tmp_path / "own" / "04_train_sr_grpo" / "base" / "sampler.json")
    assert (sampler["steps"], sampler["gain"]) == (4, 2)


def test_training_needs_no_ground_truth(toy_config, tuned, tmp_path, capsys):
    """hr is null first in the training split, then everywhere."""
    source, own = tuned / "01_build_dataset", tmp_path / "own"
    for part in ("lr", "hr", "candidates", "base"):
        own.joinpath("01_build_dataset").mkdir(parents=True, exist_ok=True)
        own.joinpath("01_build_dataset", part).symlink_to(source / part)
    for name in ("manifest.json", "config.yaml"):
        shutil.copy(source / name, own / "01_build_dataset")
    groups = [json.loads(line) for line in (source / "groups.jsonl").read_text().splitlines()]
    manifest = own / "01_build_dataset" / "manifest.json"
    truth = run.read_json(manifest)["results"]["lr_psnr_hr"]
    pairs = [[read_image(source / group[key]) for key in ("hr", "lr")] for group in groups if group["split"] != "test"]
    assert abs(truth - np.median([metrics.lr_psnr(hr, lr, 4) for hr, lr in pairs])) < 1e-3
    for blind in (["train"], ["train", "val"]):
        run.write_lines(own / "01_build_dataset" / "groups.jsonl",
                        [group | {"hr": None} if group["split"] in blind else group for group in groups])
        results = tune(toy_config, tuned, own, f"judge={tuned / '02_train_reward'}", "steps=1", "eval_every=1")
        rows = rows_of(own / "04_train_sr_grpo")
        assert rows[0]["grad_norm"] > 0 and results["reward_last"] == round(rows[0]["val_reward"], 4)
        if blind == ["train"]:                                          # all else is of validation images
            assert results["lr_psnr_floor"] == truth - 1
            whole = run.read_json(tuned / "04_train_sr_grpo" / "manifest.json")["results"]
            assert [results[key] for key in ("gold_start", "psnr_start")] == [whole["gold_start"], whole["psnr_start"]]
            shutil.rmtree(own / "04_train_sr_grpo")
            facts = run.read_json(manifest)
            run.write_json(manifest, facts | {"results": facts["results"] | {"lr_psnr_hr": None}})
    assert results["lr_psnr_floor"] is results["gold_start"] is results["psnr_last"] is None
    assert "guard and vetoes are off" in capsys.readouterr().out


if __name__ == "__main__" and "RANK" in os.environ:
    dist.init()
    check_that_ranks_skip_together()
    dist.finish()
