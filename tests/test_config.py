"""
Settings: precedence, types, one-line refusals, --help, and the two YAMLs.

Run     python -m pytest tests/test_config.py       # 5 s
"""
import dataclasses
import importlib.util
import inspect
import random
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
class Config:
    run: str                        # folder of the run
    seed: int = 0
    steps: int = 10                 # optimizer steps,
                                    # over all GPUs
    lr: float = 1e-3                # step size
    strict: bool = False            # stop at the first bad image
    name: str = "none yet"          # a name
    sources: list[str] = field(default_factory=lambda: ["hr"])  # where from
    sizes: list[int] = field(default_factory=list)              # pixels
    limit: float | None = None      # largest value

    def __post_init__(self):
        assert self.steps > 0, f"steps is {self.steps}, should be above 0"
'''
STEM = "02_train_reward"


@pytest.fixture
def toy(tmp_path):
    """Return load(yaml text or bytes, *overrides) for a script called 02_train_reward.py in tmp_path."""
    script = tmp_path / f"{STEM}.py"
    script.write_text(TOY)
    spec = importlib.util.spec_from_file_location("toy_stage", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_stage"] = module
    spec.loader.exec_module(module)

    def load(text: str | bytes, *overrides: str):
        (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(module.Config, str(script), [str(tmp_path / "c.yaml"), *overrides])

    load.cls = module.Config
    return load


def refused(capsys, call) -> str:
    """Call has to stop with status 2 and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and re.fullmatch(r"error: [^\n]{1,2100}\n", err)
    return err


def test_precedence(toy):
    text = "run: a\nseed: 3\n02_train_reward:\n  steps: 20\n  name: b\n01_build_dataset:\n  steps: 99\n"
    cfg = toy(text, "steps=30")
    assert (cfg.run, cfg.seed, cfg.steps, cfg.name, cfg.lr) == ("a", 3, 30, "b", 1e-3)
    assert toy("run: a\n", "run=b", "seed=7").run == "b"
    assert toy("", "run=b").run == toy("run: b\n02_train_reward:\n").run == "b"    # empty file, empty section


@pytest.mark.parametrize("key, text, value", [
    ("lr", "1e-4", 1e-4), ("lr", "3", 3.0), ("steps", "7", 7), ("strict", "off", False), ("strict", "True", True),
    ("limit", "none", None), ("limit", "2.5", 2.5), ("name", "'1e-4'", "1e-4"), ("name", "a=b=c", "a=b=c"),
    ("sources", "rocket, camera", ["rocket", "camera"]), ("sizes", "64,32", [64, 32]), ("sources", "''", [])])
def test_values_take_the_type_of_their_field(toy, key, text, value):
    for cfg in (toy(f"run: a\n02_train_reward:\n  {key}: {text}\n"), toy("run: a\n", f"{key}={text.strip(chr(39))}")):
        assert (vars(cfg)[key], type(vars(cfg)[key])) == (value, type(value))


def test_yaml_lists_and_nothing(toy):
    cfg = toy("run: a\n02_train_reward: {sources: [a, 'b, c'], sizes: [3, '4'], limit: }")
    assert (cfg.sources, cfg.sizes, cfg.limit) == (["a", "b, c"], [3, 4], None)


@pytest.mark.parametrize("text, override, words", [
    ("run: a", "stepz=3", ["command line", "'stepz'", "'steps'", "--help"]),
    ("run: a\n02_train_rewards:\n  lr: 1", "", ["'02_train_rewards'", "'02_train_reward'"]),
    ("rum: a", "", ["'rum'", "'run'"]),
    ("run: a", "steps=1.5", ["steps", "whole number", "'1.5'"]),
    ("run: a\n02_train_reward: {steps: true}", "", ["steps", "whole number", "True"]),
    ("run: a\n02_train_reward: {name: 2020-01-01}", "", ["name", "text"]),
    ("run: a\n02_train_reward: {sizes: 3}", "", ["sizes", "list", "3"]),
    ("run: a\n02_train_reward: {lr: .inf}", "", ["lr", "finite number"]),
    ("run: a", "lr=1" + "0" * 400, ["lr", "finite number"]),
    ("run: a", "strict=2", ["strict", "true or false"]),
    ("run: a", "steps=0", ["command line", "steps is 0, should be above 0"]),
    ("run: a\n02_train_reward: {steps: 0}", "lr=1", ["c.yaml", "steps is 0, should be above 0"]),
    ("run: a", "steps", ["key=value", "'steps'"]),
    ("seed: 1", "", ["'run'", "run=..."]),
    ("run: a\n02_train_reward: {seed: 1}", "", ["02_train_reward", "seed", "top"]),
    ("run: a\n02_train_reward: 3", "", ["'02_train_reward'", "key: value", "3"]),
    ("- run", "", ["key: value", "list"]),
    (f"run: a\n02_train_reward: {{? {'x' * 100_000} : 1}}", "", ["no setting", "xxx ... "]),
    ("run: a\nrun: b", "", ["line 2", "'run'", "twice"]),
    ("run: a\n02_train_reward: {name: {a: 1, a: 2}}", "", ["line 2", "'a'", "twice"]),
    ("run: &a b\n02_train_reward: {name: *a}", "", ["line 2", "alias", "write the value out"]),
    ("run: a\n02_train_reward:\n\tsteps: 3", "", ["cannot be read as YAML", "line 3"]),
    ("run: !!python/object/apply:os.system [ls]", "", ["cannot be read as YAML"]),
    ("run: !!timestamp x", "", ["cannot be read as YAML"]),
    ("run: 2020-99-99", "", ["cannot be read as YAML", "month"]),
    ("run: " + "[" * 5_000, "", ["cannot be read as YAML"]),
    ("run: [" + "1, " * 100_000 + "]", "", ["over 300000 bytes"]),
    (bytes(range(256)), "", ["cannot be read as YAML"]),
])
def test_mistakes_stop_with_one_line(toy, capsys, text, override, words):
    line = refused(capsys, lambda: toy(text, *[override] if override else []))
    assert all(word in line for word in words), line


def test_a_file_that_cannot_be_read_stops_with_one_line(toy, capsys, tmp_path):
    for arguments in ([], ["run=a"], [str(tmp_path / "no.yaml")], [str(tmp_path)]):
        refused(capsys, lambda: load_config(toy.cls, f"{STEM}.py", arguments))


def test_any_yaml_is_read_or_refused_in_one_line(toy, capsys):
    rng = random.Random(0)
    words = ["run", "seed", STEM, ": ", ":", "- ", "\n", "  ", "\t", "[", "]", "{", "}", "&a ", "*a", "<<", "!!", "? ",
             "!!int ", "!!set ", "|", ">", "'", '"', "---", "%", "#", ",", "1", "lr", ".nan", "\x00", "\u0085", "1:99"]
    for _ in range(500):
        text = "".join(rng.choices(words, k=rng.randrange(20)))
        try:
            toy("run: a\n" + text)
        except SystemExit:
            assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err), text


def test_help_is_the_text_of_the_script(toy, capsys):
    with pytest.raises(SystemExit) as stop:
        toy("", "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("Toy stage for the tests.\n\nSecond paragraph.\n")
    assert "    steps: int = 10                 # optimizer steps,\n" in text
    assert text.rstrip().endswith("limit: float | None = None      # largest value")


@pytest.mark.parametrize("text", ["\u0085", "no", "1e-4", "2020-01-01", "~", " ", "a: b", "\ufeff", "'ü' # no"])
def test_saved_settings_come_back(toy, text):
    cfg = toy.cls(run=text, seed=-(2**70), lr=1e-300, strict=True, name=text, sources=[text, "null"], sizes=[2**70],
                  limit=-0.0)
    saved = config_text(cfg, STEM)
    assert toy(saved) == cfg and list(yaml.safe_load(saved)) == ["run", "seed", STEM]


# the real configs and scripts ------------------------------------------------------------------------------

@pytest.mark.parametrize("stem", STAGES)
def test_both_configs_load_and_have_the_same_keys_in_the_same_order(stem):
    stage, keys = load_stage(stem[:2]), []
    for name in ("demo", "full"):
        path = ROOT / "configs" / f"{name}.yaml"
        assert load_config(stage.Config, stage.__file__, [str(path)]).run == f"runs/{name}"
        tree = yaml.safe_load(path.read_text())
        assert list(tree) == ["run", "seed", *STAGES]
        keys.append(list(tree[stem] or {}))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("stem", STAGES)
def test_every_setting_is_used_and_explained(stem):
    """The script itself reads it, and its comment stands behind it or on a deeper line below it, for --help."""
    config = load_stage(stem[:2]).Config
    source, script = inspect.getsource(config), (ROOT / f"{stem}.py").read_text()
    for field in dataclasses.fields(config):
        assert field.name == "run" or re.search(rf"\.{field.name}\b", script), f"{field.name} is never read"
        explained = re.search(rf"(?m)^    {field.name}: .*(#|\n {{8}}.*#)", source)
        assert explained or field.name == "seed", f"{field.name} has no comment, so --help cannot explain it"
