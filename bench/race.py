"""bench/learn.py --race and --also-real: detectors that are trained alike and judged alike.

All train on the same patients of one synthetic corpus, bipolar as the real clips are. The threshold
of each is the one with the best event F1 on the same dev patients. Events are made alike for all.
Figures on synthetic EEG come from a second corpus, of other patients and another seed, scored once.
A V3 of several epochs is its best.pt, the epoch with the best average precision on dev;
SeizureTransformer is the weights at the end of its budget.

Each detector trains in a process of its own with one thread: other load on the machine lengthens the
hours and leaves the CPU minutes. What is finished in --work FOLDER is not trained again.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import networks                                                         # noqa: E402
from judge import CHB, CLIPS, ROOT, judged, print_table, real, synthetic    # noqa: E402
from judge import table_real, table_unseen                              # noqa: E402
from networks import FITS, data                                         # noqa: E402
from eeg.disk import write_json                        # noqa: E402
from eeg import corpora                                                          # noqa: E402

TRAINED = 6.0, 36, 0                    # hours, patients, seed of the corpus,
UNSEEN = 3.0, 12, 1000                  # and of that which is scored
CORPUS = "corpus_bipolar"
EPOCHS = 4                              # of the small V3 in --also-real
SEEDS = 0, 1, 2
HOURS = 4.0                             # of EEG: what SeizureTransformer sees in 8 CPU minutes
PLAIN = "classical", "line length", "line length, uV"


# ---- recordings ----

def parts(work):
    """{train, dev, unseen, real: labelled recordings}; those of dev are the same in every run."""
    corpus = synthetic(work, "corpus", *TRAINED, "bipolar")
    train, dev = data.split_patients(corpus, (), 0.25, 0)
    found = {"train": train, "dev": dev, "unseen": synthetic(work, "unseen", *UNSEEN, "bipolar")}
    if CLIPS.is_dir():
        found["real"] = real(work)
    return found


def without(work, patient):
    """Folder of the synthetic corpus and the real clips of all but one patient."""
    out = work / f"without_{patient}"
    if not out.is_dir():
        shutil.copytree(work / CORPUS, out, copy_function=os.link)
        for folder in (work / "recordings").glob("sub-*"):
            if not folder.name.endswith(patient):
                shutil.copytree(folder, out / folder.name, copy_function=os.link)
        (out / corpora.INDEX).unlink(missing_ok=True)
    return out


# ---- one detector, in a process of its own ----

def train_one(work, title, published):
    """Fit the job runs/TITLE/job.json; the rows of its budgets go into result.json beside it."""
    torch.set_num_threads(1)
    folder = work / "runs" / title
    job = json.loads((folder / "job.json").read_text())
    on = parts(work)
    corpus = work / CORPUS
    if job["without"]:
        corpus = without(work, job["without"])
        dev = sorted({r.patient for r in on["dev"]})
        on["train"], _ = data.split_patients(data.open_corpus(corpus), dev)
    place = networks.Place(str(corpus), on["train"], on["dev"], folder, published)
    rows = []
    for fitted in FITS[job["system"]](place, job["seed"], job["budgets"]):
        tracks = {part: {r.name: fitted.track(r) for r in on[part]}
                  for part in ("dev", "unseen", "real") if part in on}
        rows.append({
            "system": job["system"], "seed": job["seed"], "budget": fitted.budget,
            "hours": fitted.hours, "minutes": fitted.minutes, "parameters": fitted.parameters,
            "chosen": fitted.chosen, **judged(on, tracks)})
    write_json(folder / "result.json", rows)


# ---- many of them ----

def job(system, seed, budgets, without=""):
    return {"system": system, "seed": seed, "budgets": budgets, "without": without}


def rows_of(work, jobs, args):
    """The rows of all jobs {name: job}, of which args.jobs are trained at a time."""
    waiting, running = [], {}
    for name, wanted in jobs.items():
        folder = work / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "result.json").exists():
            if json.loads((folder / "job.json").read_text()) != wanted:
                sys.exit(f"{folder} holds another job: move it away")
            continue
        write_json(folder / "job.json", wanted)
        waiting.append(name)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            print(f"training {name}", file=sys.stderr, flush=True)
            running[name] = start(work, name, args)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    sys.exit(f"{name} failed: {(work / 'runs' / name / 'log').read_text()[-2000:]}")
        time.sleep(0.2)
    return [row for name in jobs
            for row in json.loads((work / "runs" / name / "result.json").read_text())]


def start(work, name, args):
    command = [sys.executable, __file__, str(work), name, args.seizuretransformer]
    with open(work / "runs" / name / "log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def plain_jobs():
    """Those that see the whole training set once and have nothing random that matters."""
    return {name.replace(", ", " "): job(name, 0, [["all", "", 0]]) for name in PLAIN}


def small_job(seed):
    budgets = [[f"{EPOCHS} epochs", "epochs", EPOCHS]]
    return {f"V3 small, seed {seed}": job("V3 small", seed, budgets)}


def best_rows(rows):
    """Without what else was measured on the same run."""
    return [row for row in rows if "," not in row["budget"]]


# ---- modes ----

def also_real(work, args):
    # made here, before processes that need them
    parts(work)
    budget = small_job(0)["V3 small, seed 0"]["budgets"]
    jobs = {f"V3 small without {name}": job("V3 small", 0, budget, name) for name in CHB}
    rows = best_rows(rows_of(work, jobs | small_job(0) | plain_jobs(), args))
    alone = rows[len(CHB):]
    print("\nAUROC per second on the real clips of a patient\n")
    lines = []
    for patient, row in zip(CHB, rows):
        reached = [each["real"]["auroc"][patient] for each in [row, *alone]]
        lines.append([patient, *(f"{value:.3f}" for value in reached)])
    print_table(["", "V3 small, and the others' clips", *(row["system"] for row in alone)], lines)
    return 0


def race(work, args):
    """The CPU minutes that V3 full takes for HOURS are what the others get the second time."""
    on = parts(work)
    equal = [f"{HOURS:g} h", "hours", HOURS]
    first = {"V3 full hours, seed 0": job("V3 full", 0, [equal]),
             "V3 small, one epoch": job("V3 small", 0, [["one epoch", "epochs", 1]])}
    full, small = rows_of(work, first, args)
    minutes = round(full["minutes"], 2)

    # the small V3 trains in whole epochs, each with its validation
    epochs = max(1, round(minutes / small["minutes"]))
    name = f"{minutes:.1f} min"
    twice = [name, "minutes", minutes], equal
    jobs = {}
    for seed in SEEDS:
        jobs[f"V3 full hours, seed {seed}"] = job("V3 full", seed, [equal])
        jobs[f"SeizureTransformer, seed {seed}"] = job("SeizureTransformer", seed, [*twice])
        jobs[f"V3 small hours, seed {seed}"] = job("V3 small", seed, [equal])
        jobs[f"V3 small minutes, seed {seed}"] = job("V3 small", seed, [[name, "epochs", epochs]])
    rows = best_rows(rows_of(work, jobs | plain_jobs(), args))
    print(f"Equal EEG: {HOURS:g} h; equal time: the {minutes:.1f} CPU minutes that V3 full takes "
          "for them, validation\nincluded. A tiny budget: it says who learns fast, not who is best "
          "in the end.")
    table_unseen(on, rows)
    if "real" in on:
        table_real(on, rows)
    command = [sys.executable, str(ROOT / "bench" / "inference.py")]
    sys.stdout.flush()
    return subprocess.run(command + ["--seizuretransformer", args.seizuretransformer]).returncode


if __name__ == "__main__":
    where, name, published = sys.argv[1:]
    train_one(Path(where), name, published)
