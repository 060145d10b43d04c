"""Weights to share: stripped of everything that only training needs, or the mean of several
checkpoints, each with a model card beside it.

    python checkpoint.py strip best.pt [DST]
    python checkpoint.py average A.pt B.pt --out FILE

Nothing that exists is replaced.
"""
import math
import os
from pathlib import Path

import torch

import checkpoint
from checkpoint import megabytes
from eeg.console import rounded


def command(args):
    """`strip` or `average` as checkpoint.py's command line asks; returns the exit code."""
    for source in args.paths[:1] if args.command == "strip" else args.paths:
        if os.path.isdir(source):
            raise ValueError(f"{source}: Is a directory: give a checkpoint in it, such as best.pt")
    if args.command == "strip":
        if len(args.paths) > 2:
            raise ValueError(f"strip takes SRC and DST, not {len(args.paths)} paths: nothing was "
                             f"written")
        strip(*args.paths)
    else:
        if not args.out:
            raise ValueError("average needs --out FILE")
        average(args.paths, args.out)
    return 0


# what goes along with weights that are shared
SHARED = ("model", "config", "montage", "channels", "prepared", "data", "division", "epoch",
          "batch", "global_step", "scores", "averaged")


def strip(source, target=None):
    """Write the weights of `source`, with the settings that rebuild the model, to `target`
    (SOURCE_weights.pt), and a model card beside it (.md). Nothing that exists is replaced."""
    state = _with_weights(source)
    target = Path(target or Path(source).with_name(f"{Path(source).stem}_weights.pt"))
    kept = {key: state[key] for key in SHARED if key in state}
    metric = checkpoint.facts_of(state)["metric"]
    if metric:
        kept["metric"] = metric
    elif checkpoint.facts_of(state)["kind"] not in (None, "epoch"):
        kept |= _threshold_alone(state)         # the scores are of the validation before it
    _share(kept, target, source)
    print(f"{target}: {megabytes(os.path.getsize(target))} of "
          f"{megabytes(os.path.getsize(source))}; its model card: {target.with_suffix('.md')}")


def average(sources, target):
    """Write the mean of the weights of `sources`, checkpoints of one run, to `target` (LAWA, arXiv
    2306.03241).

    Counts and running statistics are those of the newest. An average kept during training instead
    (EMA) would be a second set of weights in every checkpoint: with the defaults, more than the 2
    GB that they promise to stay below."""
    if len(sources) < 2:
        raise ValueError("average needs two checkpoints or more")
    facts = {source: checkpoint.peek(source) for source in sources}
    saves = [(f["run"], f["save_counter"]) for f in facts.values()]
    if None in {run for run, _ in saves} or len({run for run, _ in saves}) > 1:
        raise ValueError("the checkpoints are not all of one run, or do not say of which")
    if len(set(saves)) < len(sources):
        raise ValueError("two of the files are the same save: it would count twice")
    newest = max(facts, key=lambda source: facts[source]["save_counter"])
    state = _with_weights(newest)
    weights = {name: value for name, value in state["model"].items() if _is_weight(name, value)}
    mean = {name: value.double() for name, value in weights.items()}
    for source in sources:
        if source != newest:
            _add(mean, state["model"], _with_weights(source)["model"], source)
    model = dict(state["model"])
    for name, total in mean.items():
        model[name] = (total / len(sources)).to(model[name].dtype)
    kept = {key: state[key] for key in SHARED if key in state and key != "scores"}
    kept |= _threshold_alone(state)
    target, names = Path(target), [Path(source).name for source in sources]
    _share({**kept, "model": model, "averaged": names}, target, newest)
    print(f"{target}: the mean of {len(sources)} checkpoints; counts and running statistics are "
          f"those of {newest}; its model card: {target.with_suffix('.md')}")


def _threshold_alone(state):
    """The tuned threshold of weights whose other scores are not theirs."""
    scores = _dict(state.get("scores"))
    return {"scores": {key: scores[key] for key in ("threshold",) if key in scores}}


def _is_weight(name, value):
    statistic = name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not statistic


def _add(mean, newest, model, source):
    for name in sorted(newest.keys() | model.keys()):
        if name not in newest or name not in model or _shape(newest[name]) != _shape(model[name]):
            raise ValueError(f"{source}: {name} has another shape or is absent: another model")
    for name, total in mean.items():
        total += model[name]


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _with_weights(source):
    state = checkpoint.load(source)
    if not isinstance(state.get("model"), dict):
        raise checkpoint.CorruptCheckpoint(f"{source}: holds no model weights")
    return state


def _share(state, target, source):
    """Weights and their card, where neither exists yet. The weights come last: where they are, all
    is; a card of this very text is that of a call which was killed before them."""
    card = target.with_suffix(".md")
    if card == target:
        raise ValueError(f"{target}: a .md is the card that goes beside the weights")
    text = model_card(state, target, source).encode()
    for path in (target, card):
        if os.path.lexists(path) and not (path == card and path.read_bytes() == text):
            raise ValueError(f"{path} exists: name another file, or move it away")
    checkpoint.atomic_write(card, [text])
    try:
        checkpoint.atomic_save(state, target)
    except BaseException:
        card.unlink()
        raise


def model_card(state, target, source):
    """Markdown: what the weights were trained on, how well they did there, and what they are not
    for."""
    config = _dict(state.get("config"))
    data, evaluation = _dict(config.get("data")), _dict(config.get("evaluation"))
    scores, metric = _dict(state.get("scores")), _dict(state.get("metric"))
    folders = data.get("path") or []
    if not isinstance(folders, list):
        folders = [folders]
    eeg = state.get("montage")
    rows = {
        "run": _dict(config.get("experiment")).get("name"),
        "from": Path(source).name,
        "epoch": state.get("epoch"),
        "step": state.get("global_step"),
        "averaged": _listed(state.get("averaged")),
        # the names alone: a whole path tells strangers about the machine
        "data": _listed([Path(str(folder)).name for folder in folders]),
        "validation patients": _listed(data.get("dev_patients"))
        or (eeg and "the corpus's own, or drawn by the seed"),
        "montage": state.get("montage"),
        "channels": _listed(state.get("channels")),
        "threshold": scores.get("threshold", evaluation.get("threshold")),
        "chosen by": metric.get("name") and f"{metric['name']} = {metric.get('value')}",
    }
    lines = [f"# {target.name}", ""]
    lines += [f"- {name}: {value}" for name, value in rows.items() if value not in (None, "")]
    numbers = {k: v for k, v in scores.items() if isinstance(v, (int, float)) and k != "threshold"}
    if numbers:
        whose = "patients" if eeg else "data"
        lines += ["", f"## Scores on the validation {whose}", "", "| score | value |", "|---|---|"]
        lines += [f"| {name} | {'not computable' if math.isnan(value) else rounded(value, '.4g')} |"
                  for name, value in numbers.items()]
    return "\n".join([*lines, "", "## Intended use", "", *_intended_use(eeg, numbers), ""])


def _intended_use(eeg, numbers):
    """Lines of a card; the weights of another loop may be of anything, and not scored."""
    where = "data"
    if eeg:
        yield "Research on the detection of epileptic seizures in scalp EEG. Not a medical device:"
        yield "not for diagnosis, alarms or treatment."
        where = "patients, hospitals and recording systems"
    if numbers:
        yield "The scores above were seen by the choice of these weights."
    yield f"On other {where} expect worse, and measure it before use."


def _listed(value):
    """What a card shows of a list; another loop's state may hold a number under its name."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _dict(value):
    return value if isinstance(value, dict) else {}
