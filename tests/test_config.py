"""Configurations: every key has its meaning, limits and resume mark; what is wrong is refused."""
import copy
import subprocess
import sys

import pytest
import yaml

import forked
import train            # it hands the tables of model.py and evaluate.py to run/config.py  # noqa: F401
from eeg.disk import Refused
from run import config
from conftest import ROOT

MAY_NOT_CHANGE = {          # what makes another run: the weights' shapes, which windows, in what order
    "experiment.seed", "data.same_person", "data.corpus_balance", "data.split", "data.folds", "data.fold",
    "data.dev_patients", "data.dev_fraction", "data.window_seconds",
    "data.stride_seconds", "data.balanced", "data.full_per_partial", "data.background_per_partial",
    "data.augment", "data.augmentations"} | {name for name in config.KEYS if name.startswith("model.")}


def written(folder, text):
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(*arguments):
    with pytest.raises(Refused) as caught:
        config.load(*arguments)
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    return line


def other(name):
    """A value of the key's type that is not its default."""
    key = config.KEYS[name]
    if isinstance(key.default, bool):
        return not key.default
    if isinstance(key.default, (int, float)):
        return key.default + 1
    if isinstance(key.default, list):
        return ["someone"]
    if name == "training.best_metric":
        return "auroc"
    if isinstance(key.limits, tuple):
        return key.limits[-1]
    return "/another"


@pytest.mark.parametrize("name", config.KEYS)
def test_every_key_says_what_it_means_and_takes_only_its_type(name, tmp_path):
    key, path = config.KEYS[name], written(tmp_path, "")
    assert len(key.meaning) > 4 and key.limits != (None, None)
    wrong = "5" if isinstance(key.default, (str, bool, list)) else "[1]"
    assert f"{name} must be {type(key.default).__name__}" in refusal(path, [f"{name}={wrong}"])
    text = config.describe().split(f" {name}: ")[1].split("\n")
    assert yaml.safe_load(text[0]) == key.default and key.meaning[:20] in text[1]


def test_every_number_has_limits_and_nan_and_infinity_are_beyond_them(tmp_path):
    path = written(tmp_path, "")
    numbers = {name: key for name, key in config.KEYS.items() if type(key.default) in (int, float)}
    assert len(numbers) > 50
    for name, key in numbers.items():
        lowest, highest = key.limits
        assert lowest < highest
        for wrong in ("-1",) if type(key.default) is int else (".nan", ".inf", "-1"):
            assert name.split(".")[1] in refusal(path, [f"{name}={wrong}"])


@pytest.mark.parametrize("name", config.KEYS)
def test_only_a_key_that_says_so_may_change_on_a_resume(name):
    old, new, said = copy.deepcopy(config.DEFAULTS), copy.deepcopy(config.DEFAULTS), []
    section, _, short = name.partition(".")
    new[section][short] = other(name)
    if name in MAY_NOT_CHANGE:
        with pytest.raises(Refused, match=f"^{name} is .* and was .* that is another run"):
            config.compare(old, new, said.append)
    else:
        config.compare(old, new, said.append)
        assert len(said) == 1 and said[0].startswith(f"resume: {name} ")


def test_no_script_and_no_torch_are_imported_to_read_a_configuration():
    code = ("import sys; from run import config; config.load('configs/local/train.yaml')\n"
            "print({'torch', 'model', 'evaluate', 'data', 'train', 'checkpoint'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_comment_is_no_part_of_a_table(tmp_path):
    for name, other in (("model", train.model), ("evaluation", train.evaluate)):
        for key, row in other.KEYS.items():
            assert config.KEYS[f"{name}.{key}"][:3] == tuple(row[:3])


def test_a_key_that_nobody_marked_refuses_on_a_resume(monkeypatch):
    monkeypatch.setitem(config.KEYS, "training.forgotten", config.Key(1, "a new key", (0, 9)))
    old, new = copy.deepcopy(config.DEFAULTS), copy.deepcopy(config.DEFAULTS)
    new["training"]["forgotten"] = 2
    with pytest.raises(Refused, match="forgotten is 2 and was 1"):
        config.compare(old, new, print)


def test_a_checkpoint_older_than_a_key_was_trained_as_its_default_says():
    old, said = copy.deepcopy(config.DEFAULTS), []
    del old["data"]["augment"], old["training"]["patience"]
    config.compare(old, config.DEFAULTS, said.append)
    assert not said
    new = copy.deepcopy(config.DEFAULTS)
    new["data"]["augment"] = False
    with pytest.raises(Refused, match="data.augment is False and was True"):
        config.compare(old, new, print)


def test_a_checkpoint_with_a_key_that_this_version_does_not_know_is_refused():
    old = copy.deepcopy(config.DEFAULTS)
    old["model"]["wings"] = 2
    with pytest.raises(Refused, match="model.wings, which this version"):
        config.compare(old, config.DEFAULTS, print)


@pytest.mark.parametrize("text, message", [
    ("training:\n  batch_size: 4\n  epochs: 2\n  batch_size: 8\n",
     "the key batch_size stands twice, again in line 4"),
    ("data: {path: /a}\ntraining: {epochs: 2}\ndata: {path: /b}\n",
     "the key data stands twice, again in line 3"),
    ('training: {epochs: 2, "epochs": 2}', "the key epochs stands twice, again in line 1"),
    ("? [1]\n: 2\n", "not YAML"),
    ("experiment: {name: 2026-02-30}", "not YAML"),
    ("experiment: {name: 2026-02-28}", "experiment.name must be str, like 'run', not datetime"),
    ("training: {learning_rate: " + "9" * 400 + "}", "training.learning_rate must be float"),
    ("training: {epochs: " + "9" * 5000 + "}", "not YAML"),
    ("[" * 5000, "not YAML"),
    (b"\xff\xfe\x00\x01", "not YAML"),
    ("training: [1, 2", "not YAML: line 1, column 16: expected ',' or ']', but got '<stream end>', while parsing a flow sequence from line 1"),
    ('data:\n  path: "own\n\ntraining: {epochs: 2}\n', "found unexpected end of stream, while scanning a quoted scalar from line 2"),
    ("training:\n\tepochs: 2\n", "not YAML: line 2, column 1: found character '\\t' that cannot start any token; "
     "a tab: indent with blanks"),
    ("- 1", "the file must hold key: value pairs"),
    ("training:\n", "training must hold key: value pairs, not None"),
    ("1: 2", "unknown key 1; the nearest is"),
    ("training: {lr: 1}", "the nearest is training.learning_rate"),
    ('experiment: {name: "a\\0b"}', "plain folder name"),
    ("experiment: {name: ..}", "plain folder name"),
])
def test_a_file_that_is_no_configuration_gets_one_line(text, message, tmp_path):
    assert message in refusal(written(tmp_path, text))


@pytest.mark.parametrize("override, message", [
    ("training.batch_size", "write section.key=value"), ("batch_size=4", "write section.key=value"),
    ("training.batch_size=[", "the value is not YAML"), ("training.bach_size=4", "training.batch_size"),
    ("data.path.x=/a", "unknown key data.path.x"), ("model.dropout={a: 1, a: 2}", "stands twice")])
def test_an_override_that_cannot_be_read_gets_one_line(override, message, tmp_path):
    line = refusal(written(tmp_path, ""), [override])
    assert line.startswith("--set") and message in line


@pytest.mark.parametrize("override, value, plain", [
    ("training.time_limit_hours=23:30", 1410, "23.5"), ("training.hang_minutes=1:30.5", 90.5, "1.50833"),
    ("training.learning_rate=1:0:0", 3600, "1"), ("training.batch_size=010", 8, "10"), ("experiment.seed=042", 34, "42"),
    ("training.epochs=0_17", 15, "17"), ("data.path=007", 7, "7"), ("evaluation.threshold=-01", -1, "-1"),
    ("model.hop=0100", 64, "100"), ("data.augment=00", 0, "0")])
def test_a_number_that_yaml_takes_for_another_one_is_refused_with_what_to_write(override, value, plain, tmp_path):
    line = refusal(written(tmp_path, ""), [override])
    name, _, text = override.partition("=")
    assert f"{text} in line 1 is {value} to YAML" in line and f'write {plain}, or "{text}" where it is a name' in line
    section, _, key = name.partition(".")
    assert f"{text} in line 2 is {value} to YAML" in refusal(written(tmp_path, f"{section}:\n  {key}: {text}\n"))


def test_a_name_in_quotes_keeps_its_zeros(tmp_path):
    got = config.load(written(tmp_path, ""), ['experiment.name="042"', "data.path='/a/12:30'"])
    assert got["experiment"]["name"] == "042" and got["data"]["path"] == "/a/12:30"


@pytest.mark.parametrize("override", ["training.learning_rate=08", "training.batch_size=09", "training.time_limit_hours=0:30",
                                      "training.grad_clip=012e-3", "training.epochs=1e3", "training.epochs=5.0"])
def test_a_text_that_is_no_plain_number_is_no_number(override, tmp_path):
    assert "must be" in refusal(written(tmp_path, ""), [override])


def test_numbers_as_people_write_them_are_taken(tmp_path):
    texts = {"training.learning_rate": ("1e-4", "1.0e-4", "0.0001", "1E-04", ".0001", "+1e-4"),
             "training.epochs": ("1000", "1_000", "+1000", "0x3e8")}
    for name, written_as in texts.items():
        values = [dict(config.flat(config.load(written(tmp_path, ""), [f"{name}={text}"])))[name] for text in written_as]
        assert len(set(values)) == 1 and type(values[0]) is type(config.KEYS[name].default)
    assert config.load(written(tmp_path, ""), ["data.dev_fraction=00.5"])["data"]["dev_fraction"] == 0.5


def test_the_items_of_a_list_keep_their_text(tmp_path):
    names = ["002", "1:30", "no", "on", "null", "~", "1.50", "2026-02-28", "0x10", "1e3", ".5", "true"]
    flow = config.load(written(tmp_path, f"data: {{dev_patients: [{', '.join(names)}]}}"))
    block = config.load(written(tmp_path, "data:\n  dev_patients:\n" + "".join(f"  - {n}\n" for n in names)))
    given = config.load(written(tmp_path, ""), [f"data.dev_patients=[{','.join(names)}]"])
    for loaded in (flow, block, given):
        assert loaded["data"]["dev_patients"] == names
        assert config.load(written(tmp_path, yaml.safe_dump(loaded))) == loaded
    paths = config.load(written(tmp_path, "data: {path: [/a/01, /b/no]}"))["data"]["path"]
    assert paths == ["/a/01", "/b/no"]
    for wrong in ("[[a]]", "[{a: b}]", "['']"):
        assert "data.dev_patients must hold names, not" in refusal(written(tmp_path, ""), [f"data.dev_patients={wrong}"])


def test_merge_keys_of_yaml_are_no_repetition(tmp_path):
    text = "data: &d {path: /a}\nexperiment: {name: a}\ntraining: {<<: {epochs: 2}, epochs: 3}\n"
    assert config.load(written(tmp_path, text))["training"]["epochs"] == 3


def test_overrides_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    path = written(tmp_path, "training: {epochs: 5, patience: 4, learning_rate: 1e-3}\n")
    got = config.load(path, ["training.epochs=6", "training.epochs=7", "data.dev_patients=[a, 7]"])
    changed = {n: v for n, v in config.flat(got) if v != config.KEYS[n].default}
    assert changed == {
        "training.epochs": 7, "training.patience": 4, "training.learning_rate": 1e-3,
        "data.dev_patients": ["a", "7"],
        "experiment.results": str(ROOT / "results")}
    assert config.KEYS["data.dev_patients"].default == []


def test_relative_paths_are_of_the_project_folder_from_wherever_it_is_started(tmp_path, monkeypatch):
    path = written(tmp_path, "experiment: {results: there}\ndata: {path: ~/eeg}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    got = config.load(path)
    assert got["experiment"]["results"] == str(ROOT / "there")
    assert got["data"]["path"] == "/home/someone/eeg"
    assert config.load(path, ["experiment.results=/x"])["experiment"]["results"] == "/x"


def test_an_effective_configuration_read_again_is_the_same(tmp_path):
    first = config.load(ROOT / "configs/local/smoke.yaml")
    again = config.load(written(tmp_path, yaml.safe_dump(first)))
    assert first == again


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_accepted_and_repeats_no_meaning(path):
    config.load(path)
    meanings = {key.meaning for key in config.KEYS.values() if len(key.meaning) > 20}
    comments = {line.partition("# ")[2] for line in path.read_text().splitlines()}
    assert not meanings & comments


def test_the_environment_overrides_two_keys_and_says_so(monkeypatch):
    said, variables = [], {key.environment: name for name, key in config.KEYS.items() if key.environment}
    assert variables == {"BGB_MID_EPOCH_MINUTES": "training.mid_epoch_minutes",
                         "BGB_MID_EPOCH_KEEP": "training.mid_epoch_keep"}
    for variable, name in variables.items():
        monkeypatch.delenv(variable, raising=False)
        assert config.effective(config.DEFAULTS, name, said.append) == config.KEYS[name].default
    assert config.effective(config.DEFAULTS, "training.epochs", said.append) == 100 and not said
    monkeypatch.setenv("BGB_MID_EPOCH_MINUTES", "0.5"), monkeypatch.setenv("BGB_MID_EPOCH_KEEP", " 2 ")
    values = [config.effective(config.DEFAULTS, name, said.append) for name in variables.values()]
    assert values == [0.5, 2] and [type(v) for v in values] == [float, int]
    assert said == ["checkpoints: BGB_MID_EPOCH_MINUTES=0.5 overrides 30.0 from the configuration",
                    "checkpoints: BGB_MID_EPOCH_KEEP=2 overrides 5 from the configuration"]


@pytest.mark.parametrize("variable, text, what", [
    ("BGB_MID_EPOCH_MINUTES", "soon", "number"), ("BGB_MID_EPOCH_MINUTES", "nan", "number"),
    ("BGB_MID_EPOCH_MINUTES", "inf", "number"), ("BGB_MID_EPOCH_MINUTES", "-1", "number"),
    ("BGB_MID_EPOCH_KEEP", "some", "whole number"), ("BGB_MID_EPOCH_KEEP", "1.5", "whole number")])
def test_a_variable_that_holds_no_number_gets_one_line(variable, text, what, monkeypatch):
    monkeypatch.setenv(variable, text)
    name = next(name for name, key in config.KEYS.items() if key.environment == variable)
    with pytest.raises(Refused) as caught:
        config.effective(config.DEFAULTS, name)
    assert str(caught.value) == f"{variable}={text!r} must be a {what}, 0 or more"


def test_the_help_of_train_lists_every_key_and_an_example_of_set():
    done = forked.run([sys.executable, ROOT / "train.py", "--help"], text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("--set ") >= 1, done.stderr
    assert config.describe() in done.stdout and "--set training.batch_size=4" in done.stdout
