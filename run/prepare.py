"""What is trained, on what: recordings, their split, the model and its first weights. Whatever can
be refused is refused here, before a run directory is touched."""
import contextlib
import copy
import hashlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import model
from eeg import corpora, edf, splits, synth
from eeg.console import command, how_many
from eeg.disk import Refused, fault, hold
from eeg.settings import PATH, PATHS
from run.config import HERE, KEYS, flat, run_directory
from run.machine import Group, device_name, rank_and_size
from run.watch import Watchdog
from scoring.metrics import deciding


def check(config, say):
    """Refuse whatever a run of `config` would refuse before it takes its run directory, which is
    not touched. Raises Refused or TemporaryFault."""
    config = copy.deepcopy(config)
    config["data"]["copy_to"] = ""      # refuses nothing by itself, and may take an hour
    expect_data(config)
    with Watchdog(0, os.devnull, say) as watch, Group("cpu", watch) as group:
        split = Split(config, open_recordings(config, group, watch, say), say)
        start_from(config, split, build_model(config, split, group, say), say)


def expect_data(config):
    """Refuse a configuration whose recordings are neither there nor to be made: the first thing
    that a newcomer lacks."""
    c = config["data"]
    if not c["path"]:
        raise Refused("data.path is not set: the folder that data.py import wrote")
    if isinstance(c["path"], list) and c["synth_hours"]:
        raise Refused("data.synth_hours makes one folder, and data.path is a list of several")
    run = os.path.realpath(run_directory(config))
    for path in folders(config):
        try:
            there = Path(path).is_dir()
        except OSError as error:        # a network disk that is away for a moment
            raise fault(error, path) from None
        if not there and not c["synth_hours"]:
            what = "is no folder" if os.path.exists(path) else f"does not exist{_here(path)}"
            alike = ", each with the same --montage" if isinstance(c["path"], list) else ""
            make = command("data.py", "import", "CORPUS_FOLDER", path)
            raise Refused(f"data.path {path} {what}: {make}{alike}")
        if os.path.commonpath([run, os.path.realpath(path)]) == run:
            raise Refused(f"data.path {path} lies in the run directory {run}, which --fresh moves "
                          f"aside: give experiment.name or experiment.results another name")
    several = rank_and_size()[1] > 1
    if c["copy_to"] and several and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        raise Refused("data.copy_to serves one machine, and this run has several: copy the corpus "
                      "on each, and name the copy as data.path")


def _here(path):
    """The folder of that name in the current one, which was meant, as the middle of a sentence."""
    inside = Path(path).is_relative_to(HERE) and Path(path).relative_to(HERE)
    if not inside or not inside.is_dir():
        return ""
    return (f" (a relative path of a configuration begins at {HERE}; for the one here write "
            f"{inside.absolute()})")


def expect_same(config, group):
    """Refuse a job whose processes were given different configurations: each would train weights of
    its own. Paths may differ, from machine to machine."""
    given = [dict(flat(c)) for c in group.gather(config)]
    for rank, other in enumerate(given):
        for name, value in given[0].items():
            if other.get(name) != value and KEYS[name].limits not in (PATH, PATHS):
                raise Refused(f"{name} is {other.get(name)!r} in process {rank} and {value!r} in "
                              f"process 0: give all processes of the job one configuration")


def folders(config):
    path = config["data"]["path"]
    return path if isinstance(path, list) else [path]


def open_recordings(config, group, watch, say):
    """Recordings at data.path, opened by each process for itself: on another machine the same files
    have other places and times. Raises Refused where they differ."""
    c = config["data"]
    made = group.from_main(lambda: provide(config, watch, say))
    path = made if c["copy_to"] else c["path"]

    def opened():
        with explained(path):
            return data.open_corpora(path, c["same_person"])

    recordings = group.together(opened)
    facts = group.gather((data.fingerprint(recordings), splits.division(recordings, [])))
    for rank, other in enumerate(facts):
        if other != facts[0]:
            raise Refused(f"the recordings at data.path differ between process {rank} and process "
                          f"0 (names, lengths, preparation, events or patients): copy one import "
                          f"to all machines")
    return recordings


@contextlib.contextmanager
def explained(path):
    """What fails at data.path, in one line."""
    try:
        yield
    except edf.DataError as error:
        raise Refused(str(error)) from None     # it names the folder, file or key itself
    except OSError as error:
        raise fault(error, path) from None


def provide(config, watch, say):
    """The path at which the recordings are opened. Synthetic ones are made at data.path first where
    the config asks for them, and only then."""
    c = config["data"]
    path = c["path"]
    with explained(path):
        if c["synth_hours"] and not Path(path).is_dir():
            make_recordings(config, Path(path), watch, say)
        for folder in folders(config):
            refused = len(corpora.read_report(folder))
            if refused:
                say(f"warning: {folder}: the import refused {how_many(refused, 'file')}: "
                    f"{command('data.py', 'info', folder)} lists them")
        if not c["copy_to"]:
            return path
        copies = [data.copy_corpus(folder, c["copy_to"], say,
                                   lambda: watch.progressed("copied recording"))
                  for folder in folders(config)]
        return copies if isinstance(path, list) else copies[0]


def make_recordings(config, path, watch, say):
    """Synthetic EDF files at PATH_edf and their import at PATH; what a kill left half made is made
    anew."""
    c = config["data"]
    source, temp = Path(f"{path}_edf"), Path(f"{path}_edf.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = hold(path.parent)             # of two first runs one makes them
    try:
        if not source.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
            synth.synth(temp, hours=c["synth_hours"], patients=c["synth_patients"],
                        seed=config["experiment"]["seed"], progress=watch.progressed)
            os.replace(temp, source)
        say(f"data: {c['synth_hours']} h of synthetic recordings in {source}, "
            f"importing them to {path}")
        corpora.import_corpus(source, f"{path}.part", progress=watch.progressed)
        os.replace(f"{path}.part", path)
    finally:
        held.close()


class Split:
    """Who trains and who validates, the windows of the former, and their order in every epoch."""

    def __init__(self, config, recordings, say):
        self.seed, self.c = config["experiment"]["seed"], config["data"]
        c = self.c
        try:
            self.train, self.dev = splits.split(recordings, c, self.seed)
            self.windows = data.Windows(self.train, c["window_seconds"], c["stride_seconds"])
            first = self.order(1)
            name, why = deciding(config["training"]["best_metric"], self.dev,
                                 splits.instead(c))
        except (edf.DataError, ValueError) as error:
            raise Refused(f"{', '.join(folders(config))}: {error}") from None
        # written into the run's configuration: best.pt is compared by it from now on
        config["training"]["best_metric"] = name
        if why:
            say(f"warning: {why}")
        self.fingerprint = data.fingerprint(self.train + self.dev)
        self.division = splits.division(self.train, self.dev)
        self.channels, self.montage = self.train[0].channels, self.train[0].montage
        self.prepared = self.train[0].prepared
        self.batches = math.ceil(len(first) / config["training"]["batch_size"])

        # real samples of each window: those of a short recording end before the window does
        lengths = np.array([r.samples for r in self.train])[self.windows.recording]
        self.samples = np.minimum(lengths - self.windows.start, self.windows.length)

        say(f"train: {splits.amount(self.train)}")
        say(f"validation: {splits.amount(self.dev)}")
        if c["dev_patients"] and (c["folds"] or c["split"] != "patient"):
            say("warning: data.dev_patients says nothing under data.folds, nor with data.split: "
                "recording or time")
        for line in splits.told(recordings, self.train, self.dev, c):
            say(line)
        self.warn(config["training"]["batch_size"], len(first), say)

    def described(self, epoch):
        """What `epoch` trains on, in one line."""
        order = self.order(epoch)
        outside, partial, inside = np.bincount(self.windows.kind[order], minlength=3)
        return (f"epoch {epoch}: {how_many(len(order), 'window')} ({partial} with a seizure's "
                f"start or end, {inside} inside a seizure, {outside} without), "
                f"{how_many(self.batches, 'batch')}")

    def warn(self, batch_size, windows, say):
        longest = max(r.seconds for r in self.train)
        if self.c["window_seconds"] > longest:
            say(f"warning: data.window_seconds {self.c['window_seconds']:g} is longer than every "
                f"recording (the longest has {longest:g} s): the rest of each window is empty")
        if batch_size > windows:
            say(f"warning: training.batch_size {batch_size} is larger than an epoch "
                f"({how_many(windows, 'window')}): an epoch is one step")

    def order(self, epoch):
        """Window ids of `epoch` in the order of training: a pure function of (seed, epoch)."""
        background = self.c["background_per_partial"] if self.c["balanced"] else None
        return self.windows.epoch(self.seed, epoch, self.c["full_per_partial"], background,
                                  self.c["corpus_balance"])


def is_weights(table):
    """Whether `table` is {name: tensor} of plain floating-point numbers: a parameter takes integers
    and complex numbers too, in silence."""
    return isinstance(table, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.is_floating_point()
        and value.layout == torch.strided and not value.is_meta for name, value in table.items())


def read_init(config, split, net):
    """(weights, SHA-256 of their file) that training.init names, fit for `net`. Raises Refused."""
    path = config["training"]["init"]
    try:
        state = checkpoint.load(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except checkpoint.CorruptCheckpoint as damage:
        raise Refused(f"training.init: {damage}") from None
    except OSError as error:
        raise fault(error, path, asked=f"training.init {path}") from None
    weights, channels = state.get("model"), state.get("channels") or []
    if not is_weights(weights) or not isinstance(channels, (list, tuple)):
        raise Refused(f"training.init {path}: holds no weights")
    if not all(value.isfinite().all() for value in weights.values()):
        raise Refused(f"training.init {path}: its weights are not finite")
    if channels and list(channels) != list(split.channels):
        raise Refused(f"training.init {path}: its {len(channels)} channels ({channels[0]} ...) are "
                      f"not the {len(split.channels)} of {config['data']['path']} "
                      f"({split.channels[0]} ...)")
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    size = model.size_of(weights, len(split.channels)) if found != expected else ""
    if size:
        raise Refused(f"training.init {path}: the weights are of model.size {size}, "
                      f"the model of this configuration is not")
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise Refused(f"training.init {path}: {name} is {found.get(name, 'absent')} in it and "
                          f"{expected.get(name, 'absent')} in the model of this configuration")
    wanted = config["training"]["init_sha256"]
    if wanted and wanted != digest:
        raise Refused(f"training.init {path}: its SHA-256 is {digest}, not training.init_sha256")
    return weights, digest


def start_from(config, split, net, say):
    """The weights of training.init into `net`; optimizer and step are those of a new run."""
    path = config["training"]["init"]
    if not path and config["training"]["init_sha256"]:
        raise Refused("training.init_sha256 is given, and training.init is not")
    if not path:
        return
    weights, digest = read_init(config, split, net)
    net.load_state_dict(weights)
    config["training"]["init_sha256"] = digest
    say(f"init: weights of {path}, SHA-256 {digest}")


def build_model(config, split, group, say):
    """The detector on this process's device, with the same weights in every process."""
    rng = checkpoint.random_states()
    torch.manual_seed(config["experiment"]["seed"])
    try:
        net = model.build(len(split.channels), config["model"]).to(group.device)
    except ValueError as error:
        raise Refused(str(error)) from None
    checkpoint.restore_random_states(rng)
    count = sum(p.numel() for p in net.parameters())
    line = (f"model: {type(net).__name__}, {count:,} parameters, {config['training']['precision']} "
            f"on {device_name(group.device)}")
    if group.size > 1:
        line += f", {group.size} processes"
    say(line)
    return net


def as_saved(net, state, config, split, group, say):
    """The model that the weights of a resumed state fit: where they are older than some of its
    settings it is built anew without these."""
    older = model.older(state["config"]["model"]) if state else {}
    if not older:
        return net
    config["model"] |= older
    return build_model(config, split, group, say)
