"""The acceptance test of a machine: what a first real run would trip over, measured where it would
run, line by line.

    missing = report(checks(config, "cuda", 1, 3.13, Path("/results"), commit, train), print)

A check is a name and a function that yields (line, fault); a fault means "not ready". An error in a
check is a fault of the machine or of the configuration as well, and the other checks go on.
"""
import math
import os
import subprocess
import time
from pathlib import Path

import torch

import checkpoint
import data
import model
from eeg import edf
import evaluate
from run.attempts import money
from run.machine import piece
from run.prepare import Split, folders

DRIVER = {"13": 580, "12": 525}         # oldest NVIDIA driver for a torch of that CUDA version
GRACE = 30                              # s that Modal leaves a preempted container
READ_SECONDS = 10                       # for which each folder of recordings is read
CHANNELS = len(edf.CHANNELS["referential"])


def checks(config, device, count, dollars, volume, commit, trainer):
    """The checks of the planned run `config` on `count` cards, at `dollars` an hour, or None.

    volume: the folder of results, which commit() publishes. trainer: train.py, which stands above
    this room and is handed in."""
    read = []                           # windows/s of each folder of recordings
    return {
        "card": lambda: check_card(device),
        "results Volume": lambda: check_volume(volume),
        "commit": lambda: check_commit(config, volume, commit),
        "data": lambda: check_data(config, read),
        "training": lambda: check_training(config, device, trainer, count, dollars, read)}


def report(checks, say):
    """Run every check and print its lines; the list of faults, [] where nothing is missing."""
    faults = []
    for name, check in checks.items():
        try:
            for line, fault in check():
                say(line)
                if fault:
                    faults.append(fault)
        except Exception as error:      # whatever it is, a real run would meet it there too
            why = str(error).partition("\n")[0]
            faults.append(f"{name}: {type(error).__name__}: {why}")
            say(faults[-1])
    return faults


# ---- the machine ----

def check_card(device):
    """The card, its driver beside what torch's CUDA needs, and its speed in bf16."""
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if count else "no card"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, {count} x {name}", ""
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, text=True, capture_output=True, check=True).stdout
        driver = answer.split()[0]      # a line for each card
        needed = DRIVER.get(torch.version.cuda.split(".")[0], 0)
        fault = ""
        if int(driver.split(".")[0]) < needed:
            fault = f"driver {driver} is older than {needed}, which CUDA {torch.version.cuda} needs"
        yield f"driver {driver}, needed {needed}", fault
    yield f"bf16 product of {product_speed(device):.1f} TFLOP/s", ""


def product_speed(device):
    """bf16 TFLOP/s of a square matrix product, the best of five."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])                            # reading one number waits for all of them
        best = min(best, time.perf_counter() - began)
    return 2 * size ** 3 / best / 1e12


def check_volume(folder):
    """What the results Volume can do. Nothing of it is needed: checkpoint.py has a way for each."""
    import fcntl
    one, two = (folder / f".smoke-{os.getpid()}-{i}" for i in range(2))
    fd = os.open(one, os.O_WRONLY | os.O_CREAT, 0o666)
    steps = {
        "locks": lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "fsync": lambda: os.fsync(fd),
        "hard links": lambda: os.link(one, two),
        "direct writes": lambda: os.close(os.open(one, os.O_WRONLY | os.O_DIRECT))}
    found = []
    for name, step in steps.items():
        try:
            step()
            found.append(f"{name}: yes")
        except OSError as error:
            found.append(f"{name}: no ({error.strerror})")
    os.close(fd)
    one.unlink()
    two.unlink(missing_ok=True)
    yield f"results Volume: {', '.join(found)}", ""


def check_commit(config, folder, commit):
    """A checkpoint of the planned size, written and committed. A preemption during a commit waits
    for it, then saves and commits once more: both must fit into the grace."""
    net = model.build(CHANNELS, config["model"])
    moments = [torch.zeros_like(p) for p in net.parameters() for _ in range(2)]
    path = folder / ".smoke.pt"
    began = time.perf_counter()
    checkpoint.atomic_save({"model": net.state_dict(), "moments": moments}, path)
    write = time.perf_counter() - began
    try:
        commit()
    finally:
        size = path.stat().st_size / 1e6
        path.unlink()
    yield grace_line(size, write, time.perf_counter() - began - write)


def grace_line(size, write, commit):
    """(line, fault) for a checkpoint of `size` MB; write and commit in seconds."""
    line = f"checkpoint of {size:.0f} MB: written in {write:.1f} s, committed in {commit:.1f} s"
    if 2 * (write + commit) <= GRACE - 2:
        return line, ""
    return line, (f"save and commit take {write + commit:.0f} s: a preemption that comes during a "
                  f"commit needs twice that of its {GRACE} s, and what came since the last "
                  "snapshot would be trained again")


# ---- the planned run ----

def check_data(config, read):
    """The recordings open; how fast windows of them are read goes to `read`."""
    share = 60 / config["data"]["window_seconds"]       # data.speed counts windows of 60 s
    for path in folders(config):
        if not Path(path).is_dir():
            missing = (f"{path} is not on the data Volume: "
                       "modal volume put holdfast-data IMPORTED_FOLDER, or --action import")
            yield missing, missing
            continue
        read.append(share * data.speed(path, READ_SECONDS, lambda line: None))
        yield f"data Volume: {path}: {read[-1]:.0f} windows/s", ""


def check_training(config, device, trainer, count, dollars, read):
    """Steps of the planned run: their speed, and by it the hours and dollars of the run."""
    settings = config["training"]
    try:
        trained = count * train_speed(config, device, trainer, count)
    except (MemoryError, RuntimeError) as error:
        if not evaluate.is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        fault = (f"training.batch_size {settings['batch_size']} does not fit into the card's "
                 "memory: lower it, or raise training.accumulate (the same result in pieces)")
        yield fault, fault
        return
    yield f"training: {trained:.1f} windows/s at batch {settings['batch_size']}", ""
    if not read or len(read) < len(folders(config)):
        return
    if min(read) < trained:
        yield "the data Volume is slower than the card: set data.copy_to to a folder in /tmp", ""
    recordings = data.open_corpora(config["data"]["path"], config["data"]["same_person"])
    windows, epochs = len(Split(config, recordings, lambda line: None).order(1)), settings["epochs"]
    hours = windows / min(*read, trained) / 3600
    epoch, whole = (money(dollars and n * hours * dollars) for n in (1, epochs))
    yield (f"{config['experiment']['name']}, {windows} windows an epoch: {hours:.2f} h, {epoch}; "
           f"{epochs} epochs: {epochs * hours:.0f} h, {whole}; without validation"), ""


def train_speed(config, device, trainer, count=1):
    """Windows/s of one of `count` cards in training steps on random EEG, in the pieces and the
    arithmetic of the run; on a CPU of one step of one window."""
    settings = config["training"]
    batch = piece(settings, count)
    warm, steps, batch = (3, 10, batch) if device == "cuda" else (0, 1, 1)
    samples = round(edf.FS * config["data"]["window_seconds"])
    net = model.build(CHANNELS, config["model"]).to(device)
    optimizer = trainer.make_optimizer(net, settings, device == "cuda")
    if settings["compile"]:
        net = torch.compile(net, fullgraph=True, dynamic=False)
    x = torch.randn(batch, CHANNELS, samples, device=device)
    y, mask = torch.zeros(2, batch, samples, device=device)
    began = time.perf_counter()
    for step in range(warm + steps):
        if step == warm:
            began = time.perf_counter()
        with evaluate.autocast(settings["precision"], torch.device(device)):
            logits = net(x)
        loss = trainer.focal_loss(logits, y, mask + 1, settings["focal_alpha"],
                                  settings["focal_gamma"])
        optimizer.zero_grad()
        (loss / y.numel()).backward()
        optimizer.step()
        loss.item()                                     # waits for the step
    return steps * batch / (time.perf_counter() - began)
