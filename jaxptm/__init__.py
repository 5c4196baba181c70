"""jaxptm: pre-trained encoders in JAX, with Hugging Face weights in and out.

model = jaxptm.from_pretrained("bert-base-uncased", "masked-lm")
fill = jaxptm.pipeline("fill-mask", "runs/quickstart/model")
results = jaxptm.train("configs/pretrain/quickstart.yaml")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxptm.errors import JaxptmError
    from jaxptm.pipelines import pipeline
    from jaxptm.pretrained import Model, from_pretrained
    from jaxptm.training import train

__all__ = ["JaxptmError", "Model", "from_pretrained", "pipeline", "train"]
__version__ = "0.1.0"

_HOMES = {
    "JaxptmError": "errors",
    "Model": "pretrained",
    "from_pretrained": "pretrained",
    "pipeline": "pipelines",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    # `import jaxptm` costs nothing: jax and its friends are imported when a name is first used.
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxptm' has no attribute {name!r}")
    value = getattr(import_module(f"jaxptm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
