"""
Settings: the script's dataclass, overridden by a YAML file, overridden by `key=value` on the command line.

The YAML holds `run` and `seed` at the top, then one flat section per script, named after it. A value takes
the annotated type of its field, so `lr: 1e-4` is a number although YAML 1.1 reads text. Nothing is ignored.
"""
import contextlib
import dataclasses
import difflib
import inspect
import math
import re
import sys
import types
import typing
from pathlib import Path

import yaml
from tqdm import tqdm

STAGES = ("01_build_dataset", "02_train_reward", "03_eval_reward", "04_train_sr_grpo", "05_eval_sr")
SHARED = ("run", "seed")                        # the settings that all stages share: top level of the YAML
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (quote it)"}
LONGEST_CONFIG = 300_000                        # bytes; a larger file is hardly a config
LONGEST_LINE = 2_000                            # characters of an error


def fail(message: str) -> typing.NoReturn:
    """Print `error: <message>` as one line on stderr and exit with status 2."""
    line = " ".join(message.splitlines())
    if len(line) > LONGEST_LINE:                # it quotes something huge
        line = f"{line[:LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2:]}"
    tqdm.write("error: " + line, file=sys.stderr)       # on a line of its own, also below a progress bar
    sys.stderr.flush()
    raise SystemExit(2)


def nearest(name: object, valid: typing.Iterable[str]) -> str:
    """Return the valid name most like `name`."""
    return difflib.get_close_matches(str(name)[:100], valid, n=1, cutoff=0.0)[0]


def load_config(cls: type, script_path: str, argv: list[str] | None = None):
    """
    Return cls filled from `script.py CONFIG.yaml [key=value ...]`; argv defaults to the command line.

    Exits with status 2 and one line if a file, section, key or value is wrong. `--help` prints the script's docstring
    and the text of cls, whose comments explain the settings.
    """
    argv = sys.argv[1:] if argv is None else argv
    stem = Path(script_path).stem
    if "--help" in argv or "-h" in argv:
        settings = inspect.getsource(cls).split("    def ")[0]          # without __post_init__
        print(inspect.getdoc(sys.modules[cls.__module__]), settings, sep="\n\n\n")
        raise SystemExit(0)
    if not argv or "=" in argv[0]:
        fail(f"usage: python {stem}.py CONFIG.yaml [key=value ...]   (--help lists every setting)")
    hints = typing.get_type_hints(cls)
    values, overrides = {}, read_overrides(argv[1:])
    for where, key, value in read_yaml(argv[0], stem) + overrides:
        if key not in hints:
            fail(f"{where}: {stem}.py has no setting '{key}'; did you mean '{nearest(key, hints)}'? "
                 f"`python {stem}.py --help` lists all")
        try:
            values[key] = convert(value, hints[key])
        except ValueError as error:
            fail(f"{where}: {key} should be {error}, got {value!r}")
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            fail(f"{argv[0]}: '{field.name}' has no default: set it there or give {field.name}=...")
    try:
        return cls(**values)
    except (AssertionError, ValueError) as error:            # the checks of __post_init__
        typed = any(re.search(rf"\b{key}\b", str(error)) for _, key, _ in overrides)
        fail(f"{'command line' if typed else argv[0]}: {stem}: {error}")


class StrictLoader(yaml.SafeLoader):
    """yaml.safe_load, but a key that is given twice is an error, and so is an alias: a few can stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"line {self.peek_event().start_mark.line + 1}: an alias (*name): write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise ValueError(f"line {key.start_mark.line + 1}: '{key.value}' is given twice")
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, stem: str) -> list[tuple]:
    """Return the (where, key, value) triples of `run`, `seed` and section `stem`, or stop with one line."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LONGEST_CONFIG + 1)
        if len(raw) > LONGEST_CONFIG:
            raise ValueError(f"over {LONGEST_CONFIG} bytes; give a file like configs/demo.yaml")
        tree = yaml.load(raw.decode("utf-8"), StrictLoader)
    except Exception as error:                              # odd bytes and tags raise errors of many types
        fail(f"{path}: cannot be read as YAML: {' '.join(str(error).split()) or type(error).__name__}")
    if tree is not None and not isinstance(tree, dict):
        fail(f"{path}: expected `key: value` lines (run, seed and sections), got {type(tree).__name__}")
    triples = []
    for name, value in (tree or {}).items():
        if name in SHARED:
            triples.append((path, name, value))
        elif name not in STAGES:
            fail(f"{path}: unknown section '{name}'; did you mean '{nearest(name, SHARED + STAGES)}'?")
        elif value is not None and not isinstance(value, dict):
            fail(f"{path}: section '{name}' should hold `key: value` lines, got {value!r}")
        elif set(SHARED) & set(value or {}):
            fail(f"{path}: section '{name}': {' and '.join(SHARED)} belong at the top of the file")
        elif name == stem:
            triples += [(f"{path}: {name}", key, item) for key, item in (value or {}).items()]
    return triples


def read_overrides(arguments: list[str]) -> list[tuple]:
    """Return the (where, key, value) triples of `key=value` arguments; the value may itself hold `=`."""
    for argument in arguments:
        if "=" not in argument:
            fail(f"command line: expected key=value, got '{argument}'")
    return [("command line", *argument.split("=", 1)) for argument in arguments]


def convert(value: object, kind: type) -> object:
    """
    Return value (text, or what YAML made of it) as kind: int, float, bool, str, list[...] or X | None.

    Raises ValueError whose text names what was expected.
    """
    if isinstance(kind, types.UnionType):
        if value is None or value in ("none", "None", "null"):
            return None
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list):
            raise ValueError(f"a list, each {NAMES[item]}")
        return [convert(part, item) for part in value]
    if isinstance(value, bool) or kind is bool:
        if kind is bool and str(value).lower() in BOOLS:     # True, "true" and "yes" alike
            return BOOLS[str(value).lower()]
    elif kind is str and isinstance(value, str):
        return value
    elif kind in (int, float) and isinstance(value, (int, kind, str)):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(value)):
                return number
    raise ValueError(NAMES[kind])


def config_text(settings: object, stem: str) -> str:
    """Return settings as the text of a config file, in ASCII; `script.py FILE` with it repeats the run."""
    values = dataclasses.asdict(settings)
    tree = {key: values.pop(key) for key in SHARED}
    return yaml.safe_dump(tree | {stem: values}, sort_keys=False)
