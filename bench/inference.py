"""What a detector costs at inference on one CPU thread: windows a second, seconds of EEG a CPU second,
and the peak memory for a recording of 24 h.

    python bench/inference.py [--seizuretransformer FOLDER]

Each detector has a process of its own, whose peak memory is measured. The recording is noise: it
costs what EEG costs. Where 24 h would take too long, 2 h are run, and what they need beyond 12
minutes is scaled to 24 h. SeizureTransformer holds the whole recording in memory, as its own code
does for its z-score.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import networks                                                         # noqa: E402
from networks import data, evaluate                                     # noqa: E402
from judge import print_table                                           # noqa: E402
import model                                                            # noqa: E402


class Noise(data.Recording):
    """A recording of noise that lies in no file."""

    def read(self, start, n):
        return np.random.default_rng(start).integers(-300, 300, (len(self.channels), n), np.int16)


def noise(hours):
    channels = tuple(f"C{i}" for i in range(18))
    return Noise(path="", name="noise", patient="noise", split="", montage="bipolar",
                 channels=channels, fs=data.FS, samples=round(hours * 3600 * data.FS),
                 scale=np.full(18, 0.1, np.float32), norm=25.0, labelled=False,
                 events=np.zeros((0, 2)), prepared="")


def cost_one(system, published):
    """Prints {parameters, rate: s of EEG a CPU second, windows, memory: MB, how}: of 24 h where an
    few minutes say that they are cheap, else from the growth over 2 h."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, track, window = untrained(system, published)
    began = time.process_time()
    track(noise(0.2))
    rate = 720 / (time.process_time() - began)
    held = peak_memory()
    hours = 24 if rate > 86400 / 300 else 2
    began = time.process_time()
    track(noise(hours))
    rate = 3600 * hours / (time.process_time() - began)
    memory = held + (peak_memory() - held) * (24 - 0.2) / (hours - 0.2)
    print(json.dumps({"parameters": networks.size(net), "rate": rate, "windows": rate / window,
                      "window": window, "memory": memory, "hours": hours}))


def untrained(system, published):
    """(net, track, window in s)."""
    if system == "SeizureTransformer":
        net = networks.published_model(published, 18).eval()
        return net, networks.published_track(net), 60.0
    kind = networks.SMALL if system == "V3 small" else networks.FULL
    net = model.build(18, kind["model"])
    c = {"window_seconds": kind["window"]}
    return net, lambda r: evaluate.predict(net, r, networks.CPU, c), kind["window"]


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def costs(args):
    print("\nInference on one CPU thread\n")
    lines = []
    for system in ("V3 small", "V3 full", "SeizureTransformer"):
        command = [sys.executable, __file__, "--one", system, "--seizuretransformer",
                   args.seizuretransformer]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        r = json.loads(done.stdout)
        how = "" if r["hours"] == 24 else f", scaled from {r['hours']} h"
        lines.append([system, f"{r['parameters']:,}", f"{r['windows']:.2f} of {r['window']:.0f} s",
                      f"{r['rate']:,.0f}", f"{r['memory']:,.0f}{how}"])
    print_table(["", "parameters", "windows/s", "s of EEG per CPU s", "peak MB, 24 h"], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seizuretransformer", metavar="FOLDER",
                        default=os.environ.get("SEIZURETRANSFORMER", ""))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        cost_one(args.one, args.seizuretransformer)
    else:
        costs(args)


if __name__ == "__main__":
    main()
