"""
Stage 01 as users run it: real photographs, folders of bad files, killed runs, other programs' outputs, models.

Run     python -m pytest tests/test_build_dataset.py        # 40 s on two free cores
"""
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from common import candidates, external, jobs, metrics, photos, run
from common.config import load_config
from common.groups import SPLITS, all_groups, group_images, load_groups
from common.images import luma, read_image, resize, to_float, write_png
from conftest import ROOT, load_stage, run_stage, tree

TEST = ["chelsea", "coffee"]
KEYS = {"id", "split", "source", "scale", "lr", "hr", "crop", "degradation", "candidates", "labels", "sha256"}


def write_config(folder, **settings):
    """A config of stage 01 for 8 tiny groups in `folder`."""
    values = {"hr_dir": "skimage", "hr_size": 32, "scale": 4, "degradation": "mild", "train_groups": 5,
              "val_groups": 1, "test_groups": 2, "val_sources": ["rocket"], "test_sources": TEST,
              "candidates": ["hr|unnatural", "resample", "inconsistent"], "tie_margin": 0.02,
              "workers": 1} | settings
    path = folder / "config.yaml"
    path.write_text(json.dumps({"run": str(folder / "run"), "seed": 0, "01_build_dataset": values}))
    return path


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def stage(capfd):
    """Run stage 01 inside this process: as run_stage, without the seconds that imports take."""
    def call(config, *overrides):
        module, code = load_stage("01"), 0
        try:
            module.main(load_config(module.Config, module.__file__, [str(config), *overrides]))
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capfd.readouterr())
    return call


def textured(seed, height=60, width=70):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 5, width // 5, 3)).astype(np.uint8)
    return resize(small, (width, height), "bicubic")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    done = run_stage("01", write_config(folder))
    assert done.returncode == 0, done.stderr
    return folder / "run" / "01_build_dataset"


def test_a_picture_is_there_before_the_set_is(built, stage, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise SystemExit(3)
    monkeypatch.setattr(load_stage("01"), "finish", stop)                  # groups.jsonl and the last picture
    done = stage(write_config(tmp_path))
    folder = tmp_path / "run" / "01_build_dataset"
    assert done.returncode == 3 and f"first picture: {folder / 'contact_sheet.png'}" in done.stdout
    assert not (folder / "groups.jsonl").exists()
    assert (folder / "contact_sheet.png").read_bytes() == (built / "contact_sheet.png").read_bytes()


def test_lines_and_files(built):
    lines = [json.loads(line) for line in (built / "groups.jsonl").read_text().splitlines()]
    names = [line["id"] for line in lines]
    assert names == [*(f"train_{i:05d}" for i in range(5)), "val_00000", "test_00000", "test_00001"]
    for line in lines:
        assert set(line) == KEYS
        assert set(line["sha256"]) == {line["lr"], line["hr"], *(c["path"] for c in line["candidates"])}
        assert all(run.sha256(built / path) == digest for path, digest in line["sha256"].items())
        assert read_image(built / line["lr"]).shape == (8, 8, 3)
        assert {read_image(built / c["path"]).shape for c in line["candidates"]} == {(32, 32, 3)}
        assert set(line["labels"]) == set(metrics.AXES)
        for label in line["labels"].values():
            assert label["source"] == "proxy" and len(label["ranks"]) == 3 and min(label["ranks"]) == 1
            assert all(0 < score <= 1 for score in label["scores"])
    assert {line["source"] for line in lines if line["split"] == "test"} <= set(TEST)
    assert not {line["source"] for line in lines if line["split"] == "train"} & {*TEST, "rocket"}
    results = json.loads((built / "manifest.json").read_text())["results"]
    assert results["groups"] == 8 and results["candidates"] == 24 and results["label_source"] == "proxy"
    assert results["pairs"] == sum(len(metrics.pair_hits(r, r)[0]) for r in
                                   (line["labels"]["overall"]["ranks"] for line in lines))
    assert read_image(built / "contact_sheet.png").shape[1] > 500
    assert not (built / "progress").exists()


def test_label_follows_the_recorded_images(built):
    """The scores of the ground truth and of resampled candidates can be computed again from the files."""
    for group in load_groups(built, "train"):
        lr, images, hr = group_images(built, group)
        for index, candidate in enumerate(group["candidates"]):
            score = metrics.proxy_consistency(images[index], hr, lr)
            assert abs(score - group["labels"]["consistency"]["scores"][index]) < 1e-4
            if candidate["method"] in ("hr", *candidates.RESAMPLERS, *candidates.UNNATURAL):
                score = metrics.proxy_naturalness(images[index], hr)
                assert abs(score - group["labels"]["naturalness"]["scores"][index]) < 1e-4
            elif "+" not in candidate["method"]:
                assert group["labels"]["naturalness"]["scores"][index] == 1


def test_same_bytes_for_any_number_of_workers(built, tmp_path):
    done = run_stage("01", write_config(tmp_path, workers=2))
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "run" / "01_build_dataset") == tree(built)


def test_killed_and_resumed_gives_the_same_bytes(built, stage, tmp_path):
    folder, config = tmp_path / "run" / "01_build_dataset", write_config(tmp_path)
    command = [sys.executable, "01_build_dataset.py", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "progress" / "groups.jsonl"
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists(), "killed too late for this test"
    with open(log, "a") as file:
        file.write('{"id": "train_000')                     # as if killed in the middle of a write
    (folder / "candidates" / "train_00003_0.png.tmp").write_bytes(b"half")
    done = stage(config)
    assert done.returncode == 0, done.stderr
    (folder / "candidates" / "train_00003_0.png.tmp").unlink(missing_ok=True)
    assert tree(folder) == tree(built)
    again = stage(config)
    assert again.returncode == 0 and "is finished" in again.stdout
    other = stage(config, "tie_margin=0.1")
    assert other.returncode == 2 and "tie_margin: 0.02 -> 0.1" in other.stderr


def test_bad_files_are_skipped_and_named(stage, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for index in range(3):
        write_png(pictures / f"good{index}.png", textured(index))
    write_png(pictures / "sub" / "good0.png", textured(9))             # same stem, another source
    shutil.copy(pictures / "good1.png", pictures / "twin.png")
    (pictures / "truncated.png").write_bytes((pictures / "good0.png").read_bytes()[:900])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "text.png").write_text("no picture")
    write_png(pictures / "dot.png", np.zeros((1, 1, 3), np.uint8))
    write_png(pictures / "flat.png", np.full((64, 64, 3), 90, np.uint8))
    (pictures / "notes.txt").write_text("not looked at")
    config = write_config(tmp_path, hr_dir=str(pictures), val_sources=[], test_sources=[])
    done = stage(config)
    assert done.returncode == 0, done.stderr
    assert "4 pictures, 6 skipped" in done.stdout
    folder = tmp_path / "run" / "01_build_dataset"
    skipped = {json.loads(line)["path"].rsplit("/", 1)[1]: json.loads(line)["reason"]
               for line in (folder / "skipped.jsonl").read_text().splitlines()}
    assert set(skipped) == {"truncated.png", "empty.jpg", "text.png", "dot.png", "flat.png", "twin.png"}
    assert "smaller than one crop" in skipped["dot.png"] and "flat" in skipped["flat.png"]
    assert "same pixels" in skipped["twin.png"]
    lines = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    sources = {split: {line["source"] for line in lines if line["split"] == split} for split in SPLITS}
    assert all(sources.values()) and sum(map(len, sources.values())) == len(set.union(*sources.values()))
    strict = stage(config, f"run={tmp_path / 'strict'}", "strict=true")
    assert strict.returncode == 2 and strict.stderr.count("error:") == 1 and "strict=false" in strict.stderr
    assert not (tmp_path / "strict" / "01_build_dataset").exists()


@pytest.mark.parametrize("override, words", [
    ("hr_dir=/nowhere", "hr_dir: /nowhere is not a folder"),
    ("val_sources=rokcet", "did you mean 'rocket'"),
    ("test_sources=rocket", "'rocket' is given twice"),
    ("hr_size=30", "should be a multiple of scale 4"),
    ("degradation=heavy", "degradation should be one of realesrgan, light, mild, bicubic"),
    ("candidates=hr,sharp", "'sharp' is none of hr, resample"),
    ("candidates=hr", "at least two"),
    ("candidates=hr,folder:x", "should look like folder:NAME=PATH"),
    ("candidates=hr,folder:a=/x,hf:a=/y", "share a name"),
    ("candidates=hr,folder:bicubic=/x", "bicubic is a method of our own"),
    ("candidates=hr,folder:hr=/x", "hr is a method of our own"),
    ("lr_dir=/tmp", "set one of hr_dir and lr_dir"),
    ("max_source_share=0", "max_source_share should be in (0, 1]"),
    ("tie_margin=-1", "tie_margin should be in 0..1"),
    ("workers=-1", "workers -1 is too small"),
])
def test_wrong_settings_get_one_line(stage, tmp_path, override, words):
    done = stage(write_config(tmp_path), override)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr
    assert not (tmp_path / "run" / "01_build_dataset").exists(), "a corrected setting must be accepted"


def test_a_split_without_pictures_is_named_before_the_build(stage, tmp_path):
    done = stage(write_config(tmp_path, val_sources=[], val_fraction=0))
    assert done.returncode == 2 and "val_groups=1, but no picture is for val" in done.stderr
    assert "crops" not in done.stderr and not (tmp_path / "run" / "01_build_dataset").exists()


def test_a_typo_does_not_delete_what_people_judged(stage, tmp_path):
    """judgements.jsonl may be put back before a set is built again; it is the only copy of people's work."""
    folder = tmp_path / "run" / "01_build_dataset"
    folder.mkdir(parents=True)
    (folder / "judgements.jsonl").write_text("hours of work\n")
    for override in ("hr_dir=/mnt/not_mounted", "val_sources=rokcet"):
        assert stage(write_config(tmp_path), override).returncode == 2
        assert [path.name for path in folder.iterdir()] == ["judgements.jsonl"]
    done = stage(write_config(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (folder / "judgements.jsonl").read_text() == "hours of work\n"


def test_folder_source_in_two_passes(stage, tmp_path):
    """Outputs of another SR program: asked for, checked, then used; what was made before is kept."""
    outputs = tmp_path / "mynet"
    config = write_config(tmp_path, candidates=["hr", "resample", f"folder:mynet={outputs}"])
    folder = tmp_path / "run" / "01_build_dataset"
    first = stage(config)
    assert first.returncode == 2 and f"on {folder / 'lr'}" in first.stderr and "lacks 8 of 8" in first.stderr
    before = (folder / "lr" / "train_00000.png").stat().st_mtime_ns
    outputs.mkdir()
    for path in (folder / "lr").glob("*.png"):                              # a very simple SR program
        Image.open(path).resize((32, 32), Image.BICUBIC).save(outputs / f"{path.stem}.jpg", quality=95)
    Image.new("RGB", (31, 32)).save(outputs / "train_00002.jpg")
    second = stage(config)
    assert second.returncode == 2 and "train_00002.jpg is 31x32, expected 32x32" in second.stderr
    shutil.copy(folder / "lr" / "train_00001.png", outputs)
    twice = stage(config)
    assert twice.returncode == 2 and "train_00001.jpg and train_00001.png are both" in twice.stderr
    (outputs / "train_00001.png").unlink()
    for path in (folder / "lr").glob("*.png"):                              # a better one: nothing of the first is left
        Image.open(path).resize((32, 32), Image.LANCZOS).save(outputs / f"{path.stem}.jpg", quality=90)
    third = stage(config)
    assert third.returncode == 0, third.stderr
    assert (folder / "lr" / "train_00000.png").stat().st_mtime_ns == before
    for group in all_groups(folder):
        index = [candidate["method"] for candidate in group["candidates"]].index("mynet")
        lr, images, hr = group_images(folder, group)
        assert np.array_equal(images[index], read_image(outputs / f"{group['id']}.jpg"))
        assert group["labels"]["naturalness"]["scores"][index] < 1
        score = metrics.proxy_consistency(images[index], hr, lr)
        assert abs(score - group["labels"]["consistency"]["scores"][index]) < 1e-4


def test_a_photograph_that_changed_during_a_build_is_named(stage, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        write_png(pictures / f"{index}.png", textured(index))
    config = write_config(tmp_path, hr_dir=str(pictures), val_sources=[], test_sources=[],
                          candidates=["hr", f"folder:mynet={tmp_path / 'none'}"])
    assert "lacks 8 of 8" in stage(config).stderr
    (pictures / "0.png").touch()
    assert "lacks 8 of 8" in stage(config).stderr, "the same pixels"
    for index in range(4):
        write_png(pictures / f"{index}.png", textured(index + 10))
    changed = stage(config)
    assert changed.returncode == 2 and "the pictures changed since" in changed.stderr


def test_lr_only_pictures_have_no_labels(stage, tmp_path):
    pictures = tmp_path / "lr"
    pictures.mkdir()
    for index in range(4):
        write_png(pictures / f"{index}.png", textured(index, 20, 24))
    config = write_config(tmp_path, hr_dir=None, lr_dir=str(pictures), val_sources=[], test_sources=[],
                          candidates=["resample", "resample"])
    done = stage(config)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "01_build_dataset"
    assert json.loads((folder / "manifest.json").read_text())["results"]["label_source"] == "none"
    group = load_groups(folder, "train")[0]
    lr, images, hr = group_images(folder, group)
    assert group["labels"] == {} and hr is None and lr.shape == (8, 8, 3) and images[0].shape == (32, 32, 3)
    refused = stage(config, f"run={tmp_path / 'r'}", "candidates=hr,resample")
    assert refused.returncode == 2 and "needs ground truth" in refused.stderr


# the parts -----------------------------------------------------------------------------------------------

def test_shares_follow_the_area_up_to_the_cap():
    areas = (("a", 800), ("b", 100), ("b", 50), ("c", 50))
    pictures = [{"source": name, "area": area} for name, area in areas]
    assert photos.shares(pictures, 100, 1.0) == [80, 10, 5, 5]
    capped = photos.shares(pictures, 100, 0.5)
    assert capped == [50, 25, 13, 12] and sum(photos.shares(pictures, 7, 0.4)) == 7
    assert photos.shares(pictures[:1], 9, 0.1) == [9]                       # one source: it gives everything
    assert photos.shares([], 0, 0.5) == []


def test_split_by_hash_is_stable_and_fills_every_split():
    names = [f"picture{i}" for i in range(40)]
    fractions, nobody = {"test": 0.1, "val": 0.05}, {"val": [], "test": []}
    splits = photos.split_sources(names, nobody, fractions, seed=0)
    counts = [list(splits.values()).count(split) for split in SPLITS]
    assert counts == [34, 2, 4] and splits == photos.split_sources(names[::-1], nobody, fractions, seed=0)
    assert splits != photos.split_sources(names, nobody, fractions, seed=1)
    with pytest.raises(SystemExit):
        photos.split_sources(["a", "b"], nobody, fractions, seed=0)


def test_flat_crops_are_drawn_again():
    module = load_stage("01")
    image = np.full((200, 200, 3), 128, np.uint8)
    image[:, 140:] = textured(0, 200, 60)
    cfg = module.Config(run="", hr_size=32, train_groups=1)
    crops = [module.draw_crop(cfg, image, f"train_{i:05d}")[0] for i in range(30)]
    assert all(luma(crop).std() >= 8 for crop in crops)


@pytest.mark.parametrize("method", candidates.INCONSISTENT)
def test_stronger_inconsistency_is_less_consistent(monkeypatch, method):
    monkeypatch.setattr(candidates, "INCONSISTENT", (method,))
    hr, foreign = (to_float(textured(i, 64, 64)) for i in (1, 2))
    scores = []
    for limit in (0.0, 0.5, 1.0):
        monkeypatch.setattr(candidates, "amount", lambda _, low, high, at=limit: low * (high / low) ** at)
        image, record = candidates.inconsistent(hr, foreign, np.random.default_rng(3))
        assert record["method"] == method and image.min() >= 0 and image.max() <= 1
        scores.append(metrics.proxy_consistency(image, hr, metrics.down(hr, 4)))
    assert 1 > scores[0] > scores[1] > scores[2]


@pytest.mark.parametrize("method", candidates.UNNATURAL)
def test_stronger_fault_is_less_natural_and_stays_consistent(monkeypatch, method):
    monkeypatch.setattr(candidates, "UNNATURAL", (method,))
    hr = to_float(textured(1, 64, 64))
    rng = np.random.default_rng
    faulty = [candidates.add_fault(hr, strength, rng(3))[0] for strength in (0.0, 0.5, 1.0)]
    scores = [metrics.proxy_naturalness(image, hr) for image in faulty]
    assert 1 > scores[0] > scores[1] > scores[2]
    image, record = candidates.unnatural(hr, 4, rng(3))
    assert record["method"] == method and 0 <= record["strength"] <= 1
    assert metrics.rmse(metrics.down(image, 4), metrics.down(hr, 4)) < 0.05


def test_kernels_and_masks():
    for length, angle in ((1.5, 0.3), (12, 2.0)):
        weights = candidates.line_kernel(length, angle)
        assert abs(weights.sum() - 1) < 1e-12 and np.allclose(weights, weights[::-1, ::-1])
    mask = candidates.soft_mask((64, 64), 0.3, np.random.default_rng(0))
    assert mask.shape == (64, 64, 1) and abs(mask.mean() - 0.3) < 0.03


def test_workers_are_as_many_as_the_cores_that_may_be_used():
    """As under taskset, in a container or a cluster's job."""
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " \
           "from common import jobs; print(jobs.start_pool(0))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


def square(job):
    return {"value": job["x"] ** 2}


def test_jobs_do_only_the_rest(tmp_path):
    log, work = tmp_path / "log.jsonl", [{"id": str(x), "x": x} for x in range(5)]
    log.write_text('{"id": "1", "key": null, "result": {"value": 99}}\n{"id": "2", "resu')
    done = jobs.run_jobs(None, square, work[:3], log=log)
    assert {name: result["value"] for name, result in done.items()} == {"0": 0, "1": 99, "2": 4}
    done = jobs.run_jobs(None, square, work[3:], log=log)
    assert {name: result["value"] for name, result in done.items()} == {"0": 0, "1": 99, "2": 4, "3": 9, "4": 16}
    again = [job | {"key": [["a.png", 3, 10**18 + int(job["id"])]]} for job in work]
    assert jobs.run_jobs(None, square, again[:2], log=log)["1"] == {"value": 1}, "done for another file"
    log.write_text(log.read_text().replace('"value": 1}', '"value": 98}'))
    done = jobs.run_jobs(None, square, again, log=log)
    assert {name: result["value"] for name, result in done.items()} == {"0": 0, "1": 98, "2": 4, "3": 9, "4": 16}
    assert len(log.read_text().splitlines()) == 5


# pretrained models: tiny random ones of the real classes, saved and loaded back --------------------------

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


@pytest.mark.parametrize("save, model", [(save_ldm, "."), (save_upscaler, "model"), (save_swin2sr, ".")])
def test_hf_source(tmp_path, save, model):
    save(tmp_path / "saved")
    model, lr, out = str(tmp_path / "saved" / model), tmp_path / "lr", tmp_path / "out"
    lr.mkdir()
    for name in "ab":
        write_png(lr / f"{name}.png", textured(ord(name), 32, 32)[:32, :32])
    external.restore_folder(model, lr, out, names=["a", "b"], steps=1, seed=0)
    first = {name: read_image(out / f"{name}.png") for name in "ab"}
    assert first["a"].shape == (128, 128, 3) and first["a"].std() > 0
    (out / "a.png").unlink()
    write_png(out / "b.png", textured(1, 30, 30))        # kept: only what is missing is made
    external.restore_folder(model, lr, out, names=["a", "b"], steps=1, seed=0)
    assert np.array_equal(read_image(out / "a.png"), first["a"])
    assert read_image(out / "b.png").shape == (30, 30, 3)


def test_hf_source_in_the_stage_and_refusals(stage, tmp_path, capfd):
    save_swin2sr(tmp_path / "swin")
    config = write_config(tmp_path, candidates=["hr", f"hf:swin={tmp_path / 'swin'}"], train_groups=2)
    done = stage(config)
    assert done.returncode == 0, done.stderr
    group = load_groups(tmp_path / "run" / "01_build_dataset", "train")[0]
    assert {candidate["method"] for candidate in group["candidates"]} == {"hr", "swin"}
    one = {"names": ["a"], "steps": 1, "seed": 0}
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit):
        external.restore_folder(str(tmp_path / "nothing"), tmp_path, tmp_path / "o", **one)
    assert "neither model_index.json" in capfd.readouterr().err
    (tmp_path / "swin" / "model.safetensors").rename(tmp_path / "swin" / "pytorch_model.bin")
    with pytest.raises(SystemExit):
        external.restore_folder(str(tmp_path / "swin"), tmp_path, tmp_path / "o", **one)
    assert "safetensors only" in capfd.readouterr().err
    save_ldm(tmp_path / "ldm")
    write_png(tmp_path / "a.png", textured(0, 40, 40)[:40, :40])
    with pytest.raises(SystemExit):
        external.restore_folder(str(tmp_path / "ldm"), tmp_path, tmp_path / "o", **one)
    assert "multiples of 32" in capfd.readouterr().err
