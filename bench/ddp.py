"""Windows per second of real training with 1, 2 ... processes under torchrun: gloo on CPU cores (one thread each), nccl on GPUs.

    python bench/ddp.py [--processes 1 2]

The global batch is the same for every row, so the work per step is too; the ratio is to one process of the same run.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from eeg import corpora                                              # noqa: E402
from eeg import synth                                                # noqa: E402
from model import SMALL                                     # noqa: E402
from helpers import settings                             # noqa: E402


def steps_per_second(corpus, results, processes, cuda):
    """Windows per second over the steps of one epoch, its first three left out."""
    model = {} if cuda else {**SMALL, "tcn_width": 128, "node_width": 32, "node_headdim": 32}
    config = settings(corpus, results, training__epochs=1, training__device="cuda" if cuda else "cpu",
                      training__batch_size=16, data__window_seconds=30.0, data__stride_seconds=2.0)
    config["model"] = model
    results.mkdir()
    (results / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / "train.py"), "--config", str(results / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    rows = [json.loads(line) for line in (results / "t/metrics.jsonl").read_text().splitlines()]
    return 16 / statistics.median(row["seconds"] for row in rows[3:] if row["kind"] == "train")


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=None)
    args = parser.parse_args()
    most = torch.cuda.device_count() if cuda else os.cpu_count()
    counts = args.processes or [n for n in (1, 2, 4, 8) if n <= most]
    with tempfile.TemporaryDirectory() as temp:
        temp = Path(temp)
        synth.synth(temp / "edf", hours=0.5, patients=4, seed=3)
        corpora.import_corpus(temp / "edf", temp / "h5", say=lambda line: None)
        print("| processes | windows/s | of one process |\n|---|---|---|")
        first = None
        for n in counts:
            speed = steps_per_second(temp / "h5", temp / f"run{n}", n, cuda)
            first = first or speed
            print(f"| {n} | {speed:.1f} | {speed / first:.2f} |", flush=True)
    print(f"backend {'nccl' if cuda else 'gloo, 1 thread per process'}; more processes than "
          f"{'GPUs' if cuda else 'cores'} ({most}) were not tried")


if __name__ == "__main__":
    main()
