"""
Cohorts of the reward model: where their pictures lie, how they are shown, what they teach, which take part in a step.

Run     python -m pytest tests/test_cohorts.py          # 5 s, and a toy run of 01 and 02
"""
import shutil

import numpy as np
import pytest
import torch

from common import dist, mllm, run, supervised
from common.cohorts import scores_of
from common.groups import Cohort, Stored, digit_targets, load_cohorts, pick
from common.replies import look_at, sample_answers, turned
from conftest import build_judge, make_images, run_stage


# pictures --------------------------------------------------------------------------------------------------

def test_candidates_beyond_what_fits_in_memory_are_read_when_asked_for_and_are_the_same(toy_run, monkeypatch):
    source, judge = toy_run / "01_build_dataset", mllm.load_judge(toy_run / "02_train_reward", torch.device("cpu"))
    held, _ = load_cohorts(source, "val")
    monkeypatch.setattr(dist, "IN_MEMORY", 2 * sum(image.nbytes for image in held[0].images))
    found, _ = load_cohorts(source, "val")
    assert [type(own.images) for own in found] == [list] * 2 + [Stored] * (len(held) - 2)
    assert all(type(own.images) is list for own in held) and len(held) > 3
    for own, whole in zip(found, held):
        assert len(own.images) == len(whole.images) and len(own.images[1:3]) == 2
        assert all(np.array_equal(a, b) for a, b in zip(own.images, whole.images, strict=True))
        assert np.array_equal(own.images[1:3][1], whole.images[2]) and np.array_equal(own.lr, whole.lr)
        assert torch.equal(look_at(judge, own, 21).pixels, look_at(judge, whole, 21).pixels)
    assert np.array_equal(scores_of(judge, found), scores_of(judge, held))


def test_a_candidate_that_was_damaged_since_is_found_when_it_is_read(toy_run, tmp_path, monkeypatch, capsys):
    source = tmp_path / "01_build_dataset"
    shutil.copytree(toy_run / source.name, source)
    monkeypatch.setattr(dist, "IN_MEMORY", 0)
    own = load_cohorts(source, "val")[0][0]
    (source / own.images.paths[1]).write_bytes(b"nothing")
    assert len(own.images) > 1 and own.images[0].dtype == np.uint8
    with pytest.raises(SystemExit):
        own.images[1]
    error = capsys.readouterr().err
    assert own.images.paths[1] in error and "its checksum is not the one of groups.jsonl" in error


# looks -----------------------------------------------------------------------------------------------------

def test_the_first_8_looks_keep_colors_and_all_48_differ():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    found = [turned(image, look) for look in range(48)]
    assert len({own.tobytes() for own in found}) == 48 and np.array_equal(found[0], image)
    colors = [sorted(map(tuple, own.reshape(-1, 3).tolist())) for own in found]
    assert colors[:8] == [colors[0]] * 8 and colors[0] not in colors[8:]
    rows = [turned(np.arange(12).reshape(2, 2, 3), look)[..., 0].tolist() for look in range(8)]
    assert rows == [[[0, 3], [6, 9]], [[3, 9], [0, 6]], [[9, 6], [3, 0]], [[6, 0], [9, 3]],
                    [[3, 0], [9, 6]], [[0, 6], [3, 9]], [[6, 9], [0, 3]], [[9, 3], [6, 0]]]


@pytest.mark.parametrize("looks", [1, 8, 48])
def test_training_draws_from_as_many_looks_as_are_set(looks):
    judge, cfg = build_judge(looks=looks, replies=2, direct_replies=2, max_reply_tokens=2)
    lr, *images = make_images(0)
    ranks = np.ones((3, 3))
    few = [Cohort(f"{i}", lr, images, [""] * 3, ranks, ranks) for i in range(24)]
    views = [look_at(judge, few[0], look).pixels for look in range(48)]
    shown = [item.images.pixels for item in sample_answers(judge, cfg, few, 0, set())]
    sampled = [next(look for look, own in enumerate(views) if torch.equal(own, pixels)) for pixels in shown]
    taught = [lesson.look for lesson in supervised.lessons_of(judge, cfg, few, phase="cold start", step=0)]
    for found in (sampled, taught):
        assert max(found) < looks and (max(found) >= looks // 2) and len(set(found)) > min(looks, 20) // 2


# targets ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks, targets", [
    ([1, 2, 3], [9, 5, 1]), ([2, 1, 1], [1, 9, 9]), ([2, 3, 5], [9, 19 / 3, 1]), ([1, 1, 1], [5, 5, 5]),
    ([2, 2], [5, 5])])
def test_without_scores_the_best_and_the_worst_of_a_group_are_taught_as_9_and_1_and_what_is_level_as_5(ranks, targets):
    assert digit_targets({"ranks": ranks}, np.array([])) == pytest.approx(targets)


# picks -----------------------------------------------------------------------------------------------------

def slow_walk(n: int, steps: int, count: int) -> list[list[int]]:
    """An endless deck, shuffled anew for each epoch, dealt out card by card."""
    deck = [int(i) for epoch in range(steps * count // n + 1)
            for i in run.np_rng(0, "phase", "epoch", epoch).permutation(n)]
    return [deck[step * count:(step + 1) * count] for step in range(steps)]


@pytest.mark.parametrize("n, count", [(10, 4), (10, 10), (16, 4), (100, 16)])
def test_no_step_has_a_cohort_twice_and_the_other_steps_are_a_walk_through_epochs(n, count):
    found = [pick(list(range(n)), 0, "phase", step, count) for step in range(60)]
    assert all(len(set(own)) == count for own in found)
    walk = slow_walk(n, 60, count)
    assert [own for own, wanted in zip(found, walk) if len(set(wanted)) == count] == [
        wanted for wanted in walk if len(set(wanted)) == count]
    assert sum(len(set(wanted)) < count for wanted in walk) == sum(own != wanted for own, wanted in zip(found, walk))


@pytest.mark.parametrize("number, wrong", [("02", "groups_per_step=25"), ("02", "cold_start_groups=25"),
                                           ("04", "inputs_per_step=25")])
def test_a_step_of_more_cohorts_than_there_are_is_refused(toy_run, toy_config, tmp_path, number, wrong):
    for stem in ("01_build_dataset", "02_train_reward")[:1 + (number == "04")]:
        (tmp_path / stem).symlink_to(toy_run / stem)
    done = run_stage(number, toy_config, f"run={tmp_path}", wrong)
    assert done.returncode == 2 and f"{wrong} is more than the 24 training groups" in done.stderr
