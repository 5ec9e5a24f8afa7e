"""
A judge with a prompt and a pattern of its own, around small random models of two families, and in 03 and 04.

Run     python -m pytest tests/test_prompted.py         # 30 s, and a toy run of 01 and 02
"""
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor)

from common import mllm, prompted, run
from common.config import load_config
from common.images import resize, write_png
from common.small_mllm import build_tokenizer
from conftest import load_stage, make_images
from test_families import CPU, save_random

PROMPT = 'Before {lr} after {sr}: reply {"overall": 5}.'
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
            "IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}")


def save_llava(folder: Path, tokenizer) -> None:
    """LLaVA: another decoder, another vision tower, one token for each patch of an image of a fixed size."""
    ids = tokenizer.get_vocab()
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
                       eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], bos_token_id=None)
    vision = CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8, initializer_range=0.3)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=ids["<|image_pad|>"],
                         vision_feature_layer=-1, vision_feature_select_strategy="default")
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = dict(height=32, width=32)
    LlavaProcessor(
        CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=size), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", image_token="<|image_pad|>", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<|image_pad|>")).save_pretrained(folder)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "llava"])
def question(request, tmp_path_factory) -> Path:
    """The YAML file of a judge whose replies are mostly digits."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), build_tokenizer()
    if request.param == "llava":
        save_llava(folder / "model", tokenizer)
    else:
        tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        save_random(folder / "model", request.param, tokenizer)
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump({"model": str(folder / "model"), "prompt": PROMPT, "max_tokens": 6,
                                    "pattern": "(?P<overall>[0-9]).*?(?P<naturalness>[0-9])"}))
    return path


def only_digits(judge: prompted.PromptedJudge) -> None:
    """All tokens but digits and the end are far less likely; and the end ends a reply, as in published models."""
    writable = [judge.tokenizer.convert_tokens_to_ids(t) for t in [*"0123456789", "<|im_end|>"]]
    judge.model.lm_head.weight.data[[i for i in range(judge.model.lm_head.out_features) if i not in writable]] = 0
    judge.model.lm_head.weight.data[writable] *= 20
    judge.model.generation_config.eos_token_id = writable[-1]
    judge.model.generation_config.pad_token_id = writable[-1]


@torch.no_grad()
def slow_reply(judge: prompted.PromptedJudge, lr, image, sides: int) -> str:
    """Token by token without a cache, one row, the prompt by hand."""
    pad, ids = judge.tokenizer.convert_tokens_to_ids("<|image_pad|>"), []
    shown = [resize(lr, image.shape[1::-1], "bicubic"), image]
    images = getattr(judge.processor, "image_processor", judge.processor)(shown, return_tensors="pt")
    wrap = "{}" if sides else "<|vision_start|>{}<|vision_end|>"
    for n, part in enumerate(re.split(r"\{lr\}|\{sr\}", PROMPT)):
        count = sides or int(images["image_grid_thw"][n - 1].prod() // 4)
        text = wrap.format("<|image_pad|>" * count) * (n > 0) + part
        ids += judge.tokenizer.encode(("<|im_start|>user\n" if not n else "") + text, add_special_tokens=False)
    ids += judge.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    written = []
    for _ in range(judge.max_tokens):
        row = torch.tensor([ids + written])
        types = {} if sides else {"mm_token_type_ids": (row == pad).int()}
        logits = judge.model(input_ids=row, attention_mask=torch.ones_like(row), **images, **types).logits[0, -1]
        written.append(int(logits.argmax()))
        if judge.tokenizer.decode(written[-1:]) == "<|im_end|>":
            break
    return judge.tokenizer.decode(written, skip_special_tokens=True)


def test_scores_are_those_of_greedy_replies_written_one_by_one(question):
    judge = mllm.load_judge(question, CPU)
    only_digits(judge)
    groups = [make_images(0, 32, 32, count=3), make_images(1, 64, 32, count=2)]
    sides = 16 if "llava" in str(question) else 0
    scores = mllm.expected_scores(judge, [g[0] for g in groups], [g[1:] for g in groups], groups_per_forward=1)
    assert scores.shape == (2, 3, 3) and scores[1, 2].isnan().all()
    texts = [slow_reply(judge, group[0], image, sides) for group in groups for image in group[1:]]
    for text, found in zip(texts, [*scores[0], *scores[1, :2]]):
        pairs = re.findall(judge.pattern, text)
        if not pairs:
            assert found.isnan().all()
            continue
        overall, naturalness = map(float, pairs[-1])
        assert found.tolist() == [(overall + naturalness) / 2, naturalness, overall]
    assert len(judge.unread) == sum(not re.findall(judge.pattern, text) for text in texts) < len(set(texts))


def test_03_04_and_05_take_it_as_the_judge_and_leave_out_replies_without_a_score(toy_run, toy_config, tmp_path,
                                                                               monkeypatch):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    save_random(tmp_path / "model", "qwen3_vl", tokenizer)
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump({"model": str(tmp_path / "model"), "prompt": PROMPT, "max_tokens": 4,
                                    "pattern": "(?P<overall>[0-9]{3})"}))
    (tmp_path / "01_build_dataset").symlink_to(toy_run / "01_build_dataset")
    load = mllm.load_prompted

    def load_digits(*given):
        judge = load(*given)
        only_digits(judge)
        return judge

    monkeypatch.setattr(mllm, "load_prompted", load_digits)
    for number, settings in (("03", []), ("04", ["steps=1", "std_floor=0", "eval_every=1"]), ("05", ["large_crops=0"])):
        stage = load_stage(number)
        stage.main(load_config(stage.Config, stage.__file__, [
            str(toy_config), f"run={tmp_path}", f"judge={path}", *settings]))
    found = run.read_json(tmp_path / "03_eval_reward" / "results.json")
    lines = [json.loads(line) for line in (tmp_path / "03_eval_reward" / "scores.jsonl").read_text().splitlines()]
    unread = [line["expected"]["overall"] is None for line in lines]
    assert found["unread_replies"] == pytest.approx(sum(unread) / len(unread), abs=1e-4)
    assert any("did not fit the pattern" in note for note in found["notes"]) and found["probes"] is None
    assert 0 < found["accuracy"]["judge"]["overall"]["value"] < 1
    row = json.loads((tmp_path / "04_train_sr_grpo" / "metrics.jsonl").read_text())
    assert 0 <= row["bad_rewards"] < 9 and row["val_reward"] is not None
    measured = run.read_json(tmp_path / "05_eval_sr" / "results.json")
    assert 2 <= measured["images"] < len({line["group"] for line in lines})
    assert all(means["reward"] is not None for means in measured["mean"].values())

    for i in range(4):                                                  # a ranking keeps the crops that can be read
        for part, image in zip(("lr", "sr"), make_images(i, 96, 96)):
            (tmp_path / part).mkdir(exist_ok=True)
            write_png(tmp_path / part / f"{i}.png", image)
    stage = load_stage("03")
    stage.main(load_config(stage.Config, stage.__file__, [
        str(toy_config), f"run={tmp_path}", f"judge={path}", f"lr_dir={tmp_path / 'lr'}", f"sr_dirs={tmp_path / 'sr'}",
        "crop=32", f"out={tmp_path / 'ranked'}"]))
    ranked = run.read_json(tmp_path / "ranked" / "results.json")
    note, = (note for note in ranked["notes"] if "did not fit its pattern: their crops are left out" in note)
    assert 0 < int(note.split()[0]) < 4 * 9 * 2
    assert all(row["images"] == 4 and 0 <= row["overall"]["value"] < 1000 for row in ranked["ranking"])


@pytest.mark.parametrize("change, says", [
    ({"prompt": "only {lr}"}, "{lr} and {sr} once each"), ({"pattern": "(?P<beauty>.)"}, "should have named groups"),
    ({"pattern": "("}, "no regular expression"), ({"max_tokens": "6"}, "should have the keys"),
    ({"model": "/nowhere"}, "cannot be loaded")])
def test_a_question_that_cannot_work_is_one_line(tmp_path, capsys, change, says):
    good = {"model": "x", "prompt": PROMPT, "pattern": "(?P<overall>.)", "max_tokens": 6}
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(good | change))
    with pytest.raises(SystemExit):
        mllm.load_judge(tmp_path / "judge.yaml", CPU)
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
