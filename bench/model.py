"""Speed, memory, size and launches of V3 beside SeizureTransformer and the torch path of
transformers' Mamba-2.

    python bench/model.py [--seizuretransformer FOLDER] [--batch 2] [--threads 2] [--device auto]

Prints whole detectors on 60 s windows of 19 channels (windows a second, forward and training, which
is forward + backward), the sequence core at equal dimensions (6 bidirectional layers, 19 streams x
960 steps, d_model 64, d_state 16, headdim 8), and where V3's time goes; ratios hold within a run.
Launches and GB a window are what a training step of one window in bf16 asks of a GPU: operators that
are no views, and the bytes of the tensors that they read and write, counted by dispatch on whatever
machine runs this. What a GPU makes of it: bench/gpu.py.

FOLDER holds the published model.py of SeizureTransformer (github.com/keruiwu/SeizureTransformer, its
folder time_step_level). Without it, or without transformers, those rows are left out and the output
says so. Every contestant has a process, so that its memory is its own; they take turns, and the best
round of each counts. Beside other load, --threads 1 is fairer: two threads that wait for each other
lose more than their share.
"""
import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as v3

CORE = {"layers": 6, "width": 64, "state": 16, "headdim": 8, "streams": 19, "steps": 960}
CHUNKS = (16, 64)         # chunk_size of transformers: its fastest of 16, 32, 64 and 256, and a larger one
SAMPLES = 15360
UNSEEN = {"aten::detach", "aten::_unsafe_view", "aten::_reshape_alias"}      # views by another name


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = os.environ.get("SEIZURETRANSFORMER")
    parser.add_argument("--seizuretransformer", default=folder, metavar="FOLDER")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--count", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


class Launches(TorchDispatchMode):
    """Counts the operators under it that are no views, and the bytes of their tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.is_view or operator._schema.name in UNSEEN:
            return result
        self.count += 1
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self.bytes += leaf.numel() * leaf.element_size()
        return result


def launches(net, x):
    """(launches, bytes) of forward, loss and backward of one window in bf16."""
    v3.BLOCK = 10**12                   # as on a GPU: all sequences at once
    net.train()
    net.zero_grad(set_to_none=True)
    with Launches() as counted:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = net(x[:1])
        F.binary_cross_entropy_with_logits(y, torch.ones_like(y)).backward()
    return counted.count, counted.bytes


class TransformersCore(torch.nn.Module):
    """The same stack from the mixers of transformers: per layer one mixer for each direction, summed."""

    def __init__(self, chunk):
        super().__init__()
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
        config = Mamba2Config(hidden_size=CORE["width"], state_size=CORE["state"], head_dim=CORE["headdim"],
                              num_heads=2 * CORE["width"] // CORE["headdim"], expand=2, n_groups=1,
                              num_hidden_layers=1, use_bias=False, chunk_size=chunk)
        self.mixers = torch.nn.ModuleList(Mamba2Mixer(config, 0) for _ in range(2 * CORE["layers"]))

    def forward(self, x):
        for ahead, back in zip(self.mixers[::2], self.mixers[1::2]):
            y = F.layer_norm(x, x.shape[-1:])
            x = x + ahead(y) + back(y.flip(1)).flip(1)
        return x


def seizure_transformer(folder):
    spec = importlib.util.spec_from_file_location("seizuretransformer", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SeizureTransformer()


def build(name, args):
    """The contestant and its input; `name` is detector:WHO or core:WHO."""
    torch.manual_seed(0)
    kind, who = name.split(":")
    if kind == "core":
        net = TransformersCore(int(who.split()[-1])) if "transformers" in who else v3.Mamba2(
            CORE["width"], CORE["layers"], CORE["state"], CORE["headdim"])
        x = torch.randn(CORE["streams"], CORE["steps"], CORE["width"])
    else:
        net = seizure_transformer(args.seizuretransformer) if who == "SeizureTransformer" else v3.V3(19)
        x = torch.randn(args.batch, 19, SAMPLES)
    return net.to(args.device), x.to(args.device)


def contest(name, args):
    """Answers lines on stdin: "forward" and "train" with seconds a call, "end" with the peak memory in MB."""
    torch.set_num_threads(args.threads)
    net, x = build(name, args)
    counts = launches_apart(name, args)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = sum(p.numel() for p in net.parameters())
    print(json.dumps({"parameters": parameters, "counts": counts}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(json.dumps(measure(net, x, line.strip(), args.device)), flush=True)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024), flush=True)


def launches_apart(name, args):
    """launches() of a contestant in a process of its own, whose memory does not count."""
    command = [sys.executable, __file__, "--count", name]
    if args.seizuretransformer:
        command += ["--seizuretransformer", args.seizuretransformer]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(net, x, what, device):
    """Seconds of one forward or training call."""
    net.train(what == "train")
    net.zero_grad(set_to_none=True)

    def call():
        with torch.set_grad_enabled(what == "train"):
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                y = net(x)
            if what == "train":
                y.float().square().mean().backward()
    return timed(call, device)


def race(names, args):
    """Best seconds of each contestant over rounds in turn: {name: {forward, train, memory, parameters}}."""
    command = [sys.executable, __file__, "--batch", str(args.batch), "--threads", str(args.threads),
               "--device", args.device, "--seizuretransformer", args.seizuretransformer or "", "--one"]
    runs = {n: subprocess.Popen([*command, n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for n in names}

    def ask(run, line):
        run.stdin.write(line + "\n")
        run.stdin.flush()
        return json.loads(run.stdout.readline())
    found = {n: json.loads(run.stdout.readline()) for n, run in runs.items()}
    for what in ("forward", "train"):
        rounds = [{n: ask(run, what) for n, run in runs.items()} for _ in range(args.rounds + 1)]
        for n in names:
            found[n][what] = min(r[n] for r in rounds)
    for n, run in runs.items():
        found[n]["memory"] = ask(run, "end")
        run.wait()
    return found


def table(title, found, items, base):
    """One line per contestant: items a second forward and training, the ratio to `base`, memory,
    launches and bytes."""
    print(f"\n{title}")
    print(f"{'':24}{'parameters':>12}{'forward/s':>11}{'train/s':>10}{'ratio':>14}{'peak MB':>10}"
          f"{'launches':>10}{'GB':>7}")
    for name, r in found.items():
        ratio = [float("nan")] * 2
        if base in found:
            ratio = [found[base][what] / r[what] for what in ("forward", "train")]
        count, touched = r["counts"]
        print(f"{name.split(':')[1]:24}{r['parameters']:12,}"
              f"{items / r['forward']:11.2f}{items / r['train']:10.2f}"
              f"{ratio[0]:7.2f}{ratio[1]:7.2f}{r['memory']:10,.0f}{count:10,}{touched / 1e9:7.2f}")


def parts(args):
    """Share of a training step that each part of V3 takes by itself, and the Laplacian encoding's."""
    net, x = build("detector:V3", args)
    local = net.stem(x)
    streams = v3.norm(net.electrodes(local))
    wide = v3.norm(streams.transpose(1, 2).flatten(2)) @ net.gather
    hop = v3.normalised(net.graph(streams))
    works = {"whole step": (net, x), "stem": (net.stem, x), "electrodes": (net.electrodes, local),
             "TCN": (net.tcn, wide), "node stream": (net.nodes, streams.flatten(0, 1)),
             "edge stream": (net.graph, streams),
             "head": (lambda s: net.head(s, wide.detach(), local.detach()), streams)}
    seconds = {}
    for name, (work, value) in works.items():
        value = value.detach().requires_grad_(name not in ("whole step", "stem"))

        def step():
            work(value).square().mean().backward()
        seconds[name] = min(timed(step, args.device) for _ in range(4))
    encode = "Laplacian encoding"
    seconds[encode] = min(timed(lambda: v3.laplacian_encoding(hop, 16), args.device) for _ in range(4))
    print("\nV3, where a training step goes (forward + backward, each part by itself)")
    for name, s in seconds.items():
        print(f"{name:24}{1e3 * s:10.1f} ms{100 * s / seconds['whole step']:8.1f} %")


def timed(work, device):
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_peak(args):
    """Matrix products a second of this machine, in FLOP/s: fp32 on a CPU, bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if args.device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n ** 3 / min(timed(lambda: a @ b, args.device) for _ in range(5))


def matmul_flop(net, x):
    """FLOP of the matrix products of one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        net(x).square().mean().backward()
    return counter.get_total_flops()


def main():
    args = arguments()
    if args.count:
        print(json.dumps(launches(*build(args.count, args))))
        return
    if args.one:
        return contest(args.one, args)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, batch {args.batch}")
    detectors = ["detector:V3"]
    if args.seizuretransformer:
        detectors.insert(0, "detector:SeizureTransformer")
    else:
        print("SeizureTransformer left out: --seizuretransformer names no folder with its model.py")
    found = race(detectors, args)
    table("Detectors, 60 s windows a second", found, args.batch, "detector:SeizureTransformer")
    cores = ["core:ours"]
    if importlib.util.find_spec("transformers"):
        cores = [f"core:transformers, chunk {chunk}" for chunk in CHUNKS] + cores
    else:
        print("transformers left out: the package is not installed")
    table("Sequence core, windows a second", race(cores, args), 1, cores[0])
    parts(args)
    net, x = build("detector:V3", argparse.Namespace(**{**vars(args), "batch": 1}))
    flop, peak = matmul_flop(net, x), matmul_peak(args)
    print(f"\nmatrix products: {flop / 1e9:.1f} GFLOP a window in training; peak {peak / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
