"""
The README: its commands parse, its files exist, its copy of the loss learns, every logged key is explained.

Run     python -m pytest tests/test_readme.py       # 1 min, most of it a toy run of 01, 02 and 04
"""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

from common import calibration, metrics, mllm, run
from common.config import STAGES, load_config
from common.images import write_png
from conftest import ROOT, load_stage, make_images, run_stage

README = (ROOT / "README.md").read_text()
FILE = r"[\w./-]+(/|\.(py|yaml|txt|md|jsonl?|png|html|pt|safetensors))"
SR_TOY = ("channels=32", "denoise_steps=4", "cold_start_steps=2", "cold_start_batch=2", "steps=1", "inputs_per_step=2",
          "samples_per_input=2", "window_width=2", "lora_rank=2", "eval_every=1", "eval_inputs=2")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def inline() -> list[str]:
    """Everything between single backticks outside of fenced blocks; line breaks inside become spaces."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]


def table(head: str) -> list[list[str]]:
    """Cells of the rows of the table whose head starts with `head`."""
    rows = README.split(f"\n{head}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def commands() -> list[list[str]]:
    """Every command of the README as words; a loop over the stages gives one command for each of them."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [text for text in inline() if text.startswith(("python ", "torchrun ", "for ", "pip ", "diff "))]
    found = []
    for line in lines:
        for part in re.split(r"&&|\|\||;", line.split("  #")[0]):
            own = shlex.split(part.removeprefix(" do "))
            looped = own[:2] == ["python", "$s"]
            found += [["python", f"{stem}.py", *own[2:]] for stem in STAGES] if looped else [own]
    return [command for command in found if command]


def test_the_two_commands_are_there():
    install = "pip install -r requirements.txt && "
    assert install + 'for s in 0[1-5]_*.py; do python "$s" configs/demo.yaml || break; done\n' in README
    assert install + "python -m pytest tests\n" in README
    assert [path.stem for path in sorted(ROOT.glob("0[1-5]_*.py"))] == list(STAGES)
    assert install + "python -m pytest tests\n" in (ROOT / ".ci/run").read_text()


def test_commands_name_scripts_configs_and_settings_that_exist():
    stages = set()
    for command in commands():
        program, *arguments = command
        if program in ("python", "torchrun") and any(word.endswith(".py") for word in arguments):
            place = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
            options, script, argv = arguments[:place], arguments[place], arguments[place + 1:]
            if options == ["-m", "pytest"]:
                assert (ROOT / script).is_file(), command
                continue
            assert all(option.startswith("--") for option in options), command
            assert (ROOT / script).is_file(), command
            if script.startswith("tests/"):
                continue
            stages.add(script)
            if argv != ["--help"]:
                argv[0] = str(ROOT / argv[0])
                stage = load_stage(script[:2])
                load_config(stage.Config, stage.__file__, argv)          # stops the test if it does not parse
        elif program == "pip":
            assert arguments == ["install", "-r", "requirements.txt"] and (ROOT / "requirements.txt").is_file()
        elif program == "diff":
            assert all((ROOT / path).is_file() for path in arguments), command
        else:
            known = (["python", "-m", "pytest", "tests"], ["python", "-m", "venv", ".venv"],
                     ["source", ".venv/bin/activate"], ["for", "s", "in", "0[1-5]_*.py"], ["break"], ["done"])
            assert command in known, command
    assert stages == {f"{stem}.py" for stem in STAGES}


@pytest.mark.parametrize("name", sorted({text for text in inline() if re.fullmatch(FILE, text)}))
def test_a_file_that_is_mentioned_exists_or_is_an_output_that_a_stage_documents(name):
    outputs = {stem: f"{inspect.getdoc(load_stage(stem[:2]))}\n{run.__doc__}" for stem in STAGES}
    if name.startswith("runs/"):
        _, _, stem, first, *_ = name.split("/")
        assert re.search(rf"(?<![\w/]){re.escape(first)}(?!\w)", outputs[stem]), f"{stem} does not write {first}"
    else:
        first = name.split("/")[0] + "/" * ("/" in name)
        assert (ROOT / name).exists() or any(first in text for text in outputs.values())


def test_pictures_exist_and_links_inside_the_page_have_a_heading():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) > 5 and all(target[1:] in anchors if target[0] == "#" else (ROOT / target).is_file()
                                    for target in targets), targets


@pytest.mark.parametrize("kind, before, after", [("text", 0.45, 0.95), ("diffusion", -0.7, -0.35)])
def test_the_loss_pasted_into_another_loop_learns(kind, before, after):
    code, = (block for block in blocks("python") if f"{kind}: reward" in block and "grpo_loss" in block)
    scope = {}
    exec(code, scope)                                                           # the repo root is on sys.path
    history = scope["history"]
    assert history[0] < before and history[-1] > after, history
    assert len(code.splitlines()) <= 36, "should stay short enough to read"


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
    assert (toy_run / "02_train_reward" / "judge" / "adapter").exists() and judge.candidate_view == "clip"
    found = calibration.apply(scope["maps"]["overall"]["knots"], scope["score"])
    assert scope["label"] == pytest.approx(float(found), abs=1e-6)
    assert scope["score"] == pytest.approx(float(mllm.expected_scores(judge, [lr], [[sr]])[0, 0, 2]), abs=1e-4)


def test_other_python_blocks_are_valid():
    for block in blocks("python"):
        ast.parse(block)


def documented(number: str) -> set[str]:
    """The keys of metrics.jsonl that the README explains for a stage."""
    return {key for row in table("| key | stage |") if number in row[1] for key in words(row[0])}


def logged(folder) -> set[str]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key for row in rows for key in row}


def test_every_key_of_02_is_explained(toy_run):
    assert logged(toy_run / "02_train_reward") | {"loss_rank"} == documented("02")      # of algorithm=sft_rank


def test_every_key_of_04_is_explained(toy_run, toy_config, tmp_path):
    folder = toy_run / "04_train_sr_grpo"
    if not (folder / "manifest.json").exists():
        for stem in ("01_build_dataset", "02_train_reward"):
            shutil.copytree(toy_run / stem, tmp_path / stem)
        done = run_stage("04", toy_config, f"run={tmp_path}", *SR_TOY)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / folder.name
    assert logged(folder) == documented("04")
    assert logged(folder / "cold_start") == {"step", "time", "loss", "grad_norm"}


def test_settings_that_are_mentioned_exist():
    fields = {stem[:2]: {field.name for field in dataclasses.fields(load_stage(stem[:2]).Config)}
              for stem in STAGES}
    for number, memory, result in table("| stage | memory or speed only |"):
        assert words(memory) and set(words(memory + result)) <= fields[number], number
    for text in inline():
        if match := re.fullmatch(r"([a-z_]+)(: \S.*|=)", text):                 # `hr_dir: null`, `run=`
            assert match[1] in set.union(*fields.values()), text


def test_the_formulas_of_the_proxy_have_the_constants_of_the_code():
    (_, _), (width, gain) = metrics.DETAIL_WIDTHS
    assert f"1 / (1 + E / {metrics.CONSISTENCY_SCALE})" in README
    assert f"exp(-d / {metrics.NATURALNESS_SCALE})" in README
    assert f"Gaussian of {width} px, gain {gain}" in README
    assert metrics.ENERGY_FLOOR == (4 / 255) ** 2 and "e = (4/255)^2" in README
    assert len(metrics.detail_energies(np.zeros((8, 8, 3)))) == 13 and "13 maps" in README


def test_numbers_are_filled_in_and_text_is_plain_ascii():
    assert README.isascii()
    assert re.findall(r"\{\{.*?\}\}", README) == [], "placeholders of measured numbers"
