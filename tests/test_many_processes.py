"""
Training of the reward model on 1 and 2 gloo processes, and what happens to a NaN.

Run     python -m pytest tests/test_many_processes.py       # 30 s
"""
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # processes start this file, see the end
from common import dist, training
from common.dist import mine
from common.groups import Cohort, pick
from conftest import build_judge, load_stage, make_images

SETTINGS = dict(lora_rank=0, groups_per_step=3, reasoned_groups=1, replies=2, direct_replies=4, max_reply_tokens=6,
                cold_start_replies=1, rank_weight=1.0, groups_per_forward=1, lr=1e-3, warmup_steps=1, steps=4,
                cold_start_steps=4, updates_per_rollout=2)
stage = load_stage("02")


def build_cohorts(count: int) -> list[Cohort]:
    """Cohorts of three candidates with labels on all axes."""
    ranks = np.repeat([[1.0], [2.0], [3.0]], 3, axis=1)
    return [Cohort(f"c{i}", images[0], images[1:], ["hr", "warp", "blur"], np.roll(ranks, i, 0),
                   9 - 3 * np.roll(ranks, i, 0)) for i, images in enumerate(map(make_images, range(count)))]


class Trainee:
    """A judge, its first weights as the reference, and its optimizer, made alike on every rank."""

    def __init__(self):
        self.judge, self.cfg = build_judge(**SETTINGS)
        self.weights = training.trainable(self.judge.model)
        self.averaged, self.reference = training.copied(self.weights), training.copied(self.weights)
        self.optimizers = stage.make_optimizers(self.weights, self.cfg.lr)
        self.cohorts = build_cohorts(5)

    def supervise(self, step: int, cohorts: list[Cohort] | None = None) -> dict:
        """A step on one LR image, so that a second rank has none."""
        cohorts = mine(cohorts or pick(self.cohorts, 0, "cold start", step, 1))
        return stage.supervised_step(self.judge, self.cfg, self.optimizers, cohorts, step)

    def grpo(self, step: int) -> dict:
        """A step on three LR images, one of them with reasoning; without what the clock decides."""
        row, _ = stage.grpo_step(self.judge, self.reference, self.cfg, self.optimizers, self.cohorts, step)
        return {key: value for key, value in row.items() if not key.startswith(("seconds", "peak"))}

    def answers(self) -> dict[str, tuple]:
        """Of this rank's LR images: digits, tokens of replies, rewards."""
        rollouts = stage.sample(self.judge, self.cfg, mine(self.cohorts[:3]), 0, {"c0", "c2"})
        return {rollout.cohorts[0].id: (rollout.digits, rollout.replies, *stage.score(self.judge, self.cfg, rollout))
                for rollout in rollouts}

    def run(self) -> dict:
        """What must not depend on the number of processes; all ranks' answers are put together by the test."""
        results = {"answers": self.answers(), "rows": [self.supervise(0), self.supervise(1), self.grpo(0)]}
        training.average(self.averaged, self.weights, 0.9)
        with training.swapped(self.weights, self.averaged):
            results["scores"] = stage.evaluate(self.judge, self.cfg, self.cohorts[3:])
        return results | {"weights": training.copied(self.weights)}


def check_nan(trainee: Trainee) -> list:
    """The second LR image has a label that is not finite: it is the last rank's, and no rank may step."""
    before, cohorts = training.copied(trainee.weights), build_cohorts(2)
    cohorts[1].targets[0] = np.inf
    rows = [trainee.supervise(step, cohorts) for step in range(3)]
    same = all(torch.equal(value, before[name]) for name, value in trainee.weights.items())
    return [same, [float(row["nonfinite_losses"]) for row in rows], [row["skipped_updates"] for row in rows]]


def on_rank(folder: Path) -> None:
    """What each process of `launch` does; its results go to a file."""
    trainee = Trainee()
    results = trainee.run()
    dist.assert_same_weights(trainee.weights.items())
    torch.save(results | {"nan": check_nan(Trainee())}, folder / f"rank{dist.rank()}_of_{dist.world_size()}.pt")


def launch(folder: Path, processes: int) -> list[dict]:
    """Start this file on so many ranks; returns the results of each."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
                           "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, text=True,
                              env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}_of_{processes}.pt", weights_only=False) for rank in range(processes)]


def assert_same_answers(ranks: list[dict], alone: dict) -> None:
    """To the token, and rewards to the bit: they depend on (seed, step, image), not on who computes them."""
    together = {name: value for rank in ranks for name, value in rank["answers"].items()}
    assert together.keys() == alone["answers"].keys()
    for name, (digits, replies, *earned) in together.items():
        digits_alone, replies_alone, *earned_alone = alone["answers"][name]
        assert torch.equal(digits, digits_alone) and replies == replies_alone
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(earned, earned_alone))


def test_two_processes_train_what_one_does_and_skip_a_nan_together(tmp_path):
    """Rows to rounding; weights to a part of what Adam moves, which magnifies rounding near 0."""
    alone = Trainee().run()
    ranks = launch(tmp_path, 2)
    assert_same_answers(ranks, alone)
    for rank in ranks:
        for row, wanted in zip(rank["rows"], alone["rows"], strict=True):
            for key, value in wanted.items():
                same = row[key] == value or math.isclose(row[key], value, rel_tol=2e-4, abs_tol=2e-6)
                assert same, (key, row[key], value)
        for name, value in alone["weights"].items():
            error = (rank["weights"][name] - value).abs()
            assert error.max() <= 4e-3 and error.mean() <= 4e-5, (name, error.max(), error.mean())
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name])
        assert rank["scores"] == alone["scores"]
        assert rank["nan"] == [True, [1, 1, 1], [1, 1, 1]]


def test_a_model_that_computes_nan_is_noticed_in_both_phases():
    trainee = Trainee()
    with torch.no_grad():
        trainee.judge.net.lm_head.weight[trainee.judge.digit_ids[4], 0] = torch.nan
    row = trainee.supervise(0)
    assert row["skipped_updates"] == 1 and stage.why_skipped(row) == "losses that are not finite: 1, grad_norm nan"
    row = trainee.grpo(0)
    assert row["nonfinite_losses"] == 6 and row["skipped_updates"] == 2           # three LR images, two passes


if __name__ == "__main__":                                              # one rank of `launch`
    dist.init()
    on_rank(Path(sys.argv[1]))
    dist.finish()
