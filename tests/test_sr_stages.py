"""
Stage 04 as a user runs it, at toy size.

Run     python -m pytest tests/test_sr_stages.py        # 3 min, of which stages 01 and 02 take one
"""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import run
from conftest import ROOT, run_stage

POLICY = Path("policy") / "diffusion_pytorch_model.safetensors"


def copy_of(toy_run: Path, target: Path) -> Path:
    """A run folder that shares the finished stages but may get its own 04 and 05."""
    target.mkdir(parents=True)
    for stem in ("01_build_dataset", "02_train_reward"):
        (target / stem).symlink_to(toy_run / stem)
    return target


def finish(number: str, config: Path, folder: Path, *overrides: str, processes: int = 1) -> str:
    done = run_stage(number, config, f"run={folder}", *overrides, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tuned(toy_config, toy_run, tmp_path_factory) -> Path:
    """A run folder with 04 finished, too."""
    folder = copy_of(toy_run, tmp_path_factory.mktemp("sr") / "run")
    finish("04", toy_config, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """The results of 04 that must not depend on how often it was interrupted; curves.png shows seconds, too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".png") and path.name != "curves.png" or path.name == "sampler.json"}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# 04 --------------------------------------------------------------------------------------------------------

def test_04_leaves_what_it_promises(tuned, toy_config):
    folder = tuned / "04_train_sr_grpo"
    results = run.read_json(folder / "manifest.json")["results"]
    wanted = {"reward_start", "reward_end", "lr_psnr_start", "lr_psnr_end", "ratio_error_max",
              "samples_per_second"}
    assert wanted <= set(results) and results["reward_end"] >= results["reward_start"]
    assert results["ratio_error_max"] < 1e-5
    rows = rows_of(folder)
    logged = {"reward_mean", "reward_std", "zero_std_groups", "policy_kl", "ref_kl", "clip_frac_low", "lr",
              "clip_frac_high", "ratio_max", "grad_norm", "lr_psnr", "seconds_sample", "seconds_score",
              "seconds_update", "peak_memory_gb"}
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(logged <= set(row) for row in rows)
    assert {"val_reward", "val_lr_psnr", "val_heldout"} <= set(rows[1]) and "val_reward" not in rows[0]
    assert results["heldout_end"] >= results["heldout_start"]
    assert results["lr_psnr_end"] > results["lr_psnr_start"] - 0.3
    assert rows[0]["ref_kl"] == 0 < rows[3]["ref_kl"]
    sheets = sorted(path.name for path in (folder / "samples").iterdir())
    assert sheets == ["step_0000.png", "step_0002.png", "step_0004.png"]
    cold, last = load_file(folder / "cold_start" / POLICY.name), folder / "checkpoints" / "step_000004"
    assert cold.keys() == load_file(folder / POLICY).keys()
    trained = load_file(last / "weights.safetensors")
    assert all("lora" in name for name in trained)                      # nothing else is trained


def test_04_again_is_a_no_op_and_other_settings_are_refused(tuned, toy_config):
    before = files_of(tuned / "04_train_sr_grpo")
    assert "is finished" in finish("04", toy_config, tuned)
    assert files_of(tuned / "04_train_sr_grpo") == before
    done = run_stage("04", toy_config, f"run={tuned}", "lr=0.5")
    assert done.returncode == 2 and "lr:" in done.stderr and done.stderr.count("\n") == 1


def test_04_needs_the_earlier_stages(toy_config, tmp_path):
    done = run_stage("04", toy_config, f"run={tmp_path}")
    assert done.returncode == 2 and "python 01_build_dataset.py" in done.stderr


@pytest.mark.parametrize("override", [
    "channels=30", "denoise_steps=7", "window_width=4", "samples_per_input=1"])
def test_04_refuses_settings_that_cannot_work(toy_config, toy_run, tmp_path, override):
    done = run_stage("04", toy_config, f"run={tmp_path}", override)
    assert done.returncode == 2 and override.split("=")[0] in done.stderr and done.stderr.count("\n") == 1


def test_04_resumed_after_a_checkpoint_is_the_same_to_the_byte(tuned, toy_config, tmp_path):
    folder = tmp_path / "run" / "04_train_sr_grpo"
    shutil.copytree(tuned, tmp_path / "run", symlinks=True)
    shutil.rmtree(folder / "policy")                        # as if it was killed while saving the last step
    (folder / "manifest.json").unlink()
    (folder / "checkpoints" / "step_000004").rename(folder / "checkpoints" / "step_000004.tmp")
    finish("04", toy_config, tmp_path / "run")
    assert files_of(folder) == files_of(tuned / "04_train_sr_grpo")
    clock = ("time", "seconds", "peak_memory_gb")
    ours, theirs = ([{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows_of(one)]
                    for one in (folder, tuned / "04_train_sr_grpo"))
    assert ours == theirs


def test_a_killed_cold_start_goes_on_to_the_same_bytes(tuned, toy_config, toy_run, tmp_path):
    target = copy_of(toy_run, tmp_path / "run")
    saved = target / "04_train_sr_grpo" / "cold_start" / "checkpoints" / "step_000020"
    command = [sys.executable, "04_train_sr_grpo.py", str(toy_config), f"run={target}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not saved.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (target / "04_train_sr_grpo" / "manifest.json").exists()
    finish("04", toy_config, target)
    assert files_of(target / "04_train_sr_grpo") == files_of(tuned / "04_train_sr_grpo")


def test_04_with_three_processes_trains_the_same_weights(tuned, toy_config, toy_run, tmp_path):
    target = copy_of(toy_run, tmp_path / "run")
    finish("04", toy_config, target, processes=3)           # each has an LR image; the cold start's four are uneven
    one, two = (load_file(folder / "04_train_sr_grpo" / "checkpoints" / "step_000004" / "weights.safetensors")
                for folder in (tuned, target))
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name       # moved by some 1e-3
