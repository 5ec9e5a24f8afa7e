"""
Ranking SR methods on a user's folder: the right files and crops, the right numbers, and clear errors.

Run     python -m pytest tests/test_ranking.py      # 1 min, most of it a toy run of 01 and 02
"""
import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import metrics, mllm, sr_folders, sr_judging
from common.config import load_config
from common.images import grid, read_image, resize, write_png
from common.sr_folders import BICUBIC
from conftest import load_stage, make_images, run_stage

CPU = torch.device("cpu")
SIZES = {"a": (32, 32), "b": (32, 48), "c": (64, 96), "sub/d": (24, 20)}        # of outputs; judged crops are 32 px


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """LR images, and outputs of two methods: "soft" at scale 4, and "sharp", which has another scale for image c."""
    found = {name: tmp_path / name for name in ("lr", "soft", "sharp")}
    for i, (name, (height, width)) in enumerate(SIZES.items()):
        lr, soft, sharp, _ = make_images(i, height, width)
        for folder, image in zip(found.values(), (lr, soft, sharp)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_png(folder / f"{name}.png", image)
    lr = read_image(found["lr"] / "c.png")
    write_png(found["sharp"] / "c.png", resize(lr, (48, 32), "lanczos"))        # scale 2
    return found


def arguments(toy_run, toy_config, folders, tmp_path, *more: str) -> list[str]:
    methods, out = f"{folders['soft']},x={folders['sharp']}", tmp_path / "out"
    return [str(toy_config), f"run={toy_run}", f"lr_dir={folders['lr']}", f"sr_dirs={methods}", f"out={out}", *more]


def rank(argv: list[str]) -> None:
    stage = load_stage("03")
    stage.main(load_config(stage.Config, stage.__file__, argv))


def test_what_a_ranking_leaves_behind(toy_run, toy_config, folders, tmp_path):
    (folders["lr"] / "e.png").write_bytes(b"no picture")
    for key in ("soft", "sharp"):
        write_png(folders[key] / "e.png", make_images(0)[1])
    write_png(folders["soft"] / "f.png", make_images(0)[1])                 # no LR image of this name
    rank(arguments(toy_run, toy_config, folders, tmp_path))
    out = tmp_path / "out"
    results, page = json.loads((out / "results.json").read_text()), (out / "report.html").read_text()
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    with open(out / "scores.csv", newline="") as file:
        assert [float(row["overall"]) for row in csv.DictReader(file)] == [line["overall"] for line in lines]
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {Path(item["file"]).name: item["reason"].split(":")[0] for item in skipped} == {
        "e.png": "cannot be read", "f.png": "no LR image of this name"}
    assert len(lines) == 4 * 3 and {line["method"] for line in lines} == {"soft", "x", BICUBIC}
    for row in results["ranking"]:
        own = [line for line in lines if line["method"] == row["method"]]
        mean = np.mean([line["overall"] for line in own])
        assert row["images"] == 4 and row["overall"]["value"] == pytest.approx(mean, abs=1e-4)
        for rival, found in results["wins"][row["method"]].items():
            other = [line["overall"] for line in lines if line["method"] == rival]
            slow = [1 if a["overall"] > b else 0.5 if a["overall"] == b else 0 for a, b in zip(own, other)]
            assert found["value"] == pytest.approx(np.mean(slow), abs=1e-4)
    assert [row["overall"]["value"] for row in results["ranking"]] == sorted(
        (row["overall"]["value"] for row in results["ranking"]), reverse=True)
    for example in results["examples"]:
        own = [line for line in lines if line["method"] == example["method"]]
        pick = (max if example["kind"] == "best" else min)(own, key=lambda line: line["overall"])
        assert pick["image"] == example["image"] and len(example["replies"]) == 2
    assert '="http' not in page and page.count("<h2>") == 5 and "soft" in page
    assert min(read_image(out / "contact_sheet.png").shape[:2]) > 300
    assert "scale here: 2, 4" in " ".join(results["notes"])
    manifest = json.loads((out / "manifest.json").read_text())["results"]
    assert manifest["lr_images"] == 4 and manifest["ranking"] == [row["method"] for row in results["ranking"]]
    judge = mllm.load_judge(toy_run / "02_train_reward", CPU)
    lr, image = (read_image(folders[key] / "c.png") for key in ("lr", "soft"))
    parts = [(lr[y:y + 8, x:x + 8], image[4 * y:4 * y + 32, 4 * x:4 * x + 32]) for y in (0, 8) for x in (0, 8, 16)]
    slow = np.mean([mllm.expected_scores(judge, [a], [[b]])[0, 0].numpy() for a, b in parts], axis=0)
    line = next(line for line in lines if line["image"] == "c" and line["method"] == "soft")
    assert line["crops"] == 6 and [line[axis] for axis in metrics.AXES] == pytest.approx(slow.tolist(), abs=2e-4)


def test_two_processes_rank_as_one_does(toy_run, toy_config, folders, tmp_path):
    argv = arguments(toy_run, toy_config, folders, tmp_path)[1:]
    for processes in (1, 2):
        done = run_stage("03", toy_config, *argv, f"out={tmp_path / str(processes)}", processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in "12")
    for a, b in zip(one["ranking"], two["ranking"]):
        assert a["method"] == b["method"] and a["overall"]["value"] == pytest.approx(b["overall"]["value"], abs=1e-4)
    assert [e["replies"] for e in one["examples"]] == [e["replies"] for e in two["examples"]]


def test_crops_cover_an_image_evenly_and_never_leave_it():
    for height, width, side, limit in ((16, 16, 16, 64), (40, 100, 16, 1000), (7, 50, 16, 64), (16, 16, 16, 1)):
        seen = np.zeros((height, width), int)
        for y, x in grid(height, width, side, limit):
            assert 0 <= y <= max(0, height - side) and 0 <= x <= max(0, width - side)
            seen[y:y + side, x:x + side] += 1
        assert seen.min() >= 1
    for height, width, limit in ((512, 512, 64), (512, 2000, 64), (2000, 30, 7), (300, 300, 1), (100, 3000, 5)):
        corners = grid(height, width, 16, limit)
        assert limit / 2 <= len(corners) <= limit and len(set(corners)) == len(corners)
        if limit > 4:
            centers = np.array(corners).mean(0) + 8
            assert np.abs(centers - np.array([height, width]) / 2).max() <= 1


def test_a_method_that_lacks_an_image_is_compared_on_the_others_only():
    scores = np.full((3, 2, 3), np.nan)
    scores[:, 0], scores[:2, 1] = np.array([[5.0], [7], [1]]), np.array([[4.0], [7]])
    found = sr_judging.rank_methods(scores, ["a", "b"], 0)
    assert [row["method"] for row in found["ranking"]] == ["b", "a"] and found["ranking"][0]["images"] == 2
    assert found["wins"]["a"]["b"]["value"] == 0.75 and found["wins"]["b"]["a"]["value"] == 0.25
    assert found["ranking"][1]["behind_best"]["value"] == -0.5              # better where both have an image
    alone = sr_judging.rank_methods(scores[:1, :1], ["a"], 0)["ranking"][0]
    assert alone["win_rate"] is None and alone["overall"] == {"value": 5.0, "ci95": None}


def test_scores_are_calibrated_and_a_finished_plain_run_of_03_says_how_good_the_judge_is(
        toy_run, toy_config, folders, tmp_path):
    shutil.copytree(toy_run / "01_build_dataset", tmp_path / "run" / "01_build_dataset")
    shutil.copytree(toy_run / "02_train_reward", tmp_path / "run" / "02_train_reward")
    tested = tmp_path / "run" / "03_eval_reward"
    tested.mkdir()
    maps = {"overall": {"knots": {"score": [1.0, 9.0], "label": [0.2, 0.8]}}, "naturalness": None}
    trained = tmp_path / "run" / "02_train_reward"
    (trained / "judge" / "calibration.json").write_text(json.dumps(maps))
    record = json.loads((trained / "manifest.json").read_text())
    del record["weights"]["judge/calibration.json"]             # the checksum of the one that was there
    (trained / "manifest.json").write_text(json.dumps(record))
    (tested / "manifest.json").write_text(json.dumps({"results": {"pair_accuracy": 0.75}}))
    rank(arguments(tmp_path / "run", toy_config, folders, tmp_path))
    for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines():
        line = json.loads(line)
        assert line["overall_calibrated"] == pytest.approx(0.2 + 0.6 * (line["overall"] - 1) / 8, abs=1e-4)
        assert "naturalness_calibrated" not in line
    assert "75%" in (tmp_path / "out" / "report.html").read_text()


def write_small(path: Path) -> None:
    write_png(path, make_images(0)[1][:30, :30])


@pytest.mark.parametrize("spoil, more, message", [
    (lambda f: (f["soft"] / "b.png").unlink(), (), "no picture for 1 of 4 LR images, e.g. for 'b'"),
    (lambda f: write_small(f["sharp"] / "a.png"), (), "30x30 px is no whole multiple of its LR image, 8x8 px"),
    (lambda f: write_small(f["lr"] / "a.tif"), (), "have the same name"),
    (lambda f: f["sharp"].rename(f["sharp"].parent / "gone"), (), "is not a folder"),
    (lambda f: None, ("sr_dirs=",), "lr_dir and sr_dirs belong together"),
    (lambda f: [path.write_bytes(b"") for path in f["soft"].rglob("*.png")], (), "nothing of soft is left to judge"),
    (lambda f: [path.write_bytes(b"") for path in f["lr"].rglob("*.png")], (), "cannot be read")])
def test_a_folder_that_cannot_be_ranked_is_refused_in_one_line(spoil, more, message, *, toy_run, toy_config, folders,
                                                                tmp_path, capsys):
    spoil(folders)
    with pytest.raises(SystemExit) as stop:
        rank(arguments(toy_run, toy_config, folders, tmp_path, *more))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_missing_or_does_not_fit_can_be_left_out(toy_run, toy_config, folders, tmp_path):
    (folders["soft"] / "b.png").unlink()
    write_small(folders["sharp"] / "a.png")
    rank(arguments(toy_run, toy_config, folders, tmp_path, "skip_bad=true", "bicubic=false"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["method"]: row["images"] for row in results["ranking"]} == {"soft": 3, "x": 3}
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 2


def test_one_image_is_ranked_too_without_intervals(toy_run, toy_config, folders, tmp_path):
    for path in folders["lr"].rglob("*.png"):
        path.unlink() if path.stem != "a" else None
    rank(arguments(toy_run, toy_config, folders, tmp_path))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["ranking"]) == 3 and {row["overall"]["ci95"] for row in results["ranking"]} == {None}
    assert "nan" not in (tmp_path / "out" / "table.md").read_text()


def test_the_same_command_again_and_with_other_settings(toy_run, toy_config, folders, tmp_path, monkeypatch, capsys):
    argv = arguments(toy_run, toy_config, folders, tmp_path)
    monkeypatch.setattr(sys, "argv", ["03_eval_reward.py", *argv])
    rank(argv)
    for more, code, message in ((), 0, "is finished"), (("crop=16",), 2, "use another out="):
        with pytest.raises(SystemExit) as stop:
            rank([*argv, *more])
        assert stop.value.code == code and message in "".join(capsys.readouterr())


def test_outputs_below_the_folder_of_lr_images_are_no_lr_images(folders, capsys):
    inside = folders["soft"].rename(folders["lr"] / "soft")
    scenes, skipped = sr_folders.match(str(folders["lr"]), {"soft": inside}, False)
    assert sorted(scene.name for scene in scenes) == sorted(SIZES) and skipped == []
    with pytest.raises(SystemExit):
        sr_folders.match(str(inside), {"soft": inside}, False)
    assert "no LR image" in capsys.readouterr().err


def test_names_of_methods(capsys):
    assert sr_folders.named_folders(["x/dat", "ours=y/dat/"]) == {"dat": Path("x/dat"), "ours": Path("y/dat")}
    for wrong in (["x/dat", "y/dat"], [f"{BICUBIC}=x"]):
        with pytest.raises(SystemExit):
            sr_folders.named_folders(wrong)
