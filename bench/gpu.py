"""Everything that a GPU decides, measured by one command in at most 8 minutes.

    python bench/gpu.py [--seconds 480] [--seizuretransformer DIR] [--out gpu.json]

Each section is a process with a time limit of its own; the JSON is written anew after each, so that
a cut keeps what was measured, and a failure becomes a row. Without a GPU: one line, exit 2. Exit 1
where a resumed run is not bit-identical under `deterministic`, a saved file does not hold what was
saved, or a GPU test fails or is skipped. Markdown tables go to the terminal and, measured on a GPU,
between the markers <!-- gpu --> and <!-- /gpu --> of docs/measured.md.

DIR holds the published model.py of SeizureTransformer, as for bench/model.py. `--device cpu` runs
every section on the small model, to try this file; its figures mean nothing.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                # noqa: E402
import torch.nn.functional as F                             # noqa: E402
import yaml                                                 # noqa: E402

import checkpoint                                           # noqa: E402
from eeg.disk import write_json                        # noqa: E402
from eeg import corpora                                              # noqa: E402
import evaluate                                             # noqa: E402
import helpers                                              # noqa: E402
import model as v3                                          # noqa: E402
from eeg import synth                                                # noqa: E402
import train                                                # noqa: E402
from bench import model as detectors                        # noqa: E402

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHANNELS = 19
TESTS = {       # by name: one that is renamed fails here instead of being left out
    "cuda": [
        "test_model.py::test_forward_and_backward_are_bit_identical_on_a_gpu",
        "test_model.py::"
        "test_a_gpu_gives_the_logits_and_gradients_of_the_cpu_within_each_precision",
        "test_checkpoint.py::test_a_snapshot_of_gpu_tensors_holds_the_values_of_the_call",
        "test_checkpoint.py::"
        "test_a_save_leaves_to_training_the_gpu_memory_that_it_has_freed_between_two_steps",
        "test_checkpoint.py::test_random_numbers_of_a_gpu_that_is_not_the_current_one_go_on_in_a_"
        "process_that_has_not_used_it_yet",
        "test_data.py::test_on_each_gpu_batches_are_those_of_the_cpu_though_one_slot_serves_all_and_"
        "no_other_gpu_is_used",
        "test_train.py::"
        "test_on_a_gpu_a_cut_run_ends_bit_identical_with_deterministic_algorithms"],
    "cpu": ["test_model.py::test_an_untrained_model_gives_the_prior"]}


# ---- measuring ----

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work, device, repeats=5):
    """Median seconds of `work()`, with all that it queued, after two calls to warm up."""
    found = []
    for _ in range(repeats + 2):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


@contextlib.contextmanager
def arithmetic(precision, device):
    """Autocast or TF32, as `precision` says; outside it fp32 is fp32."""
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    kind = PRECISIONS[precision]
    try:
        with torch.autocast(device, kind, enabled=kind is not None):
            yield
    finally:
        evaluate.exact_fp32()


class Step:
    """A training step by the parts of train.Trainer: autocast, focal loss, clipping, AdamW."""

    def __init__(self, net, precision, batch, args):
        settings = {"weight_decay": 0.01, "learning_rate": 1e-4}
        self.net, self.precision, self.device = net.to(args.device), precision, args.device
        self.optimizer = train.make_optimizer(self.net, settings, args.device == "cuda")
        self.scaler = torch.amp.GradScaler(args.device, enabled=precision == "fp16")
        self.x = torch.randn(batch, CHANNELS, args.samples, device=args.device)
        self.y = (torch.rand(batch, args.samples, device=args.device) > 0.9).float()
        self.run = self.net

    def forward(self):
        with torch.no_grad(), arithmetic(self.precision, self.device):
            return self.run(self.x)

    def gradients(self):
        self.optimizer.zero_grad(set_to_none=True)
        with arithmetic(self.precision, self.device):
            logits = self.run(self.x)
            loss = train.focal_loss(logits, self.y, torch.ones_like(self.y), 0.5, 2.0)
        self.scaler.scale(loss / self.y.numel()).backward()

    def __call__(self):
        self.gradients()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def peak_gb(self):
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated() / 1e9

    def busy(self):
        """Share of a step's time in which the GPU runs a kernel; None on a CPU."""
        if self.device != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            began = time.perf_counter()
            self()
            wait(self.device)
            whole = time.perf_counter() - began
        kernels = sum(event.self_device_time_total for event in trace.key_averages())
        return min(1.0, kernels / 1e6 / whole)


def build(args):
    torch.manual_seed(0)
    return v3.build(CHANNELS, {"size": args.size})


def product_peak(precision, args):
    """FLOP/s of one large square matrix product."""
    n = 8192 if args.device == "cuda" else 256
    kind = PRECISIONS[precision] or torch.float32
    a = torch.randn(n, n, device=args.device, dtype=kind)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    took = seconds(lambda: a @ a, args.device)
    torch.set_float32_matmul_precision("highest")
    return 2 * n**3 / took


# ---- sections: each returns rows of a table, dictionaries with the same keys ----

def machine(args):
    """The machine and its peaks."""
    on_gpu = args.device == "cuda"
    rows = [{"what": "device", "value": torch.cuda.get_device_name() if on_gpu else "CPU"},
            {"what": "torch", "value": torch.__version__},
            {"what": "CUDA", "value": torch.version.cuda if on_gpu else None}]
    for precision in PRECISIONS:
        peak = product_peak(precision, args) / 1e12
        rows.append({"what": f"matrix product {precision}, TFLOP/s", "value": peak})
    size = 2**28 if on_gpu else 2**20
    near = torch.empty(size, dtype=torch.uint8, device=args.device)
    other = torch.empty_like(near)
    far = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    copies = {"device to device": (other, near), "pinned to device": (near, far),
              "device to pinned": (far, near)}
    for name, (target, source) in copies.items():
        took = seconds(lambda: target.copy_(source, non_blocking=True), args.device)
        rows.append({"what": f"{name}, GB/s", "value": size / took / 1e9})
    one = torch.zeros(1, device=args.device)
    took = seconds(lambda: [one.add_(1) for _ in range(1000)], args.device)
    return rows + [{"what": "us per launch", "value": 1e6 * took / 1000}]


def tests(args):
    """The suite's GPU tests by name; a skip is a failure."""
    rows = []
    for name in TESTS[args.device]:
        command = [sys.executable, "-m", "pytest", "-q", "--slow", "-p", "no:cacheprovider",
                   f"tests/{name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        line = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
        passed = done.returncode == 0 and "skipped" not in done.stdout
        rows.append({"test": name.split("::")[-1], "passed": passed, "said": line})
    return rows


def training(args):
    """The model in every precision and batch size: forward, and the training step."""
    rows = []
    flop = detectors.matmul_flop(build(args), torch.randn(1, CHANNELS, args.samples))
    for precision in PRECISIONS:
        peak = product_peak(precision, args)
        for batch in args.batches:
            try:
                rows.append(one_training(precision, batch, flop, peak, args))
            except torch.OutOfMemoryError:
                rows.append({"precision": precision, "batch": batch, "note": "out of memory"})
                torch.cuda.empty_cache()
    return rows


def one_training(precision, batch, flop, peak, args):
    step = Step(build(args), precision, batch, args)
    forward = seconds(step.forward, args.device, args.repeats)
    took = seconds(step, args.device, args.repeats)
    with detectors.Launches() as launches:
        step.gradients()
    return {"precision": precision, "batch": batch, "forward windows/s": batch / forward,
            "windows/s": batch / took, "peak GB": step.peak_gb(), "launches": launches.count,
            "busy": step.busy(), "of the peak": flop * batch / took / peak}


def parts(args):
    """Milliseconds of forward and backward of each part by itself, in fp32."""
    net = build(args).to(args.device)
    x = torch.randn(args.batches[0], CHANNELS, args.samples, device=args.device)
    with torch.no_grad():
        local = net.stem(x)
        streams = v3.norm(net.electrodes(local))
        wide = v3.norm(streams.transpose(1, 2).flatten(2)) @ net.gather
        adjacency = net.graph(streams)
    works = {"stem": (net.stem, x), "electrodes": (net.electrodes, local), "TCN": (net.tcn, wide),
             "node stream": (net.nodes, streams.flatten(0, 1)), "edge stream": (net.graph, streams),
             "graph": (lambda s: net.convolve(s, adjacency), streams),
             "head": (lambda s: net.head(s, wide, local), streams)}
    rows = []
    for name, (work, value) in works.items():
        value = value.detach().requires_grad_(name != "stem")
        took = seconds(lambda: work(value).float().square().mean().backward(), args.device)
        rows.append({"part": name, "ms": 1e3 * took})
    hop = v3.normalised(adjacency)
    took = seconds(lambda: v3.laplacian_encoding(hop, net.convolve.eigenvectors), args.device)
    rows.append({"part": "eigenvectors, forward", "ms": 1e3 * took})
    return rows + convolutions(streams.flatten(0, 1), args)


def convolutions(streams, args):
    """The short convolution as it is, and as four multiplications with addition."""
    n, steps, width = streams.shape
    rows = torch.randn(n, steps, 5 * width, device=args.device)
    taps = torch.randn(5 * width, 4, device=args.device)
    image = rows.transpose(1, 2).unsqueeze(2)
    kernel = taps[:, None, None]
    padded = F.pad(rows, (0, 0, 3, 0))

    def added():
        found = padded[:, :steps] * taps[:, 0]
        for k in range(1, 4):
            found.addcmul_(padded[:, k:k + steps], taps[:, k])

    conv = seconds(lambda: F.conv2d(image, kernel, padding=(0, 3), groups=5 * width), args.device)
    return [{"part": "depthwise convolution", "ms": 1e3 * conv},
            {"part": "the same as four addcmul", "ms": 1e3 * seconds(added, args.device)}]


def compiled(args):
    """The training step under torch.compile, and how long compiling took."""
    step = Step(build(args), "bf16", args.batches[0], args)
    eager = seconds(step, args.device, args.repeats)
    # a CPU only tries that there is one graph: its compiler would take the whole time
    backend = "inductor" if args.device == "cuda" else "eager"
    step.run = torch.compile(step.net, fullgraph=True, dynamic=False, backend=backend)
    began = time.perf_counter()
    step()
    wait(args.device)
    compiling = time.perf_counter() - began
    took = seconds(step, args.device, args.repeats)
    batch = args.batches[0]
    return [{"batch": batch, "eager windows/s": batch / eager, "compiled windows/s": batch / took,
             "compile s": compiling}]


def seizuretransformer(args):
    """SeizureTransformer's training step, eager and compiled."""
    if not args.seizuretransformer:
        return [{"note": "left out: --seizuretransformer names no folder with its model.py"}]
    batch = args.batches[0]
    step = Step(detectors.seizure_transformer(args.seizuretransformer), "bf16", batch, args)
    rows = [{"run": "eager", "batch": batch, "windows/s": batch / seconds(step, args.device),
             "peak GB": step.peak_gb()}]
    if args.device == "cuda":
        step.run = torch.compile(step.net)
        rows.append({"run": "compiled", "batch": batch,
                     "windows/s": batch / seconds(step, args.device), "peak GB": step.peak_gb()})
    return rows


def saves(args):
    """What a save costs the training step: stall, its parts, the next five steps; and the file."""
    step = Step(build(args), "bf16", args.batches[0], args)
    usual = seconds(step, args.device)
    copy_seconds = copy_time(step, args)
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpointer(folder, say=lambda line: None) as saver:
            rows = [one_save(step, saver, usual, copy_seconds, args) for _ in range(4)]
            rows[0] = {"first stall ms": rows[0]["stall ms"]}       # it takes the buffers
            rows[-1]["file holds what was saved"] = file_is_equal(step, saver, folder)
    return rows


def packed(step, number):
    return {"model": step.net.state_dict(), "optimizer": step.optimizer.state_dict(),
            "epoch": 1, "batch": number, "global_step": number}


def copy_time(step, args):
    """Seconds of copying the state to pinned memory, tensor by tensor, nothing beside it."""
    sources = [p.detach() for p in step.net.parameters()] * 3           # weights and two moments
    targets = [torch.empty(p.shape, pin_memory=args.device == "cuda") for p in sources]

    def copy_all():
        for target, source in zip(targets, sources):
            target.copy_(source, non_blocking=True)

    return seconds(copy_all, args.device)


def one_save(step, saver, usual, copy_seconds, args):
    wait(args.device)
    began = time.perf_counter()
    state = packed(step, saver.counter + 1)
    pack = time.perf_counter() - began
    saver.save_mid(state)
    stall = time.perf_counter() - began
    following = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        wait(args.device)
        following.append(time.perf_counter() - began)
    slower = sum(following) - 5 * usual
    saver.wait()
    return {"stall ms": 1e3 * stall, "pack ms": 1e3 * pack,
            "freeze and launch ms": 1e3 * (stall - pack),
            "next five steps, ms more": 1e3 * slower, "copy ms": 1e3 * copy_seconds,
            "copy overlapped": 1 - min(1.0, max(0.0, slower) / copy_seconds)}


def file_is_equal(step, saver, folder):
    """A save, a clone of what it was given, a step that changes the weights at once, the file."""
    state = packed(step, saver.counter + 1)
    clone = copy.deepcopy(state)
    saver.save_mid(state)
    step()
    saver.wait()
    files = Path(folder).glob("mid_epoch_*.pt")
    newest = max(files, key=lambda path: checkpoint.peek(path)["batch"])
    return digest(checkpoint.load(newest), clone) == digest(clone, clone)


def digest(state, keys):
    """SHA-256 of the entries of `state` that `keys` names."""
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key, part in value.items():
                found.update(str(key).encode())
                add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            found.update(repr(value).encode())

    for key in keys:
        add(state[key])
    return found.hexdigest()


@contextlib.contextmanager
def small_corpus():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        synth.synth(folder / "edf", hours=0.35, patients=4, seed=3)
        corpora.import_corpus(folder / "edf", folder / "h5", say=lambda line: None)
        yield folder


def write_config(folder, name, args, **changes):
    """Configuration of a real run of the corpus in `folder`, as a file of its own folder."""
    changes = {"training__device": args.device, **changes}
    config = helpers.settings(folder / "h5", folder / name, **changes)
    config["model"] = {"size": args.size}
    path = folder / name / "config.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(config))
    return path


def loader(args):
    """Real training by train.py: seconds a step, and the share of them that waits for data."""
    with small_corpus() as folder:
        path = write_config(folder, "run", args, training__epochs=1, data__stride_seconds=5.0,
                            training__batch_size=args.batches[0])
        out = helpers.rest(helpers.spawn(path, minutes="30"))
        lines = (path.parent / "t" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"][3:]
    if not rows:
        raise RuntimeError(f"no step was trained: {out[-300:]}")
    step = statistics.median(row["seconds"] for row in rows)
    waited = statistics.median(row["waited"] for row in rows)
    return [{"batch": args.batches[0], "step s": step, "waited s": waited, "loss": waited / step}]


def resumes(args):
    """Whole runs against cut and resumed ones, by SHA-256 of the last state."""
    rows = []
    with small_corpus() as folder:
        for precision, deterministic in args.resumes:
            changes = {"training__precision": precision, "training__epochs": 1,
                       "training__deterministic": deterministic}
            name = f"{precision}-{deterministic}"
            whole = write_config(folder, f"whole-{name}", args, **changes)
            helpers.rest(helpers.spawn(whole, minutes="30"))
            cut = write_config(folder, f"cut-{name}", args, **changes)
            run_cut(cut)
            rows.append({"precision": precision, "deterministic": deterministic,
                         "identical": last_digest(whole) == last_digest(cut)})
    return rows


def run_cut(path):
    process = helpers.spawn(path, minutes="0")
    helpers.wait_for(process, "saved mid_epoch")
    process.send_signal(signal.SIGTERM)
    helpers.rest(process)
    if process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"the run ended with {process.returncode} before it was cut")
    helpers.rest(helpers.spawn(path, "--resume", minutes="30"))


def last_digest(path):
    state = helpers.last(path.parent)
    return digest(state, ("model", "optimizer", "scheduler", "scaler", "rng", "global_step"))


def numerics(args):
    """Logits of the device in each precision beside those of the CPU in fp32."""
    net = build(args).eval()
    x = torch.randn(2, CHANNELS, args.samples)
    with torch.no_grad():
        exact = net(x)
    rows = []
    for precision in PRECISIONS:
        with torch.no_grad(), arithmetic(precision, args.device):
            found = net.to(args.device)(x.to(args.device)).cpu()
        both = torch.stack([exact.flatten(), found.flatten()])
        error = ((found - exact).std() / exact.std()).item()
        rows.append({"precision": precision, "error / deviation": error,
                     "correlation": torch.corrcoef(both)[0, 1].item()})
    return rows


SECTIONS = {            # limit of each as a share of --seconds; most take less than theirs
    "machine": (machine, 0.1), "numerics": (numerics, 0.1), "training": (training, 0.4),
    "parts": (parts, 0.1), "saves": (saves, 0.1), "loader": (loader, 0.15),
    "compiled": (compiled, 0.3), "seizuretransformer": (seizuretransformer, 0.2),
    "resumes": (resumes, 0.5), "tests": (tests, 0.3)}


# ---- the whole ----

def claims(found):
    """Rows of claim | target | measured | met; measured is None where its section failed."""
    def best(section, key, **where):
        values = [row[key] for row in found.get(section, []) if row.get(key) is not None
                  and all(row.get(name) == value for name, value in where.items())]
        return max(values) if values else None

    ours = best("training", "windows/s", precision="bf16", batch=8)
    theirs = best("seizuretransformer", "windows/s", run="eager")
    identical = [row["identical"] for row in found.get("resumes", []) if row.get("deterministic")]
    ratio = ours / theirs if ours and theirs else None
    at_8 = {"precision": "bf16", "batch": 8}
    table = [("stall of a save after the first, ms", best("saves", "stall ms"), "at most", 1),
             ("copy of a save overlapped", best("saves", "copy overlapped"), "at least", 0.9),
             ("share of a step that waits for data", best("loader", "loss"), "at most", 0.01),
             ("memory at batch 8 in bf16, GB", best("training", "peak GB", **at_8), "at most", 24),
             ("V3 / SeizureTransformer, windows/s", ratio, "at least", 2),
             ("matrix products, share of the peak",
              best("training", "of the peak", precision="bf16"), "at least", 0.4),
             ("resumed run bit-identical", float(all(identical)) if identical else None,
              "at least", 1)]
    return [{"claim": claim, "target": f"{bound} {target}", "measured": value,
             "met": met(value, bound, target)} for claim, value, bound, target in table]


def met(value, bound, target):
    if value is None:
        return False
    return value <= target if bound == "at most" else value >= target


def markdown(rows):
    """A table of dictionaries; keys that only some have are left empty in the others."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        cells = ["" if cell is None else cell for cell in cells]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run_section(name, limit, args):
    """Rows of a section from a process of its own; one row that says why, where it failed."""
    command = [sys.executable, __file__, "--section", name, "--device", args.device]
    if args.seizuretransformer:
        command += ["--seizuretransformer", args.seizuretransformer]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        out, complaint = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return [{"failed": f"not done within {limit:.0f} s"}]
    if process.returncode:
        return [{"failed": (complaint.strip().splitlines() or ["no word"])[-1]}]
    return json.loads(out.splitlines()[-1])


def wrong(found):
    """What makes the exit code 1: bit-identity, a file's content, a test."""
    rows = [row for section in ("saves", "resumes", "tests") for row in found[section]]
    return [row for row in rows if "failed" in row or row.get("passed") is False
            or row.get("file holds what was saved") is False
            or (row.get("deterministic") and not row["identical"])]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--seizuretransformer", metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.size = "full" if on_gpu else "small"
    args.batches = (8, 48, 64) if on_gpu else (1, 2)
    args.samples = 15360 if on_gpu else 1024
    args.repeats = 10 if on_gpu else 1
    args.resumes = [("bf16", True)]
    if on_gpu:
        args.resumes += [("fp16", True), ("bf16", False), ("fp16", False)]
    return args


def main():
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no GPU; --device cpu only tries this script",
              file=sys.stderr)
        return 2
    if args.section:
        evaluate.exact_fp32()
        work, _ = SECTIONS[args.section]
        print(json.dumps(work(args)))
        return 0
    end = time.monotonic() + args.seconds
    found = {}
    for name, (_, share) in SECTIONS.items():
        limit = min(2 * share * args.seconds, end - time.monotonic())
        found[name] = [{"failed": "no time was left"}]
        if limit > 0:
            found[name] = run_section(name, limit, args)
        print(f"\n{name}\n\n{markdown(found[name])}", flush=True)
        write_json(args.out, found)
    found["claims"] = claims(found)
    write_json(args.out, found)
    print(f"\nclaims\n\n{markdown(found['claims'])}")
    if args.device == "cuda":
        into_page(found)
    return 1 if wrong(found) else 0


def into_page(found):
    """Put the tables between the markers of docs/measured.md."""
    path = ROOT / "docs" / "measured.md"
    tables = "\n\n".join(f"{name}\n\n{markdown(rows)}" for name, rows in found.items())
    marked = re.compile(r"(<!-- gpu -->\n).*(<!-- /gpu -->)", re.S)
    text, count = marked.subn(lambda marks: f"{marks[1]}{tables}\n{marks[2]}", path.read_text())
    if not count:
        print("docs/measured.md has no markers <!-- gpu --> and <!-- /gpu -->: tables not written there")
        return
    checkpoint.atomic_write(path, [text.encode()])


if __name__ == "__main__":
    sys.exit(main())
