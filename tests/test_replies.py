"""
What the judge writes: against transformers' `generate`, whoever is in the batch; and how the pictures are shown to it.

Run     python -m pytest tests/test_replies.py          # 15 s
"""
import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import plain_rows
from common import mllm, replies, token_tree
from common.replies import draw, sample_replies, turned
from common.small_mllm import build_tokenizer
from conftest import build_judge, make_images
from test_families import load, save_random, stock_inputs

GROUPS = [make_images(0, 64, 64, count=2), make_images(1, 64, 112, count=3), make_images(2, 64, 64, count=1)]
SIZES = [2, 3, 1]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def judge(request, tmp_path_factory) -> mllm.Judge:
    """A small random one of each family, with LoRA, loaded as a hub checkpoint is; some of its replies end early."""
    folder = tmp_path_factory.mktemp(request.param)
    save_random(folder, request.param, build_tokenizer())
    judge = load(folder, lora=True)
    with torch.no_grad():
        judge.net.lm_head.weight[judge.end_id] *= 10
    return judge


def test_likely_replies_are_those_of_greedy_generate_from_pixels(judge, monkeypatch):
    """With sharp chances every number draws the likeliest token."""
    policy_logits = mllm.policy_logits
    monkeypatch.setattr("common.replies.policy_logits", lambda *given: 1e5 * policy_logits(*given))
    ours = sample_replies(judge, *mllm.image_features(judge, GROUPS), torch.rand(6, 2, 12), SIZES)
    pairs, wanted = [[lr, image] for lr, *images in GROUPS for image in images], []
    for pair in pairs:
        inputs = stock_inputs(judge, pair, "")
        tokens = judge.net.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=judge.end_id,
                                    pad_token_id=judge.end_id, suppress_tokens=judge.banned_ids.tolist())
        ids = tokens[0, inputs["input_ids"].shape[1]:].tolist()
        wanted.append(ids[:ids.index(judge.end_id) + 1] if judge.end_id in ids else ids)
    assert ours == [[ids, ids] for ids in wanted] and len({tuple(ids) for ids in wanted}) > 1


@pytest.mark.parametrize("long, look_every", [(10**6, 1), (0, 8)])
def test_sampled_replies_are_those_of_generate_with_the_same_numbers_and_of_each_alone(judge, monkeypatch, long,
                                                                                       look_every):
    """Whatever the checkpoint suggests for writing; Qwen2.5-VL's has a repetition penalty of 1.05."""
    monkeypatch.setattr(token_tree, "LONG", long)
    monkeypatch.setitem(replies.LOOK_EVERY, "cpu", look_every)
    suggested = GenerationConfig(repetition_penalty=1.05, no_repeat_ngram_size=2, num_beams=2, min_new_tokens=9,
                                 do_sample=True, temperature=0.1, top_k=3, suppress_tokens=[judge.end_id])
    monkeypatch.setattr(judge.net, "generation_config", suggested)
    features, grids = mllm.image_features(judge, GROUPS)
    uniforms = torch.rand(6, 4, 16, generator=torch.Generator().manual_seed(0))
    ours = sample_replies(judge, features, grids, uniforms, SIZES)
    assert ours == plain_rows.generate(judge, features, grids, uniforms, SIZES)
    lengths = [len(ids) for row in ours for ids in row]
    assert len(set(lengths)) > 2 and max(lengths) == 16
    for n, (group, candidate) in enumerate((g, c) for g, size in enumerate(SIZES) for c in range(1, 1 + size)):
        pair = [GROUPS[group][0], GROUPS[group][candidate]]
        alone = sample_replies(judge, *mllm.image_features(judge, [pair]), uniforms[n:n + 1, [2, 0]], [1])
        assert alone == [[ours[n][2], ours[n][0]]]


def test_image_tokens_are_never_written_and_draws_have_the_chances_of_the_logits():
    judge, _ = build_judge()
    names = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad", "vision_pad")]
    assert sorted(judge.banned_ids.tolist()) == sorted(judge.tokenizer.convert_tokens_to_ids(names))
    logits = mllm.policy_logits(judge, 100 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    assert logits[:, judge.banned_ids].isneginf().all() and logits.dtype == torch.float32
    ends = torch.tensor([0.0, 1 - 2**-24]).expand(50, 2)            # the least and the greatest of torch.rand
    assert not torch.isin(draw(logits, ends), judge.banned_ids).any()
    first_and_last = torch.full((1, 9), -torch.inf).index_fill(1, torch.tensor([3, 5]), 0.0)
    assert draw(first_and_last, ends[:1]).tolist() == [[3, 5]]
    uniforms = torch.rand(1, 20000, generator=torch.Generator().manual_seed(1))
    drawn = draw(torch.tensor([[0.1, 0.2, 0.7]]).log(), uniforms)[0]
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 20000, torch.tensor([0.1, 0.2, 0.7]), rtol=0,
                               atol=0.01)


def test_the_first_8_looks_keep_colors_and_all_48_differ():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    looks = [turned(image, look) for look in range(48)]
    assert len({look.tobytes() for look in looks}) == 48 and np.array_equal(looks[0], image)
    colors = [sorted(map(tuple, look.reshape(-1, 3).tolist())) for look in looks]
    assert colors[:8] == [colors[0]] * 8 and colors[0] not in colors[8:]
    rows = [turned(np.arange(12).reshape(2, 2, 3), look)[..., 0].tolist() for look in range(8)]
    assert rows == [[[0, 3], [6, 9]], [[3, 9], [0, 6]], [[9, 6], [3, 0]], [[6, 0], [9, 3]],
                    [[3, 0], [9, 6]], [[0, 6], [3, 9]], [[6, 9], [0, 3]], [[9, 3], [6, 0]]]
