"""modal_app.py without an account or a network: its command line through the real `modal run`, its
definitions, and what one attempt does, through `.local()` in processes of their own with the toy trainer of
modal_trial.py. With --slow, the whole trial."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import forked
import modal_app
import modal_trial

DRIVER = """
import copy, json, sys
import modal_app
config = json.loads(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    try:
        print("ENDED", json.dumps(modal_app.train.local(copy.deepcopy(config), *arguments)))
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

    def attempt(self, *attempts, sends=None, seconds=0.0, crash_at=0):
        """One process that makes `attempts`, each [launch, resume, fresh]: how each ended, and its log.

        sends: a signal, sent once the log tells of step 5; the toy waits there for it."""
        config = {section: dict(values) for section, values in modal_trial.CONFIG.items()}
        config["experiment"]["results"] = str(self.results)
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
    return Runs(trial)


def test_help_names_every_option_and_its_choices():
    code, out, _ = cli("--help", start=subprocess.run)
    assert code == 0
    assert "--action [train|evaluate|smoke|ls]" in out and "--resume [true|false]" in out
    assert "--config" in out and "--fresh [true|false]" in out


@pytest.mark.parametrize("arguments, line", [
    (["--action", "trian"], "'--action': 'trian' is not one of 'train', 'evaluate', 'smoke', 'ls'."),
    (["--action", "train", "--resume", "yes"], "'--resume': 'yes' is not one of 'true', 'false'."),
    (["--config", "x.yaml"], "Missing option '--action'."),
    (["--action", "train", "--epochs", "3"], "No such option"),
    (["--action", "evaluate", "--split", "test"], "'--split': 'test' is not one of 'all', 'train', 'dev', 'eval'."),
])
def test_wrong_options_get_one_clear_line_before_anything_is_started(arguments, line):
    code, _, error = cli(*arguments)
    assert code == 2 and line in error


def test_nothing_is_read_that_a_container_does_not_have(trial):
    for path in trial.project.iterdir():
        if path.name != "modal_app.py":
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


@pytest.mark.parametrize("text, line", [
    ("experiment: {results: results}", "experiment.results must be /results"),
    ("experiment: {results: /results}\ndata: {path: data/tusz}", "data.path must be a folder in /data"),
    ("experiment: {results: /results}\ndata: {path: /data}\ntraining: {epoch: 3}", "training.epochs"),
])
def test_a_config_that_cannot_work_on_modal_is_refused_here(text, line, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        modal_app.checked(tmp_path / "config.yaml")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and line in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["smoke", "train"])
def test_shipped_configs_put_results_on_the_volume_and_leave_the_time_limit_to_the_app(name):
    import train as trainer
    config = trainer.load_config(modal_trial.ROOT / "configs" / "modal" / f"{name}.yaml")
    assert config["experiment"]["results"] == modal_app.RESULTS
    assert config["training"]["time_limit_hours"] == 0
    assert config["data"]["path"].startswith((modal_app.DATA, modal_app.RESULTS))


ONE, TWO, THREE = (["one", "false", "false"], ["two", "false", "false"], ["three", "false", "true"])


def test_a_replayed_resume_false_resumes_and_a_finished_run_returns_at_once(runs):
    [(end, log)] = runs.attempt(ONE, sends=signal.SIGINT, seconds=0.05)
    assert end.startswith("KeyboardInterrupt") and runs.records()[0]["left"] == "preempted"
    (end, log), *later = runs.attempt(ONE, ONE, ["two", "true", "false"])
    assert "finished" in end and "from step 0" not in log and "toy step 1\n" not in log
    for end, log in later:
        assert '"finished"' in end and "it was already" in end and "toy step" not in log
    assert len(runs.records()) == 2


def test_another_launch_is_refused_unless_it_resumes_and_fresh_moves_the_old_run_aside(runs):
    first, second, third = runs.attempt(ONE, TWO, THREE)
    assert '"refused"' in second[0] and "--resume true" in second[0]
    assert '"finished"' in third[0] and "from step 0" in third[1]
    assert sorted(p.name for p in runs.results.iterdir()) == ["toy", "toy.1"]


def test_a_cancelled_call_saves_and_ends_as_cancelled(runs):
    [(end, log)] = runs.attempt(ONE, sends=signal.SIGUSR1, seconds=0.05)
    assert end.startswith("InputCancellation") and "saved mid_epoch" in log
    assert runs.records()[0]["left"] == "cancelled"


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


CONFIG = {"training": {"time_limit_hours": 0.0}}


def leave_records(run, minutes, **record):
    """Attempts of launch `one`, each `minutes` long by the start of the next."""
    for number in range(1, len(minutes) + 1):
        began = time.time() - 60 * sum(minutes[number - 1:])
        common = {"launch": "one", "call": None, "progress": [0, False, 0], "began": began, "seen": began}
        modal_app.put(run / "attempts" / f"{number:03d}.json", common | record)


def test_preemptions_do_not_count_as_attempts_without_progress(tmp_path):
    preempted, died = tmp_path / "preempted", tmp_path / "died"
    leave_records(preempted, [60] * 5, left="preempted")
    assert modal_app.decided(preempted, CONFIG, "one", "false") is None
    leave_records(died, [60] * 3, left="")
    assert modal_app.decided(died, CONFIG, "one", "false")["status"] == "stuck"
    assert modal_app.decided(died, CONFIG, "two", "false") is None


def test_deaths_without_a_word_in_the_first_minutes_do_not_count_unless_there_are_many(tmp_path):
    some, many, half = tmp_path / "some", tmp_path / "many", modal_app.SHORT / 2
    leave_records(some, [half] * (modal_app.SHORT_DEATHS - 1), left="")
    assert modal_app.decided(some, CONFIG, "one", "false") is None
    leave_records(many, [half] * modal_app.SHORT_DEATHS, left="")
    verdict = modal_app.decided(many, CONFIG, "one", "false")
    assert verdict["status"] == "stuck" and "died without a word" in verdict["why"]


def test_the_time_limit_is_the_runs_over_all_attempts_of_a_launch(tmp_path):
    config = {"training": {"time_limit_hours": 2.0}}
    record = {"launch": "one", "began": 0, "seen": 1.5 * 3600, "left": "preempted", "progress": [0, False, 0]}
    modal_app.put(tmp_path / "attempts" / "001.json", record)
    assert modal_app.decided(tmp_path, config, "one", "false") is None
    assert modal_app.limit_attempt(config, tmp_path, "one", 24)
    assert config["training"]["time_limit_hours"] == pytest.approx(0.5)
    config["training"]["time_limit_hours"] = 2.0
    modal_app.put(tmp_path / "attempts" / "002.json", record | {"seen": 0.5 * 3600})
    assert modal_app.decided(tmp_path, config, "one", "false")["status"] == "time limit"
    assert modal_app.decided(tmp_path, config, "two", "false") is None
    assert modal_app.limit_attempt(config, tmp_path, "two", 1) is False
    assert config["training"]["time_limit_hours"] == pytest.approx(0.75)


def test_the_bill_adds_up_the_attempts_and_foretells_the_run_from_the_measured_speed(tmp_path):
    common = {"epochs": 10, "dollars": 3.0, "left": ""}
    modal_app.put(tmp_path / "attempts" / "001.json", common | {"began": 0, "seen": 3600})
    assert modal_app.bill(tmp_path) == f"{tmp_path.name}: 1.00 h in 1 attempts, about $3.00 so far"
    rows = [{"kind": "train", "epoch": 1, "batch": b, "batches": 100, "step": b, "time": 27.0 * b}
            for b in (20, 40, 60, 80, 100)]
    rows.append({"kind": "validation", "epoch": 1, "step": 100, "time": 3600.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "tr')
    assert modal_app.bill(tmp_path).endswith("1.00 h per epoch as measured: 9.0 h left, "
                                              "about $30.00 for the whole run")


def test_an_hour_costs_what_gpu_cores_and_memory_cost():
    assert modal_app.hourly("A100-80GB") == pytest.approx(2.50 + 8 * 0.047 + 32 * 0.008)
    assert modal_app.hourly(["A100-80GB", "H100"]) == modal_app.hourly("A100-80GB")
    assert modal_app.hourly("NVIDIA A100-SXM4-80GB") == modal_app.hourly("A100-80GB")
    assert modal_app.hourly("NVIDIA A100-SXM4-40GB") == modal_app.hourly("A100-40GB")
    assert modal_app.hourly("NVIDIA H100 80GB HBM3") == modal_app.hourly("H100!")
    assert modal_app.hourly("NVIDIA L4") < modal_app.hourly("NVIDIA L40S")
    assert modal_app.hourly("H100:2") == pytest.approx(2 * 3.95 + 8 * 0.047 + 32 * 0.008)
    assert modal_app.hourly("NEXT-GPU") is None and modal_app.hourly("NVIDIA Next") is None


def test_a_preempted_run_against_the_stand_in(shared, tmp_path):
    modal_trial.run_case(modal_trial.preempted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", modal_trial.CASES, ids=lambda case: case.__name__)
def test_the_trial_against_the_stand_in(case, shared, tmp_path):
    modal_trial.run_case(case, tmp_path)
