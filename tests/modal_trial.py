"""modal_app.py against the offline stand-in ../shared/modal: real `modal run`, real container entrypoint.

    python tests/modal_trial.py                     all cases
    python tests/modal_trial.py preempted stuck

Each case copies the program beside a toy trainer with train.py's interface (a step is 20 numbers and a nap;
the cases with `real` have train.py itself), launches it, and interrupts it in one way. A case passes when what
stands on the results Volume in the end is bit-identical to a run that was never interrupted. Modal itself is not
involved: docs/modal.md says what that leaves open.
"""
import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT.parent / "shared" / "modal" / "fake_modal.py"
EPOCHS, BATCHES = 3, 20
LIMIT = 900                                         # s for a launch, five times what a busy machine takes
CONFIG = {"experiment": {"name": "toy", "results": "/results", "seed": 1},
          "data": {"path": "/tmp/none", "synth_hours": 1.0},
          "training": {"epochs": EPOCHS, "time_limit_hours": 0.0, "mid_epoch_minutes": 0.005, "device": "cpu",
                       "mirror": ""},
          "toy": {"batches": BATCHES, "seconds": 0.1, "crash_at": 0, "drain": 0.0, "start": 0.0,
                  "refuse_in": 0, "hold": 0, "typo": 0}}

TOY = '''
import json, os, signal, sys, time
from pathlib import Path

import yaml
import torch
import checkpoint

from eeg.disk import Refused, Stop, TemporaryFault

class Signals:
    number = 0

def load_config(path, overrides=()):
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"config {path}: {error}") from None
    for text in overrides:
        name, _, value = text.partition("=")
        section, _, key = name.partition(".")
        config[section][key] = json.loads(value)
    return config

def check(config, say):
    if config["toy"]["typo"]:
        raise Refused("a typo in the config")


def holds_checkpoints(directory):
    return any(directory.glob("*.pt"))

def move_aside(run, say, second=None):
    if run.exists():
        os.rename(run, f"{run}.1")
        say(f"moved {run} aside")

def run(config, resume="false", fresh=False, on_saved=None, signals=None):
    toy, settings, caught = config["toy"], config["training"], []
    directory = Path(config["experiment"]["results"], config["experiment"]["name"])
    if len(list(directory.glob("attempts/*.json"))) == toy["refuse_in"]:
        raise Refused("a file could not be read")
    print("toy starts", flush=True)
    time.sleep(toy["start"])            # nothing at stake yet: SIGINT raises here
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def catch(number, frame):
        if not caught:
            caught.append(number)
            signals.number = number
        elif number in before:          # the second one acts as if nobody listened
            signal.signal(number, before.pop(number))
            os.kill(os.getpid(), number)

    before = {n: signal.signal(n, catch) for n in numbers}
    try:
        return fit(config, toy, settings, resume, on_saved, caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def fit(config, toy, settings, resume, on_saved, caught):
    directory = Path(config["experiment"]["results"], config["experiment"]["name"])
    torch.manual_seed(config["experiment"]["seed"])
    model = torch.nn.Linear(20, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    say = lambda line: print(line, flush=True)
    with checkpoint.Checkpointer(directory / "checkpoints", settings["mid_epoch_minutes"], on_saved=on_saved,
                                 say=say) as saver:
        say(f"toy: resume {resume}")
        state = saver.resume({"true": True, "false": False}.get(resume, resume))
        step, (epoch, batch) = 0, saver.position
        if state:
            model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
            step, (epoch, batch) = state["global_step"], saver.position
        pack = lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                        "batch": batch, "global_step": step, "validation": {}, "config": config}
        rows = open(directory / "metrics.jsonl", "a", buffering=1)
        # from the first step on: how long a machine takes to get there says nothing here
        deadline = time.monotonic() + 3600 * settings["time_limit_hours"]
        for epoch in range(epoch, settings["epochs"] + 1):
            while batch < toy["batches"]:
                while step == toy["hold"] > 0 and not caught and not (directory / "go").exists():
                    time.sleep(0.05)
                if step + 1 == toy["crash_at"]:
                    raise ValueError("the toy crashes here, always")
                torch.manual_seed(step)
                loss = model(torch.randn(8, 20)).square().mean()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
                time.sleep(toy["seconds"])
                batch, step = batch + 1, step + 1
                print(f"toy step {step}", flush=True)
                rows.write(json.dumps({"kind": "train", "epoch": epoch, "batch": batch, "step": step,
                                       "batches": toy["batches"], "time": time.time()}) + chr(10))
                late = time.monotonic() > deadline
                if caught:
                    time.sleep(toy["drain"])
                if caught or late or saver.due():
                    saver.save_mid(pack())
                    if caught or late:      # a signal since the save was asked for waits for the next step
                        saver.wait()
                        return 128 + caught[0] if caught else 75
            saver.save_epoch(pack(), metric=step)
            batch = 0
    return 0
'''


def stand_in():
    """The module fake_modal, or None where it is not on this machine."""
    if not STAND_IN.exists():
        return None
    if "fake_modal" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fake_modal", STAND_IN)
        sys.modules["fake_modal"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fake_modal"])
    return sys.modules["fake_modal"]


class Trial:
    """A copy of the app beside the toy, the state of the stand-in, and what the launches said."""

    def __init__(self, folder):
        self.folder, self.project = Path(folder), Path(folder, "project")
        self.project.mkdir(parents=True)
        self.grace(3)
        from conftest import copy_sources           # here: it imports torch
        copied = (self.project / "modal_app.py").read_text()
        copy_sources(self.project)
        shutil.copy(ROOT / "requirements.txt", self.project)
        (self.project / "modal_app.py").write_text(copied)
        self.run = "toy"
        (self.project / "evaluate.py").write_text("def main(argv):\n    return print('evaluate', *argv)")
        (self.project / "train.py").write_text(TOY)

    def grace(self, seconds):
        """Shorten how long an attempt waits for a predecessor that did not say that it left, and for the
        claim of another launch."""
        self.change(r"GRACE = \d+ ", f"GRACE = {seconds} ")
        self.change(r"SETTLE = \d+ ", "SETTLE = 1 ", expected=False)

    def change(self, before, after, expected=True):
        """Another constant, or another line, in this trial's copy of modal_app.py. before: a pattern."""
        place = self.project / "modal_app.py"
        text = (place if place.exists() else ROOT / "modal_app.py").read_text()
        assert re.search(before, text) or not expected, before
        place.write_text(re.sub(before, lambda found: after, text))

    def patience(self, seconds, retries=10):
        """How long a Volume that refuses is asked again, and how many containers are tried."""
        self.change(r"PATIENCE = \d+ ", f"PATIENCE = {seconds} ", expected=False)
        self.change(r"RETRIES = \d+ ", f"RETRIES = {retries} ")

    def card(self, expression):
        """What the container takes for the name of its GPU: a Python expression."""
        self.change(r"return torch.cuda.get_device_name\(\) .*", f"return {expression}")

    def config(self, **changes):
        """Write config.yaml with `section={key: value}` changes; JSON is YAML."""
        merged = {section: values | changes.get(section, {}) for section, values in CONFIG.items()}
        (self.project / "config.yaml").write_text(json.dumps(merged))

    @contextlib.asynccontextmanager
    async def modal(self, **options):
        """The stand-in with this trial's Volumes; `fake.launch()` is `modal run`: (exit code, output)."""
        usual = {"background_commit_every": None, "grace": 8.0, "jail": os.geteuid() == 0 and shutil.which("chroot") is not None, "verbose": False}
        options = usual | options
        async with stand_in().FakeModal(self.folder / "state", **options) as fake:
            async def launch(*arguments, action="train", resume="false", env=None):
                options = ("--action", action, "--config", "config.yaml", "--resume", resume, *arguments)
                line = ("run", "--detach", "modal_app.py", *options)
                code, self.out = await fake.modal(*line, cwd=self.project, wait=LIMIT, env=env)
                return code, self.out
            fake.launch = launch
            yield fake

    def real(self, epochs, **training):
        """The real modules in place of the toy, and the smoke configuration on less data."""
        for name in ("train.py", "evaluate.py"):
            shutil.copy(ROOT / name, self.project)
        shutil.copytree(ROOT / "configs", self.project / "configs")
        config = yaml.safe_load((ROOT / "configs" / "modal" / "smoke.yaml").read_text())
        config["data"].update(synth_hours=0.3, window_seconds=10.0)
        config["evaluation"].update(window_seconds=10.0)
        config["training"].update(batch_size=4, epochs=epochs, device="cpu", precision="fp32", **training)
        (self.project / "config.yaml").write_text(yaml.safe_dump(config))
        # what smoke foretells: the real run's, with a model that a CPU steps in a second
        planned = {"experiment": {"name": "planned", "results": "/results"}, "data": {"path": "/data/tusz"},
                   "model": {"size": "small"}, "training": {"precision": "fp32"}}
        (self.project / "configs" / "modal" / "train.yaml").write_text(yaml.safe_dump(planned))
        self.run = "smoke"

    def volume(self, name):
        """The folder of what is committed on the Volume `name`, which is made where it is new."""
        place = self.folder / "state" / "volumes" / name
        (place / "committed").mkdir(parents=True, exist_ok=True)
        if not (place / "meta.json").exists():
            facts = {"id": f"vo-{name}", "name": name, "version": 2 if name == "holdfast-mirror" else 1}
            (place / "meta.json").write_text(json.dumps(facts))
        return place / "committed"

    def corpus(self, name):
        """A folder of raw EDF, three small synthetic recordings with a seizure each, on the data Volume."""
        from eeg import synth
        synth.synth(self.volume("holdfast-data") / name, hours=0.3, patients=3, seed=3)

    def imported(self, name):
        """Imported recordings on the data Volume."""
        from eeg import corpora
        self.corpus("made")
        made = self.volume("holdfast-data") / "made"
        corpora.import_corpus(made, self.volume("holdfast-data") / name, say=lambda line: None)
        shutil.rmtree(made)

    def committed(self):
        return self.folder / "state" / "volumes" / "holdfast-results" / "committed" / self.run

    def weights(self):
        """The model in last.pt on the Volume, all of its files verified first."""
        import checkpoint
        for path in self.committed().glob("checkpoints/*.pt"):
            checkpoint.verify(path)
        state = checkpoint.load(self.committed() / "checkpoints" / "last.pt")
        return state["global_step"], state["model"]

    def attempts(self):
        return [json.loads(p.read_text()) for p in sorted(self.committed().glob("attempts/*.json"))]


def steps(fake):
    """Numbers of the steps that each container trained, in order of start."""
    return [[int(n) for n in re.findall(r"toy step (\d+)", task.log())] for task in fake.tasks.values()]


def uninterrupted():
    """What EPOCHS of the toy lead to, trained here."""
    import torch
    torch.manual_seed(CONFIG["experiment"]["seed"])
    model = torch.nn.Linear(20, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(EPOCHS * BATCHES):
        torch.manual_seed(step)
        optimizer.zero_grad(), model(torch.randn(8, 20)).square().mean().backward(), optimizer.step()
    return model.state_dict()


def expect_whole(trial, fake, redone=0):
    """The run ended as if nothing had happened, and at most `redone` steps were trained twice."""
    step, weights = trial.weights()
    expected = uninterrupted()
    assert step == EPOCHS * BATCHES, trial.out
    assert all(weights[k].equal(expected[k]) for k in expected), "weights differ from an uninterrupted run"
    trained = [n for task in steps(fake) for n in task]
    assert set(trained) >= {1, EPOCHS * BATCHES} and len(trained) - len(set(trained)) <= redone, steps(fake)


async def launch_and_leave(trial, fake):
    """A detached launch whose client is killed while its container trains."""
    line = "-m modal run --detach modal_app.py --action train --config config.yaml".split()
    quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
    before = len(fake.tasks)
    first = await fake.cli(sys.executable, *line, cwd=trial.project, **quiet)
    while not (len(fake.tasks) > before and "toy step 3\n" in list(fake.tasks.values())[-1].log()):
        await asyncio.sleep(0.1)
    first.kill()


def release(fake):
    """Let the toy go on that waits at the step `hold`."""
    for task in fake.tasks.values():
        for volume in task.volume_dirs.values():
            if (volume / "toy").is_dir():
                (volume / "toy" / "go").touch()


def only_input(fake):
    return next(iter(fake.inputs.values()))


async def interrupt(fake, text, number=0):
    """SIGINT to container `number` once its log holds `text`."""
    while not (len(fake.tasks) > number and text in list(fake.tasks.values())[number].log()):
        await asyncio.sleep(0.05)
    list(fake.tasks.values())[number].signal(signal.SIGINT)


# ---- the cases ----

async def finished(trial):
    """A run ends, its definitions are as written, and the next launch of it returns at once."""
    trial.config(toy={"seconds": 0.01})
    async with trial.modal() as fake:
        code, out = await fake.launch()
        assert code == 0 and "modal_app.py: finished" in out, out
        expect_whole(trial, fake)
        function = fake.function("train")
        gpu = function.resources.gpu_config
        assert (gpu.gpu_type, gpu.count, function.timeout_secs) == ("A100-80GB", 1, 86400)
        assert function.retry_policy.retries == 10 and function.single_use_containers
        assert (function.resources.milli_cpu, function.resources.memory_mb) == (8000, 32768)
        mounts = {m.mount_path: (fake.volumes[m.volume_id].name, m.read_only) for m in function.volume_mounts}
        assert mounts == {"/results": ("holdfast-results", False), "/mirror": ("holdfast-mirror", False),
                          "/data": ("holdfast-data", True)}
        files = {f"/root/{path.relative_to(trial.project)}" for path in trial.project.rglob("*.py")}
        assert set(fake.uploaded(function)) == files
        layers = " ".join(fake.dockerfile(function.image_id))
        assert "torch==2.13.0" in layers and "gcc" in layers and "pytest" not in layers, layers
        versions = {fake.volumes[m.volume_id].name: fake.volumes[m.volume_id].version for m in function.volume_mounts}
        assert versions["holdfast-results"] == 1 and versions["holdfast-mirror"] == 2, versions
        code, out = await fake.launch(resume="true")
        assert code == 0 and "modal_app.py: finished" in out, out
        assert steps(fake)[-1] == []


async def preempted(trial, at=(10, 40)):
    """SIGINTs at these steps in a launch with resume=false: its replays resume, no step is lost, no retry is used."""
    trial.config(toy={"seconds": 0.05})
    async with trial.modal() as fake:
        signals = [asyncio.create_task(interrupt(fake, f"toy step {n}\n", i)) for i, n in enumerate(at)]
        code, out = await fake.launch()
        assert code == 0 and all(task.done() for task in signals), out
        expect_whole(trial, fake)
        assert only_input(fake).user_retries == 0
        assert [a["left"] for a in trial.attempts()] == ["preempted"] * len(at) + ["finished"]


class Once:
    """A moment for `preempt_after`, which the stand-in compares with seconds: once the first container's log holds
    `text`, however long that takes."""

    fake = None

    def __init__(self, text):
        self.text = text

    def __le__(self, seconds):
        return self.text in next(iter(self.fake.tasks.values())).log()


async def overlap(trial):
    """The next container starts while the preempted one still saves: it waits for what that one commits."""
    trial.grace(12)
    trial.config(toy={"seconds": 0.2, "drain": 5.0}, training={"mid_epoch_minutes": 5.0})
    moment = Once("toy step 10\n")
    async with trial.modal(preempt_after=[moment], overlap=True, background_commit_every=1.0, grace=20) as fake:
        moment.fake = fake
        code, out = await fake.launch()
        assert code == 0, out
        expect_whole(trial, fake)
        waited = [task.log() for task in fake.tasks.values()][1]
        assert "did not say that it left" in waited and "from step 0" not in waited, waited


async def killed(trial):
    """SIGKILL without warning, torn background commits: only steps since the last snapshot are repeated."""
    trial.config(training={"mid_epoch_minutes": 0.01})
    async with trial.modal(kill_after=[6.0, 8.0], background_commit_every=0.3, open_files="torn") as fake:
        code, out = await fake.launch()
        assert code == 0, out
        expect_whole(trial, fake, redone=2 * 20)
        assert only_input(fake).user_retries == 0


async def handed_over(trial):
    """The soft deadline: saved, one retry per container, nothing repeated."""
    trial.change(r"MARGIN = 0.25 ", f"MARGIN = {24 - 4 / 3600} ")
    trial.config()
    async with trial.modal() as fake:
        code, out = await fake.launch()
        assert code == 0, out
        expect_whole(trial, fake)
        assert [a["left"] for a in trial.attempts()][:-1] == ["handed over"] * only_input(fake).user_retries


async def timed_out(trial):
    """The platform's own timeout, late commits dropped: the retry goes on from the last snapshot before."""
    # longer than one attempt takes, and room for a container that starts for half a minute
    trial.config(toy={"seconds": 0.7})
    async with trial.modal(timeout=32.0, grace=18.0) as fake:       # a container is told every 15 s
        code, out = await fake.launch()
        assert code == 0, out
        expect_whole(trial, fake, redone=5 * only_input(fake).user_retries)
        assert "canceled input" in next(iter(fake.tasks.values())).log()


async def stuck(trial):
    """A failure that always comes back ends the run after three attempts without progress, as a result."""
    trial.config(toy={"crash_at": 7, "seconds": 0.01}, training={"mid_epoch_minutes": 5.0})
    async with trial.modal() as fake:
        code, out = await fake.launch()
        assert code == 1 and "stuck: no progress in 3 attempts" in out, out
        assert len(only_input(fake).attempts) == 4 and "the toy crashes here" in out
        assert only_input(fake).output.result.status == stand_in().G.GENERIC_STATUS_SUCCESS


async def refused(trial):
    """resume=false on a run that holds checkpoints is refused, not retried; fresh moves it aside, once."""
    trial.config(toy={"seconds": 0.01})
    async with trial.modal() as fake:
        assert (await fake.launch())[0] == 0
        code, out = await fake.launch()
        assert code == 2 and "--resume true" in out, out
        assert len(fake.tasks) == 1, "refused here, before a container was paid for"
    trial.config()
    async with trial.modal(preempt_after=[6.0]) as fake:
        code, out = await fake.launch("--fresh", "true")
        assert code == 0, out
        expect_whole(trial, fake)
    names = sorted(p.name for p in trial.committed().parent.iterdir())
    assert names == ["toy", "toy.1"], names


@contextlib.contextmanager
def failing(method, fails):
    """The stand-in answers `method` with an error while fails(how often it was asked)."""
    original, asked = getattr(stand_in().FakeModal, method), []

    async def answer(self, stream):
        asked.append(1)
        wrong = fails(len(asked))
        if wrong:
            raise stand_in().GRPCError(*wrong)
        await original(self, stream)

    setattr(stand_in().FakeModal, method, answer)
    try:
        yield asked
    finally:
        setattr(stand_in().FakeModal, method, original)


def status(name, text):
    return getattr(stand_in().Status, name), text


async def commits_fail(trial):
    """Commits that fail, eight in a row, are said with the age of the last good one; no attempt ends of it."""
    trial.config()
    with failing("VolumeCommit", lambda number: 3 <= number <= 10 and status("FAILED_PRECONDITION", "volume busy")):
        async with trial.modal() as fake:
            code, out = await fake.launch()
            assert code == 0 and "failed (5 in a row): " in out and "volume busy" in out, out
            expect_whole(trial, fake)
            assert only_input(fake).user_retries == 0 and "the last good one is" in out, out


async def no_reload(trial):
    """A Volume that cannot be reloaded for a while costs no container; one that stays so ends the call, said as
    such, and the next launch goes on."""
    trial.config()
    trial.patience(60, retries=2)
    wrong = status("FAILED_PRECONDITION", "reload failed")
    with failing("VolumeReload", lambda number: number <= 3 and wrong):
        async with trial.modal() as fake:
            code, out = await fake.launch()
            assert code == 0 and only_input(fake).user_retries == 0, out
            expect_whole(trial, fake)


async def never_reload(trial):
    """A Volume that cannot be reloaded at all ends the call, which is said, and the next launch goes on."""
    trial.config()
    trial.patience(1, retries=2)
    down = []
    with failing("VolumeReload", lambda number: down and status("INTERNAL", "reload failed")):
        async with trial.modal() as fake:
            interruption = asyncio.create_task(interrupt(fake, "toy step 10\n"))
            interruption.add_done_callback(down.append)
            code, out = await fake.launch()
            assert code == 1 and "goes on at Modal" not in out and "ended with" in out, out
            assert len(only_input(fake).attempts) == 4, only_input(fake).attempts
            down.clear()
            code, out = await fake.launch(resume="true")
            assert code == 0, out
            expect_whole(trial, fake)


async def two_at_once(trial):
    """Of two launches within the seconds that a GPU takes to start one trains; the other one is refused."""
    trial.config(toy={"seconds": 0.05}, training={"device": "auto"})
    trial.change(r"SETTLE = \d+ ", "SETTLE = 8 ", expected=False)
    trial.card('time.sleep(8) or "NVIDIA A100-SXM4-80GB"')
    async with trial.modal() as fake:
        ends = await asyncio.gather(fake.launch(), fake.launch())
        assert sorted(code for code, _ in ends) == [0, 2], ends
        expect_whole(trial, fake)
        assert len(trial.attempts()) == 1, trial.attempts()


async def late_claim(trial):
    """Of two launches at once, one of which can publish its claim only after the other has looked for it, one trains;
    also where that one has moved the run aside, with the records that both have seen."""
    trial.config(toy={"hold": 5}, training={"device": "auto"})
    (trial.volume("holdfast-results") / "toy" / "attempts").mkdir(parents=True)
    old = {"launch": "old", "call": None, "left": "failed", "progress": [0, False, 0], "began": 0, "seen": 0, "dollars": 1}
    for number in (1, 2, 3):
        (trial.committed() / "attempts" / f"{number:03d}.json").write_text(json.dumps(old))
    trial.change(r"SETTLE = \d+ ", "SETTLE = 8 ", expected=False)
    trial.change(r"\ndef card\(\):", "\nasked = []\n\n\ndef card():")
    trial.card('asked.append(time.sleep(0 if asked else 25)) or "NVIDIA A100-SXM4-80GB"')       # a slow start
    original, first, late = stand_in().FakeModal.VolumeCommit, [], []

    async def commit(self, stream):
        first[:] = first or [(self.bound_task.id, time.monotonic())]
        if self.bound_task.id == first[0][0]:
            while not late:                 # until the other one has looked, too
                await asyncio.sleep(0.05)
        elif not late or time.monotonic() < late[0] + 10:
            late[:] = late or [time.monotonic()]
            raise stand_in().GRPCError(stand_in().Status.FAILED_PRECONDITION, "volume busy")
        await original(self, stream)

    stand_in().FakeModal.VolumeCommit = commit
    try:
        async with trial.modal() as fake:
            both = [asyncio.create_task(fake.launch("--fresh", "true")) for _ in range(2)]
            done, _ = await asyncio.wait(both, timeout=200, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1, steps(fake)
            release(fake)
            ends = await asyncio.gather(*both)
            assert sorted(code for code, _ in ends) == [0, 2] and "stop its app first" in str(ends), ends
            expect_whole(trial, fake)
            assert len(trial.attempts()) == 1 and "commit of the claim failed" in str(ends), ends
    finally:
        stand_in().FakeModal.VolumeCommit = original


async def two_launches(trial):
    """A second launch of a run that a call works on is refused, that of a copy of it is not; the death of the client
    does not matter."""
    trial.config(toy={"hold": 5})
    async with trial.modal() as fake:
        await launch_and_leave(trial, fake)
        code, out = await fake.launch(resume="true")
        assert code == 2 and "stop its app first" in out, out
        shutil.copytree(trial.committed(), trial.committed().with_name("copy"))
        trial.config(experiment={"name": "copy"})
        code, out = await fake.launch(resume="true")
        assert code == 0, out
        release(fake)
        await fake.drain()
        expect_whole(trial, fake, redone=EPOCHS * BATCHES)


async def other_actions(trial):
    """ls prints checkpoints and the bill; evaluate takes best.pt; a bad config starts no container."""
    trial.config(toy={"seconds": 0.01})
    async with trial.modal() as fake:
        assert (await fake.launch())[0] == 0
        code, out = await fake.modal("run", "modal_app.py", "--action", "ls", cwd=trial.project)
        assert code == 0 and "last.pt" in out and "about $" in out and "for the whole run" in out, out
        code, out = await fake.launch("--split", "dev", action="evaluate")
        assert code == 0 and "--checkpoint /results/toy/checkpoints/best.pt" in out and "--split dev" in out, out
        containers = len(fake.tasks)
        code, out = await fake.launch("--split", "dev")
        assert code == 2 and "--split belongs to --action evaluate" in out, out
        trial.config(data={"path": "/data/absent", "synth_hours": 0.0})
        code, out = await fake.launch()
        assert code == 2 and "modal volume put holdfast-data IMPORTED_FOLDER /absent" in out, out
        trial.config(experiment={"results": "results"})
        code, out = await fake.launch()
        assert code == 2 and "experiment.results must be /results" in out, out
        assert len(fake.tasks) == containers


async def real_training(trial):
    """train.py itself, interrupted by SIGINT: every row once, and the weights of a run left alone."""
    trial.real(epochs=2)
    ends = []
    for text in ("never said", "committed mid_epoch"):
        async with trial.modal(grace=30.0) as fake:
            interruption = asyncio.create_task(interrupt(fake, text))
            code, out = await fake.launch("--fresh", "true")
            interruption.cancel()
            assert code == 0, out
            ends.append(trial.weights())
            lines = (trial.committed() / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            steps = [row["step"] for row in rows if row["kind"] == "train"]
            assert steps == sorted(set(steps)), steps
    assert [a["left"] for a in trial.attempts()] == ["preempted", "finished"]
    assert ends[0][0] == ends[1][0] and all(ends[0][1][k].equal(ends[1][1][k]) for k in ends[0][1])


async def no_gpu(trial):
    """A GPU that refuses its first call is asked again in the same container; a container that has none, or cannot
    read the Volume, costs a retry: the run goes on in the next."""
    trial.card('"NVIDIA A100-SXM4-80GB" if answers() else ""')
    trial.change(r"\ndef card\(\):", """
def answers():
    begun = len(list(Path("/results/toy/attempts").glob("*.json")))
    mark = Path(f"/results/asked_{begun}")
    asked = int(mark.read_text()) + 1 if mark.exists() else 1
    mark.write_text(str(asked))
    return asked > (1, 10, 0, 0, 0)[begun]


def card():""")
    trial.change(r"time.sleep\(2\)", "time.sleep(0.01)", expected=False)
    trial.config(toy={"seconds": 0.05, "refuse_in": 2}, training={"device": "auto"})
    async with trial.modal() as fake:
        interruption = asyncio.create_task(interrupt(fake, "toy step 10\n"))
        code, out = await fake.launch()
        assert code == 0 and interruption.done(), out
        expect_whole(trial, fake)
        assert "no GPU answers" in out and "a file could not be read" in out, out
        assert [a["left"] for a in trial.attempts()] == ["preempted", "refused", "finished"], trial.attempts()
        assert only_input(fake).user_retries == 2


async def short_deaths(trial):
    """Containers that die in their first seconds, three without a word and two preempted, end nothing."""
    trial.config(toy={"start": 6.0, "seconds": 0.01}, training={"mid_epoch_minutes": 5.0})
    trial.grace(1)
    async with trial.modal(kill_after=[5.0, 5.0, 5.0], grace=3.0) as fake:
        interruptions = [asyncio.create_task(interrupt(fake, "toy starts", number)) for number in (3, 4)]
        code, out = await fake.launch()
        assert code == 0 and all(task.done() for task in interruptions), out
        expect_whole(trial, fake)
        ends = [a["left"] for a in trial.attempts()]
        assert ends[-3:] == ["preempted", "preempted", "finished"] and set(ends[:-3]) <= {""}, ends


async def time_limit(trial):
    """training.time_limit_hours is the whole run's, over its attempts: then it ends, saved, with exit code 75."""
    trial.config(toy={"seconds": 1.5}, training={"time_limit_hours": 60 / 3600})
    async with trial.modal() as fake:
        interruption = asyncio.create_task(interrupt(fake, "toy step 6\n"))
        code, out = await fake.launch()
        assert code == 75 and interruption.done() and "training.time_limit_hours reached, saved" in out, out
        assert [a["left"] for a in trial.attempts()] == ["preempted", "time limit"], trial.attempts()
        names = [path.name for path in (trial.committed() / "checkpoints").glob("mid_epoch_001_*.pt")]
        last = max(int(name[-9:-3]) for name in names)
        assert 6 <= last < EPOCHS * BATCHES, names      # a slow machine's second attempt may have no time left for a step


async def unknown_card(trial):
    """A GPU without a list price runs, and its bill says so; of a list, what the container got is billed."""
    trial.config(toy={"seconds": 0.01}, training={"device": "auto"})
    trial.change(r'GPU = "A100-80GB" ', 'GPU = "NEXT-GPU,H100" ')
    trial.card('"NVIDIA Next GPU"')
    async with trial.modal() as fake:
        code, out = await fake.launch()
        assert code == 0 and "price unknown" in out, out
    trial.card_is = '"NVIDIA H100 80GB HBM3"'
    trial.change(r'return "NVIDIA Next GPU"', f"return {trial.card_is}")
    async with trial.modal() as fake:
        code, out = await fake.launch("--fresh", "true")
        assert code == 0, out
        assert abs(trial.attempts()[-1]["dollars"] - (3.95 + 8 * 0.047 + 32 * 0.008)) < 1e-9, trial.attempts()


async def cannot_ask(trial):
    """A second launch that cannot learn whether the first still works is refused, and told what to do; done, it goes
    on."""
    trial.config(toy={"hold": 5})
    original = stand_in().FakeModal.FunctionGetOutputs

    async def outputs(self, stream):
        if self.bound_task is not None:
            raise stand_in().GRPCError(stand_in().Status.PERMISSION_DENIED, "not your call")
        await original(self, stream)

    stand_in().FakeModal.FunctionGetOutputs = outputs
    try:
        async with trial.modal() as fake:
            await launch_and_leave(trial, fake)
            code, out = await fake.launch(resume="true")
            assert code == 2 and "cannot be told" in out and "modal app list" in out, out
            assert "modal volume rm holdfast-results /toy/launch.json" in out, out
            release(fake)
            await fake.drain()
            expect_whole(trial, fake)
            (trial.committed() / "launch.json").unlink()
            code, out = await fake.launch(resume="true")
            assert code == 0, out
    finally:
        stand_in().FakeModal.FunctionGetOutputs = original


async def evaluate_commits(trial):
    """evaluate answers only after its commit; one that fails is tried again, in the same container."""
    trial.config(toy={"seconds": 0.01})
    async with trial.modal() as fake:
        assert (await fake.launch())[0] == 0
    original, failing = stand_in().FakeModal.VolumeCommit, []

    async def commit(self, stream):
        failing.append(1)
        if len(failing) == 1:
            raise stand_in().GRPCError(stand_in().Status.FAILED_PRECONDITION, "no commit today")
        await original(self, stream)

    stand_in().FakeModal.VolumeCommit = commit
    try:
        async with trial.modal() as fake:
            code, out = await fake.launch(action="evaluate")
            assert code == 0 and len(failing) >= 2 and "commit of the scores failed" in out, out
            assert only_input(fake).user_retries == 0
    finally:
        stand_in().FakeModal.VolumeCommit = original


async def connection_lost(trial):
    """A client that loses its connection says that the detached call goes on, not that it ended."""
    trial.config()
    original, asked = stand_in().FakeModal.FunctionGetOutputs, []

    async def outputs(self, stream):
        if self.bound_task is None:
            asked.append(1)
            raise stand_in().GRPCError(stand_in().Status.UNAUTHENTICATED, "the token expired")
        await original(self, stream)

    stand_in().FakeModal.FunctionGetOutputs = outputs
    try:
        async with trial.modal() as fake:
            code, out = await fake.launch()
            assert code == 1 and "no more news of call" in out and "it goes on at Modal" in out, out
            assert "ended with" not in out, out
            await fake.drain()
            expect_whole(trial, fake)
    finally:
        stand_in().FakeModal.FunctionGetOutputs = original


async def second_signal(trial):
    """A second SIGINT, while the first one's save is committed, does not cost the exit commit."""
    trial.config(toy={"drain": 1.0}, training={"mid_epoch_minutes": 5.0})
    async with trial.modal(commit_seconds=2.0, grace=20.0) as fake:
        async def twice():
            await interrupt(fake, "toy step 8\n")
            await interrupt(fake, "saved mid_epoch")
        signals = asyncio.create_task(twice())
        code, out = await fake.launch()
        assert code == 0 and signals.done(), out
        expect_whole(trial, fake)
        first = trial.attempts()[0]
        assert first["left"] == "preempted", trial.attempts()
        log = next(iter(fake.tasks.values())).log()
        assert log.count("committed") == 1, log         # the start; what came after it is the exit commit's


async def ready(trial):
    """smoke with the data there: every line of its report, a training, and "ready"; then the price of it all."""
    trial.real(epochs=1)
    trial.imported("tusz")
    trial.patience(60, retries=1)
    async with trial.modal(grace=30.0) as fake:
        code, out = await fake.launch("--fresh", "true", action="smoke")
        for line in (r"this test: about \$\d", r"smoke: torch 2\.", r"smoke: bf16 product of \d",
                     r"smoke: results Volume: locks: yes, fsync: yes, hard links: yes",
                     r"smoke: checkpoint of \d+ MB: written in \d+\.\d s, committed in \d",
                     r"smoke: data Volume: /data/tusz: \d+ windows/s",
                     r"smoke: training: \d+\.\d windows/s at batch 8",
                     r"smoke: planned, \d+ windows an epoch: \d+\.\d\d h, about \$\d+\.\d\d; 100 epochs: \d+ h, about \$"):
            assert re.search(line, out), (line, out)
        assert code == 0 and "modal_app.py: finished: ready" in out and len(fake.tasks) == 1, out


async def not_ready(trial):
    """Whatever the acceptance test meets is its result, from one container: raw EDF in place of recordings, a commit
    too slow for a preemption that comes during another one."""
    trial.real(epochs=1)
    trial.change(r"SMOKE_TIMEOUT = 24, 0.25 ", "SMOKE_TIMEOUT = 24, 1.0 ", expected=False)
    trial.corpus("tusz")
    trial.patience(60, retries=1)
    async with trial.modal(grace=30.0, commit_seconds=14.5) as fake:
        code, out = await fake.launch("--fresh", "true", action="smoke")
        assert code == 1 and "not ready: " in out and "goes on at Modal" not in out, out
        last = out[out.index("not ready: "):]
        assert "data: DataError: /data/tusz" in last and "needs twice that of its 30 s" in last, out
        assert len(fake.tasks) == 1 and only_input(fake).user_retries == 0, "nothing is paid twice"


async def fresh_with_mirror(trial):
    """--fresh moves the run and its second copy aside, both; a config that is refused there touches neither."""
    trial.real(epochs=1, mirror="/mirror")
    roots = [trial.volume("holdfast-results"), trial.volume("holdfast-mirror")]

    def names():
        return [sorted(path.name for path in root.glob("smoke*") if "data" not in path.name) for root in roots]

    async with trial.modal(grace=30.0) as fake:
        assert (await fake.launch())[0] == 0, trial.out
        saved = [commit for volume in fake.volumes.values() for commit in volume.commits
                 if volume.name == "holdfast-mirror" and commit[2] == "explicit"]
        assert any("smoke/checkpoints/last.pt" in commit[3] for commit in saved), saved
        code, out = await fake.launch("--fresh", "true")
        assert code == 0 and names() == [["smoke", "smoke.1"]] * 2, (names(), out)
        text = (trial.project / "config.yaml").read_text()
        (trial.project / "config.yaml").write_text(text.replace("data:\n", "data:\n  dev_patients: [nobody]\n"))
        code, out = await fake.launch("--fresh", "true")
        assert code == 2 and "nobody" in out and names() == [["smoke", "smoke.1"]] * 2, (names(), out)


async def two_cards(trial):
    """GPU "A100-80GB:2" trains on both, through a preemption, with the exit codes of one; both are billed."""
    trial.real(epochs=2)
    trial.change(r'GPU = "A100-80GB" ', 'GPU = "A100-80GB:2" ')
    async with trial.modal(grace=60.0) as fake:
        interruption = asyncio.create_task(interrupt(fake, "committed mid_epoch"))
        code, out = await fake.launch()
        assert code == 0 and interruption.done() and "2 processes" in out, out
        assert [a["left"] for a in trial.attempts()] == ["preempted", "finished"], trial.attempts()
        assert only_input(fake).user_retries == 0 and fake.function("train").resources.gpu_config.count == 2
        rows = [json.loads(line) for line in (trial.committed() / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if row["kind"] == "train"]
        assert steps == sorted(set(steps)) and trial.weights()[0] == steps[-1], steps
        assert abs(trial.attempts()[-1]["dollars"] - (2 * 2.50 + 8 * 0.047 + 32 * 0.008)) < 1e-9


async def refused_unpaid(trial):
    """What the Volumes have not is refused before a container starts."""
    (trial.volume("holdfast-data") / "raw").mkdir()
    (trial.volume("holdfast-data") / "raw" / "a.edf").write_bytes(b"0       ")
    async with trial.modal() as fake:
        trial.config(training={"init": "/data/weights.pt"})
        code, out = await fake.launch()
        assert code == 2 and "training.init /data/weights.pt is no file on the Volume" in out, out
        trial.config(training={"init": "weights.pt"})
        code, out = await fake.launch()
        assert code == 2 and "training.init must be a file on a Volume" in out, out
        trial.config(data={"path": "/data/raw", "synth_hours": 0.0})
        code, out = await fake.launch()
        assert code == 2 and "holds raw EDF" in out and "--action import --source /data/raw" in out, out
        trial.config()
        code, out = await fake.launch(action="evaluate")
        assert code == 2 and "holds no best.pt" in out, out
        (trial.volume("holdfast-results") / "toy" / "checkpoints").mkdir(parents=True)
        code, out = await fake.launch(resume="/results/toy/checkpoints")
        assert code == 2 and "--resume /results/toy/checkpoints is no file on the Volume" in out, out
        code, out = await fake.launch(action="smoke")       # the toy has no configs/modal/train.yaml to foretell
        assert code == 2 and "train.yaml: " in out and "Traceback" not in out, out
        assert not fake.tasks


async def unanswered(trial):
    """A Modal that refuses before a call began is one line, not a traceback; records that make no bill hide no run."""
    trial.config(toy={"seconds": 0.01}, experiment={"name": "two words"})
    trial.run = "two words"
    for method in ("VolumeListFiles", "FunctionMap"):
        with failing(method, lambda number: status("RESOURCE_EXHAUSTED", "not today")):
            async with trial.modal() as fake:
                code, out = await fake.launch()
                assert code == 1 and "ResourceExhaustedError: not today; whether a call began" in out, out
                assert "Traceback" not in out and not fake.tasks, out
    async with trial.modal() as fake:
        code, out = await fake.launch()
        assert code == 0 and "modal volume get holdfast-results 'two words/checkpoints/best.pt' ." in out, out
        other = trial.committed().with_name("another") / "attempts"
        other.mkdir(parents=True)
        (other / "001.json").write_text('{"dollars": "a lot"}')
        code, out = await fake.modal("run", "modal_app.py", "--action", "ls", cwd=trial.project)
        assert code == 0 and "bill of another failed: " in out and "two words: 0.0" in out, out


async def as_on_one_machine(trial):
    """Bare --resume and --fresh, --resume FILE, --set and --gpu; ls tells each run's call, app, state and dollars; a
    launch that ends with its terminal says so."""
    trial.config(toy={"seconds": 0.01})
    trial.change(r"function.get\(timeout=0\)", "function.get(timeout=0)", expected=False)

    async with trial.modal() as fake:
        async def typed(*words, action="train"):
            config = () if action == "ls" else ("--config", "config.yaml")
            line = ("run", "modal_app.py", "--action", action, *config, *words)
            return await fake.modal(*line, cwd=trial.project, wait=LIMIT)

        code, out = await typed("--resume", "--set", "training.epochs=1", "--gpu", "H100")
        assert code == 0 and "no --detach: Ctrl-C" in out and "on H100, 8 cores" in out, out
        assert fake.function("train").resources.gpu_config.gpu_type == "H100"
        assert abs(trial.attempts()[-1]["dollars"] - (3.95 + 8 * 0.047 + 32 * 0.008)) < 1e-9
        file = "/results/toy/checkpoints/checkpoint_epoch_001.pt"
        code, out = await typed("--resume", file)
        assert code == 0 and f"toy: resume {file}" in out, out
        code, out = await typed("--resume", file.replace("001", "009"))
        assert code == 2 and "is no file on the Volume" in out, out
        expect_whole(trial, fake)
        code, out = await typed("--fresh")
        assert code == 0 and (trial.committed().parent / "toy.1").is_dir(), out
        code, out = await typed(action="ls")
        owner = json.loads((trial.committed() / "launch.json").read_text())
        for run in ("toy", "toy.1"):
            standing = re.search(rf"^{re.escape(run)}: .*\n    (.*)", out, re.M)[1]
            assert (f"call {owner['call']}, app {owner['app']}: " in standing) == (run == "toy"), out
            assert ": finished, about $" in standing, out
        assert code == 0
        trial.config(experiment={"name": "other"}, toy={"hold": 5})
        trial.run = "other"
        await launch_and_leave(trial, fake)
        code, out = await typed(action="ls")
        working = re.search(r"call (fc-\d+), app (ap-\d+): working, about \$[\d.]+; stop: modal app stop (ap-\d+)", out)
        assert code == 0 and working and working[2] == working[3], out
        code, out = await fake.modal("app", "stop", working[2], cwd=trial.project)


async def imported_there(trial):
    """A folder of raw EDF on the data Volume is imported there, through a preemption, and then trained on."""
    trial.real(epochs=1)
    trial.change(r"COMMIT_EVERY = \d+ ", "COMMIT_EVERY = 0 ", expected=False)
    trial.change(r"CPU, MEMORY = 8, 32 ", "CPU, MEMORY = 2, 32 ")
    trial.corpus("raw")
    text = (trial.project / "config.yaml").read_text()
    text = text.replace("path: /results/smoke-data", "path: /data/tusz").replace("synth_hours: 0.3", "synth_hours: 0.0")
    (trial.project / "config.yaml").write_text(text)
    async with trial.modal(grace=60.0) as fake:
        interruption = asyncio.create_task(interrupt(fake, "committed after imported recording"))
        code, out = await fake.launch("--source", "/data/raw", action="import")
        assert code == 0 and interruption.done() and "modal_app.py: finished: /data/tusz" in out, out
        assert len(only_input(fake).attempts) == 2 and only_input(fake).user_retries == 0, only_input(fake).attempts
        data = trial.volume("holdfast-data") / "tusz"
        assert (data / "index.json").exists() and len(list(data.glob("**/*.h5"))) == len(list(
            (trial.volume("holdfast-data") / "raw").glob("**/*.edf")))
        function = fake.function("import_corpus")
        assert not function.resources.gpu_config.gpu_type and function.resources.milli_cpu == 2000
        code, out = await fake.launch()
        assert code == 0 and trial.weights()[0] > 0, out


async def imported_from_a_bucket(trial):
    """s3:// is mounted read-only with the secret's keys, as Modal documents it, and imported from its mount point."""
    trial.real(epochs=1)
    from eeg import synth
    synth.synth(trial.folder / "bucket", hours=0.1, patients=2, seed=3)
    trial.change(r'SOURCE = "/source" ', f'SOURCE = "{trial.folder}/bucket" ', expected=False)
    text = (trial.project / "config.yaml").read_text()
    (trial.project / "config.yaml").write_text(text.replace("path: /results/smoke-data", "path: /data/tusz"))
    os.environ["FAKE_MODAL_SECRETS"] = "keys"
    async with trial.modal(grace=30.0) as fake:
        code, out = await fake.launch("--source", "s3://corpus/tuh/v2", "--secret", "keys", action="import")
        assert code == 0 and "modal_app.py: finished: /data/tusz" in out, out
        [mount] = fake.function("import_corpus").cloud_bucket_mounts
        assert (mount.bucket_name, mount.key_prefix, mount.read_only) == ("corpus", "tuh/v2/", True)
        assert mount.credentials_secret_id and mount.mount_path == f"{trial.folder}/bucket"
        assert (trial.volume("holdfast-data") / "tusz" / "index.json").exists()


CASES = [finished, preempted, overlap, killed, handed_over, timed_out, stuck, refused, commits_fail, no_reload,
         never_reload, two_launches, two_at_once, late_claim, other_actions, no_gpu, short_deaths, time_limit, unknown_card,
         cannot_ask, evaluate_commits, connection_lost, second_signal, refused_unpaid, unanswered, as_on_one_machine, ready,
         not_ready, fresh_with_mirror, two_cards, imported_there, imported_from_a_bucket, real_training]


def run_case(case, folder):
    trial = Trial(folder)
    asyncio.run(case(trial))


def main(names):
    if not stand_in():
        print(f"skipped: no stand-in for Modal at {STAND_IN}")
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))        # no container may outlive the trial
    failed = 0
    for case in [c for c in CASES if not names or c.__name__ in names]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="modal_trial_") as folder:
            try:
                run_case(case, folder)
                verdict = "passed"
            except (AssertionError, TimeoutError) as error:
                verdict, failed = f"FAILED {type(error).__name__} {error}", failed + 1
        print(f"{case.__name__:22} {time.monotonic() - began:5.1f} s  {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
