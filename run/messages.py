"""What a run says to a person: the time that is left, and at its end what a resume takes and
what to type next."""
import os
import shlex
import signal
import time
from pathlib import Path

import checkpoint
from eeg.console import command, near
from eeg.disk import Refused
from run.config import KEYS
from run.machine import rank_and_size
from run.prepare import folders
from run.records import tolerated

STUCK_STARTS = 3                        # in a row that came no further than where they began


def time_left(trainer):
    """Of this epoch and of the run, by the mean pace of this epoch in this process and the last
    validation."""
    began, batch = trainer.epoch_began
    pace = (time.monotonic() - began) / max(1, trainer.batch - batch)
    validation = trainer.validation_seconds
    epoch = (trainer.batches - trainer.batch) * pace + validation
    later = trainer.settings["epochs"] - trainer.epoch
    run = epoch + later * (trainer.split.batches * pace + validation)
    line = f"left: {duration(epoch)} of the epoch, {duration(run)} of the run"
    if not validation:
        line += ", validations not counted yet"
    return line


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def tell_stopped(trainer, again):
    """Say what a resume takes and how to go on; returns the exit code."""
    number, home, say = trainer.signals.number, trainer.home, trainer.say
    why = f"stopped by {signal.Signals(number).name}" if number else "time limit reached"
    if home and not trainer.summary:
        with tolerated(say, home.checkpoints):
            newest = checkpoint.find_resume(home.newest, lambda line: None)
            say(f"no epoch has been validated yet, so there is no best.pt; the newest weights: "
                f"{near(newest)}")
    idle = trainer.starts_without_progress()
    if idle >= STUCK_STARTS:
        say(f"stuck: {idle} starts in a row ended where they began: one recording takes longer to "
            f"validate than a start has time: raise training.time_limit_hours")
        if not number:
            return Refused.code         # the same start would end here again
    kept = f" ({home.last_save})" if home else ""
    say(f"{why}, saved{kept}; to go on: {again}")
    return 128 + number if number else 75


def passing(error):
    """What a RuntimeError of the machine under a run says, "" for one of the program: Python and
    torch have no class for these."""
    if "start new thread" in str(error):
        return ("no thread is to be had: a limit of processes (ulimit -u, pids.max) or of memory "
                "is reached")
    if "gloo/transport" in str(error):
        return "another process of this job has ended: what it said, or torchrun says, is the cause"
    return ""


def tell_next(home, config, say):
    """What to type after a run that has finished."""
    best = home.newest / "best.pt"
    weights = best if best.exists() else home.newest / "last.pt"
    if home.newest != home.checkpoints:
        say(f"{home.checkpoints} lacks the newest states, which are in {home.newest} alone: make "
            f"room or mend the disk, then --resume brings them home")
    say(f"picture: {near(home.directory / 'curves.png')}")
    paths = folders(config)
    for path in paths:
        words = ["--checkpoint", near(weights), "--data", near(path)]
        if len(paths) > 1:              # each needs a folder
            words += ["--out", near(home.directory / f"evaluation_{Path(path).name}")]
        say(f"next: {command('evaluate.py', *words, '--split', 'dev', '--plot')}")


def command_again(args):
    """The command that continues this run."""
    words = ["--config", args.config, "--resume"]
    for text in args.set:
        words += ["--set", text]
    again = command("train.py", *words)
    start = ""
    if rank_and_size()[1] > 1:
        start, again = "torchrun ... ", again.removeprefix("python ")
    for key in KEYS.values():
        if os.environ.get(key.environment or ""):
            start = f"{key.environment}={shlex.quote(os.environ[key.environment])} {start}"
    return start + again
