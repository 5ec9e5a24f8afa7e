"""
What a newcomer sees: estimates, index.html, curves.png, TensorBoard and W&B.

Run     python -m pytest tests/test_guide.py        # 3 s, and a toy run of 01 and 02 if there is none yet
"""
import html.parser
import importlib.util
import json
import re
import sys
import types
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from common import config, curves, guide, loggers, run, run_index
from conftest import load_stage
from test_readme import documented


class Links(html.parser.HTMLParser):
    """Targets of a page's links and pictures, its tags, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.targets, self.tags, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for key, value in attrs if key in ("href", "src")]

    def handle_data(self, data):
        self.text += data


def test_an_estimate_is_said_once_after_a_few_items_and_only_if_there_is_time(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(guide.time, "time", lambda: clock[0])

    def walk(count: int, seconds: float) -> str:
        for item in guide.announce(range(count), count, "steps"):
            clock[0] += 100.0 if item == 0 else seconds             # the first one warms up
        return capsys.readouterr().out

    said = walk(50, 6.0)
    assert said == "steps: about 5 minutes more on this machine, at 6 s each of 47 (mean of 2 so far)\n"
    assert walk(50, 0.1) == "" and walk(3, 60.0) == ""
    assert [guide.duration(s) for s in (0.2, 89, 91, 5000, 2e4)] == [
        "1 seconds", "89 seconds", "2 minutes", "83 minutes", "5.6 hours"]
    assert list(guide.announce("abc", 3, "x")) == ["a", "b", "c"]


def test_the_index_links_what_finished_stages_left_and_names_the_command_of_the_others(toy_run, tmp_path):
    assert (toy_run / "index.html").exists()
    page = Links((toy_run / "index.html").read_text())
    assert "script" not in page.tags
    for target in page.targets:
        assert (toy_run / unquote(target)).exists(), target
    for stem in ("01_build_dataset", "02_train_reward"):
        linked = {unquote(target).rstrip("/") for target in page.targets}
        assert {f"{stem}/{path.name}" for path in (toy_run / stem).iterdir() if path.name[0] != "."} <= linked
        for key in json.loads((toy_run / stem / "manifest.json").read_text())["results"]:
            assert key in page.text
    assert page.tags.count("img") == 2                                  # 01's contact sheet and 02's curves
    for stem in config.STAGES[2:]:
        assert f"not yet run: python {stem}.py" in page.text


def test_names_and_values_in_the_index_are_escaped_and_a_damaged_manifest_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["01_build_dataset.py", "<my>.yaml", f"run={tmp_path}"])
    folder = tmp_path / "03_eval_reward_<b>x & y"
    folder.mkdir()
    results = {"best": "<script>alert(1)</script>", "value": 0.123456, "nothing": None, "ci": [1.0, 2.5]}
    run.write_manifest(folder, script="03_eval_reward.py", started=0.0, inputs=[], results=results)
    (folder / "a#b?.html").write_text("x")
    (tmp_path / "04_train_sr_grpo").mkdir()
    (tmp_path / "01_build_dataset").mkdir()
    (tmp_path / "01_build_dataset" / "manifest.json").write_text("{")
    run_index.write(tmp_path)
    source = (tmp_path / "index.html").read_text()
    page = Links(source)
    assert "script" not in page.tags and "<b>x" not in source and "<my>" not in source
    assert "<script>alert(1)</script>" in page.text and "0.1235" in page.text and "[1, 2.5]" in page.text
    assert all((tmp_path / unquote(target)).exists() for target in page.targets)
    assert any(unquote(target).endswith("a#b?.html") for target in page.targets)
    assert "begun, not finished: python 04_train_sr_grpo.py <my>.yaml" in page.text
    assert "manifest.json is damaged" in page.text


def test_curves_show_only_keys_that_the_readme_explains():
    for stem, number in (("02_train_reward", "02"), ("04_train_sr_grpo", "04")):
        keys = {key for own in curves.PLOTS[stem].values() for key in own}
        assert keys <= documented(number), keys - documented(number)


def test_curves_of_a_toy_run_are_drawn(toy_run):
    with Image.open(toy_run / "02_train_reward" / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    wanted = tuple(int(curves.COLORS[0][i:i + 2], 16) for i in (1, 3, 5))
    assert (pixels == wanted).all(1).sum() > 200                        # lines, not only empty axes


def test_running_mean_and_points_against_loops():
    values = np.random.default_rng(0).random(30)
    for i, mean in enumerate(curves.running_mean(values, 4)):
        reach = min(4, i, 29 - i)
        assert mean == pytest.approx(np.mean([values[j] for j in range(i - reach, i + reach + 1)]))
    rows = [{"step": 0, "a": 1.0}, {"step": 1, "a": None}, {"step": 2}, {"step": 3, "a": 4}]
    assert curves.points(rows, "a").tolist() == [[0, 1], [3, 4]]
    assert curves.points(rows, "b").shape == (0, 2)


# TensorBoard and W&B ---------------------------------------------------------------------------------------------

@pytest.fixture
def cfg_and_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "SENDERS", {})
    folder = tmp_path / "04_train_sr_grpo"
    folder.mkdir()
    return lambda log_to: (load_stage("04").Config(run=str(tmp_path), log_to=log_to), folder)


ROWS = ({"phase": "grpo", "reward_mean": 1.5, "grad_norm": float("nan")}, {"reward_mean": 2.5, "val_reward": 3.0})


def test_what_is_not_installed_or_does_not_exist_is_refused_in_one_line(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    stage = load_stage("02")
    for value, said in (("wandb", "not installed: `pip install wandb`"), ("mlflow", "one of none, tensorboard, wandb")):
        with pytest.raises(SystemExit):
            config.load_config(stage.Config, stage.__file__, ["configs/demo.yaml", f"log_to={value}"])
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_numbers_reach_tensorboard(cfg_and_folder, monkeypatch):
    sent = []
    writer = types.SimpleNamespace(add_scalar=lambda *row: sent.append(row), flush=lambda: None)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda place, purge_step: sent.append((place, purge_step)) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    cfg, folder = cfg_and_folder("tensorboard")
    for step, row in enumerate(ROWS):
        loggers.log(cfg, folder, 7 + step, row)
    assert sent == [(folder / "tensorboard", 7), ("reward_mean", 1.5, 7), ("reward_mean", 2.5, 8),
                    ("val_reward", 3.0, 8)]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2 and (folder / "curves.png").exists()


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is optional")
def test_numbers_reach_the_real_tensorboard(cfg_and_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cfg, folder = cfg_and_folder("tensorboard")
    for step, row in enumerate(ROWS):
        loggers.log(cfg, folder, step, row)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward_mean")] == [(0, 1.5), (1, 2.5)]
    assert events.Tags()["scalars"] == ["reward_mean", "val_reward"]


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is optional")
def test_numbers_reach_an_offline_run_of_the_real_wandb(cfg_and_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg, folder = cfg_and_folder("wandb")
    for step, row in enumerate(ROWS):
        loggers.log(cfg, folder, step, row)
    import wandb
    wandb.teardown()
    stored, = (folder / "wandb").glob("offline-run-*/*.wandb")
    content = stored.read_bytes()
    assert re.search(b"reward_mean", content) and b"val_reward" in content
