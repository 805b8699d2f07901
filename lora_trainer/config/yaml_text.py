"""YAML as settings need it: nothing written twice, no references, and one kind of error."""

from __future__ import annotations

from typing import NoReturn

import yaml

# Far deeper than settings ever go. PyYAML's scanner takes longer for each bracket the more of them are open.
MAX_DEPTH = 32


class YamlProblem(ValueError):
    """`line` counts from 1; None where no single line is to blame."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def parse_yaml(text: str) -> object:
    """Plain values, lists and dictionaries. Raises YamlProblem."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise YamlProblem(error.problem or error.context or "damaged", line) from None
    except Exception as error:
        # PyYAML raises nearly anything for a bad value: ValueError for 2024-13-01, IndexError for `!!int ""`,
        # OverflowError, KeyError, AttributeError, RecursionError.
        why = str(error).partition("\n")[0]
        raise YamlProblem(f"a value is not what its form says ({type(error).__name__}: {why})") from None


class _Loader(yaml.SafeLoader):
    """A few references to references can stand for billions of values, so there are none here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"expected values, found the reference *{event.anchor}", event)
        if self.depth >= MAX_DEPTH:
            self._refuse(f"expected values in values at most {MAX_DEPTH} levels deep, found more", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def _refuse(self, problem: str, event: yaml.Event) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                problem = f"the key {key.value} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
