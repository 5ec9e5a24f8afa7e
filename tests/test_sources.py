"""
Candidates of other programs and models: entries of the setting, batches, ranks and resuming, refusals.

Run     python -m pytest tests/test_sources.py     # 20 s on one core
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import dist, sources
from common.config import load_config
from common.groups import load_groups
from common.images import read_image, resize, write_png
from conftest import load_stage, run_stage, tree

NAMES = ["a", "b", "c"]


def textured(seed, height=60, width=70):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 5, width // 5, 3)).astype(np.uint8)
    return resize(small, (width, height), "bicubic")


# tiny random models of the real classes, saved and loaded back -------------------------------------------

def save_ldm(path):
    from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=32, in_channels=6, out_channels=3, block_out_channels=(16, 32),
                       layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    vqvae = VQModel(block_out_channels=[8, 8, 16], in_channels=3, out_channels=3, latent_channels=3,
                    norm_num_groups=8, down_block_types=["DownEncoderBlock2D"] * 3,
                    up_block_types=["UpDecoderBlock2D"] * 3)
    LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(path)


def save_upscaler(path):
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    (path / "words").mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", *(c for c in "abc"), *(f"{c}</w>" for c in "abc")]
    (path / "words" / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (path / "words" / "merges.txt").write_text("#version: 0.2\n")
    unet = UNet2DConditionModel(block_out_channels=(16, 32), layers_per_block=1, in_channels=7, out_channels=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
                                attention_head_dim=8, num_class_embeds=400, sample_size=32)
    vae = AutoencoderKL(block_out_channels=[8, 8, 16], in_channels=3, out_channels=3, latent_channels=4,
                        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                        norm_num_groups=8)
    text = CLIPTextConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
                          pad_token_id=1)
    tokenizer = CLIPTokenizer.from_pretrained(path / "words", model_max_length=16)
    StableDiffusionUpscalePipeline(vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
                                   low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(),
                                   max_noise_level=350).save_pretrained(path / "model")


def save_swin2sr(path):
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution
    torch.manual_seed(0)
    config = Swin2SRConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2], window_size=4, upscale=4,
                           upsampler="pixelshuffle")
    Swin2SRForImageSuperResolution(config).save_pretrained(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with lr/, and tiny random models ldm, swin, up/model."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "lr").mkdir()
    for name in NAMES:
        write_png(folder / "lr" / f"{name}.png", textured(ord(name), 32, 32))
    save_ldm(folder / "ldm"), save_swin2sr(folder / "swin"), save_upscaler(folder / "up")
    return folder


def made(saved, out, model, names=NAMES, query="", prompt="", batch=1):
    """The images of hf:x=MODEL?QUERY that lie in `out` after a run for `names`."""
    if not (out / "lr").exists():
        out.mkdir(exist_ok=True)
        (out / "lr").symlink_to(saved / "lr")
    expanded = sources.expand([f"hf:x={saved / model}{query}"])
    sources.run_models(expanded, out, names, seed=0, prompt=prompt, batch=batch, device=torch.device("cpu"))
    return {path.stem: read_image(path) for path in sources.folder_of(expanded[-1], out).glob("*.png")}


@pytest.mark.parametrize("model, query", [("ldm", "?steps=1"), ("swin", ""), ("up/model", "?steps=1")])
def test_an_image_does_not_depend_on_its_batch(saved, tmp_path, model, query):
    """Another partner and a filled-up batch: the same bytes; another batch size: up to rounding."""
    both = made(saved, tmp_path / "both", model, query=query, batch=2)
    assert len(both) == 3 and both["a"].shape == (128, 128, 3) and both["a"].std() > 0
    other = made(saved, tmp_path / "other", model, names=["c", "a"], query=query, batch=2)
    assert all(np.array_equal(both[name], other[name]) for name in other)
    alone = made(saved, tmp_path / "alone", model, names=["b"], query=query)
    assert np.abs(alone["b"].astype(int) - both["b"]).max() <= 1
    [path] = (tmp_path / "both" / "external").rglob("b.png")
    path.unlink()
    again = made(saved, tmp_path / "both", model, query=query, batch=2)        # only what is missing is made
    assert np.array_equal(again["b"], both["b"])


@pytest.mark.parametrize("model", ["ldm", "up/model"])
def test_products_in_bfloat16_make_nearly_the_same_image(saved, tmp_path, monkeypatch, model):
    plain = made(saved, tmp_path / "float32", model, names=["a"], query="?steps=3")["a"].astype(int)
    monkeypatch.setattr(sources, "BFLOAT16", ("cpu",))
    error = np.abs(made(saved, tmp_path / "bfloat16", model, names=["a"], query="?steps=3")["a"] - plain)
    assert 0 < error.mean() < 0.02 * plain.std(), (error.mean(), plain.std())


def test_seeds_steps_and_guidance_make_other_images(saved, tmp_path):
    first = made(saved, tmp_path / "1", "up/model", names=["a"], query="?steps=1")["a"]
    others = [("?seeds=2&steps=1", ""), ("?steps=3", ""), ("?steps=1&guidance=4", "a b c")]
    for number, (query, prompt) in enumerate(others):
        other = made(saved, tmp_path / f"o{number}", "up/model", ["a"], query, prompt)
        assert not np.array_equal(first, other["a"]), query
    same = made(saved, tmp_path / "same", "up/model", names=["a"], query="?seeds=1&steps=1&guidance=1")
    assert np.array_equal(first, same["a"])


def test_ranks_share_the_names(saved, tmp_path, monkeypatch):
    whole = made(saved, tmp_path / "whole", "swin")
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda number=rank: number)
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        shared = made(saved, tmp_path / "shared", "swin")
        assert len(shared) == (2, 3)[rank]
    assert all(np.array_equal(whole[name], shared[name]) for name in NAMES)


@pytest.mark.parametrize("model, query, words", [
    ("swin", "?seeds=2", "is a network without randomness: remove seed"),
    ("ldm", "?guidance=2", "sees no text: remove guidance"),
    ("ldm", "", "multiples of 32"),
    ("nothing", "", "cannot be loaded by diffusers or transformers"),
    ("pickled", "", "safetensors only"),
])
def test_a_model_that_cannot_do_what_is_asked(saved, tmp_path, capfd, model, query, words):
    (saved / "nothing").mkdir(exist_ok=True)
    if model == "pickled":
        save_swin2sr(saved / "pickled")
        (saved / "pickled" / "model.safetensors").rename(saved / "pickled" / "pytorch_model.bin")
    (tmp_path / "lr").mkdir()
    write_png(tmp_path / "lr" / "a.png", textured(0, 40, 40))
    with pytest.raises(SystemExit):
        made(saved, tmp_path, model, ["a"], query)
    assert words in capfd.readouterr().err


def test_entries():
    single = sources.expand(["hr|resample", "folder:x=/y?z", "hf:up=some/model?seeds=2&steps=10+20&guidance=1+4.5",
                             "hf:net=/m"])
    assert single[:2] == [{"kinds": ["hr", "resample"]}, {"method": "x", "folder": "/y?z"}]
    assert len(single) == 2 + 8 + 1 and single[-1] == {"method": "net", "model": "/m"}
    assert sources.record(single[5]) == {"method": "up-steps20-guidance4.5", "seed": 1, "steps": 20, "guidance": 4.5}
    assert len({source["method"] for source in single[2:10]}) == 4                   # seeds are the same method
    assert len({sources.folder_of(source, Path("run")) for source in single[2:10]}) == 8


@pytest.mark.parametrize("entry, words", [
    ("sharp", "'sharp' is none of hr, resample"),
    ("folder:x", "should look like folder:NAME=PATH"),
    ("hf:a=?steps=2", "should look like folder:NAME=PATH or hf:NAME=MODEL"),
    ("folder:bicubic=/x", "bicubic is a method of our own"),
    ("hf:taken=/x", "taken is a method of our own or there twice"),
    *((f"hf:a=m?{query}", "should look like seeds=2&steps=10+20&guidance=1+4")
      for query in ("seed=2", "steps=0", "steps=ten", "seeds=1+2", "steps=1&steps=2", "steps=10.5")),
])
def test_malformed_entries(entry, words):
    with pytest.raises(AssertionError) as error:
        sources.expand(["hr", "folder:taken=/x", entry])
    assert words in str(error.value)


def test_the_stage_with_combinations_and_two_processes(saved, tmp_path):
    """The same bytes from one process and from two."""
    values = {"hr_dir": "skimage", "hr_size": 128, "train_groups": 2, "val_groups": 1, "test_groups": 1,
              "val_sources": ["rocket"], "test_sources": ["coffee"], "degradation": "mild", "workers": 1,
              "candidates": ["hr", f"hf:ldm={saved / 'ldm'}?seeds=2&steps=1+2", f"hf:swin={saved / 'swin'}"]}
    trees = []
    for processes in (1, 2):
        config = tmp_path / f"{processes}.yaml"
        config.write_text(json.dumps({"run": str(tmp_path / str(processes)), "seed": 0, "01_build_dataset": values}))
        if processes == 1:
            module = load_stage("01")
            module.main(load_config(module.Config, module.__file__, [str(config)]))
        else:
            done = run_stage("01", config, processes=2)
            assert done.returncode == 0, done.stderr
        trees.append(tree(tmp_path / str(processes) / "01_build_dataset"))
    assert trees[0] == trees[1]
    groups = load_groups(tmp_path / "1" / "01_build_dataset", "train")
    methods = sorted(candidate["method"] for candidate in groups[0]["candidates"])
    assert methods == ["hr", "ldm-steps1", "ldm-steps1", "ldm-steps2", "ldm-steps2", "swin"]
    assert {candidate.get("seed") for candidate in groups[0]["candidates"]} == {None, 1, 2}
