"""The README's pictures, from a run that is killed and resumed: docs/*.png.

    python bench/pictures.py [--out docs] [--work DIR]      about six CPU minutes

    ls.png          the run directory right after SIGKILL, as `python checkpoint.py ls` shows it
    curves.png      loss, learning rate and best metric of the whole run, the resume marked
    seizure.png     a seizure found in an unseen recording, as `evaluate.py --plot` draws it

The run is configs/local/smoke.yaml with more hours, patients and epochs: synthetic EEG. The
detector is small and has trained for minutes; the pictures show what the project draws, not how
well it detects.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eeg import corpora                                                          # noqa: E402
import data                                                             # noqa: E402
import evaluate                                                         # noqa: E402
from scoring import pictures                                                         # noqa: E402
from eeg import synth                                                            # noqa: E402

LARGEST = 200_000                       # bytes of a picture in the repository
PATIENCE = 1200                         # seconds for each step of the run


def command(work):
    changes = {"experiment.name": "night", "experiment.results": work / "results",
               "data.path": work / "corpus", "data.synth_hours": 1.5, "data.synth_patients": 10,
               "training.epochs": 8}
    words = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs/local/smoke.yaml",
             "--resume"]
    for key, value in changes.items():
        words += ["--set", f"{key}={value}"]
    return [str(word) for word in words]


def killed_run(work):
    """Start the run and kill it in its third epoch, right after a snapshot."""
    log = (work / "first.log").open("w")
    process = subprocess.Popen(command(work), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    checkpoints = work / "results" / "night" / "checkpoints"
    deadline = time.monotonic() + PATIENCE
    while not list(checkpoints.glob("mid_epoch_003_*.pt")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            said = (work / "first.log").read_text()
            sys.exit(f"the run did not come to its third epoch:\n{said}")
        time.sleep(0.2)
    process.kill()
    process.wait()
    return checkpoints


def listing(work):
    """What `checkpoint.py ls` prints, as if typed where the results lie."""
    done = subprocess.run([sys.executable, ROOT / "checkpoint.py", "ls", "results"], cwd=work,
                          capture_output=True, text=True, check=True)
    return "$ python checkpoint.py ls results\n" + done.stdout.rstrip()


def draw_text(text, path):
    """Text as a terminal shows it."""
    lines = text.splitlines()
    width = 0.095 * max(len(line) for line in lines) + 0.4
    figure = Figure(figsize=(width, 0.2 * len(lines) + 0.4), dpi=100, facecolor="#1b1f24")
    figure.text(0.2 / width, 0.5, text, family="monospace", fontsize=11, color="#e6e6e6",
                va="center", linespacing=1.3)
    pictures._save([figure], path)


def seizure(work, path):
    """Overview of the unseen recording with the best event F1, and the page on which the first
    seizure that was found begins."""
    synth.synth(work / "unseen_edf", hours=0.5, patients=3, seed=99)
    corpora.import_corpus(work / "unseen_edf", work / "unseen", say=lambda line: None)
    net, state = evaluate.load_model(work / "results/night/checkpoints/best.pt", "cpu")
    c, _ = evaluate.stored_settings(state)
    best = None
    for r in data.open_corpus(work / "unseen"):
        if not len(r.events):
            continue
        track = evaluate.predict(net, r, "cpu", c)
        record = evaluate.score(r, track, c)
        f1 = evaluate.summarise([record], c)["event_f1"]
        if best is None or f1 > best[0]:
            best = (f1, r, track)
    _, r, track = best
    found = evaluate.postprocess(track, c["threshold"], c)
    truth, seconds = r.events, found / evaluate.FS
    places = pictures._places(r, track, truth, seconds)
    hit = next(place for place in places if place[0] == "found seizure")
    pages = pictures._pages(hit, r.seconds)[:1]
    scale = pictures._sensitivity([pictures._displayed(r, begin, begin + 10)[0] for _, begin in pages])
    sheet = pictures.Sheet(r, track, truth, seconds, c["threshold"], 1, scale)
    sheet.overview(pictures._title(r, places, 1), pages)
    sheet.page(*pages[0])
    pictures._save([sheet.figure], path)
    with Image.open(path) as page:
        page.convert("RGB").quantize(24).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(exist_ok=True)
        args.out.mkdir(exist_ok=True)
        killed_run(work)
        draw_text(listing(work), args.out / "ls.png")
        subprocess.run(command(work), cwd=ROOT, check=True)
        curves = (work / "results" / "night" / "curves.png").read_bytes()
        (args.out / "curves.png").write_bytes(curves)
        seizure(work, args.out / "seizure.png")
    for path in sorted(args.out.glob("*.png")):
        size = path.stat().st_size
        print(f"{path}: {size / 1000:.0f} kB")
        if size > LARGEST:
            sys.exit(f"{path} is larger than {LARGEST / 1000:.0f} kB")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
