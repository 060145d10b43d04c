"""What is refused and said before a machine in the cloud is paid: a configuration that cannot work
there, recordings, weights and checkpoints that are not on its Volumes; what a call will cost, and
how to follow and stop it.

    config = checked(load(path), path, asked, listing, text)
    foretell(["A100-80GB", "H100"], 8, 32)

`asked` is a command line of modal_app.py. listing(path) names what a folder of
a Volume holds, folders with a slash at their end, [] where there is none; with recursive=True also
what its folders hold. text(path) is a file of a Volume, "" where it cannot be read.
"""
import contextlib
import json
import os
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import checkpoint
from eeg.disk import INDEX, REPORT, Refused, TemporaryFault
from run import fetch
from run.attempts import DATA, DOLLARS_AS_OF, FETCHED, MIRROR, RESULTS, dearest, money
from run.config import run_directory, run_folders
from run.prepare import folders

NAMES = {RESULTS: "holdfast-results", DATA: "holdfast-data", MIRROR: "holdfast-mirror"}

# options that another action would pass over in silence: {name: (its default, who takes it)}
TAKEN_BY = {
    "resume": ("false", ["train", "smoke"]), "fresh": ("false", ["train", "smoke"]),
    "split": ("all", ["evaluate"]), "gpu": ("", ["train", "smoke", "evaluate"]),
    "source": ("", ["import"]), "secret": ("", ["import"]), "layout": ("auto", ["import"]),
    "montage": ("referential", ["import"])}


def checked(config, path, asked, listing, text):
    """`config`, which stands at `path`, if what is asked for can work with it. Raises Refused;
    TemporaryFault where a server does not answer, or an import has not finished."""
    for name, (default, actions) in TAKEN_BY.items():
        if getattr(asked, name) != default and asked.action not in actions:
            raise Refused(f"--{name} belongs to --action {' or '.join(actions)}")
    if asked.action == "evaluate" and re.search(r":([2-9]|1\d)", asked.gpu):
        raise Refused("--action evaluate scores on one card: the others would be paid in vain")
    if asked.action == "import":
        expect_source(path, config, asked.source, listing)
        return config
    results, second = config["experiment"]["results"], config["training"].get("mirror")
    if results != RESULTS:
        raise Refused(f"config {path}: experiment.results must be {RESULTS}, the Volume, "
                      f"not {results!r}")
    if second and outside(second, MIRROR):
        raise Refused(f"config {path}: training.mirror must be a folder in {MIRROR}, the second "
                      f"Volume, not {second!r}")
    for folder in folders(config):
        # synthetic ones are made anywhere but on the data Volume, which a training cannot write to
        if not config["data"]["synth_hours"] or not outside(folder, DATA):
            expect_recordings(path, folder, listing, text)
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders(config)]
    if len(set(names)) < len(names):
        raise Refused(f"config {path}: data.path: two folders have one name among "
                      f"{', '.join(names)}: rename one")
    if asked.action == "evaluate":
        expect_best(config, listing)
    else:
        expect_start(config, asked, listing)
    return config


def outside(path, mount):
    return os.path.relpath(path or "/", mount).startswith("..")


def absent(said, mount, path, what):
    """The refusal of a path on a Volume, with the command that brings `what` there."""
    inside = shlex.quote(f"/{os.path.relpath(path, mount)}")
    return Refused(f"{said} on the Volume: modal volume put {NAMES[mount]} {what} {inside}")


def expect_recordings(path, folder, listing, text):
    """Refuse a data.path that holds no imported recordings on the data Volume."""
    if outside(folder, DATA):
        raise Refused(f"config {path}: data.path must be a folder in {DATA}, the Volume, "
                      f"not {folder!r}")
    names = listing(folder)
    if names in ([], [os.path.basename(folder)]):       # a file is listed as itself
        raise absent(f"{folder} is no folder", DATA, folder, "IMPORTED_FOLDER")
    if INDEX in names and not (REPORT in names and unfinished(text(f"{folder}/{REPORT}"))):
        return
    below = listing(folder, recursive=True)
    if any(name.endswith(".h5") for name in below):
        if REPORT in names:             # each container of a training would find it so
            raise TemporaryFault(f"{folder} on the Volume is not whole: its import runs, or was "
                                 "stopped: the same --action import goes on")
        return
    what = "no recordings"
    if any(name.lower().endswith(".edf") for name in below):
        what = "raw EDF, which nothing trains on"
    raise Refused(f"{folder} on the Volume holds {what}: --action import "
                  f"--source {shlex.quote(folder)} with --set data.path={DATA}/ANOTHER_FOLDER "
                  "makes recordings of it")


def unfinished(report):
    """Commands of imports that run or were stopped, by the text of a folder's import.json."""
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(report).get("unfinished")


def expect_best(config, listing):
    if "best.pt" not in stored(run_directory(config), listing):
        raise Refused(f"{run_directory(config)} on the Volume holds no best.pt to evaluate: "
                      "the first validation of a run writes it")


def expect_start(config, asked, listing):
    """Refuse what --resume, --fresh and training.init ask for and the Volumes have not."""
    if asked.fresh == "true" and asked.resume != "false":
        raise Refused("--fresh and --resume exclude each other")
    for place in run_folders(config):
        if place.name in listing(place.parent):         # a folder has a slash at its end
            raise Refused(f"{place} on the Volume is a file: choose another experiment.name")
    if asked.fresh == asked.resume == "false":
        for place in run_folders(config):
            if stored(place, listing):
                raise Refused(f"{place} on the Volume holds checkpoints: "
                              "--resume true goes on, --fresh true starts over")
    if asked.resume not in ("true", "false"):
        expect_file("--resume", asked.resume, listing)
    if config["training"].get("init"):
        expect_file("training.init", config["training"]["init"], listing)


def stored(run, listing):
    """Checkpoints that the folder of a run has on its Volume."""
    return list(filter(checkpoint.NAME.fullmatch, listing(run / "checkpoints")))


def expect_file(what, path, listing):
    """Refuse a path that is no file on a Volume."""
    for mount in NAMES:
        if not outside(path, mount):
            if Path(path).name not in listing(os.path.dirname(path)):
                raise absent(f"{what} {path} is no file", mount, path, "FILE")
            return
    raise Refused(f"{what} must be a file on a Volume ({', '.join(NAMES)}), not {path!r}")


def expect_source(path, config, source, listing):
    """Refuse a --source that no import can read, and a data.path that it cannot write to."""
    if len(folders(config)) != 1 or outside(folders(config)[0], DATA):
        raise Refused(f"config {path}: data.path must be one folder in {DATA}, to which the import "
                      "writes")
    url = urlsplit(source)
    if url.scheme in ("s3", "gs", "https", "http"):
        if not url.netloc:
            raise Refused(f"--source {source}: no bucket or server is named")
        if url.query or url.fragment:
            raise Refused(f"--source {source}: an address with ? or # is none of a folder")
        if url.scheme.startswith("http"):
            if not outside(folders(config)[0], FETCHED):
                raise Refused(f"config {path}: data.path must lie outside {FETCHED}, where the "
                              "files that are fetched go and which is removed in the end")
            fetch.sums(source.rstrip("/") + "/")        # wrong addresses are refused here
        return
    if not source or outside(source, DATA):
        raise Refused(f"--source {source or 'is missing'}: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
                      f"https://SERVER/FOLDER, or a folder in {DATA}, the Volume")
    if not listing(source):
        raise absent(f"--source {source} is not", DATA, source, "EDF_FOLDER")


def foretell(gpus, cores, memory, limit=0, detached=True):
    """Print what a call will cost and what ends it. gpus: "H100:2", a list of which one will come,
    or "" for none; memory: GiB; limit: hours of a test, after which it is cut off."""
    hour = dearest(gpus, cores, memory)
    several = isinstance(gpus, list)
    on = f"{' or '.join(gpus) if several else gpus}, " if gpus else ""
    day = "" if hour is None else f", ${24 * hour:.0f} a day"
    if several and day:
        day += " at most"
    print(f"cost:   {money(hour, ' an hour')}{day} on {on}{cores} cores, {memory} GiB (prices of "
          f"{DOLLARS_AS_OF})")
    if hour is None:
        print("        a GPU of it is not in the list of run/attempts.py")
    if limit:
        print(f"        this test: {money(hour and limit * hour)} at most, it is cut off after "
              f"{60 * limit:.0f} minutes")
    if not detached:
        print("no --detach: Ctrl-C, a closed lid or a lost connection ends the call at Modal; "
              "what came since the last snapshot is trained again by --resume")


def guide(call, app, name):
    """Print the commands for a call of this app, which works on the run `name`."""
    file = shlex.quote(f"{name}/checkpoints/best.pt")
    print(f"call {call} in app {app}\n"
          f"    follow: modal app logs {app} -f\n"
          f"    stop:   modal app stop {app}\n"
          f"    list:   modal run modal_app.py --action ls\n"
          f"    fetch:  modal volume get {NAMES[RESULTS]} {file} .", flush=True)
