"""Operations are told by the modules that they came from."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxptm.profiling import instructions, operations, origin, table, time_by_module

MODULES = frozenset(
    ("encoder", "layer_0", "layer_11", "attention", "mlp", "up", "mlp_up", "mlm_head", "kernel", "generator", "layers")
)


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            "jit(body)/jvp(TextModel)/encoder/layer_11/layer_11.mlp/mlp/up/dot_general",
            ("encoder/layer/mlp/up", "forward"),
        ),
        (
            "jit(body)/transpose(jvp(TextModel))/encoder/layer_0/layer_0.mlp/mlp/up/reduce_sum",
            ("encoder/layer/mlp/up", "backward"),
        ),
        (
            "jit(body)/jvp(TextModel)/encoder/layer_0/layer_0.attention/attention/bhqk,bkhd->bqhd/dot_general",
            ("encoder/layer/attention", "forward"),
        ),
        ("jit(body)/jvp(TextModel)/encoder/layer_0/Dropout_0/jit(_where)/select_n", ("encoder/layer", "forward")),
        ("jit(body)/transpose(jvp(vmap(mlm_head)))/neg", ("mlm_head", "backward")),
        ("jit(body)/jvp(generator)/TextModel/encoder/layers/mlp/up/add", ("generator/encoder/layer/mlp/up", "forward")),
        (  # jax.checkpoint: of a function, and of a layer in whose scope others begin
            "jit(body)/transpose(jvp(TextModel))/encoder/mlp/checkpoint/rematted_computation/encoder/mlp/mul",
            ("encoder/mlp", "backward"),
        ),
        (
            "jit(body)/transpose(jvp(generator))/TextModel/encoder/jvp(generator)/TextModel/encoder/checkpoint/layer_0/up/add",
            ("generator/encoder/layer/up", "backward"),
        ),
        ("jit(body)/jvp(generator)/up/mlp_up/up/add", ("generator/up/mlp_up/up", "forward")),
        ("jit(body)/jvp()/mul", ("", "forward")),
        ("jit(body)/mul", ("", "update")),
        ("state.params['encoder']['layer_0']['mlp']['up']['kernel']", ("", "update")),
        ("", ("", "update")),
    ],
)
def test_origin(op_name: str, expected: tuple[str, str]) -> None:
    assert origin(op_name, MODULES) == expected


def test_instructions_but_not_those_that_hold_others() -> None:
    program = """HloModule jit_body
%body (p: (s32[], f32[4]{0})) -> (s32[], f32[4]{0}) {
  %p = (s32[], f32[4]{0}) parameter(0)
  ROOT %fusion.3 = (s32[], f32[4]{0:T(256)}) fusion(%p), kind=kLoop, metadata={op_name="jit(body)/jvp(M)/up/add" id=3}
}
ENTRY main.1 {
  while.7 = (s32[], f32[4]{0}) while(%tuple), condition=%c, body=%body, metadata={op_name="jit(body)/while"}
  copy.2 = f32[4]{0} copy(%x)
}
"""
    assert instructions(program) == {"p": "", "fusion.3": "jit(body)/jvp(M)/up/add", "copy.2": ""}


def traced(plane: str, line: str, *events: tuple[str, float, dict[str, str]]) -> SimpleNamespace:
    found = [SimpleNamespace(name=name, duration_ns=time, stats=list(stats.items())) for name, time, stats in events]
    return SimpleNamespace(name=plane, lines=[SimpleNamespace(name=line, events=found)])


def test_beside_an_accelerator_the_host_does_not_count() -> None:
    host = traced("/host:CPU", "python", ("fusion.3", 7, {}), ("copy.2", 1, {"hlo_op": "copy.2"}))
    kernels = traced("/device:GPU:0", "Stream #14(Compute)", ("sm90_gemm", 40, {"hlo_op": "dot.1"}), ("memset", 2, {}))
    sums = traced("/device:GPU:0", "XLA Modules", ("jit_body", 42, {}))
    tpu = traced("/device:TPU:0", "XLA Ops", ("%fusion.3 = f32[4]{0:T(256)} fusion(%p)", 5, {}))

    def found(*planes: SimpleNamespace) -> list[tuple[str, float]]:
        return list(operations([SimpleNamespace(planes=planes)]))

    assert found(host) == [("fusion.3", 7), ("copy.2", 1)]
    assert found(host, kernels, sums) == [("dot.1", 40), ("memset", 2)]
    assert found(host, tpu) == [("fusion.3", 5)]


def test_a_product_takes_longer_than_a_sum() -> None:
    params = {"large": jnp.ones((512, 512)), "small": jnp.ones(512)}

    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        with jax.named_scope("large"):
            for _ in range(4):  # so much longer that a busy machine does not hide it
                x = x @ params["large"]
        with jax.named_scope("small"):
            return jnp.sum(jnp.tanh(x) @ params["small"])

    x = jnp.ones((2048, 512))
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    parts = time_by_module(lambda: compiled(params, x), 3, compiled.as_text(), params)
    assert [part.seconds for part in parts] == sorted((part.seconds for part in parts), reverse=True)
    by_module = {name: sum(part.seconds for part in parts if part.module == name) for name in ("large", "small")}
    assert by_module["large"] > by_module["small"] > 0
    lines = table(parts, longest=1).splitlines()
    assert lines[1].endswith(f"{parts[0].module}, {parts[0].direction}") and lines[2].endswith(f"{len(parts) - 1} more")
