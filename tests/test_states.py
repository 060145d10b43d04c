"""What a save accepts, a load returns: values, types, strides, ties, requires_grad; the rest is refused by its key."""
import io
import math
import random
import struct
import threading
import time
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch

import checkpoint

DTYPES = sorted(checkpoint._DTYPES, key=str)
FLOATS = [0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308]
TEXTS = ["", "plain", "ünïcode \U0001f9e0", "\ud800 alone", "a\0b", "PK\5\6", "x" * 300]


def bits(tensor):
    """The bytes of the elements shown, whatever the dtype."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def stretch(tensor):
    """(first byte, byte after the last one) of memory that the elements lie in."""
    if not tensor.numel():
        return 0, 0
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.itemsize


def dense(tensor):
    first, end = stretch(tensor)
    return (end - first) == tensor.numel() * tensor.itemsize


class Pairs:
    """Compares two states in one walk; `tensors` then holds the pairs, for their ties."""

    def __init__(self, mine, theirs):
        self.tensors, self.seen = [], {}
        self.walk("state", mine, theirs)
        self.ties()

    def walk(self, where, a, b):
        if isinstance(a, np.generic) or isinstance(a, np.ndarray) and a.ndim == 0:
            a = a.item()
        if isinstance(a, (list, dict, torch.Tensor, np.ndarray)):
            if id(a) in self.seen:
                assert self.seen[id(a)][1] is b, f"{where} is no longer one object with its twin"
                return
            self.seen[id(a)] = a, b
        if isinstance(a, np.ndarray):
            a = torch.as_tensor(a.copy())
        assert type(a) is type(b), f"{where}: {type(a)} became {type(b)}"
        if isinstance(a, torch.Tensor):
            self.tensor(where, a, b)
        elif isinstance(a, dict):
            assert list(map(repr, a)) == list(map(repr, b)), where
            for key, other in zip(a, b):
                self.walk(f"{where}[{key!r}]", key, other)
                self.walk(f"{where}[{key!r}]", a[key], b[other])
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b)):
                self.walk(f"{where}[{i}]", x, y)
        elif isinstance(a, (float, complex)):
            parts = [(z.real, z.imag) if isinstance(z, complex) else (z,) for z in (a, b)]
            assert [struct.pack("d", x) for x in parts[0]] == [struct.pack("d", x) for x in parts[1]], where
        else:
            assert a == b, f"{where}: {a!r} became {b!r}"

    def tensor(self, where, a, b):
        for fact in ("dtype", "shape", "requires_grad"):
            assert getattr(a, fact) == getattr(b, fact), f"{where}: {fact}"
        assert a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg(), where
        if dense(a):
            assert a.stride() == b.stride(), f"{where}: strides {a.stride()} became {b.stride()}"
        assert bits(a) == bits(b), where
        self.tensors.append((where, a, b))

    def ties(self):
        for i, (one, a, b) in enumerate(self.tensors):
            for other, c, d in self.tensors[:i]:
                (a0, a1), (c0, c1), (b0, b1), (d0, d1) = map(stretch, (a, c, b, d))
                overlapped, overlaps = a0 < c1 and c0 < a1, b0 < d1 and d0 < b1
                assert overlapped == overlaps, f"{one} and {other}: the tie is {overlapped}, then {overlaps}"
                if overlapped and (a.stride(), c.stride()) == (b.stride(), d.stride()):
                    assert a0 - c0 == b0 - d0, f"{one} and {other} are tied another way"


class States:
    """Random states whose tensors are views of a few stretches of memory."""

    def __init__(self, seed, numpy):
        self.rng, self.numpy, self.made = random.Random(seed), numpy, []
        self.memory = [self.base() for _ in range(3)]

    def base(self):
        dtype = self.rng.choice(DTYPES)
        raw = torch.randint(0, 256, (24 * 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(self.rng.randrange(99)))
        if dtype == torch.bool:
            raw = raw % 2
        return raw.view(dtype)[:24]

    def view(self):
        rng, flat = self.rng, self.rng.choice(self.memory)
        start, kind = rng.randrange(8), rng.randrange(10)
        if kind == 0:
            return flat[start:start + rng.randrange(1, 16)]
        if kind == 1:
            return flat[start:start + 16:rng.randrange(2, 5)]
        if kind == 2:
            return flat.view(4, 6).t()
        if kind == 3:
            return flat.view(2, 3, 2, 2).permute(0, 2, 3, 1)
        if kind == 4:
            return flat[start:start + 1].expand(3, 4)
        if kind == 5:
            return flat.as_strided((5, 4), (2, 1), start)
        if kind == 6:
            return flat[start:start].view(0, 3) if rng.random() < 0.5 else flat[start]
        if kind == 7:
            return flat.view(4, 6)[:, rng.randrange(3):4]
        if kind == 8 and flat.is_complex() and flat.itemsize > 4:
            return rng.choice([flat.conj(), flat.imag, flat.conj().imag, flat.real])
        return flat

    def tensor(self):
        if self.made and self.rng.random() < 0.3:
            return self.rng.choice(self.made)
        tensor = self.view()
        floating = tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        if floating and self.rng.random() < 0.3:
            tensor = torch.nn.Parameter(tensor, requires_grad=self.rng.random() < 0.5)
        elif floating and self.rng.random() < 0.3:
            tensor = tensor.detach().requires_grad_()
        self.made.append(tensor)
        return tensor

    def plain(self):
        rng = self.rng
        width = rng.choice((1, 8, 31, 32, 63, 64, 255, 2030))
        return rng.choice([None, True, False, rng.getrandbits(width), -rng.getrandbits(width), rng.choice(FLOATS),
                           complex(rng.choice(FLOATS), rng.choice(FLOATS)), rng.choice(TEXTS), rng.randbytes(rng.randrange(1, 20)),
                           rng.choice(DTYPES), torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])])

    def array(self):
        grid = np.arange(12).astype(self.rng.choice([np.int8, np.uint16, np.float32, np.float64, np.complex64, np.bool_]))
        return self.rng.choice([grid, grid[::-2], grid.reshape(3, 4).T, np.array(3.5), np.float16(0.1), np.int64(-7),
                                np.uint64(2**63), np.bool_(True), np.str_("text"), np.bytes_(b"raw"), np.zeros((0, 2))])

    def value(self, depth):
        kind = self.rng.randrange(12)
        if depth == 0 or kind < 2:
            return self.plain()
        if kind < 6:
            return self.tensor()
        if kind == 6 and self.numpy:
            return self.array()
        if kind == 7:
            return {self.rng.choice([1, "a", 2.5, (1, "b"), None]) if i else "key": self.value(depth - 1) for i in range(3)}
        if kind == 8:
            made = OrderedDict((f"k{i}", self.value(depth - 1)) for i in range(self.rng.randrange(4)))
            made._metadata = {"version": self.plain()}
            return made
        if kind == 9:
            return set(self.rng.sample([1, 2.5, "x", None, b"y", (1, 2)], 4))
        items = [self.value(depth - 1) for _ in range(self.rng.randrange(4))]
        if items and self.rng.random() < 0.3:
            items += [items[0], items]      # one object twice, and a list that holds itself
        return items if kind == 10 else tuple(items)

    def state(self):
        return {f"entry{i}": self.value(3) for i in range(6)}


@pytest.mark.parametrize("part", range(4))
def test_whatever_state_is_saved_comes_back_as_it_was_and_as_torch_save_brings_it_back(tmp_path, part):
    warnings.filterwarnings("ignore", message="ComplexHalf")
    compared = 0
    for seed in range(part * 60, part * 60 + 60):
        numpy = seed % 2 == 1
        state = States(seed, numpy).state()
        try:
            checkpoint.atomic_save(state, tmp_path / "x.pt")
            ours = checkpoint.load(tmp_path / "x.pt")
            Pairs(state, ours)
            with torch.no_grad():           # torch 2.14 alone reads no leaf among views of two dtypes
                Pairs(ours, torch.load(tmp_path / "x.pt", weights_only=True, mmap=True))
            checkpoint.verify(tmp_path / "x.pt")
            if not numpy:
                theirs = io.BytesIO()
                try:
                    torch.save(state, theirs)
                except RuntimeError as refusal:             # it cannot tie views of two dtypes; we can
                    assert "different types" in str(refusal)
                    continue
                theirs.seek(0)
                Pairs(torch.load(theirs, weights_only=True), ours)
                compared += 1
        except Exception:
            print(f"seed {seed}")
            raise
    assert compared > 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_in_every_form(tmp_path, dtype):
    warnings.filterwarnings("ignore", message="ComplexHalf")
    flat = (torch.arange(24 * dtype.itemsize) % (2 if dtype == torch.bool else 128)).to(torch.uint8).view(dtype)
    state = {"flat": flat, "turned": flat.view(4, 6).t(), "gaps": flat.clone()[::5], "one": flat.clone()[3], "none": flat[:0],
             "wide": flat.clone()[:1].expand(3, 2), "dtype": dtype}
    checkpoint.atomic_save(state, tmp_path / "x.pt")
    Pairs(state, checkpoint.load(tmp_path / "x.pt"))


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_ties_come_back_in_every_order_in_which_they_are_named(tmp_path, order):
    weight = torch.randn(6, 4)
    named = {"a": weight, "b": weight[:2], "c": weight.detach()}
    checkpoint.atomic_save({key: named[key] for key in order}, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    got["a"][0, 0] = 9.0
    assert got["b"][0, 0] == got["c"][0, 0] == 9.0
    assert (tmp_path / "x.pt").stat().st_size < 1500


def test_views_of_a_part_keep_only_what_they_show(tmp_path):
    whole = torch.randn(100_000)
    state = {"slice": whole[10:20], "gaps": torch.randn(100_000)[::1000], "far": whole[50_000:50_010], "wide": whole[7].expand(300, 300)}
    checkpoint.atomic_save(state, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    assert all(torch.equal(got[key], state[key]) for key in state)
    assert (tmp_path / "x.pt").stat().st_size < 4000


def training(kind, seed=0):
    """A model with a weight that is not contiguous and a channels_last convolution, and its fused optimizer."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 6))
    net = net.to(memory_format=torch.channels_last)
    net.turned = torch.nn.Parameter(torch.randn(6, 4).t())
    if kind == "adamw":
        return net, torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    return net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)


def steps(net, optimizer, count):
    for step in range(count):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        loss = (net(x) @ net.turned.t()).square().mean() + net.turned.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weights_that_are_not_contiguous_train_on_bit_for_bit_after_save_and_load(tmp_path, kind):
    net, optimizer = training(kind)
    steps(net, optimizer, 4)
    checkpoint.atomic_save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    again, other = training(kind, seed=1)
    again.load_state_dict(got["model"])
    other.load_state_dict(got["optimizer"])
    steps(net, optimizer, 3)
    steps(again, other, 3)
    for mine, theirs in zip(net.parameters(), again.parameters()):
        assert torch.equal(mine, theirs) and mine.isfinite().all()


def test_a_model_whose_very_tensors_are_stored_goes_on_training_as_they_are(tmp_path):
    net = torch.nn.Linear(3, 2)
    checkpoint.atomic_save({"parameters": list(net.parameters()), "live": net.state_dict(keep_vars=True)}, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    assert got["live"]["weight"] is got["parameters"][0] and type(got["live"]["bias"]) is torch.nn.Parameter
    (got["live"]["weight"].sum() * 2).backward()
    assert torch.equal(got["parameters"][0].grad, torch.full((2, 3), 2.0))


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def full_tensor(self):
        raise AssertionError("a save may not talk to other processes by itself")

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise NotImplementedError(str(function))


def freed():
    tensor = torch.randn(10)
    tensor.untyped_storage().resize_(0)
    return tensor


def short():
    tensor = torch.randn(10)
    tensor.untyped_storage().resize_(20)
    return tensor


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # the layout is a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # torch will drop it
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def compressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # the layout is a prototype
        return torch.eye(3).to_sparse_csr()


def deep():
    value = []
    for _ in range(5000):
        value = [value]
    return value


def held_by_itself():
    value = ([], 1)
    value[0].append(value)
    return value


def in_vmap():
    kept = []
    torch.vmap(lambda row: kept.append(row) or row)(torch.ones(2, 3))
    return kept[0]


class Whole(int):
    """A number of another class."""


Pair = namedtuple("Pair", "a b")
REFUSED = {"huge int": 1 << 2048, "negative huge int": -(1 << 3000), "ints, one huge": [1, 2, 1 << 5000], "set": {1 << 2048}, "no bytes": b"", "some empty": [b"a", b""],
           "key": {1 << 2048: 0}, "tuple key": {(1, 1 << 2048): 0}, "wrapper": Wrapped(torch.randn(3)),
           "subclass": torch.randn(3).as_subclass(type("Mine", (torch.Tensor,), {})), "freed": freed(),
           "int4": torch.int4, "sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta"),
           "nested": nested(), "long double": np.longdouble(1.5),
           "date": np.datetime64("2020-01-01"), "time": np.datetime64(7, "ns"), "objects": np.array([None, "x"]), "ufunc": np.add, "namedtuple": Pair(1, 2),
           "defaultdict": defaultdict(list), "frozenset": frozenset({1}), "range": range(3), "lambda": lambda: 0, "class": dict,
           "lazy": torch.nn.UninitializedParameter(), "ellipsis": ..., "memory format": torch.channels_last, "int class": Whole(3), "tuple in itself": held_by_itself(), "vmap": in_vmap(),
           "uint4 tensor": torch.empty(3, dtype=torch.uint4), "csr": compressed(), "storage of less": short(), "empty bytes as key": {b"": 1},
           "quantized": quantized(), "generator": torch.Generator(), "module": torch.nn.Linear(1, 1)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_load_would_refuse_is_refused_by_its_key_before_anything_is_written(tmp_path, name):
    with pytest.raises(TypeError) as refusal:
        checkpoint.atomic_save({"a": [0, {"b": REFUSED[name]}]}, tmp_path / "x.pt")
    assert "['a'][1]['b']" in str(refusal.value) and not list(tmp_path.iterdir())


def test_nesting_without_end_is_refused_and_a_thousand_lists_that_hold_themselves_are_not(tmp_path):
    with pytest.raises(TypeError, match="nested too deep"):
        checkpoint.atomic_save({"a": deep()}, tmp_path / "x.pt")
    with pytest.raises(TypeError, match="must be a dict"):
        checkpoint.atomic_save([1], tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())
    circle = []
    circle += [circle] * 1000
    checkpoint.atomic_save({"circle": circle}, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")["circle"]
    assert len(got) == 1000 and all(item is got for item in got)


def test_a_sharded_tensor_is_told_to_gather_itself(tmp_path):
    with pytest.raises(TypeError, match=r"\['w'\].*full_tensor\(\), called in every process at once"):
        checkpoint.atomic_save({"w": REFUSED["wrapper"], "v": Wrapped(torch.randn(3))}, tmp_path / "x.pt")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_of_torch_changes_neither_save_nor_load(tmp_path, device):
    state = {"w": torch.randn(3, 4), "array": np.arange(3.0), "none": torch.zeros(0)}
    torch.set_default_device(device)
    try:
        checkpoint.atomic_save(state, tmp_path / "x.pt")
        got = checkpoint.load(tmp_path / "x.pt")
        checkpoint.verify(tmp_path / "x.pt")
    finally:
        torch.set_default_device(None)
    Pairs(state, got)


def test_a_save_in_inference_mode_does_not_break_the_next_one_outside_of_it(tmp_path):
    weight = torch.nn.Parameter(torch.randn(5))
    image = checkpoint._Image()
    for value in (1.0, 2.0, 3.0):
        with torch.inference_mode(value != 2.0):
            state = {"w": weight, "mean": torch.full((4,), value), "scaled": weight * 0}
            checkpoint.atomic_write(tmp_path / "x.pt", image.fill(state).file())
        assert checkpoint.load(tmp_path / "x.pt")["mean"].tolist() == [value] * 4


def test_a_state_goes_by_what_it_held_at_the_call_though_another_thread_saves_too(tmp_path):
    def writer(name):
        for step in range(20):
            checkpoint.atomic_save({"w": torch.full((1000,), float(step)), "step": step}, tmp_path / name)
    threads = [threading.Thread(target=writer, args=(f"{name}.pt",)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in tmp_path.glob("*.pt"):
        assert checkpoint.load(path)["w"].unique().tolist() == [19.0]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_twenty_thousand_storages_of_a_gpu_are_placed_as_fast_as_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(checkpoint._Image, "_stage", lambda image, layout, numbers: [])
    monkeypatch.setattr(checkpoint._Image, "_room", lambda image, size: torch.empty(size, dtype=torch.uint8))

    def seconds(device):
        image = checkpoint._Image()
        began = time.process_time()
        image._place([(8, torch.float32, torch.device(device))] * 20_000)
        assert image.order == list(range(20_000))
        return time.process_time() - began

    # a walk over all of them for each would take 28 times as long
    taken = {device: min(seconds(device) for _ in range(3)) for device in ("cpu", "cuda")}
    assert taken["cuda"] < 10 * taken["cpu"], taken


def test_a_list_of_millions_of_numbers_is_pickled_once_and_read_by_nobody(monkeypatch):
    made = []

    class Counting(checkpoint._Pickler):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)
    monkeypatch.setattr(checkpoint, "_Pickler", Counting)
    monkeypatch.setattr(checkpoint, "_Reader", None)
    numbers = list(range(2_000_000))
    image = checkpoint._Image().fill({"numbers": numbers, "mixed": [1, 2.0], "weight": torch.ones(3), "betas": [(0.9, 0.99)] * 2})
    assert len(made) == 1 and len(image.pickled) > 2_000_000


# ---- all that torch.load(weights_only=True) reads ----

def trained(optimizer, steps=3, **settings):
    """An optimizer of this class after some steps, so that its state is full."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    made = optimizer([weight], lr=0.01, **settings)
    for _ in range(steps):
        def closure():
            made.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            if optimizer is torch.optim.SparseAdam:
                weight.grad = weight.grad.to_sparse()
            return loss
        made.step(closure)
    return made


OPTIMIZERS = sorted((kind for kind in vars(torch.optim).values()
                     if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer),
                    key=lambda kind: kind.__name__)
scheduler = torch.optim.lr_scheduler
SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9 ** epoch}, "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9}, "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 2, 2, 5]}, "ConstantLR": {}, "LinearLR": {}, "ExponentialLR": {"gamma": 0.9}, "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 9}, "CosineAnnealingWarmRestarts": {"T_0": 2}, "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20}, "ReduceLROnPlateau": {}, "ChainedScheduler": {}, "SequentialLR": {}}


def as_torch_reads_it(state):
    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def test_the_state_of_every_optimizer_of_torch_is_saved_and_loads_as_it_was(tmp_path):
    assert len(OPTIMIZERS) > 12
    for kind in OPTIMIZERS:
        for settings in ({}, {"amsgrad": True}, {"momentum": 0.9}, {"fused": True}):
            try:
                optimizer = trained(kind, **settings)
            except (TypeError, RuntimeError, ValueError):
                assert settings                         # a setting that this one does not know
                continue
            state = {"optimizer": optimizer.state_dict(), "epoch": 1}
            checkpoint.atomic_save(state, tmp_path / "x.pt")
            got = checkpoint.load(tmp_path / "x.pt")
            Pairs(state, got)
            Pairs(as_torch_reads_it(state), got)
            trained(kind, 1, **settings).load_state_dict(got["optimizer"])


def test_the_state_of_every_scheduler_of_torch_is_saved_and_loads_as_it_was(tmp_path):
    classes = {name for name, kind in vars(scheduler).items() if isinstance(kind, type) and not name.startswith("_")
               and issubclass(kind, scheduler.LRScheduler) and kind is not scheduler.LRScheduler}
    assert classes == set(SCHEDULERS)
    for name, settings in SCHEDULERS.items():
        optimizer = trained(torch.optim.SGD, momentum=0.9)
        if name in ("ChainedScheduler", "SequentialLR"):
            parts = [scheduler.LinearLR(optimizer), scheduler.MultiStepLR(optimizer, [3, 3])]
            made = scheduler.ChainedScheduler(parts) if name == "ChainedScheduler" else scheduler.SequentialLR(optimizer, parts, [2])
        else:
            made = getattr(scheduler, name)(optimizer, **settings)
        for _ in range(4):
            optimizer.step()
            made.step(*([0.5] if name == "ReduceLROnPlateau" else []))
        state = {"scheduler": made.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()}
        checkpoint.atomic_save(state, tmp_path / "x.pt")
        Pairs(state, checkpoint.load(tmp_path / "x.pt"))
        Pairs(as_torch_reads_it(state), checkpoint.load(tmp_path / "x.pt"))
        made.load_state_dict(checkpoint.load(tmp_path / "x.pt")["scheduler"])


def noted(**attributes):
    made = OrderedDict(a=torch.ones(2))
    vars(made).update(attributes)
    return made


READ = {"counter": Counter([3, 3, 5]), "counter in a list": [Counter("abca")], "ordered": noted(_metadata=OrderedDict(a={"version": 2})), "set": {1, "x"},
        "bytearray": bytearray(b"raw"), "empty bytearray": bytearray(), "dtype": torch.bfloat16, "float8": torch.float8_e5m2, "quantized dtype": torch.qint8,
        "layout": torch.strided, "scheme": torch.per_tensor_affine, "device": torch.device("cuda:3"), "size": torch.Size([2, 0]), "complex": 2 - 3j,
        "class": OrderedDict, "tensor class": torch.Tensor, "long": 1 << 2038, "negative": -(1 << 2038), "bytes": bytes(range(256)), "tuple twice": [((1, [2]),)] * 2,
        "keys": {(1, "a"): 1, 2.5: 2, None: 3, True: 4, b"k": 5, torch.float32: 6}}


@pytest.mark.parametrize("name", READ)
def test_what_weights_only_reads_is_accepted(tmp_path, name):
    state = {"a": [READ[name], {"b": READ[name]}]}
    checkpoint.atomic_save(state, tmp_path / "x.pt")
    got, theirs = checkpoint.load(tmp_path / "x.pt")["a"], as_torch_reads_it(state)["a"]
    for mine in (got[0], got[1]["b"]):
        assert type(mine) is type(theirs[0]) and repr(mine) == repr(theirs[0]) and getattr(mine, "__dict__", None) == getattr(theirs[0], "__dict__", None)
    assert got[0] is got[1]["b"] or not isinstance(READ[name], (list, dict))


class Allowed:
    def __init__(self, value):
        self.value = value


def test_a_class_that_the_user_allows_torch_to_load_is_accepted_and_refused_otherwise(tmp_path):
    state = {"mine": Allowed([1, torch.ones(2)])}
    with pytest.raises(TypeError, match=r"\['mine'\].*Allowed"):
        checkpoint.atomic_save(state, tmp_path / "x.pt")
    with torch.serialization.safe_globals([Allowed]):
        checkpoint.atomic_save(state, tmp_path / "x.pt")
        assert checkpoint.load(tmp_path / "x.pt")["mine"].value[0] == 1
    with pytest.raises(checkpoint.CorruptCheckpoint, match="refuses it"):
        checkpoint.load(tmp_path / "x.pt")


def test_attributes_and_hooks_of_tensors_are_left_out_and_refuse_nothing(tmp_path):
    tensor, parameter = torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(3))
    tensor.note = parameter.note = lambda: 0
    tensor.register_hook(lambda grad: grad)
    checkpoint.atomic_save({"t": tensor, "p": parameter}, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    assert got["t"].requires_grad and type(got["p"]) is torch.nn.Parameter and not hasattr(got["p"], "note")


def test_numpy_and_slices_and_ties_in_one_state_come_back_together(tmp_path):
    whole, array = torch.arange(10_000.0), np.arange(4)
    shared = [whole[5:10], np.float32(0.5)]
    state = {"a": shared, "b": shared, "c": whole[7:12], "d": whole[9_000:9_010:3], "arrays": [array, array], np.int64(3): np.int64(4),
             "p": torch.nn.Parameter(whole[2:9])}
    checkpoint.atomic_save(state, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    assert got["a"] is got["b"] and got["arrays"][0] is got["arrays"][1] and type(got["a"][1]) is float and got[3] == 4
    got["a"][0][2] = -1.0
    assert got["c"][0] == got["p"][5] == -1.0 and got["d"].tolist() == [9000.0, 9003.0, 9006.0, 9009.0]
    assert (tmp_path / "x.pt").stat().st_size < 4000 and state["a"][1].dtype == np.float32
