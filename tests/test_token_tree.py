"""
Shared prefixes against one plain row per reply, of each family: values, gradients, with and without what saves memory.

Run     python -m pytest tests/test_token_tree.py       # 20 s
"""
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import plain_rows
from common import mllm, replies, token_tree
from common.groups import Cohort
from common.replies import answer_logp, token_logp
from common.small_mllm import build_tokenizer
from conftest import load_stage, make_images
from test_families import CPU, load, save_random, stock_inputs

GROUPS = [make_images(0, 64, 64, count=2), make_images(1, 64, 112, count=3)]     # [LR, candidate, ..]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def judge(request, tmp_path_factory) -> mllm.Judge:
    """A small random one of each family, with LoRA, loaded as a hub checkpoint is."""
    folder = tmp_path_factory.mktemp(request.param)
    save_random(folder, request.param, build_tokenizer())
    return load(folder, lora=True)


def loss_and_gradients(judge: mllm.Judge, groups: list[list]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean log-probability of three replies and of all digits to each candidate."""
    rng = np.random.default_rng(0)
    texts = [[[judge.encode(mllm.compose_reply(rng.uniform(1, 9, 3), "warp" * k)) for k in range(3)]
              for _ in group[1:]] for group in groups]
    digits = judge.digit_ids.expand(3 * sum(map(len, texts)), -1)
    logp, mask, digit_logp = answer_logp(judge, *mllm.image_features(judge, groups), texts, digits)
    loss = logp[mask].mean() + digit_logp.mean()
    loss.backward()
    gradients = {name: p.grad for name, p in judge.model.named_parameters() if p.grad is not None}
    judge.model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("trained, long, multiple", [("lora", 10**6, 1), ("lora", 0, 1), ("all", 0, 64)])
def test_loss_and_gradients_of_shared_prefixes_are_those_of_plain_rows(judge, monkeypatch, trained, long, multiple):
    """With one dense mask, and branch by branch (long 0), these filled up to multiples of so many tokens."""
    monkeypatch.setattr(token_tree, "LONG", long)
    monkeypatch.setitem(token_tree.PAD_TO, "cpu", multiple)
    frozen = {name for name, p in judge.model.named_parameters() if not p.requires_grad}
    judge.model.requires_grad_(True) if trained == "all" else None
    results = []
    for rows in (nullcontext(), plain_rows.plain_rows()):
        with rows:
            results.append(loss_and_gradients(judge, GROUPS))
    for name, p in judge.model.named_parameters():
        p.requires_grad_(name not in frozen)
    (loss, gradients), (plain_loss, plain) = results
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == plain.keys() and any("visual" in name for name in plain) == (trained == "all")
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * max(1, float(gradient.abs().max())))


@pytest.mark.parametrize("family, dtype, long", [
    ("qwen2_5_vl", "float32", 10**6), ("qwen3_vl", "float32", 0), ("qwen3_vl", "bfloat16", 0)])
def test_a_shared_prefix_that_changes_scores_beyond_the_noise_stops_the_run(tmp_path, monkeypatch, capsys, family,
                                                                            dtype, long):
    """A fault of our own making: a candidate sees the one before it."""
    monkeypatch.setattr(token_tree, "LONG", long)
    save_random(tmp_path, family, build_tokenizer())
    judge, collate, nothing = load(tmp_path, lora=True, dtype=dtype), token_tree.collate, np.zeros((3, 3))
    cohort = Cohort("", GROUPS[1][0], GROUPS[1][1:], [""] * 3, nothing, nothing)
    error, noise = replies.check_shared_prefix(judge, cohort)
    assert max(error, noise) < (1e-4 if dtype == "float32" else 0.06)

    def leaky(rows, device):
        result = collate(rows, device)
        result.mask[:, 0] |= torch.ones_like(result.mask[0, 0]).tril() & result.valid[:, None]
        return result

    monkeypatch.setattr(token_tree, "collate", leaky)
    monkeypatch.setattr(token_tree, "LONG", 10**6)                      # branches would take their keys from the tree
    capsys.readouterr()
    with pytest.raises(SystemExit):
        replies.check_shared_prefix(judge, cohort)
    assert "cannot share prefixes" in capsys.readouterr().err


def test_plain_rows_are_what_transformers_computes_from_pixels(judge):
    lr, *images = GROUPS[1]
    features, grids = mllm.image_features(judge, [[lr, *images]])
    row = mllm.prompt_row(judge, grids[0], grids[1:])
    with torch.no_grad():
        hidden = plain_rows.hidden_states(judge, token_tree.collate([row], CPU), features)
        for c, image in enumerate(images):
            wanted = judge.net.model(**stock_inputs(judge, [lr, image], "")).last_hidden_state[0]
            at = len(row[0].ids) + sum(len(s.ids) for s in row[1:1 + c])
            torch.testing.assert_close(hidden[0, at:at + len(row[1 + c].ids)], wanted[len(row[0].ids):])


@pytest.mark.parametrize("family, lora, long", [("qwen2_5_vl", True, 10**6), ("qwen3_vl", False, 0)])
def test_activations_computed_again_give_the_same_loss_and_gradients(tmp_path, monkeypatch, family, lora, long):
    monkeypatch.setattr(token_tree, "LONG", long)
    save_random(tmp_path, family, build_tokenizer())
    stage, results, held = load_stage("02"), [], []
    for checkpointing in (False, True):
        cfg = stage.Config(run="", lora_rank=4 * lora, gradient_checkpointing=checkpointing)
        judge = stage.prepare(cfg, load(tmp_path), lora=lora)
        judge.model.train(checkpointing)
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            results.append(loss_and_gradients(judge, GROUPS[:1]))
        held.append(sum(sizes))
    (loss, kept), (again, computed) = results
    assert held[1] < held[0] / 3 and loss == again
    assert all(torch.equal(computed[name], gradient) for name, gradient in kept.items())


def test_log_probabilities_in_chunks_are_the_same_and_hold_no_logits(judge, monkeypatch):
    vocabulary, n = judge.net.lm_head.out_features, 50
    hidden = torch.randn(n, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = judge.digit_ids[torch.arange(n * 2).view(n, 2) % 9]
    results, held = [], []
    for limit in (2**24, 7 * vocabulary):
        monkeypatch.setattr(replies, "CHUNK_LOGITS", limit)
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            logp = token_logp(judge, hidden, tokens)
        results.append((logp, *torch.autograd.grad(logp.square().sum(), hidden)))
        held.append(max(sizes))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert held[0] == n * vocabulary > 4 * held[1]
