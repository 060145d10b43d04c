"""run/share.py: weights to share, and the card beside them."""
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
from crash import kill_sweep, state
from test_crash import saver
from test_listing import tree
from run import share


def test_strip_replaces_nothing_takes_no_third_path_and_writes_a_model_card(tmp_path, capsys):
    for name in ("a", "b", "c"):
        with saver(tmp_path / name) as s:
            s.save_epoch({**state(1, epoch=4), "montage": "referential", "config": {"data": {"path": "tusz"}, "evaluation": {"threshold": 0.86}},
                          "scores": {"event_f1": 0.71, "auroc": float("nan"), "threshold": 0.9}}, metric=0.71, name="event_f1")
    files = [str(tmp_path / name / "best.pt") for name in ("a", "b", "c")]
    before = tree(tmp_path)
    assert checkpoint.main(["strip", *files]) == checkpoint.main(["strip", *files[:2]]) == 2
    assert checkpoint.main(["strip", files[0], str(tmp_path / "x.md")]) == 2
    for words in (["strip", str(tmp_path / "a")], ["average", files[0], str(tmp_path / "a"), "--out", str(tmp_path / "m.pt")]):
        assert checkpoint.main(words) == 2
        assert f"{tmp_path / 'a'}: Is a directory: give a checkpoint in it, such as best.pt" in capsys.readouterr().err
    assert checkpoint.main(["strip", files[0], str(tmp_path / "no/x.pt")]) == 2
    assert "no/x.md: No such file" in capsys.readouterr().err.splitlines()[-1]
    assert tree(tmp_path) == before
    assert checkpoint.main(["strip", files[0]]) == 0 and checkpoint.main(["strip", files[0]]) == 2
    assert f"its model card: {tmp_path}/a/best_weights.md\n" in capsys.readouterr().out
    card = (tmp_path / "a/best_weights.md").read_text()
    for text in ("data: tusz", "threshold: 0.9\n", "| event_f1 | 0.71 |", "| auroc | not computable |", "not for diagnosis", "The scores above", "chosen by: event_f1 = 0.71\n"):
        assert text in card, card
    assert "optimizer" not in checkpoint.load(tmp_path / "a/best_weights.pt")


@pytest.mark.slow
def test_a_strip_killed_at_any_call_leaves_no_weights_without_their_card_and_the_same_command_finishes_it(tmp_path, capsys):
    def setup(directory):
        checkpoint.atomic_save(state(1), directory / "a.pt")

    def check(directory):
        whole = (directory / "b.pt").exists()
        assert not whole or (directory / "b.md").exists()
        assert checkpoint.main(["strip", str(directory / "a.pt"), str(directory / "b.pt")]) == (2 if whole else 0)
        assert sorted(tree(directory)) == ["a.pt", "b.md", "b.pt"] and not checkpoint.damage_of(directory / "b.pt")
    assert kill_sweep(tmp_path / "d", setup, lambda d: share.strip(d / "a.pt", d / "b.pt"), check, every=2) > 7
    with pytest.raises(TypeError):          # a state that no file takes leaves no card
        share._share({"model": object()}, tmp_path / "c.pt", "a.pt")
    (tmp_path / "c.md").write_text("of another hand")
    with pytest.raises(ValueError, match="c.md exists"):
        share._share({"model": {}}, tmp_path / "c.pt", "a.pt")


def test_a_card_takes_what_another_loop_keeps_under_the_names_of_ours(tmp_path):
    for number, other in enumerate((19, "19 of them", ["Fz", 3], None)):
        path = tmp_path / f"{number}.pt"
        checkpoint.atomic_save({"model": {"w": torch.ones(1)}, "channels": other, "averaged": other, "config": {
            "data": {"path": other, "dev_patients": other}}}, path)
        assert checkpoint.main(["strip", str(path)]) == 0
    assert "- channels: 19\n" in (tmp_path / "0_weights.md").read_text()
    assert "- channels: Fz, 3\n" in (tmp_path / "2_weights.md").read_text()
    card = (tmp_path / "3_weights.md").read_text()
    assert not any(word in card for word in ("EEG", "patients", "medical", "corpus", "above"))


def test_an_average_is_the_mean_of_weights_with_the_newest_buffers_and_refuses_other_runs_shapes_and_twins(tmp_path, capsys):
    def put(s, step, **more):
        model = {"w": torch.full((3,), float(step), dtype=torch.bfloat16), "n.running_mean": torch.full((2,), float(step)),
                 "n.num_batches_tracked": torch.tensor(step), **more}
        s.save_mid({"model": model, "epoch": 1, "batch": step, "global_step": step, "scores": {"threshold": 0.5, "event_f1": 1.0}})
        s.wait()
    with saver(tmp_path / "run", mid_epoch_keep=0) as s:
        for step in (1, 2, 6):
            put(s, step)
        put(s, 7, extra=torch.ones(1))
    with saver(tmp_path / "other") as s:
        put(s, 1)
    files = [str(tmp_path / f"run/mid_epoch_001_{step:06d}.pt") for step in (6, 1, 2)]
    out = str(tmp_path / "mean.pt")
    assert checkpoint.main(["average", *files, "--out", out]) == 0
    assert f"running statistics are those of {files[0]}; its model card: {tmp_path}/mean.md\n" in capsys.readouterr().out
    got = checkpoint.load(out)
    assert got["model"]["w"].tolist() == [3.0] * 3 and got["model"]["w"].dtype == torch.bfloat16
    assert got["model"]["n.running_mean"].tolist() == [6.0] * 2 and got["model"]["n.num_batches_tracked"] == 6
    assert got["scores"] == {"threshold": 0.5} and got["averaged"][0] == "mid_epoch_001_000006.pt"
    wrong = {"not all of one run": [files[0], str(tmp_path / "other/mid_epoch_001_000001.pt")],
             "the same save": [files[0], files[0]], "two checkpoints or more": files[:1],
             "extra has another shape": [files[0], str(tmp_path / "run/mid_epoch_001_000007.pt")]}
    for message, paths in wrong.items():
        assert checkpoint.main(["average", *paths, "--out", str(tmp_path / "x.pt")]) == 2
        assert message in capsys.readouterr().err
    assert checkpoint.main(["average", *files, "--out", out]) == 2 and "exists" in capsys.readouterr().err


def test_weights_that_were_not_validated_bear_no_scores_and_their_threshold_is_said_to_be_of_others(tmp_path):
    more = {"model": {"w": torch.ones(1)}, "config": {}, "scores": {"threshold": 0.5, "event_f1": 0.71, "false_alarms_per_24h": 2.0}}
    with saver(tmp_path, mid_epoch_keep=0) as s:
        s.save_epoch({**state(1, epoch=1), **more}, metric=0.71, name="event_f1")
        for step in (2, 3):
            s.save_mid({**state(step, epoch=2), **more, "batch": step, "global_step": step})
            s.wait()
    mids = [str(path) for path in sorted(tmp_path.glob("mid_epoch_*.pt"))]
    files = [str(tmp_path / name) for name in ("best_weights.pt", "mid_weights.pt", "mean.pt")]
    assert checkpoint.main(["strip", str(tmp_path / "best.pt"), files[0]]) == 0
    assert checkpoint.main(["strip", mids[-1], files[1]]) == 0
    assert checkpoint.main(["average", *mids, "--out", files[2]]) == 0
    for file, validated in ((tmp_path / "best.pt", True), (files[0], True), (mids[-1], False), (files[1], False), (files[2], False)):
        kept = checkpoint.load(file)
        c, source = evaluate.stored_settings(kept)
        assert c["threshold"] == 0.5 and source.startswith("tuned on the dev set") and ("not validated" in source) != validated
        if file in files:
            assert ("0.71" in Path(file[:-2] + "md").read_text()) == ("event_f1" in kept["scores"]) == validated
