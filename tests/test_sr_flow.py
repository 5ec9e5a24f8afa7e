"""
Stable Diffusion 3 with a ControlNet as policy: small random models of diffusers' own classes, saved and loaded.

Run     python -m pytest tests/test_sr_flow.py        # 1 min, of which stages 01 and 02 take half
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # torchrun starts this file, see the end
from common import dist, restoring, run, sr_pipelines, sr_policy
from common.images import to_pixels
from common.sr_pipelines import FlowPolicy, Published
from conftest import load_stage, run_stage
from test_sr_latent import add_lora, keys, moved_by_two_updates, pictures, tune

STEPS, CPU = 4, torch.device("cpu")


def save_sd3(folder: Path, t5: bool = True) -> dict[str, str]:
    """A small random SD3 in folder/model, its ControlNet in folder/controlnet: the settings that name them."""
    from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel
    from transformers import T5TokenizerFast
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
    return {"model": str(folder / "model"), "controlnet": str(folder / "controlnet")}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


def load(models: dict[str, str], folder: Path, **changes) -> FlowPolicy:
    sampler = {"policy": "sd3", "scale": 4, "steps": STEPS, "noise_level": 0} | models | changes
    sr_pipelines.point_to(folder, Published(**sampler))
    return sr_pipelines.load_policy(folder, CPU)


@pytest.fixture
def policy(models, tmp_path) -> FlowPolicy:
    return load(models, tmp_path / "before")


def noise(width: int = 0) -> torch.Tensor:
    """First latents for LR 8 x 8: SR is 32 x 32, and the small autoencoder shrinks it by 4."""
    return sr_policy.draw_noise(keys(), (1 + width, 4, 8, 8), CPU)


def lr_images() -> torch.Tensor:
    return pictures(3, 8)


def stock(models: dict[str, str], lr: torch.Tensor, first: torch.Tensor,
          lora: Path | None = None, prompt: str = "") -> dict[str, torch.Tensor]:
    """SR of the pipeline, without guidance, one image at a time, and what its ControlNet saw of LR."""
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
    parts = {"controlnet": SD3ControlNetModel.from_pretrained(models["controlnet"])} if "controlnet" in models else {}
    if "t5" in models:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(models["model"], **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    large = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
    images, seen = [], []
    for i, image in enumerate(large):
        torch.manual_seed(i)                            # the pipeline encodes with noise of torch's own generator
        images.append(pipeline(prompt, control_image=2 * image[None] - 1, height=32, width=32, guidance_scale=1.0,
                               num_inference_steps=STEPS, latents=first[i:i + 1], output_type="pt").images)
        torch.manual_seed(i)
        latent = pipeline.vae.encode(2 * image[None] - 1).latent_dist.sample()
        shift = 0 if pipeline.controlnet.config.force_zeros_for_pooled_projection else 0.0609
        seen.append((latent - shift) * 1.5305)
    return {"sr": torch.cat(images), "seen": torch.cat(seen).detach()}


# sampling --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pooled, t5, shared", [(True, True, False), (False, False, False), (False, True, True)])
def test_restore_is_the_pipeline_of_diffusers(models, tmp_path, pooled, t5, shared):
    """With the ControlNet's kinds: zeros or the text as pooled projection, a position embedding of its own or not."""
    from diffusers import SD3ControlNetModel
    if not t5:
        models = save_sd3(tmp_path / "no_t5", t5=False)
    if not pooled:
        network = SD3ControlNetModel.from_pretrained(models["controlnet"])
        network.register_to_config(force_zeros_for_pooled_projection=False, use_pos_embed=not shared)
        network.pos_embed = None if shared else network.pos_embed
        network.save_pretrained(tmp_path / "controlnet")
        models = models | {"controlnet": str(tmp_path / "controlnet")}
    expected = stock(models | ({} if t5 else {"t5": ""}), lr_images(), noise()[:, 0])
    policy = load(models, tmp_path / "before")
    found = sr_policy.restore(policy, expected["seen"], noise()[:, 0])
    assert found.shape == (3, 3, 32, 32) and found.std() > 0.01
    assert torch.allclose(found, expected["sr"], atol=1e-4)
    with torch.no_grad():                               # the ControlNet matters
        blank = sr_policy.restore(policy, torch.zeros_like(expected["seen"]), noise()[:, 0])
    assert (blank - found).abs().max() > 1e-3


def test_a_prompt_is_told_and_kept(models, tmp_path):
    expected = stock(models, lr_images(), noise()[:, 0], prompt="a b c")
    policy = load(models, tmp_path / "before", prompt="a b c")
    assert torch.allclose(sr_policy.restore(policy, expected["seen"], noise()[:, 0]), expected["sr"], atol=1e-4)
    empty = load(models, tmp_path / "empty")
    assert (sr_policy.restore(empty, expected["seen"], noise()[:, 0]) - expected["sr"]).abs().max() > 1e-3
    policy.save(tmp_path / "policy")                  # 05 loads it so
    assert torch.equal(sr_pipelines.load_policy(tmp_path / "policy", CPU).text, policy.text)


def test_what_the_policy_sees_of_lr(policy, models, capsys):
    lr = (lr_images() * 255).round() / 255
    seen = policy.observe(lr, keys())
    large = [Image.fromarray(image).resize((32, 32), Image.BICUBIC) for image in to_pixels(lr)]
    large = torch.stack([torch.from_numpy(np.array(image)) for image in large]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        code = policy.vae.encode(large).latent_dist
    drawn = sr_policy.draw_noise([(*key, "lr") for key in keys()], (4, 8, 8), CPU)
    expected = 1.5305 * (code.mean + code.std * drawn)
    assert (seen - expected).abs().mean() < 0.02 * expected.std()                       # Pillow rounds to 8 bits
    assert seen.std() > 0.5 and torch.allclose(policy.observe(lr[1:], keys()[1:]), seen[1:], atol=1e-5)
    assert policy.text.shape == (1, 16 + 256, 32) and not policy.text.requires_grad     # CLIP and T5, once
    for size, wrong in ((7, "7 x 7"), (36, "36 x 36")):
        with pytest.raises(SystemExit):
            policy.observe(torch.zeros(1, 3, size, size), keys(1))
        assert f"multiples of 2 px and at most 32, these are {wrong}" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", sr_policy.SAMPLERS)
def test_the_ratio_of_an_untouched_policy_is_one(policy, sampler):
    seen = policy.observe(lr_images(), keys())
    rollout = sr_policy.sample(policy, seen, noise(1), start=1, eta=0.7, sampler=sampler)
    policy.train()
    assert torch.equal(sr_policy.log_prob(rollout, *sr_policy.replay(policy, rollout)), rollout.logp)
    rollout = sr_policy.sample(policy, seen, noise(2), eta=0.7, sampler=sampler)        # replayed in another batch
    mean, std = sr_policy.replay(policy, rollout)
    assert (sr_policy.log_prob(rollout, mean, std) - rollout.logp).abs().max() < 1e-5
    expected = torch.distributions.Normal(mean, std).log_prob(rollout.latents[:, 1:].flatten(0, 1))
    assert torch.allclose(rollout.logp, expected.flatten(1).mean(1).view(3, 2), atol=1e-5)
    still = sr_policy.sample(policy, seen, noise(2), eta=1e-6, sampler=sampler)
    assert torch.allclose(still.images, sr_policy.restore(policy, seen, noise()[:, 0]), atol=1e-4)


def test_steps_are_those_of_the_flow_scheduler(policy):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    assert torch.allclose(policy.times, scheduler.timesteps)
    seen, x = policy.observe(lr_images(), keys()), noise()[:, 0]
    for index, time in enumerate(scheduler.timesteps):
        with torch.no_grad():
            v = policy.velocity(x, time.repeat(3), seen)
            mean, std = sr_policy.step(policy, x, torch.full((3,), index), seen)
        assert std.max() == 0 and torch.allclose(mean, scheduler.step(v, time, x).prev_sample, atol=1e-5)


def test_batch_and_neighbors_change_nothing(policy):
    seen, drawn = policy.observe(lr_images(), keys()), noise(2)
    together = sr_policy.sample(policy, seen, drawn, start=1, sampler="cps", eta=0.8)
    alone = [sr_policy.sample(policy, seen[i:i + 1], drawn[i:i + 1], start=1, sampler="cps", eta=0.8) for i in range(3)]
    assert (together.images - torch.cat([one.images for one in alone])).abs().max() < 1e-4
    assert (together.logp - torch.cat([one.logp for one in alone])).abs().max() < 1e-5


def check_that_the_main_rank_encodes_for_all(models: dict[str, str], folder: Path) -> None:
    """Runs on both ranks."""
    policy = load(models, folder, prompt="a b")
    pipeline = sr_pipelines.load_pipeline(policy.sampler)
    assert all((part is None) == (dist.rank() > 0) for part in (
        pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3, pipeline.tokenizer_3))
    if dist.is_main():
        text, _, pooled, _ = pipeline.encode_prompt("a b", None, None, do_classifier_free_guidance=False)
        for found, wanted in ((policy.text, text), (policy.pooled, pooled)):
            assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)
    dist.assert_same_weights(policy.named_buffers())


def test_two_processes_hold_the_text_encoders_once(models, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           __file__, json.dumps(models), str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# GRPO ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [0, 4])
def test_an_update_moves_trained_weights_only(models, tmp_path, rank):
    stage, lr = load_stage("04"), lr_images()[:2]
    load(models, tmp_path / "before")
    cfg = stage.Config(run="unused", policy="sd3", denoise_steps=STEPS, lora_rank=rank, inputs_per_step=2, eta=0.7,
                       sampler="sde", samples_per_input=3, samples_per_gpu=4, window_width=2, **models)
    policy, reference = stage.with_reference(cfg, sr_pipelines.load_policy(tmp_path / "before", CPU))
    moved = moved_by_two_updates(stage, policy, reference, cfg, lr)
    assert moved and all("lora" in name if rank else name.startswith("unet.") for name in moved)
    parts = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")   # Flow-GRPO's
    assert not rank or all(any(f"attn.{part}.lora_B" in name for name in moved) for part in parts)
    assert not any(p.requires_grad for name, p in policy.named_parameters() if not name.startswith("unet."))


# disk ------------------------------------------------------------------------------------------------------

def test_saved_and_loaded_by_plain_diffusers_it_is_the_tuned_model(policy, models, tmp_path):
    expected = stock(models, lr_images(), noise()[:, 0])
    tuned = sr_policy.restore(add_lora(policy, 0.1), expected["seen"], noise()[:, 0])
    assert not torch.allclose(tuned, expected["sr"], atol=1e-3)
    with sr_policy.adapter_off(policy):
        again = sr_policy.restore(policy, expected["seen"], noise()[:, 0])
        assert torch.allclose(again, expected["sr"], atol=1e-4)
    policy.save(tmp_path / "policy")
    moved = (tmp_path / "policy").rename(tmp_path / "moved")
    assert torch.allclose(stock(models, lr_images(), noise()[:, 0], lora=moved)["sr"], tuned, atol=1e-4)
    assert torch.allclose(stock({"model": str(moved)}, lr_images(), noise()[:, 0])["sr"], tuned, atol=1e-4)
    loaded = sr_pipelines.load_policy(moved, CPU)
    assert torch.allclose(sr_policy.restore(loaded, expected["seen"], noise()[:, 0]), tuned, atol=1e-4)
    assert not list(moved.rglob("*.bin")) and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("wrong, message", [
    ({"controlnet": ""}, "model: {model} cannot be loaded by diffusers"), ({"policy": "ldm"}, "needs a LDMSuper"),
    ({"controlnet": "nowhere/at-all"}, "controlnet: nowhere/at-all cannot be loaded")])
def test_a_model_that_cannot_be_the_policy_is_one_line(models, tmp_path, capsys, wrong, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        load(models, tmp_path / "before", **wrong)
    assert message.format(**models) in capsys.readouterr().err.splitlines()[-1]


# the stages ------------------------------------------------------------------------------------------------

def test_04_and_05_tune_and_compare_sd3(models, toy_config, toy_run, tmp_path):
    settings = [f"{key}={value}" for key, value in models.items()]
    folder = tune(toy_config, toy_run, tmp_path / "run", "policy=sd3", "sampler=cps", "eta=0.8",
                  "window_width=1", "lr=0.02", *settings)
    results = run.read_json(folder / "manifest.json")["results"]
    assert results["ratio_error_max"] < 1e-5 and results["reward_end"] >= results["reward_start"]
    assert (folder / "policy" / "pytorch_lora_weights.safetensors").exists()
    done = run_stage("05", toy_config, f"run={tmp_path / 'run'}", "seeds_per_image=1")
    assert done.returncode == 0, done.stderr
    results = run.read_json(tmp_path / "run" / "05_eval_sr" / "manifest.json")["results"]
    assert np.isfinite(results["reward_base"]) and np.isfinite(results["reward_tuned"])


def test_any_size_is_restored_in_tiles_that_the_autoencoder_reads_one_by_one(policy):
    lr, key = (lr_images()[0].permute(1, 2, 0) * 255).byte().numpy(), (0, "folder", "a.png")
    seen = torch.from_numpy(lr).permute(2, 0, 1)[None].float() / 255
    seen = policy.observe(seen, [key])
    first = sr_policy.draw_noise([key], (policy.channels, *seen.shape[-2:]), CPU)
    whole = restoring.restore(policy, lr, key, tile=64, overlap=0, batch=1)
    assert torch.equal(whole, sr_policy.restore(policy, seen, first))
    large = np.tile(lr, (5, 7, 1))[:37, :50]                            # over pos_embed_max_size, if at once
    images = restoring.restore(policy, large, key, tile=16, overlap=8, batch=4)
    assert images.shape == (1, 3, 148, 200) and images.std() > 0.01


if __name__ == "__main__" and "RANK" in os.environ:
    dist.init()
    check_that_the_main_rank_encodes_for_all(json.loads(sys.argv[1]), Path(sys.argv[2]) / "before")
    dist.finish()
