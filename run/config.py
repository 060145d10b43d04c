"""Every key of a training run with its meaning, its limits and whether a resume may change it;
reading and comparing configurations.

A configuration is a YAML file of sections that hold only what differs from the defaults below:

    training:
        batch_size: 4

The same key from the command line, after the file: --set training.batch_size=4. A new key is one
row here; `python train.py --help` prints them all. The tables of `model` and `evaluation` belong to
model.py and evaluate.py: train.py hands them in (add), so that nothing here waits for torch.
"""
import math
import os
import textwrap
from pathlib import Path

import yaml

from eeg import augmentation
from eeg.console import elsewhere, near
from eeg.disk import Refused, fault
from eeg.settings import CHANGES, FOLDER_NAME, PATH, PATHS, Key
from eeg.settings import checked, defaults, known, nearest, override, parse
from scoring.metrics import METRICS

HERE = Path(__file__).resolve().parent.parent
COUNT = (1, 10**6)
COUNT_OR_0 = (0, 10**6)
SECONDS = (0.1, 3600)
SHARE = (0, 1)
FACTOR = (0, 1000)

KEYS = {
    "experiment.name": Key("run", "run directory: <results>/<name>", FOLDER_NAME, CHANGES),
    "experiment.seed": Key(42, "weights, sampling, augmentation, dropout", (0, 2**63 - 1)),
    "experiment.results": Key("results", "folder of run directories", PATH, CHANGES),

    "data.path": Key(
        "", "folder written by data.py import, or a list of several: then names and patients carry "
        "the folder's name", PATHS, CHANGES),
    "data.same_person": Key(
        [], "patients that are one: [siena/PN00 = own/anna, ...]"),
    "data.corpus_balance": Key(
        "own", "of several corpora: own = the proportions below inside each, so that the corpus "
        "tells nothing about the label; equal = also as many seizures from each, repeated; "
        "pooled = drawn from all as from one", ("own", "equal", "pooled")),
    "data.split": Key(
        "patient", "what validation is apart in; recording and time are for too few patients",
        ("patient", "recording", "time")),
    "data.folds": Key(
        0, "cross-validation: parts that the patients (or recordings) are dealt into; as many as "
        "there are patients = leave one out; 0 = no", COUNT_OR_0),
    "data.fold": Key(1, "which of data.folds validates, from 1", COUNT),
    "data.synth_hours": Key(
        0.0, "more than 0: make this many hours of synthetic EDF at PATH_edf and import them",
        (0, 10**4), CHANGES),
    "data.synth_patients": Key(8, "patients among them", (2, 10**4), CHANGES),
    "data.dev_patients": Key(
        [], "patients for validation; [] = the corpus's own dev split, else dev_fraction"),
    "data.dev_fraction": Key(
        0.2, "share of patients drawn for validation where the corpus has no split; 0 = at least "
        "one, and none where dev_patients names some of another corpus", SHARE),
    "data.window_seconds": Key(60.0, "length of a training window", SECONDS),
    "data.stride_seconds": Key(10.0, "between the starts of training windows", SECONDS),
    "data.balanced": Key(
        True, "draw windows anew each epoch as below; false = every window each epoch"),
    "data.full_per_partial": Key(
        0.3, "windows wholly inside a seizure, per window that contains an onset or end", FACTOR),
    "data.background_per_partial": Key(
        2.5, "windows without a seizure, per window that contains an onset or end", FACTOR),
    "data.augment": Key(
        True, "random changes to training windows, keyed by (seed, epoch, window)"),
    "data.augmentations": Key(
        list(augmentation.AUGMENTED), "kinds of them: " + "; ".join(
            f"{name} ({kind.meaning})" for name, kind in augmentation.AUGMENTATIONS.items()),
        tuple(augmentation.AUGMENTATIONS)),
    "data.buffers": Key(4, "batches read ahead", (1, 1000), CHANGES),
    "data.readers": Key(
        16, "threads that read windows; more help where each read waits, as on a network",
        (1, 256), CHANGES),
    "data.copy_to": Key(
        "", "folder on a local disk to which the recordings are copied at the start; empty = read "
        "them where they lie", PATH, CHANGES),

    "training.epochs": Key(100, "passes over the training set", COUNT, CHANGES),
    "training.batch_size": Key(
        8, "windows per optimizer step, over all processes", COUNT, CHANGES),
    "training.accumulate": Key(
        1, "pieces that a batch is cut into to fit memory; the result is the same", COUNT, CHANGES),
    "training.learning_rate": Key(
        1e-4, "peak, reached after warmup; then cosine to 0", FACTOR, CHANGES),
    "training.weight_decay": Key(
        0.01, "AdamW; none on norms, biases and other vectors", FACTOR, CHANGES),
    "training.warmup_ratio": Key(0.03, "share of all optimizer steps", SHARE, CHANGES),
    "training.grad_clip": Key(0.5, "largest gradient norm", (1e-12, 1e12), CHANGES),
    "training.focal_alpha": Key(
        0.5, "weight of seizure samples (Lin et al., ICCV 2017)", SHARE, CHANGES),
    "training.focal_gamma": Key(2.0, "0 = plain cross-entropy", (0, 100), CHANGES),
    "training.precision": Key(
        "fp32", "arithmetic of the forward pass; fp16 scales gradients",
        ("fp32", "bf16", "fp16"), CHANGES),
    "training.device": Key(
        "auto", "auto = a GPU where torch sees one", ("auto", "cpu", "cuda"), CHANGES),
    "training.compile": Key(False, "torch.compile", None, CHANGES),
    "training.deterministic": Key(
        False, "bit-identical on a GPU too, slower there; a CPU always is", None, CHANGES),
    "training.best_metric": Key(
        "event_f1", "decides best.pt and early stopping", tuple(METRICS), CHANGES),
    "training.patience": Key(
        0, "epochs without improvement before stopping; 0 = never", COUNT_OR_0, CHANGES),
    "training.log_every": Key(
        50, "steps per row of metrics.jsonl and per plain line", (1, 10**9), CHANGES),
    "training.checkpoint_interval": Key(
        1, "epochs between checkpoint_epoch_EEE.pt", COUNT, CHANGES),
    "training.checkpoint_keep": Key(3, "newest of them kept; 0 = all", COUNT_OR_0, CHANGES),
    "training.mid_epoch_minutes": Key(
        30.0, "between timed snapshots; BGB_MID_EPOCH_MINUTES overrides", COUNT_OR_0, CHANGES,
        "BGB_MID_EPOCH_MINUTES"),
    "training.mid_epoch_keep": Key(
        5, "newest of them kept; 0 = all; BGB_MID_EPOCH_KEEP overrides", COUNT_OR_0, CHANGES,
        "BGB_MID_EPOCH_KEEP"),
    "training.init": Key(
        "", "a checkpoint or stripped file whose weights a fresh run starts from", PATH, CHANGES),
    "training.init_sha256": Key(
        "", "SHA-256 of that file: checked where given, filled in by the run", None, CHANGES),
    "training.mirror": Key(
        "", "folder for a second copy of the newest states and the records", PATH, CHANGES),
    "training.save_patience_minutes": Key(
        60.0, "go on without a save that succeeds, in either place", COUNT_OR_0,
        CHANGES),
    "training.hang_minutes": Key(
        30.0, "without progress before the run ends with exit code 70; 0 = never", COUNT_OR_0,
        CHANGES),
    "training.time_limit_hours": Key(
        0.0, "stop, saved, before this much wall-clock time; 0 = no limit", COUNT_OR_0, CHANGES),
}


DEFAULTS = {}                   # section -> {key: default}
COMPLETE = {}                   # section -> its function of the values given, for some


def add(section, rows, complete=None):
    """Take the table of a section: {key: Key or what makes one}. complete(values given) returns the
    whole section, or raises ValueError for values that do not go together."""
    KEYS.update((f"{section}.{name}", Key(*row)) for name, row in rows.items())
    DEFAULTS[section] = defaults(rows)
    COMPLETE[section] = complete or (lambda given: DEFAULTS[section] | given)


def rows(section):
    """The table of one section."""
    prefix = f"{section}."
    return {name.removeprefix(prefix): key for name, key in KEYS.items() if name.startswith(prefix)}


for section in ("experiment", "data", "training"):
    add(section, rows(section))


# ---- reading ----

def load(path, overrides=()):
    """The whole configuration {section: {key: value}}: defaults, the YAML file at `path`, then
    `section.key=value` overrides, all checked. Raises Refused with the nearest name or limits;
    TemporaryFault where the file cannot be read for now."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Refused(f"config {path}: {error.strerror}{_instead(Path(path))}") from None
    except OSError as error:
        raise fault(error, path, asked=f"config {path}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"config {path}: not YAML: {error}") from None
    try:
        return whole(path, text, overrides)
    except ValueError as error:
        raise Refused(str(error)) from None


def _instead(path):
    """Which file may be meant by a path where there is none, as the end of a sentence."""
    names = {file.name: file for file in path.parent.glob("*.yaml")}
    if not names and not path.is_absolute():
        names = {file.name: file for file in (HERE / "configs" / "local").glob("*.yaml")}
    nearby = f"; the nearest is {near(names[nearest(path.name, names)])}" if names else ""
    return elsewhere(path) or nearby


def whole(path, text, overrides):
    given = {section: {} for section in DEFAULTS}
    take(given, parse(text, f"config {path}") or {}, str(path))
    for item in overrides:
        section, key, value = override(item)
        take(given, {section: {key: value}}, "--set")
    config = {section: COMPLETE[section](values) for section, values in given.items()}
    for name, key in KEYS.items():
        section, _, short = name.partition(".")
        value = config[section].get(short)          # model.size is gone into the others
        if key.limits in (PATH, PATHS):
            several = isinstance(value, list)
            config[section][short] = [placed(v) for v in value] if several else placed(value)
        elif isinstance(value, list) and isinstance(key.limits, tuple):
            # in one order, each once: two ways to write one choice are equal
            config[section][short] = [item for item in key.limits if item in value]
    return config


def take(given, content, source):
    """Put every value of `content`, checked, into `given`."""
    known(content, DEFAULTS, source=f"{source}: ")
    for section, values in content.items():
        given[section] |= checked(values, rows(section), section, source)


def placed(path):
    """A path that means the same from wherever the program is started."""
    return os.path.join(HERE, os.path.expanduser(path)) if path else path


# ---- the environment ----

def effective(config, name, say=print):
    """The value of the key `name` that is in force: its environment variable's where that is set,
    which is said, else the configuration's. Raises Refused for a variable that holds no number."""
    variable = KEYS[name].environment
    text = os.environ.get(variable, "").strip() if variable else ""
    section, _, key = name.partition(".")
    value = config[section][key]
    if not text:
        return value
    kind = type(KEYS[name].default)
    try:
        given = kind(text)
        if not 0 <= given < math.inf:
            raise ValueError
    except ValueError:
        what = "number" if kind is float else "whole number"
        raise Refused(f"{variable}={text!r} must be a {what}, 0 or more") from None
    say(f"checkpoints: {variable}={text} overrides {value} from the configuration")
    return given


# ---- comparing and describing ----

def flat(config, prefix=""):
    """(section.key, value) of every key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def compare(old, new, say):
    """Refuse what would make it another run; say what else changed since the checkpoint."""
    was, now = dict(flat(old)), dict(flat(new))
    for name in sorted(was.keys() | now.keys()):
        if name not in now:
            raise Refused(f"the checkpoint was trained with {name}, which this version of the "
                          f"program does not know: resume with the version that wrote it")
        # a checkpoint older than a key was trained as the key's default says
        before, after = was.get(name, KEYS[name].default), now[name]
        if before == after:
            continue
        if not KEYS[name].may_change:
            raise Refused(
                f"{name} is {after!r} and was {before!r} in the checkpoint: that is another run; "
                f"set it back, choose another experiment.name, or use --fresh")
        say(f"resume: {name} {before!r} -> {after!r} from here on")


def describe():
    """Every key with its default, meaning and limits, for --help."""
    lines = ["section.key: default, meaning; limits (* may change on a resume)"]
    for name, key in KEYS.items():
        mark = "*" if key.may_change else " "
        default = yaml.safe_dump(key.default, default_flow_style=True, width=1000).splitlines()[0]
        lines.append(f"{mark} {name}: {default}")
        lines += textwrap.wrap(key.meaning + shown(key), 100, initial_indent=" " * 8,
                               subsequent_indent=" " * 8)
    return "\n".join(lines)


def shown(key):
    """The limits of a key as a reader wants them."""
    if not key.limits or isinstance(key.default, list):
        return ""                       # the meaning of a list names them
    if isinstance(key.limits, str):
        return f"; {key.limits}"
    if isinstance(key.default, str):
        return f"; {', '.join(key.limits[:-1])} or {key.limits[-1]}"
    lowest, highest = key.limits
    if highest == math.inf:
        return f"; at least {lowest}"
    return f"; {lowest:g} to {highest:,}"


def true_or_false(resume):
    """What --resume takes: "true" and "false" in any capitals, or a checkpoint."""
    return resume.lower() if resume.lower() in ("true", "false") else resume


def run_directory(config):
    """Its whole path: relative ones depend on where a command was started."""
    return Path(config["experiment"]["results"], config["experiment"]["name"]).absolute()


def run_folders(config):
    """[the run directory, and its second copy where the run has one]."""
    run, mirror = run_directory(config), config["training"].get("mirror")
    return [run, Path(mirror, run.name)] if mirror else [run]
