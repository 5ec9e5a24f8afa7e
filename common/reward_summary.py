"""What the reward model writes, and earns in a step of GRPO, in numbers."""
import torch

from common import dist, mllm, run
from common.dist import mine
from common.groups import Cohort
from common.mllm import Judge
from common.replies import Answers, encode_images, sample_replies


def summary(judge: Judge, cfg, answers: list[Answers]) -> dict[str, float]:
    """Means and shares over a step's answers of all ranks; each has its own, perhaps none. cfg: settings of 02."""
    replies = torch.cat([torch.zeros(0), *(item.reply_rewards.flatten() for item in answers)])
    digits = torch.cat([torch.zeros(0, cfg.direct_replies), *(item.digit_rewards for item in answers)])
    spread = digits.std(1, correction=0)                                   # NaN without a label
    unparsed = sum(mllm.parse_reply(text) is None for item in answers for own in item.texts for text in own)
    no_digit = sum(int((~torch.isin(item.digits, judge.digit_ids)).sum()) for item in answers)
    sums = torch.tensor([replies.nansum(), replies.square().nansum(), digits.nansum(), (spread < 1e-4).sum(), unparsed,
                         no_digit], dtype=torch.float64)
    counts = torch.tensor([len(replies), (~digits.isnan()).sum(), (~spread.isnan()).sum(), digits.numel()])
    total, squares, digit_total, zero, unparsed, no_digit = dist.all_sum(sums).tolist()
    n, n_labeled, n_groups, n_digits = dist.all_sum(counts).clamp(min=1).tolist()
    return dict(reward_mean=total / n, reward_std=max(squares / n - (total / n) ** 2, 0) ** 0.5,
                digit_reward_mean=digit_total / n_labeled, zero_std_groups=zero / n_groups,
                judge_parse_failures=unparsed / n, digit_parse_failures=no_digit / n_digits)


def parse_rate(judge: Judge, cfg, cohorts: list[Cohort]) -> float:
    """Share of sampled replies, one per (LR, candidate), that have the asked form."""
    counts = torch.zeros(2)
    for cohort in mine(cohorts):
        with torch.no_grad():
            features, grids = encode_images(judge, [cohort], [0])
        uniforms = torch.rand(len(cohort.images), 1, cfg.max_reply_tokens,
                              generator=run.generator(cfg.seed, "parse rate", cohort.id))
        replies = sample_replies(judge, features, grids, uniforms, [len(cohort.images)])
        parsed = [mllm.parse_reply(mllm.reply_text(judge, own[0])) for own in replies]
        counts += torch.tensor([sum(p is not None for p in parsed), len(parsed)])
    right, total = dist.all_sum(counts).tolist()
    return right / total
