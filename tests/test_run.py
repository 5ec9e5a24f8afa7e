"""
What a stage leaves on disk: gates, files, seeds; and what ends it from outside.

Run     python -m pytest tests/test_run.py          # 10 s
"""
import dataclasses
import errno
import inspect
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import run, training
from common.config import config_text, load_config
from common.images import write_png
from conftest import ROOT, load_stage, tree

SCRIPT = "/anywhere/02_train_reward.py"


@dataclasses.dataclass
class Config:
    run: str
    seed: int = 0
    lr: float = 1e-4
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["02_train_reward.py", "configs/demo.yaml", "lr=3", "run=runs/x"])


def stopped(capsys, function, *arguments, code: int = 2) -> str:
    """Call function, which has to exit with `code`, and return what it printed: one line for an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == code
    assert code == 0 or (out == "" and re.fullmatch(r"error: [^\n]+\n", err))
    return out + err


def finish(folder: Path, inputs: tuple[Path, ...] = ()) -> None:
    run.write_manifest(folder, script=SCRIPT, started=time.time() - 5, inputs=list(inputs),
                       results={"accuracy": np.float32(0.5), "bad": math.nan})


# stages ----------------------------------------------------------------------------------------------------

def test_a_stage_is_opened_resumed_moved_and_finished(tmp_path, capsys):
    cfg = Config(run=str(tmp_path / "a"))
    folder = run.open_stage(cfg, SCRIPT)
    assert folder == tmp_path / "a" / "02_train_reward" and run.open_stage(cfg, SCRIPT) == folder
    assert load_config(Config, SCRIPT, [str(folder / "config.yaml")]) == cfg
    (tmp_path / "a").rename(tmp_path / "b")
    folder = run.open_stage(Config(run=str(tmp_path / "b")), SCRIPT)
    message = stopped(capsys, run.require, tmp_path / "b", folder.name)
    assert "first run `python 02_train_reward.py configs/demo.yaml run=runs/x`" in message
    finish(folder)
    assert run.require(str(tmp_path / "b"), folder.name) == folder
    message = stopped(capsys, run.open_stage, Config(run=str(tmp_path / "b")), SCRIPT, code=0)
    assert f"02_train_reward is finished: {folder}" in message
    assert "next: python 03_eval_reward.py configs/demo.yaml run=runs/x\n" in message


def test_other_settings_are_refused(tmp_path, capsys):
    folder = run.open_stage(Config(run=str(tmp_path), seed=7), SCRIPT)
    run.open_stage(Config(run=str(tmp_path)), SCRIPT)                   # nothing was done with the wrong seed
    run.log_metrics(folder, 0, {})
    before, changed = tree(folder), Config(run=str(tmp_path), seed=1, names=["a", "b"])
    message = stopped(capsys, run.open_stage, changed, SCRIPT)
    assert "seed: 0 -> 1, names: ['a'] -> ['a', 'b']; use another run=" in message and str(folder) in message
    assert tree(folder) == before
    finish(folder)
    assert "seed: 0 -> 1" in stopped(capsys, run.open_stage, changed, SCRIPT)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_settings_of_memory_may_change_when_a_stage_goes_on(number, tmp_path, capsys):
    """What an error about memory advises must not be refused as other settings."""
    module = load_stage(number)
    memory = re.findall(r"(?m)^    (\w+): .*#.*memory", inspect.getsource(module.Config))
    folder, start = tmp_path / Path(module.__file__).stem, [str(tmp_path / "c.yaml")]
    start += ["hr_dir=/nowhere"] if number == "01" else []
    for settings, refused in (([], False), ([f"{name}=1" for name in memory], False), (["seed=7"], True)):
        (folder / "begun").mkdir(parents=True, exist_ok=True)
        (tmp_path / "c.yaml").write_text(f"run: {tmp_path}\n")
        before = load_config(module.Config, module.__file__, start)
        (folder / "config.yaml").write_text(config_text(before, folder.name))
        with pytest.raises(SystemExit):                     # there is no earlier stage, or no photograph
            module.main(load_config(module.Config, module.__file__, [*start, *settings]))
        assert ("has other settings" in capsys.readouterr().err) == refused, settings
    assert memory


def test_a_folder_that_cannot_be_written_stops(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    for place in (str(path), "/proc/self/run"):                         # nobody may write there, root neither
        message = stopped(capsys, run.open_stage, Config(run=place), SCRIPT)
        assert place in message and "choose another run=" in message


def test_the_manifest_knows_results_inputs_and_weights(tmp_path, capsys):
    tmp_path = tmp_path / "checkpoints"                                 # a run may be called so, too
    first, folder = tmp_path / "01_build_dataset", tmp_path / "02_train_reward"
    path = folder / "judge" / "adapter" / "adapter_model.safetensors"
    for file in (first / "manifest.json", path, folder / "checkpoints" / "step_000001" / "weights.safetensors"):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"a" * 99)
    finish(folder, [first, tmp_path / "a model without manifest"])
    assert "accuracy" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["results"] == {"accuracy": 0.5, "bad": None} and manifest["argv"] == sys.argv
    assert manifest["inputs"] == {first.name: run.sha256(first / "manifest.json")}
    assert list(manifest["weights"]) == ["judge/adapter/adapter_model.safetensors"]
    assert 5 <= manifest["seconds"] < 60 and 0 < manifest["peak_memory_gb"] < 100 and manifest["packages"]["torch"]
    for damage in (lambda: path.write_bytes(b"a" * 98 + b"b"), path.unlink):
        damage()
        message = stopped(capsys, run.require, tmp_path, folder.name)
        assert str(path) in message and "run `python 02_train_reward.py" in message


def test_git_state_is_the_commit_and_whether_files_differ(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)
    git("init")
    assert run.git_state(tmp_path) == {"commit": None, "dirty": None}       # no commit yet
    (tmp_path / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "-m", "first")
    clean = run.git_state(tmp_path)
    (tmp_path / "a.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["dirty"] is False
    assert run.git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    folder = run.open_stage(Config(run=str(tmp_path)), SCRIPT)
    code = "import sys, pathlib; from common import run; run.lock(pathlib.Path(sys.argv[1])); print('locked')"
    for place, lines in ((folder, "error: .*another process is at work there.*\n"), (tmp_path, "locked\n")):
        done = subprocess.run([sys.executable, "-c", code, str(place)], cwd=ROOT, capture_output=True, text=True)
        assert re.fullmatch(lines, done.stdout + done.stderr)


# files and seeds -------------------------------------------------------------------------------------------

def test_metrics_are_strict_json_and_trimmed_on_resume(tmp_path):
    for step in range(4):
        run.log_metrics(tmp_path, step, {"loss": torch.tensor(0.5), "kl": np.float32("nan"), "top": math.inf})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')                       # the process died here
    run.trim_metrics(tmp_path, 2)
    run.log_metrics(tmp_path, 2, {"loss": 1})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0].keys() == {"step", "time", "loss", "kl", "top"}
    assert (rows[0]["loss"], rows[0]["kl"], rows[0]["top"]) == (0.5, None, None)
    run.trim_metrics(tmp_path / "new", 0)                   # nothing there yet: nothing to do


def test_json_and_tensors_come_back_or_are_named(tmp_path, capsys):
    value = {"a": np.array([1.5, np.nan]), "b": (torch.tensor(2), tmp_path), "ü": [None, True], 3: -math.inf}
    run.write_json(tmp_path / "x.json", value)
    assert run.read_json(tmp_path / "x.json") == {"a": [1.5, None], "b": [2, str(tmp_path)],
                                                  "ü": [None, True], "3": None}
    with pytest.raises(TypeError):
        run.write_json(tmp_path / "x.json", {"a": object()})
    assert run.read_json(tmp_path / "x.json")["b"]          # a failed write leaves the old file
    tensors = {"w": torch.arange(999.0), "b": torch.tensor(1.5).bfloat16()}
    run.save_tensors(tmp_path / "x.safetensors", tensors)
    assert all(torch.equal(p, tensors[name]) for name, p in run.load_tensors(tmp_path / "x.safetensors").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
    for read, path in ((run.read_json, tmp_path / "x.json"), (run.load_tensors, tmp_path / "x.safetensors")):
        path.write_bytes(path.read_bytes()[:-9])
        assert str(path) in stopped(capsys, read, path)
        path.unlink()
        assert str(path) in stopped(capsys, read, path)


def test_seeds_depend_on_seed_and_keys_alone():
    def draw(*keys):
        return torch.randn(3, generator=run.generator(*keys)).tolist()
    assert draw(0, "a", 1) == draw(0, "a", 1)
    different = [(0,), (1,), (0, "a"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0, 1, "a")]
    assert len({tuple(draw(*keys)) for keys in different}) == len(different)
    assert run.np_rng(0, "a").random() == run.np_rng(0, "a").random() != run.np_rng(0, "b").random()
    assert run.stable_seed(0, "rollout", 3) == 1320416013433573303      # the same in every process, for years
    for key in (np.int64(1), 1.0, True, None, ("a",)):                  # their text is not stable
        with pytest.raises(AssertionError):
            run.generator(0, key)


# what ends a run from outside ------------------------------------------------------------------------------

@pytest.mark.parametrize("write", [
    lambda folder: run.write_bytes(folder / "b.bin", bytes(2_000_000)),
    lambda folder: training.save_checkpoint(folder, 2, weights={"w": torch.zeros(500_000)}, optimizers={}, state={}),
    lambda folder: write_png(folder / "a.png", np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)),
    lambda folder: torch.save(torch.zeros(500_000), folder / "w.pt"),
], ids=["file", "checkpoint", "picture", "torch"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, capsys, write):
    """A file may not grow above 1 MB, which fails as a full disk does, but for the number of the error."""
    training.save_checkpoint(tmp_path, 1, weights={"w": torch.ones(3)}, optimizers={}, state={})
    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert "make room or change run=; the same command goes on" in stopped(capsys, run.explained()(write), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path).items() >= before.items()
    assert training.resume(tmp_path, {}, {})[0] == 1


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES"])
def test_a_disk_that_takes_nothing(tmp_path, capsys, monkeypatch, code):
    def refuse(_):
        raise OSError(vars(errno)[code], os.strerror(vars(errno)[code]))
    run.write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(run.os, "fsync", refuse)
    write = run.explained()(run.write_json)
    assert "make room or change run=" in stopped(capsys, write, tmp_path / "a.json", {"new": 2})
    assert run.read_json(tmp_path / "a.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 1


def test_no_memory_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    for allocate in (lambda: np.zeros(2**56), lambda: torch.empty(2**48)):
        line = stopped(capsys, run.explained()(allocate))
        assert "out of memory" in line and "lower what --help marks as `memory`; the same command goes on" in line
    with pytest.raises(FileNotFoundError), run.explained():
        open("/no/such/file")
    with pytest.raises(RuntimeError), run.explained():
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize("sent, by", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_one_line_and_a_status(tmp_path, sent, by):
    code = ("import pathlib, sys, time; from common import run\n"
            "with run.explained(): pathlib.Path(sys.argv[1]).touch(), time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ready")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + sent and out == ""
    assert err == f"\nerror: stopped by {by}: {run.AGAIN}\n"
