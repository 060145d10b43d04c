"""The machine under a run: its processes, its threads and exactness."""
import contextlib
import datetime
import math
import os
import random
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
from eeg.disk import Refused, Stop, TemporaryFault
import evaluate
from run.watch import answered


# what torchrun tells each of its processes; deploy/slurm.sh sets the same
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LATE_SECONDS = 20                       # of waiting for the others, after which it is said or left


def rank_and_size():
    """(rank, number of processes) of this process in a torchrun job, or alone. Raises Refused for
    what another job has left in the environment."""
    rank, size = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if (rank, size) == ("0", "1"):
        return 0, 1
    given = [f"{name}={os.environ[name]}" for name in JOB if os.environ.get(name)]
    missing = [name for name in JOB if not os.environ.get(name)]
    numbers = missing or all(os.environ[name].isdecimal() for name in JOB if name != "MASTER_ADDR")
    if missing or not (numbers and int(rank) < int(size)
                       and int(os.environ["MASTER_PORT"]) < 2**16):
        line = f"{' '.join(given)} in the environment, left over from another job"
        if missing:
            line += f": torchrun would set {', '.join(missing)} too"
        raise Refused(f"{line}; for one process: unset RANK WORLD_SIZE")
    return int(rank), int(size)


def restarted():
    """Whether torchrun has started this process again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") not in ("", "0")


def seconds_before():
    """That torchrun has run, in a process which it has started again: its job goes on, and so does
    the time limit. 0 in any other."""
    born = born_at(os.getppid()) if restarted() else ""
    if not born:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(born) / os.sysconf("SC_CLK_TCK")


def born_at(pid):
    """When a process began, in ticks since the machine did, as text; "" without /proc."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


class Group:
    """This process among the others of a torchrun job, or alone."""

    def __init__(self, device, watch):
        if device == "cuda" and not torch.cuda.is_available():
            line = ("training.device is cuda and torch sees no GPU: "
                    "check nvidia-smi and the torch build, or set cpu")
            # a driver that has lost its GPU, or is still loading after a reboot, leaves its files
            silent = torch.version.cuda and (list(Path("/dev").glob("nvidia[0-9]*"))
                                             or Path("/dev/dxg").exists())
            raise TemporaryFault(line) if silent else Refused(line)
        self.rank, self.size = rank_and_size()
        self.main = self.rank == 0
        self.watch = watch
        self.device = torch.device("cpu")
        if device != "cpu" and torch.cuda.is_available():
            local = int(os.environ["LOCAL_RANK"]) if self.size > 1 else 0
            if local >= torch.cuda.device_count():
                raise Refused(f"process {local + 1} of this machine finds no GPU of its own among "
                              f"{torch.cuda.device_count()}: set --nproc_per_node to that number")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            self._meet()

    def _meet(self):
        # torchrun's static rendezvous keeps one store over its restarts: with a prefix of its own
        # no restart meets the addresses of the dead
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        line = f"process {self.rank} of {self.size} waits for the others at {place}"
        late = threading.Timer(LATE_SECONDS, print, [line], {"file": sys.stderr, "flush": True})
        late.daemon = True
        late.start()
        try:
            store, rank, size = next(dist.rendezvous("env://"))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            why = str(error).split("\n")[0]
            raise TemporaryFault(f"{line.replace('waits for', 'cannot meet')}: {why}") from None
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # the others wait for the main process through a long import or a disk that is away
        wait = datetime.timedelta(days=7)
        dist.init_process_group(backend, store=dist.PrefixStore(f"restart {restart}", store),
                                rank=rank, world_size=size, timeout=wait)
        # NCCL meets at the first exchange, by the store, which waits for half an hour by itself
        store.set_timeout(wait)
        late.cancel()

    def sum(self, values):
        """Element-wise sum of a short list of numbers over the processes, as floats."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def add(self, tensor):
        """`tensor` becomes its sum over the processes, in place; nobody waits for it on a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, value):
        """[the value of each process], in every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make):
        """What `make()` returns in the main process, in every process; what it refuses, too."""
        if self.size == 1:
            return make()
        if not self.main:
            box = [None, None]
            with self.watch.waiting_for_others():
                dist.broadcast_object_list(box)
        else:
            try:
                box = [make(), None]
            except (Stop, checkpoint.SaveFailed) as refusal:
                box = [None, refusal]
            dist.broadcast_object_list(box)
        made, refusal = box
        if refusal:
            raise refusal
        return made

    def together(self, make):
        """What `make()` returns in this process; what it refuses in one is raised in all."""
        made = refusal = None
        try:
            made = make()
        except Stop as stop:
            refusal = stop if self.main else type(stop)(f"in process {self.rank}: {stop}")
        refusals = [other for other in self.gather(refusal) if other]
        if refusals:
            raise refusals[0]
        return made

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.size > 1 and dist.is_initialized():
            # NCCL's teardown waits for all processes: for good, where this one leaves alone
            with contextlib.suppress(Exception):
                answered(LATE_SECONDS, dist.destroy_process_group)


def prepare_torch(config, group):
    """Random states and exactness of this process, set before anything is built."""
    seed = config["experiment"]["seed"] + 1000003 * group.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config["training"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # nothing reads it
    evaluate.exact_fp32()
    # more threads than cores wait for each other in turns, 20 times slower than one
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def cores():
    """Processor cores that this process may use: by its affinity and its control group's quota."""
    allowed = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    for path in quotas():
        with contextlib.suppress(OSError, ValueError):
            quota, period = path.read_text().split()
            allowed = min(allowed, math.ceil(int(quota) / int(period)))     # "max": none
    return max(1, allowed)


def quotas():
    """Quota files (version 2) of this process's control group and of those around it."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/self/cgroup").read_text()
        group = root / text.split("0::/")[1].split("\n")[0]
        return [folder / "cpu.max" for folder in (group, *group.parents)]
    return [root / "cpu.max"]


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"


def data_parallel(net, group, shape, config):
    """`net` over all processes, after one idle backward pass of a batch of `shape` (B, C, T): DDP
    orders its buckets anew after its first, and the sums of three or more processes round by that
    order. So a resumed run has the whole run's order from its first step. Random states stay as
    they were."""
    rng = checkpoint.random_states()
    torch.manual_seed(config["experiment"]["seed"])
    devices = [group.device] if group.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # torch 2.11 has no newer name for it
        net = torch.nn.parallel.DistributedDataParallel(net, devices, broadcast_buffers=False)
    x = torch.randn(*shape, device=group.device)
    with evaluate.autocast(config["training"]["precision"], group.device):
        logits = net(x)
    logits.float().sum().backward()
    net.zero_grad()
    checkpoint.restore_random_states(rng)
    return net


def piece(settings, count):
    """Windows that one of `count` processes takes at once: a batch is that of all together."""
    return math.ceil(settings["batch_size"] / (settings["accumulate"] * count))


def machine_facts(group, settings):
    """What decides how sums round: another value of one of them, and a resume is not bit-exact."""
    return {"device": device_name(group.device), "processes": group.size,
            "torch": str(torch.__version__), "threads": torch.get_num_threads(),
            "precision": settings["precision"], "compile": settings["compile"]}
