"""
What a stage leaves on disk: gates, metrics, seeds; and what ends it from outside.

Run     python -m pytest tests/test_run.py          # 5 s
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
import safetensors.torch
import torch

from common import run, training
from common.config import STAGES, config_text, load_config
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


def finish(folder):
    run.write_manifest(folder, script=SCRIPT, started=time.time() - 5, inputs=[], results={"accuracy": 0.5})


# stages ----------------------------------------------------------------------------------------------------

def test_a_stage_is_opened_resumed_and_moved(tmp_path):
    folder = run.open_stage(Config(run=str(tmp_path / "a")), SCRIPT)
    assert folder == tmp_path / "a" / "02_train_reward"
    cfg = Config(run=str(tmp_path / "a"))
    assert load_config(Config, SCRIPT, [str(folder / "config.yaml")]) == cfg
    assert run.open_stage(cfg, SCRIPT) == folder
    (tmp_path / "a").rename(tmp_path / "b")
    assert run.open_stage(Config(run=str(tmp_path / "b")), SCRIPT).exists()


def test_other_settings_are_refused(tmp_path, capsys):
    corrected = Config(run=str(tmp_path))
    folder = run.open_stage(Config(run=str(tmp_path), seed=7), SCRIPT)
    run.open_stage(corrected, SCRIPT)                                   # nothing was done with the wrong seed
    run.log_metrics(folder, 0, {})
    before = (folder / "config.yaml").read_bytes()
    changed = Config(run=str(tmp_path), seed=1, names=["a", "b"])
    message = stopped(capsys, run.open_stage, changed, SCRIPT)
    assert "seed: 0 -> 1" in message and "names: ['a'] -> ['a', 'b']" in message and "lr" not in message
    assert "another run=" in message and str(folder) in message
    assert (folder / "config.yaml").read_bytes() == before
    finish(folder)
    assert "seed: 0 -> 1" in stopped(capsys, run.open_stage, changed, SCRIPT)


def test_a_finished_stage_says_so_and_names_the_next_command(tmp_path, capsys):
    folder = run.open_stage(Config(run=str(tmp_path)), SCRIPT)
    finish(folder)
    message = stopped(capsys, run.open_stage, Config(run=str(tmp_path)), SCRIPT, code=0)
    assert f"02_train_reward is finished: {folder}" in message
    assert "next: python 03_eval_reward.py configs/demo.yaml run=runs/x\n" in message


def test_a_folder_that_cannot_be_written_stops(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    for place in (str(path), "/proc/self/run"):                         # nobody may write there, root neither
        message = stopped(capsys, run.open_stage, Config(run=place), SCRIPT)
        assert place in message and "choose another run=" in message


def test_a_missing_stage_names_its_command(tmp_path, capsys):
    folder = run.open_stage(Config(run=str(tmp_path)), SCRIPT)
    message = stopped(capsys, run.require, tmp_path, "02_train_reward")
    assert "first run `python 02_train_reward.py configs/demo.yaml run=runs/x`" in message
    finish(folder)
    assert run.require(str(tmp_path), "02_train_reward") == folder


def test_manifest(tmp_path, capsys):
    first, second = (tmp_path / stem for stem in STAGES[:2])
    for folder in (first, second):
        folder.mkdir()
    run.write_json(first / "manifest.json", {"stage": first.name})
    run.write_manifest(second, script=SCRIPT, started=time.time() - 5, inputs=[first],
                       results={"accuracy": np.float32(0.5), "bad": float("nan")})
    manifest = json.loads((second / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["stage"] == "02_train_reward" and manifest["results"] == {"accuracy": 0.5, "bad": None}
    assert manifest["inputs"] == {first.name: run.sha256(first / "manifest.json")}
    assert manifest["argv"] == sys.argv and 5 <= manifest["seconds"] < 60 and manifest["world_size"] == 1
    assert 0 < manifest["peak_memory_gb"] < 100 and manifest["packages"]["torch"] and set(manifest["git"])
    out = capsys.readouterr().out
    assert "accuracy" in out and str(second) in out and "next: python 03_eval_reward.py" in out


def test_git_state_is_the_commit_and_whether_files_differ(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert run.git_state(tmp_path) == {"commit": None, "dirty": None}       # no commit yet
    (tmp_path / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is not a commit")
    clean = run.git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["dirty"] is False
    (tmp_path / "a.py").write_text("changed")
    assert run.git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


# seeds -----------------------------------------------------------------------------------------------------

def test_seeds_depend_on_seed_and_keys_alone():
    def draw(*keys):
        return torch.randn(3, generator=run.generator(*keys)).tolist()
    assert draw(0, "a", 1) == draw(0, "a", 1)
    different = [(0,), (1,), (0, "a"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0, 1, "a")]
    assert len({tuple(draw(*keys)) for keys in different}) == len(different)
    assert run.np_rng(0, "a").random() == run.np_rng(0, "a").random() != run.np_rng(0, "b").random()
    assert run.stable_seed(0, "rollout", 3) == 1320416013433573303      # the same in every process, for years


@pytest.mark.parametrize("key", [np.int64(1), 1.0, True, None, ("a",)])
def test_keys_whose_text_is_not_stable_are_refused(key):
    with pytest.raises(AssertionError):
        run.generator(0, key)


# metrics and other files -----------------------------------------------------------------------------------

def test_metrics_are_strict_json_and_trimmed_on_resume(tmp_path):
    for step in range(4):
        run.log_metrics(tmp_path, step, {"loss": torch.tensor(0.5), "kl": np.float32("nan"), "top": math.inf})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')                       # the process died here
    run.trim_metrics(tmp_path, 2)
    run.log_metrics(tmp_path, 2, {"loss": 1})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0].keys() == {"step", "time", "loss", "kl", "top"}
    assert (rows[0]["loss"], rows[0]["kl"], rows[0]["top"]) == (0.5, None, None)
    run.trim_metrics(tmp_path / "new", 0)                   # nothing there yet: nothing to do


def test_json_round_trip(tmp_path, capsys):
    value = {"a": np.array([1.5, np.nan]), "b": (torch.tensor(2), tmp_path), "ü": [None, True], 3: -math.inf}
    run.write_json(tmp_path / "x.json", value)
    assert run.read_json(tmp_path / "x.json") == {"a": [1.5, None], "b": [2, str(tmp_path)],
                                                  "ü": [None, True], "3": None}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    (tmp_path / "x.json").write_text('{"a": ')
    assert "x.json" in stopped(capsys, run.read_json, tmp_path / "x.json")
    assert "none.json" in stopped(capsys, run.read_json, tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    run.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(TypeError):
        run.write_bytes(tmp_path / "x.json", "not bytes")
    assert run.read_json(tmp_path / "x.json") == {"a": 1}


def flipped(path: Path) -> bytes:
    """The file with one bit changed, far from its header."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    return bytes(content)


def damage(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def test_the_best_weights_carry_their_checksum(tmp_path, capsys):
    path, tensors = tmp_path / "best.safetensors", {"w": torch.arange(999.0), "b": torch.tensor(1.5).bfloat16()}
    run.save_tensors(path, tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in run.load_tensors(path).items())
    whole = path.read_bytes()
    for content in (flipped(path), whole[:-1], b"", safetensors.torch.save(tensors), None):
        damage(path, content)
        assert "best.safetensors" in stopped(capsys, run.load_tensors, path)


def test_damaged_weights_of_a_finished_stage_are_noticed(tmp_path, capsys):
    folder = run.open_stage(Config(run=str(tmp_path)), SCRIPT)
    (folder / "judge" / "adapter").mkdir(parents=True)
    path = folder / "judge" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(b"a" * 99)
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_000001" / "weights.safetensors").write_bytes(b"b")
    finish(folder)
    assert list(run.read_json(folder / "manifest.json")["weights"]) == ["judge/adapter/adapter_model.safetensors"]
    assert run.require(tmp_path, "02_train_reward") == folder
    for content in (flipped(path), None):
        damage(path, content)
        message = stopped(capsys, run.require, tmp_path, "02_train_reward")
        assert str(path) in message and "run `python 02_train_reward.py" in message


def test_two_processes_cannot_work_in_one_folder(tmp_path, capsys):
    folder = run.open_stage(Config(run=str(tmp_path)), SCRIPT)
    run.open_stage(Config(run=str(tmp_path)), SCRIPT)               # the same process may
    code = "import sys, pathlib; from common import run; run.lock(pathlib.Path(sys.argv[1])); print('locked')"
    other = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(other, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: [^\n]*another process is at work there[^\n]*\n", done.stderr)
    assert subprocess.run([*other[:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True).stdout == "locked\n"


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


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_settings_of_memory_may_change_when_a_stage_goes_on(number, tmp_path, capsys):
    """What an error about memory advises must not be refused as other settings."""
    module = load_stage(number)
    memory = re.findall(r"(?m)^    (\w+): .*#.*memory", inspect.getsource(module.Config))
    folder, start = tmp_path / Path(module.__file__).stem, [str(tmp_path / "c.yaml")]
    (folder / "begun").mkdir(parents=True)
    start += ["hr_dir=/nowhere"] if number == "01" else []
    for settings, refused in (([], False), ([f"{name}=1" for name in memory], False), (["seed=7"], True)):
        (tmp_path / "c.yaml").write_text(f"run: {tmp_path}\n")
        before = load_config(module.Config, module.__file__, start)
        (folder / "config.yaml").write_text(config_text(before, folder.name))
        with pytest.raises(SystemExit):                     # there is no earlier stage, or no photograph
            module.main(load_config(module.Config, module.__file__, [*start, *settings]))
        assert ("has other settings" in capsys.readouterr().err) == refused, settings
        (folder / "begun").mkdir(parents=True, exist_ok=True)
    assert memory


def test_sigterm_is_one_line_and_a_status(tmp_path):
    code = """
import pathlib, sys, time
from common import run, training
with run.explained():
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ready")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and out == ""
    assert err.strip() == f"error: stopped by SIGTERM: {run.AGAIN}"


def test_ctrl_c_is_one_line(capfd):
    with pytest.raises(SystemExit) as stop, run.explained():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capfd.readouterr().err == f"\nerror: stopped by Ctrl-C: {run.AGAIN}\n"
