"""
GRPO steps of the reward model that follow sampling: rewards of the answers, their advantages, the backward pass.

Shapes: C candidates of one LR image, K replies with reasoning, K_direct single digits, T tokens of the longest reply.
`cfg` is the Config of 02_train_reward.py; its settings say what each option does.
"""
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import dist, grpo, mllm, rewards, sharding
from common.groups import Cohort
from common.metrics import AXES
from common.mllm import Judge
from common.replies import Answers, answer_logp, digit_places, encode, learning_mode, pieces

STATS = [f"{prefix}{name}" for prefix in ("", "digit_")
         for name in ("policy_kl", "ref_kl", "clip_frac_low", "clip_frac_high")]


def ranking_reward(cfg, cohort: Cohort, scores: Tensor) -> Tensor:
    """Rewards of scores [3, C, K] by the ranking reward that cfg names; NaN without a score or a label."""
    ranks, targets = (torch.tensor(own.T, dtype=torch.float32) for own in (cohort.ranks, cohort.targets))   # [3, C]
    if cfg.ranking == "thurstone":
        return grpo.thurstone(scores, ranks, cfg.score_std_floor)
    if cfg.ranking == "margin":
        return rewards.margin(scores, targets, cfg.margin_width)
    return rewards.pairwise(scores, ranks)


def score(judge: Judge, cfg, answers: Answers) -> None:
    """
    Fill in texts and rewards of one cohort. What does not parse is left out of all ranking statistics; its own reward
    is 0, below that of any reply that parses.
    """
    unlabeled = torch.tensor(answers.cohort.ranks.T, dtype=torch.float32)[..., None].isnan()       # [3, C, 1]
    is_digit = answers.digits[..., None].cpu() == judge.digit_ids.cpu()                            # [C * 3, Kd, 9]
    direct = torch.where(is_digit.any(-1), is_digit.float() @ torch.arange(1.0, 10.0), torch.nan)  # [C * 3, Kd]
    ranking = ranking_reward(cfg, answers.cohort, direct.unflatten(0, (-1, 3)).transpose(0, 1))    # [3, C, Kd]
    ranking = torch.where(unlabeled, torch.nan, torch.where(ranking.isnan(), 0.0, ranking))
    answers.digit_rewards = ranking.transpose(0, 1).flatten(0, 1)
    answers.texts = [[mllm.reply_text(judge, ids) for ids in own] for own in answers.replies]
    parsed = [[mllm.parse_reply(text) or dict.fromkeys(AXES, torch.nan) for text in own] for own in answers.texts]
    written = torch.tensor([[[float(p[axis]) for p in own] for own in parsed] for axis in AXES])   # [3, C, K]
    answers.axis_rewards = ranking_reward(cfg, answers.cohort, written)                            # [3, C, K]
    ranking = answers.axis_rewards.nanmean(0).nan_to_num(0.5)                                      # [C, K]
    answers.reply_rewards = torch.where(written[0].isnan(), 0.0, ranking + cfg.format_weight)
    if cfg.overlong_weight and answers.replies[0]:
        lengths = torch.tensor([[len(ids) for ids in own] for own in answers.replies])
        answers.reply_rewards -= cfg.overlong_weight * rewards.overlong(lengths, cfg.max_reply_tokens,
                                                                        cfg.overlong_tokens)


def advantages(judge: Judge, cfg, answers: list[Answers]) -> None:
    """
    Fill in the advantages of all answers of a step: one per digit; one per token of a reply. Also what counts: a group
    (the answers to one prompt) whose rewards spread less than cfg.min_reward_std, or of an axis without a label, is
    dropped from the loss, from its KL, and from what the loss is divided by.
    """
    digit_std = batch_std(cfg, [item.digit_rewards for item in answers])
    reply_std = batch_std(cfg, [item.reply_rewards for item in answers])
    axis_std = batch_std(cfg, [item.axis_rewards.flatten(0, 1) for item in answers])
    floor = {"std_floor": cfg.reward_std_floor}
    for item in answers:
        item.digit_advantages = grpo.group_advantages(item.digit_rewards, std=digit_std, **floor)
        item.digit_kept = spread_enough(cfg, item.digit_rewards)                                   # [C * 3]
        own = grpo.group_advantages(item.reply_rewards, std=reply_std, **floor)                    # [C, K]
        item.kept = spread_enough(cfg, item.reply_rewards)                                         # [C]
        item.advantages = [value.repeat(len(ids)) for value, ids in zip(own.flatten(), sum(item.replies, []))]
        if cfg.axis_credit and item.replies[0]:
            by_axis = grpo.group_advantages(item.axis_rewards.flatten(0, 1), std=axis_std, **floor).view(3, *own.shape)
            item.kept |= spread_enough(cfg, item.axis_rewards.flatten(0, 1)).view(3, -1).any(0)
            for n, (text, ids) in enumerate(zip(sum(item.texts, []), sum(item.replies, []))):
                for axis, place in enumerate(digit_places(judge, text, ids)):
                    item.advantages[n][place] = by_axis[axis].flatten()[n]


def batch_std(cfg, groups: list[Tensor]) -> float | None:
    """What advantages are divided by: None, each group's own std; 1, nothing; or that of the step, over all ranks."""
    if cfg.advantage_std != "batch":
        return None if cfg.advantage_std == "group" else 1.0
    centered = [own - own.nanmean(1, keepdim=True) for own in groups]                              # [groups, K]
    sums = torch.tensor([[float(c.square().nansum()), float((~c.isnan()).sum())] for c in centered] + [[0.0, 0.0]])
    squares, count = dist.all_sum(sums.sum(0)).tolist()
    return (squares / max(count, 1)) ** 0.5


def spread_enough(cfg, groups: Tensor) -> Tensor:
    """Which groups [n, K] of rewards count, bool [n]: those with any, and a std that reaches cfg.min_reward_std."""
    if not cfg.min_reward_std:
        return ~groups.isnan().all(1)
    return (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt() >= cfg.min_reward_std  # NaN: no


def learn(judge: Judge, reference: Judge, cfg, answers: list[Answers], old: dict) -> dict[str, float]:
    """
    Backward pass of the GRPO loss over all answers of the step.

    old: by piece, log-probabilities of reference and sampler, filled at the first update of a rollout. Returns this
    rank's share of the step's stats: sums over ranks are means over the step, ratio_max aside.
    """
    learning_mode(judge)
    tokens = [len(ids) for item in answers for own, keep in zip(item.replies, item.kept) if keep for ids in own]
    n_digits = sum(int(item.digit_kept.sum()) * item.digits.shape[1] for item in answers)
    counts = torch.tensor([float(sum(tokens)), float(n_digits), float(len(tokens))])
    n_tokens, n_digits, n_replies = dist.all_sum(counts).clamp(min=1).tolist()
    totals = dict.fromkeys([*STATS, "nonfinite_losses"], 0.0) | {"ratio_max": 1.0}
    parts = pieces(answers, [bool(a.replies[0]) for a in answers], cfg.groups_per_forward)
    for i in range(len(parts) + sharding.missing_passes(judge, len(parts))):
        part, counted = parts[i % len(parts)], i < len(parts)
        images = [item.images for item in part]
        written = [item.replies for item in part], torch.cat([item.digits for item in part])
        if i not in old:
            with torch.no_grad(), mllm.adapter_off(reference):                 # LoRA leaves the vision tower as it is
                old[i] = [answer_logp(reference, *encode(reference, images), *written)[::2]]
        logp, mask, digit_logp = answer_logp(judge, *encode(judge, images), *written)
        old[i] = (old[i] + [(logp.detach(), digit_logp.detach())])[:2]
        (ref_logp, ref_digit_logp), (old_logp, old_digit_logp) = old[i]
        per_reply = {"tokens": n_tokens, "constant": n_replies * cfg.max_reply_tokens,
                     "replies": n_replies * mask.sum(1).clamp(min=1)}[cfg.loss_mean]
        keep = torch.cat([item.kept.repeat_interleave(len(item.replies[0])) for item in part]).to(judge.device)
        digit_keep = torch.cat([item.digit_kept for item in part])[:, None].expand(digit_logp.shape).to(judge.device)
        each = [own for item in part for own in item.advantages]
        advantage = pad_sequence(each, batch_first=True).to(judge.device) if each else logp
        digit_advantage = torch.cat([item.digit_advantages for item in part]).to(judge.device)
        loss = 0.0
        for prefix, new, before, ref, valid, values, weight, denominator, count in (
                ("", logp, old_logp, ref_logp, mask & keep[:, None], advantage, 1.0, per_reply, n_tokens),
                ("digit_", digit_logp, old_digit_logp, ref_digit_logp, digit_keep, digit_advantage, cfg.direct_weight,
                 n_digits, n_digits)):
            if not len(new):
                continue
            term, stats = grpo.grpo_loss(new, before, values, mask=valid & counted, ref_logp=ref, clip_low=cfg.clip_low,
                                         clip_high=cfg.clip_high, kl_weight=cfg.kl_weight, denominator=denominator)
            loss = loss + weight * term
            totals["ratio_max"] = max(totals["ratio_max"], float(stats["ratio_max"]))
            for name in ("policy_kl", "ref_kl", "clip_frac_low", "clip_frac_high"):
                totals[prefix + name] += float(stats[name]) * int(valid.sum()) * counted / count
        totals["nonfinite_losses"] += float(not loss.isfinite())               # see training.update
        loss.backward()
    return totals
