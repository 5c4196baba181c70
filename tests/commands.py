"""The command line, in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from jaxptm.cli import app


def jaxptm(*arguments: str, text: str | None = None) -> tuple[int, str, str]:
    """Status, output and errors of a command; `text` is its standard input."""
    result = CliRunner().invoke(app, list(arguments), input=text)
    return result.exit_code, result.stdout, result.stderr
