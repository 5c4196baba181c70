"""Parameters as an Orbax checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxptm.types import JaxptmError, Params


def read_params(path: Path) -> Params:
    """The parameters, as numpy arrays: the devices that saved them need not be here.

    Raises:
        JaxptmError: a file of the checkpoint is missing or damaged.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path.absolute()).item_metadata
            if stored is None:
                raise ValueError("its _METADATA is missing or cannot be read")
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored.tree)
            params: Params = checkpointer.restore(path.absolute(), restore_args=as_numpy)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise JaxptmError(f"{path}: is no complete Orbax checkpoint ({error}); copy or convert it again.") from error
    return params
