"""
Settings: precedence, types, one-line refusals, --help, and the two YAMLs.

Run     python -m pytest tests/test_config.py       # 10 s
"""

import dataclasses
import importlib.util
import inspect
import re
import sys

import pytest
import yaml

from common.config import STAGES, config_text, load_config
from conftest import ROOT, load_stage

TOY = '''"""
Toy stage for the tests.

Second paragraph.
"""
from dataclasses import dataclass, field


@dataclass
class Config:                       # every setting of this script
    run: str                        # folder of the run
    seed: int = 0
    # sizes -----------------------------------------------------------------
    steps: int = 10                 # optimizer steps,
                                    # over all GPUs
    # step size at the start
    lr: float = 1e-3
    strict: bool = False            # stop at the first bad image
    name: str = "none yet"          # a name
    sources: list[str] = field(default_factory=lambda: ["hr"])  # where from
    sizes: list[int] = field(default_factory=list)              # pixels
    limit: float | None = None      # largest value

    def __post_init__(self):
        # this comment belongs to no setting
        assert self.steps > 0, f"steps is {self.steps}, should be above 0"


OTHER = 1                           # nor does this one
'''


@pytest.fixture
def toy(tmp_path):
    """Return load(yaml_text, *overrides) for a script called 02_train_reward.py in tmp_path."""
    script = tmp_path / "02_train_reward.py"
    script.write_text(TOY)
    spec = importlib.util.spec_from_file_location("toy_stage", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_stage"] = module
    spec.loader.exec_module(module)

    def load(text: str, *overrides: str):
        (tmp_path / "c.yaml").write_text(text)
        return load_config(module.Config, str(script), [str(tmp_path / "c.yaml"), *overrides])

    load.script, load.cls = script, module.Config
    return load


def test_precedence(toy):
    text = "run: a\nseed: 3\n02_train_reward:\n  steps: 20\n  name: b\n01_build_dataset:\n  steps: 99\n"
    cfg = toy(text, "steps=30")
    assert (cfg.run, cfg.seed, cfg.steps, cfg.name, cfg.lr) == ("a", 3, 30, "b", 1e-3)
    assert toy("run: a\n", "run=b", "seed=7").run == "b"
    assert toy("", "run=b").run == toy("run: b\n02_train_reward:\n").run == "b"    # empty file, empty section


@pytest.mark.parametrize("key, text, value", [
    ("lr", "1e-4", 1e-4), ("lr", "1e4", 1e4), ("lr", "3", 3.0), ("lr", "-.5", -0.5), ("steps", "7", 7),
    ("strict", "true", True), ("strict", "False", False), ("strict", "yes", True), ("strict", "off", False),
    ("limit", "none", None), ("limit", "null", None), ("limit", "2.5", 2.5), ("name", "a=b=c", "a=b=c"),
    ("name", "1e-4", "1e-4"), ("sources", "rocket, camera", ["rocket", "camera"]), ("sources", "", []),
    ("sources", "one", ["one"]), ("sizes", "64,32", [64, 32]),
])
def test_command_line_values_take_the_type_of_their_field(toy, key, text, value):
    found = vars(toy("run: a\n", f"{key}={text}"))[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("key, text, value", [
    ("lr", "1e-4", 1e-4), ("lr", "1e4", 1e4), ("lr", "3", 3.0), ("steps", "7", 7), ("strict", "true", True),
    ("strict", "off", False), ("limit", "", None), ("limit", "none", None), ("limit", "1e-4", 1e-4),
    ("name", "'1e-4'", "1e-4"), ("name", "a=b", "a=b"), ("sources", "[a, 'b, c']", ["a", "b, c"]),
    ("sources", "one", ["one"]), ("sizes", "[3, '4']", [3, 4]), ("sizes", "[]", []),
])
def test_yaml_values_take_the_type_of_their_field(toy, key, text, value):
    found = vars(toy(f"run: a\n02_train_reward:\n  {key}: {text}\n"))[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text, overrides, words", [
    ("run: a", ["stepz=3"], ["command line", "'stepz'", "'steps'", "--help"]),
    ("run: a\n02_train_reward:\n  learning: 1", [], ["02_train_reward", "'learning'"]),
    ("run: a\n02_train_rewards:\n  lr: 1", [], ["'02_train_rewards'", "'02_train_reward'"]),
    ("rum: a", [], ["'rum'", "'run'"]),
    ("run: a", ["steps=ten"], ["steps", "whole number", "'ten'"]),
    ("run: a", ["steps=1.5"], ["steps", "whole number"]),
    ("run: a\n02_train_reward:\n  steps: 2.0", [], ["steps", "whole number", "2.0"]),
    ("run: a\n02_train_reward:\n  steps: true", [], ["steps", "whole number", "True"]),
    ("run: a\n02_train_reward:\n  steps:", [], ["steps", "whole number", "None"]),
    ("run: a\n02_train_reward:\n  steps: {a: 1}", [], ["steps", "whole number"]),
    ("run: a\n02_train_reward:\n  name: 12", [], ["name", "text", "12"]),
    ("run: a\n02_train_reward:\n  sizes: [1, x]", [], ["sizes", "whole number"]),
    ("run: a\n02_train_reward:\n  sizes: 3", [], ["sizes", "list", "3"]),
    ("run: a", ["lr=nan"], ["lr", "finite number"]),
    ("run: a", ["lr=1" + "0" * 400], ["lr", "finite number"]),
    ("run: a", ["steps=1" + "0" * 400], ["steps", "whole number"]),
    ("run: a", ["strict=2"], ["strict", "true or false"]),
    ("run: a", ["steps=0"], ["steps is 0, should be above 0"]),
    ("run: a", ["steps"], ["key=value", "'steps'"]),
    ("seed: 1", [], ["'run'", "run=..."]),
    ("run: a\nrun: b", [], ["line 2", "'run'", "twice"]),
    ("run: a\n02_train_reward:\n  lr: 1\n  lr: 2", [], ["line 4", "'lr'", "twice"]),
    ("run: a\n02_train_reward:\n  seed: 1", [], ["02_train_reward", "seed", "top"]),
    ("run: a\n02_train_reward: 3", [], ["'02_train_reward'", "key: value", "3"]),
    ("- run", [], ["key: value", "list"]),
    ("run: [a\nseed: 1", [], ["cannot be read as YAML"]),
    ("run: a\n\tseed: 1", [], ["cannot be read as YAML"]),
    ("run: a\n---\nrun: b", [], ["cannot be read as YAML"]),
    ("run: a\nrun: \x00", [], ["cannot be read as YAML"]),
    ("run: !!python/object:os.system ls", [], ["cannot be read as YAML"]),
])
def test_mistakes_stop_with_one_line(toy, capsys, text, overrides, words):
    with pytest.raises(SystemExit) as stop:
        toy(text, *overrides)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert all(word in err for word in words), err


def test_a_file_that_cannot_be_read_stops_with_one_line(toy, capsys, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    paths = [tmp_path / "no.yaml", tmp_path, tmp_path / "binary.yaml"]
    for arguments in ([], ["run=a"], *([str(path)] for path in paths)):
        with pytest.raises(SystemExit) as stop:
            load_config(toy.cls, str(toy.script), arguments)
        assert stop.value.code == 2
        assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_help_is_the_text_of_the_script(toy, capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(toy.cls, str(toy.script), ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("Toy stage for the tests.\n\nSecond paragraph.\n")
    assert "    steps: int = 10                 # optimizer steps,\n" in text
    assert text.rstrip().endswith("limit: float | None = None      # largest value")


def test_a_saved_config_is_accepted_back(toy, tmp_path):
    cfg = toy("run: a", "seed=5", "lr=1e-7", "name=yes: 'ü' # no", "sources=1,null", "sizes=3", "strict=on")
    (tmp_path / "saved.yaml").write_text(config_text(cfg, toy.script.stem))
    assert load_config(toy.cls, str(toy.script), [str(tmp_path / "saved.yaml")]) == cfg
    assert list(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == ["run", "seed", "02_train_reward"]


# the real configs and scripts ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["demo", "full"])
@pytest.mark.parametrize("stem", STAGES)
def test_both_configs_load_for_all_scripts(stem, name):
    stage = load_stage(stem[:2])
    cfg = load_config(stage.Config, stage.__file__, [str(ROOT / "configs" / f"{name}.yaml")])
    assert cfg.run == f"runs/{name}"


def test_both_configs_have_the_same_keys_in_the_same_order():
    demo, full = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for name in ("demo", "full"))
    assert list(demo) == list(full) == ["run", "seed", *STAGES]
    for stem in STAGES:
        assert list(demo[stem] or {}) == list(full[stem] or {}), stem


@pytest.mark.parametrize("stem", STAGES)
def test_every_setting_is_used_and_explained(stem):
    """Its comment stands behind it or on a deeper line below it; --help shows nothing else."""
    source = (ROOT / f"{stem}.py").read_text()
    readers = source + "".join(path.read_text() for path in ROOT.glob("common/*.py"))
    text = inspect.getsource(load_stage(stem[:2]).Config)
    for field in dataclasses.fields(load_stage(stem[:2]).Config):
        assert field.name == "run" or re.search(rf"\.{field.name}\b", readers), f"{field.name} is never read"
        explained = re.search(rf"(?m)^    {field.name}: .*(#|\n {{8}}.*#)", text)
        assert explained or field.name == "seed", f"{field.name} has no comment, so --help cannot explain it"
