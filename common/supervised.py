"""
Supervised losses of the reward model: for the cold start, and for `algorithm: sft_rank`, the baseline beside GRPO.

`cfg` is the Config of 02_train_reward.py. Shapes: C candidates of one LR image, V vocabulary.
"""
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from common import dist, mllm, rewards, run, sharding
from common.dist import mine
from common.groups import Cohort, pick
from common.mllm import Judge
from common.replies import encode_images, forward, token_logp
from common.reward_training import update


@dataclass
class Lesson:
    cohort: Cohort
    look: int                                   # see looks.turned
    replies: list[tuple[int, list[int]]]        # (candidate, tokens of the reply composed for it)


def lessons_of(judge: Judge, cfg, cohorts: list[Cohort], *, phase: str, step: int) -> list[Lesson]:
    """What is drawn for this step."""
    drawn = []
    for cohort in cohorts:
        rng, count = run.np_rng(cfg.seed, phase, step, cohort.id), len(cohort.images)
        look = int(rng.integers(cfg.looks))
        chosen = rng.choice(count, min(cfg.cold_start_replies, count), replace=False)
        replies = [mllm.compose_reply(cohort.targets[c], cohort.methods[c]) for c in chosen]
        drawn.append(Lesson(cohort, look, [(int(c), judge.encode(reply)) for c, reply in zip(chosen, replies)]))
    return drawn


def counts_of(lesson: Lesson) -> Tensor:
    """Terms of the three losses of supervised_loss: labels, tokens of replies, pairs of candidates with labels."""
    ranked = np.sum(~np.isnan(lesson.cohort.ranks), axis=0)                                  # [3], of C
    return torch.tensor([np.sum(~np.isnan(lesson.cohort.targets)), sum(len(tokens) for _, tokens in lesson.replies),
                         np.sum(ranked * (ranked - 1) // 2)], dtype=torch.float32)


def supervised_loss(judge: Judge, cfg, lessons: list[Lesson], *, phase: str) -> Tensor:
    """
    Summed losses [3]: direct answers (soft label on the digit), full replies (next token), and pairs of candidates
    (fidelity of the expected read-out; in phase sft_rank alone, else 0).

    One row per LR: its candidates, their stems and replies share the prefix.
    """
    cohorts = [lesson.cohort for lesson in lessons]
    features, grids = encode_images(judge, cohorts, [lesson.look for lesson in lessons])
    written = [[[ids for chosen, ids in lesson.replies if chosen == c] for c in range(len(lesson.cohort.images))]
               for lesson in lessons]
    behind_stems, hidden, token = forward(judge, features, grids, written)
    logits = mllm.policy_logits(judge, behind_stems)                                         # [cohorts * C * 3, V]
    targets = torch.tensor(np.concatenate([c.targets.reshape(-1) for c in cohorts]), device=judge.device)
    known = ~targets.isnan()
    digits = torch.arange(1, 10, device=judge.device)
    soft = (-((digits - targets[known, None]) / cfg.label_sigma) ** 2 / 2).softmax(-1).float()           # [n, 9]
    direct = -(soft * log_softmax(logits[known], -1)[:, judge.digit_ids]).sum()
    full, pairs = -token_logp(judge, hidden, token[:, None]).sum(), direct.new_zeros(())
    if phase == "sft_rank":
        scores = logits[:, judge.digit_ids].softmax(-1) @ digits.float()                     # [cohorts * C * 3]
        for cohort, own in zip(cohorts, scores.split([c.ranks.size for c in cohorts])):
            ranks = torch.tensor(cohort.ranks.T, device=judge.device)                        # [3, C]
            pairs = pairs + rewards.fidelity_loss(own.view(-1, 3).T, ranks.float())[0]
    return torch.stack([direct, full, pairs])


def supervised_step(judge: Judge, cfg, chosen: dict, cohorts: list[Cohort], *, phase: str, step: int, steps: int,
                    final_lr: float) -> dict:
    """
    One update on this rank's cohorts (perhaps none) in step `step` of `steps`; returns the losses over all ranks,
    gradient norm and learning rate as a row of metrics.
    """
    judge.model.train()
    lessons = lessons_of(judge, cfg, cohorts, phase=phase, step=step)
    counts = dist.all_sum(sum(map(counts_of, lessons), torch.zeros(3))).clamp(min=1)         # of all ranks
    weights, sums = torch.tensor([1, 0.3, cfg.rank_weight]) / counts, torch.zeros(4)
    parts = [lessons[at:at + cfg.groups_per_forward] for at in range(0, len(lessons), cfg.groups_per_forward)]
    for i in range(len(parts) + sharding.missing_passes(judge, len(parts))):
        losses = supervised_loss(judge, cfg, parts[i % len(parts)], phase=phase)
        losses = losses * (i < len(parts))                                                   # the others count nothing
        (losses * weights.to(losses)).sum().backward()
        sums += torch.cat([losses.detach(), ~losses.detach().isfinite().all(0, keepdim=True)]).cpu()
    norm, skipped = update(judge, chosen, cfg.grad_norm, bad=float(sums[3]), progress=step / steps,
                           warmup=(step + 1) / cfg.warmup_steps, final_lr=final_lr)
    sums = dist.all_sum(sums)
    losses = sums[:3] / counts
    return dict(loss_direct=losses[0], loss_reply=losses[1], loss_rank=losses[2], grad_norm=norm,
                lr=chosen["adamw"].param_groups[0]["lr"], nonfinite_losses=sums[3], skipped_updates=skipped)


def sft_rank_step(judge: Judge, cfg, chosen: dict, train: list[Cohort], step: int) -> dict:
    """
    One step of the baseline, on the same LR groups as GRPO's step of that number; returns a row of metrics.

    Soft labels and rank loss on the expected read-out as in DeQA-Score (arXiv 2501.11561); the composed replies are
    trained on, too, so that the model goes on writing in the asked form.
    """
    begun = time.time()
    cohorts = mine(pick(train, cfg.seed, "grpo", step, cfg.groups_per_step))
    row = supervised_step(judge, cfg, chosen, cohorts, phase="sft_rank", step=step, steps=cfg.steps, final_lr=0.05)
    return {"phase": "sft_rank", **row, "seconds_update": time.time() - begun, "peak_memory_gb": run.peak_memory_gb()}
