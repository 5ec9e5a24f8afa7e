"""What a GRPO step of the reward model wrote and earned, in numbers for metrics.jsonl."""
import torch

from common import dist, mllm
from common.mllm import Judge
from common.mllm_policy import Answers


def summary(judge: Judge, cfg, answers: list[Answers]) -> dict[str, float]:
    """Means and shares over the answers of all ranks; each has its own, perhaps none. cfg: settings of stage 02."""
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
