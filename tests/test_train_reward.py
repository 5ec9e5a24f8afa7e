"""
Stage 02: its rewards and losses against plain loops, and the script as a user runs it, also interrupted.

Run     python -m pytest tests/test_train_reward.py       # 2 min
"""
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import grpo, metrics, mllm, token_tree
from common.config import load_config
from common.groups import Cohort, all_groups, load_cohorts
from common.replies import answer_logp, encode_images, look_at
from common.training import adapter_off, copied, trainable
from conftest import ROOT, build_judge, load_stage, make_images, run_stage

CPU, NAN = torch.device("cpu"), math.nan
COLD_STEPS = 40                         # cold_start_steps of toy_config
KL = 0.3
stage = load_stage("02")


# the ranking reward --------------------------------------------------------------------------------------------

def slow_thurstone(scores: list, ranks: list, floor: float) -> list:
    """The definition, one reply and one rival at a time, with math.erf."""
    rewards = []
    for i, own in enumerate(scores):
        rewards.append([])
        for q in own:
            terms = []
            for z, theirs in enumerate(scores):
                both = [[x for x in replies if not math.isnan(x)] for replies in (own, theirs)]
                if z == i or math.isnan(q) or not both[1] or math.isnan(ranks[i]) or math.isnan(ranks[z]):
                    continue
                means = [sum(x) / len(x) for x in both]
                var = [sum((v - m) ** 2 for v in x) / len(x) for x, m in zip(both, means)]
                p = 0.5 * (1 + math.erf((q - means[1]) / math.sqrt(2 * (sum(var) + floor**2))))
                g = 1.0 if ranks[i] < ranks[z] else 0.0 if ranks[i] > ranks[z] else 0.5
                terms.append(math.sqrt(p * g) + math.sqrt((1 - p) * (1 - g)))
            rewards[-1].append(sum(terms) / len(terms) if terms else NAN)
    return rewards


@pytest.mark.parametrize("seed", range(8))
def test_thurstone_equals_the_slow_loop_with_ties_and_replies_that_do_not_parse(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, 10, (2, 5, 4), generator=generator).double()
    scores[torch.rand(2, 5, 4, generator=generator) < 0.2] = NAN
    ranks = torch.randint(1, 4, (2, 5), generator=generator).double()
    scores[0, 1] = NAN                                  # nothing that this candidate got can be parsed
    ranks[1, 2] = NAN                                   # and this one has no label
    found = grpo.thurstone(scores, ranks, 0.25)
    for own, order, rewards in zip(scores, ranks, found):
        wanted = torch.tensor(slow_thurstone(own.tolist(), order.tolist(), 0.25), dtype=torch.float64)
        torch.testing.assert_close(rewards, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    known = found[~found.isnan()]
    assert (known >= 0).all() and (known <= 1 + 1e-6).all()


def test_a_reply_is_paid_for_ordering_its_candidate_rightly():
    scores, by_score = torch.tensor([[0.0, 0.0], [4.0, 5.0], [6.0, 7.0]]), []
    for digit in (1.0, 5.5, 9.0):
        scores[0] = digit
        by_score.append([float(grpo.thurstone(scores, torch.tensor(ranks), 0.5)[0, 0])
                         for ranks in ([1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 2.0, 1.0])])
    best, middle, worst = zip(*by_score)
    assert best[2] > best[1] > best[0] and worst[0] > worst[1] > worst[2] and middle[1] > max(middle[0], middle[2])
    level = grpo.thurstone(torch.full((2, 3), 5.0), torch.tensor([1.0, 1.0]), 0.5)
    torch.testing.assert_close(level, torch.ones(2, 3))                         # a tie, called a tie
    assert grpo.thurstone(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), 0.25).isnan().all()      # no rival


@pytest.mark.parametrize("seed", range(3))
def test_the_fidelity_loss_equals_a_slow_loop_and_has_a_finite_slope_everywhere(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = (1 + 8 * torch.rand(3, 5, generator=generator)).requires_grad_()
    ranks = torch.randint(1, 4, (3, 5), generator=generator).float()
    ranks[1, 2], wanted = NAN, 0.0
    for row, order in zip(scores.tolist(), ranks.tolist()):
        for i in range(5):
            for z in range(i):
                if not math.isnan(order[i] + order[z]):
                    p = 0.5 * (1 + math.erf((row[i] - row[z]) / 2))
                    g = 1.0 if order[i] < order[z] else 0.0 if order[i] > order[z] else 0.5
                    wanted += 1 - math.sqrt(p * g + 1e-8) - math.sqrt((1 - p) * (1 - g) + 1e-8)
    assert stage.fidelity_loss(scores, ranks).item() == pytest.approx(wanted, abs=1e-4)
    far = torch.tensor([100.0, 900.0], requires_grad=True)
    gradient, = torch.autograd.grad(stage.fidelity_loss(far, torch.tensor([1.0, 2.0])), far)
    assert gradient.isfinite().all()
    near = torch.tensor([1.0, 9.0], requires_grad=True)
    gradient, = torch.autograd.grad(stage.fidelity_loss(near, torch.tensor([1.0, 2.0])), near)
    assert gradient[0] < 0 < gradient[1]                                        # the better one should score higher


# a step of GRPO ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def judges() -> tuple:
    """The policy and another model as its reference."""
    return build_judge(seed=0)[0], build_judge(seed=1)[0]


def written_by(judge: mllm.Judge, seed: int, *, reasoned: bool) -> "stage.Rollout":
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
    return stage.Rollout([cohort], [look_at(judge, cohort, 0)], digits, [replies])


def slow_rewards(judge: mllm.Judge, cfg, rollout) -> tuple[list, list]:
    """Rewards [C][K] of the replies and [C * 3][6] of the digits, by reading the texts one by one."""
    cohort, = rollout.cohorts
    tables = [[], []]                                                               # of each axis: replies, digits
    for a, axis in enumerate(metrics.AXES):
        ranks = cohort.ranks[:, a].tolist()
        texts = [[judge.tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in row] for row in rollout.replies[0]]
        scores = [[(mllm.parse_reply(text) or {axis: NAN})[axis] for text in row] for row in texts]
        tables[0].append(slow_thurstone(scores, ranks, stage.SCORE_STD_FLOOR))
        words = [[judge.tokenizer.decode([token]) for token in row] for row in rollout.digits[a::3].tolist()]
        digits = [[float(word) if word in mllm.DIGITS else NAN for word in row] for row in words]
        paid = slow_thurstone(digits, ranks, stage.SCORE_STD_FLOOR)
        tables[1].append([[NAN if math.isnan(rank) else 0.0 if math.isnan(value) else value for value in row]
                          for row, rank in zip(paid, ranks)])
    replies = [[0.0 if mllm.parse_reply(texts[c][k]) is None else cfg.format_weight + statistics.fmean(
        known([tables[0][a][c][k] for a in range(3)])) for k in range(len(texts[c]))] for c in range(3)]
    return replies, [tables[1][a][c] for c in range(3) for a in range(3)]


def known(values: list) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def slow_loss(judge, reference, rollouts: list, rewards: list) -> torch.Tensor:
    """The loss of a step, one token after the other; the policy is the one that sampled."""
    groups = {"replies": [], "digits": []}                              # (rewards, tokens of each: [logp, ref_logp])
    for rollout, (replies, digits) in zip(rollouts, rewards):
        new = answer_logp(judge, *encode_images(judge, rollout.cohorts, [0]), rollout.replies, rollout.digits)
        with torch.no_grad():
            ref = answer_logp(reference, *encode_images(reference, rollout.cohorts, [0]), rollout.replies,
                              rollout.digits)
        groups["digits"] += [(row, [[(new[2][n, k], ref[2][n, k])] for k in range(6)]) for n, row in enumerate(digits)]
        groups["replies"] += [(row, [list(zip(new[0][n][new[1][n]], ref[0][n][ref[1][n]]))
                                     for n in range(4 * c, 4 * c + 4)]) for c, row in enumerate(replies) if row]
    total = 0.0
    for kind in groups.values():
        rewarded = [group for group in kind if known(group[0])]
        count = sum(len(tokens) for _, texts in rewarded for tokens in texts)
        for earned, texts in rewarded:
            mean, std = statistics.fmean(known(earned)), statistics.pstdev(known(earned))
            for reward, tokens in zip(earned, texts):
                for logp, ref_logp in tokens:
                    gap = ref_logp - logp
                    policy = (logp - logp.detach()).exp() * (reward - mean) / max(std, stage.REWARD_STD_FLOOR)
                    total = total + (KL * (gap.exp() - gap - 1) - policy) / count
    return total


def test_rewards_gradients_and_logged_numbers_of_a_step_equal_plain_loops(judges):
    judge, reference = judges
    cfg = stage.Config(run="", kl_weight=KL, max_reply_tokens=60, direct_replies=6)
    rollouts = [written_by(judge, seed, reasoned=seed != 2) for seed in range(3)]
    rewards = [stage.score(judge, cfg, rollout) for rollout in rollouts]
    slow = [slow_rewards(judge, cfg, rollout) for rollout in rollouts]
    for (replies, digits), (slow_replies, slow_digits) in zip(rewards, slow):
        torch.testing.assert_close(replies, torch.tensor(slow_replies), rtol=0, atol=1e-5)
        torch.testing.assert_close(digits, torch.tensor(slow_digits), rtol=0, atol=1e-5, equal_nan=True)

    judge.model.requires_grad_(True).zero_grad()
    with torch.no_grad():
        of_reference = [stage.logp_of(reference, rollout)[::2] for rollout in rollouts]
    advantages = [tuple(map(stage.advantages_of, pair)) for pair in rewards]
    stats, _ = stage.learn(judge, cfg, rollouts, advantages, reference=of_reference, sampler=None)
    assert stats["ratio_max"] == 1 and stats["nonfinite_losses"] == 0 < stats["ref_kl"]
    ours = {name: p.grad.clone() for name, p in judge.net.named_parameters() if p.grad is not None}
    judge.model.zero_grad()
    slow_loss(judge, reference, rollouts, slow).backward()
    for name, p in judge.net.named_parameters():
        if p.grad is not None:
            size = float(p.grad.abs().max())
            torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=2e-4 * size + 1e-7, msg=name)

    logged = stage.summary(judge, cfg, rollouts, rewards)
    replies = [value for own, _ in slow for row in own for value in row]
    digits = [row for _, own in slow for row in own]
    assert logged["reward_mean"] == pytest.approx(statistics.fmean(replies), abs=1e-5)
    assert logged["reward_std"] == pytest.approx(statistics.pstdev(replies), rel=1e-4)
    assert logged["digit_reward_mean"] == pytest.approx(statistics.fmean(known(sum(digits, []))), abs=1e-5)
    labeled = [row for row in digits if known(row)]
    assert logged["zero_std_groups"] == sum(statistics.pstdev(row) < 1e-4 for row in labeled) / len(labeled) > 0
    assert logged["judge_parse_failures"] == 2 / 24 and logged["digit_parse_failures"] == 3 / (27 * 6)
    assert set(stage.summary(judge, cfg, [], []).values()) == {0}               # a rank without cohorts


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_a_frozen_vision_tower_sees_each_image_of_a_step_once(monkeypatch, lora_rank):
    judge, cfg = build_judge(replies=2, direct_replies=4, max_reply_tokens=6, groups_per_step=2, reasoned_groups=1,
                             lora_rank=lora_rank, updates_per_rollout=2)
    judge.model.requires_grad_(False)
    judge = stage.prepare(cfg, judge, lora=lora_rank > 0)
    seen, look = [], judge.net.get_image_features
    monkeypatch.setattr(judge.net, "get_image_features", lambda pixels, grids, **rest: (
        seen.append(len(grids)), look(pixels, grids, **rest))[1])
    optimizers = stage.make_optimizers(trainable(judge.model), cfg.lr)
    reference = copied(trainable(judge.model))
    stage.grpo_step(judge, reference, cfg, optimizers, gray_cohorts(40)[:2], 0)
    assert sum(seen) == 2 * 3 * (1 if lora_rank else 4)         # trained: rollout, reference, policy of two updates


def test_answering_many_lr_images_at_once_changes_memory_alone():
    answers = []
    for at_once in (1, 4):
        judge, cfg = build_judge(replies=2, direct_replies=4, max_reply_tokens=6, groups_per_forward=2,
                                 groups_per_rollout=at_once)
        rollouts = stage.sample(judge, cfg, gray_cohorts(40)[:4], 0, {"gray0", "gray2", "gray3"})
        answers.append({cohort.id: (digits.tolist(), written) for rollout in rollouts
                        for cohort, digits, written in zip(rollout.cohorts, rollout.digits.split(6), rollout.replies,
                                                           strict=True)})
        assert max(len(rollout.cohorts) for rollout in rollouts) == min(2, at_once)
        assert all(len(rollout.images) == len(rollout.cohorts) for rollout in rollouts)
    assert answers[0] == answers[1] and len(answers[0]) == 4


# learning ------------------------------------------------------------------------------------------------------

def gray_cohorts(best: int) -> list[Cohort]:
    """Eight LR images with two plain gray candidates each, in turn; best: the gray value that ranks first."""
    cohorts = []
    for i in range(8):
        values = (40, 215) if i % 2 else (215, 40)
        grays = [np.full((32, 32, 3), value, np.uint8) for value in values]
        ranks = np.repeat([[1.0 + (value != best)] for value in values], 3, axis=1)
        cohorts.append(Cohort(f"gray{i}", make_images(i)[0], grays, ["", ""], ranks, 13 - 4 * ranks))
    return cohorts


@torch.no_grad()
def make_digits_likely(judge: mllm.Judge, cohort: Cohort) -> None:
    """In place of a cold start: the head turns towards digits behind the stems."""
    features, grids = mllm.image_features(judge, [[cohort.lr, *cohort.images]])
    row = mllm.prompt_row(judge, grids[0], grids[1:])
    stems = mllm.add_stems(judge, row, [1, 2])
    rows = token_tree.collate([row], judge.device)
    hidden = mllm.hidden_states(judge, rows, features)[token_tree.last_tokens(rows, [stems])].mean(0)
    judge.net.lm_head.weight[judge.digit_ids] += 10 * hidden / hidden.square().sum()


@pytest.mark.parametrize("best", [40, 215])
def test_grpo_finds_out_by_itself_which_of_two_plain_candidates_is_better(best):
    judge, cfg = build_judge(groups_per_step=4, reasoned_groups=1, replies=2, max_reply_tokens=2, steps=24,
                             direct_replies=24, lora_rank=0, lr=1e-3, warmup_steps=4)
    cohorts = gray_cohorts(best)
    make_digits_likely(judge, cohorts[0])
    judge.model.requires_grad_(True)
    optimizers = stage.make_optimizers(trainable(judge.model), cfg.lr, 0.01)
    reference = copied(trainable(judge.model))
    reward = [stage.grpo_step(judge, reference, cfg, optimizers, cohorts, step)[0]["digit_reward_mean"]
              for step in range(cfg.steps)]
    assert reward[-1] > 0.9 and reward[-1] > reward[0] + 0.1, reward
    assert stage.evaluate(judge, cfg, cohorts)["val_pair_accuracy"] == 1


def test_the_rank_loss_learns_to_rank():
    judge, cfg = build_judge(cold_start_steps=16, warmup_steps=4, rank_weight=1.0)
    cohorts = gray_cohorts(40)[:4]
    judge.model.requires_grad_(True)
    optimizers = stage.make_optimizers(trainable(judge.model), 1e-3, 0.01)
    rows = [stage.supervised_step(judge, cfg, optimizers, cohorts, step) for step in range(cfg.cold_start_steps)]
    assert rows[-1]["loss_rank"] < 0.7 * rows[0]["loss_rank"] and rows[-1]["loss_direct"] < rows[0]["loss_direct"]
    assert stage.evaluate(judge, cfg, cohorts)["val_pair_accuracy"] == 1


def test_a_pretrained_model_is_not_taught_composed_reasons():
    judge, cfg = build_judge(cold_start_replies=3)
    lr, *images = make_images(0)
    targets = np.array([[9.0, 5, 1], [1, 2, 3], [4, 4, 4]])
    cohort = Cohort("a", lr, images, ["warp", "blur", "noise"], targets, targets)
    for model, words in (("small", 3), ("a/pretrained", 0)):
        cfg = replace(cfg, model=model)
        look, replies, taught = stage.lesson(judge, cfg, cohort, 0)
        texts = [judge.tokenizer.decode(ids) for one in replies for ids in one]
        assert sum(method in text for method, text in zip(cohort.methods, texts)) == words
        losses = stage.supervised_losses(judge, cfg, [cohort], [look], [replies], [taught])
        logp, mask, _ = answer_logp(judge, *encode_images(judge, [cohort], [look]), [replies],
                                    judge.digit_ids.expand(9, -1))
        assert losses[1].item() == pytest.approx(-logp[mask][torch.tensor(taught)].sum().item(), rel=1e-4)
        assert all(taught) == (model == "small")


def test_groups_per_forward_changes_memory_alone():
    """Labels and replies of unequal number: a mean of means would differ."""
    rows = []
    for size in (4, 3, 1):
        judge, cfg = build_judge(groups_per_forward=size, cold_start_replies=2, rank_weight=0.5, looks=8)
        judge.model.requires_grad_(True)
        cohorts = []
        for i in range(4):
            lr, *images = make_images(i)
            ranks = np.array([[1.0, 2, 3], [2, 2, 1], [3, 1, 2]])
            ranks[:i, 1] = np.nan
            cohorts.append(Cohort(f"{i}", lr, images, ["warp", "", "blur"], ranks, 10 - 3 * ranks))
        looks = [stage.lesson(judge, cfg, cohort, step)[0] for cohort in cohorts for step in range(9)]
        assert set(looks) == set(range(8))
        optimizers = stage.make_optimizers(trainable(judge.model), cfg.lr)
        rows.append(stage.supervised_step(judge, cfg, optimizers, cohorts, 0))
    for row in rows[1:]:
        assert {key: float(value) for key, value in row.items() if key != "phase"} == pytest.approx(
            {key: float(value) for key, value in rows[0].items() if key != "phase"}, rel=1e-4)
    assert rows[0]["loss_direct"] > 1 and rows[0]["loss_rank"] > 0.1


@pytest.fixture
def trainee(toy_run, toy_config) -> tuple:
    """(cfg, judge with LoRA, training cohorts), ready for a GRPO step."""
    cfg = load_config(stage.Config, stage.__file__, [str(toy_config), "warmup_steps=1", "lr=0.01"])
    judge = stage.load_base(cfg, toy_run / "02_train_reward" / "cold_start" / "model", CPU)
    judge.model = stage.add_lora(judge.model, cfg)
    source = toy_run / "01_build_dataset"
    return cfg, judge, load_cohorts(source, all_groups(source), "train")[0]


def test_a_grpo_step_changes_the_adapter_and_nothing_else(trainee, toy_run):
    cfg, judge, cohorts = trainee
    reference = stage.load_base(cfg, toy_run / "02_train_reward" / "cold_start" / "model", CPU)
    images = [cohorts[0].lr], [cohorts[0].images]
    plain = mllm.expected_scores(reference, *images)
    assert torch.equal(mllm.expected_scores(judge, *images), plain)     # a new adapter does nothing
    before = {name: p.detach().clone() for name, p in judge.model.named_parameters()}
    start = copied(trainable(judge.model))
    row, _ = stage.grpo_step(judge, start, cfg, stage.make_optimizers(trainable(judge.model), cfg.lr), cohorts, 0)
    assert row["ratio_max"] == 1 and row["grad_norm"] > 0
    changed = {name for name, p in judge.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= set(trainable(judge.model)) and all("lora_" in name for name in changed)
    assert not torch.equal(mllm.expected_scores(judge, *images), plain)
    with adapter_off(judge.model):
        assert torch.equal(mllm.expected_scores(judge, *images), plain)


def test_a_second_update_per_rollout_is_off_policy(trainee):
    cfg, judge, cohorts = trainee
    cfg.updates_per_rollout, reference = 2, copied(trainable(judge.model))
    row, _ = stage.grpo_step(judge, reference, cfg, stage.make_optimizers(trainable(judge.model), cfg.lr), cohorts, 0)
    assert row["ratio_max"] > 1.001 and row["policy_kl"] + row["digit_policy_kl"] > 0


# the script ----------------------------------------------------------------------------------------------------

# runs a script with its arguments, and kills it without warning once it has logged the step given last
KILLER = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from common import report
log, deadly = report.log, int(sys.argv.pop())
def log_and_die(folder, step, values):
    log(folder, step, values)
    if step == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
report.log = log_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rows(path: Path) -> list[dict]:
    """Lines of a .jsonl file without what depends on the clock or the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("time", "seconds", "peak"))}
            for line in lines]


def test_what_02_leaves_behind(toy_run, toy_config, capsys):
    folder = toy_run / "02_train_reward"
    results = json.loads((folder / "manifest.json").read_text())["results"]
    found = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(COLD_STEPS + 5))
    assert [row["phase"] for row in found] == ["cold_start"] * COLD_STEPS + ["grpo"] * 5
    for row in found[COLD_STEPS:]:
        assert row["ratio_max"] == 1 and row["clip_frac_low"] == row["clip_frac_high"] == 0
        assert row["grad_norm"] > 0 and 0 <= row["ref_kl"] < 1 and abs(row["policy_kl"]) < 1e-9
    assert found[COLD_STEPS]["ref_kl"] == 0 and found[-1]["ref_kl"] > 0     # it begins as the reference itself
    assert found[0]["loss_reply"] > 2 * found[COLD_STEPS - 1]["loss_reply"] and results["parse_rate"] > 0
    validated = [row for row in found[COLD_STEPS - 1:] if "val_mean_accuracy" in row]       # the last before GRPO, too
    for row in validated:
        axes = [row[f"val_{axis}_accuracy"] for axis in metrics.AXES]
        assert row["val_mean_accuracy"] == pytest.approx(sum(axes) / 3) and row["val_pair_accuracy"] == axes[2]
    best = max(validated, key=lambda row: row["val_mean_accuracy"])
    assert [results[key] for key in stage.CHOSEN_BY] == pytest.approx([best[key] for key in stage.CHOSEN_BY], abs=1e-4)
    assert {"group", "candidate", "reply", "reward"} <= rows(folder / "samples.jsonl")[0].keys()
    assert [path.name for path in sorted((folder / "cold_start").iterdir())] == ["done.json", "model"]
    with pytest.raises(SystemExit) as stop:                         # the same command again
        stage.main(load_config(stage.Config, stage.__file__, [str(toy_config)]))
    assert stop.value.code == 0 and "02_train_reward is finished" in capsys.readouterr().out


def test_interrupted_twice_and_resumed_gives_the_same_bytes(toy_run, toy_config, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(toy_run / "01_build_dataset", again / "01_build_dataset")
    command = ["02_train_reward.py", str(toy_config), f"run={again}"]
    for step in ("4", str(COLD_STEPS + 2)):             # one step after a checkpoint: in the cold start, in GRPO
        done = subprocess.run([sys.executable, "-c", KILLER, *command, step], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_stage("02", toy_config, f"run={again}")
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr
    ours, theirs = again / "02_train_reward", toy_run / "02_train_reward"
    assert rows(ours / "metrics.jsonl") == rows(theirs / "metrics.jsonl")
    assert rows(ours / "samples.jsonl") == rows(theirs / "samples.jsonl")
    kinds = ("judge/**/*.*", "cold_start/model/*.*", "**/*.safetensors")
    files = {path.relative_to(theirs) for kind in kinds for path in theirs.glob(kind)}
    assert Path("judge/adapter/adapter_model.safetensors") in files and Path("best.safetensors") in files
    for path in files:                                      # PEFT writes the path of the base into its files
        written = (ours / path).read_bytes().replace(bytes(again), bytes(toy_run))
        assert written == (theirs / path).read_bytes(), path


def test_the_cold_start_alone_with_a_rank_loss_is_a_baseline(toy_run, toy_config, tmp_path):
    (tmp_path / "01_build_dataset").symlink_to(toy_run / "01_build_dataset")
    done = run_stage("02", toy_config, f"run={tmp_path}", "cold_start_steps=3", "rank_weight=1", "steps=0")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "02_train_reward" / "metrics.jsonl")
    assert [row["phase"] for row in found] == ["cold_start"] * 3 and all(0 < row["loss_rank"] < 1 for row in found)
    judge = mllm.load_judge(tmp_path / "02_train_reward", CPU)
    base = mllm.load_judge(tmp_path / "02_train_reward" / "cold_start" / "model", CPU)
    base.candidate_view = judge.candidate_view
    lr, *images = make_images(0)
    assert torch.equal(mllm.expected_scores(judge, [lr], [images]), mllm.expected_scores(base, [lr], [images]))


@pytest.mark.parametrize("overrides, says", [
    (["lora_rank=0", "dtype=bfloat16"], "dtype=bfloat16 would round its updates away; set dtype=float32"),
    (["warmup_steps=0"], "warmup_steps=0: should be at least 1"), (["lr=-1"], "lr=-1.0: should be above 0"),
    (["heads=0"], "heads=0: should be at least 1"), (["steps=-1"], "steps=-1: should be at least 0"),
    (["width=9", "heads=3"], "width must be a multiple of 2 x heads"),
    (["looks=49"], "looks=49"), (["candidate_view=both"], "must be image or clip"),
    (["cold_start_steps=0"], "needs cold_start_steps")])
def test_settings_that_cannot_work_are_refused(toy_config, capsys, overrides, says):
    with pytest.raises(SystemExit):
        load_config(stage.Config, stage.__file__, [str(toy_config), *overrides])
    assert says in capsys.readouterr().err
