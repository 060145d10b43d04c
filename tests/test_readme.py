"""The README tells the truth: its commands exist, and its measured figures stand in bench/RESULTS.md."""
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "bench" / "RESULTS.md").read_text()
MEASURED = re.findall(r"<!-- measured: (\w+) -->(.*?)<!-- end -->", README, re.S)


def section(name):
    return re.search(rf"^## {name}$(.*?)(?=^## |\Z)", RESULTS, re.S | re.M)[1]


def numbers(text):
    return [n.replace(",", "") for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)]


@pytest.mark.parametrize("name, text", MEASURED, ids=[name for name, _ in MEASURED])
def test_every_figure_of_a_measured_block_stands_in_the_results(name, text):
    known = set(numbers(section(name)))
    missing = [n for n in numbers(text) if n not in known]
    assert numbers(text) and not missing, f"README figures that bench/{name}.py did not print: {missing}"


def test_the_readme_quotes_every_section_of_the_results_and_every_section_has_its_script():
    sections = re.findall(r"^## (\w+)$", RESULTS, re.M)
    assert sections and {name for name, _ in MEASURED} <= set(sections)
    for name in sections:
        assert (ROOT / "bench" / f"{name}.py").exists()


def commands():
    for line in README.splitlines():
        if line.startswith("    ") and "python " in line:
            yield re.split(r" {3,}#", line.split("&& ")[-1].strip())[0]


@pytest.mark.parametrize("command", [c for c in commands() if ".py" in c])
def test_files_and_flags_of_the_readme_exist(command):
    script, *arguments = command.split()[command.split().index("python") + 1:]
    text = (ROOT / script).read_text()
    for argument in arguments:
        if argument.startswith("--") or argument.startswith("[--"):
            flag = argument.strip("[]").split("=")[0]
            assert f'"{flag}"' in text, f"{script} has no {flag}"
        if argument.startswith("configs/"):
            assert (ROOT / argument).exists()


def test_every_script_explains_itself():
    for script in ("train.py", "data.py", "evaluate.py", "checkpoint.py"):
        done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout
