"""
Preference sets that exist, imported by stage 01: nothing lost, pictures exact, malformed files named, trained on.

Run     python -m pytest tests/test_imports.py      # 25 s on one core
"""
import csv
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common import votes
from common.config import load_config
from common.groups import SPLITS, load_groups
from common.images import read_image, resize, write_png
from conftest import TOY, load_stage, run_stage

SCENES = [f"{i:03d}" for i in range(8)]
HEAD = ["lr", "candidate_a", "candidate_b", "axis", "choice", "annotator"]


def picture(seed, side=32):
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return resize(small, (side, side), "bicubic")


@pytest.fixture
def pictures(tmp_path):
    """A folder with lr/, hr/ and methods m0 .. m3 for each scene."""
    root = tmp_path / "set"
    for s, scene in enumerate(SCENES):
        for kind in ("lr", "hr", "m0", "m1", "m2", "m3"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            side = 8 if kind == "lr" else 32
            seed = s if kind in ("lr", "hr") else 10 * s + ord(kind[1])
            write_png(root / kind / f"{scene}.png", picture(seed, side))
    return root


@pytest.fixture
def build(tmp_path, capfd):
    """Run stage 01 in this process on import settings; returns (folder, exit status, stdout, stderr)."""
    def call(**settings):
        values = {"hr_dir": None, "val_fraction": 0.2, "test_fraction": 0.2, "workers": 1} | settings
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps({"run": str(tmp_path / "run"), "seed": 0, "01_build_dataset": values}, default=str))
        module, code = load_stage("01"), 0
        try:
            module.main(load_config(module.Config, module.__file__, [str(path)]))
        except SystemExit as stop:
            code = stop.code or 0
        return tmp_path / "run" / "01_build_dataset", code, *capfd.readouterr()
    return call


def groups_of(folder):
    lines = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    for line in lines:                                                           # all that later stages rely on
        assert load_groups(folder, line["split"])
        assert all(hashlib.sha256((folder / path).read_bytes()).hexdigest() == own
                   for path, own in line["sha256"].items())
    return lines


def write_csv(path, head, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def vote_rows(scenes=SCENES):
    """m0 always beats m1, which beats m2, which ties m3."""
    pairs = (("m0", "m1", "a"), ("m1", "m2", "a"), ("m3", "m2", "tie"), ("m2", "m0", "b"))
    return [[f"lr/{scene}.png", f"{a}/{scene}.png", f"{b}/{scene}.png", "overall", picked, "ann"]
            for scene in scenes for a, b, picked in pairs]


def mos_rows(scenes=SCENES):
    return [[f"lr/{scene}.png", f"m{m}/{scene}.png", f"m{m}", str(90 - 10 * m), str(m), "7", f"note {scene} {m}"]
            for scene in scenes for m in range(4)]


MOS_HEAD = ["lr", "candidate", "method", "mos", "consistency", "raters", "comment"]


def write_refsr(root, pictures, ranks=(2, 1, 3, 4)):
    for n, scene in enumerate(SCENES, 1):
        folder = root / f"{n:05d}"
        folder.mkdir(parents=True)
        for kind, name in zip(("lr", "hr", "m0", "m1", "m2", "m3"), ("LR", "HR", "a", "b", "c", "d")):
            shutil.copy(pictures / kind / f"{scene}.png", folder / f"{name}.png")
        (folder / "ranks.json").write_text(json.dumps({"ranks": list(ranks), "who": "expert"}))
    return {"import_from": root, "import_format": "refsr",
            "import_roles": ["lr=LR.png", "hr=HR.png", "A=a.png", "B=b.png", "C=c.png", "D=d.png", "ranks=ranks.json"]}


def write_sriqa(root, extra=""):
    lines = [f"m{m}/{scene}.png {3 * m + 0.5}{extra}" for scene in SCENES for m in range(4)]
    (root / "MOS.txt").write_text("\n".join(lines))
    return {"import_from": root, "import_format": "sriqa",
            "import_roles": ["lr=lr/{scene}.png", "candidate={method}/{scene}.png", "mos=MOS.txt"]}


# the formats -----------------------------------------------------------------------------------------------------

def test_votes_become_ranks_and_stay(build, pictures):
    rows = [row + ["r1"] for row in vote_rows()]
    rows.append([f"lr/{SCENES[0]}.png", f"m0/{SCENES[0]}.png", f"m1/{SCENES[0]}.png", "naturalness", "a", "eve", "r2"])
    write_csv(pictures / "votes.csv", HEAD + ["round"], rows)
    folder, code, out, err = build(import_from=pictures / "votes.csv", import_format="csv")
    assert code == 0, err
    lines = groups_of(folder)
    assert {line["split"] for line in lines} == set(SPLITS) and len(lines) == 8
    for line in lines:
        assert [c["method"] for c in line["candidates"]] == ["m0", "m1", "m2", "m3"] and line["scale"] == 4
        label = line["labels"]["overall"]
        assert label["ranks"] == [1, 2, 3, 3] and label["source"] == "import"
        assert label["votes"][2] == {"a": 3, "b": 2, "choice": "tie", "annotator": "ann", "round": "r1"}
        name = line["extra"]["lr"]
        assert (folder / line["lr"]).read_bytes() == (pictures / name).read_bytes()
        assert line["candidates"][0]["extra"]["file"] == name.replace("lr/", "m0/")
    first = next(line for line in lines if line["extra"]["name"] == f"lr/{SCENES[0]}.png")
    assert set(first["labels"]) == {"overall"}, "one vote does not order four candidates"
    assert first["extra"]["unconnected_votes"]["naturalness"][0]["annotator"] == "eve"
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert results["label_source"] == "import" and results["groups"] == 8 and results["pairs"] == 8 * 5


def test_pictures_outside_the_folder_of_the_table(build, pictures, tmp_path, monkeypatch):
    """Absolute paths, paths upwards, and a relative import_from."""
    for file in (pictures / "m0").iterdir():
        (tmp_path / "m0").mkdir(exist_ok=True)
        file.rename(tmp_path / "m0" / file.name)
    rows = [[str(pictures / row[0]), row[1].replace("m0/", "../m0/"), *row[2:]] for row in mos_rows()]
    write_csv(pictures / "mos.csv", MOS_HEAD, rows)
    monkeypatch.chdir(tmp_path)
    folder, code, _, err = build(import_from="set/mos.csv", import_format="mos")
    assert code == 0, err
    line = next(line for line in groups_of(folder) if line["extra"]["lr"] == "lr/000.png")
    assert [one["extra"]["file"] for one in line["candidates"]] == ["../m0/000.png", *(f"m{m}/000.png" for m in "123")]
    assert line["extra"]["name"] == str(pictures / "lr" / "000.png")


def test_mos_table_with_axes_sources_and_splits(build, pictures):
    rows = [row + [f"photo{int(row[0][3:6]) // 2}", ("train", "train", "validation", "test")[int(row[0][3:6]) // 2],
                   row[0].replace("lr/", "hr/")] for row in mos_rows()]
    write_csv(pictures / "mos.csv", MOS_HEAD + ["source", "split", "hr"], rows)
    folder, code, out, err = build(import_from=pictures / "mos.csv", import_format="mos")
    assert code == 0, err
    lines = groups_of(folder)
    assert [line["id"] for line in lines] == [*(f"train_0000{i}" for i in range(4)), "val_00000", "val_00001",
                                              "test_00000", "test_00001"]
    assert lines[0]["source"] == lines[1]["source"] == "photo0" and lines[0]["hr"] == "hr/train_00000.png"
    assert lines[0]["labels"]["overall"]["scores"] == [90, 80, 70, 60]
    assert lines[0]["labels"]["consistency"]["ranks"] == [4, 3, 2, 1]
    assert lines[0]["candidates"][2]["extra"] == {"file": "m2/000.png", "raters": "7", "comment": "note 000 2"}


@pytest.mark.parametrize("how", ["json", "table", "txt"])
def test_refsr_layout(build, pictures, tmp_path, how):
    settings = write_refsr(tmp_path / "ref", pictures)
    if how == "table":
        rows = [[f"{n:05d}", 1, 2, 2, 3, axis, 0.5] for n in range(1, 9) for axis in ("consistency", "naturalness")]
        write_csv(tmp_path / "ref" / "all.csv", ["folder", "A", "B", "C", "D", "axis", "weight"], rows)
        settings["import_roles"][-1] = "ranks=all.csv"
    if how == "txt":
        for folder in (tmp_path / "ref").iterdir():
            (folder / "ranks.txt").write_text("2, 1, 4, 4\n")
        settings["import_roles"][-1] = "ranks=ranks.txt"
    folder, code, out, err = build(**settings)
    assert code == 0, err
    line = groups_of(folder)[0]
    assert [c["method"] for c in line["candidates"]] == ["A", "B", "C", "D"] and line["hr"]
    if how == "json":
        assert line["labels"]["overall"]["ranks"] == [2, 1, 3, 4] and line["extra"]["who"] == "expert"
    elif how == "table":
        assert set(line["labels"]) == {"consistency", "naturalness"}
        assert line["labels"]["naturalness"]["ranks"] == [1, 2, 2, 3]
        assert line["labels"]["naturalness"]["extra"] == {"weight": "0.5"}
    else:
        assert line["labels"]["overall"]["ranks"] == [2, 1, 3, 3]
        assert line["labels"]["overall"]["extra"] == {"ranks": [2, 1, 4, 4]}


def test_sriqa_layout_and_conversion(build, pictures):
    Image.open(pictures / "m1" / "003.png").save(pictures / "m1" / "003.bmp")
    (pictures / "m1" / "003.bmp").rename(pictures / "m1" / "003.png")               # a BMP whatever its name says
    folder, code, out, err = build(**write_sriqa(pictures, " 0.25"))
    assert code == 0, err
    line = next(line for line in groups_of(folder) if line["source"] == "003")
    assert line["labels"]["overall"]["scores"] == [0.5, 3.5, 6.5, 9.5] and line["hr"] is None
    assert line["candidates"][1]["extra"] == {"file": "m1/003.png", "fields": ["0.25"]}
    written = folder / line["candidates"][1]["path"]
    assert Image.open(written).format == "PNG"
    assert np.array_equal(read_image(written), read_image(pictures / "m1" / "003.png"))


def test_imagefolder_of_others(build, pictures):
    lines = [{"lr_file_name": f"lr/{s}.png", "candidates_file_names": [f"m{m}/{s}.png" for m in range(4)],
              "methods": ["m0", "m1", "m2", "m3"], "ranks_overall": [1, 2, 2, 4], "camera": {"iso": 100}}
             for s in SCENES]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder, code, out, err = build(import_from=pictures, import_format="hf")
    assert code == 0, err
    line = groups_of(folder)[0]
    assert line["labels"]["overall"]["ranks"] == [1, 2, 2, 3] and line["extra"]["camera"] == {"iso": 100}


# malformed sets: one line that says where, what was expected, what to do; nothing is written ---------------------

def edit(rows, at, column, value):
    return [row[:column] + [value] + row[column + 1:] if n == at else row for n, row in enumerate(rows)]


@pytest.mark.parametrize("rows, words", [
    (edit(vote_rows(), 3, 4, "left"), "votes.csv line 5: choice should be one of a, b, tie, cannot_tell, got 'left'"),
    (edit(vote_rows(), 0, 3, "beauty"), "line 2: axis should be one of consistency, naturalness, overall"),
    (edit(vote_rows(), 2, 1, "m9/x.png"), "line 4: there is no picture"),
    (edit(vote_rows(), 2, 0, ""), "line 4: 'lr' is missing"),
    (edit(vote_rows(), 1, 2, "m1/000.png"), "line 3: candidate_a and candidate_b are the same"),
    (vote_rows()[:2] + [["only", "two"]], "line 4: 2 cells; expected 6"),
    (vote_rows() + [["lr/000.png", 'x"y', "b", "overall", "a", "ann"]], "no picture"),
    ([], "no rows"),
    (vote_rows()[:1] + vote_rows()[4:], "all groups need the same number"),
])
def test_malformed_votes(build, pictures, rows, words):
    write_csv(pictures / "votes.csv", HEAD, rows)
    refused(build(import_from=pictures / "votes.csv", import_format="csv"), words)


def refused(outcome, words, kept=False):
    folder, code, out, err = outcome
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and words in errors[0], err
    assert folder.exists() == kept, "a corrected set must be accepted"


@pytest.mark.parametrize("rows, words", [
    (edit(mos_rows(), 5, 3, "high"), "mos.csv line 7: mos should be a finite number, got 'high'"),
    (edit(mos_rows(), 5, 3, "nan"), "line 7: mos should be a finite number"),
    (edit(mos_rows(), 1, 1, "m0/000.png"), "line 3: m0/000.png is rated twice"),
    (edit(mos_rows(), 1, 4, ""), "line 3: consistency should be a finite number"),
    (mos_rows()[:-1], "3 candidate(s), but"),
])
def test_malformed_mos(build, pictures, rows, words):
    write_csv(pictures / "mos.csv", MOS_HEAD, rows)
    refused(build(import_from=pictures / "mos.csv", import_format="mos"), words)


def test_an_imagefolder_without_lines(build, pictures):
    (pictures / "metadata.jsonl").write_text("\n")
    refused(build(import_from=pictures, import_format="hf"), "its tables have no lines")


def test_malformed_splits_and_pictures(build, pictures):
    rows = [row + ["train" * (n > 3)] for n, row in enumerate(mos_rows())]
    write_csv(pictures / "mos.csv", MOS_HEAD + ["split"], rows)
    refused(build(import_from=pictures / "mos.csv", import_format="mos"), "no split, but others have one")
    rows = [row + ["train" if n < 4 else "test", "one photo"] for n, row in enumerate(mos_rows())]
    write_csv(pictures / "mos.csv", MOS_HEAD + ["split", "source"], rows)
    refused(build(import_from=pictures / "mos.csv", import_format="mos"), "must lie in one split only")
    write_csv(pictures / "mos.csv", MOS_HEAD, mos_rows())
    (pictures / "lr" / "004.png").write_bytes(b"")
    refused(build(import_from=pictures / "mos.csv", import_format="mos"), "004.png cannot be read")


def test_a_bad_candidate_leaves_what_was_copied_and_a_changed_set_is_refused(build, pictures):
    settings = {"import_from": write_csv(pictures / "mos.csv", MOS_HEAD, mos_rows()), "import_format": "mos"}
    bad = pictures / "m2" / "007.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    refused(build(**settings), "007.png cannot be read", kept=True)
    write_png(bad, picture(3, 24))
    refused(build(**settings), "expected all candidates (and HR) to have one size", kept=True)
    write_csv(pictures / "mos.csv", MOS_HEAD, mos_rows()[:-4])
    refused(build(**settings), "changed since", kept=True)
    (pictures / "mos.csv").rename(pictures / "away.csv")
    refused(build(**settings), "is not a file", kept=True)
    write_csv(pictures / "mos.csv", MOS_HEAD, mos_rows())
    bad.write_bytes(whole)
    write_png(pictures / "m0" / "000.png", picture(77))
    copied = {path: path.stat().st_mtime_ns for path in (pictures.parent / "run").rglob("lr/*.png")}
    folder, code, _, err = build(**settings)
    assert code == 0, err
    assert len(copied) > 4 and len(groups_of(folder)) == 8
    assert sum(path.stat().st_mtime_ns != time for path, time in copied.items()) <= 2, "only what changed"
    for line in groups_of(folder):
        for own in line["candidates"]:
            assert (folder / own["path"]).read_bytes() == (pictures / own["extra"]["file"]).read_bytes()


def test_a_typo_does_not_delete_what_people_judged(build, pictures, tmp_path):
    folder = tmp_path / "run" / "01_build_dataset"
    folder.mkdir(parents=True)
    (folder / "judgements.jsonl").write_text("hours of work\n")
    assert build(import_from="/nope.csv", import_format="csv")[1] == 2
    assert [path.name for path in folder.iterdir()] == ["judgements.jsonl"]


@pytest.mark.parametrize("change, words", [
    (lambda root: (root / "00002" / "b.png").unlink(), "00002: 0 files match the role B=b.png, expected one"),
    (lambda root: shutil.copy(root / "00002" / "b.png", root / "00002" / "e.png"), "e.png has no role"),
    (lambda root: (root / "00003" / "ranks.json").write_text("[1, 2, 3]"), "ranks.json line 1: overall: expected 4"),
    (lambda root: (root / "00003" / "ranks.json").write_text("[1, 2, 3, \"x\"]"), "should be a finite number, got 'x'"),
    (lambda root: (root / "00003" / "ranks.json").write_text("{"), "00003/ranks.json line 1: not JSON"),
])
def test_malformed_refsr(build, pictures, tmp_path, change, words):
    settings = write_refsr(tmp_path / "ref", pictures)
    change(tmp_path / "ref")
    refused(build(**settings), words)


@pytest.mark.parametrize("text, words", [
    ("m0/000.png", "MOS.txt line 1: expected `{method}/{scene}.png score`"),
    ("m0/000.png 1\nm0/000.png 2", "line 2: m0 is rated twice for scene 000"),
    ("m0/999.png 1", "line 1: there is no picture"),
    ("\n", "no scores"),
])
def test_malformed_sriqa(build, pictures, text, words):
    settings = write_sriqa(pictures)
    (pictures / "MOS.txt").write_text(text)
    refused(build(**settings), words)


@pytest.mark.parametrize("settings, words", [
    ({"import_format": "xml"}, "import_format should be one of refsr, sriqa, csv, mos, hf"),
    ({"hr_dir": "skimage"}, "set one of hr_dir and lr_dir and import_from"),
    ({"import_format": "csv"}, "is not a file, as import_format=csv needs"),
    ({"import_format": "refsr"}, "lr and ranks is missing: set, for example"),
    ({"import_format": "hf", "import_roles": ["lr=x"]}, "'lr' is no role of hf"),
    ({"import_format": "sriqa", "import_roles": ["lr"]}, "should look like ROLE=PATTERN"),
    ({"import_format": "hf"}, "holds no metadata.jsonl"),
])
def test_wrong_settings(build, pictures, settings, words):
    refused(build(**{"import_from": pictures} | settings), words)


# the rule of votes, and training on an import --------------------------------------------------------------------

def test_rule_of_votes():
    def cast(*triples):
        return [{"a": a, "b": b, "choice": choice} for a, b, choice in triples]
    label = votes.label(3, cast((0, 1, "b"), (1, 2, "a"), (0, 2, "tie")), 0.05, source="import")
    assert label["scale"] == "group", "the same votes ten times over give other win shares"
    assert label["ranks"] == [2, 1, 2] and label["scores"][1] > 0.8 and label["scores"][0] == label["scores"][2]
    cycle = votes.label(3, cast((0, 1, "a"), (1, 2, "a"), (2, 0, "a")), 0.05, source="import")
    assert cycle["ranks"] == [1, 1, 1] and cycle["scores"] == [0.5] * 3
    assert votes.label(3, cast((0, 1, "a"), (1, 2, "cannot_tell")), 0.05, source="import") is None
    many = votes.win_shares(votes.tally(2, cast(*[(0, 1, "a")] * 30 + [(0, 1, "b")] * 10)))
    assert abs(many[0] - 30.01 / 40.02) < 1e-6                     # two candidates: the share of votes, hardly shrunk


def test_stages_02_and_03_take_an_import(pictures, tmp_path):
    names = [f"{scene}{turn}" for scene in SCENES for turn in "ab"]
    for kind in ("lr", "m0", "m1", "m2", "m3"):
        for scene in SCENES:
            image = read_image(pictures / kind / f"{scene}.png")
            write_png(pictures / kind / f"{scene}a.png", image)
            write_png(pictures / kind / f"{scene}b.png", np.ascontiguousarray(image[::-1]))
    write_csv(pictures / "votes.csv", HEAD, vote_rows(names))
    config = tmp_path / "toy.yaml"
    config.write_text(f"run: {tmp_path / 'run'}\n{TOY}")
    done = run_stage("01", config, "hr_dir=null", f"import_from={pictures / 'votes.csv'}", "import_format=csv",
                     "val_sources=", "test_sources=", "val_fraction=0.2", "test_fraction=0.2")
    assert done.returncode == 0, done.stderr
    done = run_stage("02", config, "steps=1", "cold_start_steps=2")
    assert done.returncode == 0, done.stderr
    assert "val_overall_accuracy" in (tmp_path / "run" / "02_train_reward" / "metrics.jsonl").read_text()
    done = run_stage("03", config, "sampled_groups=0", "example_groups=1")
    assert done.returncode == 0, done.stderr


# export ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of a proxy-labeled stage 01, folder of its export)."""
    folder = tmp_path_factory.mktemp("exported")
    config = folder / "toy.yaml"
    config.write_text(f"run: {folder / 'run'}\n{TOY}")
    module = load_stage("01")
    small = ["train_groups=3", "val_groups=1", "test_groups=2"]
    for more in (small, [f"export={folder / 'out'}", "photo_license=cc0-1.0"]):
        module.main(load_config(module.Config, module.__file__, [str(config), *more]))
    return folder / "run" / "01_build_dataset", folder / "out"


def test_export_and_back_gives_the_same_bytes(build, exported):
    original, out = exported
    folder, code, _, err = build(import_from=out, import_format="hf")
    assert code == 0, err
    assert (folder / "groups.jsonl").read_bytes() == (original / "groups.jsonl").read_bytes()
    for line in groups_of(folder):
        assert all((folder / path).read_bytes() == (original / path).read_bytes() for path in line["sha256"])
    assert len(list((folder / "candidates").iterdir())) == len(list((original / "candidates").iterdir())) == 24
    card = (out / "README.md").read_text()
    for words in ('license: "cc0-1.0"', "proxy (computed with the ground truth", "mild; scale [4]",
                  "| train | 3 | 12 |", "| validation | 1 | 4 | 1 |", "| test | 2 | 8 |"):
        assert words in card, words


def test_export_refusals(build, exported, tmp_path):
    _, out = exported
    folder, code, _, err = build(export="true", hr_dir="skimage")
    assert code == 2 and "manifest.json is missing: first run" in err and not folder.exists()
    for name, change, words in (
            ("pixel", lambda root: write_png(root / "test" / "lr" / "test_00000.png", picture(5, 8)),
             "line 1: lr/test_00000.png is not the file that was exported"),
            ("path", lambda root: replace_text(root / "test" / "metadata.jsonl", '\\"lr/test_', '\\"../lr/test_'),
             "is not the file that was exported"),
            ("split", lambda root: (root / "test").rename(root / "extra"), "record should be a line of groups.jsonl")):
        shutil.copytree(out, tmp_path / name)
        change(tmp_path / name)
        refused(build(import_from=tmp_path / name, import_format="hf"), words)
    module = load_stage("01")
    with pytest.raises(SystemExit):
        module.hf_folder.export(exported[0], out, "unknown")


@pytest.mark.parametrize("change, words", [
    (lambda record: record["sha256"].update({"../../secret.txt": "0" * 64}), "'../../secret.txt', which is no file"),
    (lambda record: record["candidates"][0].pop("method"), "key 'method' is missing in a candidate"),
    (lambda record: record["labels"]["overall"].update(ranks=[1]), "do not fit the 4 candidates"),
    (lambda record: record.update(lr="lr/gone.png", sha256={}), "lr/gone.png is not the file that was exported"),
])
def test_an_export_whose_record_was_changed_is_refused(build, exported, tmp_path, change, words):
    root = tmp_path / "changed"
    shutil.copytree(exported[1], root)
    table = root / "validation" / "metadata.jsonl"
    row = json.loads(table.read_text())
    record = json.loads(row["record"])
    change(record)
    table.write_text(json.dumps(row | {"record": json.dumps(record)}) + "\n")
    refused(build(import_from=root, import_format="hf"), words)


def test_labels_that_were_edited_in_an_export_are_not_dropped(build, exported, tmp_path):
    root = tmp_path / "edited"
    shutil.copytree(exported[1], root)
    table = root / "validation" / "metadata.jsonl"
    row = json.loads(table.read_text())
    edited = row | {"ranks_overall": [4, 3, 2, 1], "scores_overall": None}
    assert edited["ranks_overall"] != row["ranks_overall"]
    table.write_text(json.dumps(edited) + "\n")
    refused(build(import_from=root, import_format="hf"), "ranks_overall differs from `record`: change both, or remove")
    del edited["record"]
    table.write_text(json.dumps(edited) + "\n")
    folder, code, _, err = build(import_from=root, import_format="hf")
    assert code == 0, err
    line, = (line for line in groups_of(folder) if line["split"] == "val")
    assert line["labels"]["overall"]["ranks"] == [4, 3, 2, 1]


def test_an_export_copies_nothing_but_the_pictures_of_its_groups(exported, tmp_path):
    """Of a set that an older version has imported: its sha256 may name anything."""
    folder = tmp_path / "run" / "01_build_dataset"
    shutil.copytree(exported[0], folder)
    (tmp_path / "secret.txt").write_text("secret")
    lines = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    lines[0]["sha256"]["../../secret.txt"] = "0" * 64
    (folder / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    module = load_stage("01")
    with pytest.raises(SystemExit):
        module.hf_folder.export(folder, tmp_path / "out", "unknown")
    assert not (tmp_path / "out").exists()


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_datasets_library_loads_the_export(exported):
    datasets = pytest.importorskip("datasets", reason="pip install datasets, to test that it loads our export")
    original, out = exported
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(out.parent / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "validation": 1, "test": 2}
    row, group = loaded["train"][0], load_groups(original, "train")[0]
    assert json.loads(row["record"]) == group and row["ranks_overall"] == group["labels"]["overall"]["ranks"]
    assert np.array_equal(np.array(row["lr"]), read_image(original / group["lr"]))
    for image, candidate in zip(row["candidates"], group["candidates"], strict=True):
        assert np.array_equal(np.array(image), read_image(original / candidate["path"]))
