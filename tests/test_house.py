"""The house: data flows one way, and a file can be copied alone."""
import ast
import graphlib
import re
import subprocess
import sys

import pytest

import checkpoint
from conftest import ROOT, SOURCES
from eeg import disk

# who may import whom: each room what stands on a lower floor, a folder's files one another without a circle
FLOORS = {"modal_app": 5, "train": 4, "run": 3, "evaluate": 2, "scoring": 1, "data": 1, "eeg": 0, "model": 0, "checkpoint": 0}
MODULES = {name.removesuffix(".py").replace("/", "."): path for name, path in SOURCES.items() if "__init__" not in name}
# files whose public functions have type hints
HINTED = ("checkpoint.py", "eeg/edf.py", "model.py", "data.py")
ALONE = {"checkpoint": set(), "model": set(), "eeg.edf": set(), "eeg.synth": {"eeg.edf", "eeg.annotations"},
         "run.loop": {"checkpoint"}, "run.mirror": {"checkpoint"}}


def imported(path):
    """Our own modules that a file imports anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names & set(MODULES)


def room(module):
    return module.partition(".")[0]


@pytest.mark.parametrize("name", ["docs/house.md", "CONTRIBUTING.md"])
def test_the_line_that_tells_the_direction_is_the_one_that_is_tested(name):
    line = re.search(r"`(modal_app > [^`]*)`", (ROOT / name).read_text())[1]
    told = [set(floor.split(", ")) for floor in line.split(" > ")]
    heights = sorted(set(FLOORS.values()), reverse=True)
    assert told == [{room for room, height in FLOORS.items() if height == h} for h in heights]


def test_imports_inside_functions_and_under_other_names_are_seen(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import os, model as v3\n\ndef f():\n    from train import run\n    from eeg import edf\n    from run.watch import Watchdog\n")
    assert imported(path) == {"model", "train", "eeg.edf", "run.watch"}


def test_data_flows_one_way():
    arrows = {(room(name), room(other)) for name, path in MODULES.items() for other in imported(path)}
    upward = {(a, b) for a, b in arrows if a != b and FLOORS[b] >= FLOORS[a]}
    assert not upward, f"{sorted(upward)} run upward or sideways"


@pytest.mark.parametrize("name", ALONE)
def test_what_is_copied_alone_imports_nothing_of_ours(name):
    assert imported(MODULES[name]) <= ALONE[name]


def test_no_import_runs_in_a_circle():
    order = graphlib.TopologicalSorter({name: imported(path) for name, path in MODULES.items()})
    assert set(order.static_order()) == set(MODULES)        # raises CycleError, which names the circle


@pytest.mark.slow
def test_training_and_data_py_start_without_scipy_which_takes_a_second():
    code = "import sys, train, data; print([name for name in sys.modules if name.startswith('scipy')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_two_files_that_judge_errors_of_the_system_agree_which_of_them_last():
    assert checkpoint.LASTING == disk.LASTING


def unhinted(path):
    """Public functions of a file, and public methods of its public classes, that lack the type of an
    argument or of what they return."""
    found = []

    def look(body, owner):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                look(node.body, f"{node.name}.")
            elif (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                  and (node.name == "__init__" or not node.name.startswith("_"))):
                a = node.args
                given = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
                bare = [x.arg for x in given if x and not x.annotation and x.arg not in ("self", "cls")]
                if bare or not (node.returns or node.name == "__init__"):
                    found.append(f"{owner}{node.name}({', '.join(bare)})")

    look(ast.parse(path.read_text()).body, "")
    return found


def test_a_missing_type_is_found_in_arguments_and_in_what_is_returned(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("class A:\n    def __init__(self, x: int): ...\n    def f(self, y) -> int: ...\n    def _g(self, z): ...\n"
                    "def h(*rest: int): ...\ndef i(a: int, *, b: str = '') -> None: ...\n")
    assert unhinted(path) == ["A.f(y)", "h()"]


@pytest.mark.parametrize("name", HINTED)
def test_public_functions_of_what_others_copy_or_build_upon_have_type_hints(name):
    found = unhinted(ROOT / name)
    assert not found, f"{name}: {', '.join(found)}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_function_is_longer_than_forty_lines(path):
    """Its signature and docstring counted."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert not {name: lines for name, lines in long.items() if lines > 40}
