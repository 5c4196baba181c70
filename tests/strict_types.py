"""The type checker of the import hook: beartype, with an int welcome where a float is, as type checkers have it."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
