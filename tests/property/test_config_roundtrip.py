"""Any valid config survives its way through YAML, and any value gives a config or a ConfigError."""

from __future__ import annotations

import json

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.config import build
from lora_trainer.config.export import to_header, to_yaml
from lora_trainer.config.options import Option, options, options_of
from lora_trainer.errors import ConfigError

NEEDED = {"train_data_dir": "d", "base_model": "b.safetensors"}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)


def values(option: Option):
    m = option.meta
    if option.choices:
        strategy = st.sampled_from(option.choices)
    elif option.kind is bool:
        strategy = st.booleans()
    elif option.numbers:
        strategy = st.lists(st.integers(1, 64).map(lambda number: 64 * number), max_size=3)
    elif option.struct:
        entry = st.fixed_dictionaries(
            {"folder": st.text("abc", min_size=1)},
            optional={k: values(o) for k, o in options_of(option.struct).items() if not o.required},
        )
        strategy = st.lists(entry, max_size=3, unique_by=lambda found: found["folder"])
    elif option.kind is list:
        strategy = st.lists(TEXT, min_size=m.min_length or 0, max_size=3)
    elif option.kind is str:
        strategy = TEXT
    elif option.kind is int:
        step = m.multiple_of or 1
        strategy = st.integers((m.ge or 0) // step, (m.le or 10**6) // step).map(lambda n: n * step)
    else:
        low, high = m.ge if m.ge is not None else m.gt or 0, m.le if m.le is not None else m.lt or 1e6
        strategy = st.floats(low, high, exclude_min=m.gt is not None, exclude_max=m.lt is not None)
    return st.none() | strategy if option.optional else strategy


CONFIGS = st.fixed_dictionaries(
    NEEDED and {k: values(o) for k, o in options().items() if o.required},
    optional={k: values(o) for k, o in options().items() if not o.required},
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CONFIGS)
def test_round_trip(chosen):
    try:
        config = build(chosen)
    except ConfigError as error:  # rules between fields may refuse a combination, never a single value
        assert not any("expected a" in line and "beside" not in line and "name" not in line for line in error.problems)
        refused = {line.partition(":")[0] for line in error.problems} & set(chosen) - {"train_data_dir", "base_model"}
        if refused:
            # Without what was refused the rest still goes its way.
            test_round_trip.hypothesis.inner_test({key: chosen[key] for key in chosen if key not in refused})
        return
    assert build(yaml.safe_load(to_yaml(config))) == config
    header = json.loads(to_header(config))
    assert build(chosen, header) == config


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*options(), "nonsense"]), ANYTHING, max_size=5))
def test_anything_gives_a_config_or_a_clear_error(chosen):
    try:
        build(NEEDED, chosen)
    except ConfigError as error:
        assert all("\n" not in problem for problem in error.problems)
