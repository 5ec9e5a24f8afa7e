"""
What the judge writes: replies sampled token by token, and their log-probabilities, for GRPO.

For every (LR, candidate) it writes, behind the stem of each axis, K_direct single digits, and K replies with reasoning.
One row per cohort (an LR image and its C candidates) serves the loss, see `forward`. When sampling, all replies to all
candidates of an LR image are written at once, as branches that grow below the prompt: the prompt is computed once and
its keys and values are stored once. Each token is drawn by a number in [0, 1) that the caller gives.

Shapes: B rows (one LR image each), N prompts (LR, candidate), K replies, T tokens of the longest, V vocabulary.
"""
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from common import mllm, token_tree
from common.config import fail
from common.groups import Cohort
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

    A vision tower that does not train sees the same images once: rollout, reference and policy share its features.
    """
    tower, grids = id(judge.net.model.visual), torch.cat([shown.grids for shown in images])
    if not all(tower in shown.features for shown in images):
        features = mllm.patch_features(judge, torch.cat([shown.pixels for shown in images]), grids)
        if mllm.tower_trained(judge):
            return features, grids
        counts = [len(shown.grids) for shown in images]
        for shown, end in zip(images, itertools.accumulate(counts)):
            shown.features[tower] = features[end - len(shown.grids):end]
    return [feature for shown in images for feature in shown.features[tower]], grids


def encode_images(judge: Judge, cohorts: list[Cohort], looks: list[int]) -> tuple[list[Tensor], Tensor]:
    """Features and grids of cohorts, shown as in turned."""
    return encode(judge, [look_at(judge, cohort, look) for cohort, look in zip(cohorts, looks)])


CHUNK_LOGITS = 2**24                    # float32 logits held at once: 64 MB


def token_logp(judge: Judge, hidden: Tensor, tokens: Tensor) -> Tensor:
    """
    Log-probabilities [n, m] of tokens [n, m] behind hidden states [n, D].

    Rows are taken in chunks, which are computed again in the backward pass: n x V logits are never held at once.
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
    for b, of_cohort in enumerate(replies):
        row = prompt_row(judge, grids[at], grids[at + 1:at + 1 + len(of_cohort)])
        stems.append(mllm.add_stems(judge, row, list(range(1, len(row)))))
        for c, texts in enumerate(of_cohort):
            written += [(b, len(row) + k) for k in range(len(texts))]
            row += [token_tree.text_segment(ids, c + 1) for ids in texts]
        trees.append(row)
        at += 1 + len(of_cohort)
    rows = token_tree.collate(trees, judge.device)
    hidden = mllm.hidden_states(judge, rows, features)
    behind_stems = hidden[token_tree.last_tokens(rows, stems)]
    if not written:
        return behind_stems, behind_stems[:0], torch.zeros(0, dtype=torch.long, device=judge.device)
    b, column, token = token_tree.reply_tokens(rows, written)
    return behind_stems, hidden[b, column], token


def answer_logp(judge: Judge, features: list[Tensor], grids: Tensor, replies: list,
                digits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Log-probabilities of the answers to N prompts under the current weights, with gradient.

    replies: cohorts x C x K token ids; digits [N * 3, K_direct] token ids written behind the stems.
    Returns replies [N * K, T], padded with 0; their mask [N * K, T]; digits [N * 3, K_direct].
    """
    behind_stems, hidden, token = forward(judge, features, grids, replies)
    digit_logp = token_logp(judge, behind_stems, digits.to(judge.device))
    lengths = [len(ids) for cohort in replies for texts in cohort for ids in texts]
    if not lengths:
        return digit_logp.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.bool, device=judge.device), digit_logp
    flat = token_logp(judge, hidden, token[:, None])[:, 0]
    padded = pad_sequence(flat.split(lengths), batch_first=True)
    mask = torch.arange(padded.shape[1], device=judge.device) < torch.tensor(lengths, device=judge.device)[:, None]
    return padded, mask, digit_logp


NOISE_FACTOR, LEAST_NOISE = 8, 1e-4     # of check_shared_prefix: times the noise of plain rows; nats


@torch.no_grad()
def check_shared_prefix(judge: Judge, cohort: Cohort) -> tuple[float, float]:
    """
    Stop with one line unless rows with a shared prefix give the log-probabilities of plain rows, on the model at hand.

    Plain rows hold one candidate and one stem each. How far they differ from themselves in another batch shape is
    the noise of the arithmetic; sharing may differ by a few times that. Returns both, of the digits, in nats.
    """
    features, grids = encode_images(judge, [cohort], [0])
    count = len(grids) - 1

    def digit_logp(trees: list, leaves: list[list[int]], features: list[Tensor]) -> Tensor:
        rows = token_tree.collate(trees, judge.device)
        hidden = mllm.hidden_states(judge, rows, features)[token_tree.last_tokens(rows, leaves)]
        return log_softmax(policy_logits(judge, hidden)[:, judge.digit_ids], -1)               # [leaves, 9]

    tree = prompt_row(judge, grids[0], grids[1:])
    shared = digit_logp([tree], [mllm.add_stems(judge, tree, list(range(1, 1 + count)))], features)
    plain, images = [], []
    for c in range(1, 1 + count):
        for stem in judge.stems:
            plain.append(prompt_row(judge, grids[0], grids[c:c + 1]) + [token_tree.text_segment(stem, 1)])
            images.append([features[0], features[c]])
    single = torch.cat([digit_logp([row], [[2]], shown) for row, shown in zip(plain, images)])
    batched = digit_logp(plain, [[2]] * len(plain), [feature for shown in images for feature in shown])
    noise, error = (float((other - single).abs().max()) for other in (batched, shared))
    least = max(LEAST_NOISE, 2 * torch.finfo(judge.net.dtype).eps)      # some machines compute a row alike in any batch
    if not error <= NOISE_FACTOR * max(noise, least):
        fail(f"shared prefixes: log-probabilities are {error:.1e} off plain rows, whose own noise is {noise:.1e}: "
             "this model, or this version of transformers, cannot share prefixes; use the version of requirements.txt")
    return error, noise


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF samples at temperature 1: logits [n, V], uniforms [n, k] in [0, 1) -> token ids [n, k]."""
    cdf = logits.double().softmax(-1).cumsum(-1)         # float64: u < 1 never reaches past the end
    ids = torch.searchsorted(cdf, uniforms.to(cdf) * cdf[:, -1:], right=True)
    return ids.clamp(max=logits.shape[1] - 1)           # NaN logits end there; their loss is NaN: the step is skipped


@torch.no_grad()
def write_answers(judge: Judge, features: list[Tensor], grids: Tensor, sizes: list[int], *, digits: Tensor,
                  uniforms: Tensor) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """
    Answers to N prompts, one number in [0, 1) per token: K_direct tokens behind each stem, and K replies.

    features, grids: of LR, candidate 1..C of every LR image; sizes: C of each. digits [N * 3, K_direct], uniforms
    [N, K, T]; K may be 0. Returns token ids [N * 3, K_direct] and, cohorts x C x K, the token ids of the replies.
    """
    trees = [prompt_row(judge, of_cohort[0], of_cohort[1:]) for of_cohort in grids.split([1 + c for c in sizes])]
    stems = [mllm.add_stems(judge, tree, list(range(1, len(tree)))) for tree in trees]
    rows = token_tree.collate(trees, judge.device)
    cache = DynamicCache(config=judge.net.config.get_text_config()) if uniforms.shape[1] else None
    hidden = mllm.hidden_states(judge, rows, features, cache)
    direct = draw(policy_logits(judge, hidden[token_tree.last_tokens(rows, stems)]), digits.to(judge.device))
    if not uniforms.shape[1]:
        return direct, [[[] for _ in range(c)] for c in sizes]
    return direct, write_replies(judge, rows, hidden, cache, sizes, uniforms)


LOOK_EVERY = {"cpu": 1, "cuda": 8}      # tokens; a GPU has to stop for the question whether all replies have ended


def write_replies(judge: Judge, rows: Rows, hidden: Tensor, cache: DynamicCache, sizes: list[int],
                  uniforms: Tensor) -> list[list[list[list[int]]]]:
    """
    Replies to the candidates of `rows`, whose hidden states [B, L, D] and cache are given; see write_answers.

    Each row has M slots: K times the candidates of the row that has most; the slots that a row does not need count as
    ended from the start. A slot that has ended is filled with end tokens until all have ended.
    """
    (n, k, limit), device = uniforms.shape, judge.device
    candidates = [list(range(1, 1 + c)) for c in sizes]                                # segments of each tree
    b, last = token_tree.last_tokens(rows, candidates)                                 # [N], [N]
    begin = torch.tensor([rows.ends[r][s] for r, segments in enumerate(candidates) for s in segments], device=device)
    filled = torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device)[:, None]     # [B, C]
    prompt = torch.zeros_like(filled, dtype=torch.long).masked_scatter(filled, torch.arange(n, device=device))
    logits, begin, prefix = (x[prompt].repeat_interleave(k, 1) for x in (
        policy_logits(judge, hidden[b, last]), begin, rows.mask[b, 0, last]))          # [B, M, V], [B, M], [B, M, L]
    number, alive = uniforms.to(device)[prompt].flatten(1, 2), filled.repeat_interleave(k, 1)          # [B, M, T]
    tokens = torch.full_like(number, judge.end_id, dtype=torch.long)
    itself = torch.eye(alive.shape[1], dtype=torch.bool, device=device).expand(len(alive), -1, -1)     # [B, M, M]
    for t in range(limit):
        drawn = draw(logits.flatten(0, 1), number[..., t].reshape(-1, 1)).view_as(alive)
        tokens[..., t] = torch.where(alive, drawn, judge.end_id)
        alive = alive & (drawn != judge.end_id)
        if t + 1 == limit or (t + 1) % LOOK_EVERY[device.type] == 0 and not alive.any():
            break
        prefix = torch.cat([prefix, itself], 2)                                        # prompt; tokens of each step
        hidden = judge.net.model(
            input_ids=tokens[..., t], position_ids=(begin + t).expand(3, -1, -1), attention_mask=prefix[:, None],
            past_key_values=cache, use_cache=True).last_hidden_state
        logits = policy_logits(judge, hidden)                                          # [B, M, V]
    ids = tokens[filled.repeat_interleave(k, 1)].view(n, k, limit).tolist()
    whole = [[text[:text.index(judge.end_id) + 1] if judge.end_id in text else text for text in row] for row in ids]
    ends = list(itertools.accumulate(sizes))
    return [whole[end - c:end] for c, end in zip(sizes, ends)]


def sample_replies(judge: Judge, features: list[Tensor], grids: Tensor, uniforms: Tensor,
                   sizes: list[int]) -> list[list[list[int]]]:
    """The replies of write_answers alone, N x K token ids."""
    no_digits = torch.zeros(3 * len(uniforms), 0)
    written = write_answers(judge, features, grids, sizes, digits=no_digits, uniforms=uniforms)[1]
    return [replies for cohort in written for replies in cohort]
