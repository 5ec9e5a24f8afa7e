"""
The reward model as a policy: replies that it writes, and their log-probabilities, for GRPO.

For every (LR, candidate) it writes, behind the stem of each axis, K_direct single digits, and K replies with reasoning.
One row per cohort (an LR image and its C candidates) serves the loss, see `forward`.

Shapes: N prompts, K replies, T tokens of the longest reply, V vocabulary.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from common import mllm, run, sampling, token_tree
from common.cohorts import Cohort
from common.looks import Images, encode, look_at
from common.mllm import AXES, Judge, policy_logits, prompt_row

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


def logp(judge: Judge, features: list[Tensor], grids: Tensor, replies: list, digits: Tensor) -> tuple[Tensor, ...]:
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
def sample(judge: Judge, cfg, cohorts: list[Cohort], step: int, reasoned: set[str]) -> list[Answers]:
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
        digits, replies = sampling.write(judge, features, grids, sizes, digits=direct.reshape(-1, cfg.direct_replies),
                                         uniforms=written.unflatten(1, (cfg.replies, -1))[:, :k])
        for cohort, shown, n, own in zip(part, images, sizes, digits.split([3 * n for n in sizes])):
            answers.append(Answers(cohort, shown, own, replies[:n]))
            replies = replies[n:]
    return answers
