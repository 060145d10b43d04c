"""README.md and docs/*.md tell the truth: their commands exist, their files and keys are there, and
their measured figures stand in bench/RESULTS.md."""
import ast
import contextlib
import re
import shutil
import sys

import pytest
import yaml

import train            # it hands the tables of model.py and evaluate.py to run/config.py  # noqa: F401
from run import config
import checkpoint
import forked
import model
from conftest import ROOT, SHARED, SOURCES
from crash import docstring_loop

README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
OTHERS = [(ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
DOCS = "\n".join([README, *PAGES.values(), *OTHERS])        # what a user reads, as one text
RESULTS = (ROOT / "bench" / "RESULTS.md").read_text()
MEASURED = re.findall(r"<!-- measured: (\w+) -->(.*?)<!-- end -->", DOCS, re.S)


def section(name):
    return re.search(rf"^## {name}$(.*?)(?=^## |\Z)", RESULTS, re.S | re.M)[1]


def numbers(text):
    return [n.replace(",", "") for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)]


@pytest.mark.parametrize("name, text", MEASURED, ids=[name for name, _ in MEASURED])
def test_every_figure_of_a_measured_block_stands_in_the_results(name, text):
    known = set(numbers(section(name)))
    missing = [n for n in numbers(text) if n not in known]
    assert numbers(text) and not missing, f"figures that bench/{name}.py did not print: {missing}"


def test_the_documents_quote_every_section_of_the_results_and_every_section_has_its_script():
    sections = re.findall(r"^## (\w+)$", RESULTS, re.M)
    assert sections and {name for name, _ in MEASURED} <= set(sections)
    for name in sections:
        script = re.match(r"\n\n`python bench/(\w+\.py)", section(name))[1]
        assert (ROOT / "bench" / script).exists()


def joined():
    """Lines of all documents, those that end with a backslash as one."""
    return DOCS.replace("\\\n", " ").splitlines()


def commands():
    for line in joined():
        for start in ("python ", "train.py "):
            if line.startswith("    ") and start in line:
                words = line[line.index(start):].removeprefix("python ")
                yield re.split(r" {3,}#|;", words.split("&& python ")[-1].strip())[0]
                break


@pytest.mark.parametrize("command", [c for c in commands() if ".py" in c.split()[0]])
def test_files_and_flags_of_the_documents_exist(command):
    script, *arguments = command.split()
    text = (ROOT / script).read_text()
    for argument in arguments:
        if argument.startswith("--") or argument.startswith("[--"):
            flag = argument.strip("[]").split("=")[0]
            assert f'"{flag}"' in text, f"{script} has no {flag}"
        if argument.startswith("configs/"):
            assert (ROOT / argument).exists()


@pytest.mark.parametrize("flag, script", [
    (flag, script)
    for line in joined() if line.startswith("    modal run ")
    for script in re.findall(r"(\w+\.py)", line)[:1]
    for flag in re.findall(r" --(\w+) ", line.split(script)[1])])
def test_arguments_of_modal_commands_are_those_of_the_entry_point(flag, script):
    assert f'add("--{flag}"' in (ROOT / script).read_text()


def test_flags_named_in_the_text_belong_to_a_command_and_paths_to_a_file():
    code = "".join(p.read_text() for p in [*SOURCES.values(), *ROOT.glob("bench/*.py"), ROOT / "tests/conftest.py"])
    others = {"--detach", "--force", "--max-restarts", "--no-deps"}      # of modal and torchrun
    for flag in set(re.findall(r"`(--[a-z-]+)", DOCS)) - others:
        assert f'"{flag}"' in code or f"{flag[2:]}: Literal" in code, f"no command has {flag}"
    for path in set(re.findall(r"\b(?:bench|configs|deploy|docs|tests)/[\w@./-]*\w", DOCS)):
        assert (ROOT / path).exists(), f"a document names {path}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{stem}.md" for stem in PAGES)])
def test_every_link_leads_to_a_file(name):
    path = ROOT / name
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{name} links to {link}"


def test_every_page_is_named_in_the_readme():
    assert not [stem for stem in PAGES if f"(docs/{stem}.md)" not in README]


def test_the_readme_is_short_and_its_commands_stand_in_its_first_twenty_lines():
    assert len(README.encode()) <= 12_000
    first = "\n".join(README.splitlines()[:20])
    assert "pip install -r requirements.txt && python train.py" in first and "python -m pytest" in first


def listed(text):
    """Files and folders of the blocks below "Where things are", in which a name begins a line or follows ";"."""
    block = text.split("\n## Where things are\n")[1].split("\n## ")[0]
    lines = [line for line in block.splitlines() if line.startswith("    ")]
    return [part.split()[0] for line in lines for part in line.split(";  ")]


@pytest.mark.parametrize("text", [README, PAGES["house"]], ids=["README.md", "docs/house.md"])
def test_what_stands_in_where_things_are_exists_and_stands_there_once(text):
    names = listed(text)
    absent = [name for name in names if not (ROOT / name).exists()]
    assert not absent, f"named and not there: {absent}"
    assert len(set(names)) == len(names)


def test_every_file_of_the_program_has_its_line_in_the_page_about_the_house():
    absent = {name for name in SOURCES if "__init__" not in name} - set(listed(PAGES["house"]))
    assert not absent, f"add a line to docs/house.md for {', '.join(sorted(absent))}"
    scripts = {name for name in SOURCES if "/" not in name}
    assert scripts <= set(listed(README))


def first_cells(heading, page):
    """Names in backquotes in the first column of the table below a heading of a page."""
    text = PAGES[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [name for cell in re.findall(r"^\| (`[^|]*) \|", text, re.M) for name in re.findall(r"`([^`]*)`", cell)]


def test_the_keys_of_a_state_are_those_that_training_packs():
    pack = next(node for node in ast.walk(ast.parse((ROOT / "train.py").read_text()))
                if isinstance(node, ast.FunctionDef) and node.name == "pack")
    returned = next(node.value for node in ast.walk(pack) if isinstance(node, ast.Return))
    assert sorted(key.value for key in returned.keys) == sorted(first_cells("What a state holds", "house"))


def test_every_exit_code_of_the_training_is_in_the_table():
    table = PAGES["checkpoints"].split("| exit code | meaning |")[1]
    codes = re.findall(r"^\| ([\d+N]+) \|", table, re.M)
    assert codes == ["0", "1", "2", "70", "75", "128+N"]


def test_the_table_of_exit_codes_is_that_of_the_contract(shared):
    line = re.search(r"^- Exit codes: (.*)$", (SHARED / "DESIGN.md").read_text(), re.M)[1]
    table = PAGES["checkpoints"].split("| exit code | meaning |")[1]
    for code in re.findall(r"(?:^|; )(128\+N|\d+) ", line):
        assert f"\n| {code} |" in table


def test_every_configuration_key_of_the_documents_exists_and_has_the_default_that_stands_there():
    sections = "|".join(config.DEFAULTS)
    named = set(re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z]\w*)(?![\w(/.])", DOCS))
    files = {path.name for path in SOURCES.values()}
    named = {name for name in named if name not in files}
    assert len(named) > 10
    assert not named - set(config.KEYS), f"no such keys: {sorted(named - set(config.KEYS))}"
    for name, value in re.findall(rf"`((?:{sections})\.\w+)` = (\w[\w.]*\w|\w)", DOCS):
        assert config.KEYS[name].default == yaml.safe_load(value), name


def constants(script):
    """Names and values of the literals that a script assigns at its top level."""
    found = {}
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Assign):
            names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            with contextlib.suppress(ValueError):
                value = ast.literal_eval(node.value)
                values = value if isinstance(node.targets[0], ast.Tuple) else [value]
                found |= {name.id: v for name, v in zip(names, values)}
    return found


def test_prices_limits_and_volumes_of_the_modal_chapter_are_those_of_the_code():
    text = " ".join(PAGES["modal"].split())
    c = constants("modal_app.py") | constants("run/attempts.py")
    dollars = c["DOLLARS"]
    machine = c["CPU"] * dollars["core"] + c["MEMORY"] * dollars["GiB"]
    hour = dollars[c["GPU"]] + machine
    assert f"about ${hour:.2f} an hour, ${24 * hour:.0f} a day" in text
    assert f"costs at most about ${c['SMOKE_TIMEOUT'] * hour:.2f}: it is cut off after {60 * c['SMOKE_TIMEOUT']:.0f} minutes" in text
    assert f"on an L4 about ${dollars['L4'] + machine:.2f} an hour" in text
    assert f"without a GPU, about ${machine:.2f} an hour" in text
    for name, price in re.findall(r"(\w[\w-]*) \$([\d.]+)(?=[,.] )", text.split("Cards an hour: ")[1].split("Other")[0]):
        assert dollars[name] == float(price), name
    assert c["EVALUATE_GPU"] == "L4" and c["DOLLARS_AS_OF"] in text
    assert f"{c['GPU']} with {c['CPU']} cores and {c['MEMORY']} GiB" in text
    assert f"{c['TIMEOUT']} h limit | saves {60 * c['MARGIN']:.0f} minutes before it" in text
    assert f"{c['RETRIES']} times ({c['RETRIES'] + 1} days in all)" in text
    assert f"waits up to {c['GRACE']} s" in text and f"within {c['SHORT']} minutes" in text
    assert f"waits {c['SETTLE']} s and looks again" in text and f"asked up to {c['GPU_TRIES']} times" in text
    assert f"asked again for {c['PATIENCE'] / 60:.0f} minutes" in text and c["COMMIT_EVERY"] == 60
    grace = constants("run/acceptance.py")["GRACE"]
    assert f"beyond {grace / 2 - 1:.0f} s is a fault" in text and f"leaves {grace} s" in text
    assert (c["STUCK"], c["SHORT_DEATHS"]) == (3, 10)           # in words there
    for minutes in re.findall(r"(\d+) minutes here|up to (\d+) minutes, since", text):
        assert config.load(ROOT / "configs/modal/train.yaml")["training"]["mid_epoch_minutes"] == float("".join(minutes))
    code = (ROOT / "modal_app.py").read_text()
    for volume in set(re.findall(r"holdfast-\w+", text)):
        assert f'"{volume}"' in code


def test_the_small_model_has_as_many_parameters_as_the_documents_say():
    net = model.build(19, {"size": "small"})
    count = sum(p.numel() for p in net.parameters())
    assert f"(`model.size: small`, {count:,} parameters)" in DOCS


def test_the_commands_that_ci_greps_are_each_a_line_of_their_own():
    first = "pip install -r requirements.txt && python train.py --config configs/local/smoke.yaml --resume"
    assert f"\n    {first}\n" in README
    assert "\n    python -m pytest\n" in README


def test_no_path_of_one_machine_stands_in_the_documents():
    assert not re.search(r"(?<![\w/])/(work|tmp|home|root|Users)/", DOCS)
    assert max(map(len, re.findall(r"^[^|\n]*$", DOCS, re.M))) <= 220


def test_the_citation_file_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["license"] in (ROOT / "LICENSE").read_text()


def test_every_script_explains_itself():
    for script in ("train.py", "data.py", "evaluate.py", "checkpoint.py"):
        done = forked.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout


def test_the_loop_to_copy_has_as_many_lines_as_the_documents_say():
    said = re.search(r"resumable loop of (\d+) lines", DOCS)[1]
    assert len([line for line in docstring_loop().splitlines() if line.strip()]) == int(said)


AROUND_THE_LOOP = """
import sys, torch, checkpoint
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters())
data = range(3)
done = []

def train_one(number):
    done.append((epoch, batch))

def validate():
    return 0.5
"""


def test_the_loop_in_the_readme_runs_beside_a_copied_file_and_has_nothing_left_to_do_the_second_time(tmp_path):
    shutil.copy2(ROOT / "checkpoint.py", tmp_path)
    loop = re.search(r"```python\n(.*?)```", README, re.S)[1]
    (tmp_path / "loop.py").write_text(f"{AROUND_THE_LOOP}\n{loop}\nprint(len(done), 'batches trained')\n")
    said = [forked.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True).stdout for _ in range(2)]
    assert said[0].endswith("15 batches trained\n") and said[1].endswith("\n0 batches trained\n"), said
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["epoch"] == 5


def test_the_figures_of_a_gpu_have_their_place_where_its_bench_looks_for_it():
    pattern = re.search(r'marked = re.compile\(r"(.*)", re.S\)', (ROOT / "bench" / "gpu.py").read_text())[1]
    assert len(re.findall(pattern, PAGES["measured"], re.S)) == 1
