"""
A preference set that exists, imported by stage 01: labels, pictures and splits are right, and what is wrong is named.

Run     python -m pytest tests/test_imports.py      # 20 s on one core
"""
import csv
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common import run
from common.config import load_config
from common.groups import label_arrays, load_groups
from common.images import read_image, resize, write_png
from conftest import ROOT, load_stage
from test_build_dataset import run_here
from test_readme import commands

SCENES = [f"{i:03d}" for i in range(8)]
METHODS = ("BSRGAN", "RealESRGAN", "ResShift", "SwinIR")
HEAD = ["lr", "candidate", "method", "overall", "rank_naturalness", "votes_consistency", "raters"]


def write_picture(path, seed, side):
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, resize(small, (side, side), "bicubic"))


@pytest.fixture
def pictures(tmp_path):
    """A folder with lr/, hr/ and a folder per method, a picture for each scene."""
    root = tmp_path / "set"
    for s, scene in enumerate(SCENES):
        write_picture(root / "lr" / f"{scene}.png", s, 8)
        for m, kind in enumerate(("hr", *METHODS)):
            write_picture(root / kind / f"{scene}.png", 10 * s + m, 32)
    return root


@pytest.fixture
def build(tmp_path, capfd):
    """Run stage 01 in this process on import settings; returns (folder, exit status, stderr)."""
    def call(place, **settings):
        values = {"hr_dir": None, "import_from": str(place), "val_fraction": 0.2, "test_fraction": 0.2, "workers": 1}
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps({"run": str(tmp_path / "run"), "seed": 0, "01_build_dataset": values | settings}))
        return tmp_path / "run" / "01_build_dataset", run_here(path), capfd.readouterr().err
    return call


def groups_of(folder):
    lines = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    for line in lines:                                                  # all that later stages rely on
        assert load_groups(folder, line["split"])
        assert all(hashlib.sha256((folder / path).read_bytes()).hexdigest() == expected
                   for path, expected in line["sha256"].items())
    return lines


def rows():
    """Scores 90 80 80 60, ranks 4 3 2 1 and votes 2 10 37 5 of 54 for the four candidates of each scene."""
    return [[f"lr/{scene}.png", f"{method}/{scene}.png", method, (90, 80, 80, 60)[m], 4 - m, (2, 10, 37, 5)[m], 54]
            for scene in SCENES for m, method in enumerate(METHODS)]


def write_table(path, lines=None, head=HEAD):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *(lines or rows())])
    return path


def write_folders(root, pictures):
    for n, scene in enumerate(SCENES, 1):
        (root / f"{n:05d}").mkdir(parents=True)
        for kind, name in zip(("lr", "hr", *METHODS), ("LR", "HR", "1", "2", "3", "4")):
            shutil.copy(pictures / kind / f"{scene}.png", root / f"{n:05d}" / f"{name}.png")
        (root / f"{n:05d}" / "ranks.json").write_text("[2, 1, 4, 4]")
    return {"import_roles": ["lr=LR.*", "hr=HR.*", "a=1.*", "b=2.*", "c=3.*", "d=4.*", "ranks=ranks.json"]}


# what comes out ----------------------------------------------------------------------------------------------

def test_a_table_of_scores_ranks_and_votes(build, pictures):
    folder, code, err = build(write_table(pictures / "set.csv"))
    assert code == 0, err
    lines = groups_of(folder)
    assert len(lines) == 8 and {line["split"] for line in lines} == {"train", "val", "test"}
    for line in lines:
        name = line["source"]
        assert line["scale"] == 4 and [one["method"] for one in line["candidates"]] == list(METHODS)
        assert line["labels"] == {
            "overall": {"ranks": [1, 2, 2, 3], "scores": [90, 80, 80, 60], "source": "import", "votes": None},
            "naturalness": {"ranks": [4, 3, 2, 1], "source": "import", "votes": None},
            "consistency": {"ranks": [4, 2, 1, 3], "source": "import", "votes": [2, 10, 37, 5], "raters": 54}}
        assert (folder / line["lr"]).read_bytes() == (pictures / name).read_bytes()
        for one, method in zip(line["candidates"], METHODS):
            assert (folder / one["path"]).read_bytes() == (pictures / name.replace("lr", method)).read_bytes()
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert results["label_source"] == "import" and results["groups"] == 8


def test_a_table_of_peoples_votes_as_published(build, pictures):
    """Two LR images of 255 x 169 px made small, with the columns and numbers of that table; a set to measure with."""
    head = ["lr", "candidate", "method", "best_votes", "n_raters", "best_share", "lpips_alex_x2ref"]
    votes = {"000": (2, 10, 37, 5), "001": (20, 7, 20, 7)}
    lines = [[f"lr/{scene}.png", f"{method}/{scene}.png", method, n, 54, round(n / 54, 4), 0.25]
             for scene, cast in votes.items() for method, n in zip(METHODS, cast)]
    folder, code, err = build(write_table(pictures / "labels.csv", lines, head), val_fraction=0, test_fraction=1)
    assert code == 0, err
    groups = load_groups(folder, "test")
    assert len(groups_of(folder)) == 2 and groups[0]["candidates"][2]["extra"] == {
        "file": "ResShift/000.png", "best_share": "0.6852", "lpips_alex_x2ref": "0.25"}
    assert [group["labels"]["overall"]["ranks"] for group in groups] == [[4, 2, 1, 3], [1, 2, 1, 2]]
    assert groups[1]["labels"] == {"overall": {"ranks": [1, 2, 1, 2], "source": "import", "votes": [20, 7, 20, 7],
                                               "raters": 54}}
    labels = label_arrays(groups)                                       # as stage 03 takes them
    assert labels.ranks[..., 2].tolist() == [[4, 2, 1, 3], [1, 2, 1, 2]]
    assert np.isnan(labels.ranks[..., :2]).all() and np.isnan(labels.scores).all()


def test_jsonl_with_sources_splits_and_pictures_elsewhere_of_another_format(build, pictures, tmp_path):
    Image.open(pictures / "SwinIR" / "003.png").save(pictures / "SwinIR" / "003.bmp")
    (pictures / "SwinIR").rename(tmp_path / "SwinIR")
    lines = []
    for row in rows():
        s = int(row[0][3:6])
        names = {"candidate": row[1].replace("SwinIR/", "../SwinIR/").replace("R/003.png", "R/003.bmp"),
                 "lr": str(pictures / row[0]), "hr": f"hr/{s:03d}.png", "method": row[2], "mos": row[3]}
        lines.append(names | {"source": f"photo{s // 2}", "split": ("train", "train", "validation", "test")[s // 2],
                              "niqe": float("nan")})
    (pictures / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder, code, err = build(pictures / "set.jsonl")
    assert code == 0, err
    lines = groups_of(folder)
    assert [line["id"] for line in lines] == [*(f"train_0000{i}" for i in range(4)), "val_00000", "val_00001",
                                              "test_00000", "test_00001"]
    assert lines[0]["source"] == lines[1]["source"] == "photo0" and lines[0]["hr"] == "hr/train_00000.png"
    assert lines[0]["labels"]["overall"]["scores"] == [90, 80, 80, 60]
    assert lines[0]["candidates"][0]["extra"]["niqe"] is None           # NaN is no JSON
    written = folder / lines[3]["candidates"][3]["path"]
    assert Image.open(written).format == "PNG"
    assert np.array_equal(read_image(written), read_image(tmp_path / "SwinIR" / "003.bmp"))


@pytest.mark.parametrize("name, text, labels", [
    ("ranks.json", "[2, 1, 4, 4]", {"overall": [2, 1, 3, 3]}),
    ("ranks.txt", "2, 1, 3, 4\n", {"overall": [2, 1, 3, 4]}),
    ("ranks.json", '{"consistency": {"b": 1, "a": 2, "c": 3, "d": 4}, "naturalness": [1, 2, 2, 4]}',
     {"consistency": [2, 1, 3, 4], "naturalness": [1, 2, 2, 3]})])
def test_numbered_folders_of_six_pictures(build, pictures, tmp_path, name, text, labels):
    settings = write_folders(tmp_path / "ref", pictures)
    for folder in (tmp_path / "ref").iterdir():
        (folder / name).write_text(text)
    settings["import_roles"][-1] = f"ranks={name}"
    folder, code, err = build(tmp_path / "ref", **settings)
    assert code == 0, err
    lines = groups_of(folder)
    assert len(lines) == 8 and {line["split"] for line in lines} == {"train", "val", "test"}
    line = next(line for line in lines if line["extra"]["lr"] == "00003/LR.png")
    assert [one["method"] for one in line["candidates"]] == ["a", "b", "c", "d"]
    assert {axis: label["ranks"] for axis, label in line["labels"].items()} == labels
    assert (folder / line["hr"]).read_bytes() == (pictures / "hr" / "002.png").read_bytes()
    assert (folder / line["candidates"][1]["path"]).read_bytes() == (pictures / METHODS[1] / "002.png").read_bytes()


def test_a_folder_named_after_a_split_gives_it_however_deep(build, pictures, tmp_path):
    settings = write_folders(tmp_path / "ref" / "data" / "dev", pictures)
    folder, code, err = build(tmp_path / "ref", **settings)
    assert code == 0 and {line["split"] for line in groups_of(folder)} == {"val"}, err


def test_the_readmes_command_for_refsr_leads_to_a_judge(pictures, toy_config, tmp_path):
    command, = (command for command in commands() if any("import_roles" in word for word in command))
    write_folders(tmp_path / "ref", pictures)
    settings = [f"run={tmp_path / 'run'}", f"import_from={tmp_path / 'ref'}", "workers=1"]
    assert run_here(ROOT / command[1], *command[2:], *settings) == 0
    stage = load_stage("02")
    stage.main(load_config(stage.Config, stage.__file__, [
        str(toy_config), settings[0], "cold_start_steps=1", "steps=1", "max_reply_tokens=6"]))
    results = run.read_json(tmp_path / "run" / "02_train_reward" / "manifest.json")["results"]
    assert 0 <= results["val_pair_accuracy"] <= 1


# what is refused: one line that says where and what to do; nothing is written ----------------------------------

def refused(outcome, words, begun=False):
    folder, code, err = outcome
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and words in errors[0], err
    assert folder.exists() == begun, "a corrected set must be accepted"


def edited(at, column, value):
    return [row[:column] + [value] + row[column + 1:] if n == at else row for n, row in enumerate(rows())]


@pytest.mark.parametrize("lines, words", [
    (edited(5, 3, "high"), "set.csv line 7: overall should be a number, got 'high'"),
    (edited(5, 3, "nan"), "line 7: overall should be a number"),
    (edited(1, 4, ""), "line 3: rank_naturalness should be a number"),
    (edited(2, 5, 55), "line 4: 55 votes of 54 raters"),
    (edited(2, 6, 53), "line 4: 37 votes of 53 raters"),
    (edited(2, 0, ""), "line 4: 'lr' is missing"),
    (edited(2, 1, "gone.png"), "line 4: there is no picture"),
    (edited(1, 1, "BSRGAN/000.png"), "line 3: BSRGAN/000.png is there twice"),
    (rows()[:2] + [["only", "two"]], "line 4: 2 cells, but 7 columns"),
    (rows()[:-1], "line 30: 3 candidate(s) of lr/007.png"),
    ([[]], "no lines"),
])
def test_malformed_tables(build, pictures, lines, words):
    refused(build(write_table(pictures / "set.csv", lines)), words)


def test_a_photograph_lies_in_one_split(build, pictures):
    def table(more, head):
        return write_table(pictures / "set.csv", [row + more(n // 4) for n, row in enumerate(rows())], HEAD + head)
    refused(build(table(lambda s: ["train" * (s > 3)], ["split"])), "give it for all or none")
    refused(build(table(lambda s: ["train" if s < 4 else "dev", "one"], ["split", "source"])), "is in train and in val")
    refused(build(table(lambda s: ["extra"], ["split"])), "split 'extra' is none of train")
    shutil.copy(pictures / "lr" / "000.png", pictures / "lr" / "006.png")
    refused(build(table(lambda s: ["train" if s < 4 else "test"], ["split"])), "is in train and in test")
    refused(build(table(lambda s: [f"photo{s}"], ["source"])), "has the same pixels as")
    folder, code, err = build(table(lambda s: [], []))
    assert code == 0, err
    assert len({line["split"] for line in groups_of(folder) if line["source"] == "lr/000.png"}) == 1


@pytest.mark.parametrize("name, text, words", [
    ("set.tsv", "lr", "ends in .csv or .jsonl"), ("set.jsonl", "{", "line 1: not JSON"), ("set.jsonl", "[]", "object"),
    ("set.csv", 'lr,candidate,method\n"a', "line 2: not a well-formed table"), ("set.jsonl", '{"lr": 1}', "'lr' is"),
    ("set.csv", "lr,candidate,method,overall,mos\na,b,c,1,2", "line 2: a column is there twice"),
    ("gone/x.csv", None, "does not exist")])
def test_other_files(build, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(build(tmp_path / name), words)


@pytest.mark.parametrize("change, words", [
    (lambda root: (root / "00002" / "2.png").unlink(), "00002: 0 files match the role b=2.*, expected one"),
    (lambda root: shutil.copy(root / "00002" / "2.png", root / "00002" / "e.png"), "e.png has no role"),
    (lambda root: (root / "00003" / "ranks.json").write_text("[1, 2, 3]"), "ranks.json: overall: expected 4 ranks"),
    (lambda root: (root / "00003" / "ranks.json").write_text('[1, 2, 3, "x"]'), "00003: rank_overall should be a num"),
])
def test_malformed_folders(build, pictures, tmp_path, change, words):
    settings = write_folders(tmp_path / "ref", pictures)
    change(tmp_path / "ref")
    refused(build(tmp_path / "ref", **settings), words)
    refused(build(tmp_path / "ref"), "import_roles: lr or ranks is missing")
    refused(build(tmp_path / "ref", import_roles=["lr"]), "should look like ROLE=PATTERN")
    refused(build(tmp_path / "ref", import_roles=["lr=/LR.png", "ranks=x"]), "give a pattern below")


def test_a_bad_candidate_leaves_what_was_copied_and_the_same_command_goes_on(build, pictures):
    table = write_table(pictures / "set.csv")
    bad = pictures / "ResShift" / "007.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    refused(build(table), "007.png cannot be read", begun=True)
    write_picture(bad, 3, 24)
    refused(build(table), "expected all candidates (and HR) to have one size", begun=True)
    refused(build(write_table(pictures / "set.csv", rows()[:-4])), "changed since", begun=True)
    write_table(pictures / "set.csv")
    bad.write_bytes(whole)
    copied = {path: path.stat().st_mtime_ns for path in (pictures.parent / "run").rglob("lr/*.png")}
    folder, code, err = build(table)
    assert code == 0, err
    assert len(groups_of(folder)) == 8 and len(copied) > 4
    assert sum(path.stat().st_mtime_ns != time for path, time in copied.items()) == 1, "only the group that failed"
