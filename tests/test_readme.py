"""
The README: its commands parse, the files that it names exist, its copy of the loss learns, its judge block scores.

Run     python -m pytest tests/test_readme.py       # 30 s, and the toy run of 01 and 02 if there is none yet
"""
import json
import re
import shlex

import pytest
import torch

from common import mllm, prompted
from common.config import STAGES, load_config
from common.images import write_png
from conftest import ROOT, load_stage, make_images

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words behind every script of this repo that a bash block runs; a loop over the stages gives one for each."""
    parts = [part for block in blocks("bash") for line in block.splitlines()
             for part in re.split(r"&&|\|\||;", line.split("  #")[0])]
    words = [shlex.split(part.strip().removeprefix("do ")) for part in parts]
    found = [row[i:] for row in words for i, word in enumerate(row) if re.fullmatch(r"0\d_\w+\.py", word)]
    return found + [[f"{stem}.py", *row[2:]] for row in words if row[:2] == ["python", "$s"] for stem in STAGES]


def test_commands_name_scripts_and_settings_that_exist():
    assert {command[0] for command in commands()} == {f"{stem}.py" for stem in STAGES}
    for script, config, *settings in commands():
        stage = load_stage(script[:2])
        load_config(stage.Config, stage.__file__, [str(ROOT / config), *settings])          # stops if it does not parse


def test_the_judge_without_training_is_asked_for_what_it_is_read_by():
    given = prompted.read_settings(ROOT / "configs" / "judge.yaml")
    assert re.findall(given["pattern"], given["prompt"]) == [("5", "5", "5")]


def test_the_test_command_is_the_one_of_ci():
    command = "pip install -r requirements.txt && python -m pytest tests\n"
    assert command in README and command in (ROOT / ".ci/run").read_text()


def test_files_pictures_and_headings_that_are_mentioned_exist():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    code = re.findall(r"`((?:common|configs|tests)/[\w./]*\w)`", prose)
    code += re.findall(r"^(common/\w+\.py) ", README, re.MULTILINE)
    assert len(code) > 15 and [name for name in code if not (ROOT / name).exists()] == []
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
               for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target[1:] in anchors if target[0] == "#" else (ROOT / target).is_file(), target


@pytest.mark.parametrize("kind, before, after", [("text", 0.45, 0.95), ("diffusion", -0.7, -0.35)])
def test_the_loss_pasted_into_another_loop_learns(kind, before, after):
    code, = (block for block in blocks("python") if f"{kind}: reward" in block)
    scope = {}
    exec(code, scope)                                                           # the repo root is on sys.path
    assert scope["history"][0] < before and scope["history"][-1] > after, scope["history"]


def test_the_judge_loads_and_scores_with_transformers_and_peft_alone(toy_run, tmp_path, monkeypatch):
    code, = (block for block in blocks("python") if "PeftModel" in block)
    assert "common" not in code
    lr, sr, *_ = make_images(5, 32, 48)
    write_png(tmp_path / "lr.png", lr)
    write_png(tmp_path / "sr.png", sr)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace("runs/demo/02_train_reward", str(toy_run / "02_train_reward")), scope)
    judge = mllm.load_judge(toy_run / "02_train_reward", torch.device("cpu"))
    assert judge.candidate_view == "clip" and (toy_run / "02_train_reward" / "judge" / "adapter").exists()
    assert scope["score"] == pytest.approx(float(mllm.expected_scores(judge, [lr], [[sr]])[0, 0, 2]), abs=1e-4)


def test_the_keys_to_watch_are_logged(toy_run):
    watched = README.split("## What is logged")[1].split("In 04:")[0]
    keys = set(re.findall(r"`(\w+)`", watched))
    lines = (toy_run / "02_train_reward" / "metrics.jsonl").read_text().splitlines()
    assert len(keys) > 4 and keys <= {key for line in lines for key in json.loads(line)}
