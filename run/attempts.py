"""What the containers of one run leave on the Volume for each other, and what they have cost.

    launch.json          the launch that owns the run: its id, its call, its app, its first attempt
    attempts/NNN.json    one container each: where it began, when it last saved, how it left

Knows nothing of Modal's client: the same files are read by a container and by a test. Without torch
at import: the launching side starts fast.
"""
import contextlib
import itertools
import json
import math
import re
import statistics
import time

from eeg.console import how_many
from eeg.disk import read_json_lines, write_json

RESULTS, DATA, MIRROR = "/results", "/data", "/mirror"      # where the Volumes are mounted
FETCHED = f"{DATA}/raw"                 # files of a corpus from the web, as they are published
STUCK = 3                               # attempts without progress end a run
SHORT = 15                              # minutes: an earlier death without a word does not count,
SHORT_DEATHS = 10                       # unless this many come one after another
TIME_IS_UP = "training.time_limit_hours reached, saved: --resume goes on for as long again"
DOLLARS = {                             # an hour, of modal.com/pricing; a fixed region multiplies
    "B200": 6.25, "H200": 4.54, "H100": 3.95, "A100-80GB": 2.50, "A100-40GB": 2.10, "A100": 2.10,
    "L40S": 1.95, "A10": 1.10, "L4": 0.80, "T4": 0.59, "core": 0.047, "GiB": 0.008}
DOLLARS_AS_OF = "October 2026"


# ---- records ----

def put(path, value):
    """Write JSON so that a reader, or a commit in the middle, meets the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def get(path):
    """The dict in a JSON file; {} where there is none, or a torn one."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
    return {}


def record_files(run):
    """The files of all attempts, in order."""
    found = [path for path in (run / "attempts").glob("*.json") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def next_number(run):
    return max([int(path.stem) for path in record_files(run)], default=0) + 1


def attempts(run):
    """The records of all attempts, in order.

    One that cannot be read ends nothing. Its container belonged to the launch that owns the run, if
    that had begun by then, has saved and may still work: so nothing is begun anew over it."""
    owner = get(run / "launch.json")
    launch, first = owner.get("launch", ""), owner.get("first", 1)
    return [{"launch": launch if int(path.stem) >= first else "",
             "call": None, "left": "", "saved": "?", "progress": None,
             "began": 0.0, "seen": 0.0, "dollars": 0.0, "epochs": 0,
             "task": f"the container of {path.name}, a record that cannot be read,"}
            | (get(path) or {"unread": path.name}) for path in record_files(run)]


def of_launch(run, launch):
    """The attempts that this launch has made so far."""
    return [record for record in attempts(run) if record["launch"] == launch]


def hours(record):
    """Of one attempt, from its start to the last sign of it."""
    return (record["seen"] - record["began"]) / 3600


def progress(run):
    """[step, epoch ended, recordings validated since] of the furthest checkpoint that loads."""
    import checkpoint
    for candidate in checkpoint.candidates(run / "checkpoints"):
        # the resume will name the damaged ones
        with contextlib.suppress(checkpoint.CorruptCheckpoint, OSError):
            state = checkpoint.load(candidate.path)
            facts, validated = checkpoint.facts_of(state), len(state.get("validation") or ())
            return [facts["global_step"], facts["kind"] == "epoch", validated]
    return [0, False, 0]


def why_stuck(before, launch, reached):
    """Why another attempt makes no sense, "" where it does: STUCK attempts of this launch in a row
    came no further than `reached`.

    A preemption is no attempt's fault. Nor is a death without a word within SHORT minutes, before
    the first snapshot: the machine went; but SHORT_DEATHS of them one after another are something
    that kills."""
    # when an attempt died without a word, only its successor's start tells
    ends = [a["began"] for a in before[1:]] + [time.time()]
    ours = [(record, end - record["began"]) for record, end in zip(before, ends)
            if record["launch"] == launch and record["progress"] and record["left"] != "preempted"]
    # the latest ones, as far back as they began where the run stands now
    idle = list(itertools.takewhile(lambda pair: pair[0]["progress"] == reached, reversed(ours)))
    short = sum(not record["left"] and seconds <= 60 * SHORT for record, seconds in idle)
    vain = len(idle) - short
    if vain >= STUCK:
        return f"no progress in {vain} attempts: their logs say why; a new launch may try"
    if short >= SHORT_DEATHS:
        return f"{short} containers died without a word, each within {SHORT} minutes"
    return ""


def why_over(run, launch, limit):
    """(status, why) where there is no sense in another attempt, else None. limit: hours of the
    whole run, 0 for none."""
    mine = of_launch(run, launch)
    if any(record["left"] == "finished" for record in mine):
        return "finished", "it was already"
    if limit and sum(map(hours, mine)) >= limit:
        return "time limit", TIME_IS_UP
    why = why_stuck(attempts(run), launch, progress(run))
    return ("stuck", why) if why else None


def hours_of_attempt(run, launch, limit, longest):
    """(hours that this attempt may train, never 0, whether the run is over with them): what is left
    of the run's `limit`, at most `longest`."""
    left = limit - sum(map(hours, of_launch(run, launch))) if limit else math.inf
    return max(min(longest, left), 1e-6), left <= longest


# ---- money ----

def card_and_count(gpu):
    """("A100-80GB", 8) of "A100-80GB:8", as Modal writes GPUs. Raises ValueError."""
    name, _, count = gpu.partition(":")
    if not name or not re.fullmatch(r"[1-9]\d*", count or "1"):
        raise ValueError(f"GPU {gpu!r}: write it as Modal does, H100 or A100-80GB:8")
    return name.upper(), int(count or 1)                # Modal takes "h100" for H100


def billed(asked, card=""):
    """Which of the GPUs that were asked for is paid, "" where that cannot be told: an upgrade to a
    larger card is free.

    asked: "A100-80GB:2", or a list of such. card: what the driver calls the one that came."""
    if isinstance(asked, str):
        return asked
    if not card:
        return asked[0]

    def fits(gpu):
        parts = re.split("-", card_and_count(gpu)[0].rstrip("!+"))
        return [bool(re.search(rf"\b{part}\b", card, re.I)) for part in parts]

    whole = [gpu for gpu in asked if all(fits(gpu))]
    family = [gpu for gpu in asked if fits(gpu)[0]]
    return next(iter(whole + family), "")


def hourly(gpu, cores, memory):
    """Dollars an hour for a container, or None where the price of its GPU is unknown.

    gpu: "H100:2", a list of which the first counts, or "" for none. memory: GiB."""
    gpu = billed(gpu)
    rest = cores * DOLLARS["core"] + memory * DOLLARS["GiB"]
    if not gpu:
        return rest
    name, count = card_and_count(gpu)
    name = name.rstrip("!+")
    return DOLLARS[name] * count + rest if name in DOLLARS else None


def dearest(gpus, cores, memory):
    """Dollars an hour of whichever of the GPUs comes, at most; None where a price is unknown."""
    prices = [hourly(gpu, cores, memory) for gpu in ([gpus] if isinstance(gpus, str) else gpus)]
    return None if None in prices else max(prices)


def money(dollars, unit=""):
    return "price unknown" if dollars is None else f"about ${dollars:.2f}{unit}"


def spent(tried):
    """Dollars of some attempts, None where a price is unknown."""
    if any(a["dollars"] is None for a in tried):
        return None
    return sum(hours(a) * a["dollars"] for a in tried)


def bill(run):
    """One line: hours and dollars so far, and of the whole run by the speed in metrics.jsonl."""
    tried = attempts(run)
    dollars = spent(tried)
    line = (f"{run.name}: {sum(map(hours, tried)):.2f} h in {how_many(len(tried), 'attempt')}, "
            f"{money(dollars, ' so far')}")
    known = [record for record in tried if record["epochs"]]
    unread = [record["unread"] for record in tried if "unread" in record]
    if unread:
        line += f", without {', '.join(unread)} of attempts/, which cannot be read"
    epoch, seconds = speed(run)
    if not known or not seconds:
        return line
    left = max(0.0, known[-1]["epochs"] - epoch) * seconds / 3600
    whole = None if dollars is None else dollars + left * known[-1]["dollars"]
    return (f"{line}; {seconds / 3600:.2f} h per epoch as measured: {left:.1f} h left, "
            f"{money(whole, ' for the whole run')}")


def speed(run):
    """(epochs trained, seconds per epoch with validation), or zeros; medians skip pauses."""
    rows = list(read_json_lines(run / "metrics.jsonl"))
    steps, validations = [], []
    for before, row in zip(rows, rows[1:]):
        seconds, done = row["time"] - before["time"], row["step"] - before["step"]
        if row["kind"] == "validation":
            validations.append(seconds)
        elif done > 0:
            steps.append(seconds / done)
    batches = max((row["batches"] for row in rows if row["kind"] == "train"), default=0)
    if not steps or not batches:
        return 0.0, 0.0
    last = rows[-1]
    epoch = last["epoch"]
    if last["kind"] == "train":
        epoch += last["batch"] / batches - 1
    return epoch, batches * statistics.median(steps) + statistics.median(validations or [0.0])
