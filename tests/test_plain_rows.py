"""
Shared prefixes, growing branches and stored features against the plain way: one row per reply, `generate`, no sharing.

Run     python -m pytest tests/test_plain_rows.py       # 30 s
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import plain_rows
from common import mllm, replies, token_tree
from common.groups import Cohort
from common.replies import answer_logp, sample_replies, token_logp
from common.small_mllm import build_tokenizer
from conftest import load_stage, make_images
from test_families import CPU, load, save_random, stock_inputs


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def judge(request, tmp_path_factory) -> mllm.Judge:
    """A small random one of each family, with LoRA, loaded as a hub checkpoint is."""
    folder = tmp_path_factory.mktemp(request.param)
    save_random(folder, request.param, build_tokenizer())
    return load(folder, lora=True)


def cohort_of(seed: int, count: int) -> Cohort:
    lr, *images = make_images(seed, 64, 64 + 48 * (seed % 2), count=count)
    ranks = np.stack([np.random.default_rng([seed, axis]).permutation(count) + 1.0 for axis in range(3)], 1)
    return Cohort(f"c{seed}", lr, images, [""] * count, ranks, 9 - ranks)


# writing ---------------------------------------------------------------------------------------------------

def plain_generate(judge: mllm.Judge, group: list, limit: int) -> list[list[int]]:
    """transformers alone, from pixels to tokens; group [LR, candidate]."""
    inputs = stock_inputs(judge, group, "")
    tokens = judge.net.generate(**inputs, max_new_tokens=limit, do_sample=False, eos_token_id=judge.end_id,
                                pad_token_id=judge.end_id, suppress_tokens=judge.banned_ids.tolist())
    return [ids[:ids.index(judge.end_id) + 1] if judge.end_id in ids else ids
            for ids in tokens[:, inputs["input_ids"].shape[1]:].tolist()]


def test_likely_replies_are_those_of_greedy_generate(judge, monkeypatch):
    """With sharp chances every number draws the likeliest token."""
    cohorts = [cohort_of(0, 2), cohort_of(1, 3)]
    groups = [[c.lr, *c.images] for c in cohorts]
    policy_logits = mllm.policy_logits
    monkeypatch.setattr("common.replies.policy_logits", lambda *given: 1e5 * policy_logits(*given))
    ours = sample_replies(judge, *mllm.image_features(judge, groups), torch.rand(5, 2, 12), [2, 3])
    plain = [plain_generate(judge, [c.lr, image], 12)[0] for c in cohorts for image in c.images]
    assert ours == [[ids, ids] for ids in plain]
    assert len({tuple(ids) for ids in plain}) > 1


@pytest.mark.parametrize("long", [10**6, 0])
def test_sampled_replies_are_those_of_generate_with_the_same_numbers(judge, monkeypatch, long):
    """Whatever the checkpoint suggests for writing; Qwen2.5-VL's has a repetition penalty of 1.05."""
    monkeypatch.setattr(token_tree, "LONG", long)
    suggested = GenerationConfig(repetition_penalty=1.05, no_repeat_ngram_size=2, num_beams=2, min_new_tokens=9,
                                 do_sample=True, temperature=0.1, top_k=3, min_p=0.2, typical_p=0.5,
                                 suppress_tokens=[judge.end_id], eos_token_id=5)
    monkeypatch.setattr(judge.net, "generation_config", suggested)
    cohorts = [cohort_of(0, 2), cohort_of(1, 3), cohort_of(2, 1)]
    features, grids = mllm.image_features(judge, [[c.lr, *c.images] for c in cohorts])
    uniforms = torch.rand(6, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        judge.net.lm_head.weight[judge.end_id] *= 3                     # so that replies end, at different tokens
    try:
        ours = sample_replies(judge, features, grids, uniforms, [2, 3, 1])
        plain = plain_rows.generate(judge, features, grids, uniforms, [2, 3, 1])
    finally:
        with torch.no_grad():
            judge.net.lm_head.weight[judge.end_id] /= 3
    assert ours == plain and judge.net.generation_config is suggested
    lengths = [len(ids) for own in ours for ids in own]
    assert len(set(lengths)) > 2 and max(lengths) == 16


# the loss --------------------------------------------------------------------------------------------------

def gradients_of(judge: mllm.Judge, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in judge.model.named_parameters() if p.grad is not None}
    judge.model.zero_grad()
    return found


@pytest.mark.parametrize("trained, long", [("lora", 10**6), ("lora", 0), ("all", 0)])
def test_loss_and_gradients_of_shared_prefixes_are_those_of_plain_rows(judge, monkeypatch, trained, long):
    """With one dense mask, and branch by branch (long 0)."""
    monkeypatch.setattr(token_tree, "LONG", long)
    frozen = {name for name, p in judge.model.named_parameters() if not p.requires_grad}
    judge.model.requires_grad_(True) if trained == "all" else None
    cohorts = [cohort_of(0, 2), cohort_of(1, 3)]
    rng = np.random.default_rng(0)
    replies = [[[judge.encode(mllm.compose_reply(rng.uniform(1, 9, 3), "warp" * k)) for k in range(3)]
                for _ in c.images] for c in cohorts]
    digits = judge.digit_ids.expand(5 * 3, -1)
    found = []
    for way in (nullcontext(), plain_rows.plain_rows()):
        with way:
            logp, mask, direct = answer_logp(judge, *mllm.image_features(
                judge, [[c.lr, *c.images] for c in cohorts]), replies, digits)
        loss = logp[mask].mean() + direct.mean()
        found.append((loss.detach(), gradients_of(judge, loss)))
    for name, p in judge.model.named_parameters():
        p.requires_grad_(name not in frozen)
    (loss, ours), (plain_loss, plain) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    assert ours.keys() == plain.keys() and any("visual" in name for name in ours) == (trained == "all")
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(1, float(gradient.abs().max())))


def loss_and_gradients(judge: mllm.Judge, cohort: Cohort) -> tuple[float, list[torch.Tensor]]:
    """Mean log-probability of answers to the cohort, and its gradients."""
    texts = [[judge.encode(mllm.compose_reply(targets, "warp"))] for targets in cohort.targets]
    features = mllm.image_features(judge, [[cohort.lr, *cohort.images]])
    logp, mask, direct = answer_logp(judge, *features, [texts], judge.digit_ids.expand(len(texts) * 3, -1))
    loss = logp[mask].mean() + direct.mean()
    return float(loss.detach()), list(gradients_of(judge, loss).values())


@pytest.mark.parametrize("family, lora, long", [
    ("qwen2_5_vl", True, 10**6), ("qwen2_5_vl", True, 0), ("qwen3_vl", True, 0), ("qwen3_vl", False, 0)])
def test_activations_computed_again_give_the_same_loss_and_gradients(tmp_path, monkeypatch, family, lora, long):
    monkeypatch.setattr(token_tree, "LONG", long)
    save_random(tmp_path, family, build_tokenizer())
    stage, found, held = load_stage("02"), [], []
    for checkpointing in (False, True):
        cfg = stage.Config(run="", lora_rank=4 * lora, gradient_checkpointing=checkpointing)
        own = stage.prepare(cfg, load(tmp_path), lora=lora)
        sizes = [0]
        own.model.train(checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            found.append(loss_and_gradients(own, cohort_of(0, 2)))
        held.append(sum(sizes))
    (loss, kept), (again, computed) = found
    assert held[1] < held[0] / 3 and loss == again
    assert all(torch.equal(*pair) for pair in zip(kept, computed, strict=True))


def test_plain_rows_are_what_transformers_computes_from_pixels(judge):
    cohort = cohort_of(1, 2)
    features, grids = mllm.image_features(judge, [[cohort.lr, *cohort.images]])
    row = mllm.prompt_row(judge, grids[0], grids[1:])
    with torch.no_grad():
        hidden = plain_rows.hidden_states(judge, token_tree.collate([row], CPU), features)
        for c, image in enumerate(cohort.images):
            wanted = judge.net.model(**stock_inputs(judge, [cohort.lr, image], "")).last_hidden_state[0]
            at = len(row[0].ids) + sum(len(s.ids) for s in row[1:1 + c])
            torch.testing.assert_close(hidden[0, at:at + len(row[1 + c].ids)], wanted[len(row[0].ids):])


def test_log_probabilities_in_chunks_are_the_same_and_hold_no_logits(judge, monkeypatch):
    vocabulary, n = judge.net.lm_head.out_features, 50
    hidden = torch.randn(n, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = judge.digit_ids[torch.arange(n * 2).view(n, 2) % 9]
    found, held = [], []
    for limit in (2**24, 7 * vocabulary):
        monkeypatch.setattr(replies, "CHUNK_LOGITS", limit)
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            logp = token_logp(judge, hidden, tokens)
        found.append((logp, *torch.autograd.grad(logp.square().sum(), hidden)))
        held.append(max(sizes))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert held[0] == n * vocabulary > 4 * held[1]


# scores ----------------------------------------------------------------------------------------------------

def test_any_number_of_candidates_is_scored_as_each_alone(judge):
    groups = [cohort_of(seed, count) for seed, count in ((0, 1), (2, 7), (1, 3))]
    scores = mllm.expected_scores(judge, [c.lr for c in groups], [c.images for c in groups])
    assert scores.shape == (3, 7, 3) and scores.isnan().any(-1).sum(1).tolist() == [6, 0, 4]
    for own, found in zip(groups, scores):
        for c, image in enumerate(own.images):
            alone = mllm.expected_scores(judge, [own.lr], [[image]])[0, 0]
            torch.testing.assert_close(found[c], alone, rtol=0, atol=1e-5)
    with plain_rows.plain_rows():
        plain = mllm.expected_scores(judge, [c.lr for c in groups], [c.images for c in groups])
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5, equal_nan=True)
