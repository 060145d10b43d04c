"""The file as an adversary would have it: crafted content, odd neighbours, temps of other hosts, what a kernel refuses."""
import contextlib
import copy
import errno
import fcntl
import hashlib
import io
import math
import os
import pickle
import random
import resource
import threading
import time
import traceback
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

import checkpoint
import crash
from crash import sound, state
from test_checkpoint import names, quiet
from test_crash import saver, temps


# ---- crafted files: every checksum right, the content hostile ----

def crafted(path, state, note=None, records=None, pickled=None):
    """A file of our own format with every checksum right, but with the given note, zip entries or pickle."""
    class Crafted(checkpoint._Image):
        def _tail(self, entries, digest):
            if records:
                entries[:] = records(entries)
            return super()._tail(entries, digest)
    image = Crafted().fill(state)
    if note is not None:
        image.facts = note
    if pickled is not None:
        image.pickled = pickled
    checkpoint.atomic_write(Path(path), image.file())


def refused(path, *readers):
    for read in readers:
        with pytest.raises(checkpoint.CorruptCheckpoint) as refusal:
            read(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("note", [{"epoch": 7}, {"epoch": 1, "save_counter": 99, "global_step": 1, "batch": 1}, [], {},
                                  {"epoch": 1, "batch": 1, "global_step": 1, "save_counter": 1, "run": "x"}], ids=repr)
def test_a_progress_record_that_says_other_than_the_state_is_refused_by_load_and_verify(tmp_path, note):
    crafted(tmp_path / "last.pt", state(1), note=note)
    refused(tmp_path / "last.pt", checkpoint.load, checkpoint.verify)
    assert checkpoint.find_resume(tmp_path, quiet) is None


def test_a_progress_record_that_nests_too_deep_or_is_no_json_is_damage(tmp_path, monkeypatch):
    for text in ("[" * 40_000, "{" * 3, '{"epoch": ' + "9" * 5000 + "}", "nonsense", "[1]", '"x"', "\ud800"):
        monkeypatch.setattr(checkpoint.json, "dumps", lambda value, text=text: text)
        image = checkpoint._Image().fill(state(1))
        try:
            blob = b"".join(map(bytes, image.file()))
        except UnicodeEncodeError:
            continue
        finally:
            monkeypatch.undo()
        (tmp_path / "last.pt").write_bytes(blob)
        refused(tmp_path / "last.pt", checkpoint.load, checkpoint.verify, checkpoint.peek)
        assert checkpoint.find_resume(tmp_path, quiet) is None


def test_two_records_of_one_name_and_records_beyond_the_directory_are_refused(tmp_path):
    def twice(entries):
        return entries + [entries[0]]

    def altered(key, value):
        def records(entries):
            entries = [copy.copy(entry) for entry in entries]
            for entry in entries:
                setattr(entry, key, value(getattr(entry, key)))
            return entries
        return records
    renamed, backwards = altered("filename", lambda name: "archive/data/0"), altered("header_offset", lambda at: 0)
    beyond, longer = altered("header_offset", lambda at: at + 10**9), altered("file_size", lambda size: size + 10**12)
    for records in (twice, renamed, beyond, longer, backwards):
        crafted(tmp_path / "x.pt", state(1), records=records)
        refused(tmp_path / "x.pt", checkpoint.load, checkpoint.verify)


def pickle_of(tensor_facts, count=10):
    """data.pkl of {"w": a tensor}, its storage of `count` floats, the rest as given."""
    class Slot:
        pass

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        dispatch_table = {Slot: lambda slot: (torch._utils._rebuild_tensor_v2, (Storage(), *tensor_facts, False, OrderedDict()))}

        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if type(obj) is Storage else None
    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"w": Slot()})
    return out.getvalue()


@pytest.mark.parametrize("facts, count", [((0, (1000,), (1,)), 1000), ((0, (10,), (1,)), 1000), ((0, (5,), (1,)), 5), ((0, (20,), (1,)), 10),
                                          ((0, (10,), (1,)), 1 << 40), ((8, (5,), (-1,)), 10), ((-3, (5,), (1,)), 10),
                                          ((0, (1 << 36,), (1,)), 10), ((0, (10,), (1,)), -4)], ids=repr)
def test_a_tensor_that_claims_more_than_its_record_holds_is_refused_by_verify_as_by_load(tmp_path, facts, count):
    crafted(tmp_path / "x.pt", {"w": torch.arange(10.0)}, pickled=pickle_of(facts, count))
    refused(tmp_path / "x.pt", checkpoint.load, checkpoint.verify)
    crafted(tmp_path / "y.pt", {"w": torch.arange(10.0)}, pickled=pickle_of((0, (10,), (1,))))
    assert torch.equal(checkpoint.load(tmp_path / "y.pt")["w"], torch.arange(10.0))


def test_what_is_no_checkpoint_dict_is_refused_by_every_reader(tmp_path):
    for what in ([1, 2], torch.ones(3), "text"):
        torch.save(what, tmp_path / "last.pt")
        refused(tmp_path / "last.pt", checkpoint.load, checkpoint.verify, checkpoint.peek)
    (tmp_path / "last.pt").write_bytes(b"PK\5\6" + bytes(18))               # an empty zip
    refused(tmp_path / "last.pt", checkpoint.load, checkpoint.verify, checkpoint.peek)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_verify_and_load_agree_on_every_mutation_of_a_file_whose_checksums_are_made_right_again(tmp_path):
    rng, path, agreed = random.Random(3), tmp_path / "x.pt", 0
    checkpoint.atomic_save({"w": torch.arange(5.0), "b": [1, "x"], "epoch": 1}, path)
    blob = path.read_bytes()
    comment = blob.rfind(checkpoint.MAGIC)
    head, digest_end = comment + len(checkpoint.MAGIC), comment + len(checkpoint.MAGIC) + 64
    for _ in range(600):
        damaged = bytearray(blob)
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.randrange(comment)
            damaged[at] = rng.choice((0, 1, 0x7F, 0xFF, damaged[at] ^ 1 << rng.randrange(8)))
        start, length = blob.find(torch.arange(5.0).numpy().tobytes()), 20
        plain = damaged[:start] + damaged[start + length:comment] + damaged[digest_end + 10:]
        damaged[head:digest_end] = hashlib.sha256(plain).hexdigest().encode()
        path.write_bytes(damaged)
        outcomes = []
        for read in (checkpoint.load, checkpoint.verify):
            try:
                read(path)
                outcomes.append("loaded")
            except checkpoint.CorruptCheckpoint:
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1]
        agreed += 1
    assert agreed == 600


# ---- odd neighbours ----

def test_pipes_links_and_folders_named_like_temps_or_checkpoints_hang_nothing_and_stay(tmp_path):
    os.mkfifo(tmp_path / ".last.pt.1.0.tmp")
    (tmp_path / ".last.pt.999999.1.tmp").mkdir()
    (tmp_path / "victim").write_bytes(b"of somebody else")
    (tmp_path / ".last.pt.999999.2.tmp").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "best.pt")

    def child():
        checkpoint.atomic_save(state(1), tmp_path / "last.pt")
        refused(tmp_path / "best.pt", checkpoint.load, checkpoint.verify, checkpoint.peek)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)        # OpenMP's threads do not live through a fork
            child()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    for _ in range(30000):                  # ten minutes: a hang is a failure, not a long wait
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("a pipe that was named like a temp hangs the save")
    assert status == 0 and sound(checkpoint.load(tmp_path / "last.pt")) == 1
    assert (tmp_path / "victim").read_bytes() == b"of somebody else" and len(temps(tmp_path)) == 3


def test_a_relative_path_means_the_directory_of_the_call_though_it_changes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)

    def buffers():
        os.chdir(tmp_path / "elsewhere")
        yield b"content"
    checkpoint.atomic_write("run/x", buffers())
    assert (tmp_path / "run/x").read_bytes() == b"content" and not list((tmp_path / "elsewhere").iterdir())


def test_other_names_of_the_old_file_keep_it_when_a_name_is_saved_anew(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "best.pt")
    os.link(tmp_path / "best.pt", tmp_path / "last.pt")
    (tmp_path / "alias.pt").symlink_to("best.pt")
    checkpoint.atomic_save(state(2), tmp_path / "last.pt")
    checkpoint.atomic_save(state(3), tmp_path / "alias.pt")                 # the link goes, not what it led to
    assert [sound(checkpoint.load(tmp_path / name)) for name in ("best.pt", "last.pt", "alias.pt")] == [1, 2, 3]


def test_a_file_that_changes_while_it_is_read_is_no_damage_and_not_believed(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.atomic_save(state(1), path)
    real = torch.load

    def load(*arguments, **options):
        found = real(*arguments, **options)
        with open(path, "r+b") as file:
            file.write(b"PK")
        os.utime(path, (1, 1))
        return found
    torch.load = load
    try:
        with pytest.raises(OSError, match="changed while it was read") as error:
            checkpoint.load(path)
    finally:
        torch.load = real
    assert error.value.errno == errno.EAGAIN and sound(checkpoint.load(path)) == 1


# ---- temps of this host and of others ----

def temp_of(directory, process, host, age=0.0):
    at = f"@{host}" if host else ""
    path = Path(directory, f".last.pt.{process}{at}.0.tmp")
    path.write_bytes(b"part of a save")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_temps_go_by_host_and_process_and_by_age(tmp_path):
    mine = checkpoint._host()
    # in a container a dead process may have had this one's number
    dead = [temp_of(tmp_path, 999999, mine), temp_of(tmp_path, 999998, None), temp_of(tmp_path, os.getpid(), mine),
            temp_of(tmp_path, os.getpid(), "other-host", age=7200), temp_of(tmp_path, os.getppid(), mine, age=7200)]
    alive = [temp_of(tmp_path, 999997, "other-host", age=60), temp_of(tmp_path, os.getppid(), None)]
    checkpoint.atomic_save(state(1), tmp_path / "last.pt")
    assert sorted(temps(tmp_path)) == sorted(path.name for path in alive)
    assert not any(path.exists() for path in dead)


def test_the_temp_of_a_link_and_the_probe_for_links_are_alive_to_a_sweep(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "last.pt")
    swept, real = [], os.link

    def link(source, target):
        real(source, target)
        checkpoint.sweep_temps(tmp_path)
        swept.append(os.path.exists(target))
    os.link = link
    try:
        checkpoint.link_or_copy(tmp_path / "last.pt", tmp_path / "best.pt")
        assert checkpoint.links_work(tmp_path)
    finally:
        os.link = real
    assert swept == [True, True] and names(tmp_path) == ["best.pt", "last.pt"] and not temps(tmp_path)
    checkpoint.link_or_copy(tmp_path / "last.pt", tmp_path / "best.pt")     # the same file already
    assert not temps(tmp_path) and sound(checkpoint.load(tmp_path / "best.pt")) == 1


@pytest.mark.slow
def test_a_save_and_its_links_beside_another_process_that_sweeps_never_fail(tmp_path):
    def sweeper():
        while not (tmp_path / "stop").exists():
            checkpoint.sweep_temps(tmp_path)
    pid = os.fork()
    if pid == 0:
        os._exit(crash.run_child(sweeper) != "done")
    try:
        for step in range(200):
            checkpoint.atomic_save(state(step), tmp_path / "last.pt")
            checkpoint.link_or_copy(tmp_path / "last.pt", tmp_path / "best.pt")
            assert checkpoint.links_work(tmp_path)
    finally:
        (tmp_path / "stop").touch()
        assert os.waitpid(pid, 0)[1] == 0
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 199


def test_a_child_forked_during_a_save_does_not_keep_its_lock(tmp_path):
    stop, go = os.pipe()
    children = []

    def buffers():
        children.append(os.fork())
        if children[0] == 0:                # as a DataLoader worker: it outlives the save
            os.close(go)
            os.read(stop, 1)
            os._exit(0)
        yield b"content"
    try:
        checkpoint.atomic_write(tmp_path / "x.pt", buffers())
        with open(tmp_path / "x.pt", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(go)
        os.waitpid(children[0], 0)
        os.close(stop)


@pytest.mark.parametrize("dtype", sorted(checkpoint._DTYPES, key=str), ids=str)
def test_weights_of_every_dtype_can_be_judged(tmp_path, dtype):
    weight = torch.zeros(64, dtype=torch.uint8).view(dtype)
    with saver(tmp_path) as s:
        s.save_mid({"model": {"w": weight[:4]}, "epoch": 1, "batch": 1, "global_step": 1})
    assert names(tmp_path) == ["mid_epoch_001_000001.pt"]


# ---- what a kernel or a driver refuses ----

@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT])
def test_a_direct_write_that_is_refused_goes_through_the_page_cache(tmp_path, number):
    failed = []

    def hook(count, name, arguments):
        if name == "write" and not failed:
            failed.append(name)
            return OSError(number, os.strerror(number))
    with crash.Watched(tmp_path, hook):
        checkpoint.atomic_save(state(1), tmp_path / "x.pt")
    assert failed and sound(checkpoint.load(tmp_path / "x.pt")) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine that can lock memory for a GPU")
def test_page_locked_memory_that_is_refused_is_said_once_and_pageable_memory_serves(tmp_path):
    said = []
    image = checkpoint._Image(said.append)
    image.gpu_end = 1                       # as if a tensor lay on a GPU
    assert image._room(5000).numel() == image._room(6000).numel() - 1000 == 5000
    assert len(said) == 1 and "no page-locked memory" in said[0]


# ---- weights that are not finite ----

def test_weights_that_are_not_finite_are_found_however_deep_the_models_parts_lie(tmp_path, capsys):
    def nets(value):
        return {"generator": {"w": torch.ones(3)}, "critics": [{"w": torch.full((3,), value)}]}
    with saver(tmp_path, say=print, mid_epoch_keep=0) as s:
        for step, value in enumerate((1.0, math.nan, math.inf, 2.0), 1):
            model = nets(value)
            model["itself"] = model                         # no loop without end
            s.save_mid({"model": model, "epoch": 1, "batch": step, "global_step": step})
    assert capsys.readouterr().out.count("weights are not finite (critics.0.w)") == 2
    assert [int(name[14:20]) for name in names(tmp_path)] == [1, 4]


def test_a_mask_of_infinities_that_was_there_from_the_start_forbids_no_save_and_a_weight_still_does(tmp_path, capsys):
    mask = torch.full((4, 4), -math.inf).triu(1)

    def with_weight(step, value, extra=mask):
        return {"model": {"w": torch.full((5,), value), "mask": extra}, "epoch": 1, "batch": step, "global_step": step}
    with saver(tmp_path, say=print, mid_epoch_keep=0) as s:
        for step in (1, 2):
            s.save_mid(with_weight(step, 1.0))
        s.save_mid(with_weight(3, math.inf))
        s.save_mid(with_weight(4, 2.0))
        s.save_mid(with_weight(5, math.nan))
        s.save_mid(with_weight(6, 3.0))
    said = capsys.readouterr().out
    assert said.count("mask holds infinities from the start: taken for a mask") == 1
    assert said.count("weights are not finite (w)") == 2
    assert [int(name[14:20]) for name in names(tmp_path)] == [1, 2, 4, 6]
    parameter = torch.nn.Parameter(torch.tensor([math.inf]))
    with saver(tmp_path / "new") as s:      # a NaN is never meant, nor an infinity in a Parameter
        s.save_mid(with_weight(1, math.nan))
        s.save_mid({"model": {"w": parameter}, "epoch": 1, "batch": 2, "global_step": 2})
        s.save_mid(with_weight(3, 1.0))
    assert names(tmp_path / "new") == ["mid_epoch_001_000003.pt"]
    checkpoint.atomic_save(with_weight(1, math.nan), tmp_path / "x.pt")     # a function that writes what it is given
    assert checkpoint.load(tmp_path / "x.pt")["model"]["w"].isnan().all()


def test_what_a_user_calls_metric_run_or_kind_is_saved_as_it_is_and_kept_out_of_the_progress_record(tmp_path):
    mine = {"metric": [0.12345678901234567] * 3400, "run": {"name": "mine" * 50_000}, "kind": "x" * 70_000, "epoch": 3}
    checkpoint.atomic_save(mine, tmp_path / "x.pt")
    assert checkpoint.load(tmp_path / "x.pt") == mine and zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    facts = checkpoint.peek(tmp_path / "x.pt")
    assert (facts["metric"], facts["run"], facts["kind"], facts["epoch"]) == (None, None, None, 3)
    for metric in ({"name": "a\x1b[2J", "value": 1.0}, {"name": "f1", "value": True}, {"name": "f1", "value": 1 << 2000}, {"name": 3, "value": 1.0}):
        checkpoint.atomic_save({"metric": metric, "epoch": 1}, tmp_path / "x.pt")
        assert checkpoint.peek(tmp_path / "x.pt")["metric"] is None and checkpoint.load(tmp_path / "x.pt")["metric"] == metric


def test_files_written_before_strides_and_notes_were_bounded_still_load(tmp_path):
    state_ = {"epoch": 1, "batch": 2, "global_step": 3, "save_counter": 4, "kind": "epoch", "run": "abc", "metric": {"name": "f1", "value": 0.5}}
    note = {**state_, "metric": {"name": "f1", "value": 0.5}}
    crafted(tmp_path / "last.pt", {**state_, "w": torch.ones(3)}, note=note)
    assert checkpoint.load(tmp_path / "last.pt")["global_step"] == 3 and checkpoint.find_resume(tmp_path, quiet)
    odd = {**state_, "metric": "accuracy 0.5"}              # anything went into the note then
    crafted(tmp_path / "last.pt", odd, note=odd)
    assert checkpoint.load(tmp_path / "last.pt")["metric"] == "accuracy 0.5" and checkpoint.peek(tmp_path / "last.pt")["metric"] is None


# ---- what passes is no damage ----

class Failing:
    """A file whose read number `which` fails."""

    def __init__(self, file, which, error):
        self.file, self.left, self.error = file, which, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def _counted(self, method, *arguments):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return method(*arguments)

    def read(self, *arguments):
        return self._counted(self.file.read, *arguments)

    def readinto(self, *arguments):
        return self._counted(self.file.readinto, *arguments)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError("no room")], ids=repr)
@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_read_that_fails_anywhere_is_a_fault_that_passes_and_never_damage(tmp_path, monkeypatch, writer, fault):
    path, real = tmp_path / "last.pt", checkpoint._open
    checkpoint.atomic_save(state(1), path) if writer == "ours" else torch.save(state(1), path)
    for read in (checkpoint.load, checkpoint.verify, checkpoint.peek):
        for which in range(1, 1000):
            failing = []

            def open_(path):
                failing.append(Failing(real(path), which, fault))
                return failing[-1]
            monkeypatch.setattr(checkpoint, "_open", open_)
            try:
                read(path)
                assert failing[-1].left > 0, f"{read.__name__} took no notice that read {which} failed"
                break
            except (OSError, MemoryError) as error:
                assert error is fault or isinstance(fault, MemoryError)
        assert which > (1 if writer == "ours" and read is checkpoint.peek else 10)
    monkeypatch.setattr(checkpoint, "_open", real)
    assert sound(checkpoint.load(path)) == 1


def test_neither_memory_nor_threads_nor_descriptors_that_run_out_are_damage(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.atomic_save({"w": torch.zeros(10_000_000), "epoch": 1, "batch": 1}, path)
    checkpoint.load(path)

    def child():
        size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
        for room in range(0, 48 << 20, 4 << 20):
            resource.setrlimit(resource.RLIMIT_AS, (1024 * size + room, resource.RLIM_INFINITY))
            for read in (checkpoint.load, checkpoint.verify):
                with contextlib.suppress(MemoryError):
                    read(path)
                    ended.append(room)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

        def no_thread(self):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = no_thread
        assert checkpoint.verify(path) and checkpoint.find_resume(tmp_path, quiet) == path
        checkpoint.atomic_save(checkpoint.load(path), path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(OSError) as error:
            checkpoint.load(path)
        assert error.value.errno == errno.EMFILE
    ended = []
    assert crash.run_child(child) == "done"


def test_a_device_that_is_not_here_is_no_damage_to_the_file(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "last.pt")
    for device in ("nonsense", "cuda:99"):
        with pytest.raises((RuntimeError, AssertionError)):
            checkpoint.load(tmp_path / "last.pt", map_location=device)
    assert checkpoint.load(tmp_path / "last.pt", map_location=lambda storage, location: storage)["epoch"] == 1


def test_a_gpu_that_fails_while_a_file_is_loaded_is_no_damage_to_it(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "last.pt")

    def fail(storage, location):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(torch.AcceleratorError):
        checkpoint.load(tmp_path / "last.pt", map_location=fail)


class Code:
    def __reduce__(self):
        return print, ("it ran",)


def test_what_another_program_wrote_whole_is_foreign_and_what_is_damaged_is_not(tmp_path, capfd):
    torch.save({"epoch": 1, "model": Code()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1, "batch": 2}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "newer.pt", _use_new_zipfile_serialization=False, pickle_protocol=4)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"epoch": 1, "batch": 2}))
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)).save(tmp_path / "script.pt")
    numpy.savez(tmp_path / "arrays", a=1)
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pt")
    torch.save({"weights": torch.ones(500)}, tmp_path / "weights.pt")
    for name in ("code.pt", "list.pt", "legacy.pt", "newer.pt", "pickle.pt", "script.pt", "arrays.pt"):
        with pytest.raises(checkpoint.CorruptCheckpoint) as refusal:
            checkpoint.load(tmp_path / name)
        assert refusal.value.foreign, name
    assert checkpoint.peek(tmp_path / "weights.pt")["position"] is None and checkpoint.verify(tmp_path / "weights.pt")
    checkpoint.atomic_save({"weights": torch.ones(500)}, tmp_path / "ours.pt")
    for name in ("weights.pt", "ours.pt"):                  # where values lie
        blob = bytearray((tmp_path / name).read_bytes())
        blob[len(blob) // 2] ^= 1
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(checkpoint.CorruptCheckpoint) as refusal:
            checkpoint.load(tmp_path / name)
        assert not refusal.value.foreign, name
    assert "it ran" not in capfd.readouterr().out


def test_a_peek_reads_a_small_part_of_a_file_written_here(tmp_path, monkeypatch):
    checkpoint.atomic_save({**state(1), "many": list(torch.arange(3000.0).unbind())}, tmp_path / "last.pt")
    taken, real = [], checkpoint._open

    class Counted(Failing):
        def read(self, *arguments):
            data = self.file.read(*arguments)
            taken.append(len(data))
            return data
    monkeypatch.setattr(checkpoint, "_open", lambda path: Counted(real(path), 0, None))
    assert checkpoint.peek(tmp_path / "last.pt")["epoch"] == 1 and sum(taken) <= 1024 < (tmp_path / "last.pt").stat().st_size
