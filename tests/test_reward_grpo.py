"""
Options of the reward model's GRPO and its supervised baseline, against plain loops over replies and tokens.

Run     python -m pytest tests/test_reward_grpo.py      # 40 s
"""

import math
import statistics

import numpy as np
import pytest
import torch

from common import grpo, metrics, mllm, reward_grpo, reward_summary, rewards, supervised
from common.cohorts import evaluate
from common.groups import Cohort
from common.replies import Answers, answer_logp, encode_images, look_at
from common.reward_training import average, copy_of, holding, optimizers
from conftest import build_judge, load_stage, make_images

KL = 0.3
OPTIONS = {
    "defaults": {},
    "pairwise, mean of replies": dict(ranking="pairwise", loss_mean="replies"),
    "margin, Dr. GRPO": dict(ranking="margin", loss_mean="constant", advantage_std="none"),
    "batch std, axis credit": dict(advantage_std="batch", axis_credit=True, reward_std_floor=0.01),
    "dropped groups": dict(min_reward_std=0.05, loss_mean="replies", axis_credit=True),
    "dropped tokens": dict(min_reward_std=0.1, groups_per_forward=1),
    "overlong": dict(overlong_weight=0.5, overlong_tokens=40)}


def answered(judge: mllm.Judge, cfg, seed: int, *, reasoned: bool) -> Answers:
    """A cohort of three candidates and what a model might have written about it: 4 replies, 6 digits per axis."""
    rng = np.random.default_rng(seed)
    lr, *images = make_images(seed)
    ranks = np.stack([rng.permutation(3) + 1.0 for _ in range(3)], 1)
    ranks[:, 1] = np.nan if seed == 1 else ranks[:, 1]                              # an axis without labels
    cohort = Cohort(f"c{seed}", lr, images, ["hr", "warp", "blur"], ranks, 11 - 3 * ranks)
    digits = judge.digit_ids[torch.from_numpy(rng.integers(0, 9, (9, 6)))]
    digits[0] = judge.digit_ids[4]                                                  # a group without a signal
    digits[1, 0] = judge.end_id                                                     # no digit
    replies = [[] for _ in images]
    if reasoned:
        replies = [[judge.encode(mllm.compose_reply(rng.uniform(1, 9, 3), "warp" * k)) for k in range(4)]
                   for _ in images]
        replies[0] = [replies[0][0]] * 4                                            # no signal either
        replies[1][2] = replies[1][2][:-5]                                          # does not parse
    return Answers(cohort, look_at(judge, cohort, 0), digits, replies)


@pytest.fixture(scope="module")
def judges() -> tuple:
    """The policy and another model as its reference."""
    return build_judge(seed=0)[0], build_judge(seed=1)[0]


def settings(**options):
    return load_stage("02").Config(run="", kl_weight=KL, max_reply_tokens=60, direct_weight=0.7, **options)


def slow_groups(judge, reference, cfg, answers: list[Answers]) -> list[dict]:
    """One dict per prompt: its rewards, per reply the log-probabilities of each token, and the reward of each token."""
    groups = []
    for item in answers:
        images = [encode_images(each, [item.cohort], [0]) for each in (judge, reference)]
        new = answer_logp(judge, *images[0], [item.replies], item.digits)
        with torch.no_grad():
            ref = answer_logp(reference, *images[1], [item.replies], item.digits)
        for row, earned in enumerate(item.digit_rewards.tolist()):
            groups.append(dict(kind="digit", rewards=earned, axes=[], places=[{} for _ in earned], logps=[
                ([new[2][row, k]], [ref[2][row, k]]) for k in range(len(earned))]))
        for c, replies in enumerate(item.replies):
            flat = [c * len(replies) + k for k in range(len(replies))]
            logps = [(list(new[0][n][new[1][n]]), list(ref[0][n][ref[1][n]])) for n in flat]
            if replies:
                groups.append(dict(kind="reply", rewards=item.reply_rewards[c].tolist(), logps=logps,
                                   axes=item.axis_rewards[:, c].tolist(),
                                   places=[slow_places(judge, ids) if cfg.axis_credit else {} for ids in replies]))
    return groups


def slow_places(judge, ids: list[int]) -> dict[int, int]:
    """Token -> axis, by reading the reply token after token."""
    if mllm.parse_reply(mllm.reply_text(judge, ids)) is None:
        return {}
    begun = [judge.tokenizer.decode(ids[:t]) for t in range(len(ids))]
    return {t: a for a, axis in enumerate(metrics.AXES) for t, text in enumerate(begun)
            if "<answer>" in text and text.endswith(f"{axis}: ")}


def known(values: list) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def spread(values: list) -> float:
    return statistics.pstdev(known(values)) if known(values) else math.nan


def batch_spread(rows: list[list]) -> float:
    centered = [value - statistics.fmean(known(row)) for row in rows for value in known(row)]
    return math.sqrt(statistics.fmean(value**2 for value in centered))


def slow_loss(cfg, groups: list[dict]) -> torch.Tensor:
    """The loss of a step, one token after the other; the policy is the one that sampled."""
    total = 0.0
    for kind, weight in (("reply", 1.0), ("digit", cfg.direct_weight)):
        own = [group for group in groups if group["kind"] == kind]
        batch = batch_spread([g["rewards"] for g in own])
        axis_batch = batch_spread([row for g in own for row in g["axes"]]) if kind == "reply" else None

        def advantage(values: list, k: int, whole: float) -> float:
            if math.isnan(values[k]):
                return 0.0
            std = {"group": spread(values), "batch": whole, "none": 1.0}[cfg.advantage_std]
            return (values[k] - statistics.fmean(known(values))) / max(std, cfg.reward_std_floor)

        kept = [g for g in own if known(g["rewards"]) and (not cfg.min_reward_std or any(
            spread(row) >= cfg.min_reward_std for row in [g["rewards"], *(g["axes"] if cfg.axis_credit else [])]))]
        n_replies = sum(len(g["logps"]) for g in kept)
        n_tokens = sum(len(new) for g in kept for new, _ in g["logps"])
        for group in kept:
            for k, (new, ref) in enumerate(group["logps"]):
                divisor = {"tokens": n_tokens, "replies": n_replies * len(new),
                           "constant": n_replies * (cfg.max_reply_tokens if kind == "reply" else 1)}[cfg.loss_mean]
                for t, (logp, ref_logp) in enumerate(zip(new, ref)):
                    gain = advantage(group["rewards"], k, batch)
                    if t in group["places"][k]:
                        gain = advantage(group["axes"][group["places"][k][t]], k, axis_batch)
                    gap = ref_logp - logp
                    policy = (logp - logp.detach()).exp() * gain
                    total = total + weight * (KL * (gap.exp() - gap - 1) - policy) / divisor
    return total


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_with_options_equals_plain_loops(name, judges):
    judge, reference = judges
    cfg = settings(**OPTIONS[name])
    answers = [answered(judge, cfg, seed, reasoned=seed != 2) for seed in range(3)]
    for item in answers:
        reward_grpo.score(judge, cfg, item)
    reward_grpo.advantages(judge, cfg, answers)
    judge.model.requires_grad_(True).zero_grad()
    reward_grpo.learn(judge, reference, cfg, answers, {})
    ours = {name: p.grad.clone() for name, p in judge.net.named_parameters() if p.grad is not None}
    judge.model.zero_grad()
    groups = slow_groups(judge, reference, cfg, answers)
    assert len(groups) == 3 * 9 + 2 * 3
    slow_loss(cfg, groups).backward()
    for parameter, p in judge.net.named_parameters():
        if p.grad is not None:
            size = float(p.grad.abs().max())
            torch.testing.assert_close(ours[parameter], p.grad, rtol=0, atol=2e-4 * size + 1e-7, msg=parameter)
    kept = sum(int(item.digit_kept.sum()) for item in answers)
    assert kept == 27 - 3 if not cfg.min_reward_std else kept < 27 - 3      # unlabeled ones; the group of equal digits


def test_defaults_are_what_they_were_before_there_were_options(judges):
    judge, _ = judges
    cfg = settings()
    item = answered(judge, cfg, 0, reasoned=True)
    reward_grpo.score(judge, cfg, item)
    reward_grpo.advantages(judge, cfg, [item])
    ranks = torch.tensor(item.cohort.ranks.T, dtype=torch.float32)
    digits = torch.stack([judge.digit_ids == token for token in item.digits.flatten()]).float().argmax(1) + 1.0
    digits[6] = torch.nan                                               # the end token
    wanted = grpo.thurstone(digits.view(3, 3, 6).transpose(0, 1), ranks, cfg.score_std_floor).nan_to_num(0.0)
    assert torch.equal(item.digit_rewards, wanted.transpose(0, 1).flatten(0, 1))
    assert torch.equal(item.digit_advantages, grpo.group_advantages(item.digit_rewards, std_floor=0.3))
    own = grpo.group_advantages(item.reply_rewards, std_floor=0.3).flatten()
    assert all(torch.equal(a, own[n].expand(len(a))) for n, a in enumerate(item.advantages))
    assert item.kept.all() and item.digit_kept.all()


def test_an_overlong_reply_pays(judges):
    judge, _ = judges
    free, paid = (answered(judge, settings(), 0, reasoned=True) for _ in range(2))
    cfg = settings(overlong_weight=0.5, overlong_tokens=40)
    reward_grpo.score(judge, settings(), free)
    reward_grpo.score(judge, cfg, paid)
    for c, own in enumerate(paid.replies):
        for k, ids in enumerate(own):
            share = min(max((len(ids) - 20) / 40, 0), 1)
            assert paid.reply_rewards[c, k] == pytest.approx(float(free.reply_rewards[c, k]) - 0.5 * share, abs=1e-6)
    assert (paid.reply_rewards < free.reply_rewards).any()


@pytest.mark.parametrize("options", [{}, dict(overlong_weight=9.0, overlong_tokens=40)])
def test_what_is_logged_of_a_step_equals_plain_loops(options, judges):
    """Also where the penalty makes the mean negative, and where every group has a spread."""
    judge, _ = judges
    cfg = settings(direct_replies=6, **options)
    answers = [answered(judge, cfg, seed, reasoned=seed != 2) for seed in range(3)]
    for item in answers:
        reward_grpo.score(judge, cfg, item)
    answers[0].digit_rewards[0] = answers[1].digit_rewards[0] = answers[2].digit_rewards[0] = torch.arange(6) / 6
    found = reward_summary.summary(judge, cfg, answers)
    replies = [value for item in answers for value in item.reply_rewards.flatten().tolist()]
    digits = [row for item in answers for row in item.digit_rewards.tolist()]
    assert found["reward_mean"] == pytest.approx(statistics.fmean(replies))
    assert (found["reward_mean"] < 0) == bool(options)
    assert found["reward_std"] == pytest.approx(statistics.pstdev(replies), rel=1e-4)
    assert found["digit_reward_mean"] == pytest.approx(statistics.fmean(known(sum(digits, []))))
    assert found["zero_std_groups"] == 0 == sum(spread(row) < 1e-4 for row in digits)
    texts = [text for item in answers for own in item.texts for text in own]
    assert found["judge_parse_failures"] == sum(mllm.parse_reply(text) is None for text in texts) / len(texts) > 0
    written = [token for item in answers for token in item.digits.flatten().tolist()]
    wrong = [token for token in written if judge.tokenizer.decode([token]) not in "123456789"]
    assert found["digit_parse_failures"] == len(wrong) / len(written) > 0
    assert set(reward_summary.summary(judge, cfg, []).values()) == {0}


@pytest.mark.parametrize("wrong", [dict(ranking="listwise"), dict(advantage_std="row"), dict(loss_mean="sum"),
                                   dict(algorithm="sft"), dict(looks=49),
                                   dict(overlong_weight=1.0, overlong_tokens=70)])
def test_an_option_that_does_not_exist_is_refused(wrong):
    with pytest.raises(AssertionError, match=next(reversed(wrong))):
        settings(**wrong)


def test_the_supervised_baseline_learns_to_rank():
    judge, cfg = build_judge(groups_per_step=4, steps=16, lora_rank=0, muon_lr=0.01, lr=1e-3, warmup_steps=4,
                             algorithm="sft_rank")
    cohorts = []
    for i in range(4):
        grays = [np.full((32, 32, 3), value, np.uint8) for value in ((40, 215) if i % 2 else (215, 40))]
        ranks = np.repeat([[1.0], [2.0]] if i % 2 else [[2.0], [1.0]], 3, axis=1)
        cohorts.append(Cohort(f"gray{i}", make_images(i)[0], grays, ["", ""], ranks, 13 - 4 * ranks))
    judge.model.requires_grad_(True)
    chosen = optimizers(judge, cfg.lr, cfg.weight_decay, muon_lr=cfg.muon_lr)
    found = [supervised.sft_rank_step(judge, cfg, chosen, cohorts, step) for step in range(cfg.steps)]
    assert found[-1]["loss_rank"] < 0.7 * found[0]["loss_rank"] and found[-1]["loss_direct"] < found[0]["loss_direct"]
    assert evaluate(judge, cohorts)["val_pair_accuracy"] == 1


@pytest.mark.parametrize("phase", ["cold start", "sft_rank"])
def test_groups_per_forward_changes_memory_alone(phase):
    """Labels and replies of unequal number: a mean of means would differ."""
    found = []
    for size in (4, 3, 1):
        judge, cfg = build_judge(groups_per_forward=size, cold_start_replies=2, lora_rank=0)
        judge.model.requires_grad_(True)
        chosen = optimizers(judge, cfg.lr, cfg.weight_decay, muon_lr=cfg.muon_lr)
        cohorts = []
        for i in range(4):
            lr, *images = make_images(i)
            ranks = np.array([[1.0, 2, 3], [2, 2, 1], [3, 1, 2]])
            ranks[:i, 1] = np.nan
            cohorts.append(Cohort(f"{i}", lr, images, ["warp", "", "blur"], ranks, 10 - 3 * ranks))
        found.append(supervised.supervised_step(judge, cfg, chosen, cohorts, phase=phase, step=0, steps=9, final_lr=1))
    for row in found[1:]:
        assert {key: float(value) for key, value in row.items()} == pytest.approx(
            {key: float(value) for key, value in found[0].items()}, rel=1e-4)
    assert found[0]["loss_direct"] > 1 and (found[0]["loss_rank"] > 0.1) == (phase == "sft_rank")
    lesson = supervised.lessons_of(judge, cfg, cohorts, phase=phase, step=0)[2]
    pairs = sum(rewards.fidelity_loss(torch.zeros(3), torch.tensor(own))[1] for own in lesson.cohort.ranks.T)
    assert supervised.counts_of(lesson).tolist() == [7, sum(len(tokens) for _, tokens in lesson.replies), pairs]
    assert pairs == 3 + 0 + 3


def test_averaged_weights_are_a_plain_mean_over_the_steps_and_leave_the_trained_ones_alone():
    judge, _ = build_judge()
    name, weight = "lm_head.weight", judge.model.lm_head.weight.requires_grad_(True)
    averaged, wanted = copy_of(judge), weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            weight.add_(step + 1)
        average(averaged, judge, decay=0.2, step=step)
        decay = min(0.2, (step + 1) / (step + 10))                      # 0.1, 0.18, 0.2, 0.2
        wanted = decay * wanted + (1 - decay) * weight.detach()
    assert torch.allclose(averaged[name], wanted, atol=1e-5)
    trained = weight.detach().clone()
    with holding(judge, averaged):
        assert torch.equal(judge.model.lm_head.weight, averaged[name]) and not torch.equal(averaged[name], trained)
    assert torch.equal(judge.model.lm_head.weight, trained)
