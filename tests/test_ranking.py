"""
Ranking SR methods on a user's folder: the right files and crops, the right numbers, and clear errors.

Run     python -m pytest tests/test_ranking.py      # 1 min, most of it a toy run of 01 and 02
"""
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import metrics, mllm, ranking, run
from common.config import load_config
from common.images import BICUBIC, read_image, write_png
from conftest import load_stage, make_images

SIZES = {"a": (32, 32), "b": (32, 48), "c": (64, 96), "sub/d": (24, 20)}        # of outputs; judged crops are 32 px


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """LR images, and outputs of two methods."""
    paths = {name: tmp_path / name for name in ("lr", "soft", "sharp")}
    for i, (name, (height, width)) in enumerate(SIZES.items()):
        for folder, image in zip(paths.values(), make_images(i, height, width)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_png(folder / f"{name}.png", image)
    return paths


def arguments(toy_run, toy_config, folders, *more: str) -> list[str]:
    return [str(toy_config), f"run={toy_run}", f"lr_dir={folders['lr']}", f"out={folders['lr'].parent / 'out'}",
            f"sr_dirs={folders['soft']},x={folders['sharp']}", *more]


def rank(argv: list[str]) -> None:
    stage = load_stage("03")
    stage.main(load_config(stage.Config, stage.__file__, argv))


def table_of(out: Path) -> list[dict]:
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_ranking_leaves_behind(toy_run, toy_config, folders, tmp_path):
    (folders["lr"] / "e.png").write_bytes(b"no picture")
    for key in ("soft", "sharp"):
        write_png(folders[key] / "e.png", make_images(0)[1])
    write_png(folders["soft"] / "f.png", make_images(0)[1])                 # no LR image of this name
    (folders["soft"] / "g\udcff.png").write_bytes(b"")                      # nor a name in UTF-8
    rank(arguments(toy_run, toy_config, folders, f"judge={toy_run / '02_train_reward'}"))
    out = tmp_path / "out"
    results, page, lines = run.read_json(out / "results.json"), (out / "report.html").read_text(), table_of(out)
    assert {Path(item["file"]).name: item["reason"].split(":")[0] for item in results["left_out"]} == {
        "e.png": "cannot be read", "f.png": "no LR image of this name", "g\udcff.png": "no LR image of this name"}
    assert len(lines) == 4 * 3 and {line["method"] for line in lines} == {"soft", "x", BICUBIC}
    overall = {method: np.array([float(line["overall"]) for line in lines if line["method"] == method])
               for method in ("soft", "x", BICUBIC)}
    rows = results["ranking"]
    for row in rows:
        scores = overall[row["method"]]
        others = [np.mean([1 if a > b else 0.5 if a == b else 0 for a, b in zip(scores, overall[rival])])
                  for rival in overall if rival != row["method"]]
        assert row["images"] == 4 and row["overall"]["value"] == pytest.approx(scores.mean(), abs=1e-4)
        assert row["win_rate"] == pytest.approx(np.mean(others), abs=1e-4)
        behind = (overall[rows[0]["method"]] - scores).mean()
        assert row["behind_best"]["value"] == pytest.approx(behind, abs=1e-4) and behind >= 0
    assert '="http' not in page and page.count("<figure>") == 1 + 2 * 3 and "soft" in page
    assert run.read_json(out / "manifest.json")["results"]["ranking"] == [row["method"] for row in rows]
    judge = mllm.load_judge(toy_run / "02_train_reward", torch.device("cpu"))
    lr, image = (read_image(folders[key] / "c.png") for key in ("lr", "soft"))
    parts = [(lr[y:y + 8, x:x + 8], image[4 * y:4 * y + 32, 4 * x:4 * x + 32]) for y in (0, 8) for x in (0, 8, 16)]
    slow = np.mean([mllm.expected_scores(judge, [a], [[b]])[0, 0].numpy() for a, b in parts], axis=0)
    line = next(line for line in lines if line["image"] == "c" and line["method"] == "soft")
    assert line["crops"] == "6" and [float(line[axis]) for axis in metrics.AXES] == pytest.approx(slow, abs=2e-4)


def test_a_method_that_lacks_an_image_is_compared_on_the_others_only():
    scores = np.full((3, 2, 3), np.nan)
    scores[:, 0], scores[:2, 1] = np.array([[5.0], [7], [1]]), np.array([[4.0], [7]])
    first, second = ranking.rank_methods(scores, ["a", "b"], 0)
    assert (first["method"], first["images"], first["win_rate"], second["win_rate"]) == ("b", 2, 0.25, 0.75)
    assert second["behind_best"]["value"] == -0.5                           # better where both have an image


def test_the_accuracy_shown_is_that_of_the_judge_that_ranks(tmp_path):
    judge, tested = tmp_path / "02_train_reward", tmp_path / "03_eval_reward"
    judge.mkdir(), tested.mkdir()
    assert load_stage("03").own_accuracy(judge) is None
    run.write_json(judge / "manifest.json", {"results": {}})
    for inputs, accuracy in (({judge.name: run.sha256(judge / "manifest.json")}, 0.8), ({judge.name: "another"}, None),
                             ({}, None)):
        run.write_json(tested / "manifest.json", {"inputs": inputs, "results": {"pair_accuracy": 0.8}})
        assert load_stage("03").own_accuracy(judge) == accuracy


def write_small(path: Path) -> None:
    write_png(path, make_images(0)[1][:30, :30])


@pytest.mark.parametrize("spoil, more, message", [
    (lambda f: (f["soft"] / "b.png").unlink(), (), "no picture for 1 of 4 LR images, e.g. for 'b'"),
    (lambda f: write_small(f["sharp"] / "a.png"), (), "30x30 px is no whole multiple of its LR image, 8x8 px"),
    (lambda f: write_small(f["lr"] / "a.tif"), (), "have the same name"),
    (lambda f: f["sharp"].rename(f["sharp"].parent / "gone"), (), "is not a folder"),
    (lambda f: None, ("sr_dirs=",), "lr_dir and sr_dirs belong together"),
    (lambda f: None, ("judge=/nowhere", "crop=32"), "model /nowhere: cannot be loaded"),
    (lambda f: [path.write_bytes(b"") for path in f["soft"].rglob("*.png")], (), "nothing of soft is left to judge")])
def test_a_folder_that_cannot_be_ranked_is_refused_in_one_line(spoil, more, message, *, toy_run, toy_config, folders,
                                                                tmp_path, capsys):
    spoil(folders)
    with pytest.raises(SystemExit) as stop:
        rank(arguments(toy_run, toy_config, folders, *more))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_missing_or_does_not_fit_can_be_left_out(toy_run, toy_config, folders, tmp_path, monkeypatch, capsys):
    for name in ("c", "sub/d"):
        (folders["lr"] / f"{name}.png").unlink()
    (folders["soft"] / "b.png").unlink()
    write_small(folders["sharp"] / "a.png")
    argv = arguments(toy_run, toy_config, folders, "skip_bad=true")
    monkeypatch.setattr(sys, "argv", ["03_eval_reward.py", *argv])
    rank(argv)
    results = run.read_json(tmp_path / "out" / "results.json")
    assert {row["method"]: row["images"] for row in results["ranking"]} == {"soft": 1, "x": 1, BICUBIC: 2}
    assert len(results["left_out"]) == 2 + 2 * 2 and "nan" not in (tmp_path / "out" / "report.html").read_text().split()
    for more, code, message in ((), 0, "is finished"), (("crop=16",), 2, "use another out="):
        with pytest.raises(SystemExit) as stop:                             # the same command again; other settings
            rank([*argv, *more])
        assert stop.value.code == code and message in "".join(capsys.readouterr())


def test_names_of_methods_and_outputs_below_the_folder_of_lr_images(folders, capsys):
    assert ranking.method_folders(["x/dat", "ours=y/dat/"]) == {"dat": Path("x/dat"), "ours": Path("y/dat")}
    for wrong in (["x/dat", "y/dat"], [f"{BICUBIC}=x"]):
        with pytest.raises(SystemExit):
            ranking.method_folders(wrong)
    inside = folders["soft"].rename(folders["lr"] / "soft")                 # they are no LR images
    scenes, left_out = ranking.match(str(folders["lr"]), {"soft": inside}, skip_bad=False)
    assert sorted(scene.name for scene in scenes) == sorted(SIZES) and left_out == []
