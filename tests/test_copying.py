"""docs/copying.md is true: its script and its recipes, run beside copies of checkpoint.py and run/loop.py, killed and compared;
and `batches`, which they all loop over, keeps its promises for every sampler and any number of workers."""
import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

import checkpoint
import crash
import forked
from checkpoint import Checkpointer
from conftest import ROOT
from helpers import same
from run.loop import Loop
from run.mirror import Mirrored

PAGE = (ROOT / "docs" / "copying.md").read_text()
BLOCKS = dict(re.findall(r"^##+ ([^\n]*)\n(?:(?!##).)*?```python\n(.*?)```", PAGE, re.S | re.M))
SCRIPT = BLOCKS["The script"]
HEAD, LOOP = re.fullmatch(r"(.*?)(^with Loop.*)", SCRIPT, re.S | re.M).groups()
HERE = HEAD.replace("from loop", "from run.loop")
PLAIN = """
for epoch in range(EPOCHS):
    for x, y in loader:
        train(x, y)
    score = error()
"""

# runs a script; from the step `step` on, after `delay` seconds, `number` is sent to the whole process group, by a process of
# its own: workers obey a SIGTERM of the training, which means them alone
WATCH = """
import random, runpy, subprocess, sys, threading
import numpy
import checkpoint

script, step, delay, number, minutes = sys.argv[1], *map(float, sys.argv[2:])
random.seed(0)                      # the page's script seeds torch alone, and all random states are compared
numpy.random.seed(0)
init, due = checkpoint.Checkpointer.__init__, checkpoint.Checkpointer.due
sent = []

def often(self, *arguments, **options):
    init(self, *arguments, **{**options, "mid_epoch_minutes": minutes})

def watched(self):
    if number and self.global_step >= step and not sent:
        sent.append(threading.Timer(delay, subprocess.run, (["sh", "-c", f"kill -{number:.0f} 0"],)))
        sent[0].start()
    return due(self)

checkpoint.Checkpointer.__init__ = often
checkpoint.Checkpointer.due = watched
runpy.run_path(script, run_name="__main__")
"""


def placed(folder, code, **changes):
    """`folder` with copies of the two files and the program `code`, in which numbers are set anew."""
    for name, value in changes.items():
        code, count = re.subn(rf"^(.*\b{name}(?:, \w+)? = ).*$", rf"\g<1>{value}", code, count=1, flags=re.M)
        assert count, name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.py", "run/loop.py"):
        shutil.copy2(ROOT / name, folder)
    (folder / "script.py").write_text(code)
    (folder / "watch.py").write_text(WATCH)
    return folder


def ran(folder, step=0, delay=0.0, number=0, minutes=0.0):
    """Exit code of the script in `folder`, and what it printed; a snapshot after every step by default."""
    words = [sys.executable, "watch.py", "script.py", *map(str, (step, delay, int(number), minutes))]
    done = forked.run(words, cwd=folder, capture_output=True, text=True, start_new_session=True)
    return done.returncode, done.stdout + done.stderr


def finished(folder, **options):
    code, said = ran(folder, **options)
    assert code == 0, said
    return said


def states(folder):
    """What a resume takes, of each file that an epoch wrote: all but which process saved it."""
    paths = [p for p in sorted((folder / "checkpoints").glob("*.pt")) if "mid" not in p.name]
    assert paths
    loaded = {path.name: checkpoint.load(path) for path in paths}
    return {name: {k: v for k, v in state.items() if k not in ("holdfast", "save_counter")} for name, state in loaded.items()}


def ends_alike(tmp_path, code, steps, number=signal.SIGKILL, seed=0, **changes):
    """A run of `code` that is killed at each of `steps`, at a random moment of it, ends as one never killed."""
    rng = random.Random(seed)
    whole, cut = (placed(tmp_path / name, code, **changes) for name in ("whole", "cut"))
    finished(whole)
    for step in steps:
        exit_code, said = ran(cut, step, rng.uniform(0, 0.03), number)
        assert exit_code == (-number if number == signal.SIGKILL else 128 + number), said
    finished(cut)
    ends = states(whole), states(cut)
    for name, state in ends[0].items():
        assert not [key for key in state if not same(state[key], ends[1][name].get(key))], name
    assert ends[0].keys() == ends[1].keys()
    return whole, cut


def lines(code):
    return [line for line in code.splitlines() if line.strip()]


def test_what_the_page_says_of_find_resume_is_so(tmp_path):
    assert "files named as those of\na `Checkpointer` whose states hold whole numbers `epoch` and `batch`" in PAGE
    checkpoint.atomic_save({"epoch": 1, "batch": 7}, tmp_path / "step_7.pt")
    assert checkpoint.find_resume(tmp_path) is None
    checkpoint.atomic_save({"epoch": 1}, tmp_path / "last.pt")
    assert checkpoint.find_resume(tmp_path) is None
    checkpoint.atomic_save({"epoch": 1, "batch": 7}, tmp_path / "mid_epoch_001_000007.pt")
    assert checkpoint.find_resume(tmp_path).name == "mid_epoch_001_000007.pt"


# ---- the script ----

def test_the_script_has_at_most_twelve_lines_more_than_without_checkpoints(tmp_path):
    plain = "".join(line for line in HEAD.splitlines(True) if "import Loop" not in line and not line.startswith("parts")) + PLAIN
    assert "checkpoint" not in plain and "parts" not in plain
    finished(placed(tmp_path, plain))
    more = len(lines(SCRIPT)) - len(lines(plain))
    print(f"{more} lines more than the {len(lines(plain))} without checkpoints")
    assert 0 < more <= 12


def test_the_script_killed_at_random_ends_bit_identical_in_every_part(tmp_path):
    rng = random.Random(1)
    steps = [rng.randrange(at, at + 8) for at in (2, 14, 26, 38)]           # of 60, 10 an epoch
    whole, cut = ends_alike(tmp_path, SCRIPT, steps)
    last = checkpoint.load(whole / "checkpoints/last.pt")
    assert {"model", "ema", "optimizer", "schedule", "scaler", "random"} <= last.keys() and last["global_step"] == 60
    assert checkpoint.load(whole / "checkpoints/best.pt")["ema"]["n_averaged"] > 0


@pytest.mark.slow
def test_the_script_ends_bit_identical_after_a_sigterm_to_all_its_processes_workers_too(tmp_path):
    ends_alike(tmp_path, SCRIPT, (5, 33), signal.SIGTERM)


def test_a_finished_script_has_nothing_left_to_do(tmp_path):
    folder = placed(tmp_path, SCRIPT, EPOCHS=1)
    finished(folder)
    before = states(folder)
    finished(folder)
    assert same(states(folder), before)


# ---- the recipes ----

RECIPES = {"Every N steps", "Gradient accumulation", "The k best by a metric", "best.pt by an interval of evaluation, without epochs",
           "Weights of an old torch.save file into a fresh run", "An iterable dataset",
           "Several optimizers", "A GAN", "torch.compile", "DDP"}


def recipe(name):
    """The program of a recipe: what stands before the script's loop, and its own or the script's loop."""
    block = BLOCKS[name]
    return HEAD + block + ("" if "saver.settle()" in block else "\n\n" + LOOP)


def test_every_block_of_the_page_has_its_test():
    assert set(BLOCKS) == RECIPES | {"The script"} and PAGE.count("```python") == len(BLOCKS)
    tested = re.findall(r'recipe\("([^"]+)"\)', (ROOT / "tests/test_copying.py").read_text())
    assert set(tested) == RECIPES


def test_every_n_steps_a_file_is_saved_and_kept(tmp_path):
    folder = placed(tmp_path, recipe("Every N steps"), EPOCHS=3, EVERY=4)
    finished(folder, minutes=1000)
    names = {path.name for path in (folder / "checkpoints").glob("mid*")}
    steps = range(4, 31, 4)
    assert names == {f"mid_epoch_{1 + (n - 1) // 10:03d}_{1 + (n - 1) % 10:06d}.pt" for n in steps}


@pytest.mark.slow
def test_gradients_that_were_accumulated_are_not_lost_by_a_kill_or_a_sigterm_between_two_steps(tmp_path):
    whole, _ = ends_alike(tmp_path, recipe("Gradient accumulation"), (6, 13), EPOCHS=3)
    assert checkpoint.load(whole / "checkpoints/last.pt")["schedule"]["last_epoch"] == 9      # three steps of ten batches
    ends_alike(tmp_path / "asked", recipe("Gradient accumulation"), (6,), number=signal.SIGTERM, EPOCHS=2)


@pytest.mark.slow
def test_the_k_best_are_those_of_the_lowest_metric_also_after_a_kill(tmp_path):
    given = "\n\ndef error():\n    return [0.5, 3e-7, float('nan'), 1e-7, 0.9, 2e-7][saver.position[0] - 1]\n\n\n"
    code = recipe("The k best by a metric").replace("from pathlib", given + "from pathlib")
    whole, cut = ends_alike(tmp_path, code, (25,))
    for folder in (whole, cut):
        found = sorted(path.name for path in (folder / "top").glob("*"))
        assert found == ["1.000000e-07_epoch_004.pt", "2.000000e-07_epoch_006.pt", "3.000000e-07_epoch_002.pt"]
    best = checkpoint.load(cut / "checkpoints/best.pt")["model"]
    assert same(dict(best), dict(checkpoint.load(cut / "top" / found[0])))


@pytest.mark.slow
def test_without_epochs_best_is_chosen_at_each_interval_of_evaluation(tmp_path):
    code = recipe("best.pt by an interval of evaluation, without epochs").replace("= 100_000, 1000", "= 30, 6")
    given = "\n\ndef error():\n    return {6: 0.5, 12: 0.1, 18: 0.4, 24: 0.2, 30: 0.3}[saver.global_step]\n\n\n"
    code = code.replace("STEPS, EVERY", given + "STEPS, EVERY")
    whole, cut = ends_alike(tmp_path, code, (9, 20))
    assert checkpoint.load(cut / "checkpoints/best.pt")["global_step"] == 12
    assert checkpoint.load(cut / "checkpoints/last.pt")["global_step"] == 30


def test_old_weights_begin_a_fresh_run_and_only_a_fresh_one(tmp_path):
    code = recipe("Weights of an old torch.save file into a fresh run")
    untrained = placed(tmp_path, code.replace("<= EPOCHS", "<= 0") + "torch.save(model.state_dict(), 'now.pt')\n")
    scope = {}
    exec(HERE, scope)
    old = {name: torch.full_like(value, 3) for name, value in scope["model"].state_dict().items()}
    torch.save({"model": old}, tmp_path / "old.pt")
    finished(untrained)
    assert same(dict(torch.load(tmp_path / "now.pt")), old)
    folder = placed(tmp_path, code, EPOCHS=1)
    finished(folder)
    (tmp_path / "old.pt").unlink()
    finished(folder)                        # with a state of its own nobody looks for the file


@pytest.mark.slow
def test_an_iterable_dataset_is_passed_by_to_where_it_was(tmp_path):
    code = recipe("An iterable dataset")
    whole, cut = ends_alike(tmp_path, code, (4, 13), EPOCHS=2)
    last = checkpoint.load(whole / "checkpoints/last.pt")
    assert (last["global_step"], last["batch"]) == (20, 10)
    seldom = placed(tmp_path / "seldom", code, EPOCHS=2)    # no snapshot counts the batches of an epoch
    finished(seldom, minutes=1000)
    assert same(states(seldom), states(whole))
    assert ran(placed(tmp_path / "asked", code, EPOCHS=2), 4, 0.0, signal.SIGTERM)[0] == 128 + signal.SIGTERM
    finished(tmp_path / "asked")
    assert same(states(tmp_path / "asked"), states(whole))


@pytest.mark.slow
def test_several_optimizers_end_bit_identical(tmp_path):
    whole, _ = ends_alike(tmp_path, recipe("Several optimizers"), (7, 16), EPOCHS=3)
    last = checkpoint.load(whole / "checkpoints/last.pt")
    assert last["warmup"]["last_epoch"] == 30
    assert "exp_avg" in last["body"]["state"][0] and "momentum_buffer" in last["head"]["state"][0]


@pytest.mark.slow
def test_a_gan_ends_bit_identical(tmp_path):
    whole, _ = ends_alike(tmp_path, recipe("A GAN"), (7, 16), EPOCHS=3)
    assert not (whole / "checkpoints/best.pt").exists()


@pytest.mark.slow
def test_a_compiled_model_has_the_names_of_the_plain_one_and_goes_on_from_its_file(tmp_path):
    code = recipe("torch.compile").replace("model.compile()", "model.compile(backend='eager')")
    whole, cut = ends_alike(tmp_path, code, (7,), EPOCHS=2)
    scope = {}
    exec(HERE, scope)
    assert list(checkpoint.load(cut / "checkpoints/last.pt")["model"]) == list(scope["model"].state_dict())
    part = placed(tmp_path / "part", code, EPOCHS=2)
    assert ran(part, 7, 0.01, signal.SIGKILL)[0]
    assert "resume: chose" in finished(placed(part, SCRIPT, EPOCHS=2))
    assert checkpoint.load(part / "checkpoints/last.pt")["global_step"] == 20


def torchrun(folder, *kill, restarts=0, processes=2):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             "--max-restarts", str(restarts), "watch.py", "script.py", *map(str, kill), "0"]
    return forked.run(words, cwd=folder, capture_output=True, text=True, start_new_session=True, timeout=300)


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_meet_and_go_on(tmp_path):
    step = "            train(x, y)\n"
    given = step + """
            restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
            if number == 3 and (rank == 1 or restart == "3") and restart < "4":
                os.kill(os.getpid(), 9 if restart < "3" else 15)
"""
    slow = 'mode="min", before_save=lambda directory: __import__("time").sleep(8 if saver.stopping() else 0))'
    code = recipe("DDP").replace(step, given).replace('mode="min")', slow)
    folder = placed(tmp_path, code, EPOCHS=5)
    done = torchrun(folder, 0, 0, 0, restarts=4)
    assert done.returncode == 0 and done.stdout.count("resume: chose") == 4, done.stderr
    assert "exitcode: 143" in done.stderr
    assert "resume: chose mid_epoch_001_000003.pt" in done.stdout, "no process leaves before the slow save of process 0"
    assert checkpoint.load(folder / "checkpoints/last.pt")["global_step"] == 25


@pytest.mark.slow
def test_another_number_of_processes_begins_the_epoch_in_progress_anew(tmp_path):
    step = "            train(x, y)\n"
    code = recipe("DDP").replace(step, step + "            os.write(1, f'trained {saver.position[0]} {number} of {size};'.encode())\n")
    folder = placed(tmp_path, code, EPOCHS=2)
    assert torchrun(folder, 7, 0, 15).returncode
    assert checkpoint.peek(checkpoint.find_resume(folder / "checkpoints"))["position"] > (2, 0)
    done = torchrun(folder, 0, 0, 0, processes=3)
    assert done.returncode == 0, done.stderr
    trained = re.findall(r"trained (\d \d) of 3;", done.stdout)
    assert sorted(trained) == sorted(f"2 {number}" for number in (1, 2, 3, 4) for _ in range(3))


@pytest.mark.slow
def test_two_processes_of_ddp_end_bit_identical_after_a_kill_and_after_a_sigterm(tmp_path):
    code = recipe("DDP")
    whole, cut = (placed(tmp_path / name, code, EPOCHS=3) for name in ("whole", "cut"))

    done = torchrun(whole, 0, 0, 0)
    assert done.returncode == 0, done.stderr
    assert torchrun(cut, 3, 0.02, 9).returncode
    assert torchrun(cut, 8, 0.01, 15).returncode
    done = torchrun(cut, 0, 0, 0)
    assert done.returncode == 0, done.stderr
    ends = states(whole), states(cut)
    assert ends[0]["last.pt"]["global_step"] == 15          # 5 batches an epoch in each process
    assert not same(*(ends[0]["last.pt"]["ranks"][rank]["torch"] for rank in (0, 1)))
    for name, state in ends[0].items():
        assert not [key for key in state if not same(state[key], ends[1][name].get(key))], name


# ---- batches ----

class Drawn(Dataset):
    """Items that tell their number and what each generator gave them."""

    def __len__(self):
        return 23

    def __getitem__(self, item):
        if item == self.__dict__.get("forbidden"):
            raise AssertionError(f"item {item} was loaded")
        return torch.tensor([item, torch.rand(()).item(), random.random(), numpy.random.rand()], dtype=torch.float64)


class Buckets:
    """A batch sampler of one's own: buckets of neighbours, in an order drawn by `random`, without a length."""

    def __iter__(self):
        buckets = [list(range(at, min(at + 3, 23))) for at in range(0, 23, 3)]
        random.shuffle(buckets)
        return iter(buckets)


class Guessed(Buckets):
    """A batch sampler that guesses too low how many batches it will give."""

    def __len__(self):
        return 5


class ByNumpy(RandomSampler):
    def __iter__(self):
        return iter(numpy.random.permutation(23))


class Tensors:
    """A batch sampler that gives tensors."""

    def __iter__(self):
        return iter(torch.randperm(23).split(4))


class OfOneEpoch:
    """A sampler with a generator of its own, set anew for each epoch."""

    def set_epoch(self, epoch):
        self.rng = numpy.random.default_rng(epoch)

    def __iter__(self):
        return iter(self.rng.permutation(23).tolist())

    def __len__(self):
        return 23


def mixed_up(items):
    """A collate_fn that mixes items at random, as mixup does."""
    stacked = torch.stack(items)
    return stacked + torch.rand(()) * stacked[torch.randperm(len(items))]


MAKES = {
    "in order": lambda data: {"batch_size": 4},
    "shuffle": lambda data: {"batch_size": 4, "shuffle": True},
    "drop_last": lambda data: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "a generator": lambda data: {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "RandomSampler": lambda data: {"batch_size": 4, "sampler": RandomSampler(data, num_samples=30)},
    "WeightedRandomSampler": lambda data: {"batch_size": 4, "sampler": WeightedRandomSampler([1.0, 5.0] * 11 + [1.0], 26)},
    "BatchSampler": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 5, True)},
    "a batch sampler by random": lambda data: {"batch_sampler": Buckets()},
    "a batch sampler that guesses": lambda data: {"batch_sampler": Guessed()},
    "a batch sampler of tensors": lambda data: {"batch_sampler": Tensors()},
    "a sampler by numpy": lambda data: {"batch_size": 4, "sampler": ByNumpy(data)},
    "a sampler with set_epoch": lambda data: {"batch_size": 4, "sampler": OfOneEpoch()},
    "collate_fn that draws": lambda data: {"batch_size": 4, "shuffle": True, "collate_fn": mixed_up}}


def loader_of(make, workers=0, data=None):
    data = data or Drawn()
    return DataLoader(data, num_workers=workers, **MAKES[make](data))


def epoch_of(saver, loader, place, seed=0):
    saver.resume()                          # nothing is saved: it begins anew
    saver.position = place
    return [(number, batch.clone()) for number, batch in saver.batches(loader, seed)]


@pytest.fixture
def saver(tmp_path):
    with Loop(tmp_path / "checkpoints", say=lambda line: None) as saver:
        yield saver


@pytest.mark.parametrize("make", MAKES)
def test_batches_and_their_random_numbers_are_the_same_for_workers_and_from_every_batch_on(saver, make):
    torch.manual_seed(1)
    whole = epoch_of(saver, loader_of(make), (2, 0))
    torch.manual_seed(2)                    # whatever was drawn before
    random.seed(2)
    assert same(epoch_of(saver, loader_of(make, workers=2), (2, 0)), whole)
    assert [number for number, _ in whole] == list(range(1, len(whole) + 1))
    for done in range(len(whole) + 1):
        assert same(epoch_of(saver, loader_of(make), (2, done)), whole[done:])
    used = loader_of(make)
    epoch_of(saver, used, (1, 0))           # in a process that trained the epoch before
    assert same(epoch_of(saver, used, (2, 0)), whole)
    assert not same(epoch_of(saver, loader_of(make), (3, 0)), whole)
    if make == "drop_last":
        assert {len(batch) for _, batch in whole} == {4} and len(whole) == 5
    if make not in ("a sampler with set_epoch", "in order"):
        assert not same(epoch_of(saver, loader_of(make), (2, 0), seed=1), whole)


def test_an_item_drawn_twice_in_an_epoch_is_augmented_in_two_ways(saver):
    seen = torch.cat([batch for _, batch in epoch_of(saver, loader_of("WeightedRandomSampler"), (1, 0))])
    assert len(set(seen[:, 0].tolist())) < len(seen) == len(set(seen[:, 1].tolist()))


def test_batches_that_were_trained_are_not_loaded(saver):
    data = Drawn()
    whole = epoch_of(saver, loader_of("shuffle", data=data), (1, 0))
    data.forbidden = int(whole[1][1][2, 0])
    assert len(epoch_of(saver, loader_of("shuffle", workers=2, data=data), (1, 2))) == len(whole) - 2
    with pytest.raises(AssertionError, match="was loaded"):
        epoch_of(saver, loader_of("shuffle", data=data), (1, 1))


def test_the_loops_own_random_numbers_do_not_depend_on_the_workers(saver):
    def drawn(workers):
        torch.manual_seed(4)
        random.seed(4)
        numpy.random.seed(4)
        saver.resume()
        return [(torch.rand(2), random.random(), numpy.random.rand()) for _ in saver.batches(loader_of("shuffle", workers))]

    assert same(drawn(0), drawn(2))


def test_random_numbers_of_a_gpu_are_left_alone(saver, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    epoch_of(saver, loader_of("shuffle"), (1, 0))
    assert not seeded                       # dropout there goes on from the state that was restored


class Fetched(Drawn):
    """A dataset that fetches the items of a batch at once, and opens its file in each worker."""

    def __getitems__(self, items):
        return [self.factor * self[item] for item in items]


def opened(worker):
    torch.utils.data.get_worker_info().dataset.factor = 2


def test_a_dataset_is_opened_in_its_workers_and_fetches_whole_batches(saver):
    loader = DataLoader(Fetched(), batch_size=4, num_workers=2, worker_init_fn=opened)
    plain = epoch_of(saver, loader_of("in order"), (1, 0))
    assert same([batch for _, batch in epoch_of(saver, loader, (1, 0))], [2 * batch for _, batch in plain])


WORKERS = """
import os, sys, time
from loop import Loop
from torch import nn
from torch.utils.data import DataLoader


class Items:
    def __len__(self):
        return 8

    def __getitem__(self, item):
        while item > 3 and not os.path.exists("stopped"):
            time.sleep(0.05)
        return item


def main(context):
    parts = {"model": nn.Linear(1, 1)}
    loader = DataLoader(Items(), batch_size=2, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    with Loop("checkpoints") as saver, saver.signals():
        for number, batch in saver.batches(loader):
            if number == 2:
                os.system("trap '' TERM; kill -TERM 0")         # as systemd does, to all: the next step waits for a worker
                open("stopped", "w").close()
            elif number == 3:
                saver.boundary(parts)


if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_sigterm_to_all_processes_spares_workers_that_were_forked_or_spawned(tmp_path, context):
    folder = placed(tmp_path, WORKERS)
    done = subprocess.run([sys.executable, "script.py", context], cwd=folder, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert checkpoint.find_resume(folder / "checkpoints").name == "mid_epoch_001_000003.pt"


@pytest.mark.slow
def test_workers_that_are_spawned_give_the_same_batches(saver):
    loader = DataLoader(Drawn(), batch_size=8, shuffle=True, num_workers=1, multiprocessing_context="spawn")
    here = DataLoader(Drawn(), batch_size=8, shuffle=True)
    assert same(epoch_of(saver, loader, (1, 1)), epoch_of(saver, here, (1, 1)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(9))


class Endless:
    def __iter__(self):
        while True:
            yield 3


class Often:
    def __iter__(self):
        return iter([*range(23)] * 9)


class Scaled(DataLoader):
    def __iter__(self):
        return (100 * batch for batch in super().__iter__())


class OwnGenerator:
    def __init__(self):
        self.rng = numpy.random.default_rng(0)

    def __iter__(self):
        return iter(self.rng.permutation(23).tolist())

    def __len__(self):
        return 23


@pytest.mark.parametrize("loader, reason", [
    (DataLoader(Stream(), batch_size=3), "an iterable dataset cannot skip"),
    (DataLoader(Drawn(), batch_size=None), "batch_size=None makes none"),
    (Scaled(Drawn(), batch_size=3), "Scaled makes batches in a way of its own"),
    ([1, 2, 3], "list makes batches in a way of its own"),
    (DataLoader(Drawn(), batch_size=3, sampler=Endless()), "Endless gives more than 23 batches"),
    (DataLoader(Drawn(), batch_size=3, sampler=Often()), "a sampler that ends, .* or has a __len__"),
    (DataLoader(Drawn(), batch_size=3, sampler=OwnGenerator()), r"OwnGenerator gives another order .* set_epoch\(epoch\)")],
    ids=["iterable", "single items", "own iteration", "no loader", "endless", "no length", "own generator"])
def test_a_loader_that_cannot_go_on_where_it_was_is_refused(saver, loader, reason):
    with pytest.raises(TypeError, match=reason):
        next(saver.batches(loader))


def test_an_epoch_that_became_shorter_than_what_was_trained_of_it_is_refused(saver):
    with pytest.raises(ValueError, match="6 batches of epoch 1 were trained, and it has only 5 now"):
        epoch_of(saver, loader_of("drop_last"), (1, 6))


class Grown(Drawn):
    def __len__(self):
        return 24


def loop_over(loader, folder, stop=0, seed=0):
    """Numbers of the batches of one epoch that are trained by a loop which leaves at the batch `stop`."""
    parts, trained = {"model": torch.nn.Linear(1, 1)}, []
    with Loop(folder, say=lambda line: None) as saver:
        saver.unpack(parts, saver.resume())
        for number, _ in saver.batches(loader, seed):
            trained.append(number)
            if number == stop:
                saver.save_mid(saver.pack(parts))
                return trained
        saver.save_epoch(saver.pack(parts))
    return trained


@pytest.mark.parametrize("now", ["a smaller batch size", "a larger dataset", "another seed", "another sampler"])
def test_an_epoch_in_progress_whose_batches_are_others_now_is_refused_and_can_be_begun_anew(tmp_path, now):
    assert loop_over(loader_of("shuffle"), tmp_path, stop=3) == [1, 2, 3]
    loader = {"a smaller batch size": DataLoader(Drawn(), batch_size=2, shuffle=True),
              "a larger dataset": loader_of("shuffle", data=Grown()), "another sampler": loader_of("in order")}
    with pytest.raises(ValueError, match=r"3 batches of epoch 1 were trained, and it has others now.*position = \(1, 0\)"):
        loop_over(loader.get(now, loader_of("shuffle")), tmp_path, seed=int(now == "another seed"))
    with Loop(tmp_path, say=lambda line: None) as saver:
        saver.resume()
        saver.position = (1, 0)
        assert len(list(saver.batches(loader_of("in order")))) == 6
    assert loop_over(loader_of("shuffle"), tmp_path, stop=5) == [4, 5] and loop_over(loader_of("shuffle"), tmp_path) == [6]
    assert len(loop_over(loader_of("in order"), tmp_path)) == 6, "an epoch that has not begun may have other batches"


def test_a_validation_by_the_batches_of_the_training_is_refused_and_not_counted_as_steps(saver):
    assert len(list(saver.batches(loader_of("shuffle")))) == 6
    with pytest.raises(ValueError, match="6 batches of epoch 1 were trained, and it has only 3 now"):
        next(saver.batches(DataLoader(Grown(), batch_size=8)))
    assert saver.global_step == 6


@pytest.mark.parametrize("kind", ["by numpy", "by pairs", "of tensors"])
def test_items_of_any_kind_are_known_again(tmp_path, kind):
    items = {"by numpy": numpy.arange(23), "by pairs": [(n, f"{n}") for n in range(23)], "of tensors": torch.arange(23)}[kind]
    loader = DataLoader({n: torch.ones(1) for n in items} if kind == "by pairs" else Drawn(), batch_size=4, sampler=items)
    assert loop_over(loader, tmp_path, stop=2) == [1, 2] and loop_over(loader, tmp_path) == [3, 4, 5, 6]


def test_a_place_that_is_not_the_one_in_progress_raises_and_writes_nothing(saver, tmp_path):
    parts = {"model": torch.nn.Linear(1, 1)}
    loop = saver.batches(loader_of("shuffle"))
    next(loop)
    next(loop)
    state = saver.pack(parts)
    assert (state["epoch"], state["batch"], state["global_step"]) == (1, 2, 2)
    for stale in ({"batch": 1}, {"batch": 75}, {"epoch": 2}):
        with pytest.raises(ValueError, match="count epochs and batches from saver.position"):
            saver.save_mid({**state, **stale})
    saver.save_mid(state)
    saver.save_epoch(saver.pack(parts))
    with pytest.raises(ValueError, match="epoch 1, batch 2 comes after epoch 2, batch 0"):
        saver.save_mid(state)               # a counter that was not set back after the epoch
    saver.wait()
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.pt")} == {
        "mid_epoch_001_000002.pt", "checkpoint_epoch_001.pt", "last.pt"}


def test_the_place_after_a_second_resume_is_that_of_the_file_not_of_the_batch_before_it(saver):
    parts = {"model": torch.nn.Linear(1, 1)}
    for number, _ in saver.batches(loader_of("shuffle")):
        if number == 2:
            saver.save_mid(saver.pack(parts))
        if number == 4:
            break
    saver.resume()
    state = saver.pack(parts)
    assert (state["batch"], state["global_step"]) == (2, 2) == (saver.position[1], saver.global_step)


def test_an_epoch_that_is_not_ended_by_save_epoch_is_not_trained_twice(saver):
    parts = {"model": torch.nn.Linear(1, 1)}
    assert len(list(saver.batches(loader_of("shuffle")))) == 6
    with pytest.raises(ValueError, match=r"epoch 1 was trained to its end: save_epoch\(\) ends it"):
        next(saver.batches(loader_of("shuffle")))
    saver.save_mid(saver.pack(parts))
    for _ in range(2):                      # a resume goes on at the end of the epoch, once
        assert saver.resume()["batch"] == 6 and not list(saver.batches(loader_of("shuffle")))
        with pytest.raises(ValueError, match="epoch 1 was trained to its end"):
            next(saver.batches(loader_of("shuffle")))
    saver.save_epoch(saver.pack(parts))
    assert next(saver.batches(loader_of("shuffle")))[0] == 1 and saver.pack(parts)["epoch"] == 2


def test_the_end_of_an_epoch_that_was_refused_for_its_state_can_be_saved_once_that_is_mended(saver):
    parts = {"model": torch.nn.Linear(1, 1)}
    with pytest.raises(TypeError, match="'odd'"):
        saver.save_epoch({**saver.pack(parts), "odd": object()})
    assert saver.position == (1, 0)
    saver.save_epoch(saver.pack(parts))
    assert saver.position == (2, 0) and saver.resume()["epoch"] == 1


def test_a_boundary_in_a_loop_that_batches_does_not_count_is_refused_at_its_second_step(saver):
    parts = {"model": torch.nn.Linear(1, 1)}
    for _ in range(2):                      # an epoch of unknown steps, a boundary after each of them
        saver.boundary(parts)
        with pytest.raises(ValueError, match=r"in a loop of another kind save_mid\(\) takes a count of your own"):
            saver.boundary(parts)
        saver.save_epoch(saver.pack(parts))
    saver.resume()
    saver.boundary(parts)
    saver.position = (3, 2)
    saver.boundary(parts)
    for _ in saver.batches(loader_of("shuffle")):
        pass
    saver.boundary(parts)
    saver.boundary(parts)


def test_a_loop_that_was_left_goes_on_after_its_last_batch_and_from_where_its_position_is_set(saver):
    parts, loader = {"model": torch.nn.Linear(1, 1)}, loader_of("shuffle")

    def trained(stop):
        return [number for number, _ in itertools.takewhile(lambda batch: batch[0] < stop, saver.batches(loader))]
    assert trained(2) == [1] and trained(5) == [3, 4]
    with pytest.raises(ValueError, match=r"5 batches of epoch 1 were trained, and it has others .* saver.position = \(1, 0\)"):
        next(saver.batches(loader_of("in order")))
    saver.position = (1, 0)
    assert next(saver.batches(loader_of("in order")))[0] == 1
    saver.save_mid(saver.pack(parts))
    assert saver.position == (1, 1) and [number for number, _ in saver.batches(loader_of("in order"))] == [2, 3, 4, 5, 6]
    saver.position = (1, 0)
    assert trained(9) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("place", [3, None, (1,), (1, 2, 3), (1, -1), ("1", 0), (1.0, 0)])
def test_a_position_that_is_no_epoch_and_batch_is_refused_where_it_is_set(saver, place):
    with pytest.raises(ValueError, match="position must be .epoch in progress, from 1, batches trained in it"):
        saver.position = place
    assert saver.position == (1, 0)
    saver.position = torch.tensor([2, 3])               # and what counts as one is one: a save compares it
    assert saver.position == (2, 3) and type(saver.position[0]) is int
    next(saver.batches(loader_of("shuffle")))
    assert saver.save_mid(saver.pack({"model": torch.nn.Linear(1, 1)}))


@pytest.mark.parametrize("how", ["resume", "save_epoch", "position", "another loop"])
def test_a_loop_whose_place_is_another_meanwhile_is_refused_at_its_next_batch(saver, how):
    parts = {"model": torch.nn.Linear(1, 1)}
    loop, other = saver.batches(loader_of("shuffle")), saver.batches(loader_of("shuffle"))
    next(loop)
    saver.save_mid(saver.pack(parts))
    next(loop)
    if how == "resume":
        saver.resume()
    elif how == "save_epoch":
        saver.save_epoch(saver.pack(parts))
    elif how == "position":
        saver.position = (1, 0)
    else:
        assert next(other)[0] == 3
    place, steps = saver.pack(parts)["batch"], saver.global_step
    with pytest.raises(ValueError, match=r"another place is in progress than batch 2 of epoch 1: leave the loop"):
        next(loop)
    assert (saver.pack(parts)["batch"], saver.global_step) == (place, steps)
    first = {"resume": 2, "save_epoch": 1, "position": 1, "another loop": 4}[how]
    assert [number for number, _ in saver.batches(loader_of("shuffle"))] == list(range(first, 7))


def test_an_epoch_that_is_not_the_one_in_progress_is_not_ended(saver):
    parts = {"model": torch.nn.Linear(1, 1)}
    next(saver.batches(loader_of("shuffle")))
    with pytest.raises(ValueError, match="batches.. yielded epoch 1, which epoch 2 cannot end: count epochs from saver.position"):
        saver.save_epoch({**saver.pack(parts), "epoch": 2})
    assert saver.position == (1, 0)
    saver.save_epoch(saver.pack(parts))
    assert saver.position == (2, 0)


@pytest.mark.parametrize("parts, reason", [
    ({"losses": [1.0]}, "part 'losses', of list, has no state_dict.*losses=... of pack"),
    ({"model": torch.nn.Linear(1, 1).state_dict}, "part 'model', of method, has no state_dict"),
    (torch.nn.Linear(1, 1), "parts must be a dict, .*, not Linear"),
    ({"epoch": torch.nn.Linear(1, 1)}, "a part cannot be called 'epoch'")])
def test_parts_that_no_save_takes_are_refused_before_the_first_step(saver, parts, reason):
    with pytest.raises((TypeError, ValueError), match=reason):
        saver.unpack(parts, saver.resume())


def test_a_loop_that_is_begun_again_before_its_first_save_counts_from_the_beginning(saver):
    next(saver.batches(loader_of("shuffle")))
    assert saver.resume() is None and saver.global_step == 0
    assert [number for number, _ in saver.batches(loader_of("shuffle"))] == [1, 2, 3, 4, 5, 6] and saver.global_step == 6


class Saver(Loop, Mirrored):
    pass


def test_a_loop_with_a_second_copy_goes_on_from_it_at_its_next_batch(tmp_path):
    assert "`class Saver(Loop, Mirrored): pass`" in PAGE
    parts, home = {"model": torch.nn.Linear(1, 1)}, tmp_path / "run" / "checkpoints"
    with Saver(home, mirror=tmp_path / "nas", say=str) as saver:
        for number, _ in saver.batches(loader_of("shuffle")):
            if number == 4:
                break
        saver.save_mid(saver.pack(parts))
    shutil.rmtree(home.parent)
    with Saver(home, mirror=tmp_path / "nas", say=str) as saver:
        saver.unpack(parts, saver.resume())
        with pytest.raises(ValueError, match="4 batches of epoch 1 were trained, and it has others now"):
            next(saver.batches(loader_of("in order")))
        assert [number for number, _ in saver.batches(loader_of("shuffle"))] == [5, 6] and saver.global_step == 6


def test_the_order_of_an_epoch_stands_in_the_file_as_it_did_when_checkpoint_wrote_it(saver, tmp_path):
    list(itertools.islice(saver.batches(loader_of("in order")), 2))
    saver.save_mid(saver.pack({}))
    saver.wait()
    order = checkpoint.load(tmp_path / "checkpoints/mid_epoch_001_000002.pt")["holdfast"]["order"]
    assert order == {1: 42699321034634592}


def test_parts_that_the_checkpoint_lacks_are_named_and_nothing_is_changed(saver):
    net = torch.nn.Linear(1, 1)
    state = saver.pack({"model": torch.nn.Linear(1, 1)})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(checkpoint.IncompleteState, match="the checkpoint has no 'ema', 'scaler': unpack the parts"):
        saver.unpack({"model": net, "ema": net, "scaler": net}, state)
    assert same(dict(net.state_dict()), before)


@pytest.mark.parametrize("name", ["random", "epoch", "batch", "global_step", "save_counter", "holdfast"])
def test_a_part_by_a_name_that_the_saver_needs_is_refused_not_lost(saver, name):
    with pytest.raises(ValueError, match=f"a part cannot be called '{name}'"):
        saver.pack({"model": torch.nn.Linear(1, 1), name: torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=f"a part cannot be called '{name}'"):
        saver.pack({"model": torch.nn.Linear(1, 1)}, **{name: 1})
    with pytest.raises(ValueError, match="a part cannot be called 'model'"):
        saver.pack({"model": torch.nn.Linear(1, 1)}, model=1)


@pytest.mark.slow
def test_values_beside_the_parts_are_in_the_snapshot_of_a_kill_and_of_a_signal_as_at_the_end_of_an_epoch(tmp_path):
    code = SCRIPT.replace("saver.unpack(parts, saver.resume())", "state = saver.resume()\n    saver.unpack(parts, state)\n"
                          "    losses = state['losses'] if state else []")
    code = code.replace("saver.boundary(parts)", "losses.append(float(y.mean()))\n            saver.boundary(parts, losses=losses)")
    code = code.replace("saver.pack(parts)", "saver.pack(parts, losses=losses)")
    assert all(f"`saver.{name}(parts, losses=losses)`" in PAGE for name in ("boundary", "pack"))
    whole, _ = ends_alike(tmp_path / "killed", code, (14,), EPOCHS=2)
    ends_alike(tmp_path / "asked", code, (4,), signal.SIGTERM, EPOCHS=2)
    assert len(checkpoint.load(whole / "checkpoints/last.pt")["losses"]) == 20


STEPS = """
with Loop("checkpoints") as saver, saver.signals():
    saver.unpack(parts, saver.resume())
    for number, (x, y) in saver.batches(loader):
        train(x, y)
        saver.boundary(parts)
"""


@pytest.mark.parametrize("loop", ["docstring", pytest.param("boundary", marks=pytest.mark.slow)])
def test_a_signal_between_any_two_lines_of_a_loop_leaves_only_after_a_save_of_the_last_step(tmp_path, monkeypatch, loop):
    code = crash.docstring_loop().replace("0.001", "30") if loop == "docstring" else HERE + STEPS
    code = compile(code, "<loop>", "exec")
    watched = {code, Loop.boundary.__code__, Checkpointer.stopping.__code__, Checkpointer.due.__code__}
    ends = []
    for line in range(20, 42):              # lines that ran
        here = tmp_path / str(line)
        here.mkdir()
        monkeypatch.chdir(here)
        scope, left = {}, [line]

        def trace(frame, event, _):
            if frame.f_code in watched:
                left[0] -= event == "line" and "saver" in scope
                if left[0] == 0 and event == "line":
                    left[0] = -1
                    signal.raise_signal(signal.SIGTERM)
                return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with pytest.raises(SystemExit) as left_with:
                exec(code, scope)
        finally:
            sys.settrace(before)
        done = scope["step"] if loop == "docstring" else scope["saver"].global_step
        newest = checkpoint.load(checkpoint.find_resume("checkpoints", say=str))
        assert (left_with.value.code, newest["global_step"]) == (128 + signal.SIGTERM, done), line
        ends.append(done)
    assert len(set(ends)) > 2               # steps in the middle of which it came


def test_a_signal_on_a_disk_that_refuses_saves_leaves_the_loop_only_with_a_save_once_the_disk_takes_it(tmp_path):
    home, said = tmp_path / "checkpoints", []

    def heard(line):
        said.append(line)
        if "(3 in a row)" in line:
            (tmp_path / "gone").rename(home)

    with pytest.raises(SystemExit) as left_with:
        with Loop(home, say=heard) as saver, saver.signals():
            home.rename(tmp_path / "gone")
            signal.raise_signal(signal.SIGTERM)
            saver.boundary({"model": torch.nn.Linear(1, 1)})
    assert left_with.value.code == 128 + signal.SIGTERM, said
    assert checkpoint.find_resume(home).name == "mid_epoch_001_000000.pt"


def test_a_second_ctrl_c_leaves_without_the_save_that_the_disk_refuses(tmp_path):
    home, said = tmp_path / "checkpoints", []
    with pytest.raises(checkpoint.SaveFailed, match="mid_epoch_001_000000.pt, could not be written") as left_with:
        with Loop(home, say=said.append, save_patience_minutes=0.05) as saver, saver.signals() as heard:
            home.rename(tmp_path / "gone")
            signal.raise_signal(signal.SIGINT)
            saver.save_mid(saver.pack({}))
            heard.since -= 1                # a step takes long
            signal.raise_signal(signal.SIGINT)
    assert isinstance(left_with.value.__context__, KeyboardInterrupt)
    assert len([line for line in said if line.startswith("save failed")]) == 2


UNHEARD = HEAD.replace("num_workers=2", "num_workers=0") + """
import os, signal, sys, time

with Loop("checkpoints") as saver, saver.signals():
    for number, (x, y) in saver.batches(loader):
        print("step", number, flush=True)
        while not os.path.exists("closed"):
            time.sleep(0.01)
        train(x, y)
        if number == 3:
            signal.raise_signal(signal.SIGINT)
            print("step", number, "is done", file=sys.stderr)
        saver.boundary(parts)
"""


@pytest.mark.parametrize("reader", ["pipe", pytest.param("terminal", marks=pytest.mark.slow)])
def test_a_print_that_nobody_reads_any_more_ends_no_loop_before_its_save(tmp_path, reader):
    folder = placed(tmp_path, UNHEARD)
    ours, theirs = os.pipe() if reader == "pipe" else os.openpty()          # `| tee` dies of a Ctrl-C, a terminal is closed
    process = forked.Popen([sys.executable, "script.py"], cwd=folder, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    (folder / "closed").touch()
    assert process.wait() == 128 + signal.SIGINT
    assert checkpoint.find_resume(folder / "checkpoints").name == "mid_epoch_001_000003.pt"


def test_a_loop_gives_the_streams_back_that_it_printed_to(saver):
    before = {stream: dict(vars(stream)) for stream in (sys.__stdout__, sys.__stderr__)}
    with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stdout__):
        with saver.signals(), saver.signals():
            assert "write" in vars(sys.stdout)
    assert {stream: dict(vars(stream)) for stream in before} == before
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), saver.signals():
        sys.stdout.close()


UNGUARDED = """
from loop import Loop
from torch import nn
from torch.utils.data import DataLoader

saver = Loop("checkpoints")
next(saver.batches(DataLoader(range(8), num_workers=1, multiprocessing_context="spawn")))
"""


@pytest.mark.slow
def test_a_script_that_its_spawned_workers_run_from_the_top_is_told_so(tmp_path):
    done = subprocess.run([sys.executable, "script.py"], cwd=placed(tmp_path, UNGUARDED), capture_output=True, text=True)
    assert 'is in use by process' in done.stderr and 'train below `if __name__ == "__main__":`' in done.stderr
    assert "stop it first" not in done.stderr


# ---- a notebook ----

CELL = """
with Loop("checkpoints", mid_epoch_minutes=0) as saver, saver.signals():
    saver.unpack(parts, saver.resume())
    for number, (x, y) in saver.batches(loader):
        if saver.global_step == stop:
            raise act
        train(x, y)
        saver.boundary(parts)
    saver.save_epoch(saver.pack(parts))
"""


@pytest.mark.parametrize("fault", [RuntimeError("a mistake"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_cell_that_is_run_again_goes_on_from_its_newest_save(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    scope = {"stop": 6, "act": fault}
    exec(HERE, scope)
    with pytest.raises(type(fault)):
        exec(CELL, scope)
    scope["stop"] = 0
    exec(CELL, scope)
    assert scope["saver"].global_step == 10 and scope["number"] == 10
    assert checkpoint.load("checkpoints/last.pt")["schedule"]["last_epoch"] == 10
    exec(CELL, scope)                       # one that ended
    assert checkpoint.load("checkpoints/last.pt")["epoch"] == 2


def test_gradients_that_a_failed_cell_has_left_are_not_added_to_those_after_its_resume(tmp_path):
    ends = []
    for folder, fails in (("whole", []), ("cut", [2, 5])):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        parts = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
        for fail in [*fails, 0]:
            with Loop(tmp_path / folder, mid_epoch_minutes=0, say=str) as saver, contextlib.suppress(ZeroDivisionError):
                saver.unpack(parts, saver.resume())
                if saver.position == (1, 0):
                    saver.save_mid(saver.pack(parts))
                for number, item in saver.batches(loader_of("shuffle")):
                    model(item[0].float().reshape(-1, 1)).sum().backward()
                    assert number != fail or 1 / 0
                    if number % 3 == 0:
                        parts["optimizer"].step()
                        parts["optimizer"].zero_grad()
                        saver.boundary(parts)
        ends.append(model.state_dict())
    assert same(dict(ends[0]), dict(ends[1]))


def test_a_loop_that_begins_anew_in_its_process_counts_from_the_beginning(saver):
    for number, _ in saver.batches(loader_of("shuffle")):
        if number == 3:
            break
    saver.save_mid(saver.pack({}))
    assert saver.resume(False) is None and (saver.position, saver.global_step) == ((1, 0), 0)
    assert [number for number, _ in saver.batches(loader_of("in order"))] == [1, 2, 3, 4, 5, 6]


def test_the_folder_of_a_variable_that_is_not_set_is_refused_and_not_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the directory is an empty path: name a folder"):
        Loop("")
    assert not list(tmp_path.iterdir())


def test_a_second_saver_of_a_process_is_told_in_a_line_to_close_the_first(tmp_path):
    with Checkpointer(tmp_path):
        with pytest.raises(checkpoint.InUse) as refused:
            Checkpointer(tmp_path)
    line = "is in use by this process: close the earlier Checkpointer first"
    assert str(refused.value).endswith(f"{tmp_path} {line}") and f"`... {line}`" in PAGE
    Checkpointer(tmp_path).close()


def test_a_ctrl_c_while_torch_loads_ends_the_command_without_a_traceback(tmp_path):
    folder = placed(tmp_path, "")
    (folder / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen([sys.executable, "checkpoint.py", "verify", "."], cwd=folder, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("command", ["ls", "clean", "strip", "average"])
def test_a_command_of_holdfast_runs_no_run_of_the_repository_that_a_copy_lies_in(tmp_path, command):
    folder = placed(tmp_path, "")
    (folder / "run.py").write_text("open('trained', 'w').close()\n")
    done = forked.run([sys.executable, "checkpoint.py", command, "script.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"checkpoint.py: this command needs run/\w+\.py of Holdfast .*\n", done.stderr)
    assert not (folder / "trained").exists()
