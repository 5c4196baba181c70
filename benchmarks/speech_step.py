"""A step of wav2vec 2.0, forward and backward, beside transformers + torch; and forms of its positions' convolution.

    python benchmarks/speech_step.py [--preset wav2vec2-base] [--rows B] [--seconds S] [--repeats R] [--layers N]
        [--precision float32|tensorfloat32]

Both sides run on the GPU where there is one. The loss is a random linear function of the last hidden state, without
dropout, in float32 (with products in `--precision`, which a CPU does not heed); weights are random and equal on both
sides, and the gradients are compared before anything is timed. The forms of the grouped convolution (`FORMS`)
run on the preset's frames, width, groups and taps; outputs and gradients are compared with torch's, too. All take
turns; counted are medians, and medians of the ratios to torch's turn of the same round. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxptm.models import PRESETS
from jaxptm.models.params import flatten
from jaxptm.pretrained import from_pretrained

DIMENSIONS = ("NWC", "WIO", "NWC")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"float32": 1e-5, "tensorfloat32": 5e-3}


def grouped(x: Any, kernel: Any, groups: int) -> Any:
    """XLA's own grouped convolution of x [B, F, D] and kernel [taps, D / groups, D]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), padding(kernel), dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def by_group(x: Any, kernel: Any, groups: int) -> Any:
    """One convolution a group: what `jaxptm.nn.convolution` does on CPUs."""
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([grouped(part, weights, 1) for part, weights in parts], -1)


def all_taps(x: Any, kernel: Any, groups: int) -> Any:
    """All frames that a frame sees, side by side, and one product."""
    return taps_in_blocks(x, kernel, groups, len(kernel))


def sixteen_taps(x: Any, kernel: Any, groups: int) -> Any:
    """Sixteen of them side by side, and the sum of so many products fewer."""
    return taps_in_blocks(x, kernel, groups, 16)


def taps_in_blocks(x: Any, kernel: Any, groups: int, block: int) -> Any:
    (rows, frames, width), taps, inner = x.shape, len(kernel), kernel.shape[1]
    padded = jnp.pad(x, ((0, 0), *padding(kernel), (0, 0)))
    seen = frames + taps - block
    beside = jnp.stack([padded[:, i : i + seen] for i in range(block)], 2).reshape(rows, seen, block, groups, inner)
    beside = beside.transpose(3, 0, 1, 2, 4).reshape(groups, rows, seen, block * inner)
    weights = kernel.reshape(taps // block, block, inner, groups, inner).transpose(3, 0, 1, 2, 4)
    weights = weights.reshape(groups, taps // block, block * inner, inner)
    products = (
        jnp.einsum("gbtc,gcd->gbtd", beside[:, :, i * block : i * block + frames], weights[:, i])
        for i in range(taps // block)
    )
    return sum(products).transpose(1, 2, 0, 3).reshape(rows, frames, width)


def fourier(x: Any, kernel: Any, groups: int) -> Any:
    """By the fast Fourier transform over time."""
    (rows, frames, width), (taps, inner, _) = x.shape, kernel.shape
    size = 1 << (frames + taps - 1).bit_length()
    spectrum = jnp.fft.rfft(x.reshape(rows, frames, groups, inner).transpose(0, 2, 3, 1), size)
    weights = jnp.fft.rfft(kernel.reshape(taps, inner, groups, inner).transpose(2, 1, 3, 0), size)
    out = jnp.fft.irfft(jnp.einsum("bgcf,gcdf->bgdf", spectrum, jnp.conj(weights)), size)
    return jnp.roll(out, taps // 2, -1)[..., :frames].transpose(0, 3, 1, 2).reshape(rows, frames, width)


FORMS: list[Callable[[Any, Any, int], Any]] = [grouped, by_group, all_taps, sixteen_taps, fourier]


def padding(kernel: Any) -> list[tuple[int, int]]:
    return [(len(kernel) // 2, (len(kernel) - 1) // 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wav2vec2-base")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--precision", choices=TOLERANCE, default="float32")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", options.precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tensorfloat32"
    family, config = PRESETS[options.preset]
    if options.layers:
        config = config.model_copy(update={"num_hidden_layers": options.layers})
    samples = round(16000 * options.seconds)
    audio = np.random.default_rng(0).normal(size=(options.rows, samples)).astype(np.float32)
    result = {
        "device": str(jax.devices()[0]),
        "torch's": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "precision": options.precision,
        "step": step(family, config, audio, options.repeats),
        "positions": positions(
            config, options.rows, config.frames(samples), options.repeats, TOLERANCE[options.precision]
        ),
    }
    print(json.dumps(result, indent=2))


def step(family: Any, config: Any, audio: np.ndarray, repeats: int) -> dict[str, Any]:
    """Both sides' seconds of a forward and a backward pass of the bare encoder."""
    kind = getattr(transformers, family.architectures[None])
    theirs = kind(kind.config_class(**family.to_hf(config))).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        model = from_pretrained(directory)
    theirs.to(DEVICE)
    values, given = jnp.asarray(audio), torch.tensor(audio, device=DEVICE)
    shape = (len(audio), config.frames(audio.shape[1]), config.hidden_size)
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    torch_cotangent = torch.tensor(cotangent, device=DEVICE)

    @jax.jit
    def slope(params: Any) -> Any:
        return jax.grad(
            lambda params: jnp.sum(model.module.apply({"params": params}, values)["last_hidden_state"] * cotangent)
        )(params)

    def torch_slope() -> None:
        theirs.zero_grad()
        (theirs(given).last_hidden_state * torch_cotangent).sum().backward()
        wait()

    torch_slope()
    found = flatten(slope(model.params))
    errors: dict[str, float] = {}
    for row in family.table(config, None).rows:
        expected = theirs.get_parameter(row.theirs.removeprefix(family.prefix)).grad
        if expected is None or row.theirs.endswith("k_proj.bias"):  # zero but for rounding
            continue
        (part,) = row.operation.load(expected.cpu().numpy())
        errors[row.theirs] = float(np.abs(found[row.paths[0]] - part).max() / np.abs(part).max())
    return timed({"jaxptm": lambda: jax.block_until_ready(slope(model.params))}, torch_slope, repeats) | {
        "largest relative difference of a gradient": max((error, name) for name, error in errors.items())
    }


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def positions(config: Any, rows: int, frames: int, repeats: int, tolerance: float) -> dict[str, Any]:
    """Seconds of a forward and a backward pass of each form."""
    width, taps, groups = config.hidden_size, config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(rows, frames, width)).astype(np.float32) for _ in range(2))
    kernel = rng.normal(scale=2 / (taps * width) ** 0.5, size=(taps, width // groups, width)).astype(np.float32)
    given = torch.tensor(x, requires_grad=True, device=DEVICE)
    weights = torch.tensor(kernel.T.copy(), requires_grad=True, device=DEVICE)
    torch_cotangent = torch.tensor(cotangent, device=DEVICE)

    def torch_pass() -> Any:
        given.grad = weights.grad = None
        out = torch.nn.functional.conv1d(given.mT, weights, padding=taps // 2, groups=groups)[..., :frames].mT
        (out * torch_cotangent).sum().backward()
        wait()
        return out.detach()

    out = torch_pass()
    x, kernel, cotangent = (jnp.asarray(array) for array in (x, kernel, cotangent))
    passes: dict[str, Callable[[], Any]] = {}
    for form in FORMS:

        def loss(x: Any, kernel: Any, form: Any = form) -> Any:
            found = form(x, kernel, groups)
            return jnp.sum(found * cotangent), found

        both = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        (of_x, of_kernel), found = both(x, kernel)
        for ours, given_there in ((found, out), (of_x, given.grad), (of_kernel.T, weights.grad)):
            expected = given_there.cpu().numpy()
            np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max(), err_msg=form.__name__)
        passes[form.__name__] = lambda both=both: jax.block_until_ready(both(x, kernel))
    return timed(passes, torch_pass, repeats)


def timed(passes: dict[str, Callable[[], Any]], reference: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """In turns: the median seconds of each, and the median of its ratios to the reference."""
    everyone = {**passes, "torch": reference}
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    for turn in range(repeats + 1):
        for name, run in everyone.items():
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": round(float(np.median(taken)), 5),
            "of torch's": round(float(np.median(np.array(taken) / np.array(seconds["torch"]))), 3),
        }
        for name, taken in seconds.items()
    }


if __name__ == "__main__":
    main()
