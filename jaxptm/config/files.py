"""Configs from YAML and back, with errors that name the file and the dotted path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from jaxptm.config.base import Config
from jaxptm.config.training import TrainConfig
from jaxptm.errors import JaxptmError

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as YAML 1.2 does and PyYAML does not, and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is there twice", key.start_mark)
            seen.add(getattr(key, "value", ""))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file, applies `key.key=value` overrides, and checks the result.

    `out` defaults to `runs/<file name>`.

    Raises:
        JaxptmError: the file is missing or not YAML, an override is malformed, or a value does not fit; all wrong
            values are listed at once, each with its dotted path.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JaxptmError(f"{path}: cannot read the config: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise JaxptmError(f"{path}: the config is not UTF-8 text.") from error
    fields = _parse(text, str(path))
    if not isinstance(fields, dict):
        raise JaxptmError(f"{path}: expected `key: value` lines at the top, as in configs/pretrain/quickstart.yaml.")
    fields.setdefault("out", f"runs/{path.stem}")
    for override in overrides:
        _override(fields, override)
    return validate(TrainConfig, fields, str(path))


def validate(kind: type[C], fields: Any, source: str) -> C:
    """Builds `kind` from plain `fields`; errors name `source` and the dotted path of each wrong value."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for item in error.errors():  # several for one value that may be of several types
            problems.setdefault(_path(item["loc"]), []).append(_reason(item))
        lines = [f"  {path}: {' or '.join(dict.fromkeys(reasons))}" for path, reasons in problems.items()]
        raise JaxptmError("\n".join([f"{source}: {len(lines)} value(s) do not fit:", *lines])) from None


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        hint = "; put a value that begins with * or & in quotes" if text.lstrip()[:1] in ("*", "&") else ""
        raise JaxptmError(f"{source}:{line} is not YAML: {getattr(error, 'problem', None) or error}{hint}.") from error


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise JaxptmError(f"override {override!r}: write it as key.key=value, for example train.steps=100.")
    *parents, last = key.split(".")
    for parent in parents:
        child = fields.setdefault(parent, {})
        if not isinstance(child, dict):
            raise JaxptmError(f"override {override!r}: `{parent}` holds the value {child!r}, not fields.")
        fields = child
    fields[last] = _parse(value, f"override {override!r}")


def _path(location: tuple[int | str, ...]) -> str:
    # pydantic puts the branches of unions into the location, here their names; they are no keys of the file.
    if location[:1] in (("objective",), ("data",)):
        location = (location[0], *location[2:])
    keys = [str(part) for part in location if not re.search(r"[\[\]]|^(int|float|str|constrained-.*)$", str(part))]
    return ".".join(keys) or "(top level)"


def _reason(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "there is no such key"
    if item["type"] in ("missing", "union_tag_not_found"):
        return "is missing" if item["type"] == "missing" else "`name` is missing"
    if item["type"] == "union_tag_invalid":
        return f"`name` should be {item['ctx']['expected_tags'].replace(', ', ' or ')}, not {item['ctx']['tag']!r}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f", not {item['input']!r}"
    return f"{message[0].lower()}{message[1:]}{shown}"
