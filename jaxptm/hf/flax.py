"""flax_model.msgpack: what the Flax models of transformers, up to version 4, were saved as.

Names and axes are those of transformers' own conversion (modeling_flax_pytorch_utils.py of 4.55).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jaxptm.types import JaxptmError


def torch_name(path: str) -> str:
    """The name in safetensors of a parameter of transformers' Flax models: `bert/.../kernel` -> `bert. ... .weight`."""
    return re.sub(r"(^|/)(kernel|scale|embedding)$", r"\1weight", path).replace("/", ".")


def read_flax(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file under their names in safetensors, and with the axes that they have there.

    Kernels are turned: (in, out) becomes (out, in), and of a convolution (width, in, out) becomes (out, in, width).

    Raises:
        JaxptmError: the file is truncated or something else.
    """
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        tensors = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")  # of a shard, the keys are paths already
        return {torch_name(path): _turned(path, np.asarray(tensor)) for path, tensor in tensors.items()}
    except Exception as error:  # msgpack and flax raise many kinds, down to KeyError
        raise JaxptmError(
            f"{file}: is no complete file of Flax parameters ({type(error).__name__}: {error}); it may be truncated, a "
            "Git LFS pointer, or foreign. Download it again."
        ) from error


def _turned(path: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.T if path.endswith("kernel") else tensor
