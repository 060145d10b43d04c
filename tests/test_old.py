"""Files that earlier versions wrote load and resume for good: three checkpoints of the first format, read as they are."""
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import checkpoint
from test_states import Pairs

OLD = Path(__file__).parent / "old"


def training():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def steps(net, optimizer, scheduler, batches):
    data = torch.arange(10 * 4 * 8.0).view(10, 4, 8).sin()
    for batch in batches:
        loss = net(data[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def restored(state):
    parts = training()
    for part, name in zip(parts, ("model", "optimizer", "scheduler")):
        part.load_state_dict(state[name])
    return parts


def test_a_run_of_an_earlier_version_is_chosen_resumed_and_goes_on_as_it_would_have(tmp_path):
    for name in ("last.pt", "mid_epoch_002_000005.pt"):
        shutil.copy(OLD / name, tmp_path)
    assert checkpoint.peek(tmp_path / "last.pt")["metric"] == {"name": "auroc", "value": 0.75}
    with checkpoint.Checkpointer(tmp_path) as saver:
        state = saver.resume()
        assert saver.position == (2, 5) and state["global_step"] == 15 and state["note"] == 0.5
        checkpoint.restore_random_states(state["random"])
        resumed = restored(state)
        again = restored(checkpoint.load(tmp_path / "last.pt"))
        steps(*again, range(5))                 # from the end of epoch 1 to where the snapshot was taken
        for mine, theirs in zip(resumed[0].state_dict().values(), again[0].state_dict().values()):
            torch.testing.assert_close(mine, theirs)
        saver.save_mid({**state, "batch": 6, "global_step": 16})
    assert checkpoint.find_resume(tmp_path).name == "mid_epoch_002_000006.pt"
    assert checkpoint.peek(tmp_path / "mid_epoch_002_000006.pt")["run"] == "0123456789ab"


def test_every_kind_of_value_in_a_file_of_an_earlier_version_is_what_it_was(tmp_path):
    got = checkpoint.load(OLD / "values.pt")
    weight, wave = torch.arange(24.0).view(4, 6), torch.arange(6).to(torch.complex64)
    for name, tensor in got["dtypes"].items():
        dtype = getattr(torch, name)
        raw = torch.arange(6 * dtype.itemsize) % (2 if name == "bool" else 100)
        assert tensor.dtype == dtype and torch.equal(tensor.view(torch.uint8), raw.to(torch.uint8)), name
    expected = {"weight": weight, "tied": weight[1:3], "turned": weight.t(), "gaps": torch.arange(100.0)[::10].clone(),
                "far": torch.arange(500, 505), "wide": torch.ones(1).expand(3, 4),
                "parameter": torch.nn.Parameter(torch.arange(3.0), requires_grad=False), "conj": wave.conj(), "imag": wave.imag,
                "empty": torch.zeros(0, 3), "array": torch.arange(5), "number": 7,
                "plain": [None, True, 1, -2**70, 2.5, float("inf"), 1j, "ü", b"raw", (1, "x"), {3}, torch.float16,
                          torch.device("cuda", 1), torch.Size([2, 3])],
                "ordered": OrderedDict(a=1), "epoch": 4, "batch": 0, "global_step": 40, "save_counter": 9, "kind": "epoch",
                "metric": {"name": "f1", "value": 0.5}}
    Pairs(expected, {key: got[key] for key in expected})
    checkpoint.atomic_save(got, tmp_path / "again.pt")
    Pairs(got, checkpoint.load(tmp_path / "again.pt"))
    facts = checkpoint.peek(OLD / "values.pt")
    assert facts["position"] == (5, 0) and facts["metric"] == {"name": "f1", "value": 0.5} and facts["save_counter"] == 9


@pytest.mark.parametrize("name", ["last.pt", "mid_epoch_002_000005.pt", "values.pt"])
def test_damage_to_a_file_of_an_earlier_version_is_found(tmp_path, name):
    blob = (OLD / name).read_bytes()
    for at in range(0, len(blob), 61):
        (tmp_path / name).write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1:])
        with pytest.raises(checkpoint.CorruptCheckpoint) as damage:
            checkpoint.load(tmp_path / name)
        assert not damage.value.foreign
