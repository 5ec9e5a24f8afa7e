"""
How the reward model writes: all replies to all candidates of an LR image at once, each token drawn by a given number.

The replies grow as branches of the token tree that holds the prompt (token_tree.py): the prompt is computed once, its
keys and values are stored once, and a step computes one token for each reply that has not ended.

Shapes: B rows (one LR image each), N prompts (LR, candidate), K replies, T tokens of the longest, V vocabulary.
"""
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from common import mllm, plain_rows, token_tree
from common.mllm import Judge, policy_logits, prompt_row
from common.token_tree import Rows


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF samples at temperature 1: logits [n, V], uniforms [n, k] in [0, 1) -> token ids [n, k]."""
    cdf = logits.double().softmax(-1).cumsum(-1)         # float64: u < 1 never reaches past the end
    ids = torch.searchsorted(cdf, uniforms.to(cdf) * cdf[:, -1:], right=True)
    return ids.clamp(max=logits.shape[1] - 1)           # NaN logits end there; their loss is NaN: the step is skipped


def prompt_trees(judge: Judge, grids: Tensor, sizes: list[int]) -> list:
    """One tree per LR image; grids of LR, candidate 1..C, LR, ..; sizes: C of each."""
    return [prompt_row(judge, own[0], own[1:]) for own in grids.split([1 + n for n in sizes])]


@torch.no_grad()
def write(judge: Judge, features: list[Tensor], grids: Tensor, sizes: list[int], *, digits: Tensor,
          uniforms: Tensor) -> tuple[Tensor, list[list[list[int]]]]:
    """
    Answers to N prompts, one number in [0, 1) per token: K_direct tokens behind each stem, and K replies.

    features, grids: of LR, candidate 1..C of every LR image; sizes: C of each. digits [N * 3, K_direct], uniforms
    [N, K, T]; K may be 0. Returns token ids [N * 3, K_direct] and N x K lists of token ids.
    """
    trees = prompt_trees(judge, grids, sizes)
    stems = [mllm.add_stems(judge, tree, list(range(1, len(tree)))) for tree in trees]
    rows = token_tree.collate(trees, judge.device)
    cache = DynamicCache(config=judge.net.config.get_text_config()) if uniforms.shape[1] else None
    hidden = mllm.hidden_states(judge, rows, features, cache)
    direct = draw(policy_logits(judge, hidden[token_tree.last_tokens(rows, stems)]), digits.to(judge.device))
    if not uniforms.shape[1]:
        return direct, [[] for _ in uniforms]
    if judge.plain_rows:
        return direct, generate(judge, features, grids, uniforms, sizes)
    return direct, decode(judge, rows, hidden, cache, uniforms)


def sample_replies(judge: Judge, features: list[Tensor], grids: Tensor, uniforms: Tensor,
                   sizes: list[int] | None = None) -> list[list[list[int]]]:
    """The replies alone, see `write`; sizes: 1 candidate each if not given."""
    none = torch.zeros(3 * len(uniforms), 0)
    return write(judge, features, grids, sizes or [1] * len(uniforms), digits=none, uniforms=uniforms)[1]


@torch.no_grad()
def decode(judge: Judge, rows: Rows, hidden: Tensor, cache: DynamicCache, uniforms: Tensor) -> list[list[list[int]]]:
    """
    Replies to the candidates of `rows`, whose hidden states [B, L, D] and cache are given; see sample_replies.

    A row has M slots, one per reply; slots that its candidates do not fill have ended before they begin.
    """
    (n, k, limit), device = uniforms.shape, judge.device
    prompts = [[s for s, segment in enumerate(tree) if s and segment.grid is not None] for tree in rows.trees]
    b, last = token_tree.last_tokens(rows, prompts)                                                    # [N], [N]
    sizes = torch.tensor([len(own) for own in prompts], device=device)
    filled = torch.arange(int(sizes.max()), device=device) < sizes[:, None]                            # [B, C]
    prompt = torch.zeros_like(filled, dtype=torch.long).masked_scatter(filled, torch.arange(n, device=device))
    begin = torch.tensor([rows.ends[r][s] for r, own in enumerate(prompts) for s in own], device=device)
    logits, begin, prefix = (x[prompt].repeat_interleave(k, 1) for x in (
        policy_logits(judge, hidden[b, last]), begin, rows.mask[b, 0, last]))          # [B, M, V], [B, M], [B, M, L]
    number, alive = uniforms.to(device)[prompt].flatten(1, 2), filled.repeat_interleave(k, 1)          # [B, M, T]
    tokens = torch.full_like(number, judge.end_id, dtype=torch.long)
    left = torch.arange(len(tokens), device=device)                                    # rows with unfinished replies
    who = torch.arange(tokens.shape[1], device=device).expand(len(tokens), -1)         # [B, m] slots of the last step
    owner = who[:, :0]                                                                 # [B, .] slots of cached tokens
    for t in range(limit):
        drawn = draw(logits.flatten(0, 1), number[..., t].gather(1, who).reshape(-1, 1)).view_as(who)
        drawn = torch.where(alive.gather(1, who), drawn, judge.end_id)
        tokens[left[:, None], who, t] = drawn
        alive = alive & (tokens[left, :, t] != judge.end_id)
        going = alive.any(1)
        if t + 1 == limit or not going.any():
            break
        if not going.all():                                                            # a row without replies leaves
            cache.batch_select_indices(going.nonzero()[:, 0])
            left, alive, owner, begin, prefix, number = (x[going] for x in (left, alive, owner, begin, prefix, number))
        who = alive.int().argsort(dim=1, descending=True, stable=True)[:, :int(alive.sum(1).max())]
        owner = torch.cat([owner, who], 1)
        seen = torch.cat([prefix.gather(1, who[..., None].expand(-1, -1, prefix.shape[2])),
                          owner[:, None] == who[..., None]], 2)                        # prompt; earlier tokens, itself
        hidden = judge.net.model(
            input_ids=tokens[left[:, None], who, t], position_ids=(begin.gather(1, who) + t).expand(3, -1, -1),
            attention_mask=seen[:, None], past_key_values=cache, use_cache=True).last_hidden_state
        logits = policy_logits(judge, hidden)                                          # [B, m, V]
    return cut(judge, tokens[filled.repeat_interleave(k, 1)].view(n, k, limit))


def cut(judge: Judge, tokens: Tensor) -> list[list[list[int]]]:
    """Token ids [N, K, T] as lists that end with the first end token."""
    end = judge.end_id
    return [[ids[:ids.index(end) + 1] if end in ids else ids for ids in own] for own in tokens.tolist()]


@torch.no_grad()
def generate(judge: Judge, features: list[Tensor], grids: Tensor, uniforms: Tensor, sizes: list[int]) -> list:
    """As sample_replies, by transformers' `generate`: every reply a row of its own, ended rows stay in the batch."""
    (n, k, limit), given = uniforms.shape, list(zip(features, grids))
    texts, images, at = [], [], 0
    for tree in prompt_trees(judge, grids, sizes):
        for candidate in range(1, len(tree)):
            texts += [tree[0].ids + tree[candidate].ids] * k
            images += [[given[at], given[at + candidate]]] * k
        at += len(tree)
    inputs, numbers = plain_rows.model_inputs(judge, texts, images, side="left"), uniforms.flatten(0, 1)

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        """Leaves one token per row: the draw of the row's next number."""
        t = ids.shape[1] - inputs["input_ids"].shape[1]
        token = draw(scores.float().index_fill(-1, judge.banned_ids, -torch.inf), numbers[:, t:t + 1].to(judge.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    suggested = judge.net.generation_config             # by the checkpoint, such as repetition_penalty: not our policy
    judge.net.generation_config = GenerationConfig(eos_token_id=judge.end_id, pad_token_id=judge.end_id)
    try:
        tokens = judge.net.generate(**inputs, max_new_tokens=limit, do_sample=False, logits_processor=[choose])
    finally:
        judge.net.generation_config = suggested
    written = tokens[:, inputs["input_ids"].shape[1]:]
    return cut(judge, written.unflatten(0, (n, k)))
