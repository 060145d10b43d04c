"""Every key of a training run with its unit, its limits and whether a resume may change it; reading, checking and
comparing of configurations."""
import contextlib
import difflib
import json
import os
from pathlib import Path

import yaml

import evaluate
import model

DEFAULTS = {
    "experiment": {
        "name": "run",                  # run directory: <results>/<name>
        "seed": 42,                     # weights, sampling, augmentation, dropout
        "results": "results",           # folder of run directories
    },
    "data": {
        "path": "",                     # folder written by data.py import
        "synth_hours": 0.0,             # > 0: make this many hours of synthetic EDF at PATH_edf and import them to PATH
        "synth_patients": 8,            # patients among them
        "dev_patients": [],             # patients for validation; [] = the corpus's own dev split, else dev_fraction
        "dev_fraction": 0.2,            # share of patients drawn for validation where the corpus has no split
        "window_seconds": 60.0,         # length of a training window
        "stride_seconds": 10.0,         # between the starts of training windows
        "balanced": True,               # draw windows anew each epoch as below; false = every window each epoch
        "full_per_partial": 0.3,        # windows wholly inside a seizure, per window that contains an onset or end
        "background_per_partial": 2.5,  # windows without a seizure, per window that contains an onset or end
        "augment": True,                # random gain and left-right mirror, keyed by (seed, epoch, window)
        "buffers": 4,                   # batches read ahead
    },
    "model": model.DEFAULTS,
    "training": {
        "epochs": 100,
        "batch_size": 8,                # windows per optimizer step, over all processes
        "accumulate": 1,                # pieces that a batch is cut into to fit memory; the result is the same
        "learning_rate": 1e-4,          # peak, reached after warmup; then cosine to 0
        "weight_decay": 0.01,           # AdamW; none on norms, biases and other vectors
        "warmup_ratio": 0.03,           # share of all optimizer steps
        "grad_clip": 0.5,               # largest gradient norm
        "focal_alpha": 0.5,             # weight of seizure samples (Lin et al., ICCV 2017)
        "focal_gamma": 2.0,             # 0 = plain cross-entropy
        "precision": "fp32",            # fp32, bf16 or fp16 (with gradient scaling)
        "device": "auto",               # auto, cpu or cuda
        "compile": False,               # torch.compile
        "deterministic": False,         # bit-identical on a GPU too, slower there; a CPU always is
        "best_metric": "event_f1",      # any name in evaluate.METRICS; decides best.pt and early stopping
        "patience": 0,                  # epochs without improvement before stopping; 0 = never
        "log_every": 50,                # steps per row of metrics.jsonl and per plain line
        "checkpoint_interval": 1,       # epochs between checkpoint_epoch_EEE.pt
        "checkpoint_keep": 3,           # newest of them kept; 0 = all
        "mid_epoch_minutes": 30.0,      # between timed snapshots; BGB_MID_EPOCH_MINUTES overrides
        "mid_epoch_keep": 5,            # newest of them kept; 0 = all; BGB_MID_EPOCH_KEEP overrides
        "hang_minutes": 30.0,           # without any progress end the run with exit code 70 and all stacks; 0 = never
        "time_limit_hours": 0.0,        # stop, saved, before this much wall-clock time; 0 = no limit
    },
    "evaluation": evaluate.DEFAULTS,
}
CHOICES = {"training.precision": ("fp32", "bf16", "fp16"), "training.device": ("auto", "cpu", "cuda")}
LIMITS = {                              # of every number outside `model` and `evaluation`, which check their own
    "experiment.seed": (0, 2**63 - 1), "data.synth_hours": (0, 10**4), "data.synth_patients": (2, 10**4),
    "data.dev_fraction": (0, 1), "data.window_seconds": (0.1, 3600), "data.stride_seconds": (0.1, 3600),
    "data.full_per_partial": (0, 1000), "data.background_per_partial": (0, 1000), "data.buffers": (1, 1000),
    "training.epochs": (1, 10**6), "training.batch_size": (1, 10**6), "training.accumulate": (1, 10**6),
    "training.learning_rate": (0, 1000), "training.weight_decay": (0, 1000), "training.warmup_ratio": (0, 1),
    "training.grad_clip": (1e-12, 1e12), "training.focal_alpha": (0, 1), "training.focal_gamma": (0, 100),
    "training.patience": (0, 10**6), "training.log_every": (1, 10**9), "training.checkpoint_interval": (1, 10**6),
    "training.checkpoint_keep": (0, 10**6), "training.mid_epoch_minutes": (0, 10**6), "training.mid_epoch_keep": (0, 10**6),
    "training.time_limit_hours": (0, 10**6), "training.hang_minutes": (0, 10**6)}
FIXED = ("model", "experiment.seed", "data.window_seconds", "data.stride_seconds", "data.balanced",
         "data.full_per_partial", "data.background_per_partial", "data.augment", "data.dev_patients", "data.dev_fraction")


class Refused(Exception):
    """Bad usage, configuration or data. One line; nothing was touched; exit code 2."""


def load(path, overrides=()):
    """The YAML file over DEFAULTS, then `section.key=value` overrides, all checked. Raises Refused with the nearest name."""
    try:
        given = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise Refused(f"config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    config = json.loads(json.dumps(DEFAULTS))
    _merge(config, given, str(path))
    for text in overrides:
        key, found, value = text.partition("=")
        if not found or key.count(".") < 1:
            raise Refused(f"--set {text}: write section.key=value")
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise Refused(f"--set {text}: the value is not YAML") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(config, value, "--set")
    _check(config)
    return config


def _merge(config, given, source, prefix=""):
    if not isinstance(given, dict):
        raise Refused(f"{source}: {prefix[:-1] or 'the file'} must hold key: value pairs, not {given!r}")
    for key, value in given.items():
        if key not in config:
            near = difflib.get_close_matches(str(key).lower(), config, 1, 0)
            raise Refused(f"{source}: unknown key {prefix}{key}; the nearest is {prefix}{near[0]}")
        if isinstance(config[key], dict):
            _merge(config[key], value, source, f"{prefix}{key}.")
        else:
            config[key] = _typed(value, config[key], f"{source}: {prefix}{key}")


def _typed(value, default, where):
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and isinstance(value, str):                    # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is list and isinstance(value, list):
        return [str(v) for v in value] if not default or isinstance(default[0], str) else value
    if type(value) is not kind and default is not None:
        raise Refused(f"{where} must be {kind.__name__}, like {default!r}, not {value!r}")
    return value


def _check(config):
    for name, (lowest, highest) in LIMITS.items():
        value = _get(config, name)
        if not lowest <= value <= highest:
            raise Refused(f"{name} must be at least {lowest} and at most {highest:,}, not {value}")
    for name, choices in CHOICES.items():
        if _get(config, name) not in choices:
            raise Refused(f"{name} must be one of {', '.join(choices)}, not {_get(config, name)!r}")
    name = config["experiment"]["name"]
    if not name or name != os.path.basename(name) or name.startswith("."):
        raise Refused(f"experiment.name must be a plain folder name, not {name!r}")
    try:
        evaluate.check_metric(config["training"]["best_metric"])
        evaluate.settings(config["evaluation"])
        model.settings(config["model"])
    except ValueError as error:
        raise Refused(str(error)) from None


def _get(config, dotted):
    for part in dotted.split("."):
        config = config[part]
    return config


def flat(config, prefix=""):
    for key, value in config.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def compare(old, new, say):
    """Refuse what would make it another run; say what else changed since the checkpoint."""
    was, now = dict(flat(old)), dict(flat(new))
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key), now.get(key)
        if a == b:
            continue
        if any(key == f or key.startswith(f + ".") for f in FIXED):
            raise Refused(f"{key} is {b!r} and was {a!r} in the checkpoint: that is another run; "
                          f"set it back, choose another experiment.name, or use --fresh")
        say(f"resume: {key} {a!r} -> {b!r} from here on")
