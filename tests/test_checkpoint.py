"""Policy of checkpoint.py: choosing, rotating, best, timers, faults, links, locks, the command line."""
import argparse
import errno
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import crash
import forked
from conftest import ROOT
from crash import docstring_loop, sound, state
from test_crash import recover, saver, temps


def quiet(line):
    pass


def names(directory):
    return sorted(p.name for p in Path(directory).glob("*.pt"))


# ---- what is in a file ----

def test_every_kind_of_plain_value_and_tensor_comes_back_as_it_was(tmp_path):
    tied = torch.randn(7)
    saved = {"tied": [tied, tied], "slice": torch.arange(1000)[10:20], "turned": torch.randn(3, 4).t(), "none": None,
             "empty": torch.zeros(0, 3), "scalar": torch.tensor(5), "bf16": torch.randn(4).bfloat16(), "flag": torch.tensor([True]),
             "complex": torch.randn(3, dtype=torch.complex64), "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
             "float8": torch.randn(4).to(torch.float8_e4m3fn), "tuple": (1, 2.5, "x", b"y"), "set": {1, 2}, 3: "int key",
             "numpy": np.float64(0.5), "array": np.arange(3), "big": 2**80, "nan": math.nan, "size": torch.Size([2])}
    checkpoint.atomic_save(saved, tmp_path / "x.pt")
    for got in (checkpoint.load(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True),
                torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)):
        for key in ("slice", "turned", "empty", "scalar", "bf16", "flag", "complex"):
            assert got[key].dtype == saved[key].dtype and torch.equal(got[key], saved[key]), key
        assert got["uint16"].tolist() == [1, 65535] and torch.equal(got["float8"].float(), saved["float8"].float())
        assert got["tied"][0].data_ptr() == got["tied"][1].data_ptr()
        assert (got["tuple"], got["set"], got[3], got["numpy"], got["big"]) == ((1, 2.5, "x", b"y"), {1, 2}, "int key", 0.5, 2**80)
        assert type(got["numpy"]) is float and got["array"].tolist() == [0, 1, 2] and math.isnan(got["nan"])
    assert (tmp_path / "x.pt").stat().st_size < 20_000, "a slice must not drag its whole storage along"


def test_metadata_of_a_state_dict_is_kept(tmp_path):
    model = torch.nn.BatchNorm1d(3)
    checkpoint.atomic_save({"model": model.state_dict()}, tmp_path / "x.pt")
    assert checkpoint.load(tmp_path / "x.pt")["model"]._metadata == model.state_dict()._metadata


def test_a_tensor_and_its_conjugate_are_two_tensors(tmp_path):
    wave = torch.randn(5, dtype=torch.complex64)
    checkpoint.atomic_save({"a": wave, "b": wave.conj(), "c": wave.conj().imag, "d": wave.imag}, tmp_path / "x.pt")
    got = checkpoint.load(tmp_path / "x.pt")
    assert torch.equal(got["a"], wave) and torch.equal(got["b"], wave.conj())
    assert torch.equal(got["c"], -wave.imag) and torch.equal(got["d"], wave.imag)


def test_numpy_arrays_of_any_stride_are_stored_and_of_foreign_byte_order_refused_by_key(tmp_path):
    saved = {"back": np.arange(5)[::-1], "frozen": np.frombuffer(b"abcdefgh", dtype=np.int32), "flag": np.bool_(True),
             "u16": np.array([1, 65535], dtype=np.uint16), "cut": np.arange(10.0)[::3], "zero": np.array(7)}
    checkpoint.atomic_save(saved, tmp_path / "x.pt")
    for key, value in checkpoint.load(tmp_path / "x.pt").items():
        assert np.array_equal(np.asarray(value), saved[key]), key
    with pytest.raises(TypeError, match=r"\['a'\].*byte order"):
        checkpoint.atomic_save({"a": np.arange(3, dtype=">i4")}, tmp_path / "y.pt")
    assert names(tmp_path) == ["x.pt"]


@pytest.mark.slow
def test_more_tensors_than_sixteen_bits_count_need_the_large_zip_end_record_and_come_back(tmp_path):
    checkpoint.atomic_save({"w": [v.clone() for v in torch.arange(65_600).unbind()]}, tmp_path / "x.pt")
    assert len(zipfile.ZipFile(tmp_path / "x.pt").namelist()) == 65_603
    assert torch.equal(torch.stack(checkpoint.load(tmp_path / "x.pt")["w"]), torch.arange(65_600))
    blob = bytearray((tmp_path / "x.pt").read_bytes())
    blob[blob.rfind(b"PK\6\6") + 47] ^= 0x40                # a directory of 4 exabytes: refused, not allocated
    (tmp_path / "x.pt").write_bytes(blob)
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("value, message", [(Path("x"), "PosixPath"), (torch.eye(3).to_sparse(), "only dense tensors"),
                                            (lambda: 0, "function")])
def test_what_could_not_be_loaded_again_is_refused_by_its_key_and_nothing_is_written(tmp_path, value, message):
    checkpoint.atomic_save(state(1), tmp_path / "last.pt")
    with pytest.raises(TypeError, match=message) as refusal:
        checkpoint.atomic_save({"a": {"b": [0, value]}}, tmp_path / "last.pt")
    assert "['a']['b'][1]" in str(refusal.value) and sound(checkpoint.load(tmp_path / "last.pt")) == 1


def test_what_another_process_was_allowed_to_save_is_refused_here_and_not_called_damaged(tmp_path, capsys):
    for number in (1, 2):
        with torch.serialization.safe_globals([argparse.Namespace] * (number - 1)), saver(tmp_path) as s:
            s.save_mid(state(number) | {"args": argparse.Namespace(lr=1) if number == 2 else None})
    capsys.readouterr()
    assert checkpoint.main(["verify", str(tmp_path)]) == 0 and checkpoint.main(["clean", str(tmp_path), "--yes"]) == 0
    said = capsys.readouterr().out
    assert said.count("FOREIGN: weights_only loading refuses it: it would run argparse.Namespace") == 2
    assert sound(checkpoint.load(checkpoint.find_resume(tmp_path))) == 1
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert sound(checkpoint.load(checkpoint.find_resume(tmp_path))) == 2


def test_a_file_that_the_system_does_not_let_go_is_not_said_to_be_rotated_out(tmp_path, capfd):
    paths = [tmp_path / f"mid_epoch_001_{number:06d}.pt" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        checkpoint.atomic_save(state(number, batch=number) | {"save_counter": number}, path)
    if subprocess.run(["chattr", "+i", paths[0]], capture_output=True).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        assert checkpoint.rotate(tmp_path, "mid*", 1) == [paths[1]]
        assert f"could not remove {paths[0]}" in capfd.readouterr().err
    finally:
        subprocess.run(["chattr", "-i", paths[0]])


def test_any_zip_tool_and_plain_torch_open_a_checkpoint(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "x.pt")
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-tqq", str(tmp_path / "x.pt")]).returncode == 0


def test_headers_of_records_beyond_four_gigabytes_are_read_by_zip_tools(tmp_path):
    size, path = 5 * 2**30, tmp_path / "big.pt"
    big = checkpoint._entry("data/0", size, 0)
    end = len(big.FileHeader()) + size
    with open(path, "wb") as file:          # sparse: five gigabytes of nothing
        file.write(big.FileHeader())
        file.seek(end)
        tail = checkpoint._After(end)
        with zipfile.ZipFile(tail, "w") as archive:
            archive.filelist.append(big)
            archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
        file.write(tail.getvalue())
    with zipfile.ZipFile(path) as archive:
        assert [(i.file_size, i.header_offset) for i in archive.infolist()] == [(size, 0), (2, end)]
        assert archive.read("archive/version") == b"3\n"


def test_the_file_holds_the_values_of_the_moment_of_the_call(tmp_path):
    live = state(1)
    live["optimizer"]["groups"] = [{"lr": 1.0}]
    with saver(tmp_path, background=True) as s:
        for step in (1, 2):
            live["model"]["weight"].copy_(state(step)["model"]["weight"])
            live["optimizer"]["state"][0]["step"].fill_(step)
            live["model"]["half"].fill_(step), live["optimizer"]["state"][0]["exp_avg"].copy_(2 * live["model"]["weight"])
            live |= {"global_step": step, "batch": step}
            live["optimizer"]["lr"] = 0.1 * step
            s.save_mid(live)
            live["model"]["weight"].zero_(), live["optimizer"]["state"][0]["exp_avg"].fill_(-1)
            live["optimizer"]["groups"][0]["lr"], live["optimizer"]["lr"] = -1, -1
    for step in (1, 2):
        got = checkpoint.load(tmp_path / f"mid_epoch_001_{step:06d}.pt")
        assert sound(got) == step and got["optimizer"]["groups"][0]["lr"] == (1.0 if step == 1 else -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_snapshot_of_gpu_tensors_holds_the_values_of_the_call(tmp_path):
    weight = torch.arange(10_000_000, device="cuda", dtype=torch.float32)
    with saver(tmp_path, background=True) as s:
        for step in (1, 2, 3):
            s.save_mid({"model": {"w": weight}, "epoch": 1, "batch": step, "global_step": step})
            weight.add_(1)
    for step in (2, 3):
        got = checkpoint.load(tmp_path / f"mid_epoch_001_{step:06d}.pt")["model"]["w"]
        assert torch.equal(got, torch.arange(10_000_000, dtype=torch.float32) + step - 1)


@pytest.mark.slow                       # alone: it takes the whole card for a moment
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_save_leaves_to_training_the_gpu_memory_that_it_has_freed_between_two_steps(tmp_path):
    weight = torch.ones(50_000_000, device="cuda")
    room = torch.cuda.mem_get_info()[0] - 150_000_000          # less is left than a clone of the weight takes

    def step():
        torch.empty(room, dtype=torch.uint8, device="cuda")
    step()
    try:
        with saver(tmp_path, background=True) as s:
            s.save_mid({"model": {"w": weight}, "epoch": 1, "batch": 1, "global_step": 1})
            step()
    finally:
        torch.cuda.empty_cache()
    assert torch.equal(checkpoint.load(tmp_path / "mid_epoch_001_000001.pt")["model"]["w"], weight.cpu())


ON_THE_LAST = f"""
import sys
import torch
sys.path.insert(0, {str(ROOT)!r})
import checkpoint
last = torch.cuda.device_count() - 1
torch.manual_seed(0)
if sys.argv[2:]:                        # before CUDA starts
    state = checkpoint.load(sys.argv[1])
    checkpoint.restore_random_states(state["random"])
    assert torch.equal(torch.rand(5, device=f"cuda:{{last}}").cpu(), state["next"])
    checkpoint.restore_random_states(state["random"] | {{"cuda": state["random"]["cuda"][0]}})
else:
    torch.rand(5, device=f"cuda:{{last}}")
    random = checkpoint.random_states()
    state = {{"random": random, "next": torch.rand(5, device=f"cuda:{{last}}"), "w": torch.ones(5, device=f"cuda:{{last}}")}}
    with checkpoint.Checkpointer("checkpoints") as saver:
        saver.save_mid({{**state, "epoch": 1, "batch": 1}})
    checkpoint.atomic_save(state, sys.argv[1])
    assert last == 0 or not torch._C._cuda_hasPrimaryContext(0)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_random_numbers_of_a_gpu_that_is_not_the_current_one_go_on_in_a_process_that_has_not_used_it_yet(tmp_path):
    for again in ([], ["again"]):
        subprocess.run([sys.executable, "-c", ON_THE_LAST, str(tmp_path / "x.pt"), *again], cwd=tmp_path, check=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here")
def test_a_snapshot_of_tensors_on_several_gpus_and_the_cpu_holds_the_values_of_the_call(tmp_path):
    values = {device: torch.arange(1_000_000, device=device, dtype=torch.float32) for device in ("cuda:1", "cpu", "cuda:0")}
    with saver(tmp_path, background=True) as s:
        for step in (1, 2, 3):
            s.save_mid({"model": values, "epoch": 1, "batch": step, "global_step": step})
            for value in values.values():
                value.add_(1)
    got = checkpoint.load(tmp_path / "mid_epoch_001_000003.pt")["model"]
    assert all(torch.equal(value, torch.arange(1_000_000, dtype=torch.float32) + 2) for value in got.values())


# ---- the choice ----

def put(directory, name, **progress):
    Path(directory).mkdir(exist_ok=True)
    checkpoint.atomic_save({"epoch": 1, "batch": 0, "global_step": 0, "save_counter": 0, **progress}, Path(directory, name))
    os.utime(Path(directory, name), (random.random() * 1e9,) * 2)           # dates must never matter


@pytest.mark.parametrize("files, chosen", [
    ({"mid_epoch_003_000010.pt": (3, 10, 210, 9), "last.pt": (2, 100, 200, 8)}, "mid_epoch_003_000010.pt"),
    ({"mid_epoch_002_000090.pt": (2, 90, 190, 7), "last.pt": (2, 100, 200, 8)}, "last.pt"),
    ({"mid_epoch_999_000010.pt": (999, 10, 9, 1), "mid_epoch_1000_000001.pt": (1000, 1, 10, 2)}, "mid_epoch_1000_000001.pt"),
    ({"mid_epoch_001_999999.pt": (1, 999999, 9, 1), "mid_epoch_001_1000000.pt": (1, 1000000, 10, 2)}, "mid_epoch_001_1000000.pt"),
    ({"mid_epoch_005_000500.pt": (5, 500, 900, 20), "mid_epoch_003_000001.pt": (3, 1, 201, 21)}, "mid_epoch_003_000001.pt"),
    ({"mid_epoch_003_000050.pt": (3, 50, 250, 14), "last.pt": (2, 100, 200, 11)}, "mid_epoch_003_000050.pt"),
    ({"mid_epoch_002_000100.pt": (2, 100, 200, 5), "last.pt": (2, 100, 200, 5)}, "mid_epoch_002_000100.pt"),
    ({"checkpoint_epoch_004.pt": (4, 100, 400, 9)}, "checkpoint_epoch_004.pt"),
    ({"best.pt": (4, 100, 400, 9)}, None)],
    ids=["mid after last", "stale mid", "1000 epochs", "a million batches", "rolled-back line", "late writer", "tie", "epoch file",
         "best alone"])
def test_the_resume_takes_the_latest_save_by_what_is_stored_inside(tmp_path, files, chosen):
    for name, (epoch, batch, step, counter) in files.items():
        put(tmp_path, name, epoch=epoch, batch=batch, global_step=step, save_counter=counter)
    found = checkpoint.find_resume(tmp_path)
    assert (found.name if found else None) == chosen


def test_damaged_and_odd_files_are_named_and_skipped(tmp_path, capsys):
    for step in (1, 2, 3):
        put(tmp_path, f"mid_epoch_001_{step:06d}.pt", batch=step, global_step=step, save_counter=step)
    (tmp_path / "mid_epoch_001_000003.pt").write_bytes((tmp_path / "mid_epoch_001_000003.pt").read_bytes()[:-1])
    (tmp_path / "last.pt").mkdir()
    (tmp_path / "checkpoint_epoch_009.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "mid_epoch_001_000009.pt").write_bytes(b"")
    put(tmp_path, "mid_epoch_001_000010.pt", batch=-4, save_counter=99)
    assert checkpoint.find_resume(tmp_path).name == "mid_epoch_001_000002.pt"
    out = capsys.readouterr().out
    for name in ("mid_epoch_001_000003.pt", "last.pt", "checkpoint_epoch_009.pt", "mid_epoch_001_000009.pt", "mid_epoch_001_000010.pt"):
        assert f"skipped {name}" in out
    assert "older: mid_epoch_001_000001.pt" in out and checkpoint.find_resume(tmp_path / "absent") is None


def test_whichever_of_the_newest_files_are_damaged_the_resume_takes_the_best_of_the_rest(tmp_path):
    rng, sound_files = random.Random(0), {}
    for step in range(1, 7):
        put(tmp_path, f"mid_epoch_001_{step:06d}.pt", batch=step, global_step=step, save_counter=step, w=torch.ones(5000) * step)
        sound_files[step] = (tmp_path / f"mid_epoch_001_{step:06d}.pt").read_bytes()
    harm = [lambda b: b[:rng.randrange(len(b))], lambda b: bytes(len(b)), lambda b: b[:8000] + bytes([b[8000] ^ 1]) + b[8001:],
            lambda b: b""]
    for mask in range(64):
        damaged, said = [step for step in sound_files if mask >> (step - 1) & 1], []
        for step, blob in sound_files.items():
            path = tmp_path / f"mid_epoch_001_{step:06d}.pt"
            path.write_bytes(rng.choice(harm)(blob) if step in damaged else blob)
        left = [step for step in sound_files if step not in damaged]
        found = checkpoint.find_resume(tmp_path, said.append)
        assert (found.name if found else None) == (f"mid_epoch_001_{max(left):06d}.pt" if left else None)
        for step in damaged:
            if not left or step > max(left):
                assert any(f"skipped mid_epoch_001_{step:06d}.pt: " in line for line in said)


def test_a_copied_directory_resumes_the_same_though_links_and_dates_are_gone(tmp_path):
    with saver(tmp_path / "run") as s:
        s.save_mid(state(1))
        s.save_epoch(state(2, epoch=1), metric=0.5)
        s.save_mid(state(3, epoch=2))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (random.random() * 1e9,) * 2)
    assert checkpoint.find_resume(tmp_path / "copy").name == "mid_epoch_002_000003.pt"
    with saver(tmp_path / "copy", mid_epoch_keep=1) as s:
        assert s.resume()["global_step"] == 3 and s.position == (2, 3)
        s.save_epoch(state(4, epoch=2), metric=0.4)
        s.save_mid(state(5, epoch=3))
    assert recover(tmp_path / "copy") == 5 and sound(checkpoint.load(tmp_path / "copy/best.pt")) == 2


def test_a_predecessor_that_writes_late_changes_nothing(tmp_path):
    with saver(tmp_path) as old:
        old.save_mid(state(1))
        late = {**state(2), "kind": "mid_epoch", "run": old.run, "save_counter": 2}         # still in its writer when it lost
    with saver(tmp_path) as new:                                                            # the directory
        new.resume()
        for step in (2, 3):
            new.save_mid(state(step, batch=10 + step))
        checkpoint.atomic_save(late, tmp_path / "mid_epoch_001_000002.pt")
        checkpoint.atomic_save({**late, "kind": "epoch"}, tmp_path / "last.pt")
        assert recover(tmp_path) == 3
        new.save_mid(state(4, batch=14))
    assert recover(tmp_path) == 4 and checkpoint.find_resume(tmp_path).name == "mid_epoch_001_000014.pt"


def test_a_reader_that_maps_a_file_keeps_its_values_through_later_saves(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "best.pt")
    mapped = torch.load(tmp_path / "best.pt", weights_only=True, mmap=True)
    for step in (2, 3):
        checkpoint.atomic_save(state(step), tmp_path / "best.pt")
    assert sound(mapped) == 1 and sound(checkpoint.load(tmp_path / "best.pt")) == 3


def test_choosing_among_ten_files_costs_a_small_part_of_reading_them(tmp_path):
    for step in range(10):
        checkpoint.atomic_save({**state(step), "x": torch.randn(2_000_000)}, tmp_path / f"mid_epoch_001_{step:06d}.pt")
    start = time.process_time()             # the processor's: other work on the machine does not count
    for path in tmp_path.glob("*.pt"):
        checkpoint.verify(path)
    reading, start = time.process_time() - start, time.process_time()
    assert len(checkpoint.candidates(tmp_path)) == 10
    assert (time.process_time() - start) < reading / 3


def test_saves_after_a_rollback_outrank_the_abandoned_line(tmp_path):
    with saver(tmp_path, mid_epoch_keep=0) as s:
        for step in (1, 2, 3, 4):
            s.save_mid(state(step))
    with saver(tmp_path, mid_epoch_keep=0) as s:
        s.resume(tmp_path / "mid_epoch_001_000002.pt")
        s.save_mid(state(3, batch=33))
    assert checkpoint.find_resume(tmp_path).name == "mid_epoch_001_000033.pt"


# ---- rotation ----

def test_rotation_keeps_the_newest_saves_whatever_their_dates_names_and_neighbours(tmp_path):
    for step in range(1, 9):
        put(tmp_path, f"mid_epoch_001_{9 - step:06d}.pt", batch=9 - step, global_step=step, save_counter=step, run="mine")
    put(tmp_path, "mid_epoch_007_000001.pt", save_counter=2, run="another")
    (tmp_path / "mid_epoch_001_000077.pt").write_bytes(b"cannot be parsed")
    resumed = tmp_path / "mid_epoch_001_000008.pt"
    gone = checkpoint.rotate(tmp_path, "mid_epoch_*.pt", 3, protect=[resumed])
    assert names(tmp_path) == ["mid_epoch_001_000001.pt", "mid_epoch_001_000002.pt", "mid_epoch_001_000008.pt",
                               "mid_epoch_001_000077.pt", "mid_epoch_007_000001.pt"] and len(gone) == 5
    assert checkpoint.rotate(tmp_path, "mid_epoch_*.pt", 0) == []
    with pytest.raises(ValueError, match="keep must be a whole number, 0 or more"):
        checkpoint.rotate(tmp_path, "mid_epoch_*.pt", -1)


def test_rotation_of_states_without_progress_keeps_the_highest_numbers_of_their_names(tmp_path):
    for epoch in (1, 2, 9, 99, 100, 999, 1000):
        checkpoint.atomic_save({"weights": epoch}, tmp_path / f"checkpoint_epoch_{epoch:03d}.pt")
    checkpoint.rotate(tmp_path, "checkpoint_epoch_*.pt", 3)
    assert names(tmp_path) == ["checkpoint_epoch_100.pt", "checkpoint_epoch_1000.pt", "checkpoint_epoch_999.pt"]


def test_states_without_counter_are_one_save_only_where_their_progress_is_one(tmp_path):
    for batch, step in ((4, 24), (9, 29)):
        checkpoint.atomic_save({"epoch": 3, "batch": batch, "global_step": step}, tmp_path / f"mid_epoch_003_{batch:06d}.pt")
    shutil.copy(tmp_path / "mid_epoch_003_000009.pt", tmp_path / "last.pt")
    said = []
    checkpoint.find_resume(tmp_path, said.append)
    assert said[1].endswith("last.pt: epoch 3 batch 9 step 29 save 0, the same save")
    assert said[2].endswith("mid_epoch_003_000004.pt: epoch 3 batch 4 step 24 save 0, an earlier save")


def test_rotation_spares_the_resumed_file_however_its_path_is_written_and_best_under_any_pattern(tmp_path, monkeypatch):
    run = tmp_path / "run"
    put(run, "best.pt", save_counter=1, run="r")
    for step in range(2, 7):
        put(run, f"mid_epoch_001_{step:06d}.pt", batch=step, save_counter=step, run="r")
    (tmp_path / "alias").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    checkpoint.rotate("run", "*.pt", 2, protect=[run / "mid_epoch_001_000002.pt", "alias/mid_epoch_001_000003.pt"])
    assert names(run) == ["best.pt", "mid_epoch_001_000002.pt", "mid_epoch_001_000003.pt", "mid_epoch_001_000006.pt"]


def test_after_any_run_of_saves_kills_and_rollbacks_the_newest_best_and_resumed_files_are_there(tmp_path):
    rng = random.Random(1)
    for life in range(12):
        with saver(tmp_path, mid_epoch_keep=rng.choice((1, 2, 5)), checkpoint_keep=rng.choice((1, 3))) as s:
            files = [None, *tmp_path.glob("*epoch*.pt")]
            picked = rng.choice(files)
            s.resume(picked or True)
            resumed, step = s.resumed, life * 100
            for _ in range(rng.randrange(1, 12)):
                step += 1
                if rng.random() < 0.7:
                    s.save_mid(state(step, epoch=s.position[0]))
                else:
                    s.save_epoch(state(step, epoch=s.position[0]), metric=rng.random())
                for path in tmp_path.glob("*.pt"):
                    os.utime(path, (rng.random() * 1e9,) * 2)
                assert recover(tmp_path) == step, "the save just made is the one a resume takes"
                assert resumed is None or sound(checkpoint.load(resumed)) >= 0
                best = tmp_path / "best.pt"
                assert not best.exists() or sound(checkpoint.load(best)) >= 0


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_at_every_instant_of_a_run_the_last_save_that_returned_is_there(tmp_path, keep):
    returned, looks = [0], [0]

    def look(number, name, arguments):
        with watched.paused():
            looks[0] += 1
            found = recover(tmp_path)
            assert not returned[0] or found >= returned[0]
    watched = crash.Watched(tmp_path, look)
    with saver(tmp_path, mid_epoch_keep=keep, checkpoint_keep=keep) as s, watched:
        for step in range(1, 13):
            s.save_epoch(state(step, epoch=step // 3), metric=-step) if step % 3 == 0 else s.save_mid(state(step, epoch=step // 3 + 1))
            returned[0] = step
    assert looks[0] > 150


@pytest.mark.parametrize("links", [pytest.param(True, marks=pytest.mark.slow), False], ids=["hard links", "no hard links"])
def test_a_hundred_epochs_with_the_defaults_never_hold_two_gigabytes_of_v3(tmp_path, links, monkeypatch):
    if not links:
        def refuse(*arguments, **options):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", refuse)
    small, most = {"model": {"w": torch.zeros(50_000)}, "global_step": 0}, [0]

    def measure(number, name, arguments):
        if name not in ("write", "rename", "replace", "link", "unlink"):
            return                          # the calls in between change no size
        inodes = {entry.inode(): entry.stat().st_size for entry in os.scandir(tmp_path) if entry.is_file()}
        most[0] = max(most[0], sum(inodes.values()))
    with crash.Watched(tmp_path, measure), checkpoint.Checkpointer(tmp_path, background=False, say=quiet) as s:
        for epoch in range(1, 101):
            for batch in range(1, 4 + 4 * (epoch % 3 == 0)):
                s.save_mid(small | {"epoch": epoch, "batch": batch})
            s.save_epoch(small | {"epoch": epoch, "batch": 9}, metric=math.sin(epoch * epoch))
    one = (tmp_path / "last.pt").stat().st_size
    print(f"most at any instant: {most[0] / one:.2f} files = {most[0] / one * 0.1945:.3f} GB of V3, links {links}")
    assert most[0] / one * 194.5e6 < 2.0e9
    assert len(list(tmp_path.glob("mid_epoch_*"))) == (5 if links else 3) and len(list(tmp_path.glob("checkpoint_epoch_*"))) == 3
    assert (os.stat(tmp_path / "last.pt").st_ino == os.stat(tmp_path / "checkpoint_epoch_100.pt").st_ino) == links


# ---- best ----

def test_best_moves_only_on_strict_improvement_and_survives_resume(tmp_path):
    def end(s, epoch, metric):
        return s.save_epoch(state(epoch, epoch=epoch), metric=metric, name="f1")
    with saver(tmp_path) as s:
        assert not end(s, 1, math.nan) and end(s, 2, np.float32(0.5)) and not end(s, 3, 0.5) and not end(s, 4, math.nan)
    before = (tmp_path / "best.pt").read_bytes()
    with saver(tmp_path) as s:
        s.resume()
        assert not end(s, 5, 0.3) and (tmp_path / "best.pt").read_bytes() == before
        assert end(s, 6, 0.6)
    assert checkpoint.load(tmp_path / "best.pt")["holdfast"]["metric"] == {"name": "f1", "value": 0.6}
    assert checkpoint.better(1.0, 2.0, "min") and not checkpoint.better(2.0, 2.0, "min") and checkpoint.better(-math.inf, math.nan)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("metric, best", [(0.6, 2), (0.5, 1), (math.nan, 1)])
def test_an_epoch_killed_before_it_was_named_last_and_best_gets_its_names_at_the_resume(tmp_path, links, metric, best, monkeypatch):
    if not links:
        def refuse(*arguments, **options):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", refuse)
    with saver(tmp_path) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        named = {"kind": "epoch", "run": s.run, "save_counter": 2, "metric": {"name": "metric", "value": metric}}
    checkpoint.atomic_save(state(2, epoch=2) | named, tmp_path / "checkpoint_epoch_002.pt")
    with saver(tmp_path) as s:
        assert s.resume()["global_step"] == 2 and s.position == (3, 0)
    assert sound(checkpoint.load(tmp_path / "last.pt")) == 2 and sound(checkpoint.load(tmp_path / "best.pt")) == best
    with saver(tmp_path) as s:              # going back to a file of one's choice renames nothing
        s.resume(tmp_path / "checkpoint_epoch_001.pt")
    assert sound(checkpoint.load(tmp_path / "last.pt")) == 2 and not temps(tmp_path)


def test_a_damaged_best_is_said_and_replaced(tmp_path, capsys):
    (tmp_path / "best.pt").write_bytes(b"damaged")
    with saver(tmp_path, say=print) as s:
        assert s.save_epoch(state(1, epoch=1), metric=0.1)
    assert "best.pt cannot be compared" in capsys.readouterr().out and checkpoint.verify(tmp_path / "best.pt")


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_file_of_another_program_under_a_name_of_ours_is_listed_as_foreign_and_set_aside_said(tmp_path, capsys, name):
    torch.save({"metric": 0.9}, tmp_path / name)
    theirs = (tmp_path / name).read_bytes()
    assert checkpoint.main(["ls", str(tmp_path)]) == 0 and name in capsys.readouterr().out
    with saver(tmp_path, say=print) as s:
        assert s.resume() is None and s.save_epoch(state(1, epoch=1), metric=0.1)
    assert f"{name} is another program's: kept as foreign_{name}" in capsys.readouterr().out
    assert (tmp_path / f"foreign_{name}").read_bytes() == theirs and checkpoint.peek(tmp_path / name)["metric"]["value"] == 0.1


def test_best_by_a_smaller_loss_by_another_metric_and_on_ties_after_resume(tmp_path):
    with saver(tmp_path, mode="min") as s:
        assert [s.save_epoch(state(e, epoch=e), metric=m, name="loss") for e, m in enumerate((2.0, 2.0, 1.5, math.inf, 1.6), 1)] \
            == [True, False, True, False, False]
        assert s.save_epoch(state(6, epoch=6), metric=9.0, name="hours"), "another metric cannot be compared: it begins anew"
        assert not s.save_epoch(state(7, epoch=7)), "an epoch without a metric is never the best"
    with saver(tmp_path, mode="min") as s:
        assert s.resume()["global_step"] == 7 and not s.save_epoch(state(8, epoch=8), metric=9.0, name="hours")
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 6


def test_names_of_one_state_are_links_and_outlive_each_other(tmp_path):
    with saver(tmp_path) as s:
        s.save_epoch(state(1, epoch=1), metric=0.1)
    assert len({(tmp_path / n).stat().st_ino for n in ("last.pt", "best.pt", "checkpoint_epoch_001.pt")}) == 1
    (tmp_path / "checkpoint_epoch_001.pt").unlink()
    assert sound(checkpoint.load(tmp_path / "last.pt")) == 1


# ---- timer and environment ----

def test_snapshots_come_at_every_interval_the_first_within_two_minutes(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    with saver(tmp_path, mid_epoch_minutes=30) as s:
        due = []
        for step in range(1, 200):          # a step a minute
            clock[0] += 60
            if s.due():
                due.append(step)
                s.save_mid(state(step))
    assert due == [2, 32, 62, 92, 122, 152, 182]


def test_the_timer_runs_on_across_epochs_and_zero_minutes_means_every_step(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    with saver(tmp_path / "a", mid_epoch_minutes=30) as s:
        due = []
        for minute in range(1, 130):
            clock[0] += 60
            if minute % 40 == 39:           # an epoch end is a save too: the next one is due an interval later
                s.save_epoch(state(minute, epoch=minute // 40 + 1))
            elif s.due():
                due.append(minute)
                s.save_mid(state(minute, epoch=minute // 40 + 1))
        assert due == [2, 32, 69, 109]
    with saver(tmp_path / "b", mid_epoch_minutes=0) as s:
        for step in (1, 2, 3):
            assert s.due()
            s.save_mid(state(step))


# ---- faults ----

def test_three_failed_saves_in_a_row_stop_and_one_success_forgives(tmp_path, capsys):
    home = tmp_path / "run"
    with saver(home, say=print, background=True, save_patience_minutes=0) as s:
        s.save_mid(state(1))
        s.wait()
        os.rename(home, tmp_path / "gone")
        for _ in range(2):
            s.save_mid(state(2))
            s.wait()
        os.rename(tmp_path / "gone", home)
        s.save_mid(state(3))
        s.wait()
        os.rename(home, tmp_path / "gone")
        with pytest.raises(checkpoint.SaveFailed):
            for step in (4, 5, 6):
                s.save_mid(state(step))
                s.wait()
    assert f"save failed (2 in a row): No such file or directory: {home};" in capsys.readouterr().out
    assert recover(tmp_path / "gone") == 3


def test_weights_that_are_not_finite_are_never_written(tmp_path, capsys):
    with saver(tmp_path, say=print) as s:
        s.save_epoch(state(1, epoch=1), metric=0.1)
        broken = state(2, epoch=2)
        broken["model"]["weight"][17] = math.nan
        s.save_epoch(broken, metric=0.9)
    assert "weights are not finite (weight)" in capsys.readouterr().out
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 1 and recover(tmp_path) == 1


def test_without_links_a_save_refused_for_its_weights_costs_no_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "links_work", lambda directory: False)
    with saver(tmp_path, mid_epoch_keep=4) as s:
        for batch in range(1, 5):
            s.save_mid(state(batch, batch=batch))
        s.wait()
        before = names(tmp_path)
        broken = state(5, epoch=1)
        broken["model"]["weight"][17] = math.nan
        s.save_epoch(broken, metric=0.9)
        s.wait()
        assert names(tmp_path) == before and len(before) == 4


def test_progress_that_no_resume_could_take_is_refused_at_the_save(tmp_path):
    with saver(tmp_path) as s:
        for wrong in ({"epoch": torch.tensor(1)}, {"global_step": 3.0}, {"batch": True}):
            with pytest.raises(TypeError, match="must be a whole number"):
                s.save_mid(state(1) | wrong)
        s.save_mid(state(1) | {"epoch": np.int64(1)})
        with pytest.raises(TypeError, match="the state has no 'epoch'"):
            s.save_mid({"model": {}})
    assert names(tmp_path) == ["mid_epoch_001_000001.pt"] and recover(tmp_path) == 1


def test_weights_of_eight_bits_are_checked_too(tmp_path, capsys):
    with saver(tmp_path, say=print) as s:
        for step, value in ((1, 0.5), (2, math.nan)):
            weight = torch.full((4,), value).to(torch.float8_e4m3fn)
            s.save_mid({"model": {"w": weight}, "epoch": 1, "batch": step, "global_step": step})
    assert names(tmp_path) == ["mid_epoch_001_000001.pt"] and "not finite (w)" in capsys.readouterr().out


def test_finite_weights_whose_sum_overflows_are_saved(tmp_path):
    with saver(tmp_path) as s:
        s.save_mid({"model": {"w": torch.full((8,), 3e38)}, "epoch": 1, "batch": 1, "global_step": 1})
    assert names(tmp_path) == ["mid_epoch_001_000001.pt"]


def test_a_full_disk_says_what_is_needed_and_free_and_training_goes_on_when_room_is_made(small_disk, capsys):
    big = {"model": {"w": torch.zeros(75_000)}, "losses": [0.5] * 8_000, "epoch": 1}        # 0.30 MB and 0.07
    with saver(small_disk, mid_epoch_keep=1, say=print) as s:
        for step in (1, 2):
            s.save_mid(big | {"batch": step, "global_step": step})
        (small_disk / "filler").write_bytes(bytes(500_000))
        before = {path.name: path.read_bytes() for path in small_disk.glob("*.pt")}
        s.save_mid(big | {"batch": 3, "global_step": 3})
        with pytest.raises(OSError) as full:
            checkpoint.atomic_save(big, small_disk / "other.pt")
        assert full.value.errno == errno.ENOSPC and not temps(small_disk)
        assert {path.name: path.read_bytes() for path in small_disk.glob("*.pt")} == before
        (small_disk / "filler").unlink()
        s.save_mid(big | {"batch": 4, "global_step": 4})
    assert "No space left on device (0.4 MB needed, 0.2 MB free); every earlier checkpoint is as it was" in capsys.readouterr().out
    assert names(small_disk) == ["mid_epoch_001_000004.pt"]


def test_a_disk_that_is_full_at_the_start_is_refused_with_the_file_it_did_not_take(small_disk):
    run = small_disk / "run"
    run.mkdir()
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(OSError) as full:
        saver(run)
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(run / ".lock")


def test_the_end_of_an_epoch_that_found_the_disk_full_is_written_again_before_the_next_snapshot(small_disk, capsys):
    with saver(small_disk, say=print) as s:
        s.save_epoch(state(1, epoch=1), metric=0.1)
        s.wait()
        (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
        s.save_epoch(state(2, epoch=2), metric=0.9)
        s.wait()
        assert recover(small_disk) == 1
        (small_disk / "filler").unlink()
        s.save_mid(state(3, epoch=3))
        s.settle()
    assert sound(checkpoint.load(small_disk / "best.pt")) == sound(checkpoint.load(small_disk / "last.pt")) == 2
    assert recover(small_disk) == 3 and capsys.readouterr().out.count("save failed") == 1


def test_settle_says_when_the_last_save_cannot_be_made(small_disk):
    with saver(small_disk, save_patience_minutes=0) as s:
        s.save_mid(state(1))
        s.wait()
        (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
        s.save_mid(state(2))
        with pytest.raises(checkpoint.SaveFailed, match="No space left on device"):
            s.settle()
    assert recover(small_disk) == 1


def test_a_read_only_disk_refuses_saves_and_still_resumes_lists_and_verifies(small_disk, capsys):
    with saver(small_disk) as s:
        s.save_mid(state(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for refused in (lambda: checkpoint.atomic_save(state(2), small_disk / "last.pt"), lambda: saver(small_disk)):
        with pytest.raises(OSError) as refusal:
            refused()
        assert refusal.value.errno == errno.EROFS
    assert recover(small_disk) == 1 and not temps(small_disk)
    assert checkpoint.main(["ls", str(small_disk)]) == 0 and checkpoint.main(["verify", str(small_disk)]) == 0
    assert "-> mid_epoch_001_000001.pt" in capsys.readouterr().out


def test_a_target_that_is_a_directory_or_lies_nowhere_is_an_error_without_a_temp(tmp_path, monkeypatch):
    (tmp_path / "x.pt").mkdir()
    for target, number in (("x.pt", errno.EISDIR), ("absent/x.pt", errno.ENOENT)):
        with pytest.raises(OSError) as error:
            checkpoint.atomic_save(state(1), tmp_path / target)
        assert error.value.errno == number and not temps(tmp_path)
    monkeypatch.chdir(tmp_path)
    checkpoint.atomic_save(state(2), "here.pt")
    assert sound(checkpoint.load("here.pt")) == 2


def test_a_file_size_limit_of_the_system_fails_the_save_and_spares_the_old_file(tmp_path):
    def child():
        checkpoint.atomic_save(state(1), tmp_path / "last.pt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        with pytest.raises(OSError) as error:
            checkpoint.atomic_save(state(2), tmp_path / "last.pt")
        assert error.value.errno == errno.EFBIG
    assert crash.run_child(child) == "done"
    assert sound(checkpoint.load(tmp_path / "last.pt")) == 1 and not temps(tmp_path)


def test_an_error_of_the_hook_reaches_the_training_loop(tmp_path):
    def hook(path):
        raise ConnectionError("no volume")
    s = saver(tmp_path, on_saved=hook, background=True)
    s.save_mid(state(1))
    with pytest.raises(RuntimeError, match="on_saved failed for mid_epoch_001_000001.pt: no volume"):
        s.close()
    assert recover(tmp_path) == 1


def test_tmpdir_on_another_disk_is_never_used_and_modes_follow_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    before = os.umask(0o027)
    try:
        checkpoint.atomic_save(state(1), tmp_path / "last.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "last.pt").stat().st_mode & 0o777 == 0o640


def test_memory_stays_flat_over_fifty_saves(tmp_path):
    def rss():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def child():                            # a process of its own: what other tests leave behind does not count
        big = {"model": {"w": torch.zeros(2_000_000)}, "epoch": 1, "global_step": 0}
        with saver(tmp_path, background=True) as s:
            for batch in range(60):
                s.save_mid(big | {"batch": batch})
                if batch == 9:
                    before = rss()
            s.wait()
        assert rss() - before < 8e6
    assert crash.run_child(child) == "done"


# ---- one process, the command line, the copied file ----

def test_a_process_that_ends_without_closing_still_finishes_its_last_file(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import checkpoint, torch; " \
             f"s = checkpoint.Checkpointer({str(tmp_path)!r}); " \
             f"s.save_mid({{'w': torch.ones(5_000_000), 'epoch': 1, 'batch': 1}}); sys.exit(3)"
    assert forked.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 3
    assert checkpoint.load(tmp_path / "mid_epoch_001_000001.pt")["w"].sum() == 5e6


def test_a_second_process_is_refused_and_death_frees_the_directory(tmp_path):
    script = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import checkpoint; " \
             f"s = checkpoint.Checkpointer({str(tmp_path)!r}); print('held', flush=True); time.sleep(3600)"
    holder = forked.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert "held" in holder.stdout.readline()
    with pytest.raises(checkpoint.InUse, match=f"in use by process {holder.pid}"):
        saver(tmp_path)
    put(tmp_path, "mid_epoch_001_000001.pt"), put(tmp_path, "last.pt", save_counter=3)
    checkpoint.main(["clean", str(tmp_path), "--yes"])
    assert names(tmp_path) == ["last.pt", "mid_epoch_001_000001.pt"], "clean must leave a run in use alone"
    holder.kill(), holder.wait()
    saver(tmp_path).close()


def test_the_command_line_lists_verifies_cleans_and_strips(tmp_path, capsys):
    run = tmp_path / "results/v3/checkpoints"
    run.mkdir(parents=True)
    with saver(run) as s:
        s.save_mid(state(1))
        s.save_epoch(state(2, epoch=1), metric=0.25, name="auroc")
    (run / ".last.pt.999999.0.tmp").write_bytes(b"left by the dead")
    assert checkpoint.main(["ls", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert " -> last.pt" in out and "auroc 0.2500" in out and "4 names, 2 files on disk" in out and "the latest save" in out
    assert checkpoint.main(["verify", str(run)]) == 0
    (run / "mid_epoch_001_000009.pt").write_bytes(b"damage")
    assert checkpoint.main(["verify", str(run / "mid_epoch_001_000009.pt")]) == 1
    done = subprocess.run([sys.executable, "-OO", str(ROOT / "checkpoint.py"), "verify", str(run)], capture_output=True, text=True)
    assert done.returncode == 1 and "last.pt: ok" in done.stdout, done.stderr
    assert "mid_epoch_001_000009.pt: DAMAGED" in capsys.readouterr().out
    read, write = os.pipe()
    os.close(read)                                          # nobody reads on, as in `ls | head`
    done = forked.run([sys.executable, str(ROOT / "checkpoint.py"), "ls", str(run)], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert checkpoint.main(["clean", str(run)]) == 0 and (run / "mid_epoch_001_000001.pt").exists()
    assert checkpoint.main(["clean", str(run), "--yes"]) == 0
    assert names(run) == ["best.pt", "checkpoint_epoch_001.pt", "last.pt"] and not temps(run)
    assert checkpoint.main(["strip", str(run / "best.pt"), str(tmp_path / "weights.pt")]) == 0
    assert set(checkpoint.load(tmp_path / "weights.pt")) >= {"model"} and "optimizer" not in checkpoint.load(tmp_path / "weights.pt")
    assert checkpoint.main(["ls", str(tmp_path / "absent")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_name_that_the_console_lacks_ends_no_verify_before_the_damaged_file(tmp_path):
    for name in ("a-\udce4.pt", "b-\u00fc.pt", "c.pt"):
        checkpoint.atomic_save({"a": 1}, tmp_path / name)
    (tmp_path / "c.pt").write_bytes(b"PK")
    for encoding in ("ascii", "utf-8"):
        done = forked.run([sys.executable, str(ROOT / "checkpoint.py"), "verify", str(tmp_path)], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 1 and b"c.pt: DAMAGED" in done.stdout and done.stdout.count(b": ok") == 2, done


def test_verify_passes_over_no_folder_that_it_cannot_list(capsys):
    with tempfile.TemporaryDirectory() as folder:           # pytest's own are closed to other users
        for name in ("", "open", "closed"):
            Path(folder, name).mkdir(exist_ok=True)
            Path(folder, name).chmod(0o755)
        checkpoint.atomic_save({"epoch": 1}, Path(folder, "open", "last.pt"))
        Path(folder, "open", "last.pt").chmod(0o644)
        assert checkpoint.main(["verify", folder]) == 0
        Path(folder, "closed").chmod(0)
        user = os.geteuid()
        try:
            os.seteuid(user or 65534)
            assert checkpoint.main(["verify", folder]) == 1
        finally:
            os.seteuid(user)
    out = capsys.readouterr().out
    assert out.count("last.pt: ok") == 2 and "closed: UNREADABLE: Permission denied" in out


def test_clean_leaves_alone_what_it_cannot_read_and_no_run_can_begin_while_it_works(tmp_path, capsys, monkeypatch):
    put(tmp_path, "last.pt", save_counter=5), put(tmp_path, "mid_epoch_001_000001.pt", save_counter=1)
    (tmp_path / "mid_epoch_001_000002.pt").mkdir()
    (tmp_path / "mid_epoch_001_000003.pt").symlink_to("nowhere")
    real, began = os.unlink, []

    def unlink(path):
        with pytest.raises(checkpoint.InUse):
            saver(tmp_path)
        began.append(path.name)
        real(path)
    monkeypatch.setattr(os, "unlink", unlink)
    assert checkpoint.main(["clean", str(tmp_path), "--yes"]) == 0 and began == ["mid_epoch_001_000001.pt"]
    assert checkpoint.main(["verify", str(tmp_path)]) == 1 and "UNREADABLE: Is a directory" in capsys.readouterr().out
    assert (tmp_path / "mid_epoch_001_000002.pt").is_dir() and (tmp_path / "mid_epoch_001_000003.pt").is_symlink()


STAND = """
import glob, os, time

def still():                            # a slow step; where the snapshot is that a kill waits for, an endless one
    time.sleep(0.02)
    while os.environ["STAND"] and glob.glob(os.environ["STAND"]):
        time.sleep(0.02)
"""


def test_the_docstring_runs_alone_in_an_empty_directory_killed_and_resumed(tmp_path):
    results = {}
    for name, kills in (("whole", 0), ("cut", 2)):
        home = tmp_path / name
        home.mkdir()
        shutil.copy(ROOT / "checkpoint.py", home)
        slow = docstring_loop().replace("loss.backward()", "loss.backward(), __import__('stand').still()")
        (home / "loop.py").write_text(slow)
        (home / "stand.py").write_text(STAND)
        for attempt in range(kills + 1):
            wanted = f"checkpoints/mid_epoch_00{attempt + 2}_*.pt" if attempt < kills else ""
            process = forked.Popen([sys.executable, "loop.py"], cwd=home, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1", "STAND": wanted})
            if attempt < kills:
                for line in process.stdout:
                    if f"saved mid_epoch_00{attempt + 2}_" in line:
                        break
                process.kill()
            out = process.communicate()[0]
        assert process.returncode == 0 and ("resume: chose mid_epoch" in out) == bool(kills)
        results[name] = checkpoint.load(home / "checkpoints/last.pt")
    assert results["cut"]["global_step"] == results["whole"]["global_step"] == 100
    assert all(torch.equal(results["cut"]["model"][k], results["whole"]["model"][k]) for k in results["whole"]["model"])


def test_the_command_itself_names_damage_and_exits_one(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "last.pt")
    put(tmp_path, "mid_epoch_001_000002.pt", batch=2, save_counter=2)
    (tmp_path / "mid_epoch_001_000002.pt").write_bytes((tmp_path / "mid_epoch_001_000002.pt").read_bytes()[:-1])
    result = forked.run([sys.executable, str(ROOT / "checkpoint.py"), "verify", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1 and f"{tmp_path}/mid_epoch_001_000002.pt: DAMAGED: " in result.stdout
    assert f"{tmp_path}/last.pt: ok" in result.stdout and not result.stderr


@pytest.mark.slow
def test_a_tensor_of_more_than_four_gigabytes_comes_back(tmp_path):
    if shutil.disk_usage(tmp_path).free < 12e9 or os.sysconf("SC_AVPHYS_PAGES") * 4096 < 16e9:
        pytest.skip("12 GB of disk and 16 GB of memory are needed")
    huge = torch.zeros(2**32 + 4096, dtype=torch.uint8)
    huge[-1], huge[2**32] = 7, 9
    checkpoint.atomic_save({"first": huge, "second": torch.arange(5)}, tmp_path / "x.pt")
    checkpoint.verify(tmp_path / "x.pt")
    got = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(got["second"], torch.arange(5)) and (got["first"][-1], got["first"][2**32]) == (7, 9)
    with open(tmp_path / "x.pt", "r+b") as file:
        file.seek(2**32 - 5)
        file.write(b"\1")
    with pytest.raises(checkpoint.CorruptCheckpoint, match="CRC-32"):
        checkpoint.verify(tmp_path / "x.pt")
    (tmp_path / "x.pt").unlink()


def test_it_imports_only_torch_and_the_standard_library():
    imports = {line.split()[1].split(".")[0] for line in (ROOT / "checkpoint.py").read_text().splitlines()
               if line.startswith(("import ", "from "))}
    assert imports - sys.stdlib_module_names == {"torch"}


def test_processes_that_save_side_by_side_in_one_directory_never_fail_each_other(tmp_path):
    def writer(name):
        for step in range(150):             # each save sweeps the temps of dead processes: never those of the others
            checkpoint.atomic_save(state(step), tmp_path / name)
    children = []
    for name in ("a.pt", "b.pt", "c.pt"):
        pid = os.fork()
        if pid == 0:
            os._exit(crash.run_child(lambda: writer(name)) != "done")
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert names(tmp_path) == ["a.pt", "b.pt", "c.pt"] and not temps(tmp_path)
