"""Draws the pictures of objectives.md with jaxptm's own operations: python docs/pictures.py [DIRECTORY]."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from jaxptm.ops.contrastive import draw_negatives, mask_frames
from jaxptm.ops.masking import Masked, mask_tokens, mask_with_replacement, replace_masked
from jaxptm.transcription import best_path

WORDS = "[CLS] the old bridge over the river was closed in the spring [SEP]".split()
VOCABULARY = ["[MASK]", *dict.fromkeys(WORDS), *"road new tower was opened town winter".split()]
PLAIN, HIDDEN, CHANGED, TARGET = "#eceaf4", "#b9a7e6", "#f2b8a0", "#bfe3c0"
INK = "#2d2a3a"


def canvas(width: float, height: float, rows: dict[float, str]) -> Axes:
    """Axes without frame whose rows have names at the left."""
    _, axes = plt.subplots(figsize=(width * 0.85, height * 0.62))
    axes.set(xlim=(-2.6, width - 1.4), ylim=(-0.6, height - 0.6))
    axes.axis("off")
    for y, name in rows.items():
        axes.text(-0.7, y, name, ha="right", va="center", color=INK, fontsize=10, style="italic")
    return axes


def boxes(axes: Axes, y: float, texts: list[str], colors: list[str]) -> None:
    """A row of tokens; an empty text leaves its place empty."""
    for x, (text, color) in enumerate(zip(texts, colors, strict=True)):
        if text:
            shape = FancyBboxPatch(
                (x - 0.44, y - 0.3), 0.88, 0.6, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec="none"
            )
            axes.add_patch(shape)
            axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=9 if len(text) < 7 else 7.5)


def encode() -> tuple[jax.Array, jax.Array]:
    """Token ids [1, L] of the sentence, and which of them may be chosen."""
    ids = jnp.array([[VOCABULARY.index(word) for word in WORDS]])
    return ids, jnp.array([[not word.startswith("[") for word in WORDS]])


def at_slots(masked: Masked, texts: list[str]) -> list[str]:
    """Texts where something is predicted, and nothing elsewhere."""
    chosen = {int(p) for p, w in zip(masked.positions[0], masked.weights[0], strict=True) if w}
    return [text if place in chosen else "" for place, text in enumerate(texts)]


def masked_lm() -> None:
    """Three tokens are chosen: one is hidden, one replaced, one left; a seed that shows each fate is looked for."""
    ids, eligible = encode()
    for seed in range(1000):
        masked = mask_tokens(
            jax.random.split(jax.random.key(seed), 1),
            ids,
            eligible,
            word_start=eligible,
            lengths=jnp.array([len(WORDS)]),
            strategy="tokens",
            probability=0.25,
            max_predictions=3,
            mask_id=0,
            vocab_size=len(VOCABULARY),
        )
        read = [VOCABULARY[i] for i in masked.input_ids[0]]
        changed = [new != old for new, old in zip(read, WORDS, strict=True)]
        fates = at_slots(
            masked,
            ["hidden" if new == "[MASK]" else "random" if c else "kept" for new, c in zip(read, changed, strict=True)],
        )
        if {"hidden", "random", "kept"} <= set(fates) and not any(
            "[" in new for new, c in zip(read, changed, strict=True) if c and new != "[MASK]"
        ):
            break
    axes = canvas(len(WORDS) + 1.2, 3, {2: "text", 1: "what the model reads", 0: "what it must say"})
    boxes(axes, 2, WORDS, [PLAIN] * len(WORDS))
    colors = {"hidden": HIDDEN, "random": CHANGED, "kept": TARGET, "": PLAIN}
    boxes(axes, 1, read, [colors[fate] for fate in fates])
    boxes(axes, 0, at_slots(masked, WORDS), [TARGET] * len(WORDS))


def next_sentence() -> None:
    """A pair that belongs together, and one that does not."""
    axes = canvas(13.2, 2, {1: "a pair", 0: "another"})
    first = "[CLS] he opened the door [SEP]".split()
    for y, second, label in (
        (1, "nobody was there [SEP]".split(), "is next"),
        (0, "rivers carry sand [SEP]".split(), "not next"),
    ):
        row = [*first, *second]
        boxes(axes, y, row, [PLAIN] * len(first) + [HIDDEN] * len(second))
        boxes(axes, y, [""] * (len(row) + 1) + [label], [TARGET] * (len(row) + 2))


def causal_lm() -> None:
    """Each token is said from those before it."""
    words = "the old bridge over the river was closed".split()
    axes = canvas(len(words) + 1.2, 2, {1: "what the model has read", 0: "what it must say"})
    boxes(axes, 1, words[:-1], [PLAIN] * (len(words) - 1))
    boxes(axes, 0, words[1:], [TARGET] * (len(words) - 1))
    for x in range(len(words) - 1):
        for earlier in range(x + 1):
            axes.plot([earlier, x], [0.68, 0.32], color="#8a7fb0", linewidth=0.7, alpha=0.6, zorder=0)


def replaced_token() -> None:
    """The generator's samples in the places of hidden tokens, and what the discriminator must say of each token."""
    ids, eligible = encode()
    usual = np.full((1, 3, len(VOCABULARY)), -9.0)
    for seed in range(1000):
        key, mask_key = jax.random.split(jax.random.key(seed))
        masked = mask_with_replacement(
            mask_key[None],
            ids,
            eligible,
            lengths=jnp.array([len(WORDS)]),
            probability=0.25,
            max_predictions=3,
            mask_id=0,
        )
        # A generator that is right every other time, and else says something likely.
        logits = usual.copy()
        for slot, label in enumerate(masked.labels[0]):
            logits[0, slot, int(label)] = 1.0
            logits[0, slot, -7:] = 0.0
        corrupted = replace_masked(key[None], ids, masked, jnp.asarray(logits), 1.0)
        read = [VOCABULARY[i] for i in masked.input_ids[0]]
        filled = [VOCABULARY[i] for i in corrupted[0]]
        hidden = [place for place, word in enumerate(read) if word == "[MASK]"]
        wrong = [place for place in hidden if filled[place] != WORDS[place]]
        if len(hidden) == 3 and len(wrong) == 2:
            break
    axes = canvas(
        len(WORDS) + 1.2,
        4,
        {3: "text", 2: "the generator reads", 1: "the discriminator reads", 0: "replaced?"},
    )
    boxes(axes, 3, WORDS, [PLAIN] * len(WORDS))
    boxes(axes, 2, read, [HIDDEN if place in hidden else PLAIN for place in range(len(WORDS))])
    boxes(
        axes,
        1,
        filled,
        [CHANGED if place in wrong else TARGET if place in hidden else PLAIN for place in range(len(WORDS))],
    )
    boxes(
        axes,
        0,
        ["yes" if place in wrong else "no" for place in range(len(WORDS))],
        [CHANGED if place in wrong else PLAIN for place in range(len(WORDS))],
    )


def contrastive() -> None:
    """Spans of frames are hidden; each hidden frame is to be found among others of the same recording."""
    frames, span = 48, 5
    mask_key, negative_key = jax.random.split(jax.random.key(6))
    masked = mask_frames(mask_key[None], jnp.array([frames]), frames, probability=0.45, span=span)
    count = int(masked.weights.sum())
    axes = canvas(13.2, 4, {3: "samples", 2: "frames, some hidden", 0.6: "find the frame"})
    seconds = np.linspace(0, 1, 1500)
    envelope = np.abs(np.sin(9 * seconds)) * (0.4 + 0.6 * np.sin(23 * seconds) ** 2)
    axes.plot(
        seconds * 11,
        3 + 0.45 * envelope * np.sin(400 * seconds + 6 * np.sin(20 * seconds)),
        color="#8a7fb0",
        linewidth=0.5,
    )
    width = 11 / frames
    for frame in range(frames):
        color = HIDDEN if masked.mask[0, frame] else PLAIN
        axes.add_patch(plt.Rectangle((frame * width, 1.7), 0.85 * width, 0.6, fc=color, ec="none"))
    slot = count // 2
    others = draw_negatives(negative_key[None], jnp.array([count]), masked.positions.shape[1], 6)[0, slot]
    asked = int(masked.positions[0, slot])
    where = (asked + 0.4) * width
    for place, frame in enumerate([asked, *(int(masked.positions[0, other]) for other in others)]):
        x, right = 2.2 + 1.1 * place, place == 0
        axes.plot(
            [(frame + 0.4) * width, x],
            [1.68, 0.92],
            color="#5b9a5e" if right else "#b5b0c4",
            linewidth=1.4 if right else 0.6,
            zorder=0,
        )
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.4, 0.3),
                0.8,
                0.6,
                boxstyle="round,pad=0,rounding_size=0.1",
                fc=TARGET if right else PLAIN,
                ec="none",
            )
        )
        axes.text(x, 0.6, "itself" if right else "another", ha="center", va="center", fontsize=9, color=INK)
    axes.annotate("", (where, 2.32), (where, 2.75), arrowprops={"arrowstyle": "->", "color": INK})


def ctc() -> None:
    """A symbol or a blank a frame; repetitions are one, and blanks are none."""
    path = "--hh-eee-l-ll-oo-"
    symbols = sorted(set(path))
    kept = [""] * len(path)
    for span in best_path(np.eye(len(symbols))[[symbols.index(symbol) for symbol in path]], symbols.index("-")):
        kept[span.start] = symbols[span.symbol]
    axes = canvas(len(path) * 0.75 + 1.2, 2, {1: "a symbol a frame", 0: "the transcript"})
    axes.set_xlim(-4.5, len(path))
    boxes(axes, 1, list(path), [PLAIN if symbol == "-" else HIDDEN for symbol in path])
    boxes(axes, 0, kept, [TARGET] * len(path))


def main(directory: Path) -> None:
    """Writes an SVG for each objective."""
    plt.rcParams |= {"svg.hashsalt": "jaxptm", "font.family": "DejaVu Sans"}
    directory.mkdir(parents=True, exist_ok=True)
    for draw in (masked_lm, next_sentence, causal_lm, replaced_token, contrastive, ctc):
        draw()
        plt.savefig(directory / f"{draw.__name__}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
        plt.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("pictures"))
