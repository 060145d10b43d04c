"""Checkpoints that survive: durable saves, damage found before it is believed, exact resumes.

    python checkpoint.py ls results/            every run: files, health, what a resume takes
    python checkpoint.py verify FILE_OR_DIR     exit 1 and the file's name on any damage
    python checkpoint.py clean results/ [--yes] what no resume needs; removed only with --yes
    python checkpoint.py strip best.pt [DST]    the weights alone, to share, with a model card
    python checkpoint.py average A.pt B.pt --out FILE       the mean of their weights

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
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import random
import re
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
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch

TEMP = re.compile(r"\..+\.(\d+)(?:@([\w-]+))?\.\d+\.tmp")     # .NAME.PID@HOST.SERIAL.tmp
ABANDONED = 3600.0              # seconds after which a temp of another host counts as dead
PROGRESS = ("epoch", "batch", "global_step", "save_counter")
# alignment of O_DIRECT writes, and bytes of one: pieces of 4 MB took 1.2 times as long
PAGE, CHUNK = 4096, 32 << 20
# bytes that the second copy reads and writes at a time, and seconds that it rests after them
PIECE, PAUSE = 4 << 20, 0.005
# assumed mean time between failures for the Young/Daly advice: one Modal time limit
MTBF_HOURS = 24.0
# zip comment: MAGIC, SHA-256 of all bytes that are not tensor data, CRC-32 of the JSON, JSON
MAGIC = b"holdfast1 "
MIRROR_NOTE = ".mirror.json"    # in a run's directory: where its second copy lies
MIRROR_WAIT = 20.0              # seconds that a run which ends waits for its second copy
# seconds that a resume waits for a disk or a network that does not answer
READ_PATIENCE = 30.0
# what an OSError says of the path itself: a resume passes such a file, as it does a damaged one
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
           errno.EACCES, errno.EPERM, errno.ENXIO, errno.EROFS, errno.ENAMETOOLONG}
# what a place says that knows no fsync or no rename
UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_serial = itertools.count()


class CorruptCheckpoint(Exception):
    """The file is damaged, or is no checkpoint that can be loaded without running code. The message
    names file and damage."""


class InUse(OSError):
    """Another live process holds this run directory."""


class Overtaken(Exception):
    """The image in memory is that of a newer save."""


class SaveFailed(OSError):
    """Saves failed for as long as the patience lasts: going on would risk ever more work."""


class IncompleteState(TypeError, KeyError):
    """The state lacks its place in the training: no resume could go on from it."""

    __str__ = TypeError.__str__             # a KeyError shows its message in quotes


# ---- the file: a stored zip laid out by hand; a snapshot is one memcpy, no byte unaccounted ----

_STORAGE = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage}

# dtypes without a storage class of their own: their records are plain bytes
_UNTYPED = ("uint16", "uint32", "uint64", "complex32", "float8_e5m2", "float8_e4m3fn",
            "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
            "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
_DTYPES = {*_STORAGE, *(getattr(torch, name) for name in _UNTYPED if hasattr(torch, name))}

_PLAIN = {type(None), bool, int, float, complex, str, bytes,
          torch.dtype, torch.device, torch.Size}

# what `weights_only` reads back at most: (how it is measured, the most, in words)
_LIMITS = {
    int: (int.bit_length, 2039, "an int of more than 2039 bits"),
    str: (len, 1 << 28, "a string of more than 268 million characters"),
    bytes: (lambda raw: len(raw) or math.inf, 1 << 28, "empty, or more than 268 million, bytes"),
    torch.dtype: (lambda dtype: dtype not in _DTYPES, False, "a dtype")}


class _Record:
    """The bytes of one tensor in the file, or of several whose memory overlaps."""

    def __init__(self, number, dtype, device):
        self.number = number
        self.dtype = dtype                  # None: views of several dtypes share the bytes
        self.device = device
        self.nbytes = 0

    def identity(self):
        """torch.save's name of a storage: what its unpickler is to read, from where, how much."""
        if self.dtype in _STORAGE:
            size = self.nbytes // self.dtype.itemsize
            return "storage", _STORAGE[self.dtype], str(self.number), "cpu", size
        return "storage", torch.UntypedStorage, str(self.number), "cpu", self.nbytes


class _Slot:
    """Stands for one tensor in the frozen state: from which byte of which record, seen how."""

    __slots__ = ("tensor", "device", "place", "end", "numel", "span", "record", "offset",
                 "dtype", "shape", "strides", "grad", "parameter", "bits")

    def __init__(self, tensor):
        self.tensor = tensor                # until its memory is copied
        self.device = tensor.device
        self.place = tensor.data_ptr()
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.strides = tensor.stride()
        self.numel = tensor.numel()
        self.grad = tensor.requires_grad
        self.parameter = type(tensor) is torch.nn.Parameter
        self.bits = None                    # conjugated or negated as it is read
        if tensor.is_conj() or tensor.is_neg():
            self.bits = torch._utils.get_tensor_metadata(tensor)
        # elements of memory from the first one shown to the last
        self.span = self.numel
        if self.numel and not tensor.is_contiguous():
            self.span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        self.end = self.place + self.span * self.dtype.itemsize

    @property
    def view(self):
        return self.place, self.dtype, self.shape, self.strides, str(self.bits)

    def reduce(self):
        """As torch.save pickles a Parameter or a tensor."""
        if self.parameter:
            data = _Data(self)
            return torch._utils._rebuild_parameter, (data, self.grad, OrderedDict())
        return self.rebuilt(self.grad)

    def rebuilt(self, grad):
        start = self.offset // self.dtype.itemsize
        facts = (_Bytes(self.record), start, self.shape, self.strides, grad, OrderedDict())
        bits = (self.bits,) if self.bits else ()
        if self.record.dtype in _STORAGE:
            return torch._utils._rebuild_tensor_v2, facts + bits
        return torch._utils._rebuild_tensor_v3, facts + (self.dtype,) + bits


class _Data:
    """The tensor under a Parameter."""

    def __init__(self, slot):
        self.slot = slot

    def reduce(self):
        return self.slot.rebuilt(False)


class _Bytes:
    """A record where it is mentioned in the pickle."""

    def __init__(self, record):
        self.record = record


class _Pickler(pickle.Pickler):
    """torch.save's pickle format (persistent ids name the storages), slots in place of tensors."""

    dispatch_table = {_Slot: _Slot.reduce, _Data: _Data.reduce}

    def persistent_id(self, obj):
        if type(obj) is _Bytes:
            return obj.record.identity()
        return None


class _Frozen:
    """A copy of the state's containers (`tree`) with a slot for every tensor, and what to copy.

    records   in the order in which the state names them
    copies    [(tensor, record, offset, dtype, shape)]: these elements go there, contiguous

    Tensors keep strides, requires_grad, being a Parameter, and ties: those whose memory overlaps
    share a record, and what is one object stays one. A view with gaps that overlaps no other keeps
    only the elements it shows. NumPy scalars become Python numbers, NumPy arrays tensors; hooks
    and attributes set on a tensor are not kept. Raises TypeError, naming the key, for anything
    that `weights_only=True` would refuse: a file that cannot be loaded must never be written."""

    def __init__(self, state):
        self.slots = []
        self.memo = {}                      # id of a container or tensor -> its copy or slot
        if type(state) not in (dict, OrderedDict):
            raise TypeError(f"a state must be a dict, not {type(state).__qualname__}")
        try:
            self.tree = self._inside("state", state)
        except RecursionError:
            raise TypeError("['state'] is nested too deep") from None
        self.records, self.copies = _grouped(self.slots)

    def _inside(self, key, value):
        try:
            return self._walk(value)
        except (TypeError, ValueError) as error:
            # the path to the culprit grows on the way out, at no cost before
            raise TypeError(f"[{key!r}]{error}") from None

    def _walk(self, value):
        kind = type(value)
        if kind in _PLAIN:
            return _bounded(kind, value)
        if id(value) not in self.memo:
            self.memo[id(value)] = self._copy(kind, value)
        return self.memo[id(value)]

    def _copy(self, kind, value):
        if isinstance(value, torch.Tensor):
            return self._slot(kind, value)
        if kind is dict or kind is OrderedDict:
            return self._dict(kind, value)
        if kind in (list, tuple, set):
            if _all_plain(value):
                return kind(value)
            if kind is not list:
                return kind(self._inside(i, item) for i, item in enumerate(value))
            copy = self.memo[id(value)] = []                                # it may hold itself
            copy.extend(self._inside(i, item) for i, item in enumerate(value))
            return copy
        if kind.__module__ == "numpy" and hasattr(value, "ndim"):
            return self._numpy(value)
        raise TypeError(f" is a {kind.__module__}.{kind.__qualname__}: weights_only loading would "
                        f"refuse it; store plain numbers, strings, lists, dicts or tensors")

    def _dict(self, kind, value):
        copy = self.memo[id(value)] = kind()
        for key, item in value.items():
            if type(key) not in _PLAIN or type(key) in _LIMITS:
                key = self._inside(key, key)
            copy[key] = self._inside(key, item)
        if kind is OrderedDict:
            vars(copy).update(self._walk(vars(value)))      # a state_dict's _metadata: versions
        return copy

    def _numpy(self, value):
        if value.ndim:
            # a copy of its own: negative strides and read-only memory are nothing for torch
            return self._slot(torch.Tensor, torch.as_tensor(value.copy(), device="cpu"))
        number = value.item()
        if type(number) not in _PLAIN or value.dtype.kind in "mM":          # times become ints
            raise TypeError(f" is a NumPy {value.dtype}, which no Python number holds")
        return _bounded(type(number), number)

    def _slot(self, kind, value):
        if kind not in (torch.Tensor, torch.nn.Parameter):
            advice = "store .as_subclass(torch.Tensor)"
            if hasattr(value, "full_tensor"):
                # its parts lie in several processes: only the caller knows when all are here
                advice = "store .full_tensor(), called in every process at once"
            raise TypeError(f" is a tensor of type {kind.__module__}.{kind.__qualname__}: {advice}")
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested
        if not plain or value.is_meta:
            raise TypeError(f": only dense tensors can be saved, not {value.layout} "
                            f"on {value.device}")
        if value.dtype not in _DTYPES:
            raise TypeError(f" is a tensor of {value.dtype}, which weights_only does not read back")
        try:
            slot = _Slot(value)
        except RuntimeError as error:       # a tensor inside vmap or grad
            raise TypeError(f" has no memory of its own: {error}") from None
        if slot.span and not slot.place:
            raise TypeError(" has no memory: its storage was freed")
        self.slots.append(slot)
        return slot


def _bounded(kind, value):
    if kind in _LIMITS:
        measure, most, words = _LIMITS[kind]
        if measure(value) > most:
            raise TypeError(f" is {words}, which weights_only loading does not read back")
    return value


def _all_plain(items):
    """Whether all are plain values of one type: millions of numbers are judged in one pass."""
    kinds = set(map(type, items))
    if len(kinds) != 1 or not kinds <= _PLAIN:
        return False
    kind, = kinds
    if kind not in _LIMITS:
        return True
    measure, most, _ = _LIMITS[kind]
    return max(map(measure, items)) <= most


def _grouped(slots):
    """Give every slot its record, offset and strides; returns (records, copies) as in _Frozen."""
    # the same state gives the same bytes wherever it lies: records are numbered as it names them
    number = {slot: i for i, slot in enumerate(slots)}
    groups = [sorted(group, key=number.get) for group in _overlapping(slots)]
    groups.sort(key=lambda group: number[group[0]])
    records, copies = [], []
    for group in groups:
        first = group[0]
        alike = len(group) == 1 or len({slot.view for slot in group}) == 1
        dtypes = {slot.dtype for slot in group}
        record = _Record(len(records), first.dtype if len(dtypes) == 1 else None, first.device)
        records.append(record)
        if alike and (first.span > first.numel or first.tensor.is_contiguous()):
            copies += _alone(group, record)
        else:
            copies += _together(group, record)
    return records, copies


def _overlapping(slots):
    """Lists of slots whose stretches of memory overlap, most of them of one."""
    def place(slot):
        return slot.device.type, slot.device.index or 0, slot.place
    group, end, where = None, 0, None
    for slot in sorted(slots, key=place):
        if slot.span and slot.place < end and slot.device == where:
            group.append(slot)
            end = max(end, slot.end)
            continue
        if group:
            yield group
        group, end, where = [slot], slot.end, slot.device
    if group:
        yield group


def _alone(group, record):
    """The elements shown, one after the other; a view with gaps has other strides from here on."""
    first = group[0]
    record.nbytes = first.numel * first.dtype.itemsize
    for slot in group:
        slot.record, slot.offset = record, 0
        if slot.span > slot.numel:
            sizes = reversed(slot.shape[1:])
            slot.strides = tuple(itertools.accumulate(sizes, int.__mul__, initial=1))[::-1]
    return [(_raw(first), record, 0, first.dtype, first.shape)]


def _together(group, record):
    """The whole stretch of memory that the views of a group lie in, as it is."""
    start = min(slot.place for slot in group)
    if record.dtype is None:
        start -= start % 16                 # offsets count in elements of each dtype
    copies, covered = [], start
    for slot in sorted(group, key=lambda slot: (slot.place, -slot.end)):
        slot.record, slot.offset = record, slot.place - start
        if slot.offset % slot.dtype.itemsize:
            raise TypeError(f"['state'] holds overlapping tensors of {slot.dtype} that do not "
                            f"begin at the same multiple of its size: store a clone of one")
        if slot.end > covered:
            flat = _raw(slot).as_strided((slot.span,), (1,))
            copies.append((flat, record, slot.offset, slot.dtype, (slot.span,)))
            covered = slot.end
    record.nbytes = covered - start
    return copies


def _raw(slot):
    """The tensor as its memory holds it, neither conjugated nor negated on the way out."""
    tensor = slot.tensor
    if slot.bits is None:
        return tensor
    if tensor.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def _local(name, size, crc, offset):
    """Local zip header for a stored record at `offset`, padded: its data begin at a multiple of
    64."""
    big = b""
    if size >= 0xFFFFFFFF:
        big = struct.pack("<HHQQ", 1, 16, size, size)
    pad = -(offset + 30 + len(name) + len(big) + 4) % 64
    extra = big + struct.pack("<HH", 0x4246, pad) + b"Z" * pad              # 'FB', torch's own tag
    version = 45 if big else 20
    small = min(size, 0xFFFFFFFF)
    fixed = struct.pack("<4s5H3L2H", b"PK\3\4", version, 0x800, 0, 0, 0x21, crc, small, small,
                        len(name), len(extra))
    return fixed + name + extra


def _directory(records, offset):
    """Central directory and end records, from `offset` on, of [(name, size, crc, header
    offset)]."""
    out = io.BytesIO()
    for name, size, crc, at in records:
        big, version, small, short = b"", 20, size, at
        if max(size, at) >= 0xFFFFFFFF:
            big = struct.pack("<HH3Q", 1, 24, size, size, at)
            version, small, short = 45, 0xFFFFFFFF, 0xFFFFFFFF
        out.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", version, version, 0x800, 0, 0, 0x21, crc,
                              small, small, len(name), len(big), 0, 0, 0, 0, short))
        out.write(name + big)
    size, count = out.tell(), len(records)
    if offset + size >= 0xFFFFFFFF or count >= 0xFFFF:
        fields = (44, 45, 45, 0, 0, count, count, size, offset)
        out.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", *fields))
        out.write(struct.pack("<4sLQL", b"PK\6\7", 0, offset + size, 1))
    few = min(count, 0xFFFF)
    out.write(struct.pack("<4s4H2L", b"PK\5\6", 0, 0, few, few,
                          min(size, 0xFFFFFFFF), min(offset, 0xFFFFFFFF)))
    return out.getvalue()


class _Image:
    """One checkpoint file in memory, tensors already at their final offsets in a kept buffer.

    `fill` is the only thing training waits for. CUDA tensors are cloned on the GPU in stream order
    (the next optimizer step may change them at once); the clone goes to pinned memory from a side
    stream. The buffer begins at a page, as direct writes need it."""

    def __init__(self, say=print):
        self.say = say
        self.said = set()
        self.fills = 0
        self.tail = None                    # what `file` put behind the tensors
        self.buffer = None
        self.staging = None
        self.layout = None                  # of what the buffer is laid out for
        self.copied = None                  # the event that ends the copy from the GPU
        self.sound = set()                  # names of weights that were finite once
        self.masks = set()                  # names of tensors that held infinities from the start

    def fill(self, state):
        """Copy the state's values of this moment. TypeError for what could not be loaded again."""
        self.fills += 1
        # a save that failed before it waited for its copy must not have the next one overtake it
        self._await_copy()
        # what is allocated here is used outside of the caller's inference_mode too
        with torch.inference_mode(False), torch.no_grad():
            frozen = _Frozen(state)
            self.tree = frozen.tree
            self.records = frozen.records
            sizes = [(record.nbytes, record.device) for record in self.records]
            copies = [(record.number, offset, dtype, shape)
                      for _, record, offset, dtype, shape in frozen.copies]
            if self.layout != (sizes, copies):
                self._place(sizes, copies)
            on_gpu, on_cpu = [], []
            for tensor, *_ in frozen.copies:
                (on_gpu if tensor.is_cuda else on_cpu).append(tensor)
            if on_gpu:
                self._fill_from_gpu(on_gpu)
            if on_cpu:
                torch._foreach_copy_(self.views, on_cpu)
        for slot in frozen.slots:
            slot.tensor = None              # the caller's memory is the caller's again
        return self

    def _place(self, sizes, copies):
        """Offsets for every record, CUDA tensors first: they arrive as one block."""
        self.layout = None                  # until all of it is there: memory may run out below
        gpu = [record.number for record in self.records if record.device.type == "cuda"]
        rest = [record.number for record in self.records if record.device.type != "cuda"]
        self.order = gpu + rest
        self.at, end, self.gpu_end = {}, 0, 0
        for number in self.order:
            nbytes = self.records[number].nbytes
            header = len(_local(_data_name(number), nbytes, 0, end))
            self.at[number] = end, end + header
            end += header + nbytes
            if number in gpu[-1:]:
                self.gpu_end = end
        self.end = end
        # free before taking more
        self.views = self.clones = self.staging = None
        if self.buffer is None or self.buffer.numel() < end:
            self.buffer = None
            room = self._room(end + end // 16 + PAGE)
            self.buffer = room[-room.data_ptr() % PAGE:]
        for record in self.records:
            if record.dtype is None:        # it may begin with bytes that no tensor shows
                at = self.at[record.number][1]
                self.buffer[at:at + record.nbytes].zero_()
        on_gpu = set(gpu)
        self.views = self._views(self.buffer, [c for c in copies if c[0] not in on_gpu])
        if gpu:
            self._stage(self.records[gpu[0]].device, [c for c in copies if c[0] in on_gpu])
        self.layout = sizes, copies

    def _room(self, size):
        """Memory on the CPU, page-locked where a GPU is to write into it."""
        if self.gpu_end:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:   # WSL2 and small limits of locked memory
                self._say_once(f"no page-locked memory ({str(error).splitlines()[0]}): "
                               f"copies from the GPU take longer")
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def _stage(self, device, copies):
        """Room on the GPU for the clone; without it training waits for the copy to the CPU."""
        self.side = torch.cuda.Stream(device)
        try:
            self.staging = torch.empty(self.gpu_end, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            room = f"{self.gpu_end / 1e6:.0f} MB"
            self._say_once(f"no {room} free on the GPU for a clone of the state: "
                           f"training waits for its copy to the CPU instead")
        target = self.buffer if self.staging is None else self.staging
        self.clones = self._views(target, copies)

    def _say_once(self, line):
        if line not in self.said:
            self.said.add(line)
            self.say(f"checkpoints: {line}")

    def _views(self, buffer, copies):
        """The places of `copies`, [(record number, offset, dtype, shape)], in `buffer`."""
        views = []
        for number, offset, dtype, shape in copies:
            at = self.at[number][1] + offset
            size = math.prod(shape) * dtype.itemsize
            views.append(buffer[at:at + size].view(dtype).view(shape))
        return views

    def _fill_from_gpu(self, tensors):
        device = self.side.device
        with torch.cuda.device(device):
            torch._foreach_copy_(self.clones, tensors)
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
            self.copied.synchronize()
            self.copied = None

    def weights(self, entry):
        """{record number: [(name, slot)]} of the tensors in the state's dict `entry`."""
        found = {}
        tensors = self.tree.get(entry)
        if isinstance(tensors, dict):
            for name, slot in tensors.items():
                if isinstance(slot, _Slot):
                    found.setdefault(slot.record.number, []).append((name, slot))
        return found

    def refuse_nonfinite(self, weights):
        """Raise OSError (EDOM) where one of `weights`, [(name, slot)], holds a NaN or an infinity.

        A tensor that held infinities, and no NaN, when it was first seen is a mask, not a
        weight."""
        self._await_copy()
        for name, slot in weights:
            if name in self.masks or not slot.numel:
                continue
            at = self.at[slot.record.number][1]
            record = self.buffer[at:at + slot.record.nbytes]
            values = record[slot.offset:].view(slot.dtype).as_strided(slot.shape, slot.strides)
            if _finite(values):
                self.sound.add(name)
            elif name in self.sound or slot.parameter or _widened(values).isnan().any():
                raise OSError(errno.EDOM, f"weights are not finite ({name}): "
                                          f"not written over good files")
            else:
                self.masks.add(name)
                self.say(f"checkpoints: {name} holds infinities from the start: taken for a mask")

    def file(self, finite=""):
        """Yield the file from front to back as buffers, all but the last two whole pages.

        Runs in the writer. Pickle, headers and checksums come around the tensors here; the
        checksums keep ahead of the disk. Raises OSError (EDOM) where a tensor of the state's entry
        `finite` holds a NaN or an infinity."""
        self._await_copy()
        whole = self._memory()
        ends = [self.at[number][1] + self.records[number].nbytes for number in self.order]
        data = [whole[self.at[number][1]:end] for number, end in zip(self.order, ends)]
        weights = self.weights(finite)

        def checksum(number, values):
            self.refuse_nonfinite(weights.get(number, ()))
            return zlib.crc32(values)

        entries, digest, done = [], hashlib.sha256(), 0
        for number, values, end, crc in zip(self.order, data, ends,
                                            _ahead(checksum, self.order, data)):
            header, start = self.at[number]
            entries.append((_data_name(number), len(values), crc, header))
            whole[header:start] = _local(*entries[-1])
            digest.update(whole[header:start])
            ready = end // PAGE * PAGE
            # small pieces at first: the disk begins at once
            if ready - done >= min(CHUNK, max(CHUNK // 8, done)):
                yield whole[done:ready]
                done = ready
        yield whole[done:self.end // PAGE * PAGE]
        yield whole[self.end // PAGE * PAGE:]
        self.tail = self._tail(entries, digest)
        yield self.tail

    def reader(self):
        """A generator function of what `file` has made, out of memory; Overtaken once `fill` begins
        anew, which waits for no reader."""
        fills, tail, whole = self.fills, self.tail, self._memory()
        pages = len(whole) // PAGE * PAGE
        begins = [*range(0, pages, CHUNK), pages, len(whole)]

        def pieces():
            for begin, end in itertools.pairwise(begins):
                yield whole[begin:end]
                if self.fills != fills:     # it may have changed while it was written
                    raise Overtaken
            yield tail
        return pieces

    def _memory(self):
        memory = (ctypes.c_char * self.end).from_address(self.buffer.data_ptr())
        memory.owner = self.buffer          # the view must outlive this image
        return memoryview(memory).cast("B")

    def _tail(self, entries, digest):
        """What follows the tensors: the pickle, the zip directory and our comment."""
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(self.tree)
        plain = {b"data.pkl": pickled.getvalue(),
                 b"byteorder": sys.byteorder.encode(),
                 b"version": b"3\n"}
        tail = io.BytesIO()
        for name, values in plain.items():
            at = self.end + tail.tell()
            entries.append((b"archive/" + name, len(values), zlib.crc32(values), at))
            tail.write(_local(*entries[-1]) + values)
        tail.write(_directory(entries, self.end + tail.tell()))
        note = json.dumps(_facts(self.tree)).encode()
        # the zip end record ends with the length of the comment, which this is
        tail.write(struct.pack("<H", len(MAGIC) + 64 + 10 + len(note)))
        digest.update(tail.getvalue() + note)
        tail.write(MAGIC + digest.hexdigest().encode() + b" %08x " % zlib.crc32(note) + note)
        return tail.getvalue()


def _data_name(number):
    return f"archive/data/{number}".encode()


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
    facts = {}
    for key in PROGRESS:
        if key in state:
            facts[key] = state[key] if type(state[key]) is int else None
    ours = state["holdfast"] if "holdfast" in state else None
    if not isinstance(ours, dict):
        ours = state                        # a note, or a file that another writer made
    for key in ("kind", "run"):
        if key in ours and _is_name(ours[key]):
            facts[key] = ours[key]
    metric = ours["metric"] if "metric" in ours else None
    if type(metric) is dict and _is_name(metric.get("name")):
        value = metric.get("value")
        if type(value) is float or type(value) is int and abs(value) < 2**53:
            facts["metric"] = {"name": metric["name"], "value": value}
            if type(metric.get("tie")) is float:
                facts["metric"]["tie"] = metric["tie"]
    return facts


def _position(facts):
    """(epoch in progress, batches trained in it) where a resume goes on, or None."""
    epoch, batch = facts.get("epoch"), facts.get("batch")
    if epoch is None:
        return None
    if facts.get("kind") == "epoch":
        return epoch + 1, 0
    return None if batch is None else (epoch, batch)


def _is_name(value):
    """Whether it is a short string that can be printed: a comment is limited, a terminal harmed."""
    return type(value) is str and len(value) <= 100 and value.isprintable()


def _ahead(function, *items):
    """map(function, *items), computed in a thread while the results before are used."""
    with ThreadPoolExecutor(1, "checkpoint checksums") as pool:
        try:
            results = pool.map(function, *items)
        except RuntimeError:                # the interpreter is about to exit and starts no thread
            results = map(function, *items)
        yield from results


# ---- writing ----

def atomic_save(state, path):
    """Write the dict `state` to `path`: it survives a power cut once this returns; all or nothing.

    Raises OSError (with its errno) when it cannot be written, TypeError for what `weights_only`
    loading would refuse; the temp file is gone then and every earlier file is as it was."""
    path = Path(path).absolute()
    image = _Image().fill(state)
    sweep_temps(path.parent)
    atomic_write(path, image.file())


def atomic_write(path, buffers):
    """Write the bytes-like `buffers` to `path`, durably, all or nothing; returns their size.

    Temp in the same directory, write, fsync, replace, fsync of the directory: nothing less is safe
    (Pillai et al., OSDI'14). A failed fsync is not retried: the kernel may call the lost pages
    clean (Rebello et al., ATC'20). Raises OSError."""
    path = Path(path).absolute()            # another thread may change the directory meanwhile
    temp, fd = _create(path)
    try:
        try:
            size = _write_all(fd, buffers)
            # before close: closing gives up the lock that marks this temp as alive
            _sync_and_replace(fd, temp, path)
        finally:
            _let_go(fd)
    except BaseException:
        _unlink(temp)
        raise
    _sync_directory(path.parent)
    return size


def durable_replace(temp, target):
    """`temp`, written by other hands and closed, becomes `target` of the same directory, durably.

    Raises OSError."""
    target = Path(target).absolute()
    fd = os.open(temp, os.O_RDONLY)
    try:
        _sync_and_replace(fd, temp, target)
    finally:
        os.close(fd)
    _sync_directory(target.parent)


def durable_link(source, target):
    """`target` becomes another name of `source`, in the same directory, durably. Raises OSError."""
    source, target = Path(source).absolute(), Path(target).absolute()
    temp = _temp(target)
    # a lock lies on a file, not on its name: taken on the source it marks the temp as alive
    fd = os.open(source, os.O_RDONLY)
    try:
        _lock_shared(fd)
        os.link(source, temp)
        # replacing one name of a file by another one of it does nothing: the temp is left then
        os.replace(temp, target)
    finally:
        _unlink(temp)
        _let_go(fd)
    _sync_directory(target.parent)


def _sync_and_replace(fd, temp, target):
    os.fsync(fd)
    os.replace(temp, target)


def _let_go(fd):
    """Unlock and close: closing alone would leave the lock to a child that was forked meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        pass                                # no locks here: nothing was taken
    finally:
        os.close(fd)


def _lock_shared(fd):
    for _ in range(20):
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:             # a sweep looks at it, for an instant
            time.sleep(0.01)
        except OSError:                     # no locks here: a sweep goes by host and process
            return


def write_json(path, value, indent=None):
    """Write `value` to `path` as JSON, durably, all or nothing. Raises OSError; ValueError for NaN,
    which JSON has not."""
    path = Path(path)
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    sweep_temps(path.parent)
    atomic_write(path, [text.encode()])


def read_json_lines(path, say=print):
    """Yield the dicts of a file with one JSON object a line; none where it is absent.

    A kill or a power cut may tear the last row: what cannot be read is named through `say` and left
    out."""
    try:
        file = open(path, errors="replace")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                say(f"{Path(path).name}: dropped a row that cannot be read: {line[:60].strip()!r}")
                continue
            yield row


def _temp(path):
    """A name beside `path` that says who writes it: .NAME.PID@HOST.SERIAL.tmp"""
    return path.parent / f".{path.name}.{os.getpid()}@{_host()}.{next(_serial)}.tmp"


def _host():
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:40]


def _create(path):
    """(temp beside `path`, its descriptor), locked.

    Any death frees the lock, which sweep_temps of any process asks for."""
    while True:
        temp = _temp(path)
        # the umask decides, unlike mkstemp's 0600
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return temp, fd
        except BlockingIOError:
            pass        # a sweep came between open and lock and takes it for dead: another one
        except OSError:
            return temp, fd                 # no locks here: a sweep goes by host and process
        except BaseException:
            os.close(fd)
            _unlink(temp)
            raise
        os.close(fd)
        _unlink(temp)


def _write_all(fd, buffers):
    """Whole pages bypass the page cache where the file system allows, up to the first odd buffer.

    That halves the interference with training, and keeps the EEG in the cache."""
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
        if error.errno not in UNKNOWN:
            raise
    finally:
        os.close(fd)


def _unlink(path):
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno != errno.ENOENT and path.exists():
            print(f"checkpoint: could not remove {path}: {error.strerror}", file=sys.stderr)


def sweep_temps(directory):
    """Remove the temp files of dead processes in `directory`; a live writer holds a lock on its
    own."""
    for temp in Path(directory).glob(".*.tmp"):
        if TEMP.fullmatch(temp.name):
            _dead(temp, remove=True)


def _dead(temp, remove=False):
    """Whether no live process writes `temp`.

    Removed under the lock: its writer, about to lock it too, then sees it gone."""
    try:
        # some network file systems lock only what is open for writing; a pipe or a link that
        # somebody named like a temp is none of ours
        fd = os.open(temp, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return False
        dead = _abandoned(fd, TEMP.fullmatch(temp.name), time.time() - info.st_mtime)
        if dead and remove:
            _unlink(temp)
        return dead
    finally:
        os.close(fd)


def _abandoned(fd, name, age):
    """By its lock; by its process where this host has no locks, by its age where another one
    wrote."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks = True
    except BlockingIOError:
        return False
    except OSError:
        locks = False
    process, host = name.groups()
    if host not in (None, _host()):
        return age > ABANDONED              # locks of one host may be unknown to another
    return locks or not Path("/proc", process).exists()


# ---- reading ----

def load(path, map_location="cpu"):
    """The dict in `path`, every byte checked before it is returned.

    Raises CorruptCheckpoint for any damage, OSError when it cannot be read."""
    return _checked(path, map_location)


def verify(path):
    """Load all of `path` and let go of it: refuses (CorruptCheckpoint) what `load` would refuse.

    Returns its size in bytes."""
    _checked(path, "cpu")
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
    """What reading `path` raises, as CorruptCheckpoint; OSError where the disk failed."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        # damage made us seek to nowhere
        if error.errno != errno.EINVAL:
            raise
        raise CorruptCheckpoint(f"{path}: misplaced records") from None
    except CorruptCheckpoint as damage:
        raise CorruptCheckpoint(f"{path}: {damage}") from None
    except pickle.UnpicklingError as refusal:
        code = re.search(r"GLOBAL (\S+)", str(refusal))
        what = f"it would run {code[1]}" if code else str(refusal).strip().split("\n")[0]
        raise CorruptCheckpoint(f"{path}: weights_only loading refuses it: {what}") from None
    except Exception as damage:
        # a damaged zip makes torch raise EOFError, RuntimeError, KeyError, struct.error ...
        what = f"{type(damage).__name__}: {damage}".split("\n")[0]
        raise CorruptCheckpoint(f"{path}: unreadable: {what}") from damage


def _checked(path, map_location):
    with _open(path) as file:
        before = os.fstat(file.fileno())
        with _damage(path):
            state = _read_state(file, map_location)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise OSError(errno.EAGAIN, "changed while it was read", str(path))
        return state


def _read_state(file, map_location):
    tensors, note = _check_structure(file)
    # damaged numbers harm nobody until this block is left
    with ThreadPoolExecutor(4) as pool:
        checks = [pool.submit(_check_tensor, file.fileno(), *record) for record in tensors]
        file.seek(0)
        state = torch.load(file, map_location=map_location, weights_only=True, mmap=False)
        for check in checks:
            check.result()
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"holds a {type(state).__name__}, not a checkpoint dict")
    # a choice among files believes the note: it may not say other than the state
    if note is not None and json.dumps(_facts(note)) != json.dumps(_facts(state)):
        raise CorruptCheckpoint("its progress record differs from its state")
    return state


def _check_structure(file):
    """(tensor records still to be checked, our note or None); every other byte is the one written.

    A record is (name, where its data begin, bytes, CRC-32). Of any other .pt every zip record is
    checked here. Raises CorruptCheckpoint."""
    size, tensors, comment = _layout(file)
    if not comment:
        return [], None
    digest, at = hashlib.sha256(), 0
    for _, begin, length, _ in tensors:
        digest.update(_read(file, at, begin - at))
        at = begin + length
    digest.update(_read(file, at, size - len(comment) - at))
    _check_digest(digest, comment)
    return tensors, _note(comment)


def _layout(file):
    """(bytes of the file, its tensor records in the order of the file, our comment).

    Of any other .pt (no records, b"") every zip record is checked here."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise CorruptCheckpoint("empty file")
    end, comment = _end_record(file, size)
    tensors = []
    if not comment:
        _check_foreign(file)
        return size, tensors, comment
    for name, length, crc, offset in _records(file, end, size):
        if name.startswith(b"archive/data/"):
            sizes = struct.unpack("<2H", _read(file, offset + 26, 4))
            tensors.append((name.decode(), offset + 30 + sum(sizes), length, crc))
    return size, tensors, comment


def _check_digest(digest, comment):
    digest.update(_note_bytes(comment))
    if digest.hexdigest().encode() != comment[len(MAGIC):len(MAGIC) + 64]:
        raise CorruptCheckpoint("headers, structure or plain values do not match their SHA-256")


def _check_tensor(fd, name, at, length, crc):
    found, buffer = 0, memoryview(bytearray(min(length, 1 << 20)))
    for start in range(at, at + length, 1 << 20):
        piece = buffer[:at + length - start]
        if os.preadv(fd, [piece], start) != len(piece):
            raise CorruptCheckpoint("truncated")
        found = zlib.crc32(piece, found)
    if found != crc:
        raise CorruptCheckpoint(f"tensor record {name} does not match its CRC-32")


def _read(file, at, length):
    if length < 0:
        raise CorruptCheckpoint("overlapping or misplaced records")
    # before Python reserves memory for a damaged length
    if at + length > os.fstat(file.fileno()).st_size:
        raise CorruptCheckpoint("truncated")
    file.seek(at)
    data = file.read(length)
    if len(data) != length:
        raise CorruptCheckpoint("truncated")
    return data


def _end_record(file, size):
    """((where the zip end record begins, its count, length and offset), our comment or b"")."""
    tail = _read(file, max(0, size - 66000), min(size, 66000))
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise CorruptCheckpoint("truncated: the zip end record is missing")
    fields, comment = struct.unpack("<4s4H2LH", tail[at:at + 22]), tail[at + 22:]
    if fields[-1] != len(comment) or (comment and not comment.startswith(MAGIC)):
        raise CorruptCheckpoint("the zip end record is damaged")
    return (size - len(tail) + at, *fields[4:7]), comment


def _note_bytes(comment):
    """The JSON of our comment, by its own CRC-32: it is believed before the file is read."""
    note = comment[len(MAGIC) + 74:]
    if comment[len(MAGIC) + 64:len(MAGIC) + 74] != b" %08x " % zlib.crc32(note):
        raise CorruptCheckpoint("its progress record is damaged")
    return note


def _note(comment):
    try:
        note = json.loads(_note_bytes(comment))
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict):
        raise CorruptCheckpoint("its progress record is no JSON object")
    return note


def _records(file, end, size):
    """[(name, size, crc, header offset)] of the central directory, in file order."""
    end_at, count, length, offset = end
    if offset == 0xFFFFFFFF or count == 0xFFFF:
        count, length, offset = struct.unpack("<3Q", _read(file, end_at - 20 - 24, 24))
    data, out, at = _read(file, offset, length), [], 0
    for _ in range(count):
        fields = struct.unpack_from("<4s6H3L5H2L", data, at)
        signature, method, header = fields[0], fields[4], fields[16]
        crc, packed, stored, names, extras, comments = fields[7:13]
        name = data[at + 46:at + 46 + names]
        if extras:
            packed, stored, header = struct.unpack_from("<3Q", data, at + 46 + names + 4)
        if signature != b"PK\1\2" or method or packed != stored:
            raise CorruptCheckpoint("the zip directory is damaged")
        if header + 30 + stored > size:
            raise CorruptCheckpoint("truncated")
        out.append((name, stored, crc, header))
        at += 46 + names + extras + comments
    if len({name for name, *_ in out}) != len(out):
        raise CorruptCheckpoint("two records have one name")
    return sorted(out, key=lambda record: record[3])


def _check_foreign(file):
    """A .pt of plain torch.save has only zip CRCs.

    Attribute bits that make a reader skip a record are refused too."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.external_attr or info.compress_type or info.is_dir():
                raise CorruptCheckpoint(f"record {info.filename} has damaged attributes")
        bad = archive.testzip()
        if bad:
            raise CorruptCheckpoint(f"record {bad} does not match its CRC-32")


def peek(path):
    """Progress of a checkpoint without reading it, as a dict.

    Its keys: epoch, batch, global_step, save_counter (ints), kind, run (or None), metric (a dict
    with name and value, or None), position (epoch in progress and batches trained in it, or None
    where no resume can go on from it), bytes. A few hundred bytes are read of a file written here;
    any other .pt is loaded. Raises CorruptCheckpoint or OSError."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            comment = _end_record(file, size)[1] if size else b""
            note = _note(comment) if comment else None
        except CorruptCheckpoint as damage:
            raise CorruptCheckpoint(f"{path}: {damage}") from None
    facts = _facts(_checked(path, "meta") if note is None else note)
    progress = {key: facts.get(key, 0) for key in PROGRESS}
    for key, value in progress.items():
        if value is None or not 0 <= value < 2**63:
            raise CorruptCheckpoint(f"{path}: its {key} is {value!r}, not a count")
    others = {key: facts.get(key) for key in ("kind", "run", "metric")}
    return {**progress, **others, "position": _position(facts), "bytes": size}


# ---- choosing and rotating: by what is stored inside, never by mtime or by the order of names ----

class Kind(NamedTuple):
    """One kind of checkpoint file. A state saved under several names is one file where links
    work."""

    name: str               # filled in from the state
    mirrored: int = 0       # newest files of it in the second copy
    spare: bool = False     # worth nothing once a later save is durable: `clean` removes it

    @property
    def glob(self):
        return re.sub(r"\{.*?\}", "*", self.name)


# of one save under two names a resume takes the upper; the best is its last resort
KINDS = {
    "mid_epoch": Kind("mid_epoch_{epoch:03d}_{batch:06d}.pt", mirrored=2, spare=True),
    "last": Kind("last.pt", mirrored=1),
    "checkpoint_epoch": Kind("checkpoint_epoch_{epoch:03d}.pt"),
    "best": Kind("best.pt", mirrored=1),
}
NAME = re.compile("|".join(f"(?P<{key}>{re.escape(kind.glob)})" for key, kind in KINDS.items())
                  .replace(r"\*", r"\d+"))


def checkpoints(directory):
    """Paths in `directory` that are named like a checkpoint, by name; none where it is absent."""
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(directory, name) for name in names if NAME.fullmatch(name)]


class _Candidate:
    """One checkpoint file with its progress, or the reason why no resume can take it."""

    def __init__(self, path, second=False):
        self.path = Path(path)
        self.second = second                # in the second copy's place
        self.label = str(path) if second else self.path.name
        named = NAME.fullmatch(self.path.name)
        self.kind = named and named.lastgroup
        self.facts = None
        self.damage = None
        self.fault = None   # an OSError that may pass: what the file holds is not known
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CorruptCheckpoint(f"{path}: not a regular file")
            self.facts = peek(path)
            if not self.facts["position"]:
                self.damage = "it names no epoch and batch to go on from"
        except (CorruptCheckpoint, OSError) as damage:
            self.damage = _reason(damage)
            if isinstance(damage, OSError) and damage.errno not in LASTING:
                self.fault = damage

    @property
    def order(self):
        """Newest save first: the counter only grows, also after a rollback; equal counters go by
        progress, then by kind."""
        f = self.facts
        rank = -list(KINDS).index(self.kind) if self.kind else -len(KINDS)
        return f["save_counter"], f["global_step"], f["epoch"], f["batch"], rank

    @property
    def save(self):
        return self.facts["run"], self.facts["save_counter"]

    def __str__(self):
        f = self.facts
        return (f"epoch {f['epoch']} batch {f['batch']} step {f['global_step']} "
                f"save {f['save_counter']}")


def candidates(directory, mirror=None):
    """Files of `directory` and of its second copy that a resume may take, furthest first, then the
    best, then what cannot be taken. Of equal saves the one at home comes first."""
    found = [_Candidate(path) for path in checkpoints(directory)]
    try:
        found += [_Candidate(path, second=True) for path in checkpoints(mirror)] if mirror else []
    except OSError:
        # nothing at home: what cannot be read may be all there is
        if all(c.damage for c in found):
            raise
    # a run at work rotates
    found = [c for c in found if c.facts or c.fault or os.path.lexists(c.path)]
    usable = sorted((c for c in found if not c.damage), key=lambda c: c.order, reverse=True)
    usable.sort(key=lambda c: c.kind == "best")
    return usable + [c for c in found if c.damage]


def _choose(directory, open_, say, patience=0.0, mirror=None):
    """(path, what open_ returned) of the latest save that open_ accepts, or (None, None); says why
    for each.

    A disk or a network that does not answer is no damage: for `patience` seconds it is asked again,
    then OSError."""
    ends = time.monotonic() + patience
    pause = 0.5
    while True:
        try:
            return _best_of(candidates(directory, mirror), open_, say)
        except OSError as error:
            if time.monotonic() >= ends:
                raise
            say(f"resume: {error.filename} cannot be read now ({error.strerror}): no damage, "
                f"trying again")
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def _best_of(found, open_, say):
    at_home = any(not c.damage and not c.second for c in found)
    for candidate in found:
        # it may be the latest of all; a second copy seldom is
        if candidate.fault and not (candidate.second and at_home):
            raise OSError(candidate.fault.errno, candidate.fault.strerror, str(candidate.path))
    chosen = None
    refused = [c for c in found if c.damage]
    for candidate in refused:
        say(f"resume: skipped {candidate.label}: {candidate.damage}")
    for candidate in found:
        if candidate in refused or (candidate.kind == "best" and chosen):
            continue
        if candidate.kind == "best" and not refused:
            say(f"resume: best.pt alone is no run to continue: --resume {candidate.path} would "
                f"start from it")
        elif chosen:
            same = candidate.facts["save_counter"] == chosen[2].facts["save_counter"]
            reason = "the same save" if same else "an earlier save"
            say(f"resume: older: {candidate.label}: {candidate}, {reason}")
        else:
            state = _accepted(candidate, open_, say)
            if state is None:
                refused.append(candidate)
                continue
            chosen = candidate.path, state, candidate
            why = "the latest save that passes every check"
            if candidate.kind == "best":
                why = "the last resort, since no later save passes every check"
            say(f"resume: chose {candidate.label}: {candidate}, {why}")
    return chosen[:2] if chosen else (None, None)


def _accepted(candidate, open_, say):
    """What open_ makes of the file, or None where it is damaged or gone."""
    try:
        return open_(candidate.path)
    except CorruptCheckpoint as damage:
        say(f"resume: skipped {candidate.label}: {_reason(damage)}")
    except OSError as error:
        if error.errno not in LASTING:
            raise OSError(error.errno, error.strerror, str(candidate.path)) from None
        say(f"resume: skipped {candidate.label}: {_reason(error)}")


def _reason(error):
    if isinstance(error, CorruptCheckpoint):
        return str(error).split(": ", 1)[-1]
    return error.strerror or str(error)


def find_resume(checkpoints_directory, say=print):
    """Path of the checkpoint to resume from, verified, or None. Prints each candidate and why it
    was taken or not.

    Raises OSError where a file cannot be read for READ_PATIENCE seconds: what cannot be read may be
    the latest."""
    return _choose(checkpoints_directory, verify, say, READ_PATIENCE)[0]


def rotate(directory, glob_pattern, keep, protect=()):
    """Delete all but the newest `keep` files (0 = all stay) that match; returns the deleted paths.

    Newest by the stored save counter. Never deleted: the newest, best.pt and anything in `protect`
    (they count as kept), what cannot be parsed, and files of another run than the newest one's."""
    if keep < 0:
        raise ValueError(f"keep must be 0 (all) or more, not {keep}")
    if keep == 0:
        return []
    found = [_Candidate(path) for path in Path(directory).glob(glob_pattern)]
    found = sorted((c for c in found if c.facts), key=lambda c: c.order, reverse=True)
    found = [c for c in found if c.facts["run"] == found[0].facts["run"]]
    guard = {os.path.realpath(path) for path in (*protect, Path(directory, KINDS["best"].name))}
    guarded = found[:1] + [c for c in found[1:] if os.path.realpath(c.path) in guard]
    others = [c for c in found if c not in guarded]
    doomed = [c.path for c in others[max(0, keep - len(guarded)):]]
    for path in doomed:
        _unlink(path)
    return doomed


# ---- what a copied loop needs besides: random states, signals ----

def random_states():
    """Random states of Python, NumPy (if loaded), torch and the current GPU, as plain values and
    CPU tensors."""
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states):
    """Go on with the random numbers that would have followed `random_states()`."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        # the process that saved had loaded it; torch does not need it
        import numpy
        numpy.random.set_state(tuple(states["numpy"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Signals:
    """While entered, the first signal that asks to stop sets `number`; one that comes a second or
    more later acts as ever.

    `tmux kill-session` and systemd send two within milliseconds: they are one wish. Signals that
    were inherited as ignored (nohup) stay ignored. Only the main thread of the process that entered
    it can listen. ends: the process ends after it, so that the second of a pair, which may come
    when the save is done, must not meet the default action."""

    WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, ends=False):
        self.ends = ends
        self.number = 0
        self.since = 0.0
        self.before = {}
        self.process = os.getpid()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in self.WATCHED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if os.getpid() != self.process:
            self._note_in_child(number)
        elif not self.number:
            self.number = number
            self.since = time.monotonic()
            name = signal.Signals(number).name
            text = f"\n{name}: saving at the next step; once more to exit at once\n"
            try:
                os.write(2, text.encode())
            except OSError:
                pass                        # after SIGHUP the terminal may be gone
        elif time.monotonic() - self.since >= 1:
            self._act(number)

    def _note_in_child(self, number):
        """A forked worker must not die of the Ctrl-C that its parent answers with a save, but of a
        kill it must."""
        if number == signal.SIGTERM:
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


# ---- a second copy ----

class OtherRun(ValueError):
    """The second copy's place belongs to another run."""


class Mirror:
    """The newest state, best.pt and the records of a run once more, in FOLDER/<name>/checkpoints
    and beside.

    A thread of its own copies what is newer at home, out of memory until the next save takes that;
    training and the next save never wait for it. A save that comes while it copies is copied next,
    so a slow place skips states. What fails is said when it begins and when it ends. A state that
    the home does not take is written here."""

    def __init__(self, folder, home, records, say):
        run = home.parent if home.name == "checkpoints" else home
        self.folder = Path(folder).absolute()
        self.place = self.folder / run.name / "checkpoints"
        if os.path.realpath(self.place) == os.path.realpath(home):
            raise ValueError(f"mirror {folder} is the run's own folder: name another disk's")
        self.home = home
        self.records = {run / name: self.place.parent / name for name in records}
        self.say = say
        self.known = set()                  # runs that may be overwritten
        self.fresh = None                   # (run and counter, bytes) of the save still in memory
        self.taken = {}     # name -> counter of the save that came here alone
        self.trouble = ""                   # why there is no newest copy
        self.copied = None                  # when the state of the newest copy was saved
        self.slowest = 0.0                  # seconds of a round
        # when the newest state was saved that is not being copied yet
        self.waiting = 0.0
        self.busy = False
        self.closing = False
        self.changed = threading.Condition()
        self.writing = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="checkpoint mirror", daemon=True)
        with contextlib.suppress(OSError):  # its thread will say so
            self.folder.mkdir(parents=True, exist_ok=True)

    def runs(self):
        return {c.facts["run"] for c in candidates(self.place) if c.facts and c.facts["run"]}

    def offer(self, save=None, pieces=None):
        """A state is durable at home; that of `save` is still in memory, as pieces() yields it.
        Returns at once."""
        with self.changed:
            self.fresh = save, pieces
            if self.thread.ident is None:
                self.thread.start()
            if self.busy and self.waiting:
                self._begin("slower than the saves, states are skipped")
            self.waiting = time.monotonic()
            self.changed.notify_all()

    def _work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                if not self.waiting:
                    return
                saved, self.waiting, self.busy = self.waiting, 0.0, True
            began = time.monotonic()
            trouble = ""
            try:
                self._update()
            except Exception as error:      # no failed copy may end this thread
                trouble = getattr(error, "strerror", "") or str(error) or type(error).__name__
            with self.changed:
                self.busy = False
                self.changed.notify_all()
                if trouble:
                    self._begin(trouble)
                    self.waiting = self.waiting or saved
                    if self.closing:
                        return
                    self.changed.wait(60)   # or until the next save
                    continue
                self.copied = saved
                self.slowest = max(self.slowest, time.monotonic() - began)
                if not self.waiting:
                    self._end()

    def _begin(self, trouble):
        if not self.trouble:
            self.say(f"mirror: {self.place}: {trouble}: training goes on without a newest second "
                     f"copy")
        self.trouble = trouble

    def _end(self):
        if self.trouble:
            self.trouble = ""
            self.say(f"mirror: {self.place} holds the newest state again")

    @contextlib.contextmanager
    def _held(self):
        """The place in the hands of one thread of this run, rotated at the end."""
        # gone: making it anew would fill the disk below the mount point
        os.stat(self.folder)
        self.place.mkdir(parents=True, exist_ok=True)
        with self.writing, lock(self.place, say=lambda line: None):
            sweep_temps(self.place)
            if self.runs() - self.known:
                raise OtherRun("holds another run of this name")
            yield
            for kind in KINDS.values():
                rotate(self.place, kind.glob, kind.mirrored)

    def _update(self):
        with self._held():
            here = [c for c in candidates(self.home) if not c.damage and KINDS[c.kind].mirrored]
            # between look and copy: they may be ahead of a state, never behind
            for record, copy in self.records.items():
                if record.exists():
                    atomic_write(copy, [record.read_bytes()])
            for candidate in here:          # none where the home is gone, which its own saves say
                if candidate is here[0] or KINDS[candidate.kind].mirrored == 1:
                    self._copy(candidate)

    def save(self, names, pieces, counter, before):
        """Write a state that the home does not take; returns its path. pieces() yields its bytes,
        before(directory) is called first.

        OSError or OtherRun where it finds no place here either, said as any trouble is."""
        names = [n for n in names if KINDS[NAME.fullmatch(n).lastgroup].mirrored]
        first = self.place / names[0]
        try:
            with self._held():
                if before:
                    before(self.place)
                write_anyhow(first, pieces, self.say, pieces)
                self.taken[first.name] = counter
                for name in names[1:]:
                    also(first, self.place / name, _links_work(self.place))
                    self.taken[name] = counter
        except (OSError, OtherRun) as error:
            with self.changed:
                self._begin(getattr(error, "strerror", "") or str(error))
            raise
        with self.changed:
            self.copied, self.waiting = time.monotonic(), 0.0
            self._end()
        return first

    def _copy(self, candidate):
        target = self.place / candidate.path.name
        if candidate.facts["save_counter"] < self.taken.get(target.name, 0):
            return
        there = [c for c in candidates(self.place) if c.facts and c.save == candidate.save]
        if any(c.path == target for c in there):
            return
        if there:
            with contextlib.suppress(OSError):
                return durable_link(there[0].path, target)
        # with the whole home the newest records may be gone, which memory does not have
        if not candidate.path.exists():
            return
        save, pieces = self.fresh
        try:
            copy_file(candidate.path, target, self.say, pieces if candidate.save == save else None)
        except FileNotFoundError:
            if candidate.path.exists():
                raise                       # else it was rotated away: a newer state comes

    def wait(self, seconds=None):
        """Until the newest state is copied; False after so many seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.busy and not self.waiting, seconds)

    def age(self):
        """What a save's line says of a second copy that is not the newest."""
        if not self.trouble:
            return ""
        if self.copied is None:
            return f"; no second copy since the start ({self.trouble})"
        age = _age(time.monotonic() - self.copied)
        return f"; the newest second copy is {age} old ({self.trouble})"

    def close(self):
        """Wait for the copy of the newest state, MIRROR_WAIT seconds at most."""
        with self.changed:
            if self.closing or self.thread.ident is None:
                return
            self.closing = True
            self.changed.notify_all()
            if self.busy or self.waiting:
                self.say(f"mirror: waiting at most {MIRROR_WAIT:.0f} s for the copy in "
                         f"{self.place}")
        self.thread.join(MIRROR_WAIT)
        if self.busy or self.waiting:
            self.say(f"mirror: {self.place} lacks the newest state{self.age()}")


def copy_file(source, target, say=print, fresh=None):
    """`target` becomes a durable copy of the checkpoint `source`, checked as it is read once.

    What the disk has garbled never replaces a good copy: CorruptCheckpoint. fresh() yields the same
    bytes out of memory, or raises Overtaken: a quarter of the CPU time, as nothing is read and the
    checksums are there."""
    def checked():
        return _checked_pieces(source)
    try:
        write_anyhow(target, fresh or checked, say, checked)
    except Overtaken:
        write_anyhow(target, checked, say, checked)


def write_anyhow(target, pieces, say, whole):
    """Durably what the generator pieces() yields; where the place knows no fsync or rename, what
    whole() yields, in place, said."""
    try:
        with contextlib.closing(pieces()) as buffers:
            atomic_write(target, buffers)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        say(f"mirror: {target.parent} does not take durable files ({error.strerror}): "
            f"{target.name} is written in place")
        deque(whole(), maxlen=0)            # to the end: checked before anything is overwritten
        with open(target, "wb") as file, contextlib.closing(whole()) as buffers:
            file.writelines(buffers)


def _checked_pieces(path):
    """Yield the checkpoint's bytes in pieces, each checked as it passes and none loaded; before the
    last one CorruptCheckpoint where they are not what was saved."""
    with _open(path) as file, _damage(path):
        passing = _Passing(file)
        for piece in _pieces(file.fileno(), passing.size):
            passing.check(piece)
            yield piece
            # training's threads come first: at a low priority the copy starved, with Python's lock
            time.sleep(PAUSE)


class _Passing:
    """Checks the bytes of a checkpoint that pass by in order: tensors by CRC-32, the rest by
    SHA-256. Of any other .pt `size` alone is known, its records were checked."""

    def __init__(self, file):
        self.size, tensors, self.comment = _layout(file)
        self.at = 0                         # bytes that have passed
        self.crc = 0                        # of the part that is passing
        self.digest = hashlib.sha256()
        self.parts = deque()    # (where it ends, what it is, its CRC-32 if it has one)
        for name, begin, length, crc in tensors:
            self.parts.append((begin, "structure", None))
            self.parts.append((begin + length, f"tensor record {name}", crc))
        if self.comment:
            self.parts.append((self.size - len(self.comment), "structure", None))
            self.parts.append((self.size, "the zip comment", zlib.crc32(self.comment)))
        ends = [end for end, *_ in self.parts]
        if ends != sorted(ends):
            raise CorruptCheckpoint("overlapping or misplaced records")

    def check(self, piece):
        while self.parts and len(piece):
            end, name, crc = self.parts[0]
            values, piece = piece[:end - self.at], piece[end - self.at:]
            self.at += len(values)
            if crc is None:
                self.digest.update(values)
            else:
                self.crc = zlib.crc32(values, self.crc)
            if self.at == end:
                self._end(name, crc)

    def _end(self, name, crc):
        if crc is not None and self.crc != crc:
            raise CorruptCheckpoint(f"{name} does not match its CRC-32")
        self.crc = 0
        self.parts.popleft()
        if not self.parts:
            _check_digest(self.digest, self.comment)


def _pieces(fd, size):
    """The first `size` bytes in page-aligned pieces that share one buffer; the page cache is left
    to the EEG."""
    direct = _set_direct(fd, True)
    buffer = mmap.mmap(-1, PIECE)
    for at in range(0, size, PIECE):
        try:
            count = os.preadv(fd, [buffer], at)
        except OSError as error:
            # refused only at the read, by some file systems
            if not direct or error.errno != errno.EINVAL:
                raise
            direct = _set_direct(fd, False)
            count = os.preadv(fd, [buffer], at)
        length = min(PIECE, size - at)
        if count < length:
            raise CorruptCheckpoint("truncated")
        yield memoryview(buffer)[:length]
        os.posix_fadvise(fd, at, length, os.POSIX_FADV_DONTNEED)


# ---- policy ----

def overridden(name, kind, value, say=print):
    """`value`, or what the environment variable `name` says instead; ValueError where that is no
    number from 0."""
    text = os.environ.get(name, "").strip()
    if not text:
        return value
    try:
        given = kind(text)
        if not 0 <= given < math.inf:
            raise ValueError
    except ValueError:
        what = "number" if kind is float else "whole number"
        raise ValueError(f"{name}={text!r} must be a {what}, 0 or more") from None
    say(f"checkpoints: {name}={text} overrides {value} from the configuration")
    return given


def environment(minutes, keep, say=print):
    """(minutes, keep) with BGB_MID_EPOCH_MINUTES (0 = after every step) and BGB_MID_EPOCH_KEEP (0 =
    all) in charge."""
    minutes = overridden("BGB_MID_EPOCH_MINUTES", float, minutes, say)
    keep = overridden("BGB_MID_EPOCH_KEEP", int, keep, say)
    return minutes, keep


class Checkpointer:
    """When to save, what to keep, and the background writer, of a directory held by one process.

    mid_epoch_minutes   between timed snapshots (0 = after every step); the first of a process
                        comes after 2 at most
    mid_epoch_keep, checkpoint_keep   newest files kept of each kind (0 = all)
    checkpoint_interval epochs between checkpoint_epoch_EEE.pt
    mode                "max" or "min": which metric is better
    on_saved            called with the path in the writer thread once a file is durable; its
                        exception stops the run
    before_save         called in the writer thread with the directory before a file is written
                        there: makes durable what the state counts on
    save_patience_minutes   a failed save is said and tried again for so long, the state kept in
                        memory; then SaveFailed
    mirror              folder of a second copy, best on another disk: see Mirror; `records` are
                        files of the run's folder that go along. While it takes the states that
                        the directory does not, the run goes on beyond the patience
    check_finite        refuse to write weights (state["model"]) that became infinite or NaN

    A state is any dict with whole numbers `epoch` (from 1) and, in a snapshot, `batch`. The file
    holds it with `save_counter` and, under "holdfast", the kind, run and metric that choosing goes
    by; `kind`, `run` and `metric` stand beside the state's own keys too, unless it has keys of
    these names itself."""

    def __init__(self, directory, mid_epoch_minutes=30.0, mid_epoch_keep=5, checkpoint_interval=1,
                 checkpoint_keep=3, mode="max", on_saved=None, before_save=None, background=True,
                 say=print, save_patience_minutes=60.0,
                 check_finite=True, mirror=None, records=("config.yaml", "metrics.jsonl")):
        self.directory = Path(directory).absolute()         # a later chdir must not move the run
        minutes, keep = environment(mid_epoch_minutes, mid_epoch_keep, say)
        self.minutes = minutes
        self.keep = {"mid_epoch": keep, "checkpoint_epoch": checkpoint_keep}
        self.interval = checkpoint_interval
        self.mode = mode
        self.on_saved = on_saved
        self.before_save = before_save
        self.background = background
        self.patience = save_patience_minutes
        self.finite = "model" if check_finite else ""
        self.say = say
        self.run = uuid.uuid4().hex[:12]
        self.counter = 0                    # of the newest save
        self.position = (1, 0)              # epoch in progress, batches trained in it
        # the file that this run goes on from: never rotated away
        self.resumed = None
        self.blocked = 0.0                  # seconds that training waited for the last save
        self.mirror = Mirror(mirror, self.directory, records, say) if mirror else None
        self._image = _Image(say)
        self._names = []                    # of the image
        self._away = False                  # the newest saves are in the second copy alone
        self._best = None                   # metric of best.pt, {}: none; None: never read
        self._failed = None                 # OSError of the image's save: it is in memory alone
        self._failures = 0                  # in a row
        self._failing_since = 0.0
        self._costs = []
        self._slowest = 0.0
        self._signals = Signals()           # heard only within signals()
        self._writing = None
        self._error = None
        self._open()
        # waiting: starting a thread per save costs 5 ms
        self._writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._due_at = time.monotonic() + 60 * min(2.0, self.minutes)

    def _open(self):
        """Take the directory. Raises InUse where another process has it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.directory)
        try:
            self._look()
        except BaseException:
            self._lock.close()
            raise

    def _look(self):
        """What the directory holds and can: dead temps go, saves from here on outrank every file in
        it."""
        sweep_temps(self.directory)
        self.links = _links_work(self.directory)
        if not self.links:
            self.say(f"checkpoints: no hard links in {self.directory}: last.pt and best.pt are "
                     f"full copies")
        found = [c for c in candidates(self.directory) if c.facts]
        self.counter = max([c.facts["save_counter"] for c in found], default=0)
        note = self.directory / MIRROR_NOTE
        if self.mirror:
            write_json(note, {"checkpoints": str(self.mirror.place)})       # for `ls`
        elif note.exists():
            note.unlink()
        self._best = self._metric_of_best()

    # -- going on --

    def resume(self, resume=True):
        """State to continue from, or None: the best file of the directory and its second copy, or
        `resume` itself where it is a path; False begins anew.

        Sets `position` to (epoch in progress, batches already trained in it). Raises OSError where
        the directory cannot be read for READ_PATIENCE seconds: nothing may be begun over a run that
        is only out of reach. Raises OtherRun where the second copy is of a run that is not this
        one."""
        if resume is False:
            self._expect_mirror(begins=True)
            return None
        if resume is not True:
            state = load(resume)
            self.adopt(state, resume)
            return state
        self._expect_mirror(begins=False)
        place = self.mirror.place if self.mirror else None
        path, state = _choose(self.directory, load, self.say, READ_PATIENCE, place)
        if state is None:
            self.say(f"resume: nothing usable in {self.directory}: starting fresh")
            return None
        if path.parent == place:
            path = self._bring_home(path)
        self._follow(state, path)
        self._complete(path, state)
        self._best = self._metric_of_best()
        if self.mirror:                     # which may lack what was saved just before a kill
            self.mirror.offer()
        return state

    def _expect_mirror(self, begins):
        """Raise OtherRun where the second copy is of another run; only an empty home may take one
        over, to resume it."""
        if not self.mirror:
            return
        home = {c.facts["run"] for c in candidates(self.directory) if c.facts}
        known = home | {self.run}
        try:
            there = self.mirror.runs()
        # the mirror's thread says so, and looks again before it writes
        except OSError:
            there = set()
        if there - known and (home or begins):
            raise OtherRun(f"{self.mirror.place} holds another run of this name "
                           f"({', '.join(there - known)}): "
                           f"move it away, or name another mirror")
        self.mirror.known = known | there

    def _bring_home(self, path):
        """Copy the chosen file, best.pt, last.pt and the records home, where these are not newer;
        returns its new path."""
        self.say(f"resume: brought home from the second copy in {path.parent}")
        copy_file(path, self.directory / path.name, self.say)
        self._bring_singles(path)
        for record, copy in self.mirror.records.items():
            have = record.stat().st_size if record.exists() else -1
            if copy.exists() and have < copy.stat().st_size:
                atomic_write(record, [copy.read_bytes()])
        return self.directory / path.name

    def _bring_singles(self, chosen=None):
        """Copy best.pt and last.pt home from the second copy, where these are not newer."""
        for kind in KINDS.values():
            source = self.mirror.place / kind.name
            if kind.mirrored != 1 or source == chosen:
                continue
            there, here = _Candidate(source), _Candidate(self.directory / kind.name)
            newer = here.facts and not here.damage and here.order >= there.order
            if not there.facts or newer:
                continue
            try:
                copy_file(source, here.path, self.say)
            except CorruptCheckpoint as damage:
                self.say(f"mirror: left {source}: {_reason(damage)}")

    def adopt(self, state, path=None):
        """Continue the line that `state` belongs to, whatever later saves the directory holds:
        those from here on outrank them. A best.pt that this line has not made is kept under another
        name, and the best of this line takes its place."""
        self._follow(state, path)
        self._expect_mirror(begins=True)
        best = _Candidate(self.directory / KINDS["best"].name)
        if not best.facts or self._of_line(best, state):
            return
        run, counter = best.save
        aside = self.directory / f"abandoned_best_{run or 'run'}_{counter}.pt"
        os.replace(best.path, aside)
        self.say(f"resume: best.pt is of the line that is left: kept as {aside.name}")
        mine = [c for c in candidates(self.directory) if self._of_line(c, state)]
        mine = [c for c in mine if c.facts["metric"]]
        for candidate in sorted(mine, key=lambda c: c.order):
            metric = candidate.facts["metric"]
            if self._is_best(metric):
                also(candidate.path, best.path, self.links)
        if best.path.exists():
            self.say("resume: best.pt is the best that is left of the line that goes on")
        self._best = self._metric_of_best()

    def _of_line(self, candidate, state):
        """Whether the file was saved before `state`, by its run: later ones are of a line that a
        rollback leaves."""
        if not candidate.facts:
            return False
        run, counter = candidate.save
        return run == self.run and counter <= state.get("save_counter", 0)

    def _follow(self, state, path):
        facts = _facts(state)
        position = _position(facts)
        if not position:
            raise CorruptCheckpoint(f"{path or 'the state'}: it names no epoch and batch to go on "
                                    f"from")
        self.resumed = Path(path) if path else None
        self.run = facts.get("run") or self.run
        self.counter = max(self.counter, facts.get("save_counter") or 0)
        self.position = position

    def _complete(self, path, state):
        """Give an epoch's file the names that a kill kept from it: last.pt and, where its metric is
        better, best.pt."""
        facts = {"save_counter": 0, "kind": None, "metric": None} | _facts(state)
        if facts["kind"] != "epoch":
            return
        last = _Candidate(self.directory / KINDS["last"].name)
        metric = facts["metric"]
        names = []
        if last.facts is None or last.facts["save_counter"] < facts["save_counter"]:
            names.append(KINDS["last"].name)
        if metric and self._is_best(metric):
            names.append(KINDS["best"].name)
        try:
            for name in names:
                also(path, self.directory / name, self.links)
                self.say(f"resume: {name} is {path.name} again: the process that wrote it died "
                         f"before naming it so")
        # the state is loaded: the next epoch's end names its own files
        except OSError as error:
            self.say(f"resume: {path.name} could not be named {name}: {error.strerror}")

    # -- when --

    def due(self):
        """True when a timed snapshot should be taken. Raises what went wrong in the background
        since the last call."""
        self.check()
        return time.monotonic() >= self._due_at

    @contextlib.contextmanager
    def signals(self):
        """`with saver.signals():` has SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 wait for
        `stopping`. Left only when the last save is durable: the second signal of a pair must not
        meet a writer at work."""
        with Signals() as self._signals:
            try:
                yield self._signals
            finally:
                self.close()

    def stopping(self):
        """0, or once a signal came the exit code to leave with when the state is saved: 128 + its
        number."""
        return 128 + self._signals.number if self._signals.number else 0

    @property
    def slowest(self):
        """Seconds of the slowest save until it was durable, second copy included: what a time limit
        must leave."""
        if not self.mirror:
            return self._slowest
        return self._slowest + min(self.mirror.slowest, MIRROR_WAIT)

    # -- saving --

    def save_mid(self, state, since=None):
        """Snapshot of an epoch in progress: state["epoch"] from 1, state["batch"] batches trained
        in it. since: time.monotonic() when packing `state` began; what training waited counts
        from there."""
        _check_progress(state, ("epoch", "batch"))
        state = {**state, "holdfast": {}}   # a state that was resumed brings its own along
        names = [KINDS["mid_epoch"].name.format(**_numbers(state))]
        self._start(state, "mid_epoch", names, since)

    def save_epoch(self, state, metric=None, name="metric", tie=None, since=None):
        """End of an epoch: checkpoint_epoch_EEE.pt, last.pt and, where `metric` beats it strictly,
        best.pt. True if best.

        tie: where `metric` equals that of best.pt, the larger one of these wins. since: as for
        save_mid."""
        _check_progress(state, ("epoch",))
        self.wait()
        names = [KINDS["last"].name]
        if self.interval and state["epoch"] % self.interval == 0:
            names.insert(0, KINDS["checkpoint_epoch"].name.format(**_numbers(state)))
        ours = {}
        improved = False
        if metric is not None:
            ours["metric"] = {"name": name, "value": float(metric)}
            if tie is not None:
                ours["metric"]["tie"] = float(tie)
            improved = self._is_best(ours["metric"])
        if improved:
            names.append(KINDS["best"].name)
            self._best = ours["metric"]
        self._start({**state, "holdfast": ours}, "epoch", names, since)
        return improved

    def _is_best(self, metric):
        """Strictly better than what best.pt itself holds; NaN never is. The file is asked, so no
        resume can forget it; where it cannot be read, what it held last."""
        stored = None if self._away else self._metric_of_best()
        if stored is None:
            stored = self._best
        if stored is None:
            self.say("checkpoints: best.pt stays: what it holds was never read")
            return False
        if not stored or stored["name"] != metric["name"]:
            return not math.isnan(metric["value"])
        if metric["value"] == stored["value"] and "tie" in metric and "tie" in stored:
            return better(metric["tie"], stored["tie"])
        return better(metric["value"], stored["value"], self.mode)

    def _metric_of_best(self):
        """What best.pt holds, {} for nothing that compares; None where it cannot be read."""
        try:
            return peek(self.directory / KINDS["best"].name)["metric"] or {}
        except FileNotFoundError:           # the whole directory may be out of reach
            return {} if os.path.isdir(self.directory) else None
        except CorruptCheckpoint as damage:
            self.say(f"checkpoints: best.pt cannot be compared ({_reason(damage)}): the next "
                     f"metric replaces it")
            return {}
        except OSError as error:
            self.say(f"checkpoints: best.pt cannot be read now ({_reason(error)})")
            return None

    def _start(self, state, kind, names, since=None):
        began = since or time.monotonic()
        if self.mirror and not self.mirror.known:           # nobody asked for a resume
            self._expect_mirror(begins=True)
        self.wait()
        # perhaps the best: no snapshot may take its place in memory
        if self._epoch_waits():
            self._retry()
            if self._failed and kind == "mid_epoch":
                self._due_at = time.monotonic() + 60
                return
        self._failed = None
        self.counter += 1
        ours = {**state["holdfast"], "kind": kind, "run": self.run}
        try:
            self._image.fill({**ours, **state, "save_counter": self.counter, "holdfast": ours})
        finally:
            self._due_at = time.monotonic() + 60 * self.minutes
        self.blocked = time.monotonic() - began
        self._names = names
        self._writing = self._writer.submit(self._write, names, self.blocked)
        if not self.background:
            self.wait()

    def _epoch_waits(self):
        """Whether the image is the end of an epoch whose save failed, and not for weights that no
        time makes finite."""
        epoch = KINDS["last"].name in self._names
        return epoch and self._failed and self._failed.errno != errno.EDOM

    def _retry(self):
        """Write the image again whose save failed."""
        self._writing = self._writer.submit(self._write, self._names, self.blocked)
        self.wait()

    def _write(self, names, blocked):
        """Writer thread: at home, else in the second copy. What fails is handed to the training
        loop, which raises it at its next step."""
        try:
            try:
                self._write_home(names, blocked)
            except OSError as error:
                if not self.mirror or error.errno == errno.EDOM:
                    raise
                self._write_away(names, blocked, error)
        except BaseException as error:
            self._error = error

    def _write_home(self, names, blocked):
        """Durable first, then the other names, then the hook, and only then rotation."""
        began = time.monotonic()
        if self.before_save:
            self.before_save(self.directory)
        sweep_temps(self.directory)
        if not self.links:
            self._make_room(names)
        first = self.directory / names[0]
        size = atomic_write(first, self._image.file(finite=self.finite))
        for name in names[1:]:
            also(first, self.directory / name, self.links)
        self._saved(blocked + time.monotonic() - began)
        self._report(names, blocked, time.monotonic() - began, size)
        if self._away:
            self._come_back()
        if self.mirror:
            self.mirror.offer((self.run, self.counter), self._image.reader())
        self._call_hook(first)
        for kind, keep in self.keep.items():
            self._rotate(kind, keep)

    def _write_away(self, names, blocked, fault):
        """The state that the directory does not take goes to the second copy alone."""
        began = time.monotonic()
        try:
            path = self.mirror.save(names, lambda: self._image.file(finite=self.finite),
                                    self.counter, self.before_save)
        except (OSError, OtherRun):         # said there
            raise fault from None
        self._away = True
        self._saved(blocked + time.monotonic() - began)
        self.say(f"save failed: {fault.strerror or fault}; the second copy has the state, as "
                 f"{path}")
        self._call_hook(path)

    def _come_back(self):
        """The directory takes saves again: what the second copy alone has comes home."""
        try:
            self._bring_singles()
            self._away = False
        except OSError as error:
            self.say(f"mirror: {self.mirror.place}: {error.strerror}: what it alone has could not "
                     f"be brought home, it is tried again at the next save")

    def _saved(self, seconds):
        self._slowest = max(self._slowest, seconds)
        self._failures = 0
        self._failed = None

    def _make_room(self, names):
        """Copies instead of links need room: the oldest snapshots go first, newer durable ones
        remain."""
        for weights in self._image.weights(self.finite).values():
            # a save that will be refused costs no snapshot
            self._image.refuse_nonfinite(weights)
        room = 2 if len(names) > 1 else 1
        keep = self.keep["mid_epoch"]
        if keep:
            self._rotate("mid_epoch", max(1, keep - room))

    def _call_hook(self, path):
        try:
            if self.on_saved:
                self.on_saved(path)
        except Exception as error:          # not an OSError: the save itself did succeed
            raise RuntimeError(f"on_saved failed for {path.name}: {error}") from error

    def _rotate(self, kind, keep):
        protect = [self.resumed] if self.resumed else []
        for path in rotate(self.directory, KINDS[kind].glob, keep, protect):
            self.say(f"checkpoints: rotated out {path.name}")

    def _report(self, names, blocked, wrote, size):
        self._costs.append(blocked)
        line = (f"saved {' = '.join(names)}: {size / 1e6:.1f} MB, "
                f"training waited {blocked * 1e3:.0f} ms, durable in {wrote:.2f} s")
        if self.mirror:
            line += self.mirror.age()
        self.say(line)
        if len(self._costs) == 3:           # the first one also allocates
            cost = sorted(self._costs)[1]
            # Young, CACM 1974; Daly, FGCS 2006
            minutes = math.sqrt(2 * cost * MTBF_HOURS * 3600) / 60
            self.say(f"a save holds training up for {cost * 1e3:.0f} ms: with one failure in "
                     f"{MTBF_HOURS:.0f} h, a snapshot every "
                     f"{minutes:.1f} min loses least time in all; "
                     f"yours come every {self.minutes:g} min")

    # -- faults and the end --

    def check(self):
        """Raise the writer's error here: SaveFailed when saves fail beyond patience, else anything
        that is no OSError."""
        error, self._error = self._error, None
        if error is None:
            return
        if not isinstance(error, OSError):
            raise error
        now = time.monotonic()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self._failed = error
        self._due_at = min(self._due_at, now + 60)          # no need to wait for the whole interval
        line = f"save failed ({self._failures} in a row): {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            needed, free = self._image.end / 1e6, _free(self.directory) / 1e6
            line += f" ({needed:.0f} MB needed, {free:.0f} MB free)"
        self.say(f"{line}; every earlier checkpoint is as it was")
        # time mends a disk, but no weights that are not finite
        patience = 0 if error.errno == errno.EDOM else 60 * self.patience
        if self._failures >= 3 and now - self._failing_since >= patience:
            self._failed = None
            minutes = (now - self._failing_since) / 60
            raise SaveFailed(error.errno, f"saves failed for {minutes:.0f} minutes, "
                                          f"{self._failures} in a row, "
                                          f"the last one: {error.strerror or error}")

    def wait(self):
        """Until the file being written is durable; reports its failure, if any, as `check` does."""
        if self._writing:
            self._writing.result()
            self._writing = None
        self.check()

    def settle(self):
        """Until the newest save is durable: where it failed again and again, for
        save_patience_minutes. Else SaveFailed."""
        self.wait()
        pause = 1.0
        while self._failed:
            time.sleep(min(pause, 60 * self.patience))
            pause = min(2 * pause, 60.0)
            self._retry()

    def close(self):
        """Wait for the writer, once more where the newest save failed, and give the directory
        up."""
        try:
            self.wait()
            if self._failed:
                self._retry()
        finally:
            self._writer.shutdown()
            if self.mirror:
                self.mirror.close()
            self._lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def better(value, best, mode="max"):
    """Strictly better; a NaN never is, and anything beats a NaN or None."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return value > best if mode == "max" else value < best


def _check_progress(state, needed):
    """Raise TypeError for a state that no resume could take."""
    for key in needed:
        if key not in state:
            raise IncompleteState(f"the state has no {key!r}: a resume goes on from its epoch "
                                  f"(they count from 1) and batch")
    for key, value in _numbers(state).items():
        if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise TypeError(f"[{key!r}] must be a whole number, 0 or more, not {value!r}: no "
                            f"resume could take this file")


def _numbers(state):
    return {key: state[key] for key in PROGRESS if key in state}


def also(source, target, links=True):
    """`target` becomes another name of `source`: a hard link where possible, else a second durable
    file."""
    if links:
        return durable_link(source, target)
    with _open(source) as file:
        atomic_write(target, _pieces(file.fileno(), os.fstat(file.fileno()).st_size))


def _links_work(directory):
    probe, fd = _create(Path(directory, "probe"))
    other = _temp(probe)
    try:
        os.link(probe, other)               # locked as the probe is: the same file
        return True
    except OSError:
        return False
    finally:
        _unlink(probe)
        _unlink(other)
        os.close(fd)


def _free(directory):
    try:
        room = os.statvfs(directory)
        return room.f_bavail * room.f_frsize
    except OSError:
        return 0


class Lock:
    """A directory held by this process: until `close`, or until its death. Nothing forked from it
    holds on."""

    held = set()                            # the open ones of this process

    def __init__(self, fd):
        self.fd = fd
        self.held.add(self)

    def close(self):
        if self not in self.held:
            return
        self.held.discard(self)
        try:
            # closing alone would leave it to a child that has the descriptor
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        except OSError:
            pass                            # a file system without locks: nothing to give back
        os.close(self.fd)

    @classmethod
    def leave_to_parent(cls):
        """In a forked child: close the descriptors without unlocking, which would take the lock
        from the parent too."""
        for lock in cls.held:
            os.close(lock.fd)
        cls.held.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


os.register_at_fork(after_in_child=Lock.leave_to_parent)


def lock(directory, say=print):
    """Hold `directory` for this process; returns a Lock with `close`. Raises InUse where another
    process does."""
    path = Path(directory, ".lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file: move it away", str(path))
        _take(fd, directory, say)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return Lock(fd)


def _take(fd, directory, say):
    for attempt in range(10):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # `ls` looks at a lock for a moment, and the dying need one
            time.sleep(0.05)
        except OSError as error:
            say(f"checkpoints: {directory} cannot be locked ({error.strerror}): "
                f"see to it that one process writes here")
            return
    owner = os.pread(fd, 200, 0).decode(errors="replace").strip()
    raise InUse(errno.EBUSY, f"{directory} is in use by {owner or 'another process'}: stop it "
                             f"first")


# ---- command line ----

def find_runs(path):
    """Directories at or under `path` that hold checkpoints; those that may not be read are left
    out."""
    path = Path(path)
    places = [path, *sorted(p for p in path.rglob("*") if p.is_dir())] if path.is_dir() else []
    return [p for p in places if os.access(p, os.R_OK | os.X_OK) and checkpoints(p)]


def _age(seconds):
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _health(path):
    """"ok", or what is wrong; "gone" where the run has rotated it away meanwhile."""
    try:
        verify(path)
        return "ok"
    except CorruptCheckpoint as damage:
        return f"DAMAGED: {_reason(damage)}"
    except OSError as error:
        if not os.path.lexists(path):
            return "gone"
        return f"UNREADABLE: {_reason(error)}"


def _holder(directory):
    """What the lock file says of the process that holds it, or None. Writes nothing and follows no
    link."""
    try:
        fd = os.open(Path(directory, ".lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(fd, 200, 0).decode(errors="replace")
        return "in use by " + ("".join(filter(str.isprintable, text)).strip() or "another process")
    except OSError:
        return None
    finally:
        os.close(fd)


def second_place(directory):
    """Where the run of `directory` has its second copy, or None."""
    try:
        return Path(json.loads(Path(directory, MIRROR_NOTE).read_text())["checkpoints"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_run(directory, say=print):
    """One run and its second copy as tables; the file a resume takes is marked, with the reason
    below. Writes nothing."""
    directory, second = Path(directory), second_place(directory)
    notes = []
    chosen = None
    try:
        chosen, _ = _choose(directory, verify, notes.append, mirror=second)
        if not chosen:
            notes.append("resume: nothing usable: a fresh start")
    except OSError as error:
        notes.append(f"resume: {error.filename} cannot be read now ({error.strerror}): a resume "
                     f"would wait for it")
    busy = _holder(directory)
    others = busy and f"process {os.getpid()} " not in busy
    say(f"\n{directory}" + (f"  ({busy})" if others else ""))
    count = _table(directory, chosen, say)
    if second:
        say(f"  second copy: {second}")
        _table(second, chosen, say)
    for note in notes:
        if not note.startswith("resume: older"):           # older and sound: the table shows them
            say(f"    {note}")
    return count


def _table(directory, chosen, say):
    """The files of a directory, newest save first, and what they take; returns their number."""
    say(f"    {'file':<26} {'epoch':>5} {'batch':>7} {'step':>9}  {'metric':<22} {'size':>10} "
        f"{'age':>7}  health")
    try:
        found = [_Candidate(path) for path in checkpoints(directory)]
    except OSError as error:
        say(f"    cannot be read: {error.strerror}")
        return 0
    sound = [c for c in found if c.facts]
    sound.sort(key=lambda c: (c.order, c.path.name), reverse=True)
    sizes, first = {}, {}
    count = 0
    for c in sound + [c for c in found if not c.facts]:
        try:
            info = os.lstat(c.path)
        except FileNotFoundError:
            continue                        # rotated away meanwhile
        twin = first.setdefault(info.st_ino, c.path.name)
        health = f"= {twin}" if twin != c.path.name else _health(c.path)
        if health == "gone":
            continue
        sizes[info.st_ino] = info.st_size
        count += 1
        facts = c.facts or dict.fromkeys(PROGRESS, "-") | {"metric": None}
        metric = "{name} {value:.4f}".format(**facts["metric"]) if facts["metric"] else "-"
        mark = "->" if c.path == chosen else "  "
        age = _age(time.time() - info.st_mtime)
        say(f" {mark} {c.path.name:<26} {facts['epoch']:>5} {facts['batch']:>7} "
            f"{facts['global_step']:>9}  {metric:<22} "
            f"{info.st_size / 1e6:>7.1f} MB {age:>7}  {health}")
    say(f"    {count} names, {len(sizes)} files on disk, {sum(sizes.values()) / 1e6:.1f} MB in all")
    return count


def _removable(directory):
    """([(path, why)], [(path, why not)]): what no resume needs, and damage that nothing shows to be
    of this format."""
    temps = [path for path in directory.glob(".*.tmp") if TEMP.fullmatch(path.name)]
    doomed = [(path, "temp of a dead process") for path in temps if _dead(path)]
    spared = []
    chosen, _ = _choose(directory, verify, lambda line: None)
    for c in candidates(directory) if chosen else []:
        health = "ok" if c.path == chosen else _health(c.path)
        if health.startswith("DAMAGED"):    # what cannot be read here, or is no file, may be sound
            (doomed if _ours(c.path) else spared).append((c.path, health))
        elif health == "ok" and c.path != chosen and KINDS[c.kind].spare:
            doomed.append((c.path, f"older than {chosen.name}"))
    return doomed, spared


def _ours(path):
    """Whether a damaged file is of this format by what is left of it, or holds nothing that any
    program could load.

    A sound file of another program can be one that we refuse."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(PAGE)
            file.seek(-min(os.path.getsize(path), 1 << 16), os.SEEK_END)
            tail = file.read()
    except OSError:
        return False
    # torch.save begins with data.pkl
    begins = head.startswith(b"PK\3\4") and head[30:].startswith(b"archive/data/")
    return len(head) < 22 or not any(head) or begins or MAGIC in tail


def _clean(directory, yes):
    try:
        # to the end: no run may begin between the look and the removal
        held = lock(directory)
    except InUse as error:
        print(f"left alone: {error.strerror}")
        return
    with held:
        doomed, spared = _removable(directory)
        for path, why in spared:
            print(f"left {path}  ({why}; it may be another program's)")
        for path, why in doomed:
            print(f"{'removed' if yes else 'would remove'} {path}  "
                  f"{os.lstat(path).st_size / 1e6:.1f} MB  ({why})")
            if yes:
                _unlink(path)
        hint = "" if yes or not doomed else "; --yes removes them"
        print(f"{directory}: {len(doomed)} files{hint}")


# what goes along with weights that are shared
SHARED = ("model", "config", "montage", "channels", "prepared", "epoch", "batch", "global_step",
          "metric", "scores", "averaged")


def strip(source, target=None):
    """Write the weights of `source`, with the settings that rebuild the model, to `target`
    (SOURCE_weights.pt), and a model card beside it (.md). Nothing that exists is replaced."""
    state = _with_weights(source)
    target = Path(target or Path(source).with_name(f"{Path(source).stem}_weights.pt"))
    _share({key: state[key] for key in SHARED if key in state}, target, source)
    print(f"{target}: {os.path.getsize(target) / 1e6:.1f} MB of "
          f"{os.path.getsize(source) / 1e6:.1f} MB")


def average(sources, target):
    """Write the mean of the weights of `sources`, checkpoints of one run, to `target` (LAWA, arXiv
    2306.03241).

    Counts and running statistics are those of the newest. An average kept during training instead
    (EMA) would be a second set of weights in every checkpoint: with the defaults, more than the 2
    GB that they promise to stay below."""
    if len(sources) < 2:
        raise ValueError("average needs two checkpoints or more")
    facts = {source: peek(source) for source in sources}
    saves = [(f["run"], f["save_counter"]) for f in facts.values()]
    if None in {run for run, _ in saves} or len({run for run, _ in saves}) > 1:
        raise ValueError("the checkpoints are not all of one run, or do not say of which")
    if len(set(saves)) < len(sources):
        raise ValueError("two of the files are the same save: it would count twice")
    newest = max(facts, key=lambda source: facts[source]["save_counter"])
    state = _with_weights(newest)
    weights = {name: value for name, value in state["model"].items() if _is_weight(name, value)}
    mean = {name: value.double() for name, value in weights.items()}
    for source in sources:
        if source != newest:
            _add(mean, state["model"], _with_weights(source)["model"], source)
    model = dict(state["model"])
    for name, total in mean.items():
        model[name] = (total / len(sources)).to(model[name].dtype)
    kept = {key: state[key] for key in SHARED if key in state and key not in ("metric", "scores")}
    if isinstance(state.get("scores"), dict) and "threshold" in state["scores"]:
        # its other scores are not the average's
        kept["scores"] = {"threshold": state["scores"]["threshold"]}
    names = [Path(source).name for source in sources]
    _share({**kept, "model": model, "averaged": names}, Path(target), newest)
    print(f"{target}: the mean of {len(sources)} checkpoints, counts and statistics of {newest}")


def _is_weight(name, value):
    statistic = name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not statistic


def _add(mean, newest, model, source):
    for name in sorted(newest.keys() | model.keys()):
        if name not in newest or name not in model or _shape(newest[name]) != _shape(model[name]):
            raise ValueError(f"{source}: {name} has another shape or is absent: another model")
    for name, total in mean.items():
        total += model[name]


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _with_weights(source):
    state = load(source)
    if not isinstance(state.get("model"), dict):
        raise CorruptCheckpoint(f"{source}: holds no model weights")
    return state


def _share(state, target, source):
    """Weights and their card, where neither exists yet."""
    card = target.with_suffix(".md")
    for path in (target, card):
        if os.path.lexists(path):
            raise ValueError(f"{path} exists: name another file, or move it away")
    atomic_save(state, target)
    atomic_write(card, [model_card(state, target, source).encode()])


def model_card(state, target, source):
    """Markdown: what the weights were trained on, how well they did there, and what they are not
    for."""
    config = _dict(state.get("config"))
    data, evaluation = _dict(config.get("data")), _dict(config.get("evaluation"))
    scores, metric = _dict(state.get("scores")), _dict(state.get("metric"))
    patients = ", ".join(map(str, data.get("dev_patients") or []))
    folders = data.get("path") or []
    if isinstance(folders, str):
        folders = [folders]
    rows = {
        "run": _dict(config.get("experiment")).get("name"),
        "from": Path(source).name,
        "epoch": state.get("epoch"),
        "step": state.get("global_step"),
        "averaged": ", ".join(state.get("averaged", [])),
        # the names alone: a whole path tells strangers about the machine
        "data": ", ".join(Path(folder).name for folder in folders),
        "validation patients": patients or "the corpus's own, or drawn by the seed",
        "montage": state.get("montage"),
        "channels": ", ".join(map(str, state.get("channels", []))),
        "threshold": scores.get("threshold", evaluation.get("threshold")),
        "chosen by": metric.get("name"),
        "at": metric.get("value"),
    }
    lines = [f"# {target.name}", ""]
    lines += [f"- {name}: {value}" for name, value in rows.items() if value not in (None, "")]
    numbers = {k: v for k, v in scores.items() if isinstance(v, (int, float)) and k != "threshold"}
    if numbers:
        lines += ["", "## Scores on the validation patients", "", "| score | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
    lines += ["", "## Intended use", "",
              "Research on the detection of epileptic seizures in scalp EEG. Not a medical device:",
              "not for diagnosis, alarms or treatment. The scores above were seen by the choice of",
              "these weights; on other patients, hospitals and recording systems expect worse, and",
              "measure it before use.", ""]
    return "\n".join(lines)


def _dict(value):
    return value if isinstance(value, dict) else {}


def _verify_all(paths):
    damaged = 0
    for path in paths:
        for file in checkpoints(path) if path.is_dir() else [path]:
            health = _health(file)
            if health == "gone":
                continue
            damaged += health != "ok"
            print(f"{file}: {health}")
    return 1 if damaged else 0


def main(argv=None):
    parser = argparse.ArgumentParser(prog="checkpoint.py", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["ls", "verify", "clean", "strip", "average"])
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="file, run directory, or a folder of runs")
    parser.add_argument("--yes", action="store_true", help="clean: remove, do not only list")
    parser.add_argument("--out", metavar="FILE", help="average: the file to write")
    args = parser.parse_args(argv)
    try:
        return _command(args)
    except CorruptCheckpoint as damage:
        print(damage, file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        print(f"checkpoint.py: {where}{getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2


def _command(args):
    if args.command == "strip":
        if len(args.paths) > 2:
            raise ValueError(f"strip takes SRC and DST, not {len(args.paths)} paths: nothing was "
                             f"written")
        strip(*args.paths)
        return 0
    if args.command == "average":
        if not args.out:
            raise ValueError("average needs --out FILE")
        average(args.paths, args.out)
        return 0
    for path in args.paths:
        if not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", path)
    places = []
    for path in args.paths:
        places += find_runs(path) if Path(path).is_dir() else [Path(path)]
    if not places:
        print(f"no checkpoints in {' '.join(args.paths)}")
    if args.command == "verify":
        return _verify_all(places)
    for place in places:
        directory = place if place.is_dir() else place.parent
        if args.command == "ls":
            list_run(directory)
        else:
            _clean(directory, args.yes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
