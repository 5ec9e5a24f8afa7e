"""
Published models as policies: small random models of diffusers' own classes, saved and loaded, against their pipelines.

Run     python -m pytest tests/test_sr_pipelines.py        # 1 min
"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, VQModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # torchrun starts this file, see the end
import gpu_check
from common import dist, restoring, run, sr_pipelines, sr_policy
from common.images import to_pixels
from common.sr_pipelines import PIPELINES, Published
from common.training import adapter_off, trainable
from conftest import load_stage, run_stage
from test_sources import save_ldm, save_upscaler
from test_sr_policy import add_lora, tiny_policy

KINDS = tuple(PIPELINES)
STEPS, CPU = 4, torch.device("cpu")
# as the two published models have it: one samples with "trailing", one with "leading"
SCHEDULES = {"ldm": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155, "clip_sample": False,
                     "prediction_type": "epsilon", "timestep_spacing": "trailing"},
             "upscaler": {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 1,
                          "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}}


def save_sd3(folder: Path, t5: bool = True) -> None:
    """A small random SD3 in folder/model, its ControlNet in folder/controlnet."""
    from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel,
                              T5TokenizerFast)
    torch.manual_seed(0)
    (folder / "words").mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", *(c for c in "abc"), *(f"{c}</w>" for c in "abc")]
    (folder / "words" / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    shape = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2,
             "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
             "pos_embed_max_size": 16, "sample_size": 8}
    text = CLIPTextConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, projection_dim=16,
                          num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
                          pad_token_id=1)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=16)
    vae = AutoencoderKL(block_out_channels=[8, 8, 16], in_channels=3, out_channels=3, latent_channels=4,
                        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                        norm_num_groups=8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                        use_post_quant_conv=False)
    third = {"text_encoder_3": None, "tokenizer_3": None}
    if t5:
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
        third = {"tokenizer_3": T5TokenizerFast(vocab=pieces, extra_ids=0), "text_encoder_3": T5EncoderModel(T5Config(
            vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))}
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(num_layers=3, **shape), vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModelWithProjection(text), text_encoder_2=CLIPTextModelWithProjection(text),
        **third).save_pretrained(folder / "model")
    controlnet = SD3ControlNetModel(num_layers=1, **shape)
    with torch.no_grad():                               # a new one is zero: it would add nothing
        for p in [*controlnet.controlnet_blocks.parameters(), *controlnet.pos_embed_input.parameters()]:
            p.normal_(0, 0.3)
    controlnet.save_pretrained(folder / "controlnet")


def save_model(kind: str, folder: Path) -> dict[str, str]:
    """A small random pipeline on disk, with the schedule of the published one: the settings that name it."""
    if kind == "sd3":
        save_sd3(folder)
        return {"model": str(folder / "model"), "controlnet": str(folder / "controlnet")}
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
    return {"model": str(model)}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, folder / kind) for kind in KINDS}


def test_what_a_gpu_would_be_asked_starts_on_any_machine(tmp_path, capsys):
    results = gpu_check.main("tiny", out=tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text()) | {"seconds": results["seconds"]}
    assert results["02"]["grad_norm"] == results["02"]["grad_norm_resumed"] > 0 and results["02"]["ratio_max"] == 1
    assert results["shared prefixes"]["gradient_cosine"] > 0.99 and results["04"]["grad_norm"] > 0
    assert "images_per_second_one_at_a_time" in capsys.readouterr().out


def load(kind: str, folder: Path, **settings):
    sampler = {"scale": 4, "steps": STEPS, "noise_level": 20} | settings
    sr_pipelines.point_to(folder, Published(kind, **sampler))
    return sr_pipelines.load_policy(folder, CPU)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def policy(kind, models, tmp_path):
    return load(kind, tmp_path / "before", **models[kind])


def pictures(kind: str, count: int = 3) -> torch.Tensor:
    """LR [count, 3, side, side] in 0..1: smooth, with some noise."""
    side = 8 if kind == "sd3" else 16
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=run.generator(0, "coarse"))
    fine = torch.rand(count, 3, side, side, generator=run.generator(0, "fine"))
    return 0.8 * sr_policy.upsample(coarse, 4).clamp(0, 1) + 0.2 * fine


def keys(count: int = 3) -> list[tuple]:
    return [(0, "test", row) for row in range(count)]


def noise(policy, width: int = 0) -> torch.Tensor:
    side = 8 if policy.kind == "sd3" else 16
    return sr_policy.draw_noise(keys(), (1 + width, policy.channels, side, side), CPU)


def test_cuda_may_round_products_of_published_models_alone(kind, models, tmp_path):
    tiny_policy().save(tmp_path / "small")
    dist.init()
    sr_pipelines.load_policy(tmp_path / "small", CPU)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    load(kind, tmp_path / "before", **models[kind])
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


def stock_pipeline(kind: str, model: str, controlnet: str = "", **parts):
    """The unchanged pipeline of diffusers."""
    from diffusers import DiffusionPipeline, SD3ControlNetModel, StableDiffusion3ControlNetPipeline
    if controlnet:
        parts["controlnet"] = SD3ControlNetModel.from_pretrained(controlnet)
    loader = StableDiffusion3ControlNetPipeline if kind == "sd3" else DiffusionPipeline
    pipeline = loader.from_pretrained(model, use_safetensors=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(kind: str, model: str, controlnet: str = "", *, lora: Path | None = None, prompt: str = "",
          **parts) -> dict[str, torch.Tensor]:
    """SR of the unchanged diffusers pipeline (ldm, upscaler: with DDIM, eta 0), and what it drew: sr, seen, first."""
    lr, pipeline = pictures(kind), stock_pipeline(kind, model, controlnet, **parts)
    if lora:
        pipeline.load_lora_weights(lora)
    if kind == "sd3":
        return stock_sd3(pipeline, lr, prompt)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    again = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": STEPS, "eta": 0.0, "output_type": "np",
                "generator": torch.Generator().manual_seed(3)}
    if kind == "ldm":
        seen, first = 2 * lr - 1, torch.randn(lr.shape, generator=again)
        images = pipeline(image=seen, **settings).images
    else:
        drawn = torch.randn(lr.shape, generator=again)
        seen = pipeline.low_res_scheduler.add_noise(2 * lr - 1, drawn, torch.tensor([20]))
        first = torch.randn(len(lr), 4, *lr.shape[2:], generator=run.generator(0, "first"))
        images = pipeline([prompt] * len(lr), image=lr, guidance_scale=1.0, noise_level=20, latents=first,
                          **settings).images
    return {"sr": torch.from_numpy(images).permute(0, 3, 1, 2), "seen": seen, "first": first}


def stock_sd3(pipeline, lr: torch.Tensor, prompt: str) -> dict[str, torch.Tensor]:
    """One image at a time, without guidance."""
    large = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
    first, images, seen = sr_policy.draw_noise(keys(), (4, 8, 8), CPU), [], []
    shift = 0 if pipeline.controlnet.config.force_zeros_for_pooled_projection else 0.0609
    for i, image in enumerate(large):
        torch.manual_seed(i)                            # the pipeline encodes with noise of torch's own generator
        images.append(pipeline(prompt, control_image=2 * image[None] - 1, height=32, width=32, guidance_scale=1.0,
                               num_inference_steps=STEPS, latents=first[i:i + 1], output_type="pt").images)
        torch.manual_seed(i)
        seen.append((pipeline.vae.encode(2 * image[None] - 1).latent_dist.sample() - shift) * 1.5305)
    return {"sr": torch.cat(images), "seen": torch.cat(seen).detach(), "first": first}


# sampling --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, schedule", [
    ("ldm", {}), ("upscaler", {}), ("ldm", {"timestep_spacing": "leading"}), ("ldm", {"clip_sample": True}),
    ("upscaler", {"prediction_type": "epsilon"}),
    ("upscaler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})], ids=str)
def test_restore_is_the_pipeline_of_diffusers(kind, schedule, models, tmp_path):
    shutil.copytree(models[kind]["model"], tmp_path / "model")
    DDIMScheduler(**SCHEDULES[kind] | schedule).save_pretrained(tmp_path / "model" / "scheduler")
    prompt = "a b" if kind == "upscaler" else ""
    expected = stock(kind, str(tmp_path / "model"), prompt=prompt)
    policy = load(kind, tmp_path / "before", model=str(tmp_path / "model"), prompt=prompt)
    sr = sr_policy.restore(policy, expected["seen"], expected["first"])
    assert sr.shape == (3, 3, 64, 64) and sr.std() > 0.01 and torch.allclose(sr, expected["sr"], atol=1e-4)


@pytest.mark.parametrize("pooled, t5, shared", [(True, True, False), (False, False, False), (False, True, True)])
def test_restore_is_the_sd3_pipeline_of_diffusers(models, tmp_path, pooled, t5, shared):
    """With the ControlNet's kinds: zeros or the text as pooled projection, a position embedding of its own or not."""
    from diffusers import SD3ControlNetModel
    settings, parts = dict(models["sd3"]), {}
    if not t5:
        save_sd3(tmp_path / "no_t5", t5=False)
        settings["model"], parts = str(tmp_path / "no_t5" / "model"), {"text_encoder_3": None, "tokenizer_3": None}
    if not pooled:
        network = SD3ControlNetModel.from_pretrained(settings["controlnet"])
        network.register_to_config(force_zeros_for_pooled_projection=False, use_pos_embed=not shared)
        network.pos_embed = None if shared else network.pos_embed
        network.save_pretrained(tmp_path / "controlnet")
        settings["controlnet"] = str(tmp_path / "controlnet")
    expected = stock("sd3", **settings, **parts, prompt="a b c")
    policy = load("sd3", tmp_path / "before", **settings, prompt="a b c")
    sr = sr_policy.restore(policy, expected["seen"], expected["first"])
    assert sr.shape == (3, 3, 32, 32) and sr.std() > 0.01 and torch.allclose(sr, expected["sr"], atol=1e-4)
    assert (sr_policy.restore(policy, 0 * expected["seen"], expected["first"]) - sr).abs().max() > 1e-3
    large = torch.nn.functional.interpolate(pictures("sd3"), scale_factor=4, mode="bicubic", antialias=True)
    with torch.no_grad():
        code = policy.vae.encode(2 * large.clamp(0, 1) - 1).latent_dist
    drawn = sr_policy.draw_noise([(*key, "lr") for key in keys()], (4, 8, 8), CPU)
    control = 1.5305 * (code.mean + code.std * drawn - (0 if pooled else 0.0609))
    assert torch.allclose(policy.observe(pictures("sd3"), keys()), control, atol=1e-4)
    policy = load("sd3", tmp_path / "empty", **settings)                # the text matters, as the ControlNet does
    assert not torch.allclose(sr_policy.restore(policy, expected["seen"], expected["first"]), sr, atol=1e-4)


def test_by_default_is_what_diffusers_does(models, kind):
    """With a text and guidance, though the pipeline is handed embeddings; its noise is that of the key alone."""
    prompt, lr, pipeline = "" if kind == "ldm" else "a b", pictures(kind)[:1], stock_pipeline(kind, **models[kind])
    restore = sr_pipelines.by_default(Published(kind, scale=4, steps=STEPS, prompt=prompt, **models[kind]), CPU)
    sr = restore(lr, (0, "a"))
    assert np.array_equal(restore(lr, (0, "a")), sr) and not np.array_equal(restore(lr, (0, "b")), sr)
    if kind == "sd3":
        large = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
        settings = {"prompt": prompt, "control_image": 2 * large - 1, "height": 32, "width": 32}
    else:
        settings = {"image": 2 * lr - 1} if kind == "ldm" else {"image": lr, "prompt": prompt}
    torch.manual_seed(run.stable_seed(0, "a"))
    expected = pipeline(**settings, output_type="np").images[0]
    assert np.abs(sr - 255 * expected).max() <= 1
    if kind != "ldm":                                                   # guidance acts: without it, another image
        torch.manual_seed(run.stable_seed(0, "a"))
        assert np.abs(sr - 255 * pipeline(**settings, guidance_scale=1.0, output_type="np").images[0]).max() > 1


def test_what_the_policy_sees_of_lr(policy, kind, capsys):
    lr = (pictures(kind) * 255).round() / 255
    seen = policy.observe(lr, keys())
    assert torch.allclose(policy.observe(lr[1:], keys()[1:]), seen[1:], atol=1e-5)      # whatever the batch is
    drawn = sr_policy.draw_noise([(*key, "lr") for key in keys()], seen.shape[1:], CPU)
    if kind == "ldm":
        assert torch.equal(seen, 2 * lr - 1)
    elif kind == "upscaler":
        scheduler = sr_pipelines.load_pipeline(policy.sampler).low_res_scheduler
        assert torch.allclose(seen, scheduler.add_noise(2 * lr - 1, drawn, torch.tensor([20])), atol=1e-6)
    else:
        large = [np.array(Image.fromarray(image).resize((32, 32), Image.BICUBIC)) for image in to_pixels(lr)]
        with torch.no_grad():
            code = policy.vae.encode(torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        expected = 1.5305 * (code.mean + code.std * drawn)
        assert (seen - expected).abs().mean() < 0.02 * expected.std() and seen.std() > 0.5  # Pillow rounds to 8 bits
    with pytest.raises(SystemExit):
        policy.observe(torch.zeros(1, 3, 16, 15), keys(1))
    assert "multiples of 2 px" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", sr_policy.SAMPLERS)
def test_a_rollout_is_replayed_with_ratio_one_whatever_the_batch(policy, kind, sampler):
    seen, drawn = policy.observe(pictures(kind), keys()), noise(policy, 2)
    rollout = sr_policy.sample(policy, seen, drawn, start=1, eta=0.7, sampler=sampler)
    alone = [sr_policy.sample(policy, seen[i:i + 1], drawn[i:i + 1], start=1, eta=0.7, sampler=sampler) for i in (0, 2)]
    assert (rollout.images[::2] - torch.cat([one.images for one in alone])).abs().max() < 1e-4
    policy.train()
    actions = sr_policy.replay(policy, rollout)
    assert (sr_policy.log_prob(rollout, actions) - rollout.logp).abs().max() < 1e-5
    (_, mean, std), = actions
    expected = torch.distributions.Normal(mean, std).log_prob(rollout.latents[:, 1:].flatten(0, 1))
    assert torch.allclose(rollout.logp, expected.flatten(1).mean(1).view(3, 2), atol=1e-5)


def test_an_image_of_any_size_is_restored_in_tiles(policy, kind):
    lr, key = (pictures(kind)[0].permute(1, 2, 0) * 255).byte().numpy(), (0, "folder", "a.png")
    seen = policy.observe(torch.from_numpy(lr).permute(2, 0, 1)[None].float() / 255, [key])
    first = sr_policy.draw_noise([key], (policy.channels, *seen.shape[-2:]), CPU)
    whole = restoring.restore(policy, lr, key, tile=64, overlap=0, batch=1)
    assert torch.equal(whole, sr_policy.restore(policy, seen, first))
    large = np.tile(lr, (5, 7, 1))[:37, :50]                            # sd3: over pos_embed_max_size, if at once
    image = restoring.restore(policy, large, key, tile=16, overlap=8, batch=4)
    assert image.shape == (1, 3, 148, 200) and image.std() > 0.01


# GRPO and disk -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [0, 4])
def test_an_update_moves_trained_weights_only(kind, models, tmp_path, rank):
    stage, lr = load_stage("04"), pictures(kind, 2)
    cfg = stage.Config(run="unused", policy=kind, denoise_steps=STEPS, lora_rank=rank, inputs_per_step=2, sampler="sde",
                       eta=0.7, samples_per_input=3, samples_per_gpu=4, window_width=2, gradient_checkpointing=True,
                       **models[kind])
    policy, reference = stage.with_reference(cfg, load(kind, tmp_path / "before", **models[kind]))
    assert (policy.unet is reference.unet) == bool(rank)
    assert policy.vae is reference.vae                                  # only the network is ever held twice
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(policy.unet).values(), lr=1e-2)
    for step in range(2):
        rollouts = stage.roll_out(policy, cfg, lr, ids=["a", "b"], step=step)
        seen = torch.cat([rollout.seen for rollout in rollouts])
        assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3])      # shared by the group
        row = stage.learn(policy, reference, cfg, rollouts=rollouts, optimizer=optimizer,
                          advantages=torch.tensor([1.0, -1.0, 0.0] * 2))
        assert row["ratio_error"] < 1e-5 and row["grad_norm"] > 0 and (row["ref_kl"] > 0) == (step > 0)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora" in name if rank else name.startswith("unet.") for name in moved)
    if rank and kind == "sd3":                                                          # the layers of Flow-GRPO
        assert all(any(f"attn.{part}.lora_B" in name for name in moved) for part in policy.lora_layers)


def test_saved_and_loaded_by_plain_diffusers_it_is_the_tuned_model(policy, kind, models, tmp_path):
    expected = stock(kind, **models[kind])
    tuned = sr_policy.restore(add_lora(policy, 0.1), expected["seen"], expected["first"])
    assert not torch.allclose(tuned, expected["sr"], atol=1e-3)
    with adapter_off(policy.unet):
        assert torch.allclose(sr_policy.restore(policy, expected["seen"], expected["first"]), expected["sr"], atol=1e-4)
    policy.save(tmp_path / "policy")
    moved = (tmp_path / "policy").rename(tmp_path / "moved")
    assert torch.allclose(stock(kind, str(moved))["sr"], tuned, atol=1e-4)
    if kind != "ldm":                                                   # its pipeline loads no LoRA
        assert torch.allclose(stock(kind, **models[kind], lora=moved)["sr"], tuned, atol=1e-4)
    loaded = sr_pipelines.load_policy(moved, CPU)
    assert torch.allclose(sr_policy.restore(loaded, expected["seen"], expected["first"]), tuned, atol=1e-4)
    assert not list(moved.rglob("*.bin")) and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind, change, message", [
    ("upscaler", "model=ldm", "is a LDMSuperResolutionPipeline"), ("ldm", "scale=2", "enlarges by 4"),
    ("ldm", "steps=7", "denoise_steps=7 should divide"), ("ldm", "model=/nowhere/at-all", "cannot be loaded by"),
    ("upscaler", "noise_level=351", "noise_level up to 350, not 351"), ("sd3", "controlnet=", "cannot be loaded by"),
    ("sd3", "controlnet=/nowhere/at-all", "controlnet: /nowhere/at-all cannot be loaded")])
def test_a_model_that_cannot_be_the_policy_is_one_line(models, tmp_path, capsys, kind, change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    key, _, value = change.partition("=")
    value = models["ldm"]["model"] if value == "ldm" else value
    number = {field.name: field.type for field in fields(Published)}[key] is int
    with pytest.raises(SystemExit):
        load(kind, tmp_path / "before", **models[kind] | {key: int(value) if number else value})
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_spacing_and_pickled_weights_are_refused(models, tmp_path, capsys):
    shutil.copytree(models["ldm"]["model"], tmp_path / "model")
    DDIMScheduler(timestep_spacing="linspace").save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(SystemExit):
        load("ldm", tmp_path / "before", model=str(tmp_path / "model"))
    assert "timestep_spacing linspace" in capsys.readouterr().err
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SystemExit):
        load("ldm", tmp_path / "before", model=str(tmp_path / "model"))
    assert "safetensors only" in capsys.readouterr().err


# the stages --------------------------------------------------------------------------------------------------

def test_04_and_05_tune_and_compare_a_published_model(models, toy_config, toy_run, tmp_path):
    for stem in ("01_build_dataset", "02_train_reward"):
        (tmp_path / stem).symlink_to(toy_run / stem)
    settings = [f"{key}={value}" for key, value in models["sd3"].items()]
    done = run_stage("04", toy_config, f"run={tmp_path}", "policy=sd3", "sampler=cps", "eta=0.8", "lr=0.02", "steps=2",
                     "eval_every=1", "max_gold_drop=1", *settings)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "04_train_sr_grpo"
    results = run.read_json(folder / "manifest.json")["results"]
    assert results["ratio_error_max"] < 1e-5 and results["reward_end"] >= results["reward_start"]
    assert [path.name for path in (folder / "base").iterdir()] == ["sampler.json"]
    assert (folder / "policy" / "pytorch_lora_weights.safetensors").exists()
    done = run_stage("05", toy_config, f"run={tmp_path}", "seeds_per_image=1")
    assert done.returncode == 0, done.stderr
    assert np.isfinite(run.read_json(tmp_path / "05_eval_sr" / "manifest.json")["results"]["reward_tuned"])
    means = run.read_json(tmp_path / "05_eval_sr" / "results.json")["mean"]
    assert list(means) == ["bicubic", "base", "default", "best_of_n", "tuned", "hr"]
    assert np.isfinite(list(means["default"].values())).all() and means["default"] != means["base"]


def check_that_the_main_rank_encodes_for_all(models: dict[str, str], folder: Path) -> None:
    """Runs on both ranks."""
    policy = load("sd3", folder, **models, prompt="a b")
    pipeline = sr_pipelines.load_pipeline(policy.sampler)
    assert all((part is None) == (dist.rank() > 0) for part in (
        pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3, pipeline.tokenizer_3))
    if dist.is_main():
        text, _, pooled, _ = pipeline.encode_prompt("a b", None, None, do_classifier_free_guidance=False)
        for buffer, wanted in ((policy.text, text), (policy.pooled, pooled)):
            assert buffer.shape == wanted.shape and torch.allclose(buffer, wanted, atol=1e-5)
    dist.assert_same_weights(policy.named_buffers())


def test_two_processes_hold_the_text_encoders_once(models, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           __file__, json.dumps(models["sd3"]), str(tmp_path)], capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__" and "RANK" in os.environ:
    dist.init()
    check_that_the_main_rank_encodes_for_all(json.loads(sys.argv[1]), Path(sys.argv[2]) / "before")
    dist.finish()
