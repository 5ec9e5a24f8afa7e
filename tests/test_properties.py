"""
Properties that have to hold for any input: parser, settings, degradation. hypothesis looks for counterexamples.

Run     python -m pytest tests/test_properties.py       # 15 s
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common import degrade, metrics, mllm
from common.config import config_text, load_config, read_yaml
from common.groups import load_groups
from common.images import read_image

FAST = settings(max_examples=40, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TARGETS = st.floats(0.6, 9.4) | st.just(float("nan"))
METHODS = st.lists(st.sampled_from([*mllm.FAULTS, "hr", "bicubic", ""]), max_size=3).map("+".join)
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
SCRIPT = "/anywhere/02_train_reward.py"


@dataclasses.dataclass
class Config:
    run: str
    seed: int = 0
    lr: float = 1e-4
    strict: bool = False
    name: str = "a"
    limit: float | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)


# parser ----------------------------------------------------------------------------------------------------

@FAST
@given(st.tuples(TARGETS, TARGETS, TARGETS).filter(lambda t: not np.isnan(t).all()), METHODS)
def test_what_is_composed_is_parsed(targets, method):
    reply = mllm.compose_reply(np.array(targets), method)
    known = np.nanmean(targets)
    wanted = [int(np.clip(np.round(known if np.isnan(t) else t), 1, 9)) for t in targets]
    assert reply.endswith("<|im_end|>")
    assert mllm.parse_reply(reply.removesuffix("<|im_end|>")) == dict(zip(metrics.AXES, wanted))


TAGS = ["<thinking>", "</thinking>", "<answer>", "</answer>", "consistency: ", "naturalness: ", "overall: ", ", ", "7",
        "\uff17", "\u0667", "<|im_end|>", "\n", "why"]


@FAST
@given(st.text() | st.lists(st.sampled_from(TAGS), max_size=14).map("".join))
@example("<thinking></thinking><answer>consistency: 1, naturalness: 9, overall: 5</answer>")
def test_any_text_has_three_scores_of_its_own_or_none(text):
    found = mllm.parse_reply(text)
    if found is not None:                                   # never a default: the digits are in the text, in order
        assert list(found) == list(metrics.AXES) and all(1 <= score <= 9 for score in found.values())
        answer = text[text.rindex("<answer>"):]
        assert [int(digit) for digit in re.findall("[0-9]", answer)] == list(found.values())
        assert text.count("<answer>") == text.count("<thinking>") == 1


@FAST
@given(st.integers(0, 78), st.characters(codec="utf-8"))
def test_one_changed_character_outside_the_reasoning_never_shifts_a_score(place, character):
    reply = "<thinking></thinking><answer>consistency: 1, naturalness: 9, overall: 5</answer>"
    changed = reply[:place] + character + reply[place + 1:]
    found = mllm.parse_reply(changed)
    assert found is None or [str(score) for score in found.values()] == re.findall("[1-9]", changed)


# settings --------------------------------------------------------------------------------------------------

FIELDS = {"run": TEXT, "seed": st.integers(), "lr": st.floats(allow_nan=False, allow_infinity=False),
          "strict": st.booleans(), "name": TEXT, "names": st.lists(TEXT, max_size=4),
          "limit": st.none() | st.floats(allow_nan=False, allow_infinity=False),
          "sizes": st.lists(st.integers(-2**70, 2**70), max_size=4)}


@FAST
@given(st.builds(Config, **FIELDS))
@example(Config(run="\u0085", name="no", names=["null", "1e-4", "2020-01-01", "~", " ", "a: b", "\u2028", "\ufeff"]))
def test_settings_come_back_as_they_were_saved(tmp_path, cfg):
    (tmp_path / "config.yaml").write_text(config_text(cfg, "02_train_reward"))
    assert load_config(Config, SCRIPT, [str(tmp_path / "config.yaml")]) == cfg


@FAST
@given(st.builds(Config, **FIELDS))
def test_numbers_and_text_come_back_from_the_command_line(tmp_path, cfg):
    (tmp_path / "config.yaml").write_text("run: a\n")
    given_ = [f"{key}={value}" for key, value in vars(cfg).items() if key not in ("names", "sizes", "limit")]
    again = load_config(Config, SCRIPT, [str(tmp_path / "config.yaml"), *given_])
    assert (again.run, again.seed, again.lr, again.strict, again.name) == (
        cfg.run, cfg.seed, cfg.lr, cfg.strict, cfg.name)


WORDS = ["run", "seed", "02_train_reward", ": ", ":", "- ", "\n", "  ", "\t", "[", "]", "{", "}", "&a ", "*a", "<<",
         "!!", "!!int ", "!!python/name:os.system", "? ", "|", ">", "'", '"', "---", "%", "#", ",", "1", "lr", ".nan"]
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary()
KEYS = st.sampled_from(["run", "seed", "lr", "02_train_reward", "name"]) | st.text(max_size=4)
TREES = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
                     max_leaves=8)


@FAST
@given(st.binary(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=25).map(lambda w: "".join(w).encode())
       | TREES.map(lambda tree: yaml.safe_dump(tree).encode()))
@example(b"run: a\n02_train_reward: {sizes: [[[1]]], names: {a: b}}")
@example(b"? {a: b}\n: c")
@example(b"!!set {a, a}")
@example(b"run: !!omap [1]")
@example(b"run: 1:99:99")
def test_any_yaml_is_read_or_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    capsys.readouterr()
    try:
        cfg = load_config(Config, SCRIPT, [str(path)])
    except SystemExit as stop:
        assert stop.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    else:                                                   # nothing was ignored
        told = {key: value for _, key, value in read_yaml(str(path), "02_train_reward")}
        assert told.keys() <= vars(cfg).keys() and "run" in told


# degradation, groups ---------------------------------------------------------------------------------------

@settings(FAST, max_examples=25)
@given(st.integers(0, 2**63 - 1), st.sampled_from(degrade.KINDS), st.sampled_from([2, 3, 4]), st.integers(3, 9),
       st.integers(3, 9))
def test_a_degradation_is_its_parameters(seed, kind, scale, rows, columns):
    image = np.random.default_rng(seed).integers(0, 256, (16 * scale + rows * scale, columns * scale + 32 * scale, 3),
                                                 dtype=np.uint8)
    params, kept = degrade.sample_params(seed, kind, scale), image.copy()
    assert params == json.loads(json.dumps(params)) == degrade.sample_params(seed, kind, scale)
    small = degrade.apply(image, params)
    assert small.dtype == np.uint8 and small.shape == (image.shape[0] // scale, image.shape[1] // scale, 3)
    assert small.tobytes() == degrade.apply(image, json.loads(json.dumps(params))).tobytes()
    assert np.array_equal(image, kept)                      # the input stays as it was


@FAST
@given(st.binary(max_size=80) | st.recursive(
    LEAF.filter(lambda leaf: not hasattr(leaf, "isoformat") and not isinstance(leaf, bytes)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["id", "split", "lr", "hr", "labels", "candidates"]), inner, max_size=6)
).map(lambda value: json.dumps(value).encode()))
def test_any_line_of_groups_is_refused_in_one_line(tmp_path, capsys, line):
    Path(tmp_path, "groups.jsonl").write_bytes(line + b"\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_groups(tmp_path, "train")
    assert stop.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


@FAST
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM",
                                                 b"II*\0", b"RIFF\x24\0\0\0WEBPVP8 ", b"P6 9 9 255\n"]))
def test_any_bytes_are_a_picture_or_refused(tmp_path, content, magic):
    (tmp_path / "a.png").write_bytes(magic + content)
    try:
        image = read_image(tmp_path / "a.png")
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
