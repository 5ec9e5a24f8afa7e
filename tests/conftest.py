"""For all tests: the repo root on sys.path, scripts as modules, a tiny judge, and a toy run of 01 and 02."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"     # here as in every process started from here: threads change rounding
os.environ["PYTHONFAULTHANDLER"] = "1"  # a process that crashes says where

# every stage at a size that takes seconds; real photographs, 4 candidates of 32 x 32 px per LR image
TOY = """
seed: 0

01_build_dataset:
  hr_dir: skimage
  hr_size: 32
  scale: 4
  degradation: mild
  train_groups: 24
  val_groups: 5
  test_groups: 8
  val_sources: [rocket]
  test_sources: [chelsea, coffee]
  candidates: [hr, resample, base, inconsistent|unnatural]
  base_steps: 20
  workers: 1

02_train_reward:
  vision_width: 24
  vision_depth: 1
  width: 64
  depth: 2
  heads: 2
  cold_start_steps: 40            # enough for a quarter of the replies to have the asked form
  cold_start_groups: 3
  cold_start_lr: 1e-2
  cold_start_replies: 4
  steps: 5
  groups_per_step: 3
  reasoned_groups: 2
  replies: 3
  direct_replies: 8
  max_reply_tokens: 40
  warmup_steps: 2
  ema: 0.5
  eval_every: 4
  save_every: 2

03_eval_reward:
  groups_per_forward: 3
  sampled_groups: 2
  sampled_replies: 2

04_train_sr_grpo:
  denoise_steps: 4
  gain: 2                         # the toy judge hardly sees less
  std_floor: 0
  steps: 4
  inputs_per_step: 3
  samples_per_input: 3
  samples_per_gpu: 4
  window_width: 2
  lora_rank: 4
  eval_every: 2
  eval_inputs: 3
  save_every: 1

05_eval_sr:
  seeds_per_image: 2
  images_per_gpu: 4
  shown_images: 3
  large_crops: 1
  large_size: 128
"""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs file by file on all cores (pytest-xdist), unless `-n` says otherwise."""
    whole = len(config.args) == 1 and Path(config.args[0]).is_dir() and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = os.cpu_count(), "loadfile"
    return (yield)


def load_stage(number: str) -> ModuleType:
    """Return script `number` ("04") as a module; its name is no identifier, so `import` cannot."""
    path = next(ROOT.glob(f"{number}_*.py"))
    name = f"stage_{number}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module              # before it runs: its dataclasses look themselves up there
        spec.loader.exec_module(module)
    return sys.modules[name]


def run_stage(number: str, config: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script as a user would; under torchrun if processes > 1."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, next(ROOT.glob(f"{number}_*.py")).name, str(config), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    print(done.stdout, done.stderr, sep="\n")              # pytest shows it if the test fails
    return done


def tree(folder: Path) -> dict[str, str]:
    """Every file that must be the same after each run of the same settings: name -> hash of its bytes."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "config.yaml")}


def build_judge(candidate_view: str = "image", **settings):
    """Return (judge, cfg): a tiny Qwen2.5-VL as stage 02 builds it, untrained, float32."""
    import numpy as np
    import torch

    from common.groups import Cohort
    shape = {"width": 32, "depth": 2, "heads": 2, "vision_width": 24, "vision_depth": 1}
    stage = load_stage("02")
    cfg = stage.Config(run="", candidate_view=candidate_view, **shape, **settings)
    lr, *images = make_images(0)
    nothing = np.zeros((len(images), 3))
    judge = stage.first_judge(cfg, [Cohort("", lr, images, [], nothing, nothing)], torch.device("cpu"))
    judge.model.requires_grad_(True)
    with torch.no_grad():
        judge.net.lm_head.weight.mul_(10)           # else all answers are about equally likely
    judge.model.eval()
    return judge, cfg


def make_images(seed: int, height: int = 32, width: int = 32, count: int = 3) -> list:
    """Return [LR, candidate, ..]: smooth random pictures, uint8, with noise of the candidate's number."""
    import numpy as np

    from common.images import resize
    rng = np.random.default_rng(seed)
    lr = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    smooth = resize(lr, (width, height), "bicubic").astype(float)
    noisy = [smooth + rng.normal(0, 8 * i, smooth.shape) for i in range(count)]
    return [lr, *(image.clip(0, 255).astype(np.uint8) for image in noisy)]


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory) -> Path:
    """A config of all stages at toy size; its `run` is the folder of toy_run."""
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(f"run: {path.parent / 'run'}\n{TOY}")
    return path


@pytest.fixture(scope="session")
def toy_run(toy_config) -> Path:
    """A run folder with finished stages 01 and 02 of toy_config; copy what you want to change."""
    for number in ("01", "02"):
        done = run_stage(number, toy_config)
        assert done.returncode == 0, done.stderr
    return toy_config.parent / "run"
