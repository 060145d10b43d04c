"""The house: data flows one way, data -> model -> train -> checkpoint, and a file can be copied alone."""
import ast
import graphlib
import subprocess
import sys

import pytest

from conftest import ROOT

SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
ALONE = {"checkpoint": set(), "model": set(), "edf": set(), "synth": {"edf"}}


def imported(path):
    """Our own scripts that a file imports anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names & set(SCRIPTS)


def test_imports_inside_functions_and_under_other_names_are_seen(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import os, model as v3\n\ndef f():\n    from train import run\n")
    assert imported(path) == {"model", "train"}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_copied_alone_imports_nothing_of_ours(name):
    assert imported(SCRIPTS[name]) <= ALONE[name]


def test_nothing_imports_train_but_modal_app_and_benches():
    assert {name for name, path in SCRIPTS.items() if "train" in imported(path)} == {"modal_app"}


def test_no_import_runs_in_a_circle():
    order = graphlib.TopologicalSorter({name: imported(path) for name, path in SCRIPTS.items()})
    assert set(order.static_order()) == set(SCRIPTS)        # raises CycleError, which names the circle


def test_training_and_data_py_start_without_scipy_which_takes_a_second():
    code = "import sys, train, data; print([name for name in sys.modules if name.startswith('scipy')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
