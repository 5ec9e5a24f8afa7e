"""
The groups of stage 01 on disk, and one line for what is wrong with them.

Run     python -m pytest tests/test_data.py        # 5 s
"""
import json

import numpy as np
import pytest

from common.groups import group_images, load_groups
from common.images import write_png

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


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


def test_groups(stage01):
    groups = load_groups(stage01, "train")
    assert [group["id"] for group in groups] == ["train_00000"]
    lr, candidates, hr = group_images(stage01, groups[0])
    assert lr.shape == (4, 4, 3) and [c.shape for c in candidates] == [(16, 16, 3)] * 2 and hr.shape == (16, 16, 3)
    assert group_images(stage01, load_groups(stage01, "test")[0])[2] is None


def edited(change):
    """A function of the first line: change(group) in place, all else kept."""
    def edit(lines: list[str]) -> list[str]:
        group = json.loads(lines[0])
        change(group)
        return [json.dumps(group), *lines[1:]]
    return edit


BAD_GROUPS = {  # name -> (lines -> lines, words of the line)
    "cut": (lambda lines: [lines[0], lines[1][:50]], ["line 2", "not JSON"]),
    "NaN": (edited(lambda g: g["labels"]["overall"].update(scores=[float("nan"), 1])), ["line 1", "NaN is no number"]),
    "a huge number": (lambda lines: [lines[0].replace("0.9", "1e999"), lines[1]], ["scores should be numbers"]),
    "not UTF-8": (lambda lines: [lines[0].replace('"x"', '"\udcff"'), lines[1]], ["line 1", "not JSON"]),
    "deep": (lambda lines: ["[" * 100_000, *lines], ["line 1", "not JSON"]),
    "a list": (lambda lines: ["[]", *lines], ["line 1", "JSON object"]),
    "an id twice": (lambda lines: [*lines, lines[0]], ["line 3", "'train_00000' is given twice"]),
    "no id": (edited(lambda g: g.pop("id")), ["'id' is missing"]),
    "a number as path": (edited(lambda g: g.update(lr=3)), ["'lr' should be str, not 3"]),
    "text as a candidate": (edited(lambda g: g.update(candidates=["c0", "c1"])), ["candidate is not a JSON object"]),
    "no candidates": (edited(lambda g: g.update(candidates=[])), ["no candidates"]),
    "a number as label": (edited(lambda g: g.update(labels={"overall": 3})), ["labels of 'overall'"]),
    "text as ranks": (edited(lambda g: g["labels"]["overall"].update(ranks=["1", "2"])), ["ranks should be numbers"]),
    "too few ranks": (edited(lambda g: g["labels"]["overall"].update(ranks=[1])), ["do not fit the 2 candidates"]),
    "a missing file": (edited(lambda g: g.update(lr="gone.png")), ["gone.png is missing"]),
    "a path out of the folder": (edited(lambda g: g.update(lr="../lr.png")), ["'../lr.png' leads out of"]),
    "an absolute path": (edited(lambda g: g["candidates"][0].update(path="/etc/passwd")), ["'/etc/passwd' leads out"]),
    "a file that is no picture": (edited(lambda g: g.update(lr="groups.jsonl")), ["cannot identify image"]),
    "a wrong hash": (edited(lambda g: g.update(sha256={"lr.png": "0" * 64})), ["lr.png", "checksum"]),
    "hashes in a list": (edited(lambda g: g.update(sha256=["0"])), ["sha256 should be an object"]),
    "no such split": (edited(lambda g: g.update(split="trian")), ["'trian' is not one of train, val, test"]),
    "no such axis": (edited(lambda g: g.update(labels={"beauty": {}})), ["labels of 'beauty'"]),
    "a candidate without method": (edited(lambda g: g["candidates"][0].pop("method")), ["'method' is missing"]),
    "of another split": (lambda lines: lines[1:], ["no group in the split 'train'"]),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_damaged_groups_are_refused_with_one_line(stage01, capsys, name):
    edit, words = BAD_GROUPS[name]
    path = stage01 / "groups.jsonl"
    lines = edit(path.read_text().splitlines())
    path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        for group in load_groups(stage01, "train"):
            group_images(stage01, group)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in (str(stage01), "build", *words)), lines[0]


def test_missing_groups_and_damaged_images_get_one_line(stage01, capsys):
    groups = load_groups(stage01, "train")
    (stage01 / "c1.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        group_images(stage01, groups[0])
    (stage01 / "groups.jsonl").unlink()
    with pytest.raises(SystemExit):
        load_groups(stage01, "train")
    first, second = capsys.readouterr().err.splitlines()
    assert "c1.png cannot be read" in first and "groups.jsonl is missing" in second
