"""
The reward model without shared prefixes: one plain row per leaf of a token tree, as transformers itself reads it.

The slow reference for token trees and for sampling, in tests and in gpu_check.py.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from common import mllm, replies
from common.token_tree import Rows, Segment, path


def leaves(tree: list[Segment]) -> list[int]:
    return sorted(set(range(len(tree))) - {segment.parent for segment in tree})


@contextmanager
def plain_rows() -> Iterator[None]:
    """Inside, judges compute hidden states in plain rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllm, "hidden_states", hidden_states)
        yield


def model_inputs(judge, texts: list[list[int]], images: list[list[tuple[Tensor, Tensor]]], side: str = "right") -> dict:
    """
    What `model(...)` and `generate` take for one row per text, padded on one side.

    images: (features, grid) of each row's images, in order.
    """
    ids, valid = (pad_sequence([torch.tensor(own) for own in values], batch_first=True, padding_side=side)
                  for values in (texts, [[True] * len(own) for own in texts]))                              # [B, L]
    ids, valid = ids.to(judge.device), valid.to(judge.device)
    features, grids = zip(*sum(images, []))
    return dict(input_ids=ids, attention_mask=valid.long(), image_grid_thw=torch.stack(grids).to(judge.device),
                mm_token_type_ids=((ids == judge.image_id) & valid).int(),
                mm_encoder_outputs=mllm.vision_output(judge, features))


def hidden_states(judge, rows: Rows, features: list[Tensor], cache: None = None) -> Tensor:
    """As mllm.hidden_states, [B, L, D]; positions and causal mask are transformers' own. No key-value cache."""
    given, texts, images = iter(features), [], []
    source = torch.zeros(2, *rows.ids.shape, dtype=torch.long)             # of each tree token: plain row, place in it
    for b, tree in enumerate(rows.trees):
        own = {s: (next(given), segment.grid) for s, segment in enumerate(tree) if segment.grid is not None}
        for leaf in leaves(tree):
            branch = path(tree, leaf)
            columns = [rows.starts[b][s] + i for s in branch for i in range(len(tree[s].ids))]
            source[:, b, columns] = torch.stack([torch.full((len(columns),), len(texts)), torch.arange(len(columns))])
            texts.append([token for s in branch for token in tree[s].ids])
            images.append([own[s] for s in branch if s in own])
    hidden = judge.net.model(**model_inputs(judge, texts, images), use_cache=False).last_hidden_state
    return hidden[source[0].to(judge.device), source[1].to(judge.device)]


@torch.no_grad()
def generate(judge: mllm.Judge, features: list[Tensor], grids: Tensor, uniforms: Tensor, sizes: list[int]) -> list:
    """As sample_replies, by transformers' `generate`: every reply a row of its own, ended rows stay in the batch."""
    (n, k, limit), given = uniforms.shape, list(zip(features, grids))
    texts, images, at = [], [], 0
    for of_cohort in grids.split([1 + c for c in sizes]):
        tree = mllm.prompt_row(judge, of_cohort[0], of_cohort[1:])
        for candidate in range(1, len(tree)):
            texts += [tree[0].ids + tree[candidate].ids] * k
            images += [[given[at], given[at + candidate]]] * k
        at += len(tree)
    inputs, numbers = model_inputs(judge, texts, images, side="left"), uniforms.flatten(0, 1)

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        """Leaves one token per row: the draw of the row's next number."""
        t = ids.shape[1] - inputs["input_ids"].shape[1]
        scores = scores.float().index_fill(-1, judge.banned_ids, -torch.inf)
        token = replies.draw(scores, numbers[:, t:t + 1].to(judge.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    suggested = judge.net.generation_config             # by the checkpoint, such as repetition_penalty: not our policy
    judge.net.generation_config = GenerationConfig(eos_token_id=judge.end_id, pad_token_id=judge.end_id)
    try:
        tokens = judge.net.generate(**inputs, max_new_tokens=limit, do_sample=False, logits_processor=[choose])
    finally:
        judge.net.generation_config = suggested
    written = tokens[:, inputs["input_ids"].shape[1]:].unflatten(0, (n, k)).tolist()
    return [[ids[:ids.index(judge.end_id) + 1] if judge.end_id in ids else ids for ids in row] for row in written]
