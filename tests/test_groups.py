"""
Groups of stage 01: bad lines, labels, the method prior, and the cohorts that training takes from them.

Run     python -m pytest tests/test_groups.py       # 5 s, and a toy run of 01 and 02
"""
import json
import shutil

import numpy as np
import pytest

from common import groups, run
from common.groups import (Cohort, all_groups, digit_targets, group_images, has_method, load_cohorts, load_groups,
                           method_prior, pick)
from common.images import write_png

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


# groups.jsonl ----------------------------------------------------------------------------------------------

@pytest.fixture
def stage01(tmp_path):
    """A hand-written data set: one group in train, one without ground truth in test."""
    for name in ("lr", "hr", "c0", "c1"):
        write_png(tmp_path / f"{name}.png", PIXELS[:4, :4] if name == "lr" else PIXELS[:16, :16])
    group = {"id": "train_00000", "split": "train", "source": "x", "scale": 4, "lr": "lr.png", "hr": "hr.png",
             "degradation": {}, "candidates": [{"id": f"c{k}", "path": f"c{k}.png", "method": "m"} for k in range(2)],
             "labels": {"overall": {"ranks": [1, 2], "scores": [0.9, 0.1], "source": "proxy", "votes": None}}}
    bare = group | {"id": "test_00000", "split": "test", "hr": None, "labels": {}}
    (tmp_path / "groups.jsonl").write_text(f"{json.dumps(group)}\n{json.dumps(bare)}\n")
    return tmp_path


def test_groups_of_a_split_and_their_images(stage01):
    group, = load_groups(stage01, "train")
    lr, candidates, hr = group_images(stage01, group)
    assert lr.shape == (4, 4, 3) and [c.shape for c in candidates] == [(16, 16, 3)] * 2 and hr.shape == (16, 16, 3)
    assert group_images(stage01, load_groups(stage01, "test")[0])[2] is None


def edited(change):
    """A function of the lines: change(group) in place for the first."""
    def edit(lines: list[str]) -> list[str]:
        group = json.loads(lines[0])
        change(group)
        return [json.dumps(group), *lines[1:]]
    return edit


BAD = {  # name -> (lines -> lines, words of the error)
    "cut": (lambda lines: [lines[0], lines[1][:50]], "line 2 is not JSON"),
    "NaN": (edited(lambda g: g["labels"]["overall"].update(scores=[float("nan"), 1])), "NaN is no number"),
    "a huge number": (lambda lines: [lines[0].replace("0.9", "1e999"), lines[1]], "scores should be numbers"),
    "not UTF-8": (lambda lines: [lines[0].replace('"x"', '"\udcff"'), lines[1]], "line 1 is not JSON"),
    "deep": (lambda lines: ["[" * 100_000, *lines], "line 1 is not JSON"),
    "a list": (lambda lines: ["[]", *lines], "JSON object"),
    "an id twice": (lambda lines: [*lines, lines[0]], "line 3: the id 'train_00000' is given twice"),
    "no id": (edited(lambda g: g.pop("id")), "'id' is missing"),
    "a number as path": (edited(lambda g: g.update(lr=3)), "'lr' should be str, not 3"),
    "another split": (edited(lambda g: g.update(split="trian")), "'trian' is not one of train, val, test"),
    "text as a candidate": (edited(lambda g: g.update(candidates=["c0"])), "candidate is not a JSON object"),
    "no method": (edited(lambda g: g["candidates"][0].pop("method")), "'method' is missing in a candidate"),
    "no candidates": (edited(lambda g: g.update(candidates=[])), "no candidates"),
    "another axis": (edited(lambda g: g.update(labels={"beauty": {"ranks": [1, 2]}})), "labels of 'beauty'"),
    "text as ranks": (edited(lambda g: g["labels"]["overall"].update(ranks=["1", "2"])), "ranks should be numbers"),
    "too few ranks": (edited(lambda g: g["labels"]["overall"].update(ranks=[1])), "do not fit the 2 candidates"),
    "a missing file": (edited(lambda g: g.update(lr="gone.png")), "gone.png is missing"),
    "a long way out": (edited(lambda g: g.update(hr="hr/../../hr.png")), "leads out of"),
    "an absolute path": (edited(lambda g: g["candidates"][0].update(path="/etc/passwd")), "'/etc/passwd' leads out"),
    "no picture": (edited(lambda g: g.update(lr="groups.jsonl")), "groups.jsonl cannot be read"),
    "a wrong hash": (edited(lambda g: g.update(sha256={"lr.png": "0" * 64})), "checksum"),
    "hashes in a list": (edited(lambda g: g.update(sha256=["0"])), "sha256 should be an object"),
    "no group of the split": (lambda lines: lines[1:], "no group in the split 'train'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_in_one_line(stage01, capsys, name):
    edit, words = BAD[name]
    path = stage01 / "groups.jsonl"
    lines = edit(path.read_text().splitlines())
    path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        for group in load_groups(stage01, "train"):
            group_images(stage01, group)
    error, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(stage01) in error and words in error and "build" in error


def test_a_missing_file_of_groups_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_groups(tmp_path, "train")
    assert "groups.jsonl is missing" in capsys.readouterr().err


# labels ----------------------------------------------------------------------------------------------------

def group_of(methods: str, ranks: list, scores: list | None = None, axis: str = "overall") -> dict:
    """One group whose candidates have these methods, and a label on one axis."""
    return {"candidates": [{"method": method} for method in methods.split()],
            "labels": {axis: {"ranks": ranks, "scores": scores}}}


def test_the_method_prior_is_the_mean_training_label_of_a_method_and_sees_no_test_label():
    train = [group_of("a b c", [1, 2, 3], [0.9, 0.5, 0.1]), group_of("a b c", [1, 3, 2], [0.7, 0.3, 0.4])]
    test = group_of("a c new", [3, 2, 1], [0.0, 0.0, 1.0])
    guess = method_prior([test], train)
    assert np.allclose(guess[0, :, 2], [0.8, 0.25, (0.8 + 0.4 + 0.25) / 3]) and np.isnan(guess[..., :2]).all()
    blind = method_prior([test | {"labels": {}}], train)
    assert np.array_equal(blind, guess, equal_nan=True)
    train[1]["labels"]["overall"]["scale"] = "group"            # one group without common scores: ranks for all
    assert np.allclose(method_prior([test], train)[0, :2, 2], [-1, -2.5])


@pytest.mark.parametrize("ranks, targets", [
    ([1, 2, 3], [9, 5, 1]), ([2, 1, 1], [1, 9, 9]), ([2, 3, 5], [9, 19 / 3, 1]), ([1, 1, 1], [5, 5, 5])])
def test_without_scores_the_best_and_the_worst_of_a_group_are_taught_as_9_and_1_and_what_is_level_as_5(ranks, targets):
    assert digit_targets({"ranks": ranks}, np.array([])) == pytest.approx(targets)
    assert digit_targets({"ranks": [1, 2], "scores": [0.9, 0.2]}, np.array([0.2, 0.9])).tolist() == [7, 3]


# cohorts ---------------------------------------------------------------------------------------------------

def test_a_split_whose_labels_tie_all_candidates_is_refused(stage01, capsys):
    assert load_cohorts(stage01, all_groups(stage01), "train")[0][0].targets[:, 2].tolist() == [7, 3]
    path = stage01 / "groups.jsonl"
    path.write_text(path.read_text().replace("[1, 2]", "[1, 1]"))
    with pytest.raises(SystemExit):
        load_cohorts(stage01, all_groups(stage01), "train")
    assert "the labels of the split train tell no two candidates apart" in capsys.readouterr().err


def test_candidates_beyond_what_fits_in_memory_are_read_when_asked_for_and_are_the_same(
        toy_run, tmp_path, monkeypatch, capsys):
    source = tmp_path / "01_build_dataset"
    shutil.copytree(toy_run / source.name, source)
    in_memory, _ = load_cohorts(source, all_groups(source), "val")
    monkeypatch.setattr(groups, "IN_MEMORY", 2 * sum(image.nbytes for image in in_memory[0].images))
    cohorts, _ = load_cohorts(source, all_groups(source), "val")
    assert [type(cohort.images) for cohort in cohorts] == [list] * 2 + [groups.OnDisk] * (len(in_memory) - 2)
    for a, b in zip(cohorts, in_memory, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(a.images, b.images, strict=True)) and len(a.images) == 4
    (source / cohorts[-1].images.paths[1]).write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        cohorts[-1].images[1]
    assert "its checksum is not the one of groups.jsonl" in capsys.readouterr().err


def test_candidates_of_a_held_out_method_are_no_part_of_training(toy_run, capsys):
    source, names = toy_run / "01_build_dataset", ["warp", "noise"]
    everyone, trained = (load_cohorts(source, all_groups(source), "train", held_out=held)[0] for held in ([], names))
    by_id = {cohort.id: cohort for cohort in everyone}
    assert len({len(cohort.images) for cohort in trained}) > 1              # groups are no longer of one size
    for cohort in trained:
        whole: Cohort = by_id[cohort.id]
        rest = [c for c, method in enumerate(whole.methods) if not {"warp", "noise"} & set(method.split("+"))]
        assert cohort.methods == [whole.methods[c] for c in rest]
        assert np.array_equal(cohort.ranks, whole.ranks[rest])
        assert all(np.array_equal(a, whole.images[c]) for a, c in zip(cohort.images, rest, strict=True))
    for cohort in load_cohorts(source, all_groups(source), "val", held_out=names)[0]:   # shown, and not counted
        hidden = [bool({"warp", "noise"} & set(method.split("+"))) for method in cohort.methods]
        assert np.array_equal(np.isnan(cohort.ranks).all(1), hidden)
    assert has_method({"method": "warp+blur"}, ["blur"]) and not has_method({"method": "warp"}, ["war"])
    with pytest.raises(SystemExit):
        groups.check_methods(source, all_groups(source), ["wrap"])
    assert "did you mean 'warp'?" in capsys.readouterr().err


def slow_walk(n: int, steps: int, count: int) -> list[list[int]]:
    """An endless deck, shuffled anew for each epoch, dealt out card by card."""
    deck = [int(i) for epoch in range(steps * count // n + 1)
            for i in run.np_rng(0, "phase", "epoch", epoch).permutation(n)]
    return [deck[step * count:(step + 1) * count] for step in range(steps)]


@pytest.mark.parametrize("n, count", [(10, 4), (10, 10), (100, 16)])
def test_no_step_has_a_cohort_twice_and_the_other_steps_are_a_walk_through_epochs(n, count):
    chosen = [pick(list(range(n)), 0, "phase", step, count) for step in range(60)]
    assert all(len(set(row)) == count for row in chosen)
    for row, wanted in zip(chosen, slow_walk(n, 60, count)):
        assert row == wanted or len(set(wanted)) < count


def test_a_step_of_more_groups_than_there_are_is_refused(capsys):
    groups.require_enough(24, groups_per_step=24, cold_start_groups=0)
    with pytest.raises(SystemExit):
        groups.require_enough(24, groups_per_step=25)
    assert "groups_per_step=25 is more than the 24 training groups" in capsys.readouterr().err
