"""
YAML as configs need it: small, flat, every key once, no aliases. What is wrong is a ValueError of one line.

Settings: the script's dataclass, overridden by a YAML file, overridden by `key=value` on the command line.

The YAML holds `run` and `seed` at the top, then one flat section per script, named after it. A value takes
the annotated type of its field, so `lr: 1e-4` is a number although YAML 1.1 reads text. Nothing is ignored.
"""
import ast
import contextlib
import dataclasses
import difflib
import io
import math
import sys
import tokenize
import types
import typing
from pathlib import Path

import yaml

LONGEST_CONFIG = 300_000                   # bytes; more is refused unread


def load_yaml(path: str) -> object:
    """What the file holds, as yaml.safe_load would say; ValueError that says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LONGEST_CONFIG + 1)
        if len(raw) > LONGEST_CONFIG:
            raise ValueError(f"over {LONGEST_CONFIG} bytes, so hardly a config file; give one like configs/demo.yaml")
        loader = yaml.SafeLoader(raw.decode("utf-8"))
        root = loader.get_single_node()
        refuse_twice(root, set())
        return None if root is None else loader.construct_document(root)
    except OSError as error:
        raise ValueError(f"cannot read the config file: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply for a config file; write run, seed and flat sections") from error
    except (UnicodeError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:  # the last three: odd tags
        raise ValueError(f"not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from error


def refuse_twice(node: yaml.Node | None, seen: set[int]) -> None:
    """
    Refuse a key that is given twice in one mapping (yaml.safe_load would keep the last in silence), and an alias,
    whose node comes twice: a config needs none, and a few lines of them can stand for gigabytes or for themselves.
    """
    if id(node) in seen:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias (*name) stands for this; write the value out")
    seen.add(id(node))
    keys = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
        if name in keys:
            raise ValueError(f"line {key.start_mark.line + 1}: '{name}' is given twice")
        keys.add(name)
        refuse_twice(key, seen)
        refuse_twice(value, seen)
    for item in node.value if isinstance(node, yaml.SequenceNode) else []:
        refuse_twice(item, seen)


STAGES = ("01_build_dataset", "02_train_reward", "03_eval_reward", "04_train_sr_grpo", "05_eval_sr")
SHARED = ("run", "seed")                        # the settings that all stages share: top level of the YAML
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LONGEST_LINE = 2_000                            # characters of an error
REQUIRED = "(required)"                         # what --help shows where a setting has no default
NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (quote it)"}


def fail(message: str) -> typing.NoReturn:
    """Print `error: <message>` as one line on stderr and exit with status 2; scripts say `run.fail`."""
    line = " ".join(message.splitlines())
    if len(line) > LONGEST_LINE:                # it quotes something huge
        line = f"{line[:LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2:]}"
    print("error: " + line, file=sys.stderr, flush=True)
    raise SystemExit(2)


def load_config(cls: type, script_path: str, argv: list[str] | None = None):
    """
    Return cls filled from `script.py CONFIG.yaml [key=value ...]`; argv defaults to the command line.

    Exits with status 2 and one line if a file, section, key or value is wrong; `--help` prints every setting.
    """
    argv = sys.argv[1:] if argv is None else argv
    stem = Path(script_path).stem
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, script_path))
        raise SystemExit(0)
    if not argv or "=" in argv[0]:
        fail(f"usage: python {stem}.py CONFIG.yaml [key=value ...]   (--help lists every setting)")
    hints = typing.get_type_hints(cls)
    values = {}
    for where, key, value in read_yaml(argv[0], stem) + read_overrides(argv[1:]):
        if key not in hints:
            fail(f"{where}: {stem}.py has no setting '{key}'; did you mean '{nearest(key, hints)}'? "
                 f"`python {stem}.py --help` lists all")
        try:
            values[key] = convert(value, hints[key])
        except ValueError as error:
            fail(f"{where}: {key} should be {error}, got {value!r}")
    for field in dataclasses.fields(cls):
        if field.name not in values and default_text(field) == REQUIRED:
            fail(f"{argv[0]}: '{field.name}' has no default: set it there or give {field.name}=...")
    try:
        return cls(**values)
    except (AssertionError, ValueError) as error:            # the checks of __post_init__
        fail(f"{argv[0]}: {stem}: {error}")


def read_yaml(path: str, stem: str) -> list[tuple]:
    """Return the (where, key, value) triples of `run`, `seed` and section `stem`, or stop with one line."""
    try:
        tree = load_yaml(path)
    except ValueError as error:
        fail(f"{path}: {error}")
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


def nearest(name: object, valid: typing.Iterable[str]) -> str:
    """Return the valid name most like `name`."""
    return difflib.get_close_matches(str(name)[:100], valid, n=1, cutoff=0.0)[0]


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


def save_config(cfg: object, path: Path, script_path: str) -> None:
    """Write cfg as a config file, whole or not at all; `script.py path` repeats the run."""
    values = dataclasses.asdict(cfg)
    tree = {key: values.pop(key) for key in SHARED}
    tree[Path(script_path).stem] = values
    temporary = Path(f"{path}.tmp")
    temporary.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="ascii")       # escapes: no character is lost
    temporary.replace(path)


def default_text(field: dataclasses.Field) -> str:
    """Return `= default` as shown by --help, or REQUIRED."""
    if field.default_factory is not dataclasses.MISSING:
        return f"= {field.default_factory()}"
    return REQUIRED if field.default is dataclasses.MISSING else f"= {field.default}"


def help_text(cls: type, script_path: str) -> str:
    """Return the script's docstring and one line per setting: name, type, default, meaning."""
    source = Path(script_path).read_text(encoding="utf-8")
    lines = [ast.get_docstring(ast.parse(source)) or "", "", "Settings (key=value on the command line):"]
    meaning = comments_of(cls, source)
    for field in dataclasses.fields(cls):
        kind = field.type.__name__ if field.type in NAMES else field.type
        lines.append(f"  {f'{field.name}: {kind} {default_text(field)}':<48}  {meaning[field.name]}".rstrip())
    return "\n".join(lines)


def comments_of(cls: type, source: str) -> dict[str, str]:
    """
    Return field -> comment from the text of the script that defines cls: the comment behind the field, deeper
    comment lines below it, and comment lines right above it, unless they end in dashes (headings).
    """
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    node = next(node for node in classes if node.name == cls.__name__)
    fields = {row: item.target.id for item in node.body if isinstance(item, ast.AnnAssign)
              for row in range(item.lineno, item.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {item.start[0]: item.string.lstrip("# ") for item in tokens if item.type == tokenize.COMMENT}
    meaning = {name: [] for name in fields.values()}
    name, above = None, []                                   # the last field seen; comment lines since then
    for row, line in enumerate(source.splitlines()[node.lineno:], node.lineno + 1):
        text = comments.get(row, "")
        if row in fields:
            name = fields[row]
            meaning[name] += above + [text]
            above = []
        elif line.strip() and row not in comments and name:
            break                                            # the first method, or the end of the class
        elif name and len(line) - len(line.lstrip()) > node.body[0].col_offset:
            meaning[name].append(text)
        elif not text.endswith("--"):
            above = above + [text] if text else []
    return {name: " ".join(filter(None, parts)) for name, parts in meaning.items()}
