"""
The base policy of stage 01: training that was killed ends at the same bytes, and candidates that name their setting.

Run     python -m pytest tests/test_base_policy.py      # 10 s
"""
from pathlib import Path

import numpy as np
import pytest
import torch

from common import base_policy, run, sr_pipelines, sr_policy
from common.images import to_pixels, write_png
from common.sr_policy import draw_noise
from conftest import tree
from test_sr_policy import images, shrink, tiny_policy

CPU = torch.device("cpu")


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Path:
    """A stage-01 folder with 20 crops; training saves a checkpoint every two steps."""
    hr = images(20)
    for key, pictures in (("hr", hr), ("lr", shrink(hr))):
        (tmp_path / key).mkdir()
        for number, picture in enumerate(to_pixels(pictures)):
            write_png(tmp_path / key / f"{number}.png", picture)
    monkeypatch.setattr(base_policy, "SAVE_EVERY", 2)
    return tmp_path


def train(stage: Path, name: str) -> Path:
    base_policy.train(stage / name, stage, [str(i) for i in range(20)], steps=9, seed=0, device=CPU)
    return stage / name


class Killed(Exception):
    pass


@pytest.mark.parametrize("part, step", [("regressor", 2), ("base", 5)])
def test_killed_training_goes_on_to_the_same_bytes(stage, monkeypatch, part, step):
    whole = tree(train(stage, "whole"))
    assert {"config.json", "regressor.safetensors", "sampler.json", "early/sampler.json"} <= set(whole)
    assert not any("checkpoints" in name for name in whole)

    def kill(*args, step, loss):
        if step == at:
            raise Killed
        return loss(*args)
    at, losses = step, {"regressor": base_policy.regressor_loss, "base": base_policy.v_loss}
    steps = iter(range(99))
    with monkeypatch.context() as patch:
        name = {"regressor": "regressor_loss", "base": "v_loss"}[part]
        patch.setattr(base_policy, name, lambda *args, **kwargs: kill(
            *args, step=next(steps), loss=lambda *a: losses[part](*a, **kwargs)))
        with pytest.raises(Killed):
            train(stage, "killed")
    assert not (stage / "killed" / "sampler.json").exists()
    assert tree(train(stage, "killed")) == whole


def test_a_candidate_is_a_sample_at_the_setting_that_its_record_names(stage):
    folder, lr = train(stage, "base"), to_pixels(shrink(images(1, seed=3)))[0]
    drawn = [base_policy.candidate(folder, lr, np.random.default_rng(seed)) for seed in range(20)]
    assert len({record["method"] for _, record in drawn}) == 3 and all(image.shape == (32, 32, 3) for image, _ in drawn)
    seen = sr_pipelines.load_policy(folder, CPU).observe(torch.from_numpy(lr).permute(2, 0, 1)[None] / 255)
    for seed, (image, record) in enumerate(drawn):
        rng = np.random.default_rng(seed)
        policy = sr_pipelines.load_policy(folder / "early" if rng.random() < 0.25 else folder, CPU)
        steps = int(rng.choice([1, 2, 5]))
        if rng.random() < 0.2:
            assert record == {"method": "regressor"}
            assert np.array_equal(to_pixels(policy.mean(seen).clamp(0, 1))[0], image)
            continue
        gain, spread = float(rng.uniform(0.1, 1)), rng.uniform(0.7, 1.2)
        assert (record["steps"], record["gain"]) == (steps, round(gain, 3))
        noise = spread * draw_noise([(int(rng.integers(2**62)), "candidate")], (16, 8, 8), CPU)
        policy = sr_policy.with_sampling(policy, steps=steps, gain=gain)
        assert np.array_equal(to_pixels(sr_policy.restore(policy, seen, noise))[0], image)


@torch.no_grad()
def test_the_loss_is_the_error_of_v_at_stratified_noise_levels():
    """A row's time is drawn from its own part of the schedule, so a rank's rows alone give the same."""
    policy, hr = tiny_policy(), images(base_policy.BATCH, seed=2)
    lr, count = shrink(hr), base_policy.BATCH
    rows = [float(base_policy.v_loss(policy, lr[r:r + 1], hr[r:r + 1], seed=0, step=3, rows=[r])) for r in range(count)]
    whole = base_policy.v_loss(policy, lr, hr, seed=0, step=3, rows=list(range(count)))
    assert float(whole) == pytest.approx(sum(rows) / count, rel=1e-4)
    seen, shift = policy.observe(lr[5:6]), torch.rand(count, generator=run.generator(0, "base time", 3))
    clean, noise = policy.encode(hr[5:6], seen), draw_noise([(0, "base", 3, 5)], (16, 8, 8), CPU)
    time = int((5 + shift[5]) / count * 1000)
    a, b = policy.signal[time].sqrt(), (1 - policy.signal[time]).sqrt()
    error = policy.velocity(a * clean + b * noise, torch.tensor([time]), seen) - (a * noise - b * clean)
    assert rows[5] == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_a_time_that_float32_rounds_to_the_end_is_the_last_one(monkeypatch):
    hr, rows = images(base_policy.BATCH), list(range(base_policy.BATCH))
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), 1 - 2 ** -24))
    loss = base_policy.v_loss(tiny_policy(), shrink(hr), hr, seed=0, step=0, rows=rows)
    assert 0 < float(loss.detach()) < 100
