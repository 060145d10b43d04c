"""A newcomer's walk with own recordings, by the README's own lines: EDF+ files, import, training, a
kill, a resume, evaluation, pictures. The lines are read from the README and run as they stand, in a
copy of the scripts; only sizes are set smaller. The other walk, the loop of checkpoint.py copied into
another repository and killed ten times, is test_checkpointer.py's
test_the_loop_of_the_docstring_with_its_dropout_killed_ten_times_ends_bit_identical."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pyedflib
from PIL import Image
import pytest

import checkpoint
from eeg import edf
import forked
from conftest import ROOT, copy_sources
from helpers import LIMIT, rest, wait_for

README = (ROOT / "README.md").read_text()
SMALL = [f"--set {key}" for key in (
    "data.window_seconds=10", "training.epochs=2", "training.batch_size=4", "training.log_every=1",
    "data.background_per_partial=1", "data.full_per_partial=0", "evaluation.window_seconds=10",
    "evaluation.overlap_seconds=0")]
PEOPLE = {                              # who -> the texts with which their seizures are marked
    "anna": ("Seizure", None), "ben": ("Seizure start", "Seizure end"),
    "cem": ("sz on", "sz off"), "dora": ("Anfall Beginn", "Anfall Ende")}


def lines(heading):
    """The first block of commands below a heading of the README."""
    block = README.split(f"\n## {heading}\n")[1].split("\n    ", 1)[1].split("\n\n")[0]
    return [line.strip() for line in block.splitlines()]


def write_edf_plus(path, eeg, events, first, last):
    """EDF+ of eeg, (19, T) in uV at 256 Hz, whose annotations say where its seizures are: by one text
    with a duration, or by a first and a last text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = pyedflib.EdfWriter(str(path), len(eeg), file_type=pyedflib.FILETYPE_EDFPLUS)
    limit = 3000.0
    for number, name in enumerate(edf.CHANNELS["referential"]):
        writer.setSignalHeader(number, {
            "label": f"EEG {name}-REF", "dimension": "uV", "sample_frequency": edf.FS,
            "physical_min": -limit, "physical_max": limit, "digital_min": -32768,
            "digital_max": 32767, "transducer": "", "prefilter": ""})
    writer.writeSamples([np.clip(row, -limit, limit).astype(float) for row in eeg])
    writer.writeAnnotation(1.0, -1, "eyes closed")
    for onset, end in events:
        writer.writeAnnotation(onset, -1 if last else end - onset, first)
        if last:
            writer.writeAnnotation(end, -1, last)
    writer.close()


def own_folder(folder):
    """Two nights of each of PEOPLE, a seizure in every one."""
    for number, (who, texts) in enumerate(PEOPLE.items()):
        for night in (1, 2):
            rng = np.random.default_rng([number, night])
            eeg = rng.normal(0, 20, (19, 40 * edf.FS)).astype(np.float32)
            begin = rng.integers(10, 20)
            seconds = np.arange(12 * edf.FS) / edf.FS
            eeg[:, begin * edf.FS:(begin + 12) * edf.FS] += 150 * np.sin(2 * np.pi * 4 * seconds)
            write_edf_plus(folder / who / f"night{night}.edf", eeg, [(begin, begin + 12)], *texts)


class Project:
    """A copy of the scripts and configurations, as a clone would give them."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        copy_sources(folder)
        shutil.copytree(ROOT / "configs", folder / "configs")
        (folder / "tests").mkdir()
        shutil.copy2(ROOT / "tests" / "held.py", folder / "tests")

    def start(self, line, *more, **environment):
        words = shlex.split(" ".join([line, *more]))
        assert words[0] == "python"
        return forked.Popen(
            [sys.executable, *words[1:]], cwd=self.folder, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment})

    def run(self, line, *more):
        process = self.start(line, *more)
        said = rest(process, LIMIT)
        assert process.returncode == 0, f"{line}\n{said}"
        return said


def expect_import(said, info):
    """The annotations inside the EDF were read: all that mark seizures, and the rest counted."""
    assert "8 recordings" in info and "4 patients" in info
    for who in PEOPLE:
        assert re.search(rf"\b{who}: .* 2 seizures", info), info
    assert "without labels: 0" in info
    assert re.search(r"8 x 'eyes closed'", said), said


def expect_whole_run(said, run):
    """The line that was killed went on from its snapshot, to the end, without a step twice."""
    assert re.search(r"resume: chose mid_epoch_001_", said), said
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    assert (state["epoch"], checkpoint.facts_of(state)["kind"]) == (2, "epoch")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, state["global_step"] + 1))


def expect_files(run):
    """Everything in the folder of the run has its line in the page about the house."""
    page = (ROOT / "docs" / "house.md").read_text().split("\n## What a run directory holds\n")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([\w.]+)/?` \|", page, re.M))
    there = {path.name for path in run.iterdir()}
    assert {"checkpoints", "config.yaml", "metrics.jsonl", "evaluation"} <= there <= named


def expect_evaluation(run):
    """Events, scores and a picture of each recording that validated, and the curves of the run."""
    scores = json.loads((run / "evaluation" / "scores.json").read_text())
    assert scores["split"] == "dev" and scores["seizures"] == scores["recordings"] > 0
    for row in scores["per_recording"]:
        stem = run / "evaluation" / row["recording"]
        events = stem.with_name(stem.name + "_events.tsv").read_text()
        assert events.startswith("onset\tduration")
        with Image.open(stem.with_name(stem.name + ".png")) as picture:
            assert min(picture.size) > 300
    with Image.open(run / "curves.png") as picture:
        assert min(picture.size) > 300


def test_the_first_lines_are_an_import_a_look_a_training_an_evaluation_and_a_board():
    importing, info, training, evaluation, board = lines("Your own recordings")
    assert importing.startswith("python data.py import MY_EDFS ")
    assert info.startswith("python data.py info ")
    assert training == "python train.py --config configs/local/own.yaml --resume"
    assert evaluation.startswith("python evaluate.py ") and evaluation.endswith(" --plot")
    assert board.startswith("tensorboard --logdir ")


@pytest.mark.slow
def test_own_recordings_go_from_import_to_pictures_by_the_lines_of_the_readme_and_over_a_kill(
        tmp_path):
    project = Project(tmp_path / "holdfast")
    own_folder(project.folder / "MY_EDFS")
    importing, info, training, evaluation, board = lines("Your own recordings")

    expect_import(project.run(importing), project.run(info))
    run = project.folder / "results" / "own"
    # the same script, held in its third step until it is killed there
    held = training.replace("train.py", "tests/held.py")
    first = project.start(held, *SMALL, BGB_MID_EPOCH_MINUTES="0",
                          HELD=f"after_step 3 {tmp_path}/never")
    assert "starting fresh" in "".join(wait_for(first, "saved mid_epoch_001_"))
    first.kill()
    rest(first)
    expect_whole_run(project.run(training, *SMALL), run)
    assert "false alarms" in project.run(evaluation)
    expect_evaluation(run)
    expect_files(run)

    assert list((project.folder / shlex.split(board)[-1]).rglob("events.out.tfevents.*"))
