"""
Published latent diffusion models as policies: small random models of diffusers' own classes, saved and loaded.

Run     python -m pytest tests/test_sr_pipelines.py        # 2 min, of which stages 01 and 02 take one
"""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, VQModel
from peft import LoraConfig, get_peft_model

from common import grpo, run, sr_pipelines, sr_policy
from common.config import load_config
from common.images import read_image, to_pixels, write_png
from common.sr_pipelines import LatentPolicy, Published
from common.training import trainable
from conftest import ROOT, load_stage, run_stage
from test_sources import save_ldm, save_upscaler

KINDS = ("ldm", "upscaler")
STEPS, CPU = 4, torch.device("cpu")
# as the two published models have it; half of the tests' models sample with "trailing", half with "leading"
SCHEDULES = {"ldm": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155, "clip_sample": False,
                     "prediction_type": "epsilon", "timestep_spacing": "trailing"},
             "upscaler": {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 1,
                          "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}}


def save_model(kind: str, folder: Path) -> Path:
    """A small random pipeline on disk, with the schedule of the published one."""
    (save_ldm if kind == "ldm" else save_upscaler)(folder)
    model = folder if kind == "ldm" else folder / "model"
    DDIMScheduler(**SCHEDULES[kind]).save_pretrained(model / "scheduler")
    if kind == "ldm":               # codes as far apart as latents are, or rounding would decide which one is nearest
        vqvae = VQModel.from_pretrained(model / "vqvae")
        count = vqvae.config.num_vq_embeddings
        with torch.no_grad():
            vqvae.quantize.embedding.weight.mul_(count)                 # drawn from -1/count .. 1/count
            vqvae.quantize.embedding.weight[:count // 2] *= 40
        vqvae.save_pretrained(model / "vqvae")
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, folder / kind) for kind in KINDS}


def load(kind: str, model: Path, folder: Path, **changes) -> LatentPolicy:
    sampler = {"policy": kind, "model": str(model), "scale": 4, "steps": STEPS, "noise_level": 20} | changes
    sr_pipelines.point_to(folder, Published(**sampler))
    return sr_pipelines.load_policy(folder, CPU)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def policy(kind, models, tmp_path) -> LatentPolicy:
    return load(kind, models[kind], tmp_path / "before")


def pictures(count: int = 3, size: int = 16) -> torch.Tensor:
    """LR [count, 3, size, size] in 0..1: smooth, with some noise."""
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=run.generator(0, "coarse"))
    fine = torch.rand(count, 3, size, size, generator=run.generator(0, "fine"))
    return 0.8 * sr_policy.upsample(coarse, 4).clamp(0, 1) + 0.2 * fine


def keys(count: int = 3) -> list[tuple]:
    return [(0, "test", row) for row in range(count)]


def noise(policy: LatentPolicy, width: int = 0) -> torch.Tensor:
    return sr_policy.draw_noise(keys(), (1 + width, policy.channels, 16, 16), CPU)


def add_lora(policy: LatentPolicy, moved: float = 0.0) -> LatentPolicy:
    torch.manual_seed(1)
    policy.unet = get_peft_model(policy.unet, LoraConfig(r=4, target_modules=sr_pipelines.LORA_LAYERS))
    with torch.no_grad():
        for p in trainable(policy.unet).values():
            p.add_(moved)
    return policy


def stock(kind: str, model: Path, lr: torch.Tensor, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """SR of the unchanged diffusers pipeline with DDIM, eta 0, and what it drew: {"sr", "seen", "first"}."""
    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    shape, again = lr.shape, torch.Generator().manual_seed(3)
    one = {"num_inference_steps": steps, "eta": 0.0, "generator": torch.Generator().manual_seed(3)}
    if kind == "ldm":
        seen, first = 2 * lr - 1, torch.randn(shape, generator=again)
        images = pipeline(image=seen, output_type="np", **one).images
    else:
        seen = pipeline.low_res_scheduler.add_noise(2 * lr - 1, torch.randn(shape, generator=again), torch.tensor([20]))
        first = torch.randn(len(lr), 4, *shape[2:], generator=run.generator(0, "first"))
        images = pipeline([""] * len(lr), image=lr, guidance_scale=1.0, noise_level=20, latents=first,
                          output_type="np", **one).images
    return {"sr": torch.from_numpy(images).permute(0, 3, 1, 2), "seen": seen, "first": first}


# sampling --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", [
    {}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}, {"prediction_type": "epsilon"},
    {"clip_sample": True}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                            "timestep_spacing": "trailing"}], ids=str)
def test_restore_is_the_pipeline_of_diffusers(kind, models, tmp_path, schedule):
    shutil.copytree(models[kind], tmp_path / "model")
    DDIMScheduler(**SCHEDULES[kind] | schedule).save_pretrained(tmp_path / "model" / "scheduler")
    expected = stock(kind, tmp_path / "model", pictures())
    policy = load(kind, tmp_path / "model", tmp_path / "before")
    found = sr_policy.restore(policy, expected["seen"], expected["first"])
    assert found.shape == (3, 3, 64, 64) and found.std() > 0.01
    assert torch.allclose(found, expected["sr"], atol=1e-4)


def test_what_the_policy_sees_of_lr(policy, kind, models):
    lr = pictures()
    seen = policy.observe(lr, keys())
    if kind == "ldm":
        assert torch.equal(seen, 2 * lr - 1)
        return
    drawn = sr_policy.draw_noise([(*key, "lr") for key in keys()], (3, 16, 16), CPU)
    scheduler = sr_pipelines.load_pipeline(policy.sampler).low_res_scheduler
    assert torch.allclose(seen, scheduler.add_noise(2 * lr - 1, drawn, torch.tensor([20])), atol=1e-6)
    assert torch.equal(policy.observe(lr[1:], keys()[1:]), seen[1:])
    assert not policy.text.requires_grad and policy.text.shape == (1, 16, 16)       # the empty prompt, once


@pytest.mark.parametrize("start", [0, 1])
def test_the_ratio_of_an_untouched_policy_is_one(policy, start):
    seen = policy.observe(pictures(), keys())
    rollout = sr_policy.sample(policy, seen, noise(policy, 1), start=start)
    assert torch.equal(rollout.seen, seen)
    policy.train()
    assert torch.equal(sr_policy.log_prob(rollout, *sr_policy.replay(policy, rollout)), rollout.logp)
    rollout = sr_policy.sample(policy, seen, noise(policy, 2), start=start)     # replayed in another batch
    ratio = (sr_policy.log_prob(rollout, *sr_policy.replay(policy, rollout)) - rollout.logp).exp()
    assert ratio.shape == (3, 2) and (ratio - 1).abs().max() < 1e-5


@pytest.mark.parametrize("eta", [0.5, 0.999])                 # at 1, diffusers may take the root of -1e-8
def test_mean_std_and_log_prob_of_a_step_are_those_of_diffusers(policy, kind, eta):
    scheduler = DDIMScheduler(**SCHEDULES[kind])
    scheduler.set_timesteps(STEPS)
    assert policy.times.tolist() == scheduler.timesteps.tolist()
    seen, x, drawn = policy.observe(pictures(), keys()), noise(policy)[:, 0], noise(policy, 1)[:, 1]
    for index, time in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = policy.output(x, time.repeat(3), seen)
            mean, std = sr_policy.step(policy, x, torch.full((3,), index), seen, eta=eta)
        zero, one, after = (scheduler.step(output, time, x, eta=eta, variance_noise=z).prev_sample
                            for z in (torch.zeros_like(x), torch.ones_like(x), drawn))
        assert torch.allclose(mean, zero, atol=1e-5)
        assert torch.allclose(std.expand_as(x), one - zero, atol=1e-5)
        if index < STEPS - 1:
            logp = grpo.gaussian_logp(after, mean, std)
            expected = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1)
            assert torch.allclose(logp, expected, atol=1e-5)
    rollout = sr_policy.sample(policy, seen, torch.stack([x, drawn], 1), start=0, eta=eta)
    expected = scheduler.step(policy.output(x, policy.times[:1].repeat(3), seen), scheduler.timesteps[0], x, eta=eta,
                              variance_noise=drawn).prev_sample
    assert torch.allclose(rollout.latents[:, 1], expected, atol=1e-5)


def test_batch_and_neighbors_change_nothing(policy):
    seen, drawn = policy.observe(pictures(), keys()), noise(policy, 2)
    together = sr_policy.sample(policy, seen, drawn, start=1)
    alone = [sr_policy.sample(policy, seen[i:i + 1], drawn[i:i + 1], start=1) for i in range(3)]
    assert (together.images - torch.cat([one.images for one in alone])).abs().max() < 1e-4
    assert (together.logp - torch.cat([one.logp for one in alone])).abs().max() < 1e-5


def test_text_and_noise_level_are_told(models, tmp_path):
    policy = load("upscaler", models["upscaler"], tmp_path / "before")
    seen, first = policy.observe(pictures(), keys()), noise(policy)[:, 0]
    before = policy.output(first, policy.times[:1].repeat(3), seen)
    other = load("upscaler", models["upscaler"], tmp_path / "other", noise_level=200)
    assert not torch.allclose(other.output(first, policy.times[:1].repeat(3), seen), before, atol=1e-3)
    assert (other.observe(pictures(), keys()) - seen).std() > 0.05
    told = load("upscaler", models["upscaler"], tmp_path / "told", prompt="a b")
    expected, _ = sr_pipelines.load_pipeline(policy.sampler).encode_prompt("a b", "cpu", 1, False)
    assert torch.equal(told.text, expected) and not torch.equal(told.text, policy.text)
    assert run.read_json(tmp_path / "told" / "sampler.json")["prompt"] == "a b"
    policy.text += 1
    assert not torch.allclose(policy.output(first, policy.times[:1].repeat(3), seen), before, atol=1e-4)


# GRPO ------------------------------------------------------------------------------------------------------

def moved_by_two_updates(stage, policy, reference, cfg, lr) -> set[str]:
    """Names of the parameters that two steps of GRPO on two LR images, three samples each, have changed."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(policy.unet).values(), lr=1e-2)
    for step in range(2):
        rollouts = stage.roll_out(policy, cfg, lr, ids=["a", "b"], step=step)
        seen = torch.cat([rollout.seen for rollout in rollouts])
        assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3])      # shared by the group
        assert stage.check_ratio(policy, cfg, rollouts) < 1e-5
        row = stage.learn(policy, reference, cfg, rollouts=rollouts, optimizer=optimizer,
                           advantages=torch.tensor([1.0, -1.0, 0.0] * 2))
        assert row["ratio_error"] < 1e-5 and row["grad_norm"] > 0
        assert (row["ref_kl"] > 0) == (step > 0)
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("rank", [0, 4])
def test_an_update_moves_trained_weights_only(kind, models, tmp_path, rank):
    stage, lr = load_stage("04"), pictures(2)
    load(kind, models[kind], tmp_path / "before")
    cfg = stage.Config(run="unused", policy=kind, model=str(models[kind]), denoise_steps=STEPS, lora_rank=rank,
                       inputs_per_step=2, samples_per_input=3, samples_per_gpu=4, window_width=2)
    policy, reference = stage.with_reference(cfg, sr_pipelines.load_policy(tmp_path / "before", CPU))
    assert (policy is reference) == bool(rank)
    assert policy.vae is reference.vae                          # only the UNet is ever held twice
    moved = moved_by_two_updates(stage, policy, reference, cfg, lr)
    assert moved and all("lora" in name if rank else name.startswith("unet.") for name in moved)
    assert not any(p.requires_grad for name, p in policy.named_parameters() if not name.startswith("unet."))


# disk ------------------------------------------------------------------------------------------------------

def test_saved_and_loaded_by_plain_diffusers_it_is_the_tuned_model(policy, kind, models, tmp_path):
    expected = stock(kind, models[kind], pictures())
    tuned = sr_policy.restore(add_lora(policy, 0.1), expected["seen"], expected["first"])
    assert not torch.allclose(tuned, expected["sr"], atol=1e-3)
    with sr_policy.adapter_off(policy):
        again = sr_policy.restore(policy, expected["seen"], expected["first"])
        assert torch.allclose(again, expected["sr"], atol=1e-4)
    policy.save(tmp_path / "policy")
    assert torch.allclose(stock(kind, tmp_path / "policy", pictures())["sr"], tuned, atol=1e-4)
    moved = (tmp_path / "policy").rename(tmp_path / "moved")
    loaded = sr_pipelines.load_policy(moved, CPU)
    assert torch.allclose(sr_policy.restore(loaded, expected["seen"], expected["first"]), tuned, atol=1e-4)
    names = json.loads((moved / "model_index.json").read_text())
    assert names["_class_name"] == sr_pipelines.PIPELINES[kind] and names["scheduler"][1] == "DDIMScheduler"
    assert not list(moved.rglob("*.bin")) and not any(p.requires_grad for p in loaded.parameters())


def test_the_readme_loads_the_lora_of_a_run(models, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    code, = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_lora_weights" in block)
    assert "common" not in code and len(code.splitlines()) == 5
    policy = add_lora(load("upscaler", models["upscaler"], tmp_path / "before"), 0.1)
    policy.save(tmp_path / "policy")
    write_png(tmp_path / "lr.png", to_pixels(pictures(1))[0])
    monkeypatch.chdir(tmp_path)
    shown = {}
    for name, model, lora in (("base", models["upscaler"], None), ("lora", models["upscaler"], tmp_path / "policy"),
                              ("merged", tmp_path / "policy", None)):
        lines = [line for line in code.splitlines() if lora or "load_lora" not in line]
        text = "\n".join(lines).replace("stabilityai/stable-diffusion-x4-upscaler", str(model))
        torch.manual_seed(0)
        exec(text.replace("runs/full/04_train_sr_grpo/policy", str(lora)).replace(".to(\"cuda\")", ""), {})
        shown[name] = read_image(tmp_path / "sr.png").astype(int)
    assert shown["lora"].shape == (64, 64, 3) and abs(shown["lora"] - shown["merged"]).max() <= 1
    assert abs(shown["lora"] - shown["base"]).mean() > 1


def test_weights_in_half_precision_are_read_as_float32(kind, models, tmp_path):
    sampler = Published(kind, str(models[kind]), 4, STEPS, 20)
    sr_pipelines.load_pipeline(sampler).to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert run.read_json(tmp_path / "half" / "model_index.json")["_class_name"] == sr_pipelines.PIPELINES[kind]
    policy = load(kind, tmp_path / "half", tmp_path / "before")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    sr = sr_policy.restore(policy, policy.observe(pictures(), keys()), noise(policy)[:, 0])
    assert sr.dtype == torch.float32 and torch.isfinite(sr).all()


@pytest.mark.parametrize("wrong, message", [
    ({"policy": "upscaler"}, "is a LDMSuperResolutionPipeline"), ({"scale": 2}, "enlarges by 4"),
    ({"steps": 7}, "denoise_steps=7 should divide"), ({"model": "nowhere/at-all"}, "cannot be loaded by diffusers")])
def test_a_model_that_cannot_be_the_policy_is_one_line(models, tmp_path, capsys, wrong, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        load(**{"kind": wrong.pop("policy", "ldm"), "model": wrong.pop("model", models["ldm"])},
             folder=tmp_path / "before", **wrong)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_noise_level_a_schedule_and_a_size_that_do_not_fit(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("upscaler", models["upscaler"], tmp_path / "before", noise_level=351)
    assert "noise_level up to 350, not 351" in capsys.readouterr().err
    shutil.copytree(models["ldm"], tmp_path / "model")
    DDIMScheduler(timestep_spacing="linspace").save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(SystemExit):
        load("ldm", tmp_path / "model", tmp_path / "before")
    assert "timestep_spacing linspace" in capsys.readouterr().err
    policy = load("ldm", models["ldm"], tmp_path / "before")
    with pytest.raises(SystemExit):
        policy.observe(torch.zeros(1, 3, 16, 15), keys(1))
    assert "multiples of 2 px, these are 15 x 16" in capsys.readouterr().err


def test_pickled_weights_are_refused(models, tmp_path, capsys):
    shutil.copytree(models["ldm"], tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SystemExit):
        load("ldm", tmp_path / "model", tmp_path / "before")
    assert "safetensors only" in capsys.readouterr().err


# the stages ------------------------------------------------------------------------------------------------

def tune(config: Path, toy_run: Path, target: Path, *settings: str) -> Path:
    """04 in a run folder that shares the finished stages of toy_run."""
    target.mkdir(exist_ok=True)
    for stem in ("01_build_dataset", "02_train_reward"):
        if not (target / stem).exists():
            (target / stem).symlink_to(toy_run / stem)
    done = run_stage("04", config, f"run={target}", "steps=2", "eval_every=1", "max_lr_psnr_drop=100",
                     "max_heldout_drop=1", *settings)
    assert done.returncode == 0, done.stderr
    return target / "04_train_sr_grpo"


def test_04_and_05_tune_and_compare_a_published_model(kind, models, toy_config, toy_run, tmp_path):
    settings = (f"policy={kind}", f"model={models[kind]}", "lr=0.02")
    folder = tune(toy_config, toy_run, tmp_path / "run", *settings)
    results = run.read_json(folder / "manifest.json")["results"]
    assert results["ratio_error_max"] < 1e-5 and results["reward_end"] >= results["reward_start"]
    assert [path.name for path in (folder / "cold_start").iterdir()] == ["sampler.json"]
    assert stock(kind, folder / "policy", pictures())["sr"].shape == (3, 3, 64, 64)

    done = run_stage("05", toy_config, f"run={tmp_path / 'run'}", "seeds_per_image=1")
    assert done.returncode == 0, done.stderr
    results = run.read_json(tmp_path / "run" / "05_eval_sr" / "manifest.json")["results"]
    assert np.isfinite(results["reward_base"]) and np.isfinite(results["reward_tuned"])

    written = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert len(written) >= 4                                    # as if it was killed while saving the last step
    shutil.rmtree(folder / "policy")
    (folder / "manifest.json").unlink()
    (folder / "checkpoints" / "step_000002").rename(folder / "checkpoints" / "step_000002.tmp")
    tune(toy_config, toy_run, tmp_path / "run", *settings)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} == written


@pytest.mark.parametrize("settings, message", [
    (["policy=ldm"], "needs one"), (["model=a/b"], "needs none"), (["policy=x"], "should be pixel, ldm, upscaler, sd3"),
    (["controlnet=a/b"], "policy=sd3 alone"), (["prompt=a"], "only policy=upscaler and sd3"),
    (["sampler=cps", "eta=1.5"], "at most 1 for ddim"),
    (["sampler=x"], "should be ddim, sde, cps"),
    (["denoise_steps=0"], "denoise_steps=0: should be at least 1"), (["eval_every=0"], "eval_every=0: should be at"),
    (["kl_weight=-1"], "kl_weight=-1.0: should be at least 0"), (["lr=0"], "0.0: should be above 0"),
    (["ema=1"], "ema=1.0: should be from 0 to below 1"), (["channels="], "channels=[]: each should be")])
def test_04_refuses_settings_that_cannot_work(toy_config, tmp_path, capsys, settings, message):
    stage = load_stage("04")
    with pytest.raises(SystemExit):
        load_config(stage.Config, stage.__file__, [str(toy_config), f"run={tmp_path}", *settings])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
