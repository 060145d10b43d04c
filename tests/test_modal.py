"""modal_app.py without an account or a network: its command line through the real `modal run`, its
definitions, and what one attempt does, through `.local()` in processes of their own with the toy trainer of
modal_trial.py. With --slow, the whole trial."""
import argparse
import ast
import contextlib
import functools
import hashlib
import http.server
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import checkpoint
import forked
import modal_app
import modal_trial
import train
from conftest import SOURCES
from eeg import synth
from eeg.disk import Refused, TemporaryFault
from run import acceptance, elastic, fetch, launch
from run import attempts as records

DRIVER = """
import copy, json, sys
import modal_app
modal_app.acceptance = lambda *_: []
config = json.loads(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    try:
        print("ENDED", json.dumps(getattr(modal_app, config["action"]).local(copy.deepcopy(config), *arguments)))
    except BaseException as error:
        print("ENDED", type(error).__name__, error)
"""


@pytest.fixture
def trial(tmp_path):
    return modal_trial.Trial(tmp_path)


def cli(*arguments, start=forked.run):
    """`modal run modal_app.py ...` as a user types it, with nowhere to connect to."""
    command = [sys.executable, "-m", "modal", "run", "modal_app.py", *arguments]
    nowhere = os.environ | {"MODAL_SERVER_URL": "http://127.0.0.1:9", "COLUMNS": "200"}
    done = start(command, cwd=modal_trial.ROOT, text=True, capture_output=True, env=nowhere)
    return done.returncode, done.stdout, done.stderr


class Runs:
    """Attempts of one run, in processes of their own."""

    def __init__(self, trial):
        self.trial, self.results = trial, trial.folder / "results"
        self.directory = self.results / "toy"

    def attempt(self, *attempts, sends=None, seconds=0.0, crash_at=0, minutes=modal_trial.CONFIG["training"]["mid_epoch_minutes"],
                action="train"):
        """One process that makes `attempts`, each [launch, resume, fresh]: how each ended, and its log.

        sends: a signal, sent once the log tells of step 5; the toy waits there for it. minutes: between timed snapshots."""
        config = {section: dict(values) for section, values in modal_trial.CONFIG.items()}
        config |= {"action": action}
        config["experiment"]["results"] = str(self.results)
        config["training"]["mid_epoch_minutes"] = minutes
        config["toy"] |= {"seconds": seconds, "crash_at": crash_at, "hold": 5 if sends else 0}
        command = [sys.executable, "-u", "-c", DRIVER, json.dumps(config), json.dumps(attempts)]
        process = forked.Popen(command, cwd=self.trial.project, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        log = ""
        for line in process.stdout:
            log += line
            if sends and line == "toy step 5\n":
                process.send_signal(sends)
        process.wait()
        return [(end, part) for part, end in re.findall(r"(.*?)^ENDED (.*?)$", log, re.M | re.S)]

    def records(self):
        return [json.loads(p.read_text()) for p in sorted((self.directory / "attempts").glob("*.json"))]


@pytest.fixture
def runs(trial):
    trial.grace(1)
    trial.change("SETTLE = 1 ", "SETTLE = 0.1 ")    # no two launches at once here, as in the trial
    return Runs(trial)


def test_help_names_every_option_and_its_choices():
    code, out, _ = cli("--help", start=subprocess.run)
    assert code == 0
    assert "--action {train,evaluate,smoke,ls,import}" in out and "--resume [true|false|CHECKPOINT]" in out
    for option in ("--config FILE", "--fresh [{true,false}]", "--set section.key=value", "--gpu GPU", "--source FROM"):
        assert option in out


@pytest.mark.parametrize("arguments, line", [
    (["--action", "trian"], "argument --action: invalid choice: 'trian'"),
    (["--action", "train", "--fresh", "yes"], "argument --fresh: invalid choice: 'yes'"),
    (["--config", "x.yaml"], "the following arguments are required: --action"),
    (["--action", "train", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
    (["--action", "evaluate", "--split", "test"], "argument --split: invalid choice: 'test'"),
    (["--action", "import", "--montage", "reduced"], "argument --montage: invalid choice: 'reduced'"),
    (["--action", "train", "--gpu", "A100-80GB,H100:2"], "GPU 'A100-80GB,H100:2': of a list, each with the same number"),
    (["--action", "train", "--gpu", "H100:some"], "GPU 'H100:some': write it as Modal does"),
    (["--action", "import", "--source", "https://[x"], "modal_app.py: --source https://[x: Invalid IPv6 URL"),
])
def test_wrong_options_get_one_clear_line_before_anything_is_started(arguments, line):
    code, _, error = cli(*arguments)
    assert code == 2 and line in error and "Traceback" not in error


def test_a_start_by_the_name_of_the_module_is_refused_which_passed_over_gpu_and_bucket():
    done = forked.run([sys.executable, "-m", "modal", "run", "-m", "modal_app", "--action", "train", "--gpu", "H100"],
                      cwd=modal_trial.ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "start it by its file, modal run modal_app.py" in done.stderr, done.stderr


def test_a_start_by_python_is_refused_with_the_command_that_modal_takes():
    done = subprocess.run([sys.executable, modal_app.__file__, "--action", "train"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "modal_app.py: Modal starts it: modal run modal_app.py --help\n"


def test_nothing_is_read_that_a_container_does_not_have(trial):
    for path in trial.project.iterdir():
        if path.suffix != ".py" and path.is_file():
            path.unlink()
    code = "import modal; modal.is_local = lambda: False; import modal_app"
    done = forked.run([sys.executable, "-c", code], cwd=trial.project, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_image_has_every_requirement_but_modal_and_the_tools_of_development():
    lines = (modal_trial.ROOT / "requirements.txt").read_text().splitlines()
    listed = [re.split(r"[=<>]", line)[0] for line in lines]
    packages = modal_app.requirements()
    assert [re.split(r"[=<>]", p)[0] for p in packages] == [
        n for n in listed if n not in ("modal", "pytest", "pytest-xdist", "ruff", "mypy")]
    assert not re.search(r"[# ]", "".join(packages))


def test_functions_are_defined_with_the_gpu_volumes_timeout_and_retries_of_the_constants():
    if not callable(getattr(modal_app.train, "info", None)):
        pytest.skip("this modal cannot tell its definitions offline (1.6 can); the trial asks the stand-in")
    train, smoke, ls = (getattr(modal_app, name).info() for name in ("train", "smoke", "ls"))
    assert train.gpus == smoke.gpus == [("A100-80GB", 1)] and not ls.gpus
    assert modal_app.evaluate.info().gpus == [("L4", 1)]
    assert (train.timeout, train.max_retries, train.single_use_containers) == (24 * 3600, 10, True)
    assert (train.cpu, train.memory_mib) == (8, 32 * 1024)
    assert {path: (v.name, v.read_only) for path, v in train.volumes.items()} == {
        "/results": ("holdfast-results", False), "/mirror": ("holdfast-mirror", False),
        "/data": ("holdfast-data", True)}
    assert ls.volumes["/results"].read_only
    assert not smoke.max_retries, "an acceptance test that fails has its result"
    assert not modal_app.import_corpus.info().gpus


VOLUMES = {                             # what lies on the Volumes of the tests below
    "results/good/checkpoints/last.pt", "results/good/checkpoints/best.pt", "results/good/checkpoints/mid_epoch_001_000002.pt",
    "results/new/log.txt", "data/tusz/index.json", "data/tusz/a.h5", "data/old/deep/a.h5", "data/raw/a/b.EDF",
    "data/empty/x.txt", "data/half/import.json", "data/half/a.h5",
    "data/more/index.json", "data/more/import.json", "data/more/a.h5", "data/whole/index.json", "data/whole/import.json", "data/whole/a.h5", "results/plain", "data/x/tusz/index.json", "mirror/away/checkpoints/last.pt"}


TEXTS = {"/data/more/import.json": '{"unfinished": ["python data.py import a b"]}', "/data/whole/import.json": '{"unfinished": []}'}


@pytest.fixture
def volumes(tmp_path):
    """What a launch sees of the Volumes: names in a folder, those of folders with a slash at their end."""
    for name in VOLUMES:
        path = tmp_path / "volumes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def listing(path, recursive=False):
        folder = Path(tmp_path, "volumes", str(path).lstrip("/"))
        if folder.is_file():
            return [folder.name]
        found = folder.rglob("*") if recursive else folder.glob("*")
        return [f"{p.name}/" if p.is_dir() else p.name for p in found]
    return listing


@pytest.mark.parametrize("path, place", [("/data", "/"), ("/data/tusz/", "/tusz"), ("/data/a/../tusz", "/tusz")])
def test_a_folder_of_a_volume_is_asked_for_by_its_path_from_the_root(path, place, monkeypatch):
    places = []
    volume = argparse.Namespace(listdir=lambda inside, recursive: places.append(inside) or [])
    monkeypatch.setattr(modal_app, "recordings", volume)
    assert modal_app.listing(path) == [] and places == [place]


def asked(**words):
    return argparse.Namespace(**{name: default for name, (default, _) in launch.TAKEN_BY.items()} | {"action": "train"} | words)


RUN = "experiment: {name: %s, results: /results}\ndata: {path: /data/tusz}\n"
NEW, GOOD = RUN % "new", RUN % "good"


@pytest.mark.parametrize("text, words, line", [
    ("experiment: {results: results}", {}, "experiment.results must be /results"),
    ("experiment: {results: /results}\ndata: {path: data/tusz}", {}, "data.path must be a folder in /data"),
    ("experiment: {results: /results}\ndata: {path: /data/none}", {}, "/data/none is no folder on the Volume"),
    ("experiment: {results: /results}\ndata: {path: /data/my corpus}", {}, "volume put holdfast-data IMPORTED_FOLDER '/my corpus'"),
    ("experiment: {results: /results}\ndata: {path: /data/raw}", {}, "holds raw EDF"),
    ("experiment: {results: /results}\ndata: {path: [/data/tusz, /data/empty]}", {}, "holds no recordings"),
    (NEW + "training: {mirror: /results/m}", {}, "training.mirror must be a folder in /mirror"),
    (NEW + "training: {init: /data/tusz/w.pt}", {}, "training.init /data/tusz/w.pt is no file on the Volume"),
    (NEW + "training: {init: w.pt}", {}, "training.init must be a file on a Volume"),
    (NEW, {"resume": "/results/new/checkpoints/last.pt"}, "--resume /results/new/checkpoints/last.pt is no file on"),
    (NEW, {"resume": "/results/good/checkpoints"}, "--resume /results/good/checkpoints is no file on the Volume"),
    (NEW, {"resume": "true", "fresh": "true"}, "--fresh and --resume exclude each other"),
    (NEW, {"action": "evaluate"}, "holds no best.pt to evaluate"),
    (GOOD, {}, "holds checkpoints: --resume true goes on, --fresh true starts over"),
    (NEW, {"action": "import"}, "--source is missing: s3://BUCKET/FOLDER"),
    (NEW, {"action": "import", "source": "raw"}, "--source raw: s3://BUCKET/FOLDER"),
    (NEW, {"action": "import", "source": "s3://"}, "no bucket or server is named"),
    (NEW, {"action": "import", "source": "https://a.b/c?d"}, "an address with ? or # is none of a folder"),
    (NEW, {"action": "import", "source": "https://a.b/c d"}, "https://a.b/c d/SHA256SUMS.txt: URL can't contain"),
    ("data: {path: /data/raw/a}", {"action": "import", "source": "https://a.b/c"}, "data.path must lie outside /data/raw"),
    (NEW, {"split": "dev"}, "--split belongs to --action evaluate"), (NEW, {"source": "s3://a"}, "--source belongs to --action import"),
    (GOOD, {"action": "evaluate", "resume": "true"}, "--resume belongs to --action train or smoke"),
    (GOOD, {"action": "evaluate", "gpu": "A100:8"}, "scores on one card: the others would be paid in vain"),
    ("experiment: {results: /results}\ndata: {path: [/data/tusz, /data/x/tusz]}", {}, "two folders have one name among tusz, tusz"),
    ("experiment: {results: /results}\ndata: {path: /data/new, synth_hours: 1}", {}, "/data/new is no folder on the Volume"),
    ("experiment: {results: /results}\ndata: {path: /data/tusz/index.json}", {}, "/data/tusz/index.json is no folder on"),
    (RUN % "away" + "training: {mirror: /mirror}", {}, "/mirror/away on the Volume holds checkpoints"),
    (NEW, {"action": "import", "source": "/data/gone"}, "--source /data/gone is not on the Volume"),
    (RUN % "plain", {"resume": "true"}, "/results/plain on the Volume is a file: choose another experiment.name"),
    (RUN % "x" + "  ", {"action": "import", "source": "/data/raw"}, ""),
    (GOOD, {"action": "evaluate"}, ""), (GOOD, {"resume": "true"}, ""), (GOOD, {"fresh": "true"}, ""), (NEW, {}, ""),
    (GOOD, {"resume": "/results/good/checkpoints/last.pt"}, ""), (NEW + "training: {init: /data/tusz/a.h5}", {}, ""),
    ("experiment: {results: /results}\ndata: {path: /data/old}", {}, ""),
    ("experiment: {results: /results}\ndata: {path: [/data/tusz, /data/whole]}", {}, ""),
])
def test_what_cannot_work_on_modal_is_refused_before_a_container_is_paid(text, words, line, volumes, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    config = train.load_config(path)
    if not line:
        assert launch.checked(config, path, asked(**words), volumes, TEXTS.get) is config
        return
    with pytest.raises(Refused, match=re.escape(line)) as refusal:
        launch.checked(config, path, asked(**words), volumes, TEXTS.get)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("folder", ["/data/half", "/data/more"])        # the first import, a second one into a folder with an index
def test_recordings_of_an_import_that_has_not_finished_are_no_reason_to_pay_a_card(folder, volumes, tmp_path):
    """Each container of a training would find them so."""
    path = tmp_path / "config.yaml"
    path.write_text(f"experiment: {{results: /results}}\ndata: {{path: {folder}}}")
    with pytest.raises(TemporaryFault, match=f"{folder} on the Volume is not whole: its import runs, or was stopped"):
        launch.checked(train.load_config(path), path, asked(), volumes, TEXTS.get)


def test_a_file_of_a_volume_is_read_by_its_path_from_the_root_and_one_that_cannot_be_keeps_no_launch_back(monkeypatch):
    parts = {"/tusz/import.json": [b'{"unfini', b'shed": []}']}

    def read_file(place):
        if place not in parts:
            raise modal_app.modal.exception.UnimplementedError(place)
        yield from parts[place]
    monkeypatch.setattr(modal_app, "recordings", argparse.Namespace(read_file=read_file))
    assert modal_app.text("/data/tusz/import.json") == '{"unfinished": []}' and modal_app.text("/data/own/import.json") == ""


def test_ls_of_a_volume_without_checkpoints_is_no_refusal_and_lists_the_run_that_has_just_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modal_app, "RESULTS", str(tmp_path / "results"))
    assert modal_app.ls.local()["status"] == "refused", "what cannot be listed at all"
    (tmp_path / "results").mkdir()
    assert modal_app.ls.local()["status"] == "finished"
    records.put(tmp_path / "results/new/attempts/001.json", {"launch": "one", "call": None, "app": "ap-1"})
    assert modal_app.ls.local()["status"] == "finished" and "new: 0.00 h in 1 attempt" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["smoke", "train"])
def test_shipped_configs_put_results_on_the_volume_and_leave_the_time_limit_to_the_app(name):
    import train as trainer
    config = trainer.load_config(modal_trial.ROOT / "configs" / "modal" / f"{name}.yaml")
    assert config["experiment"]["results"] == modal_app.RESULTS
    assert config["training"]["time_limit_hours"] == 0
    assert config["data"]["path"].startswith((modal_app.DATA, modal_app.RESULTS))


ONE, TWO, THREE = (["one", "false", "false"], ["two", "false", "false"], ["three", "false", "true"])


def test_a_replayed_resume_false_resumes_and_a_finished_run_returns_at_once(runs):
    [(end, before)] = runs.attempt(ONE, sends=signal.SIGINT, seconds=0.05)
    assert end.startswith("KeyboardInterrupt") and runs.records()[0]["left"] == "preempted"
    (end, log), again, another = runs.attempt(ONE, ONE, ["two", "true", "false"])
    assert "finished" in end and "from step 0" not in log and "toy step 1\n" not in log, f"{before}\n{log}"
    assert "it was already" in again[0] and "toy starts" not in again[1]
    assert '"finished"' in another[0] and "toy step" not in another[1]
    assert len(runs.records()) == 3


def test_an_acceptance_test_that_resumes_a_finished_run_and_trains_nothing_is_not_ready(runs):
    [(end, _)] = runs.attempt(ONE, sends=signal.SIGINT, seconds=0.05, action="smoke")
    ends = runs.attempt(ONE, ONE, ["two", "true", "false"], THREE, action="smoke")
    (on, _), (replayed, _), (again, _), (fresh, _) = ends
    assert end.startswith("KeyboardInterrupt") and all('"ready"' in line for line in (on, replayed, fresh)), ends
    assert '"not ready"' in again and "toy was finished before and trained nothing: --fresh true" in again


@pytest.mark.parametrize("file, text", [
    ("attempts/001.json", ""), pytest.param("attempts/001.json", "[1]", marks=pytest.mark.slow),
    pytest.param("launch.json", '{"launch": "o', marks=pytest.mark.slow)])
def test_a_record_that_is_torn_costs_no_work_and_the_next_container_goes_on(file, text, runs):
    """Not even with --fresh, which comes again with every attempt."""
    runs.attempt(THREE, sends=signal.SIGINT, seconds=0.05)
    (runs.directory / file).write_text(text)
    [(end, log)] = runs.attempt(THREE)
    assert '"finished"' in end and "toy step 1\n" not in log and "toy step 60\n" in log, log
    assert ("without 001.json of attempts/, which cannot be read" in log) == (file != "launch.json"), log
    assert not (runs.results / "toy.2").exists()


def test_a_torn_record_keeps_the_work_of_a_run_that_went_back_to_a_file(runs):
    runs.attempt(ONE)
    back = ["two", str(runs.directory / "checkpoints/checkpoint_epoch_001.pt"), "false"]
    runs.attempt(back, crash_at=50, minutes=5.0)            # a slow machine would save after step 40 too
    (runs.directory / "attempts" / "002.json").write_text("")
    [(end, log)] = runs.attempt(back)
    assert '"finished"' in end and "from step 40" in log, log


@pytest.mark.parametrize("again, end, step", [
    (THREE, "finished", 1), pytest.param(TWO, "refused", 0, marks=pytest.mark.slow),
    pytest.param(["four", "FILE", "false"], "finished", 21, marks=pytest.mark.slow)])
def test_a_torn_record_of_another_launch_is_not_taken_for_one_of_a_launch_that_died_before_its_first(again, end, step, runs):
    """Else --fresh went on with the old run, and --resume FILE with its newest state."""
    runs.attempt(ONE, crash_at=50)
    again = [word.replace("FILE", str(runs.directory / "checkpoints/checkpoint_epoch_001.pt")) for word in again]
    (runs.directory / "attempts" / "001.json").write_text("")
    runs.trial.change("    resume = take", "    os._exit(9)\n    resume = take")
    assert not runs.attempt(again) and records.get(runs.directory / "launch.json")["launch"] == again[0]
    runs.trial.change(r"    os._exit\(9\)\n", "")
    [(ended, log)] = runs.attempt(again)
    trained = re.findall(r"toy step (\d+)", log)
    assert f'"{end}"' in ended and (trained or ["0"])[0] == str(step), log
    assert records.get(runs.directory / "launch.json")["first"] == (1 if again == THREE else 2)


@pytest.mark.parametrize("fails, end", [(2, '"finished"'), (99, "RuntimeError commit of the start failed for 3 s")])
def test_nothing_is_trained_before_the_start_is_published_which_another_launch_would_not_see(fails, end, runs):
    runs.trial.patience(3)
    runs.trial.change(r"def commit\(volume\):", f"""asked = []


def commit(volume):
    asked.append(volume)
    if 2 <= len(asked) < 2 + {fails}:           # the first is that of the claim
        raise OSError("volume busy")""")
    [(ended, log)] = runs.attempt(ONE)
    assert end in ended and ("toy starts" in log) == (fails == 2), log
    assert log.index("commit of the start failed: OSError: volume busy") < (log + "toy starts").index("toy starts")


def test_a_container_whose_commits_fail_for_hours_ends_and_a_shorter_failure_ends_nothing(runs):
    """What is trained there would be lost with it, after a day at the latest."""
    runs.trial.patience(1)
    runs.trial.change(r"def commit\(volume\):", """asked = []


def commit(volume):
    asked.append(volume)
    if len(asked) > 2:                          # the claim and the start
        raise OSError("volume busy")""")
    runs.trial.change(r"UNPUBLISHED = \d+ ", "UNPUBLISHED = 2 ")
    [(ended, log)] = runs.attempt(ONE, seconds=0.1)
    assert "commits failed for 0 minutes" in ended and "(3 in a row)" in log and "toy step 59" not in log, log
    assert runs.records()[0]["left"] == "failed"


def test_a_record_is_written_over_no_other_where_one_is_gone(runs):
    runs.attempt(ONE, ONE, crash_at=30)
    (runs.directory / "attempts" / "001.json").unlink()
    runs.attempt(["two", "true", "false"])
    assert [(p.name, records.get(p)["launch"]) for p in records.record_files(runs.directory)] == [
        ("002.json", "one"), ("003.json", "two")]


def test_a_finished_run_whose_checkpoints_are_gone_is_trained_anew(runs):
    runs.attempt(ONE)
    shutil.rmtree(runs.directory / "checkpoints")
    [(end, log)] = runs.attempt(["two", "true", "false"])
    assert '"finished"' in end and "toy step 1\n" in log and "toy step 60\n" in log


def test_a_checkpoint_of_another_program_is_no_progress(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"weights": torch.ones(3)}, tmp_path / "checkpoints" / "last.pt")
    assert records.progress(tmp_path) == [0, False, 0]


def test_a_run_that_finishes_on_a_volume_that_takes_no_record_any_more_is_finished(runs):
    """And is not tried again, paid each time."""
    runs.trial.change(r'record\["left"\] = way', 'record["left"] = way; globals()["put"] = full')
    runs.trial.change(r"\ndef card\(\):", """
def full(path, value):
    with open("/dev/full", "w") as file:
        file.write("x")


def card():""")
    [(end, log)] = runs.attempt(ONE)
    assert '"finished"' in end and "record of the end failed" in log, log


def test_a_volume_that_takes_no_record_of_a_start_is_said_with_its_place(runs):
    runs.directory.mkdir(parents=True)
    (runs.directory / "attempts").touch()
    [(end, _)] = runs.attempt(ONE)
    assert end == f"RuntimeError {runs.directory}/attempts: File exists, and is no folder"


@pytest.mark.parametrize("way, number, fails", [("finished", signal.SIGINT, 0), ("time limit", 0, 1), ("handed over", 0, 2)])
def test_what_a_result_or_the_next_attempt_relies_on_is_published_before_the_end(way, number, fails, tmp_path, monkeypatch):
    commits = []

    def commit(volume):
        commits.append(len(commits) >= fails)
        if not commits[-1]:
            raise OSError("volume busy")

    monkeypatch.setattr(modal_app, "commit", commit)
    record = {"run": "toy", "launch": "one", "call": None, "app": "a", "first": 1, "saved": "", "left": way}
    publish = modal_app.Publisher(tmp_path, 1, record, argparse.Namespace(number=number), {"training": {}})
    publish.end(way)
    assert commits[-1:] == [True] and records.attempts(tmp_path)[0]["left"] == way


def test_a_volume_that_does_not_answer_has_failed_and_the_container_is_not_paid_for_waiting(monkeypatch, capsys):
    silent = argparse.Namespace(commit=threading.Event().wait, reload=threading.Event().wait)
    monkeypatch.setattr(modal_app.modal, "is_local", lambda: False)
    monkeypatch.setattr(modal_app, "PATIENCE", 0.1)
    monkeypatch.setattr(modal_app, "SILENCE", 0.1)
    with pytest.raises(TimeoutError, match="no answer for 0.1 s"):
        modal_app.commit(silent)
    with pytest.raises(RuntimeError, match="reload of the Volume failed for 0.1 s: no answer"):
        modal_app.reload(silent)
    answers = argparse.Namespace(commit=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        modal_app.commit(answers)


def test_of_what_modal_raises_only_the_end_of_a_call_or_no_such_call_is_taken_for_its_end(monkeypatch):
    """What merely failed to answer let a second launch train beside the first."""
    from grpclib import GRPCError
    from grpclib.exceptions import StreamTerminatedError
    known = [kind for kind in vars(modal_app.modal.exception).values() if isinstance(kind, type)]
    silent = [kind for kind in known if issubclass(kind, GRPCError) and not kind.__name__.startswith("_")]
    silent += [StreamTerminatedError, ConnectionResetError, modal_app.modal.exception.ConnectionError]
    assert len(silent) > 10
    over = {"NotFoundError", "InvalidError", "AlreadyExistsError"}
    for kind in silent:
        call = argparse.Namespace(get=lambda timeout: (_ for _ in ()).throw(kind("not today")))
        monkeypatch.setattr(modal_app.modal.FunctionCall, "from_id", lambda name: call)
        told = modal_app.call_state("fc-1")
        assert told == "ended" if kind.__name__ in over else told.startswith("cannot be told"), (kind, told)


def test_a_container_is_billed_from_its_start_with_what_it_waited_for(runs):
    runs.trial.change(r"BEGAN = time.monotonic\(\)", "BEGAN = time.monotonic() - 360")
    runs.attempt(ONE)
    assert 0.1 <= records.hours(runs.records()[0]) < 0.2


def test_a_run_that_works_is_listed_so_where_another_launch_claimed_it_and_was_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(modal_app, "call_state", {"fc-1": "working", "fc-2": "ended"}.get)
    records.put(tmp_path / "attempts" / "001.json", {"launch": "one", "call": "fc-1", "app": "ap-1"})
    records.put(tmp_path / "launch.json", {"launch": "two", "call": "fc-2", "app": "ap-2"})
    assert modal_app.standing(tmp_path) == (
        "call fc-1, app ap-1: working, about $0.00; stop: modal app stop ap-1")


def test_a_copy_of_a_run_that_works_is_not_listed_as_working_with_a_command_that_stops_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr(modal_app, "call_state", lambda call: "working")
    record = {"run": "toy", "launch": "one", "call": "fc-1", "app": "ap-1", "left": ""}
    for name in ("toy", "copy"):
        records.put(tmp_path / name / "launch.json", record)
        records.put(tmp_path / name / "attempts" / "001.json", record)
    assert modal_app.standing(tmp_path / "toy").endswith("stop: modal app stop ap-1")
    assert modal_app.standing(tmp_path / "copy") == (
        "call fc-1, app ap-1: ended (copied from toy), about $0.00")


def test_a_run_that_went_back_to_a_file_after_its_end_is_not_believed_to_be_finished(runs):
    runs.attempt(ONE)
    file = str(runs.directory / "checkpoints/checkpoint_epoch_001.pt")
    [(end, _)] = runs.attempt(["two", file, "false"], crash_at=30)
    assert end.startswith("RuntimeError ValueError: the toy crashes here")
    [(end, log)] = runs.attempt(["three", "true", "false"])
    assert '"finished"' in end and "it was already" not in end and "toy step 60\n" in log


def test_a_record_that_a_volume_does_not_take_ends_no_training_and_a_preemption_stays_one(tmp_path, capsys):
    run = tmp_path / "toy"
    run.mkdir()
    (run / "attempts").write_text("in the way of the folder")
    record = {"run": "toy", "launch": "one", "call": None, "app": "a", "first": 1, "saved": ""}
    publish = modal_app.Publisher(run, 1, record, argparse.Namespace(number=0), {"training": {}})
    publish.saved(run / "checkpoints/last.pt")
    publish.end("preempted")
    told = capsys.readouterr().out
    assert "record of last.pt failed: FileExistsError" in told and "committed last.pt" in told
    assert "record of the end failed" in told
    with pytest.raises(FileExistsError):        # without its first record a replay would begin anew
        publish.write()


def test_another_launch_is_refused_unless_it_resumes_and_fresh_moves_the_old_run_aside(runs):
    first, second, third = runs.attempt(ONE, TWO, THREE)
    assert '"refused"' in second[0] and "--resume true" in second[0]
    assert '"finished"' in third[0] and "from step 0" in third[1]
    assert sorted(p.name for p in runs.results.iterdir()) == ["toy", "toy.1"]


def test_fresh_where_there_is_no_run_leaves_no_folder_that_holds_a_claim_alone(runs):
    [(end, log)] = runs.attempt(THREE)
    assert '"finished"' in end and "moved" not in log and [p.name for p in runs.results.iterdir()] == ["toy"]


def test_a_cancelled_call_saves_and_ends_as_cancelled(runs):
    [(end, log)] = runs.attempt(ONE, sends=signal.SIGUSR1, seconds=0.05)
    assert end.startswith("InputCancellation") and "saved mid_epoch" in log
    assert runs.records()[0]["left"] == "cancelled"


def test_the_hand_over_comes_in_time_where_the_start_took_long(runs):
    runs.trial.change(r"BEGAN = time.monotonic\(\)", "BEGAN = time.monotonic() - 23.9 * 3600")
    [(end, log)] = runs.attempt(ONE, seconds=0.05)
    assert end.startswith("RuntimeError time limit") and log.count("toy step") == 1, log


def test_the_hand_over_before_the_timeout_is_an_exception_and_costs_no_step(runs):
    runs.trial.change(r"MARGIN = 0.25 ", f"MARGIN = {24 - 0.5 / 3600} ")
    (end, first), (_, second) = runs.attempt(ONE, ONE, seconds=0.05)
    assert end.startswith("RuntimeError time limit") and runs.records()[0]["left"] == "handed over"
    last = int(re.findall(r"toy step (\d+)", first)[-1])
    assert int(re.findall(r"toy step (\d+)", second)[0]) == last + 1


def test_three_attempts_without_progress_are_stuck_and_a_new_launch_tries_again(runs):
    *tries, (end, log), (again, _) = runs.attempt(ONE, ONE, ONE, ONE, ["two", "true", "false"], crash_at=7)
    assert all(e.startswith("RuntimeError ValueError: the toy crashes here") for e, _ in [*tries, (again, "")])
    assert '"stuck"' in end and "toy step" not in log


def test_a_killed_attempt_leaves_no_sign_and_its_successor_waits_for_its_commits(runs):
    assert runs.attempt(ONE, sends=signal.SIGKILL, seconds=0.05) == []
    assert runs.records()[0]["left"] == ""
    [(end, log)] = runs.attempt(ONE)
    assert '"finished"' in end and "did not say that it left" in log


def leave_records(run, minutes, **record):
    """Attempts of launch `one`, each `minutes` long by the start of the next."""
    for number in range(1, len(minutes) + 1):
        began = time.time() - 60 * sum(minutes[number - 1:])
        common = {"launch": "one", "call": None, "progress": [0, False, 0], "began": began, "seen": began}
        records.put(run / "attempts" / f"{number:03d}.json", common | record)


def test_progress_tells_an_epoch_that_has_ended_from_one_in_progress(tmp_path):
    with checkpoint.Checkpointer(tmp_path / "checkpoints", say=lambda line: None) as saver:
        saver.save_mid({"epoch": 1, "batch": 2, "global_step": 2})
        saver.settle()
        assert records.progress(tmp_path) == [2, False, 0]
        saver.save_epoch({"epoch": 1, "batch": 3, "global_step": 3})
        saver.settle()
        assert records.progress(tmp_path) == [3, True, 0]


def test_preemptions_do_not_count_as_attempts_without_progress(tmp_path):
    preempted, died = tmp_path / "preempted", tmp_path / "died"
    leave_records(preempted, [60] * 5, left="preempted")
    assert records.why_over(preempted, "one", 0) is None
    leave_records(died, [60] * 3, left="")
    assert records.why_over(died, "one", 0)[0] == "stuck"
    assert records.why_over(died, "two", 0) is None


def test_deaths_without_a_word_in_the_first_minutes_do_not_count_unless_there_are_many(tmp_path):
    some, many, half = tmp_path / "some", tmp_path / "many", records.SHORT / 2
    leave_records(some, [half] * (records.SHORT_DEATHS - 1), left="")
    assert records.why_over(some, "one", 0) is None
    leave_records(many, [half] * records.SHORT_DEATHS, left="")
    status, why = records.why_over(many, "one", 0)
    assert status == "stuck" and "died without a word" in why


def test_the_time_limit_is_the_runs_over_all_attempts_of_a_launch(tmp_path):
    record = {"launch": "one", "began": 0, "seen": 1.5 * 3600, "left": "preempted", "progress": [0, False, 0]}
    records.put(tmp_path / "attempts" / "001.json", record)
    assert records.why_over(tmp_path, "one", 2.0) is None
    assert records.hours_of_attempt(tmp_path, "one", 2.0, 23.75) == (pytest.approx(0.5), True)
    records.put(tmp_path / "attempts" / "002.json", record | {"seen": 0.5 * 3600})
    assert records.why_over(tmp_path, "one", 2.0)[0] == "time limit"
    assert records.why_over(tmp_path, "two", 2.0) is None
    assert records.hours_of_attempt(tmp_path, "two", 2.0, 0.75) == (0.75, False)
    assert records.hours_of_attempt(tmp_path, "two", 0, 23.75) == (23.75, False)
    assert records.hours_of_attempt(tmp_path, "two", 0, 0.0) == (1e-6, False), "0 is no limit"


def test_the_bill_adds_up_the_attempts_and_foretells_the_run_from_the_measured_speed(tmp_path):
    common = {"launch": "one", "epochs": 10, "dollars": 3.0, "left": ""}
    records.put(tmp_path / "attempts" / "001.json", common | {"began": 0, "seen": 3600})
    assert records.bill(tmp_path) == f"{tmp_path.name}: 1.00 h in 1 attempt, about $3.00 so far"
    rows = [{"kind": "train", "epoch": 1, "batch": b, "batches": 100, "step": b, "time": 27.0 * b}
            for b in (20, 40, 60, 80, 100)]
    rows.append({"kind": "validation", "epoch": 1, "step": 100, "time": 3600.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "tr')
    assert records.bill(tmp_path).endswith("1.00 h per epoch as measured: 9.0 h left, "
                                           "about $30.00 for the whole run")


def test_an_hour_costs_what_gpus_cores_and_memory_cost():
    rest = 8 * 0.047 + 32 * 0.008
    for gpu, dollars in {"A100-80GB": 2.50, "H100!": 3.95, "h100": 3.95, "H100:2": 7.90, "A100-80GB:8": 20.0, "": 0.0}.items():
        assert records.hourly(gpu, 8, 32) == pytest.approx(dollars + rest)
    assert records.hourly(["A100-80GB:2", "H100"], 8, 32) == pytest.approx(5.0 + rest)
    assert records.hourly("NEXT-GPU", 8, 32) is None
    for gpus, dollars in {("A100-80GB", "H100"): 3.95, ("H100:2",): 7.9}.items():
        assert records.dearest(list(gpus), 8, 32) == pytest.approx(dollars + rest)
    assert records.dearest(["H100", "NEXT-GPU"], 8, 32) is None and records.dearest("", 8, 32) == pytest.approx(rest)


def test_of_a_list_the_dearest_is_foretold(monkeypatch, capsys):
    monkeypatch.setattr(modal_app, "TRAIN_GPU", ["A100-80GB", "H100"])
    modal_app.tell(argparse.Namespace(action="smoke"))
    told = capsys.readouterr().out
    assert "about $4.58 an hour, $110 a day at most on A100-80GB or H100, 8 cores" in told and "about $1.15 at most" in told


@pytest.mark.parametrize("asked, card, paid", [
    ("A100", "NVIDIA A100-SXM4-80GB", "A100"),                  # an upgrade is free
    ("H100", "NVIDIA H200", "H100"),
    (["A100-80GB", "H100:2"], "", "A100-80GB"),
    (["A100-40GB", "A100-80GB"], "NVIDIA A100-SXM4-80GB", "A100-80GB"),
    (["A100-80GB", "H100:2"], "NVIDIA H100 80GB HBM3", "H100:2"),
    (["L40S", "L4"], "NVIDIA L4", "L4"),
    (["L4", "L40S"], "NVIDIA L40S", "L40S"),
    (["RTX-PRO-6000", "B200+"], "NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
    (["A100-80GB", "H100"], "NVIDIA Next GPU", ""),
])
def test_what_was_asked_for_is_billed_and_of_a_list_what_came(asked, card, paid):
    assert records.billed(asked, card) == paid


def test_an_acceptance_check_that_raises_is_a_fault_and_the_others_go_on():
    def breaks():
        yield "before", ""
        raise OSError(5, "the Volume is away")
    lines = []
    faults = acceptance.report({"volume": breaks, "card": lambda: iter([("a card", "too old")])}, lines.append)
    assert faults == ["volume: OSError: [Errno 5] the Volume is away", "too old"]
    assert lines == ["before", faults[0], "a card"]


def test_an_error_without_a_word_is_a_fault_of_its_check_too():
    def breaks():
        yield "before", ""
        raise MemoryError
    assert acceptance.report({"data": breaks}, lambda line: None) == ["data: MemoryError: "]


@pytest.mark.parametrize("write, commit, warned", [(2, 3, False), (7, 6.9, False), (7, 7.1, True), (20, 1, True)])
def test_a_save_and_commit_beyond_14_s_is_a_fault_a_preemption_may_come_during_another(write, commit, warned):
    line, fault = acceptance.grace_line(195.0, write, commit)
    assert line.startswith("checkpoint of 195 MB: written in") and bool(fault) == warned


def test_a_batch_that_does_not_fit_is_a_fault_that_names_the_key(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {path: x}\nmodel: {size: small}\n")
    config = train.load_config(tmp_path / "c.yaml")

    class Full:                         # train.py on a card without memory
        focal_loss = staticmethod(train.focal_loss)

        def make_optimizer(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    [(line, fault)] = acceptance.check_training(config, "cpu", Full(), 1, 3.0, [])
    assert line == fault and "training.batch_size 8 does not fit" in fault


def test_what_smoke_foretells_is_the_run_that_will_be_paid(monkeypatch):
    """Its arithmetic, its --set, its pieces of a batch: 48 windows on 8 cards are 6 on each."""
    smoke = train.load_config(modal_trial.ROOT / "configs" / "modal" / "smoke.yaml")
    smoke["training"]["device"] = "cpu"
    plan = modal_app.planned(smoke, ["training.compile=true", "training.deterministic=true", "model.size=small",
                                     "training.precision=fp32", "training.accumulate=2"])
    assert acceptance.piece(plan["training"], 8) == 3 and plan["training"]["device"] == "cpu"
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiled.append(
        torch.are_deterministic_algorithms_enabled()) or net)
    monkeypatch.setattr(acceptance, "checks", lambda config, device, *rest: {
        "training": lambda: acceptance.check_training(config, device, train, 1, 3.0, [])})
    try:
        assert modal_app.acceptance(smoke, plan, "A100-80GB") == [] and compiled == [True]
    finally:
        torch.use_deterministic_algorithms(False)


WORKER = """
import os, signal, sys, time
came = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: came.append(number))
open(f"{sys.argv[0]}.{os.environ['RANK']} of {os.environ['WORLD_SIZE']}", "w").close()
end = time.monotonic() + float(sys.argv[1])
while not came and time.monotonic() < end:
    time.sleep(0.05)
sys.exit(128 + came[0] if came else int(sys.argv[2]))
"""


@pytest.mark.parametrize("code", [75, *(pytest.param(code, marks=pytest.mark.slow) for code in (0, 1, 2, 70))])
def test_several_processes_end_with_the_exit_code_of_one(code, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    signals = argparse.Namespace(number=0)
    before = signal.getsignal(signal.SIGINT)
    assert elastic.launched(2, [str(tmp_path / "worker.py"), "0.1", str(code)], signals) == code
    assert signals.number == 0
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_process_and_is_answered_when_all_have_left(number, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    signals, before = argparse.Namespace(number=0), signal.getsignal(number)

    def send():
        while len(list(tmp_path.glob("worker.py.? of 2"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with elastic.signals_restored():
        assert elastic.launched(2, [str(tmp_path / "worker.py"), "600", "0"], signals) == 128 + number
    assert signals.number == number and signal.getsignal(number) == before


def test_the_saves_of_another_process_are_followed(tmp_path):
    path, seen = tmp_path / "saves.jsonl", []
    path.write_text('{"kind": "save", "file": "last.pt"}\n')
    with elastic.following(path, seen.append):
        path.rename(tmp_path / "away")
        path.mkdir()                            # out of reach for longer than a look takes
        time.sleep(1.2)
        path.rmdir()
        (tmp_path / "away").rename(path)
        with open(path, "a") as file:
            file.write('{"kind": "resume", "file": "last.pt"}\n{"kind": "save", "file": "best.pt"}\n{"kind"')
        wait = time.monotonic() + 60
        while not seen and time.monotonic() < wait:
            time.sleep(0.05)
    assert seen == [tmp_path / "checkpoints" / "best.pt"]


def test_what_a_save_of_another_process_raises_ends_all_processes_and_is_raised(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    path, signals, before = tmp_path / "saves.jsonl", argparse.Namespace(number=0), signal.getsignal(signal.SIGTERM)

    def saved(path):
        raise RuntimeError(f"commits failed, {path.name}")

    def save():
        while len(list(tmp_path.glob("worker.py.? of 2"))) < 2:
            time.sleep(0.05)
        path.write_text('{"kind": "save", "file": "last.pt"}\n')

    threading.Thread(target=save, daemon=True).start()
    with pytest.raises(RuntimeError, match="commits failed, last.pt"):
        with elastic.signals_restored(), elastic.following(path, saved):
            elastic.launched(2, [str(tmp_path / "worker.py"), "600", "0"], signals)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("fails, ends", [(False, KeyboardInterrupt), pytest.param(True, RuntimeError, marks=pytest.mark.slow)])
def test_what_comes_while_the_last_save_is_published_is_not_taken_for_a_failure_of_the_processes(
        fails, ends, tmp_path, monkeypatch):
    """A preemption then cost a retry, and its record said failed."""
    saves, left, launched = tmp_path / "toy" / "saves.jsonl", threading.Event(), elastic.launched
    saves.parent.mkdir()
    (tmp_path / "worker.py").write_text(f"""import os
if os.environ["RANK"] == "0":
    open({str(saves)!r}, "w").write('{{"kind": "save", "file": "last.pt"}}')
""")

    def noted(*arguments):
        code = launched(*arguments)
        left.set()
        return code

    def saved(path):
        left.wait(100)
        end = time.monotonic() + 3
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler and time.monotonic() < end:
            time.sleep(0.05)
        if fails:
            raise RuntimeError("commits failed")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(elastic, "launched", noted)
    monkeypatch.setattr(elastic, "TRAIN", tmp_path / "worker.py")
    config = {"experiment": {"results": str(tmp_path), "name": "toy"}}
    with elastic.signals_restored(), pytest.raises(ends):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        elastic.train_on(2, config, "true", saved, argparse.Namespace(number=0))


def test_the_saves_of_a_run_that_begins_anew_beside_its_damaged_one_are_followed(tmp_path):
    """Its list of saves is shorter than the one that was moved aside: they would not be committed."""
    run, seen = tmp_path / "run", []
    records.put(run / "launch.json", {})
    (run / "saves.jsonl").write_text('{"kind": "save", "file": "last.pt", "time": 1}\n' * 3)
    with elastic.following(run / "saves.jsonl", seen.append):
        run.rename(tmp_path / "run.1")
        records.put(run / "launch.json", {})
        (run / "saves.jsonl").write_text('{"kind": "save", "file": "best.pt", "time": 2}\n')
    assert seen == [run / "checkpoints" / "best.pt"]


def test_the_save_on_the_way_out_is_followed_too(tmp_path):
    """Else a run that went back to a file would do so again in its next container."""
    seen = []
    with elastic.following(tmp_path / "saves.jsonl", seen.append):
        (tmp_path / "saves.jsonl").write_text('{"kind": "save", "file": "last.pt"}\n')
    assert seen == [tmp_path / "checkpoints" / "last.pt"]


# ---- the sweep: what another file is asked for, with what it really gets ----

SWEPT = ["modal_app.py", "run/acceptance.py", "run/attempts.py", "run/elastic.py", "run/fetch.py", "run/launch.py"]
SWEEP = """
import collections, os, sys, threading
from pathlib import Path
here, called = os.getcwd() + "/", set()

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(here) and frame.f_back:
        caller = frame.f_back
        while caller.f_back and caller.f_code.co_filename.endswith("contextlib.py"):
            caller = caller.f_back
        called.add((caller.f_code.co_filename, frame.f_code.co_filename, frame.f_code.co_name))

sys.setprofile(note)
threading.setprofile(note)
import modal_app
from run import attempts
asked = modal_app.options(["--action", "train", "--config", "config.yaml", "--resume"])
modal_app.listing = lambda path, recursive=False: os.listdir(path) if os.path.isdir(path) else []
modal_app.text = lambda path: Path(path).read_text()
assert modal_app.import_corpus.local(attempts.DATA + "/raw", attempts.DATA + "/tusz")["status"] == "finished"
assert modal_app.import_corpus.local(sys.argv[1], attempts.DATA + "/web")["status"] == "finished"
config = modal_app.checked(asked)
assert modal_app.checked(modal_app.options(["--action", "import", "--source", attempts.DATA + "/raw"]))
assert modal_app.checked(modal_app.options(["--action", "import", "--source", sys.argv[1]]))
assert modal_app.checked(modal_app.options(["--action", "train", "--config", "config.yaml"]))
modal_app.tell(asked)
verdict = modal_app.smoke.local(config, "one", "false", "false", modal_app.planned(config))
assert verdict == {"status": "finished", "why": "ready"}, verdict
Path(attempts.DATA, "raw", "blocked").touch()
blocked = modal_app.import_corpus.local(sys.argv[1], attempts.DATA + "/blocked")
assert blocked["status"] == "refused", blocked
os.environ.pop("OMP_NUM_THREADS", None)
both = modal_app.train.local({**config, "experiment": {**config["experiment"], "name": "two"}}, "two", gpu="L4:2")
assert both["status"] == "finished", both
assert modal_app.train.local(config, "three", "false", "true")["status"] == "finished"
assert modal_app.checked(modal_app.options(["--action", "evaluate", "--config", "config.yaml"]))
assert modal_app.evaluate.local(config)["status"] == modal_app.ls.local()["status"] == "finished"
sys.setprofile(None)
for caller, file, name in sorted(called):
    if caller != file:
        print("CALLED", caller.removeprefix(here), file.removeprefix(here), name)
"""


def functions_named(name):
    """(file, function) of the other files' functions that the file `name` names: as an imported name or as an
    attribute of an imported module, train.py handed in as `trainer` among them."""
    tree = ast.parse((modal_trial.ROOT / name).read_text())
    own, modules = {}, {"trainer": "train"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                own[alias.asname or alias.name] = (node.module, alias.name)
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    found = [own[n.id] for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in own]
    found += [(modules[n.value.id], n.attr) for n in ast.walk(tree)
              if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules]
    for module, attribute in set(found):
        if f"{module.replace('.', '/')}.py" in SOURCES:
            thing = inspect.unwrap(getattr(importlib.import_module(module), attribute, None))
            if inspect.isfunction(thing):
                file = Path(thing.__code__.co_filename).relative_to(modal_trial.ROOT)
                yield name, str(file), thing.__code__.co_name


@pytest.fixture
def site_of_edf(tmp_path):
    """The address of a folder of raw EDF with its digests."""
    folder = tmp_path / "edf"
    synth.synth(folder, hours=0.1, patients=2, seed=4)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / "SHA256SUMS.txt").write_text(sums)
    with served(folder) as url:
        yield url


# called where a card has no memory: test_a_batch_that_does_not_fit_is_a_fault_that_names_the_key;
# where a Volume takes no record: test_a_volume_that_takes_no_record_of_a_start_is_said_with_its_place;
# in a container alone: test_a_volume_that_does_not_answer_has_failed_and_the_container_is_not_paid_for_waiting;
# of a server's errors: test_a_damaged_file_is_not_kept_and_a_wrong_address_is_refused;
# by argparse, which stands between: true_or_false; of a call that Modal has begun: as_on_one_machine in modal_trial.py
ELSEWHERE = {("run/fetch.py", "eeg/corpora.py", "one_line"),
             ("run/acceptance.py", "evaluate.py", "is_out_of_memory"), ("modal_app.py", "eeg/disk.py", "fault"),
             ("modal_app.py", "run/watch.py", "answered"), ("modal_app.py", "run/config.py", "true_or_false"),
             ("modal_app.py", "run/launch.py", "guide")}


@pytest.mark.slow
def test_every_function_of_another_file_is_called_with_what_it_really_gets(trial, site_of_edf):
    trial.real(epochs=1)
    project, root = trial.project, trial.folder
    place = project / "run" / "attempts.py"
    text = place.read_text()
    for mount in ("/results", "/data", "/mirror"):
        (root / mount[1:]).mkdir()
        text = text.replace(f'"{mount}"', f'"{root}{mount}"')
    place.write_text(text)
    synth.synth(root / "data" / "raw", hours=0.3, patients=3, seed=3)
    for path in [project / "config.yaml", *project.glob("configs/modal/*.yaml")]:
        text = path.read_text().replace("/results", f"{root}/results").replace("/data/", f"{root}/data/")
        path.write_text(text)
    config = project / "config.yaml"
    config.write_text(config.read_text().replace("training:\n", f"training:\n  mirror: {root}/mirror\n"))
    trial.change(r"SETTLE = \d+ ", "SETTLE = 0 ")
    trial.change(r"CPU, MEMORY = 8, 32 ", "CPU, MEMORY = 1, 32 ")
    done = forked.run([sys.executable, "-c", SWEEP, site_of_edf], cwd=project, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    called = {tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("CALLED ")}
    named = {row for name in SWEPT for row in functions_named(name)}
    missing = sorted(named - called - ELSEWHERE)
    assert len(named) > 40 and not missing, f"never called there: {missing}"


# ---- a corpus from the web ----

class Server(http.server.SimpleHTTPRequestHandler):
    """A folder over HTTP, with parts; `cut` names of which the first answer ends early."""

    cut, asked = set(), []

    def do_GET(self):
        self.path = unquote(self.path)
        data = Path(self.directory, self.path.lstrip("/"))
        if not data.is_file():
            return self.send_error(404)
        data, begin = data.read_bytes(), 0
        if "Range" in self.headers:
            begin = int(self.headers["Range"].split("=")[1].rstrip("-"))
            if begin >= len(data):
                return self.send_error(416)
        self.asked.append((self.path, begin))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        short = self.path in self.cut
        self.cut.discard(self.path)
        self.wfile.write(data[begin:len(data) // 2 if short else None])

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a folder on a server of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def site(tmp_path):
    """(folder, its address) of a corpus with its digests, on a server of this machine."""
    folder = tmp_path / "site"
    (folder / "chb01").mkdir(parents=True)
    files = {"RECORDS": b"chb01/a 1.edf\n", "chb01/a 1.edf": os.urandom(3 << 20), "chb01/summary.txt": b"none\n"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()} {name}\n" for name, data in files.items())
    (folder / "SHA256SUMS.txt").write_text(sums)
    Server.cut, Server.asked = set(), []
    with served(folder) as url:
        yield folder, url


def test_a_corpus_is_fetched_whole_and_an_interrupted_file_goes_on_where_it_broke(site, tmp_path, monkeypatch):
    folder, url = site
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    Server.cut = {"/chb01/a 1.edf"}
    names = []
    fetch.fetch(url, tmp_path / "raw", lambda line: None, names.append)
    for name in ("RECORDS", "chb01/a 1.edf", "chb01/summary.txt"):
        assert (tmp_path / "raw" / name).read_bytes() == (folder / name).read_bytes()
    assert ("/chb01/a 1.edf", (3 << 20) // 2) in Server.asked and len(names) == 3
    assert not list((tmp_path / "raw").rglob("*.part"))
    Server.asked.clear()
    fetch.fetch(url, tmp_path / "raw", lambda line: None)
    assert Server.asked == [("/SHA256SUMS.txt", 0)], "what is there is not fetched again"


def test_an_import_that_can_commit_nothing_ends_and_a_passing_failure_ends_nothing(monkeypatch):
    fails, asked = [1], []

    def commit(volume):
        asked.append(volume)
        if len(asked) <= fails[0]:
            raise OSError("volume busy")

    def import_from(source, out, raw, progress, **options):
        progress("imported recording")
        return 0

    monkeypatch.setattr(fetch, "import_from", import_from)
    monkeypatch.setattr(modal_app, "commit", commit)
    monkeypatch.setattr(modal_app, "COMMIT_EVERY", 0)
    assert modal_app.import_corpus.local("/data/raw", "/data/tusz")["status"] == "finished" and len(asked) == 3
    monkeypatch.setattr(modal_app, "PATIENCE", 0.1)
    fails[0] = 99
    with pytest.raises(RuntimeError, match="commit after imported recording failed for 0.1 s: volume busy"):
        modal_app.import_corpus.local("/data/raw", "/data/tusz")


def test_an_interrupted_fetch_ends_at_once_and_keeps_the_parts(site, tmp_path, monkeypatch):
    """Within the grace of a preemption, whatever the size of the files on their way."""
    folder, url = site
    asked, pieces = threading.Event(), fetch.pieces

    def slow(address, begin=0):
        if not address.endswith("edf"):
            yield from pieces(address, begin)
            return
        for _ in range(2000):
            yield b"x" * 1000
            asked.set()
            time.sleep(0.1)

    monkeypatch.setattr(fetch, "pieces", slow)
    threading.Thread(target=lambda: asked.wait(60) and os.kill(os.getpid(), signal.SIGINT), daemon=True).start()
    began = time.monotonic()
    with elastic.signals_restored(), pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)        # else a suite in the background hears none
        fetch.fetch(url, tmp_path / "raw", lambda line: None)
    part = tmp_path / "raw" / "chb01" / "a 1.edf.part"
    while part.stat().st_size < 1000:       # the signal may come while the pool still starts that thread
        assert time.monotonic() - began < 100
        time.sleep(0.1)
    assert time.monotonic() - began < 100


def test_a_damaged_file_is_not_kept_and_a_wrong_address_is_refused(site, tmp_path, monkeypatch):
    folder, url = site
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    (folder / "chb01" / "summary.txt").write_text("changed\n")
    with pytest.raises(Refused, match="its SHA-256 is"):
        fetch.fetch(url, tmp_path / "raw", lambda line: None)
    assert Server.asked.count(("/chb01/summary.txt", 0)) == 2, "the same bytes twice are no passing fault"
    assert not (tmp_path / "raw" / "chb01" / "summary.txt").exists()
    with pytest.raises(Refused, match="404"):
        fetch.fetch(f"{url}/none", tmp_path / "raw", lambda line: None)
    (folder / "SHA256SUMS.txt").write_text("\n")
    with pytest.raises(Refused, match="SHA256SUMS.txt lists no file"):
        fetch.fetch(url, tmp_path / "raw", lambda line: None)
    for evil in ("../../evil", "/evil", f"*{tmp_path}/evil", "*../evil", "."):
        (folder / "SHA256SUMS.txt").write_text(f"{'0' * 64} {evil}\n")
        with pytest.raises(Refused, match="no digest and name"):
            fetch.fetch(url, tmp_path / "raw", lambda line: None)
    with pytest.raises(TemporaryFault):
        fetch.fetch("http://127.0.0.1:9/corpus", tmp_path / "raw", lambda line: None)


@pytest.mark.slow
def test_a_preempted_run_against_the_stand_in(shared, tmp_path):
    modal_trial.run_case(lambda trial: modal_trial.preempted(trial, at=(10,)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", modal_trial.CASES, ids=lambda case: case.__name__)
def test_the_trial_against_the_stand_in(case, shared, tmp_path):
    modal_trial.run_case(case, tmp_path)
