"""
What a judge is shown of a cohort: turned, flipped, in another order of colors; and the features of it.

The reward model as a policy: replies that it writes, and their log-probabilities, for GRPO.

For every (LR, candidate) it writes, behind the stem of each axis, K_direct single digits, and K replies with reasoning.
One row per cohort (an LR image and its C candidates) serves the loss, see `forward`.

Shapes: N prompts, K replies, T tokens of the longest reply, V vocabulary.

How the reward model writes: all replies to all candidates of an LR image at once, each token drawn by a given number.

The replies grow as branches of the token tree that holds the prompt (token_tree.py): the prompt is computed once, its
keys and values are stored once, and a step computes one token for each reply that has not ended.

Shapes: B rows (one LR image each), N prompts (LR, candidate), K replies, T tokens of the longest, V vocabulary.
"""
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from common import mllm, run, sharding, token_tree
from common.groups import Cohort
from common.metrics import AXES
from common.mllm import Judge, policy_logits, prompt_row
from common.token_tree import Rows

CHANNEL_ORDERS = [list(order) for order in itertools.permutations(range(3))]


@dataclass
class Images:                           # what a judge is shown of a cohort: LR, candidate 1..C
    pixels: Tensor                      # [patches, 3 * 2 * p * p]
    grids: Tensor                       # [1 + C, 3]
    features: dict = field(default_factory=dict)    # by vision tower (its id), of frozen ones: 1 + C tensors


def turned(image: np.ndarray, look: int) -> np.ndarray:
    """The image in one of 48 ways: 0 as it is, below 4 in quarter turns, below 8 flipped, from 8 in other colors."""
    channels, turn = CHANNEL_ORDERS[look // 8], look % 8
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if turn & 4 else image, turn & 3)[..., channels])


def look_at(judge: Judge, cohort: Cohort, look: int) -> Images:
    """All of the cohort's images turned alike; labels are taken to stay as they are."""
    return Images(*mllm.pixel_patches(judge, [[turned(image, look) for image in [cohort.lr, *cohort.images]]]))


def encode(judge: Judge, images: list[Images]) -> tuple[list[Tensor], Tensor]:
    """
    Features and grids of LR, candidate 1..C, LR, candidate 1..C, ..: [cohorts * (1 + C)].

    A vision tower that does not train sees the same images once: rollout, reference and policy share what it found.
    One in shards sees them each time, as all ranks must make the same passes.
    """
    tower, grids = id(judge.net.model.visual), torch.cat([own.grids for own in images])
    if not all(tower in own.features for own in images):
        features = mllm.patch_features(judge, torch.cat([own.pixels for own in images]), grids)
        if mllm.tower_trained(judge) or sharding.units(judge):
            return features, grids
        found = iter(features)
        for own in images:
            own.features[tower] = [next(found) for _ in own.grids]
    return [feature for own in images for feature in own.features[tower]], grids


def encode_images(judge: Judge, cohorts: list[Cohort], looks: list[int]) -> tuple[list[Tensor], Tensor]:
    return encode(judge, [look_at(judge, cohort, look) for cohort, look in zip(cohorts, looks)])


CHUNK_LOGITS = 2**24                    # float32 logits held at once: 64 MB


def token_logp(judge: Judge, hidden: Tensor, tokens: Tensor) -> Tensor:
    """
    Log-probabilities [n, m] of tokens [n, m] behind hidden states [n, D].

    In chunks of the rows that are computed again for the gradient: n x V logits are never held.
    """
    def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
        return log_softmax(policy_logits(judge, hidden), -1).gather(-1, tokens)

    size = max(1, CHUNK_LOGITS // judge.net.lm_head.out_features)
    if len(hidden) <= size:
        return chunk(hidden, tokens)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False)
                      for part in zip(hidden.split(size), tokens.split(size))])


def forward(judge: Judge, features: list[Tensor], grids: Tensor, replies: list[list[list[list[int]]]]) -> tuple:
    """
    One row per cohort: the LR image once, below it the candidates, below each its three stems and its replies.

    features, grids: of LR, candidate 1..C of every cohort. replies: cohorts x C x K token ids, K may be 0.
    Returns the hidden states behind the stems [cohorts * C * 3, D] and, for all tokens of all replies, the hidden
    states that predict them [n, D] and their ids [n].
    """
    trees, stems, written, at = [], [], [], 0
    for b, own in enumerate(replies):
        row = prompt_row(judge, grids[at], grids[at + 1:at + 1 + len(own)])
        stems.append(mllm.add_stems(judge, row, list(range(1, len(row)))))
        for c, texts in enumerate(own):
            written += [(b, len(row) + k) for k in range(len(texts))]
            row += [token_tree.text_segment(ids, c + 1) for ids in texts]
        trees.append(row)
        at += 1 + len(own)
    rows = token_tree.collate(trees, judge.device)
    hidden = mllm.hidden_states(judge, rows, features)
    behind_stems = hidden[token_tree.last_tokens(rows, stems)]
    if not written:
        return behind_stems, behind_stems[:0], torch.zeros(0, dtype=torch.long, device=judge.device)
    b, column, token = token_tree.reply_tokens(rows, written)
    return behind_stems, hidden[b, column], token


def learning_mode(judge: Judge) -> None:
    """As in rollouts, without dropout; in training mode where activations are not kept, as transformers wants it."""
    judge.model.train(judge.net.is_activation_checkpointing)


def answer_logp(judge: Judge, features: list[Tensor], grids: Tensor, replies: list, digits: Tensor) -> tuple[Tensor, ...]:
    """
    Log-probabilities of the answers to n prompts (cohorts x C) under the current weights, with gradient.

    replies: cohorts x C x K token ids; digits [n * 3, K_direct] token ids written behind the stems.
    Returns replies [n * K, T], padded with 0; their mask [n * K, T]; digits [n * 3, K_direct].
    """
    behind_stems, hidden, token = forward(judge, features, grids, replies)
    digit_logp = token_logp(judge, behind_stems, digits.to(judge.device))
    lengths = [len(ids) for cohort in replies for own in cohort for ids in own]
    if not lengths:
        return digit_logp.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.bool, device=judge.device), digit_logp
    flat = token_logp(judge, hidden, token[:, None])[:, 0]
    padded = torch.nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True)
    mask = torch.arange(padded.shape[1], device=judge.device) < torch.tensor(lengths, device=judge.device)[:, None]
    return padded, mask, digit_logp


@dataclass
class Answers:                          # what the model wrote about one cohort, and what it earns
    cohort: Cohort
    images: Images
    digits: Tensor                      # [C * 3, K_direct] token ids written behind the stems
    replies: list[list[list[int]]]      # C x K token ids; K is 0 where only direct answers were asked for
    texts: list[list[str]] = None       # C x K
    digit_rewards: Tensor = None        # [C * 3, K_direct] NaN: the axis has no label
    reply_rewards: Tensor = None        # [C, K]
    axis_rewards: Tensor = None         # [3, C, K] the ranking reward alone; NaN: not parsed, or no label
    digit_advantages: Tensor = None     # [C * 3, K_direct]
    advantages: list[Tensor] = None     # C * K x [tokens of the reply]
    digit_kept: Tensor = None           # [C * 3] bool, False: dropped, without a label or too much alike
    kept: Tensor = None                 # [C] bool, likewise for the replies


def digit_places(judge: Judge, text: str, ids: list[int]) -> list[int]:
    """Where in a reply the score of each axis stands, [3]; [] if it does not parse or a score is not one token."""
    if mllm.parse_reply(text) is None:
        return []
    digits = set(judge.digit_ids.tolist())
    places = [place for place, token in enumerate(ids) if token in digits][-3:]
    ends = [judge.tokenizer.decode(ids[:place]) for place in places]
    right = len(places) == 3 and all(end.endswith(f"{axis}: ") for end, axis in zip(ends, AXES))
    return places if right else []


def pieces(items: list, with_replies: list[bool], size: int) -> list[list]:
    """Lists of at most `size` items; those with replies, whose rows are long, apart from those without."""
    kinds = [[item for item, kind in zip(items, with_replies) if kind == wanted] for wanted in (True, False)]
    return [kind[i:i + size] for kind in kinds for i in range(0, len(kind), size)]


@torch.no_grad()
def sample_answers(judge: Judge, cfg, cohorts: list[Cohort], step: int, reasoned: set[str]) -> list[Answers]:
    """
    Let the model answer; the randomness of an answer depends on (seed, step, LR, candidate, number) alone.

    cfg: settings of stage 02. reasoned: ids of the cohorts that get replies with reasoning besides the direct answers.
    """
    answers = []
    for part in pieces(cohorts, [c.id in reasoned for c in cohorts], cfg.groups_per_forward):
        looks = [int(run.np_rng(cfg.seed, "look", step, c.id).integers(cfg.looks)) for c in part]
        images, sizes = [look_at(judge, *pair) for pair in zip(part, looks)], [len(c.images) for c in part]
        features, grids = encode(judge, images)
        keys = [(c.id, i) for c in part for i in range(len(c.images))]
        draws = [torch.rand(3 * cfg.direct_replies + cfg.replies * cfg.max_reply_tokens,
                            generator=run.generator(cfg.seed, "answer", step, *key)) for key in keys]
        direct, written = torch.stack(draws).split([3 * cfg.direct_replies, cfg.replies * cfg.max_reply_tokens], 1)
        k = cfg.replies if part[0].id in reasoned else 0
        digits, replies = write_answers(judge, features, grids, sizes, digits=direct.reshape(-1, cfg.direct_replies),
                                         uniforms=written.unflatten(1, (cfg.replies, -1))[:, :k])
        for cohort, shown, n, own in zip(part, images, sizes, digits.split([3 * n for n in sizes])):
            answers.append(Answers(cohort, shown, own, replies[:n]))
            replies = replies[n:]
    return answers


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF samples at temperature 1: logits [n, V], uniforms [n, k] in [0, 1) -> token ids [n, k]."""
    cdf = logits.double().softmax(-1).cumsum(-1)         # float64: u < 1 never reaches past the end
    ids = torch.searchsorted(cdf, uniforms.to(cdf) * cdf[:, -1:], right=True)
    return ids.clamp(max=logits.shape[1] - 1)           # NaN logits end there; their loss is NaN: the step is skipped


def prompt_trees(judge: Judge, grids: Tensor, sizes: list[int]) -> list:
    """One tree per LR image; grids of LR, candidate 1..C, LR, ..; sizes: C of each."""
    return [prompt_row(judge, own[0], own[1:]) for own in grids.split([1 + n for n in sizes])]


@torch.no_grad()
def write_answers(judge: Judge, features: list[Tensor], grids: Tensor, sizes: list[int], *, digits: Tensor,
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
    return direct, decode(judge, rows, hidden, cache, uniforms)


def sample_replies(judge: Judge, features: list[Tensor], grids: Tensor, uniforms: Tensor,
                   sizes: list[int] | None = None) -> list[list[list[int]]]:
    """The replies alone, see `write`; sizes: 1 candidate each if not given."""
    none = torch.zeros(3 * len(uniforms), 0)
    return write_answers(judge, features, grids, sizes or [1] * len(uniforms), digits=none, uniforms=uniforms)[1]


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
