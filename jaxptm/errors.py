"""The error that users see."""


class JaxptmError(Exception):
    """An error that the user can act on: one sentence with the place and the remedy, shown without a traceback."""
