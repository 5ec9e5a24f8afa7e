"""
Three rules that keep the repo readable: imports go down, common/ knows no script's settings, each name has one home.

Run     python -m pytest tests/test_house.py        # 1 s
"""
import ast
import graphlib
import sys

import pytest

from conftest import ROOT

ROOMS = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("common/*.py")) if path.stem != "__init__"}
FILES = ROOMS | {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("0*.py"))}


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, also of those inside functions; name "": the module itself."""
    nodes = list(ast.walk(tree))
    whole = [(alias.name, "") for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return whole + [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom)
                    for alias in node.names]


def rooms_below(stem: str) -> set[str]:
    """The rooms that a file imports."""
    return {name if module == "common" else module.removeprefix("common.")
            for module, name in imports(FILES[stem]) if module.partition(".")[0] == "common"}


def names_of(tree: ast.Module) -> set[str]:
    """What a file defines at its top level."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [node.targets if isinstance(node, ast.Assign) else [node.target] for node in tree.body
               if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return names | {name.id for target in sum(targets, []) for name in ast.walk(target) if isinstance(name, ast.Name)}


def test_imports_only_go_down():
    graph = {stem: rooms_below(stem) for stem in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())              # CycleError names the files
    assert set().union(*graph.values()) <= set(ROOMS)                   # so no script, and no file that is gone


@pytest.mark.parametrize("stem", ROOMS)
def test_no_function_of_common_takes_the_settings_of_a_script(stem):
    for node in ast.walk(ROOMS[stem]):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert "cfg" not in [parameter.arg for parameter in parameters], f"line {node.lineno}"


@pytest.mark.parametrize("stem", FILES)
def test_names_are_imported_from_their_home(stem):
    for module, name in imports(FILES[stem]):
        if module.startswith("common."):
            assert name in names_of(ROOMS[module.removeprefix("common.")]), f"{module} defines no {name}"


def test_the_losses_need_nothing_but_torch():
    assert {module.partition(".")[0] for module, _ in imports(ROOMS["grpo"])} <= {"torch", *sys.stdlib_module_names}
