"""Checkpoints that survive: durable saves, damage found before it is believed, exact resumes.

    python checkpoint.py verify FILE_OR_DIR     exit 1 and the file's name on any damage
    python checkpoint.py --help                 ls, clean, strip, average: beside Holdfast's run/

Copy this one file (it needs torch and nothing else of ours) and train like this;
kill it whenever you like:

    import sys
    import torch
    import checkpoint

    torch.manual_seed(0)
    data = torch.randn(20, 8, 4)                    # 20 batches
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    step = 0

    def pack():
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "random": checkpoint.random_states(),
                "epoch": epoch, "batch": batch, "global_step": step}

    with checkpoint.Checkpointer("checkpoints", mid_epoch_minutes=0.001) as saver, saver.signals():
        state = saver.resume()
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            checkpoint.restore_random_states(state["random"])
            step = state["global_step"]
        epoch, batch = saver.position               # (1, 0) at the start: epochs count from 1
        while epoch <= 5:
            while batch < len(data):
                loss = model(data[batch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                batch += 1
                step += 1
                if saver.due() or saver.stopping():     # the time has come; or Ctrl-C, SIGTERM ...
                    saver.save_mid(pack())
                    if saver.stopping():
                        sys.exit(saver.stopping())      # once the save is durable
            model.eval()
            with torch.no_grad():
                score = -model(data).square().mean().item()
            model.train()
            saver.save_epoch(pack(), metric=score)
            epoch += 1
            batch = 0
        saver.settle()                              # the last save is durable, or this raises

A checkpoint is a plain .pt (a stored zip): `torch.load(path, weights_only=True)` and `unzip -t`
open it. Every byte is covered: tensors by their zip CRC-32, all the rest by a SHA-256 in the zip
comment, next to the progress as JSON, so that a choice among files reads a few hundred bytes of
each.
"""
import argparse
import codecs
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import mmap
import multiprocessing.util
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import uuid
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy
from numbers import Integral, Real
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # torch loads for seconds, and a Ctrl-C meanwhile deserves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

import torch

TEMP = re.compile(r"\..+\.(\d+)(?:@([\w-]+))?\.\w+\.tmp")     # .NAME.PID@HOST.RANDOM.tmp
ABANDONED = 3600.0              # seconds after which an unchanged temp counts as a dead process's
PROGRESS = ("epoch", "batch", "global_step", "save_counter")
MAX_STARTS = 100                # earlier starts of its run that a checkpoint names
# alignment of O_DIRECT writes, and bytes of one: pieces of 4 MB took 1.2 times as long
PAGE, CHUNK = 4096, 32 << 20
# zip comment: MAGIC, SHA-256 of all bytes that are not tensor data, CRC-32 of the JSON, JSON
MAGIC = b"holdfast1 "
PICKLE = re.compile(rb"\x80[\2-\5]")       # head of a pickle, as torch.save wrote until 1.5: no zip
# what an OSError says of the path itself: a resume passes such a file, as it does a damaged one
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM,
           errno.ENXIO, errno.EROFS, errno.ENAMETOOLONG, errno.EEXIST}
_own_temps: set[str] = set()    # names of the temp files that this process writes


class CorruptCheckpoint(Exception):
    """The file is damaged, or is no checkpoint that can be loaded without running code. The message
    names file and damage."""

    foreign = False         # True: nothing is damaged, another program wrote what no resume can use


class NotFinite(ArithmeticError):
    """Weights became infinite or NaN: they are not written over good files."""


class InUse(OSError):
    """Another live process holds this directory: `pid` on `host`, both None where not known."""

    def __init__(self, directory: str | os.PathLike, holder: tuple[int, str] | None) -> None:
        self.pid = holder[0] if holder else None
        self.host = holder[1] if holder else None
        owner = f"process {self.pid} on {self.host}" if holder else "another process"
        advice = "stop it first"
        if (self.pid, self.host) == (os.getpid(), socket.gethostname()):
            owner, advice = "this process", "close the earlier Checkpointer first"
        elif getattr(multiprocessing.current_process(), "_inheriting", False):
            advice = 'a worker runs the script too: train below `if __name__ == "__main__":`'
        super().__init__(errno.EBUSY, f"{directory} is in use by {owner}: {advice}")


class SaveFailed(OSError):
    """The newest save could not be made durable, for as long as the patience lasts."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()       # weights have no errno to show


class Moved(SaveFailed):
    """The path of a run leads to another directory now: saves there would harm another run."""


class IncompleteState(TypeError, KeyError):
    """The state lacks its place in the training: no resume could go on from it."""

    __str__ = TypeError.__str__             # a KeyError shows its message in quotes


# ---- the file: a stored zip laid out by hand; a snapshot is one memcpy, no byte unaccounted ----

# dtype: the class that torch.save names its storages by; those of other dtypes are plain bytes
_STORAGES = {dtype: getattr(torch, name)
             for dtype, name in torch.storage._dtype_to_storage_type_map().items()
             if not name.startswith("Q")}
_DTYPES = {*_STORAGES, *torch.storage._new_dtypes()}
# what weights_only is known to read: a state that names anything else is read on trial
_READABLE = {id(known) for known in (
    OrderedDict, Counter, set, complex, bytearray, codecs.encode, torch.Size, torch.device,
    torch._utils._rebuild_parameter, torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_tensor_v3, *_STORAGES.values(), *_DTYPES)}


class _View(NamedTuple):
    """Where in its storage a tensor lies: from the first byte shown to the end of the last."""
    memory: int             # the storage's identity
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple
    strides: tuple

    @classmethod
    def of(cls, tensor):
        shape, strides, size = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
        count = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides))
        begin = tensor.storage_offset() * size
        memory = tensor.untyped_storage()._cdata
        return cls(memory, begin, begin + count * size, tensor.dtype, shape, strides)


class _Storage:
    """A stretch of memory that becomes one storage of the file."""

    def __init__(self, memory, begin, end):
        self.memory, self.begin, self.nbytes = memory, begin, end - begin
        self.number = None                  # in the order in which the pickle names them
        self.dtype = torch.uint8

    def name(self):
        """torch.save's name of it: what a load makes, of which bytes, of how many elements."""
        size = self.nbytes // self.dtype.itemsize
        return "storage", _STORAGES[self.dtype], str(self.number), "cpu", size

    def values(self):
        """Its memory as a flat tensor."""
        size = self.dtype.itemsize
        flat = torch.empty(0, dtype=self.dtype, device=self.memory.device)
        return flat.set_(self.memory, self.begin // size, (self.nbytes // size,), (1,))


class _Pickler(pickle.Pickler):
    """Pickles as torch.save does. Tensors lose hooks and attributes that were set on them.

    views      {_View: (storage, first element, strides)}: where the file holds it
    storages   in the order in which the pickle names them
    numpy      {id of a NumPy value: what is saved instead of it}

    Raises an error for most of what a load would refuse; the rest is marked as doubtful."""

    def __init__(self, state, views=()):
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=2)
        self.views = dict(views)
        self.memories = {}                  # identity: the whole storage
        self.storages = []
        self.numpy = {}
        self.tuples = set()
        self.doubtful = False
        self.dump(state)

    def persistent_id(self, value):
        kind = type(value)
        if kind is int and value.bit_length() > 2039:
            raise TypeError("an int of more than 2039 bits")
        if kind is tuple:                   # weights_only does not read one that holds itself
            again = id(value) in self.tuples
            self.doubtful |= again and any(isinstance(part, (list, dict)) for part in value)
            self.tuples.add(id(value))
        return value.name() if kind is _Storage else None

    def reducer_override(self, value):
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._reduced(kind, value)
        if kind.__module__ == "numpy" and hasattr(value, "ndim"):
            self.numpy[id(value)] = _without_numpy(value)
            return set, ()                  # it is pickled again, without NumPy
        if kind is torch.dtype and re.fullmatch(r"torch\.u?int[1-7]", str(value)):
            raise TypeError("a dtype smaller than a byte, of which no tensor can be loaded")
        self.doubtful |= id(kind) not in _READABLE and id(value) not in _READABLE
        return NotImplemented

    def _reduced(self, kind, tensor):
        if kind is torch.nn.Parameter:
            facts = tensor.data, tensor.requires_grad, OrderedDict()
            return torch._utils._rebuild_parameter, facts
        _refuse_tensor(kind, tensor)
        storage, first, strides = self._place(tensor)
        if storage.number is None:
            storage.number = len(self.storages)
            self.storages.append(storage)
            size = tensor.dtype.itemsize
            if tensor.dtype in _STORAGES and not (storage.begin % size or storage.nbytes % size):
                storage.dtype = tensor.dtype
        facts = storage, first, tuple(tensor.shape), strides, tensor.requires_grad, OrderedDict()
        bits = torch._utils.get_tensor_metadata(tensor)         # whether conjugated, negated
        bits = (bits,) if bits else ()
        if storage.dtype == tensor.dtype:
            return torch._utils._rebuild_tensor_v2, facts + bits
        return torch._utils._rebuild_tensor_v3, facts + (tensor.dtype,) + bits

    def _place(self, tensor):
        view, memory = _View.of(tensor), tensor.untyped_storage()
        if view not in self.views:
            whole = self.memories.setdefault(view.memory, _Storage(memory, 0, memory.nbytes()))
            if view.end > max(view.begin, whole.nbytes):
                raise TypeError("a tensor whose storage was freed")
            self.views[view] = whole, tensor.storage_offset(), view.strides
        return self.views[view]


def _refuse_tensor(kind, tensor):
    if kind is not torch.Tensor:
        advice = ".as_subclass(torch.Tensor)"
        if hasattr(tensor, "full_tensor"):
            # its parts lie in several processes: only the caller knows when all are here
            advice = ".full_tensor(), called in every process at once"
        raise TypeError(f"a tensor of another class: store {advice}")
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not plain or tensor.is_meta or tensor.dtype not in _DTYPES:
        raise TypeError(f"only dense tensors can be saved, not {tensor.layout} of {tensor.dtype} "
                        f"on {tensor.device}")


def _without_numpy(value):
    """A tensor for a NumPy array, Python's number for a NumPy number."""
    if value.ndim:
        # a copy of its own: negative strides and read-only memory are nothing for torch
        return torch.as_tensor(value.copy(), device="cpu")
    number = value.item()
    if type(number).__module__ != "builtins" or value.dtype.kind in "mM":   # times become ints
        raise TypeError(f"a NumPy {value.dtype}, which no Python number holds")
    return number


def _narrowed(memories, views):
    """The `views` whose storages hold more than tensors show, each with the storage to keep.

    Tensors that overlap or touch stay together; one that lies alone loses its gaps."""
    groups, narrow, end = [], {}, 0
    for view in sorted(views, key=itemgetter(0, 1)):
        if not groups or groups[-1][0].memory != view.memory or view.begin > end:
            groups.append([])
            end = view.end
        groups[-1].append(view)
        end = max(end, view.end)
    for group in groups:
        first, memory = group[0], memories[group[0].memory].memory
        begin, end = first.begin, max(view.end for view in group)
        begin -= begin % max(view.dtype.itemsize for view in group)         # elements are counted
        if len(group) == 1 and end - begin > math.prod(first.shape) * first.dtype.itemsize:
            narrow[first] = _closed_up(first, memory)
        elif (begin, end) != (0, memory.nbytes()):
            kept = _Storage(memory, begin, end)
            for view in group:
                narrow[view] = kept, (view.begin - begin) // view.dtype.itemsize, view.strides
    return narrow


def _closed_up(view, memory):
    """A contiguous copy of what `view` shows."""
    shown = torch.empty(0, dtype=view.dtype, device=memory.device)
    shown.set_(memory, view.begin // view.dtype.itemsize, view.shape, view.strides)
    shown = shown.clone(memory_format=torch.contiguous_format)
    memory = shown.untyped_storage()
    return _Storage(memory, 0, memory.nbytes()), 0, shown.stride()


class _Reader(torch._weights_only_unpickler.Unpickler):
    """torch's reader of a pickle, on storages without memory: it refuses what a load would."""

    def persistent_load(self, name):
        _, kind, _, _, size = name
        memory = torch.UntypedStorage(size * kind.dtype.itemsize, device="meta")
        return torch.storage.TypedStorage(wrap_storage=memory, dtype=kind.dtype, _internal=True)


def _pickled(state):
    """(the pickler that has pickled `state`, the state without NumPy), or an error for what a load
    would refuse."""
    pickler = _Pickler(state)
    if pickler.numpy:
        kept = {at: value for at, (_, value) in pickler.memo.copy().items()
                if isinstance(value, torch.Tensor)}
        state = deepcopy(state, kept | pickler.numpy)
        pickler = _Pickler(state)
    narrow = _narrowed(pickler.memories, pickler.views)
    if narrow:
        pickler = _Pickler(state, narrow)
    if pickler.doubtful:
        _Reader(io.BytesIO(pickler.file.getvalue()), encoding="utf-8").load()
    return pickler, state


def _frozen(state):
    """As _pickled, or a TypeError that names the key of what a load would refuse."""
    if type(state) not in (dict, OrderedDict):
        raise TypeError(f"a state must be a dict, not {type(state).__qualname__}")
    try:
        return _pickled(state)
    except RecursionError:
        raise TypeError("the state is nested too deep") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise TypeError("state" + _blamed(state, error, ())) from None


def _parts(value):
    """(key, part) of each part of a container."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple, set)) else ()


def _tensors(value):
    """(name, tensor) of all that is in `value`, however nested, each container once."""
    left, seen = [("", value)], set()
    while left:
        name, value = left.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            left += [(f"{name}.{key}".lstrip("."), part) for key, part in _parts(value)]


def _blamed(value, error, inside):
    """The path to the smallest part of `value` that cannot be saved by itself, and why."""
    for key, part in _parts(value):
        try:
            if id(part) not in inside:
                _pickled(part)
        except Exception as deeper:
            return f"[{key!r}]{_blamed(part, deeper, (*inside, id(value)))}"
    reason = str(error).split("\n")[0].split(". ")[0]
    return (f" is a {type(value).__module__}.{type(value).__qualname__} that no load would return "
            f"({reason}): store plain numbers, strings, lists, dicts or tensors")


def _entry(name, size, offset):
    """A stored zip entry; its header at `offset` is padded: data begin at a multiple of 64."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = entry.compress_size = size
    entry.CRC = 0                           # not known yet
    entry.header_offset = offset
    pad = -(offset + len(entry.FileHeader()) + 4) % 64
    entry.extra = struct.pack("<HH", 0x4246, pad) + b"Z" * pad              # 'FB', torch's own tag
    return entry


class _After(io.BytesIO):
    """What follows the first `offset` bytes of a file, at the file's own places."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def tell(self):
        return self.offset + super().tell()

    def seek(self, at, whence=os.SEEK_SET):
        return self.offset + super().seek(at - self.offset, whence)


class _Image:
    """One checkpoint file in memory, tensors already at their final offsets in a kept buffer.

    `fill` is the only thing training waits for. CUDA tensors are cloned on the GPU in stream order
    (the next optimizer step may change them at once); the clone goes to pinned memory from a side
    stream. The buffer begins at a page, as direct writes need it."""

    def __init__(self, say=print, finite=""):
        self.say = say
        self.finite = finite                # the state's dict of weights that must be finite
        self.say_once = functools.cache(lambda line: say(f"checkpoints: {line}"))
        self.buffer = None
        self.staging = None
        self.layout = None                  # [(bytes, dtype, device)] of the storages
        self.copied = None                  # the event that ends the copy from the GPU
        self.sound = set()                  # names of weights that were finite once
        self.masks = set()                  # names of tensors that held infinities from the start

    def fill(self, state):
        """Copy the state's values of this moment. TypeError for what could not be loaded again."""
        # a save that failed before it waited for its copy must not have the next one overtake it
        self._await_copy()
        # what is allocated here is used outside of the caller's inference_mode too
        with torch.inference_mode(False), torch.no_grad():
            pickler, state = _frozen(state)
            self.pickled, self.facts = pickler.file.getvalue(), _facts(state)
            self.weights = {}               # storage number: [(name, view, place, is Parameter)]
            for name, value in _tensors(state.get(self.finite) if self.finite else None):
                view = _View.of(value)
                storage, *place = pickler.views[view]
                weight = name, view, place, type(value) is torch.nn.Parameter
                self.weights.setdefault(storage.number, []).append(weight)
            layout = [(s.nbytes, s.dtype, s.memory.device) for s in pickler.storages]
            if layout != self.layout:
                self._place(layout)
            values = [pickler.storages[number].values() for number in self.order]
            on_gpu, on_cpu = values[:len(self.clones)], values[len(self.clones):]
            if on_gpu:
                self._fill_from_gpu(on_gpu)
            if on_cpu:
                torch._foreach_copy_(self.views, on_cpu)
        return self

    def _place(self, layout):
        """Offsets for every storage, CUDA ones first: they arrive as one block."""
        self.layout = None                  # until all of it is there: memory may run out below
        gpu = [number for number, (*_, device) in enumerate(layout) if device.type == "cuda"]
        self.order = sorted(range(len(layout)), key=lambda number: layout[number][2].type != "cuda")
        self.at, end, self.gpu_end = {}, 0, 0
        for place, number in enumerate(self.order):
            entry = _entry(f"data/{number}", layout[number][0], end)
            begin = end + len(entry.FileHeader())
            end = begin + entry.file_size
            self.at[number] = entry, begin, end
            if place < len(gpu):
                self.gpu_end = end
        self.end = end
        # free before taking more
        self.views = self.clones = self.staging = None
        if self.buffer is None or self.buffer.numel() < end:
            self.buffer = None
            room = self._room(end + end // 16 + PAGE)
            self.buffer = room[-room.data_ptr() % PAGE:]
        self.views = self._views(self.buffer, layout, self.order[len(gpu):])
        self.clones = self._stage(layout, gpu) if gpu else []
        self.layout = layout

    def _room(self, size):
        """Memory on the CPU, page-locked where a GPU is to write into it."""
        if self.gpu_end:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:   # WSL2 and small limits of locked memory
                self.say_once(f"no page-locked memory ({str(error).splitlines()[0]}): "
                              f"copies from the GPU take longer")
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def _stage(self, layout, gpu):
        """Room on the GPU for the clone; without it training waits for the copy to the CPU."""
        device = layout[gpu[0]][2]
        self.side = torch.cuda.Stream(device)
        free, _ = torch.cuda.mem_get_info(device)
        try:
            # not out of what training has just freed, and takes again at its next step
            if free < self.gpu_end:
                raise torch.OutOfMemoryError
            self.staging = torch.empty(self.gpu_end, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            self.say_once(f"no {self.gpu_end / 1e6:.0f} MB free on the GPU for a clone of the "
                          f"state: training waits for its copy to the CPU instead")
        return self._views(self.buffer if self.staging is None else self.staging, layout, gpu)

    def _views(self, buffer, layout, numbers):
        """The places of storages in `buffer`."""
        return [buffer[slice(*self.at[n][1:])].view(layout[n][1]) for n in numbers]

    def _fill_from_gpu(self, values):
        with torch.cuda.device(self.side.device):
            torch._foreach_copy_(self.clones, values)
            if self.staging is None:
                torch.cuda.current_stream().synchronize()
                return
            # the clone is complete before the side stream reads it, and has been read before the
            # next one is made: `fill` waits for `copied`
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.buffer[:self.gpu_end].copy_(self.staging[:self.gpu_end], non_blocking=True)
                self.copied = torch.cuda.Event()
                self.copied.record()

    def _await_copy(self):
        if self.copied is not None:
            # a thread begins on the first GPU: from there the wait alone would take memory of it
            with torch.cuda.device(self.side.device):
                self.copied.synchronize()
            self.copied = None

    def refuse_nonfinite(self, number):
        """Raise NotFinite where a weight in the storage `number` holds a NaN or an infinity.

        A tensor that held infinities, and no NaN, when it was first seen is a mask, not a
        weight."""
        self._await_copy()
        _, begin, end = self.at[number]
        for name, view, (first, strides), parameter in self.weights.get(number, ()):
            if name in self.masks or 0 in view.shape:
                continue
            values = self.buffer[begin + first * view.dtype.itemsize:end]
            values = values[:len(values) // view.dtype.itemsize * view.dtype.itemsize]
            values = values.view(view.dtype).as_strided(view.shape, strides)
            if _finite(values):
                self.sound.add(name)
            elif name in self.sound or parameter or _widened(values).isnan().any():
                raise NotFinite(f"weights are not finite ({name}): not written over good files")
            else:
                self.masks.add(name)
                self.say(f"checkpoints: {name} holds infinities from the start: taken for a mask")

    def file(self):
        """Yield the file from front to back as buffers, all but the last two whole pages.

        Runs in the writer. Headers and checksums come around the tensors here. Raises
        NotFinite."""
        self._await_copy()
        whole, entries, digest, done = self._memory(), [], hashlib.sha256(), 0
        for number in self.order:
            self.refuse_nonfinite(number)
            entry, begin, end = self.at[number]
            entry.CRC = zlib.crc32(whole[begin:end])
            entries.append(entry)
            whole[entry.header_offset:begin] = entry.FileHeader()
            digest.update(whole[entry.header_offset:begin])
            ready = end // PAGE * PAGE
            # small pieces at first: the disk begins at once
            if ready - done >= min(CHUNK, max(CHUNK // 8, done)):
                yield whole[done:ready]
                done = ready
        yield whole[done:self.end // PAGE * PAGE]
        yield whole[self.end // PAGE * PAGE:]
        yield self._tail(entries, digest)

    def _memory(self):
        memory = (ctypes.c_char * self.end).from_address(self.buffer.data_ptr())
        memory.owner = self.buffer          # the view must outlive this image
        return memoryview(memory).cast("B")

    def _tail(self, entries, digest):
        """What follows the tensors: the pickle, the zip directory and our comment."""
        tail = _After(self.end)
        with zipfile.ZipFile(tail, "w") as archive:
            archive.filelist += map(copy, entries)
            for name, values in (("data.pkl", self.pickled), ("byteorder", sys.byteorder),
                                 ("version", "3\n")):
                archive.writestr(zipfile.ZipInfo(f"archive/{name}"), values)
            for entry in archive.filelist:  # no permissions, and padding in the headers alone
                entry.external_attr, entry.extra = 0, b""
        note = json.dumps(self.facts).encode()
        # the zip end record closes with the length of the comment
        tail = tail.getvalue()[:-2] + struct.pack("<H", len(MAGIC) + 64 + 10 + len(note))
        digest.update(tail + note)
        return tail + MAGIC + digest.hexdigest().encode() + b" %08x " % zlib.crc32(note) + note


def _finite(values):
    numbers = values.is_floating_point() or values.is_complex()
    if not numbers or values.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        return True                         # four bits hold no infinity
    values = _widened(values)
    # a sum carries every infinity and NaN along, and finite values may add up to one
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(total.isfinite()) or bool(values.isfinite().all())


def _widened(values):
    """Numbers of one byte as numbers that can be judged."""
    return values.float() if values.itemsize == 1 else values


def _facts(state):
    """What a choice among files asks of a state: the zip comment holds it, where it is sound.

    Progress that is no int is None, so that no resume takes it for 0."""
    facts = {key: state[key] if type(state[key]) is int else None
             for key in PROGRESS if key in state}
    ours = state.get("holdfast")
    if not isinstance(ours, dict):
        ours = state                        # a note, or a file that another writer made
    facts |= {key: ours[key] for key in ("kind", "run", "start") if _is_name(ours.get(key))}
    starts, metric = ours.get("starts"), ours.get("metric")
    if type(starts) is list and all(map(_is_start, starts)):
        facts["starts"] = starts
    if type(metric) is dict and _is_name(metric.get("name")):
        value = metric.get("value")
        if type(value) is float or type(value) is int and abs(value) < 2**53:
            facts["metric"] = {"name": metric["name"], "value": value}
            if type(metric.get("tie")) is float:
                facts["metric"]["tie"] = metric["tie"]
            if _is_name(metric.get("rules")):
                facts["metric"]["rules"] = metric["rules"]
    return facts


def facts_of(state: dict) -> dict[str, Any]:
    """What `peek` returns, but for `bytes`, of a state that was loaded."""
    facts = _facts(state)
    progress = {key: facts.get(key) or 0 for key in PROGRESS}
    others = {key: facts.get(key) for key in ("kind", "run", "metric")}
    return {**progress, **others, "start": facts.get("start") or "",
            "starts": facts.get("starts") or [], "position": _position(facts)}


def _position(facts):
    """(epoch in progress, batches trained in it) where a resume goes on, or None."""
    epoch, batch = facts.get("epoch"), facts.get("batch")
    if epoch is None:
        return None
    if facts.get("kind") == "epoch":
        return epoch + 1, 0
    return None if batch is None else (epoch, batch)


def _is_start(value):
    return type(value) is list and list(map(type, value)) == [str, int, bool]


def _is_name(value):
    """Whether it is a short string that can be printed: a comment is limited, a terminal harmed."""
    return type(value) is str and len(value) <= 100 and value.isprintable()


# ---- writing: a temp beside the target, fsync, rename, fsync of the directory ----

def atomic_save(state: dict, path: str | os.PathLike) -> None:
    """Write the dict `state` to `path`: it survives a power cut once this returns; all or nothing.

    Raises OSError (with its errno) when it cannot be written, TypeError for what `weights_only`
    loading would refuse; the temp file is gone then and every earlier file is as it was."""
    path = Path(path).absolute()
    image = _Image().fill(state)
    sweep_temps(path.parent)
    atomic_write(path, image.file())


def atomic_write(path: str | os.PathLike, buffers: Iterable[Any],
                 check: Callable[[Path], object] | None = None) -> int:
    """Write the bytes-like `buffers` to `path`, durably, all or nothing; returns their size.

    Nothing less than these four steps is safe (Pillai et al., OSDI'14). A failed fsync is not
    retried: the kernel may call the lost pages clean (Rebello et al., ATC'20). check(temp) may
    refuse what was written. Raises OSError, and what `check` raises."""
    path = Path(path).absolute()            # another thread may change the directory meanwhile
    with _temp(path) as temp:
        try:
            # the umask decides, unlike mkstemp's 0600
            fd = _open_above_streams(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                size = _write_all(fd, buffers)
                os.fsync(fd)
            finally:
                os.close(fd)
            if check:
                check(temp)
            os.replace(temp, path)
            _own_temps.discard(temp.name)
        except OSError as error:
            if error.filename == str(temp):
                error.filename = str(path)      # what the caller knows
            raise
    _sync_directory(path.parent)
    return size


def copy_checked(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """`target` becomes a durable copy of the checkpoint `source`. CorruptCheckpoint where the copy
    is damaged, so that what a disk has garbled replaces no good file; OSError."""
    atomic_write(target, _pieces(source), check=_check_bytes)


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike, links: bool = True) -> None:
    """`target` becomes another name of `source`, of the same directory: a hard link where possible,
    else a second durable file. Raises OSError."""
    if not links:
        return copy_checked(source, target)
    target = Path(target).absolute()
    with _temp(target) as temp:
        os.link(source, temp)
        # replacing one name of a file by another one of it does nothing: the temp is left then
        os.replace(temp, target)
    _sync_directory(target.parent)


def sweep_temps(directory: str | os.PathLike) -> None:
    """Remove the temp files of dead processes in `directory`."""
    for temp in Path(directory).glob(".*.tmp"):
        if is_dead_temp(temp):
            _unlink(temp)


def is_dead_temp(path: Path) -> bool:
    """Whether `path` is a temp file that no live process writes: by the process in its name on this
    host, elsewhere and in any doubt once it has not changed for ABANDONED seconds."""
    named = TEMP.fullmatch(path.name)
    try:
        info = os.lstat(path)
    except OSError:
        return False
    if not named or not stat.S_ISREG(info.st_mode):
        return False
    process, here = int(named[1]), named[2] in (None, _host())
    if here and process == os.getpid():     # in a container a dead process had this number too
        return path.name not in _own_temps
    return time.time() - info.st_mtime > ABANDONED or here and not is_alive(process)


def is_alive(process: int) -> bool:
    """Whether a process of this number exists on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                 # another user's
        pass
    return True


@contextlib.contextmanager
def _temp(path):
    """A name beside `path` that says who writes it, .NAME.PID@HOST.RANDOM.tmp; gone afterwards."""
    random_part = uuid.uuid4().hex[:8]
    temp = path.parent / f".{path.name}.{os.getpid()}@{_host()}.{random_part}.tmp"
    _own_temps.add(temp.name)
    try:
        yield temp
    finally:
        if temp.name in _own_temps:         # not renamed
            _own_temps.discard(temp.name)   # first: what an interrupt leaves goes at the next save
            _unlink(temp)


def _host():
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:40]


def _open_above_streams(path, flags, mode=0o666):
    """os.open; never as descriptor 0, 1 or 2, which are free in a process whose standard streams
    are closed: a signal's line or a traceback would be written into the file."""
    fd = os.open(path, flags, mode)
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _pieces(path):
    """The file in pieces, one after the other in the same pages, which direct writes take."""
    room = memoryview(mmap.mmap(-1, CHUNK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(room):
            yield room[:size]


def _write_all(fd, buffers):
    """Whole pages bypass the page cache where the file system allows, up to the first odd buffer.

    That halves the interference with training, and leaves the cache to the training data."""
    direct, size = _set_direct(fd, True), 0
    for left in map(memoryview, buffers):
        size += len(left)
        while left:
            if direct and len(left) % PAGE:
                direct = _set_direct(fd, False)
            try:
                left = left[os.write(fd, left):]
            except OSError as error:
                # refused only at the write: by some file systems, or for page-locked memory
                if not direct or error.errno not in (errno.EINVAL, errno.EFAULT):
                    raise
                direct = _set_direct(fd, False)
    return size


def _set_direct(fd, on):
    """Whether writes to `fd` bypass the page cache from here on.

    tmpfs and some network file systems cannot."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | flag if on else flags & ~flag
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
        return on and flag != 0
    except OSError:
        if not on:                          # the next write would fail, and say less
            raise
        return False


def _sync_directory(directory):
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # "cannot" is not "failed"
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
    finally:
        os.close(fd)


def _unlink(path):
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno != errno.ENOENT and path.exists():
            print(f"checkpoint: could not remove {path}: {error.strerror}", file=sys.stderr)


# ---- reading: zipfile checks the CRC-32 of every entry, our SHA-256 all that lies between ----

def load(path: str | os.PathLike, map_location: Any = "cpu") -> dict:
    """The dict in `path`, every byte checked before it is returned.

    Raises CorruptCheckpoint for bytes that were read and are wrong, OSError where they cannot be
    read now, MemoryError where there is no room for them, what torch raises where a GPU fails."""
    if isinstance(map_location, (str, torch.device)):
        torch.empty(0, device=map_location)             # a GPU that is absent damages no file
    with _open(path) as file:
        before = os.fstat(file.fileno())
        with _damage(path):
            state = _read_state(file, map_location)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise OSError(errno.EAGAIN, "changed while it was read", str(path))
        return state


def verify(path: str | os.PathLike) -> int:
    """Load all of `path` and let go of it: refuses (CorruptCheckpoint) what `load` would refuse.

    Returns its size in bytes."""
    load(path)
    return os.path.getsize(path)


def _open(path):
    # opening a pipe would wait for its other end
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CorruptCheckpoint(f"{path}: not a regular file")
    return file


@contextlib.contextmanager
def _damage(path):
    """What reading `path` raises: OSError, MemoryError and a GPU's fault, which pass, as they are;
    all else as damage."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause:                        # zipfile and torch put errors of their own on top
            # damage alone leads a read to nowhere (EINVAL)
            if isinstance(cause, (MemoryError, torch.AcceleratorError)) or \
                    isinstance(cause, OSError) and cause.errno != errno.EINVAL:
                raise cause from None
            # torch has no class for this
            if isinstance(cause, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(cause):
                raise MemoryError(str(cause).split("\n")[0]) from None
            cause = cause.__cause__ or cause.__context__
        damage = CorruptCheckpoint(f"{path}: {_described(error)}")
        damage.foreign = getattr(error, "foreign", False)
        raise damage from None


def _described(error):
    first = str(error).strip().split("\n")[0]
    if isinstance(error, CorruptCheckpoint):
        return first
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", str(error))
        return f"weights_only loading refuses it: {f'it would run {code[1]}' if code else first}"
    return f"unreadable: {type(error).__name__}: {first}"


def _read_state(file, map_location):
    comment = _check(file)
    try:
        file.seek(0)
        # torch may lose an error of readinto; where there is none, it reads by `read`
        plain = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
        with torch.no_grad():               # else 2.14 makes no leaf of a storage of another dtype
            state = torch.load(plain, map_location=map_location, weights_only=True, mmap=False)
        if not isinstance(state, dict):
            raise CorruptCheckpoint(f"holds a {type(state).__name__}, not a checkpoint dict")
    except Exception as error:
        # every byte is as it was written: by another program, or where add_safe_globals allows more
        error.foreign = not comment or isinstance(error, pickle.UnpicklingError)
        raise
    # a choice among files believes the note: it may not say other than the state
    if comment and json.dumps(_facts(_note(comment))) != json.dumps(_facts(state)):
        raise CorruptCheckpoint("its progress record differs from its state")
    return state


def _check(file):
    """Our comment (b"" in another program's .pt), once every byte is the one that was written."""
    size, comment = os.fstat(file.fileno()).st_size, _comment(file)
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if not comment and _is_foreign(archive, entries):
            raise _foreign("a zip that torch.save did not write")
        for entry in entries:
            # attributes make some readers skip an entry
            if entry.external_attr or entry.compress_type or entry.is_dir() \
                    or not 0 <= entry.header_offset < size:
                raise CorruptCheckpoint(f"entry {entry.filename} has damaged attributes")
        bad = archive.testzip()
        if bad or len(archive.NameToInfo) != len(entries):
            raise CorruptCheckpoint(f"entry {bad} does not match its CRC-32" if bad
                                    else "two entries have one name")
    if not comment:
        return comment
    digest, at = hashlib.sha256(), 0
    for entry in entries:
        if entry.filename.startswith("archive/data/"):
            file.seek(entry.header_offset + 26)
            data = entry.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            _digest(digest, file, at, data)
            at = data + entry.file_size
    _digest(digest, file, at, size - len(comment))
    digest.update(comment[len(MAGIC) + 74:])
    if digest.hexdigest().encode() != comment[len(MAGIC):len(MAGIC) + 64]:
        raise CorruptCheckpoint("headers, structure or plain values do not match their SHA-256")
    return comment


def _is_foreign(archive, entries):
    """Whether a zip is whole, and no damage has made of torch.save's entries what they are: all
    with attributes, or some compressed."""
    odd = bool(entries) and all(entry.external_attr for entry in entries)
    packed = any(entry.compress_type and entry.file_size for entry in entries)
    return (packed or odd) and not archive.testzip()


def _foreign(what):
    error = CorruptCheckpoint(what)
    error.foreign = True
    return error


def _check_bytes(path):
    """Refuse (CorruptCheckpoint) a file with a byte that was not written so; a quarter of the work
    of `verify`, which also builds the state."""
    with _open(path) as file, _damage(path):
        _check(file)


def damage_of(path: str | os.PathLike) -> str:
    """What is wrong with the bytes of a checkpoint; "" also where they cannot be read now."""
    try:
        _check_bytes(path)
    except CorruptCheckpoint as damage:
        return reason_of(damage)
    except OSError:
        pass
    return ""


def _digest(digest, file, begin, end):
    if begin > end:
        raise CorruptCheckpoint("overlapping or misplaced entries")
    file.seek(begin)
    for at in range(begin, end, 1 << 20):
        digest.update(file.read(min(end - at, 1 << 20)))


def _comment(file):
    """Our zip comment, b"" where there is none. Its progress has a CRC-32 of its own, and is
    believed before the file is read."""
    size = os.fstat(file.fileno()).st_size
    for length in (1 << 10, 66_000):        # a long one is rare
        file.seek(max(0, size - length))
        _, found, record = file.read().rpartition(b"PK\5\6")
        if found:
            break
    if not found or len(record) < 18:
        file.seek(0)
        if PICKLE.match(file.read(2)):
            raise _foreign("a pickle without a zip: nothing in it can be checked")
        raise CorruptCheckpoint("truncated: no zip end record" if size else "empty file")
    comment = record[18:]
    if record[16:18] != struct.pack("<H", len(comment)) or comment[:len(MAGIC)] not in (b"", MAGIC):
        raise CorruptCheckpoint("the zip end record is damaged")
    sums, note = comment[len(MAGIC) + 64:len(MAGIC) + 74], comment[len(MAGIC) + 74:]
    if comment and sums != b" %08x " % zlib.crc32(note):
        raise CorruptCheckpoint("its progress record is damaged")
    return comment


def _note(comment):
    """The progress in our comment."""
    try:
        note = json.loads(comment[len(MAGIC) + 74:])
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict):
        raise CorruptCheckpoint("its progress record is no JSON object")
    return note


def peek(path: str | os.PathLike) -> dict[str, Any]:
    """Progress of a checkpoint without reading it, as a dict.

    Its keys: epoch, batch, global_step, save_counter (ints), kind, run (or None), metric (a dict
    with name and value, or None), start and starts (of the run, or empty), position (epoch in
    progress and batches trained in it, or None where no resume can go on from it), bytes. A few
    hundred bytes are read of a file written here; any other .pt is loaded. Raises as `load`."""
    with _open(path) as file, _damage(path):
        size, comment = os.fstat(file.fileno()).st_size, _comment(file)
        state = _note(comment) if comment else None
    state = load(path, "meta") if state is None else state
    for key, value in _facts(state).items():
        if key in PROGRESS and (value is None or not 0 <= value < 2**63):
            raise CorruptCheckpoint(f"{path}: its {key} is {value!r}, not a count")
    return {**facts_of(state), "bytes": size}


# ---- choosing and rotating: by what is stored inside, never by mtime or by the order of names ----

# file names, filled in from the state; a state saved under several is one file where links work.
# Of one save under two names a resume takes the upper; best.pt is its last resort
KINDS = {
    "mid_epoch": "mid_epoch_{epoch:03d}_{batch:06d}.pt",
    "last": "last.pt",
    "checkpoint_epoch": "checkpoint_epoch_{epoch:03d}.pt",
    "best": "best.pt",
}
GLOBS = {kind: re.sub(r"\{.*?\}", "*", name) for kind, name in KINDS.items()}
NAME = re.compile("|".join(f"(?P<{kind}>{re.escape(glob)})" for kind, glob in GLOBS.items())
                  .replace(r"\*", r"\d+"))


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Paths in `directory` that are named like a checkpoint, by name; none where it is absent."""
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(directory, name) for name in names if NAME.fullmatch(name)]


class Candidate:
    """One checkpoint file with its progress, or the reason why no resume can take it.

    facts       what `peek` returns; None where it cannot be read
    damage      why no resume can take it, as text; None for a sound file
    foreign     a sound file of another program
    fault       an OSError that may pass: what the file holds is not known"""

    def __init__(self, path: str | os.PathLike, label: str = "") -> None:
        self.path = Path(path)
        self.label = label or self.path.name
        named = NAME.fullmatch(self.path.name)
        self.kind = named and named.lastgroup
        self.facts: Any = None
        self.damage = self.fault = None
        self.foreign = False
        try:
            self.facts = peek(path)
            if not self.facts["position"]:
                self.damage = "foreign: it names no epoch and batch to go on from"
                self.foreign = True
        except CorruptCheckpoint as damage:
            self.damage = reason_of(damage)
            self.foreign = damage.foreign
        except MemoryError:
            self.fault = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))
        except OSError as error:
            if error.errno in LASTING:
                self.damage = reason_of(error)
            else:
                self.fault = error

    @property
    def order(self) -> tuple[int, ...]:
        """Newest save first: the counter only grows, also after a rollback; equal counters go by
        progress, then by kind, then by the numbers of the name: a state may have no progress."""
        f = self.facts
        rank = -list(KINDS).index(self.kind) if self.kind else -len(KINDS)
        numbers = map(int, re.findall(r"[0-9]+", self.path.name))
        return f["save_counter"], f["global_step"], f["epoch"], f["batch"], rank, *numbers

    @property
    def save(self) -> Any:
        """What makes two files the same save; None where it is not known."""
        # a state of atomic_save may have no counter: then its progress tells it from another
        keys = "run", "start", "save_counter", "global_step", "epoch", "batch"
        return self.facts and itemgetter(*keys)(self.facts)

    def stands_for(self, other: "Candidate") -> bool:
        """Whether this sound file holds the save of `other`, which cannot be read: by its progress,
        else by a name that says its epoch, and of a snapshot its batch."""
        if other.facts:
            return self.save == other.save and self is not other
        if other.kind == "checkpoint_epoch":
            name = KINDS["checkpoint_epoch"].format(**self.facts)
            return self.facts["kind"] == "epoch" and name == other.path.name
        return self.kind == "mid_epoch" and self.path.name == other.path.name

    def __str__(self):
        text = "epoch {epoch} batch {batch} step {global_step} save {save_counter}"
        return text.format_map(self.facts)


def candidates(directory: str | os.PathLike, labelled: bool = False) -> list[Candidate]:
    """Files of `directory` that a resume may take, furthest first, then the best, then what cannot
    be taken. `labelled`: they are called by their whole paths. Raises OSError."""
    found = [Candidate(path, str(path) if labelled else "") for path in checkpoints(directory)]
    # rotated away between listing and opening: not damage
    return in_order(c for c in found if c.facts or c.fault or os.path.lexists(c.path))


def in_order(found: Iterable[Candidate]) -> list[Candidate]:
    found = list(found)
    usable = sorted((c for c in found if c.facts and not c.damage), key=lambda c: c.order,
                    reverse=True)
    usable.sort(key=lambda c: c.kind == "best")
    return usable + [c for c in found if c not in usable]


def in_line(facts: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether the save of `facts` is one that the save of `later` goes back to, or is itself.

    Each start of a process is a line of its own; a save names the starts before its own, and the
    save at which each was left. Starts before an unnamed one, of an older version or more than
    MAX_STARTS ago, are not known: there the counter decides."""
    if facts["run"] != later["run"]:
        return False
    left = {start: counter for start, counter, _ in later["starts"]}
    left[later["start"]] = later["save_counter"]
    return facts["save_counter"] <= left.get(facts["start"], left.get("", -1))


def choose(found: list[Candidate], open_: Callable[[Path], Any],
           say: Callable[[str], object] = print) -> tuple[Candidate | None, Any]:
    """(Candidate, what open_ made of it) of the latest save in `found` that open_ accepts, or
    (None, None). Says of each file why it is taken or not.

    A file that cannot be read now may be the latest: its OSError is raised, unless the same save
    can be read elsewhere."""
    usable = [c for c in found if c.facts and not c.damage]
    refused = [c for c in found if c.damage]
    for candidate in found:
        if candidate.fault:
            _expect_another(candidate, candidate.fault, usable, say)
    for candidate in refused:
        say(f"resume: skipped {candidate.label}: {candidate.damage}")
    for number, candidate in enumerate(usable):
        if candidate.kind == "best" and not refused:
            say(f"resume: best.pt alone is no run to continue: --resume {candidate.path} would "
                f"start from it")
            continue
        try:
            opened = open_(candidate.path)
        except (CorruptCheckpoint, OSError) as error:
            if isinstance(error, OSError) and error.errno not in LASTING:
                _expect_another(candidate, error, usable[number + 1:], say)
            else:
                say(f"resume: skipped {candidate.label}: {reason_of(error)}")
                refused.append(candidate)
        else:
            _explain(candidate, [c for c in usable if c not in refused], say)
            return candidate, opened
    return None, None


def _expect_another(candidate, error, others, say):
    """Raise `error`, that of a candidate which may be the latest, unless one of `others` is the
    same save."""
    if not any(other.stands_for(candidate) for other in others):
        raise OSError(error.errno, error.strerror, str(candidate.path)) from None
    say(f"resume: skipped {candidate.label}: {reason_of(error)}; the same save is elsewhere")


def _explain(chosen, usable, say):
    why = ("the last resort, since no later save passes every check" if chosen.kind == "best"
           else "the latest save that passes every check")
    say(f"resume: chose {chosen.label}: {chosen}, {why}")
    for other in usable[usable.index(chosen) + 1:]:
        if other.kind != "best":
            same = "the same save" if other.save == chosen.save else "an earlier save"
            say(f"resume: older: {other.label}: {other}, {same}")


def reason_of(error: BaseException) -> str:
    """What is wrong, without the file's name."""
    if isinstance(error, CorruptCheckpoint):
        return str(error).split(": ", 1)[-1]
    return getattr(error, "strerror", None) or str(error)


def megabytes(size: float) -> str:
    """Bytes as "195.4 MB", few of them as "1.4 kB"."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def find_resume(checkpoints_directory: str | os.PathLike,
                say: Callable[[str], object] = print) -> Path | None:
    """Path of the checkpoint to resume from, verified, or None. Prints each candidate and why it
    was taken or not. Raises OSError where a file cannot be read now: it may be the latest."""
    chosen, _ = choose(candidates(checkpoints_directory), verify, say)
    return chosen.path if chosen else None


def _check_counts(**counts):
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more, not {count!r}")


def rotate(directory: str | os.PathLike, glob_pattern: str, keep: int,
           protect: Iterable[str | os.PathLike] = ()) -> list[Path]:
    """Delete all but the newest `keep` files (0 = all stay) that match; returns the deleted paths.

    Newest by the stored save counter. Never deleted: the newest, best.pt and anything in `protect`
    (they count as kept), what cannot be parsed, and files of another run than the newest one's."""
    _check_counts(keep=keep)
    if keep == 0:
        return []
    found = [c for c in map(Candidate, Path(directory).glob(glob_pattern)) if c.facts]
    found.sort(key=lambda c: c.order, reverse=True)
    found = [c for c in found if c.facts["run"] == found[0].facts["run"]]
    guard = {os.path.realpath(path) for path in (*protect, Path(directory, KINDS["best"]))}
    guarded = found[:1] + [c for c in found[1:] if os.path.realpath(c.path) in guard]
    others = [c for c in found if c not in guarded]
    doomed = [c.path for c in others[max(0, keep - len(guarded)):]]
    for path in doomed:
        _unlink(path)
    return [path for path in doomed if not os.path.lexists(path)]


# ---- what a copied loop needs besides: random states, signals ----

def random_states() -> dict[str, Any]:
    """Random states of Python, NumPy (if loaded), torch and its GPUs, as plain values and CPU
    tensors."""
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [torch.cuda.get_rng_state(gpu) for gpu in _gpus()]
    return states


def _gpus():
    """Numbers of the GPUs, the current one first: in another process it may have another number."""
    # starts CUDA: a seed that waits for its start would undo what is restored before it
    current = torch.cuda.current_device()
    return sorted(range(torch.cuda.device_count()), key=lambda gpu: gpu != current)


def restore_random_states(states: dict[str, Any]) -> None:
    """Go on with the random numbers that would have followed `random_states()`."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        # the process that saved had loaded it; torch does not need it
        import numpy
        numpy.random.set_state(tuple(states["numpy"]))
    if "cuda" in states and torch.cuda.is_available():
        saved = states["cuda"]          # once that of the current GPU alone
        for gpu, state in zip(_gpus(), saved if isinstance(saved, list) else [saved]):
            torch.cuda.set_rng_state(state, gpu)


class Signals:
    """While entered, the first signal that asks to stop sets `number`; one that comes a second or
    more later acts as ever.

    `tmux kill-session` and systemd send two within milliseconds: they are one wish. Signals that
    were inherited as ignored (nohup) stay ignored. Only the main thread of the process that entered
    it can listen. ends: the process ends after it, so that the second of a pair, which may come
    when the save is done, must not meet the default action."""

    WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, ends: bool = False) -> None:
        self.ends = ends
        self.number = 0
        self.since = 0.0
        self.before: dict[int, Any] = {}
        self.process = os.getpid()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in self.WATCHED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._note)
            multiprocessing.util.register_after_fork(self, lambda own: spare_worker(own.before))
        return self

    def take(self, number: int) -> None:
        """A wish to stop from now on, also one that another process of a training was told of."""
        if not self.number:
            self.number = number
            self.since = time.monotonic()

    def _note(self, number, frame):
        if os.getpid() != self.process:
            # a fork must not die of a Ctrl-C that its parent answers with a save; of a kill it must
            if number == signal.SIGTERM:
                self._act(number)
        elif not self.number:
            self.take(number)
            name = signal.Signals(number).name
            text = f"\n{name}: saving at the next step; once more to exit at once\n"
            with contextlib.suppress(OSError):              # after SIGHUP the terminal may be gone
                os.write(2, text.encode())
        elif time.monotonic() - self.since >= 1:
            self._act(number)

    def _act(self, number):
        # a process of its own goes at once; in another's, whoever listened before decides
        signal.signal(number, signal.SIG_DFL if self.ends else self.before[number])
        signal.raise_signal(number)

    def __exit__(self, *exception):
        if self.ends and self.number:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def spare_worker(heard: object) -> None:
    """In a worker of a DataLoader, where signals are `heard`: the step in progress needs it until
    the training has saved, and service managers signal all processes at once. It obeys the training
    alone."""
    if heard and hasattr(signal, "sigwaitinfo"):
        if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, Signals.WATCHED):
            threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent):
    """End this process at a SIGTERM of the training, or at any once its `parent` is gone."""
    training = multiprocessing.parent_process().pid     # not `parent` where a server has forked
    while True:
        info = signal.sigwaitinfo(Signals.WATCHED)
        orphan = os.getppid() != parent
        if info.si_signo == signal.SIGTERM and (orphan or info.si_pid == training):
            os._exit(128 + signal.SIGTERM)


# ---- policy: when to save, what to keep, the background writer ----

class Checkpointer(contextlib.AbstractContextManager):
    """When to save, what to keep, and the background writer, of a directory held by one process.

    mid_epoch_minutes   between timed snapshots (0 = after every step); the first of a process
                        comes after 2 at most
    mid_epoch_keep, checkpoint_keep   newest files kept of each kind (0 = all)
    checkpoint_interval epochs between checkpoint_epoch_EEE.pt (0 = none)
    mode                "max" or "min": which metric is better; or {its name: that of each}
    on_saved            called with the path in the writer thread once a file is durable, and may
                        call no method here: it would wait for itself; its exception stops the run
    before_save         called in the writer thread with the directory at each try to write a file
                        there: makes durable what the state counts on
    save_patience_minutes   a failed save is said and tried again for so long, the state kept in
                        memory; then SaveFailed
    check_finite        refuse to write weights (state["model"]) that became infinite or NaN
    say                 prints one line; what it raises is ignored

    A state is any dict with whole numbers `epoch` (from 1) and, in a snapshot, `batch`. The file
    holds it with `save_counter` and, under "holdfast", what choosing goes by. Any thread may call
    any method: they take turns. A save goes through these states; the writer thread only reads
    `_image` and `_names`, and hands its error over in the future `_writing`:

        free ----- save_mid, save_epoch: the state is copied to memory -----> copied
        copied --- writer thread: durable, links, on_saved, rotation -------> free
        copied --- writer thread: OSError; the copy stays in memory --------> failed
        failed snapshot ---------- next save: a newer state takes its place -> copied
        failed end of an epoch --- next save, settle, close: written again --> copied
                                   (snapshots are turned away while that fails)
        failed 3 times and for save_patience_minutes ----> SaveFailed, in the training loop"""

    best_may_return = False                 # whether a damaged best.pt may come from a second copy

    def __init__(self, directory: str | os.PathLike, mid_epoch_minutes: float = 30.0,
                 mid_epoch_keep: int = 5, checkpoint_interval: int = 1, checkpoint_keep: int = 3,
                 mode: str | dict = "max", on_saved: Callable[[Path], object] | None = None,
                 before_save: Callable[[Path], object] | None = None, background: bool = True,
                 say: Callable[[str], object] = print, save_patience_minutes: float = 60.0,
                 check_finite: bool = True) -> None:
        self.keep = {"mid_epoch": mid_epoch_keep, "checkpoint_epoch": checkpoint_keep}
        _check_counts(mid_epoch_keep=mid_epoch_keep, checkpoint_keep=checkpoint_keep,
                      checkpoint_interval=checkpoint_interval)
        for way in mode.values() if isinstance(mode, dict) else (mode,):
            if way not in ("max", "min"):
                raise ValueError(f"mode must be max or min, not {way!r}")
        for minutes in (mid_epoch_minutes, save_patience_minutes):
            if not isinstance(minutes, Real) or not minutes >= 0:   # NaN would never be due
                raise ValueError(f"minutes must be a number, 0 or more, not {minutes!r}")
        if not os.fspath(directory):        # of a variable that is not set
            raise ValueError("the directory is an empty path: name a folder")
        self.directory = Path(directory).absolute()         # a later chdir must not move the run
        self.minutes = mid_epoch_minutes
        self.interval = checkpoint_interval
        self.mode = mode
        self.on_saved = on_saved
        self.before_save = before_save
        self.background = background
        self.patience = save_patience_minutes
        self.say = tolerant(say)
        self._begin_line()
        self.blocked = 0.0                  # seconds that training waited for the last save
        self._slowest = 0.0                 # seconds of the slowest save
        self._image = _Image(self.say, "model" if check_finite else "")
        self._names: list[str] = []         # of the image
        self._measured = None               # metric of the image
        self._best = None                   # metric of best.pt, {}: none; None: never read
        self.best_path = self.directory / KINDS["best"]   # or the epoch that lacks the name
        self._writing = None                # future of the save in progress
        self._failed: Any = None            # error of the image's save: it is in memory alone
        self._failures, self._failing_since = 0, 0.0        # in a row, and since when
        self._turn = threading.RLock()
        self._signals = Signals()           # heard only within signals()
        # waiting: starting a thread per save costs 5 ms
        self._writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._due_at = time.monotonic() + 60 * min(2.0, self.minutes)
        self._open()                        # last: an interrupt after it would keep the lock

    def _begin_line(self):
        """A run of its own, as long as no checkpoint is gone on from."""
        self.run = uuid.uuid4().hex[:12]
        self.start = uuid.uuid4().hex[:8]   # what is saved from here on is a line of its own
        # [start, its save that was left, whether that was asked for], oldest first
        self.starts: list[list] = []
        self.counter = 0                    # of the newest save
        # epoch in progress, from 1, and batches trained in it, at the newest save
        self.position: tuple[int, int] = (1, 0)
        self.notes: dict[str, Any] = {}     # what a subclass keeps in the file
        # the file that this run goes on from: never rotated away
        self.resumed: Path | None = None

    def _open(self):
        """Take the directory. Raises InUse where another process has it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.directory, self.say)
        try:
            self._look()
        except BaseException:
            self._lock.close()
            raise

    def _look(self):
        """What the directory holds and can: dead temps go, files of another program under a name of
        ours are set aside, saves from here on outrank every file."""
        sweep_temps(self.directory)
        self.links = links_work(self.directory)
        if not self.links:
            self.say(f"checkpoints: no hard links in {self.directory}: last.pt and best.pt are "
                     f"full copies")
        for candidate in candidates(self.directory):
            if candidate.foreign:
                aside = _free_name(candidate.path.with_name(f"foreign_{candidate.path.name}"))
                os.rename(candidate.path, aside)
                self.say(f"checkpoints: {candidate.path.name} is another program's: kept as "
                         f"{aside.name}")
            elif candidate.facts:
                self.counter = max(self.counter, candidate.facts["save_counter"])
        self._best = self._metric_of_best()

    @property
    def places(self) -> list[Path]:
        """The folders that hold states of this run, that with the newest ones first."""
        return [self.directory]

    # -- going on --

    def resume(self, resume: bool | str | os.PathLike = True) -> dict[str, Any] | None:
        """State to continue from, or None: that of the best file of the directory, or of the file
        `resume` where it is a path; False begins anew.

        Sets `position` to (epoch in progress, batches already trained in it). Raises OSError where
        a file cannot be read now: nothing may be begun over a run that is only out of reach."""
        if resume is False:
            self.position = (1, 0)
            return None
        self.settle()                       # a loop begun again meets its own last save
        if resume is not True:
            state = load(resume)
            self.adopt(state, resume)
            return state
        chosen, state = choose(candidates(self.directory), load, self.say)
        return self._go_on(chosen, state)

    def _go_on(self, chosen, state):
        if chosen is None:
            self.say(f"resume: nothing usable in {self.directory}: starting fresh")
            self.position = (1, 0)
            return None
        self._follow(state, chosen.path)
        self._name_line()
        return state

    def adopt(self, state: dict[str, Any], path: str | os.PathLike | None = None) -> None:
        """Continue the line that `state`, loaded from `path`, belongs to, whatever later saves the
        directory holds. Its first save is made here and outranks them, so that every later resume
        follows this line; a kill before it changes nothing. Raises OSError where it fails."""
        if path:
            self._bring_best(facts_of(state), Path(path))
        self._follow(state, path, asked=True)
        epoch, batch = self.position
        keep, self.keep = self.keep, {}     # what is best is asked of files that would be rotated
        try:
            self.save_mid({**state, "epoch": epoch, "batch": batch})
            self.wait()
        finally:
            self.keep = keep
        if self._failed:
            error, self._failed = self._failed, None
            raise OSError(getattr(error, "errno", None) or errno.EIO,
                          f"{reason_of(error)}: the run did not go back to {path}, nothing was "
                          f"changed")
        self._name_line()

    def _bring_best(self, line, path):
        """The best epoch that led to `path`, the best.pt beside it or itself, comes along from
        elsewhere, as one that was set aside: the line of this directory does not know it yet."""
        beside = Candidate(path.with_name(KINDS["best"]))
        if beside.fault:
            raise beside.fault
        here = {c.save for c in candidates(self.directory)}
        for best in (beside, Candidate(path)):
            if best.facts and best.facts["metric"] and in_line(best.facts, line):
                aside = self.directory / abandoned_name(best).name
                try:
                    if best.save not in here and not aside.exists():
                        copy_checked(best.path, aside)
                    return
                except CorruptCheckpoint as damage:
                    self.say(f"resume: left {best.path}: {reason_of(damage)}")

    @property
    def line(self) -> dict:
        """What `in_line` asks of a save, of the newest one of this process."""
        return {"run": self.run, "start": self.start, "starts": self.starts,
                "save_counter": self.counter}

    def _follow(self, state, path, asked=False):
        facts = facts_of(state)
        if not facts["position"]:
            raise CorruptCheckpoint(f"{path or 'the state'}: it names no epoch and batch to go on "
                                    f"from")
        self.resumed = Path(path).absolute() if path else None
        self.run = facts["run"] or self.run
        self.starts = [*facts["starts"], [facts["start"], facts["save_counter"], asked]]
        self.start = uuid.uuid4().hex[:8]           # this process may go on more than once
        while len(self.starts) > MAX_STARTS:        # an unnamed one stands for the first of them
            self.starts[:2] = [["", max(self.starts[0][1], self.starts[1][1]), False]]
        self.counter = max(self.counter, facts["save_counter"])
        self.position = facts["position"]

    def _name_line(self):
        """Derive last.pt and best.pt of the line that goes on, at every resume.

        A kill may have come between an epoch's file and its other names; a rollback leaves a
        best.pt that belongs to the abandoned line."""
        self._try(self._set_best_aside, self._name_best, self._name_last)

    def _try(self, *steps):
        """A disk that refuses costs a name, which the next epoch gives."""
        try:
            for step in steps:
                step()
        except (OSError, CorruptCheckpoint) as error:
            self.say(f"checkpoints: best.pt could not be named anew: {reason_of(error)}")

    def _ended(self):
        """Candidates of this line that end an epoch, oldest first, and what was set aside as the
        best of a line that this one goes back to."""
        aside = map(Candidate, self.directory.glob("abandoned_best_*.pt"))
        ended = [c for c in (*candidates(self.directory), *aside)
                 if c.facts and c.facts["kind"] == "epoch" and in_line(c.facts, self.line)]
        return sorted(ended, key=lambda c: c.order)

    def _set_best_aside(self):
        """Rename best.pt where this line has not made it, and where it is damaged: a metric without
        its weights is no bar."""
        best = Candidate(self.directory / KINDS["best"])
        if not best.facts:
            return
        aside, why = abandoned_name(best), "belongs to the abandoned line"
        damage = "" if self.best_may_return else damage_of(best.path)
        if damage:
            aside, why = best.path.with_name("best.pt.damaged"), f"is damaged, {damage}"
        elif in_line(best.facts, self.line):
            return
        os.replace(best.path, aside)        # a full disk takes no copy
        _unlink(best.path)                  # else one file had both names already
        _sync_directory(self.directory)
        self.say(f"resume: best.pt {why}: renamed to {aside.name}")

    def _name_best(self):
        """Name best.pt the best epoch of this line that ended after it and lacks that name. Until
        the disk takes it, that epoch is the bar all the same, and its file stays."""
        best, stored = Candidate(self.directory / KINDS["best"]), self._metric_of_best()
        if stored is None:
            return
        self._best, self.best_path = stored, best.path
        for candidate in self._ended():
            metric = candidate.facts["metric"]
            later = not best.facts or candidate.order > best.order      # else it was judged before
            if metric and later and candidate.kind != "best" and self._is_better(metric) \
                    and self._is_sound(candidate, best.path.name):
                self._best, self.best_path = metric, candidate.path
        if self.best_path != best.path:
            self._name_again(self.best_path, best.path.name)
            if not NAME.fullmatch(self.best_path.name) and self.best_path != self.resumed:
                _unlink(self.best_path)     # abandoned no more; the same command finds its file
            self.best_path = best.path

    def _name_last(self):
        last = Candidate(self.directory / KINDS["last"])
        for candidate in reversed(self._ended()):
            if last.facts and last.order >= candidate.order:
                return
            if self._is_sound(candidate, last.path.name):
                return self._name_again(candidate.path, last.path.name)

    def _is_sound(self, candidate, name):
        """Whether its bytes are: no more than its progress was read so far."""
        damage = damage_of(candidate.path)
        if damage:
            self.say(f"resume: {candidate.path.name} is not named {name}: {damage}")
        return not damage

    def _name_again(self, path, name):
        link_or_copy(path, self.directory / name, self.links)
        self.say(f"checkpoints: {name} is {path.name} again, of the saves that are left")

    # -- when --

    def due(self) -> bool:
        """True when a timed snapshot should be taken. Raises what went wrong in the background
        since the last call."""
        self.check()
        return time.monotonic() >= self._due_at

    @contextlib.contextmanager
    def signals(self) -> Iterator[Signals]:
        """`with saver.signals():` has SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 wait for
        `stopping`. Left only when the last save is durable: the second signal of a pair must not
        meet a writer at work."""
        with Signals() as self._signals, _tolerant_prints():
            if threading.current_thread() is not threading.main_thread():
                self.say("checkpoints: no signal is heard here: they reach the main thread alone")
            try:
                yield self._signals
            finally:
                self.close()

    def stopping(self) -> int:
        """0, or once a signal came the exit code to leave with when the state is saved: 128 + its
        number."""
        return 128 + self._signals.number if self._signals.number else 0

    @property
    def slowest(self) -> float:
        """Seconds of the slowest save until it was durable: what a time limit must leave."""
        return self._slowest

    # -- saving --

    def save_mid(self, state: dict[str, Any], since: float | None = None,
                 last: bool = False) -> bool:
        """Snapshot of an epoch in progress: state["epoch"] from 1, state["batch"] batches trained
        in it. since: time.monotonic() when packing `state` began; what training waited counts
        from there. last: the process stops after it, so it waits for a save that failed before.

        False where it was turned away: the end of an epoch, whose save failed, still waits in
        memory. ValueError for a place before the one in progress."""
        _check_progress(state, ("epoch", "batch"))
        with self._turn:
            here = (int(state["epoch"]), int(state["batch"]))
            self._expect_place(here)
            self.wait()
            if not self._finish_epoch(last or bool(self.stopping())):
                self._due_at = time.monotonic() + 60
                return False
            names = [KINDS["mid_epoch"].format_map(state)]
            self._save(state, "mid_epoch", names, None, since)
            self.position = here
            return True

    def _expect_place(self, here):
        if here < self.position:
            raise ValueError("a snapshot of epoch {}, batch {} comes after epoch {}, batch {}: "
                             "count epochs and batches from saver.position"
                             .format(*here, *self.position))

    def save_epoch(self, state: dict[str, Any], metric: float | None = None, name: str = "metric",
                   tie: float | None = None, rules: str | None = None,
                   since: float | None = None) -> bool:
        """End of an epoch: checkpoint_epoch_EEE.pt, last.pt and, where `metric` beats it strictly,
        best.pt. True if best.

        tie: where `metric` equals that of best.pt, the larger one of these wins. rules: a short
        text; metrics under other rules are not compared. since: as for save_mid."""
        _check_progress(state, ("epoch",))
        with self._turn:
            self._expect_epoch(int(state["epoch"]))
            measured = None if metric is None else measurement(metric, name, tie, rules)
            improved = self.is_best(measured)               # a save that waits comes first
            names = [KINDS["last"]]
            if self.interval and state["epoch"] % self.interval == 0:
                names.insert(0, KINDS["checkpoint_epoch"].format_map(state))
            if improved:
                names.append(KINDS["best"])
            self._save(state, "epoch", names, measured, since)
            self.position = (int(state["epoch"]) + 1, 0)
            return improved

    def _expect_epoch(self, epoch):
        if epoch < self.position[0]:
            raise ValueError(f"epoch {epoch} has ended already: epoch {self.position[0]} is in "
                             f"progress (they count from 1)")

    def is_best(self, measured: dict[str, Any] | None) -> bool:
        """Whether a `measurement` is strictly better than what best.pt holds; NaN never is.

        The end of an epoch that waits in memory is written first: it may be the best. The file is
        asked, so no resume can forget it; where it cannot be read, what it held last."""
        if measured and isinstance(self.mode, dict) and measured["name"] not in self.mode:
            raise ValueError(f"mode says of no metric {measured['name']!r} whether max is better")
        with self._turn:
            self.wait()
            if not self._finish_epoch():
                self.say(f"checkpoints: the save of {' = '.join(self._names)} is given up for a "
                         f"later epoch's: {reason_of(self._failed)}")
            if measured is None:
                return False
            self._try(self._name_best)
            if self._best is None:
                self.say("checkpoints: best.pt stays: what it holds was never read")
                return False
            return self._is_better(measured)

    def _is_better(self, measured):
        best = self._best
        # a file of before the rules were stored is taken to be of the same ones
        rules = {m["rules"] for m in (best, measured) if m and "rules" in m}
        if not best or best["name"] != measured["name"] or len(rules) > 1:
            return not math.isnan(measured["value"])
        if measured["value"] == best["value"] and "tie" in measured and "tie" in best:
            return better(measured["tie"], best["tie"])
        mode = self.mode if isinstance(self.mode, str) else self.mode.get(best["name"], "max")
        return better(measured["value"], best["value"], mode)

    def _metric_of_best(self):
        """What best.pt holds, {} for nothing that compares; None where it cannot be read."""
        try:
            return peek(self.directory / KINDS["best"])["metric"] or {}
        except FileNotFoundError:           # the whole directory may be out of reach
            return {} if os.path.isdir(self.directory) else None
        except CorruptCheckpoint as damage:
            self.say(f"checkpoints: best.pt cannot be compared ({reason_of(damage)}): the next "
                     f"metric replaces it")
            return {}
        except OSError as error:
            self.say(f"checkpoints: best.pt cannot be read now ({reason_of(error)})")
            return None

    def _finish_epoch(self, waits=False):
        """Write again an epoch's end whose save failed; False where it failed once more."""
        if self._failed and KINDS["last"] in self._names:
            (self.settle if waits else self._retry)()
        return not (self._failed and KINDS["last"] in self._names)

    def _save(self, state, kind, names, measured, since):
        self._expect_open()
        began = since or time.monotonic()
        self._failed = None
        self.counter += 1
        ours = {"kind": kind, "run": self.run, "start": self.start, "starts": self.starts,
                **self.notes}
        if measured:
            ours["metric"] = measured
        try:
            # a state that was loaded from a checkpoint holds that checkpoint's entry: replaced
            self._image.fill({**state, "save_counter": self.counter, "holdfast": ours})
        finally:
            self._due_at = time.monotonic() + 60 * self.minutes
        self.blocked = time.monotonic() - began
        self._names = names
        self._measured = measured
        self._submit()
        if not self.background:
            self.wait()

    @property
    def _closed(self):
        """Whether another process may hold the directory. A fork has neither lock nor writer."""
        return self._lock not in Lock.held

    def _expect_open(self):
        if self._closed:
            raise ValueError("this Checkpointer is closed, or another process's from before a "
                             "fork: save within its with block, in the process that made it")

    def _submit(self):
        self._expect_open()
        try:
            self._writing = self._writer.submit(self._write, self._names, self.blocked)
        except RuntimeError:                # no thread is to be had: training waits for the disk
            self._writing = Future()
            try:
                self._writing.set_result(self._write(self._names, self.blocked))
            except BaseException as error:
                self._writing.set_exception(error)

    def _retry(self):
        """Write the image again whose save failed."""
        self._submit()
        self.wait()

    def _write(self, names, blocked):
        """Writer thread: durable first, then the other names, then the hook, and only then
        rotation."""
        began = time.monotonic()
        if self.before_save:            # first: a try that finds no directory is one too
            self.before_save(self.directory)
        self._expect_own_directory()
        sweep_temps(self.directory)
        if not self.links:
            self._make_room(names)
        first = self.directory / names[0]
        size = atomic_write(first, self._image.file())
        for name in names[1:]:
            link_or_copy(first, self.directory / name, self.links)
        wrote = time.monotonic() - began
        self._slowest = max(self._slowest, blocked + wrote)
        self.say(f"saved {' = '.join(names)}: {megabytes(size)}, training waited "
                 f"{blocked * 1e3:.0f} ms, durable in {wrote:.2f} s{self._remark()}")
        self._call_hook(first)
        for kind, keep in self.keep.items():
            self._rotate(kind, keep)

    def is_own_directory(self) -> bool:
        """Whether the path of the directory still leads to the one that is held: it may have been
        moved away, or a disk mounted over it. FileNotFoundError where nothing is there."""
        return self._lock.is_at(self.directory)

    def _expect_own_directory(self):
        """Raise Moved where another run may be in this one's place."""
        try:
            if not self.is_own_directory():
                raise Moved(errno.ESTALE, f"{self.directory} is not the folder that this run "
                                          f"holds: it was moved away, or a disk mounted over it")
            if not os.path.lexists(self._lock.path):
                self._lock = lock(self.directory, self.say)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: "
                                                  f"{self.directory}") from None

    def _make_room(self, names):
        """Copies instead of links need room: the oldest snapshots go first, newer durable ones
        remain."""
        for number in self._image.order:
            self._image.refuse_nonfinite(number)            # a refused save costs no snapshot
        room = 2 if len(names) > 1 else 1
        keep = self.keep.get("mid_epoch")
        if keep:
            self._rotate("mid_epoch", max(1, keep - room))

    def _call_hook(self, path):
        try:
            if self.on_saved:
                self.on_saved(path)
        except Exception as error:          # not an OSError: the save itself did succeed
            raise RuntimeError(f"on_saved failed for {path.name}: {error}") from error

    def _rotate(self, kind, keep):
        protect = [path for path in (self.resumed, self.best_path) if path]
        for path in rotate(self.directory, GLOBS[kind], keep, protect):
            self.say(f"checkpoints: rotated out {path.name}")

    def _remark(self):
        """What a save's line says besides."""
        return ""

    # -- faults and the end --

    def check(self) -> None:
        """Raise the writer's error here: SaveFailed when saves fail beyond patience, else anything
        that is no failed save."""
        with self._turn:
            if self._writing and self._writing.done():
                self.wait()

    def wait(self) -> None:
        """Until the file being written is durable; reports its failure, if any, as `check` does."""
        with self._turn:
            if not self._writing:
                return
            self._expect_open()
            error = self._writing.exception()
            self._writing = None
            if error is None:
                self._failures = 0
                self._failed = None
                if KINDS["best"] in self._names:
                    self._best = self._measured
            elif isinstance(error, (OSError, NotFinite)) and not isinstance(error, Moved):
                self._note_failure(error)
            else:
                raise error

    def _note_failure(self, error):
        now = time.monotonic()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self._failed = error
        self._due_at = min(self._due_at, now + 60)          # no need to wait for the whole interval
        line = f"save failed ({self._failures} in a row): {reason_of(error)}"
        if getattr(error, "errno", None) == errno.ENOSPC:
            line += f" ({megabytes(self._image.end + len(self._image.pickled))} needed"
            with contextlib.suppress(OSError):
                line += f", {megabytes(shutil.disk_usage(self.directory).free)} free"
            line += ")"
        self.say(f"{line}; every earlier checkpoint is as it was")
        # time mends a disk, but no weights that are not finite
        patience = 0 if isinstance(error, NotFinite) else 60 * self.patience
        if self._failures >= 3 and now - self._failing_since >= patience:
            self._failed = None
            minutes = (now - self._failing_since) / 60
            raise SaveFailed(getattr(error, "errno", None),
                             f"saves failed for {minutes:.0f} minutes, {self._failures} in a row, "
                             f"the last one: {reason_of(error)}")

    def settle(self) -> None:
        """Until the newest save is durable: where it failed again and again, for
        save_patience_minutes. Else SaveFailed."""
        with self._turn:
            self.wait()
            pause = 1.0
            while self._failed:
                time.sleep(min(pause, 60 * self.patience))
                pause = min(2 * pause, 60.0)
                self._retry()

    def close(self) -> None:
        """Give the directory up after the newest save: where it failed, once more or, after one
        signal, as by `settle`. SaveFailed where it is not durable. A second call does nothing."""
        with self._turn:
            if self._closed:
                return
            try:
                self.wait()
                if self._failed:
                    once = isinstance(sys.exc_info()[1], KeyboardInterrupt)     # a second Ctrl-C
                    (self._retry if once or not self.stopping() else self.settle)()
                if isinstance(self._failed, OSError):       # the loop knows of other weights
                    raise SaveFailed(self._failed.errno,
                                     f"the newest save, {self._names[0]}, could not be written: "
                                     f"{self._failed.strerror}")
            finally:
                self._end()

    def _end(self):
        self._writer.shutdown()
        self._lock.close()

    def __exit__(self, *exception):
        self.close()


def measurement(value: float, name: str = "metric", tie: float | None = None,
                rules: str | None = None) -> dict[str, Any]:
    """A metric as a checkpoint holds it. rules: a short text for the rules it was computed by.
    ValueError for a name or rules that a file's note cannot hold: no resume would know them."""
    for text in (name, rules or ""):
        if not _is_name(text):
            raise ValueError(f"a metric's name and rules must be printable texts of at most 100 "
                             f"characters, not {text!r}")
    found = {"name": name, "value": float(value), "tie": None if tie is None else float(tie),
             "rules": rules}
    return {key: part for key, part in found.items() if part is not None}


def better(value: float, best: float | None, mode: str = "max") -> bool:
    """Strictly better; a NaN never is, and anything beats a NaN or None."""
    if best is None or math.isnan(best):
        return not math.isnan(value)
    return value > best if mode == "max" else value < best


def abandoned_name(best: Candidate) -> Path:
    """Another name for the Candidate `best`, best.pt of a line that was left."""
    run, counter = best.facts["run"], best.facts["save_counter"]
    return best.path.with_name(f"abandoned_best_{run or 'run'}_{counter}.pt")


def tolerant(say: Callable[..., Any], faults: Any = Exception) -> Callable[..., Any]:
    """`say` without what it raises: a closed or narrow terminal stops no save."""
    def said(*arguments, **options):
        # a broken pipe, a closed stream, an ASCII console, a tracker of experiments that has ended
        with contextlib.suppress(faults):
            return say(*arguments, **options)
    return said


@contextlib.contextmanager
def _tolerant_prints():
    """Inside, a print that its terminal, pipe or file does not take is dropped: a Ctrl-C ends
    `| tee` too, and the next print would end the loop before its save."""
    streams = {s for s in (sys.stdout, sys.stderr)
               if isinstance(s, io.TextIOWrapper) and "write" not in vars(s)}
    for stream in streams:
        stream.write, stream.flush = (tolerant(act, OSError)
                                      for act in (stream.write, stream.flush))
    try:
        yield
    finally:
        for stream in streams:
            del stream.write, stream.flush
            try:
                if not stream.closed:
                    stream.flush()
            except OSError:                 # once more at the end it would change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _check_progress(state, needed):
    """Raise TypeError for a state that no resume could take."""
    for key in needed:
        if key not in state:
            raise IncompleteState(f"the state has no {key!r}: a resume goes on from its epoch "
                                  f"(they count from 1) and batch")
    for key in PROGRESS:
        value = state.get(key, 0)
        if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise TypeError(f"[{key!r}] must be a whole number, 0 or more, not {value!r}: no "
                            f"resume could take this file")


def _free_name(path):
    others = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], others) if not os.path.lexists(free))


def links_work(directory: str | os.PathLike) -> bool:
    """Whether a file of `directory` can have two names. Raises OSError where it takes no file."""
    with _temp(Path(directory, "probe")) as probe, _temp(probe) as other:
        # where the directory takes no file at all this raises
        os.close(_open_above_streams(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        try:
            os.link(probe, other)
            return True
        except OSError:
            return False


# ---- a directory held by one process ----

class Lock(contextlib.AbstractContextManager):
    """A directory held by this process: until `close`, or until its death. Nothing forked from it
    holds on."""

    held: set["Lock"] = set()               # the open ones of this process

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path
        self.directory = os.stat(path.parent)
        self.held.add(self)

    def is_at(self, directory: str | os.PathLike) -> bool:
        """Whether `directory` is the one that was locked, also where its lock file was deleted, or
        it was and is made again. FileNotFoundError where it is gone."""
        there = os.stat(directory)
        try:
            return os.path.samestat(os.lstat(Path(directory, self.path.name)), os.fstat(self.fd))
        except FileNotFoundError:
            deleted = not os.fstat(self.fd).st_nlink and there.st_dev == self.directory.st_dev
            return deleted or os.path.samestat(there, self.directory)

    def close(self) -> None:
        if self not in self.held:
            return
        with contextlib.suppress(OSError):  # a file system without locks: nothing to give back
            # closing alone would leave it to a child that has the descriptor
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        self.held.discard(self)             # an interrupt before it lets a second call unlock
        with contextlib.suppress(OSError):  # a network disk may say only now what it refused
            os.close(self.fd)

    @classmethod
    def leave_to_parent(cls) -> None:
        """In a forked child: close the descriptors without unlocking, which would take the lock
        from the parent too."""
        for lock in cls.held:
            os.close(lock.fd)
        cls.held.clear()

    def __exit__(self, *exception):
        self.close()


os.register_at_fork(after_in_child=Lock.leave_to_parent)


def lock(directory: str | os.PathLike, say: Callable[[str], object] = print) -> Lock:
    """Hold `directory` for this process; returns a Lock with `close`. Raises InUse where another
    process does."""
    path = Path(directory, ".lock").absolute()
    fd = _open_above_streams(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file: move it away", str(path))
        _take(fd, directory, say)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return Lock(fd, path)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError) and not isinstance(error, InUse):
            error.filename = str(path)      # a full disk names no file
        raise


def _take(fd, directory, say):
    for _ in range(10):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)                # `ls` holds it for an instant
        except OSError as error:
            say(f"checkpoints: {directory} cannot be locked ({error.strerror}): "
                f"see to it that one process writes here")
            return
    named = re.fullmatch(rb"process (\d+) on (\S+)\s*", os.pread(fd, 200, 0))
    raise InUse(directory, (int(named[1]), named[2].decode(errors="replace")) if named else None)


# ---- command line ----

COMMANDS = {            # name -> (module beside this file, what it does)
    "ls": ("run.listing", "each file, its health, what a resume takes; several runs: a line each"),
    "verify": ("", "exit 1, naming the file, where any .pt below is damaged"),
    "clean": ("run.listing", "what no resume needs; removed only with --yes"),
    "strip": ("run.share", "the weights of SRC alone, to DST, with a model card"),
    "average": ("run.share", "the mean of the weights of several checkpoints, to --out"),
}


def files_below(path: str | os.PathLike) -> list[Path]:
    """Every .pt at or below `path`, links followed, each folder once; and the folders that cannot
    be listed: they may hold some."""
    if not os.path.isdir(path):
        return [Path(path)]
    closed: list[OSError] = []
    found = [Path(folder, name) for folder, names in folders_below(path, closed.append)
             for name in sorted(names) if name.endswith(".pt")]
    return found + [Path(error.filename) for error in closed]


def folders_below(path: str | os.PathLike, onerror: Callable[[OSError], object] | None = None
                  ) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) at and below `path`, links followed, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(str(path), followlinks=True, onerror=onerror):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders.sort()
        yield folder, files


def health(path: str | os.PathLike) -> str:
    """"ok", or what is wrong; "gone" where a run has rotated it away meanwhile."""
    try:
        verify(path)
        return "ok"
    except CorruptCheckpoint as damage:
        return f"{'FOREIGN' if damage.foreign else 'DAMAGED'}: {reason_of(damage)}"
    except (OSError, MemoryError) as error:
        why = reason_of(error) or "out of memory"
        return f"UNREADABLE: {why}" if os.path.lexists(path) else "gone"


def _verify_all(paths):
    states = []
    for path in paths:
        for file in files_below(path):
            found = health(file)
            if found != "gone":
                states.append(found.split(":")[0])
                print(f"{file}: {found}")
    if not states:
        print(f"no .pt file in {' '.join(map(str, paths))}", file=sys.stderr)
    return 0 if states and {"ok", "FOREIGN"}.issuperset(states) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(__doc__ or "").split("\n")[0],         # without texts under python -OO
        epilog="\n".join(f"{name:<8} {what}" for name, (_, what) in COMMANDS.items()))
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="file, run directory, or a folder of runs")
    parser.add_argument("-v", "--verbose", action="store_true", help="ls: every file of every run")
    parser.add_argument("--yes", action="store_true", help="clean: remove, do not only list")
    parser.add_argument("--out", metavar="FILE", help="average: the file to write")
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # a name that the console lacks
    try:
        for path in args.paths[:1 if args.command == "strip" else None]:
            if not os.path.lexists(path):
                raise FileNotFoundError(errno.ENOENT, "no such file or directory", path)
        module, _ = COMMANDS[args.command]
        code = _elsewhere(module).command(args) if module else _verify_all(args.paths)
        print(end="", flush=True)
        return code
    except CorruptCheckpoint as damage:
        print(damage, file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"checkpoint.py: out of memory: nothing was touched: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:             # nobody reads on, as in `ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("checkpoint.py: interrupted: no file is half written", file=sys.stderr)
        return 128 + signal.SIGINT
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        print(f"checkpoint.py: {where}{getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2


def _elsewhere(module):
    """The module of Holdfast that does what this file alone does not."""
    # beside a copied file, an import could run a run.py of the user's own
    file = f"{module.replace('.', '/')}.py"
    if not (Path(__file__).resolve().parent / file).is_file():
        raise ValueError(f"this command needs {file} of Holdfast beside checkpoint.py; verify "
                         f"works without it")
    return importlib.import_module(module)


if __name__ == "__main__":
    sys.modules.setdefault("checkpoint", sys.modules[__name__])     # what run/ imports is this file
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
