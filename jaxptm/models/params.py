"""Parameters of a module: made, named by path, stacked by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxptm.nn.core import stack_layers, unstack_layers
from jaxptm.nn.model import PretrainedModule
from jaxptm.types import Array, Params

Tree = TypeVar("Tree")


def initialise(module: PretrainedModule, key: Array, only: list[str] | None = None) -> Params:
    """Fresh parameters, in one compiled call; of the top-level modules `only` where given."""
    wanted = (lambda params: {name: params[name] for name in only}) if only else (lambda params: params)
    return jax.jit(lambda key: wanted(_init(module, key)))(key)


def abstract_params(module: PretrainedModule) -> Params:
    """Shapes and dtypes of a module's parameters, without computing any."""
    return jax.eval_shape(lambda: _init(module, jax.random.key(0)))


def _init(module: PretrainedModule, key: Array) -> Params:
    # By a scan in any case: it compiles in a time that does not grow with the layers, and a run begins with the same
    # parameters whether it scans its layers or not.
    scanned = module.clone(execution=replace(module.execution, scan=True, remat=False))
    params = scanned.init(key, module.example())["params"]
    return params if module.execution.scan else unstacked(params)


def flatten(params: Params) -> dict[str, Any]:
    """Paths joined by "/", one entry a layer even where the layers are stacked."""
    return flatten_dict(unstacked(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The nested dict of "/"-joined paths."""
    return unflatten_dict(dict(flat), sep="/")


def stacked(params: Params) -> Params:
    """The same parameters with the layers of each encoder stacked for `scan`."""
    return _at_encoders(stack_layers, params)


def unstacked(params: Params) -> Params:
    """The same parameters with one entry a layer, whether they were stacked or not."""
    return _at_encoders(lambda encoder: unstack_layers(encoder) if "layers" in encoder else encoder, params)


def _at_encoders(function: Callable[[Params], Params], params: Params) -> Params:
    """Also where models are parts of the tree, as ELECTRA's two are."""

    def visit(name: str, value: Any) -> Any:
        if name == "encoder":
            return function(value)
        return _at_encoders(function, value) if isinstance(value, dict) else value

    return {name: visit(name, value) for name, value in params.items()}


def map_params(function: Callable[[Params], Params], state: Tree) -> Tree:
    """Applies `function` to the parameters of a training state and to each tree of moments of them."""
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, dict) else leaf,
        state,
        is_leaf=lambda leaf: isinstance(leaf, dict),
    )
