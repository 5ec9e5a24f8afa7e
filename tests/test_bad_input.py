"""
Damaged models: one line that says what is wrong, where and what to do; no traceback, and no pickle is run.

Run     python -m pytest tests/test_bad_input.py        # 10 s
"""
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import mllm, sr_pipelines
from conftest import build_judge, load_stage
from test_sr_policy import tiny_policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Sound folders to be damaged: judge/ with an adapter on cold_start/model/, and a policy/ of stage 04."""
    judge, cfg = build_judge(lora_rank=2)
    root = tmp_path_factory.mktemp("models")
    mllm.save_model(judge, root / "cold_start" / "model")
    judge.model = load_stage("02").add_lora(judge.model, cfg)
    mllm.save_judge(judge, root / "judge", base=root / "cold_start" / "model")
    tiny_policy().save(root / "policy")
    mllm.load_judge(root, CPU), sr_pipelines.load_policy(root / "policy", CPU)
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:99])


def to_pickle(path: Path) -> None:
    """The same weights as torch.save writes them, under the name that libraries look for, and beside it no other."""
    name = "pytorch_model" if path.stem == "model" else path.stem
    torch.save(load_file(path), path.with_name(f"{name}.bin"))
    path.unlink()


def reshape(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {min(tensors): torch.zeros(1, 2, 3)}, path, metadata={"format": "pt"})


DAMAGES = [cut, Path.unlink, reshape, to_pickle, lambda path: path.write_bytes(pickle.dumps(print))]
CONFIGS = [cut, Path.unlink, lambda path: path.write_text('{"model_type": "bert"}')]
CASES = [       # file, damage, words of the line
    *(("cold_start/model/model.safetensors", damage, "model ") for damage in DAMAGES),
    *(("cold_start/model/config.json", damage, "model ") for damage in CONFIGS),
    *(("policy/diffusion_pytorch_model.safetensors", damage, "cannot be loaded") for damage in DAMAGES),
    *(("policy/config.json", damage, "cannot be loaded") for damage in CONFIGS),
    ("judge/judge.json", Path.unlink, "judge.json"),
    ("judge/judge.json", cut, "cannot be read as JSON"),
    ("judge/judge.json", lambda path: path.write_text("{}"), "lacks adapter, base"),
    ("judge/judge.json", lambda path: path.write_text(path.read_text().replace(": 1", ": 99")), "prompt version 99"),
    ("judge/adapter/adapter_config.json", Path.unlink, "judge/adapter"),
    ("judge/adapter/adapter_model.safetensors", cut, "judge/adapter"),
    ("judge/adapter", shutil.rmtree, "judge/adapter")]


@pytest.mark.parametrize("name, damage, words", CASES)
def test_damaged_models(models, tmp_path, capsys, name, damage, words):
    copy = shutil.copytree(models, tmp_path / "copy")
    damage(copy / name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sr_pipelines.load_policy(copy / "policy", CPU) if "policy" in name else mllm.load_judge(copy, CPU)
    err = capsys.readouterr().err                                       # libraries may warn, too
    [line] = re.findall("(?m)^error: .*$", err)
    assert stop.value.code == 2 and "Traceback" not in err
    assert str(copy) in line and words in line, line
