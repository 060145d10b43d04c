"""modal_app.py against the offline stand-in ../shared/modal: real `modal run`, real container entrypoint.

    python tests/modal_trial.py                     all cases, about six minutes
    python tests/modal_trial.py preempted stuck

Each case copies modal_app.py and checkpoint.py beside a toy trainer with train.py's interface (a step is 20
numbers and a nap; the last case has train.py itself), launches it, and interrupts it in one way. A case
passes when what stands on the results Volume in the end is bit-identical to a run that was never
interrupted. Modal itself is not involved: see the README for what that leaves open.
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
CONFIG = {"experiment": {"name": "toy", "results": "/results", "seed": 1},
          "data": {"path": "/tmp/none", "synth_hours": 1.0},
          "training": {"epochs": EPOCHS, "time_limit_hours": 0.0, "mid_epoch_minutes": 0.005, "device": "cpu",
                       "mirror": ""},
          "toy": {"batches": BATCHES, "seconds": 0.1, "crash_at": 0, "drain": 0.0, "start": 0.0,
                  "refuse_in": 0, "hold": 0}}

TOY = '''
import json, os, signal, sys, time
from pathlib import Path

import yaml
import torch
import checkpoint

class Stop(Exception):
    pass

class Refused(Stop):
    pass

class TemporaryFault(Stop):
    pass

class Signals:
    number = 0

def load_config(path, overrides=()):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"config {path}: {error}") from None

def holds_checkpoints(directory):
    return any(directory.glob("*.pt"))

def move_aside(run, say):
    if run.exists():
        os.rename(run, f"{run}.1")
        say(f"moved {run} aside")

def run(config, resume="false", fresh=False, on_saved=None, signals=None):
    toy, settings, caught, began = config["toy"], config["training"], [], time.monotonic()
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
        deadline = began + 3600 * settings["time_limit_hours"]
        return fit(config, toy, settings, resume, on_saved, caught, deadline)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def fit(config, toy, settings, resume, on_saved, caught, deadline):
    directory = Path(config["experiment"]["results"], config["experiment"]["name"])
    torch.manual_seed(config["experiment"]["seed"])
    model = torch.nn.Linear(20, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    say = lambda line: print(line, flush=True)
    with checkpoint.Checkpointer(directory / "checkpoints", settings["mid_epoch_minutes"], on_saved=on_saved,
                                 say=say) as saver:
        state = saver.resume() if resume == "true" else None
        step, (epoch, batch) = 0, saver.position
        if state:
            model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
            step, (epoch, batch) = state["global_step"], saver.position
        pack = lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                        "batch": batch, "global_step": step, "validation": {}, "config": config}
        rows = open(directory / "metrics.jsonl", "a", buffering=1)
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
                if caught or late:
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
        for name in ("checkpoint.py", "requirements.txt"):
            shutil.copy(ROOT / name, self.project)
        self.run = "toy"
        for name in ("model.py", "data.py"):
            (self.project / name).write_text("")
        (self.project / "evaluate.py").write_text("def main(argv):\n    return print('evaluate', *argv)")
        (self.project / "train.py").write_text(TOY)

    def grace(self, seconds):
        """Shorten how long an attempt waits for a predecessor that did not say that it left."""
        self.change(r"GRACE = \d+ ", f"GRACE = {seconds} ")

    def change(self, before, after):
        """Another constant, or another line, in this trial's copy of modal_app.py. before: a pattern."""
        place = self.project / "modal_app.py"
        text = (place if place.exists() else ROOT / "modal_app.py").read_text()
        assert re.search(before, text), before
        place.write_text(re.sub(before, lambda found: after, text))

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
            async def launch(*arguments, action="train", resume="false"):
                options = ("--action", action, "--config", "config.yaml", "--resume", resume, *arguments)
                line = ("run", "--detach", "modal_app.py", *options)
                code, self.out = await fake.modal(*line, cwd=self.project, wait=300)
                return code, self.out
            fake.launch = launch
            yield fake

    def real(self, epochs):
        """The real modules in place of the toy, and the smoke configuration on less data."""
        from conftest import copy_sources           # here: it imports torch, which a toy does without
        toy = (self.project / "modal_app.py").read_text()
        copy_sources(self.project)
        (self.project / "modal_app.py").write_text(toy)
        shutil.copytree(ROOT / "configs", self.project / "configs")
        config = yaml.safe_load((ROOT / "configs" / "modal" / "smoke.yaml").read_text())
        config["data"].update(synth_hours=0.3, window_seconds=10.0)
        config["evaluation"].update(window_seconds=10.0)
        config["training"].update(batch_size=4, epochs=epochs, device="cpu", precision="fp32")
        (self.project / "config.yaml").write_text(yaml.safe_dump(config))
        self.run = "smoke"

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
    first = await fake.cli(sys.executable, *line, cwd=trial.project, **quiet)
    while not (fake.tasks and "toy step 3\n" in next(iter(fake.tasks.values())).log()):
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
        assert code == 0 and "it was already" in out, out
        assert steps(fake)[-1] == []


async def preempted(trial):
    """Two SIGINTs in a launch with resume=false: its replays resume, no step is lost, no retry is used."""
    trial.config(toy={"seconds": 0.05})
    async with trial.modal() as fake:
        signals = [asyncio.create_task(interrupt(fake, f"toy step {n}\n", i)) for i, n in enumerate((10, 40))]
        code, out = await fake.launch()
        assert code == 0 and all(task.done() for task in signals), out
        expect_whole(trial, fake)
        assert only_input(fake).user_retries == 0
        assert [a["left"] for a in trial.attempts()] == ["preempted", "preempted", "finished"]


async def overlap(trial):
    """The next container starts while the preempted one still saves: it waits for what that one commits."""
    trial.grace(12)
    trial.config(toy={"seconds": 0.2, "drain": 5.0}, training={"mid_epoch_minutes": 5.0})
    async with trial.modal(preempt_after=[8.0], overlap=True, background_commit_every=1.0, grace=20) as fake:
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
    trial.config(toy={"seconds": 0.4})
    async with trial.modal(timeout=16.0, grace=18.0) as fake:       # a container is told every 15 s
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


async def commits_fail(trial):
    """Commits that fail are said and survived; five in a row end the attempt, and the retry goes on."""
    trial.config()
    original, failing = stand_in().FakeModal.VolumeCommit, []

    async def commit(self, stream):
        failing.append(1)
        if len(failing) in (2, 3, 6, 7, 8, 9, 10):
            raise stand_in().GRPCError(stand_in().Status.FAILED_PRECONDITION, "no commit today")
        await original(self, stream)

    stand_in().FakeModal.VolumeCommit = commit
    try:
        async with trial.modal() as fake:
            code, out = await fake.launch()
            assert code == 0 and "(2 in a row): no commit today" in out and "(5 in a row)" in out, out
            expect_whole(trial, fake, redone=20)
            assert only_input(fake).user_retries == 1
    finally:
        stand_in().FakeModal.VolumeCommit = original


async def two_launches(trial):
    """A second launch of a run that a call works on is refused; the death of the client does not matter."""
    trial.config(toy={"hold": 5})
    async with trial.modal() as fake:
        await launch_and_leave(trial, fake)
        code, out = await fake.launch(resume="true")
        assert code == 2 and "stop its app first" in out, out
        release(fake)
        await fake.drain()
        expect_whole(trial, fake)


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
    """A container without a GPU, or one that cannot read the Volume, costs a retry: the run goes on in the next."""
    trial.card('"NVIDIA A100-SXM4-80GB" if had_its_turn() else ""')
    trial.change(r"\ndef card\(\):", """
def had_its_turn():
    if len(list(Path("/results/toy/attempts").glob("*.json"))) != 1:
        return True
    mark = Path("/results/no_gpu")
    seen = mark.exists()
    mark.touch()
    return seen


def card():""")
    trial.config(toy={"seconds": 0.05, "refuse_in": 2}, training={"device": "auto"})
    async with trial.modal() as fake:
        interruption = asyncio.create_task(interrupt(fake, "toy step 10\n"))
        code, out = await fake.launch()
        assert code == 0 and interruption.done(), out
        expect_whole(trial, fake)
        assert "no GPU answers" in out and "a file could not be read" in out, out
        assert [a["left"] for a in trial.attempts()] == ["preempted", "failed", "refused", "finished"] or \
            [a["left"] for a in trial.attempts()] == ["preempted", "refused", "finished"], trial.attempts()


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
    trial.config(toy={"seconds": 0.5}, training={"time_limit_hours": 8 / 3600})
    async with trial.modal() as fake:
        interruption = asyncio.create_task(interrupt(fake, "toy step 6\n"))
        code, out = await fake.launch()
        assert code == 75 and interruption.done() and "training.time_limit_hours reached, saved" in out, out
        assert [a["left"] for a in trial.attempts()] == ["preempted", "time limit"], trial.attempts()
        names = [path.name for path in (trial.committed() / "checkpoints").glob("mid_epoch_001_*.pt")]
        last = max(int(name[-9:-3]) for name in names)
        assert 6 < last < EPOCHS * BATCHES, names


async def unknown_card(trial):
    """A GPU without a list price runs, and its bill says so; of a list, what the container got is billed."""
    trial.config(toy={"seconds": 0.01}, training={"device": "auto"})
    trial.change(r'GPU = "A100-80GB" ', 'GPU = ["NEXT-GPU", "H100"] ')
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
    """A second launch that cannot learn whether the first still works is refused, and told what to do."""
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
            release(fake)
            await fake.drain()
            expect_whole(trial, fake)
    finally:
        stand_in().FakeModal.FunctionGetOutputs = original


async def evaluate_commits(trial):
    """evaluate answers only after its commit; one that fails is tried again."""
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
            assert code == 0 and len(failing) >= 2, out
            assert only_input(fake).user_retries == 1
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


async def acceptance(trial):
    """smoke measures the platform before it trains, and ends with what is not ready."""
    trial.real(epochs=1)
    async with trial.modal(grace=30.0) as fake:
        code, out = await fake.launch("--fresh", "true", action="smoke")
        for line in ("bf16 product of", "hard links: yes", "fsync: yes", "committed in", "training:"):
            assert line in out, (line, out)
        assert code == 1 and "not ready: /data/tusz is not on the data Volume" in out, out


CASES = [finished, preempted, overlap, killed, handed_over, timed_out, stuck, refused, commits_fail,
         two_launches, other_actions, no_gpu, short_deaths, time_limit, unknown_card, cannot_ask,
         evaluate_commits, connection_lost, second_signal, acceptance, real_training]


def run_case(case, folder):
    trial = Trial(folder)
    asyncio.run(case(trial))


def main(names):
    if not stand_in():
        print(f"skipped: no stand-in for Modal at {STAND_IN}")
        return 0
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))        # no container may outlive the trial
    failed = 0
    for case in [c for c in CASES if not names or c.__name__ in names]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="modal_trial_") as folder:
            try:
                run_case(case, folder)
                verdict = "passed"
            except AssertionError as error:
                verdict, failed = f"FAILED {error}", failed + 1
        print(f"{case.__name__:14} {time.monotonic() - began:5.1f} s  {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
