"""
Training of the reward model on 1, 2 and 3 gloo processes, sharded (FSDP2) or not, and what happens to a NaN.

Run     python -m pytest tests/test_many_processes.py       # 40 s
"""
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # processes start this file, see the end
from common import checkpoints, dist, grpo, reward_training, sharding
from common.cohorts import evaluate
from common.dist import mine
from common.groups import Cohort, pick
from common.replies import sample_answers
from common.reward_grpo import score
from common.supervised import supervised_step
from conftest import build_judge, load_stage, make_images

SETTINGS = dict(lora_rank=0, groups_per_step=3, reasoned_groups=1, replies=2, direct_replies=4, max_reply_tokens=6,
                cold_start_replies=1, groups_per_forward=1, lr=1e-3, warmup_steps=1, steps=4, updates_per_rollout=2)


def build_cohorts(count: int) -> list[Cohort]:
    """Cohorts of three candidates with labels on all axes."""
    ranks = np.repeat([[1.0], [2.0], [3.0]], 3, axis=1)
    return [Cohort(f"c{i}", *(images[0], images[1:]), ["hr", "warp", "blur"], np.roll(ranks, i, 0),
                   9 - 3 * np.roll(ranks, i, 0)) for i, images in enumerate(map(make_images, range(count)))]


class Trainee:
    """A judge, its reference and its optimizer, made alike on every rank."""

    def __init__(self, fsdp: bool = False):
        (self.judge, self.cfg), (self.reference, _) = build_judge(**SETTINGS), build_judge(**SETTINGS)
        self.reference.model.requires_grad_(False)
        if fsdp:
            sharding.shard(self.judge), sharding.shard(self.reference)
        self.averaged = reward_training.copy_of(self.judge)
        self.chosen = reward_training.optimizers(self.judge, self.cfg.lr, self.cfg.weight_decay)
        self.cohorts = build_cohorts(5)

    def supervise(self, step: int, cohorts: list[Cohort] | None = None) -> dict:
        """A step on two LR images, so that a third rank has none."""
        cohorts = mine(cohorts or pick(self.cohorts, 0, "cold start", step, 2))
        return supervised_step(self.judge, self.cfg, self.chosen, cohorts, phase="sft_rank", step=step, steps=4,
                               final_lr=0.1)

    def grpo(self, step: int) -> dict:
        """A step on three LR images, one of them with reasoning; without what the clock decides."""
        row, _ = load_stage("02").grpo_step(self.judge, self.reference, self.cfg, self.chosen, self.cohorts, step)
        return {key: value for key, value in row.items() if not key.startswith(("seconds", "peak"))}

    def answers(self) -> dict[str, tuple]:
        """Of this rank's LR images: digits, tokens of replies, rewards."""
        with sharding.gathered(self.judge):
            answers = sample_answers(self.judge, self.cfg, mine(self.cohorts[:3]), 0, {"c0", "c2"})
        for item in answers:
            score(self.judge, self.cfg, item)
        return {a.cohort.id: (a.digits, a.replies, a.digit_rewards, a.reply_rewards) for a in answers}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in
                sharding.whole(dict(reward_training.trainable(self.judge))).items()}

    def save(self, folder: Path) -> None:
        reward_training.save_checkpoint(self.judge, self.averaged, self.chosen, folder, step=2, state={})

    def run(self) -> dict:
        """What must not depend on the number of processes; all ranks' answers are put together by `launch`."""
        found = {"answers": self.answers(), "rows": [self.supervise(0), self.supervise(1), self.grpo(0)]}
        reward_training.average(self.averaged, self.judge, decay=0.9, step=2)
        with reward_training.holding(self.judge, self.averaged):
            found["scores"] = evaluate(self.judge, self.cohorts[3:])
        return found | {"weights": self.weights()}

    def go_on(self, folder: Path) -> dict:
        """Load a checkpoint and take one more step."""
        assert reward_training.resume(self.judge, self.averaged, self.chosen, folder)[0] == 2
        held = {f"averaged.{name}": value.clone() for name, value in sharding.whole(self.averaged).items()}
        return {"rows": [self.grpo(2)], "weights": self.weights() | held}


def on_ranks(folder: Path) -> None:
    """What each process of `launch` does; its results go to a file."""
    trainee = Trainee()
    found = {"plain": trainee.run()}
    dist.assert_same_weights(reward_training.trainable(trainee.judge).items())
    if dist.world_size() == 2:
        sharded = Trainee(fsdp=True)
        held = sum(p.to_local().numel() for p in reward_training.trainable(sharded.judge).values())
        found |= {"sharded": sharded.run(), "held": held}
        sharded.save(folder / "two")
        found["moments"] = sum(value.to_local().numel() for p, own in sharded.chosen["adamw"].state.items()
                               for value in own.values() if value.shape == p.shape)
        found["from_one"] = Trainee(fsdp=True).go_on(folder / "one")
        found["nan"] = check_nan(Trainee(), folder), check_nan(Trainee(fsdp=True), folder)
    torch.save(found, folder / f"rank{dist.rank()}_of_{dist.world_size()}.pt")


def check_nan(trainee: Trainee, folder: Path) -> list:
    """The second LR image has a label that is not finite: it is the last rank's, and no rank may step."""
    before, cohorts = trainee.weights(), build_cohorts(2)
    cohorts[1].targets[0] = np.inf
    rows = [trainee.supervise(step, cohorts) for step in range(3)]
    same = all(torch.equal(value, before[name]) for name, value in trainee.weights().items())
    return [same, [float(row["nonfinite_losses"]) for row in rows], [row["skipped_updates"] for row in rows]]


def launch(folder: Path, processes: int) -> list[dict]:
    """Start this file on so many ranks; returns what each found."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
                           "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, text=True,
                              env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}_of_{processes}.pt", weights_only=False) for rank in range(processes)]


def assert_alike(ours: dict, theirs: dict, lr_steps: float) -> None:
    """Same rows to rounding; weights that differ by a part of what Adam moves, which magnifies rounding near 0."""
    for row, other in zip(ours["rows"], theirs["rows"], strict=True):
        for key, value in other.items():
            same = row[key] == value or math.isclose(row[key], value, rel_tol=2e-4, abs_tol=2e-6)
            assert same, (key, row[key], value)
    for name, value in theirs["weights"].items():
        error = (ours["weights"][name] - value).abs()
        assert error.max() <= lr_steps and error.mean() <= lr_steps / 100, (name, error.max(), error.mean())


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, Trainee, dict]:
    """(folder with the checkpoint of this process, its trainee two steps on, what it found)."""
    folder, trainee = tmp_path_factory.mktemp("ranks"), Trainee()
    found = trainee.run()
    trainee.save(folder / "one")
    return folder, trainee, found


@pytest.fixture(scope="module")
def two(one) -> list[dict]:
    return launch(one[0], 2)


def assert_same_answers(found: list[dict], alone: dict) -> None:
    """To the token, and rewards to the bit: they depend on (seed, step, image), not on who computes them."""
    together = {name: value for rank in found for name, value in rank["answers"].items()}
    assert together.keys() == alone["answers"].keys()
    for name, (digits, replies, *earned) in together.items():
        digits_alone, replies_alone, *earned_alone = alone["answers"][name]
        assert torch.equal(digits, digits_alone) and replies == replies_alone
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(earned, earned_alone))


def test_two_and_three_processes_train_what_one_does(one, two):
    folder, _, alone = one
    for found in (two, launch(folder, 3)):
        plain = [rank["plain"] for rank in found]
        assert_same_answers(plain, alone)
        for rank in plain:
            assert_alike(rank, alone, lr_steps=4e-3)
            assert rank["scores"] == alone["scores"]
            assert all(torch.equal(value, plain[0]["weights"][name]) for name, value in rank["weights"].items())


def test_shards_train_what_one_whole_model_does(one, two):
    _, trainee, alone = one
    assert_same_answers([rank["sharded"] for rank in two], alone)
    for rank in two:
        assert_alike(rank["sharded"], alone, lr_steps=4e-3)
        assert rank["sharded"]["scores"] == alone["scores"]
    total = sum(p.numel() for p in reward_training.trainable(trainee.judge).values())
    assert sum(rank["held"] for rank in two) == total and two[0]["held"] < 0.6 * total
    assert [rank["moments"] for rank in two] == [2 * rank["held"] for rank in two]


def test_a_checkpoint_of_two_loads_in_one_and_the_reverse(one, two):
    folder, trainee, _ = one
    from_two, went_on = Trainee().go_on(folder / "two"), Trainee().go_on(folder / "one")
    assert_alike(from_two, went_on, lr_steps=4e-3)
    for rank in two:
        assert_alike(rank["from_one"], went_on, lr_steps=2e-3)


def test_a_nan_of_one_rank_is_skipped_by_all(two):
    for rank in two:
        for same, losses, skipped in rank["nan"]:
            assert (same, losses, skipped) == (True, [1, 1, 1], [1, 1, 1])


def test_the_third_bad_step_in_a_row_ends_the_run_and_names_the_last_checkpoint(one, tmp_path, capsys):
    trainee, bad, cohorts = Trainee(), 0, build_cohorts(2)
    cohorts[1].targets[0] = np.inf
    for step in range(2):
        bad = reward_training.count_bad(bad, trainee.supervise(step, cohorts), tmp_path, step)
    assert bad == 2 and reward_training.count_bad(bad, trainee.supervise(2), tmp_path, 2) == 0     # a good one between
    assert "step 1: the update was skipped: 1 nonfinite_losses, grad_norm nan" in capsys.readouterr().out
    for folder, named in ((tmp_path, "none yet"), (one[0] / "one", checkpoints.list_checkpoints(one[0] / "one")[-1])):
        with pytest.raises(SystemExit):
            reward_training.count_bad(2, trainee.supervise(3, cohorts), folder, 3)
        assert "three steps in a row without a usable update (1 nonfinite_losses, grad_norm nan); last good " \
               f"checkpoint: {named};" in capsys.readouterr().err


def test_a_checkpoint_without_averaged_weights_is_refused_with_one_line(tmp_path, capsys):
    trainee = Trainee()
    checkpoints.save_checkpoint(tmp_path, 2, weights=reward_training.trainable(trainee.judge), optimizer={}, state={})
    with pytest.raises(SystemExit):
        trainee.go_on(tmp_path)
    assert "lacks averaged." in capsys.readouterr().err


def test_a_reward_that_is_not_finite_changes_nothing(monkeypatch):
    trainee, right = Trainee(), grpo.thurstone
    before = trainee.weights()

    def wrong(scores, ranks, floor):
        found = right(scores, ranks, floor)
        return torch.where(torch.arange(found.shape[-1]) == 1, torch.inf, found)

    monkeypatch.setattr(grpo, "thurstone", wrong)
    row = trainee.grpo(0)
    assert row["nonfinite_rewards"] > 0 == row["nonfinite_losses"] and row["skipped_updates"] == 2
    assert all(torch.equal(value, before[name]) for name, value in trainee.weights().items())
    monkeypatch.undo()
    row = trainee.grpo(1)
    assert row["nonfinite_rewards"] == row["skipped_updates"] == 0 and math.isfinite(row["reward_mean"])


def test_a_model_that_computes_nan_is_noticed_in_both_phases():
    trainee = Trainee()
    with torch.no_grad():
        trainee.judge.net.lm_head.weight[trainee.judge.digit_ids[4], 0] = torch.nan
    assert trainee.supervise(0)["skipped_updates"] == 1
    row = trainee.grpo(0)
    assert row["nonfinite_losses"] == 6 and row["skipped_updates"] == 2           # three LR images, two passes
    assert reward_training.count_bad(0, row, Path(), 0) == 1


if __name__ == "__main__":                                              # one rank of `launch`
    dist.init()
    on_ranks(Path(sys.argv[1]))
    dist.finish()
