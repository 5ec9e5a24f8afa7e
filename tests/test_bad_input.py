"""
Damaged models of every kind: one line that says what, where and what to do; no traceback, and no pickle is run.

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
def models(tmp_path_factory) -> dict[str, Path]:
    """Sound folders to be damaged: a stage 02 whose judge has an adapter, and a policy of stage 04."""
    judge, cfg = build_judge(lora_rank=2)
    root = tmp_path_factory.mktemp("models")
    stage, policy = root / "02_train_reward", root / "policy"
    mllm.save_model(judge, stage / "cold_start" / "model")
    judge.model = load_stage("02").add_lora(judge.model, cfg)
    mllm.save_judge(judge, stage / "judge", base=stage / "cold_start" / "model")
    tiny_policy().save(policy)
    mllm.load_judge(stage, CPU), sr_pipelines.load_policy(policy, CPU)
    return {"judge": stage, "policy": policy}


def tensors(change):
    """A change of the tensors of a .safetensors file."""
    return lambda path: save_file(change(load_file(path)), path, metadata={"format": "pt"})


def to_pickle(path: Path) -> None:
    """The same weights, as torch.save writes them, under the name that libraries look for."""
    torch.save(load_file(path), path.with_name(
        {"model": "pytorch_model"}.get(path.stem, path.stem) + ".bin"))
    path.unlink()


def first_reshaped(found: dict) -> dict:
    return found | {min(found): torch.zeros(1, 2, 3)}


WEIGHTS = {"judge": "cold_start/model/model.safetensors", "policy": "diffusion_pytorch_model.safetensors"}
DAMAGE = {      # kind, what is damaged, words -> how
    ("truncated", None): lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    ("empty", None): lambda path: path.write_bytes(b""),
    ("a pickle under its name", None): lambda path: path.write_bytes(pickle.dumps(print)),
    ("a pickle instead", None): to_pickle,
    ("missing", None): Path.unlink,
    ("a weight of another shape", None): tensors(first_reshaped),
    ("no config", "config.json"): Path.unlink,
    ("a cut config", "config.json"): lambda path: path.write_text(path.read_text()[:50]),
    ("a config of another model", "config.json"): lambda path: path.write_text('{"model_type": "bert"}'),
}


def refused(capsys, load) -> str:
    """Loading has to stop with status 2 and one line, which is returned; libraries may warn before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load()
    err = capsys.readouterr().err
    [line] = re.findall("(?m)^error: .*$", err)
    assert stop.value.code == 2 and "Traceback" not in err
    return line


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("what, file", DAMAGE)
def test_damaged_models(models, tmp_path, capsys, kind, what, file):
    copy = shutil.copytree(models[kind], tmp_path / "copy")
    path = copy / WEIGHTS[kind]
    DAMAGE[what, file](path.with_name(file) if file else path)
    load, words = (mllm.load_judge, "model ") if kind == "judge" else (sr_pipelines.load_policy, "cannot be loaded")
    line = refused(capsys, lambda: load(copy, CPU))
    assert str(copy) in line and words in line


@pytest.mark.parametrize("name, damage, words", [
    ("judge/judge.json", Path.unlink, "judge.json"),
    ("judge/judge.json", lambda path: path.write_text("{"), "cannot be read as JSON"),
    ("judge/judge.json", lambda path: path.write_text("{}"), "lacks adapter, base"),
    ("judge/judge.json", lambda path: path.write_text(path.read_text().replace(": 1", ": 99")), "prompt version 99"),
    ("judge/adapter/adapter_config.json", Path.unlink, "judge/adapter"),
    ("judge/adapter/adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:99]), "judge/adapter"),
    ("judge/adapter/adapter_model.safetensors", Path.unlink, "judge/adapter"),
    ("judge/adapter", shutil.rmtree, "judge/adapter"),
])
def test_damaged_judges(models, tmp_path, capsys, name, damage, words):
    copy = shutil.copytree(models["judge"], tmp_path / "copy")
    damage(copy / name)
    line = refused(capsys, lambda: mllm.load_judge(copy, CPU))
    assert str(copy) in line and words in line and "again" in line
