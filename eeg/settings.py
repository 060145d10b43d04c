"""Settings as tables: a row for each key, one reader of YAML and one checker for all of them.

    KEYS = {"epochs": Key(100, "passes over the training set", (1, 10**6))}
    checked(parse("epochs: 5", "config a.yaml"), KEYS, "training", "a.yaml")        # {"epochs": 5}

run/config.py, evaluate.py and model.py own the tables. What is wrong raises ValueError in one line:
where, what, and what to write instead.
"""
import contextlib
import difflib
import math
import os
import re
from collections import namedtuple

import yaml

PATH = "a path, relative to the folder of train.py unless absolute"
PATHS = "a path or a list of paths, relative to the folder of train.py unless absolute"
FOLDER_NAME = "a plain folder name"
CHANGES = True                  # a resume may change this key; where the mark is absent, it may not

# limits: (lowest, highest) of a number, the choices of a text or of a list's items, or one of the
# texts above; environment: a variable that overrides the key
Key = namedtuple("Key", "default meaning limits may_change environment",
                 defaults=(None, False, None))


def defaults(keys):
    """{name: default} of a table."""
    return {name: Key(*row).default for name, row in keys.items()}


def nearest(name, names):
    """The one of `names` that was meant: by its initials, as lr, or by its letters."""
    name = str(name).lower()
    short = [full for full in names if name == "".join(word[:1] for word in full.split("_"))]
    return (short or difflib.get_close_matches(name, names, 1, 0))[0]


# ---- reading ----

class Misread(ValueError):
    """A number that YAML takes for another one."""


class Reader(yaml.SafeLoader):
    """YAML without what surprises: a key that stands twice is an error, since the first one would
    be ignored; so is a number that YAML 1.1 takes for another one than is written, 010 for 8 and
    23:30 for 1410; and the items of a list are texts, patient 002 not patient 2."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value} stands twice, again in line {line(key)}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_sequence(self, node, deep=False):
        return [item.value if isinstance(item, yaml.ScalarNode)
                else self.construct_object(item, True) for item in node.value]

    def whole_number(self, node):
        return self.as_written(node, self.construct_yaml_int(node))

    def fraction(self, node):
        return self.as_written(node, self.construct_yaml_float(node))

    def as_written(self, node, value):
        text = node.value
        if ":" in text:
            digits = text.replace("_", "").lstrip("+-").split(":")
            base, plain = 60, sum(float(part) / 60**place for place, part in enumerate(digits))
        elif re.fullmatch(r"[-+]?0[0-9_]+", text):
            base, plain = 8, int(text.replace("_", ""))
        else:
            return value
        raise Misread(f"{text} in line {line(node)} is {value} to YAML, in base {base}: "
                      f"write {plain:g}, or \"{text}\" where it is a name")


Reader.add_constructor("tag:yaml.org,2002:int", Reader.whole_number)
Reader.add_constructor("tag:yaml.org,2002:float", Reader.fraction)


def line(node):
    return node.start_mark.line + 1


def parse(text, where, what=""):
    """The content of a YAML text. Raises ValueError; `where` begins its line."""
    # ValueError: 2026-02-30, which YAML takes for a date
    try:
        return yaml.load(text, Reader)
    except Misread as error:
        raise ValueError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why, mark = " ".join(str(error).split()), getattr(error, "problem_mark", None)
        if mark:        # its picture of the place needs more than one line
            why = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
            if error.context_mark:
                why += f", {error.context} from line {error.context_mark.line + 1}"
        tab = "; a tab: indent with blanks" if r"'\t'" in why else ""
        raise ValueError(f"{where}: {what}not YAML: {why}{tab}") from None


def override(text, form="section.key=value"):
    """(section, key, value) of a text like `form`, as --set takes it. Raises ValueError."""
    name, found, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not found or not dot:
        raise ValueError(f"--set {text}: write {form}")
    return section, key, parse(value, f"--set {text}", "the value is ")


# ---- checking ----

def checked(content, keys, section, source=""):
    """{key: value} of `content`, whose keys are in the table `keys`, each value in the type of its
    row and within its limits. Raises ValueError with the nearest name, the type or the limits;
    `source` is where the content is from."""
    source = source and f"{source}: "
    known(content, keys, section, source)
    values = {}
    for name, value in content.items():
        row = Key(*keys[name])
        value = typed(value, row, f"{source}{section}.{name}")
        check_limits(value, row.limits, f"{section}.{name}")
        values[name] = value
    return values


def known(content, names, section="", source=""):
    if not isinstance(content, dict):
        raise ValueError(f"{source}{section or 'the file'} must hold key: value pairs, "
                         f"not {content!r}")
    prefix = section and f"{section}."
    for key in content:
        if key not in names:
            raise ValueError(f"{source}unknown key {prefix}{key}; "
                             f"the nearest is {prefix}{nearest(key, names)}")


def typed(value, row, name):
    """`value` as the type of its row's default."""
    kind = type(row.default)
    if kind is float and type(value) in (int, str):
        value = as_float(value)
    several = kind is list or row.limits == PATHS and value
    if several and isinstance(value, list):
        for item in value:
            if not isinstance(item, str) or not item:
                raise ValueError(f"{name} must hold names, not {item!r}")
    elif type(value) is not kind:
        line = f"{name} must be {kind.__name__}, like {row.default!r}, not {value!r}"
        raise ValueError(line + "; in quotes it is a text" if kind is str else line)
    return value


def as_float(value):
    """A float of a whole number, or of 1e-4, which YAML 1.1 reads as text. Any other value stays
    as it is, and so does a whole number beyond all floats."""
    if isinstance(value, int) or re.fullmatch(r"[-+]?(?!0\d)(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        with contextlib.suppress(OverflowError):
            return float(value)
    return value


def check_limits(value, limits, name):
    if limits == FOLDER_NAME:
        if not value.isprintable() or value in ("", ".", "..") or value != os.path.basename(value):
            raise ValueError(f"{name} must be a plain folder name, not {value!r}")
    elif not isinstance(limits, tuple):
        return
    elif isinstance(value, str):
        if value not in limits:
            raise ValueError(f"{name} must be one of {', '.join(limits)}, not {value!r}; "
                             f"the nearest is {nearest(value, limits)}")
    elif isinstance(value, list):
        for item in value:
            if item not in limits:
                raise ValueError(f"{name} may hold {', '.join(limits)}, not {item!r}")
    elif not limits[0] <= value <= limits[1]:
        lowest, highest = limits
        if highest == math.inf:
            raise ValueError(f"{name} must be at least {lowest:g}, not {value}")
        raise ValueError(f"{name} must lie between {lowest:g} and {highest}, not {value}")
