"""RoBERTa, XLM-R, ELECTRA, GPT-2, ALBERT and DistilBERT against transformers: every head, both directions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers

from jaxptm.hf import files
from jaxptm.models import FAMILIES, PRESETS
from jaxptm.models.albert import AlbertConfig
from jaxptm.models.electra import ElectraConfig
from jaxptm.models.gpt2 import Gpt2Config
from jaxptm.models.params import abstract_params, flatten, initialise, stacked, unstacked
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextConfig, TextModel, forward_flops
from jaxptm.pretrained import from_pretrained
from jaxptm.types import JaxptmError

TOLERANCE = 2e-5
CLASSES = {
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "electra": "Electra",
    "gpt2": "GPT2",
    "albert": "Albert",
    "distilbert": "DistilBert",
}
HEADS = {
    None: "Model",
    "masked-lm": "ForMaskedLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "multiple-choice": "ForMultipleChoice",
    "question-answering": "ForQuestionAnswering",
}
TASKS: dict[str, tuple[str | None, ...]] = {
    "roberta": tuple(HEADS),
    "xlm-roberta": tuple(HEADS),
    "electra": (*HEADS, "replaced-token"),
    "gpt2": (None, "causal-lm", "sequence-classification", "token-classification", "question-answering"),
    "albert": (*HEADS, "pretraining"),
    "distilbert": tuple(HEADS),
}
EXTRA: dict[str, dict[str, Any]] = {"electra": {"embedding_size": 20}, "albert": {"embedding_size": 20}}
ODD: dict[str, dict[str, Any]] = {
    "roberta": {"pad_token_id": 3, "type_vocab_size": 1, "hidden_size": 60, "num_attention_heads": 3},
    "xlm-roberta": {"layer_norm_eps": 1e-5, "num_labels": 5, "hidden_act": "relu"},
    "electra": {"embedding_size": 32, "hidden_act": "gelu_new", "num_labels": 5, "type_vocab_size": 3},
    "gpt2": {"hidden_act": "relu", "num_labels": 5, "hidden_size": 60, "num_attention_heads": 3},
    "albert": {"hidden_act": "gelu", "num_hidden_layers": 5, "num_labels": 3, "type_vocab_size": 1},
    "distilbert": {"hidden_act": "relu", "num_labels": 5, "hidden_size": 60, "num_attention_heads": 3},
}
CASES = [(family, task, odd) for family, tasks in TASKS.items() for task in tasks for odd in (False, True)]


def class_of(family: str, task: str | None) -> Any:
    special = {
        ("gpt2", "causal-lm"): "GPT2LMHeadModel",
        ("electra", "replaced-token"): "ElectraForPreTraining",
        ("albert", "pretraining"): "AlbertForPreTraining",
    }
    return getattr(transformers, special.get((family, task)) or CLASSES[family] + HEADS[task])


def theirs_of(family: str, task: str | None, **config: Any) -> Any:
    """A torch model in evaluation mode with noise on every parameter; `config` are our names of its fields."""
    kind = class_of(family, task)
    if task in ("question-answering", "pretraining"):  # heads of two labels each
        config.pop("num_labels", None)
    fields = {**oracle.SIZES, "pad_token_id": 1, **EXTRA.get(family, {}), **config}
    renamed = FAMILIES[family].renamed
    ends = {"bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    model = kind(kind.config_class(**{renamed.get(name, name): value for name, value in fields.items()}, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def inputs(config: Any, task: str | None, *, left: bool = False, length: int = 13) -> dict[str, np.ndarray]:
    """Four rows, two of them padded, with padding ids where the mask is 0."""
    rng = np.random.default_rng(0)
    pad, vocabulary = config.pad_token_id, config.vocab_size
    mask = np.ones((4, length), np.int64)
    mask[1, slice(None, 6) if left else slice(7, None)] = 0
    mask[3, slice(None, length - 1) if left else slice(1, None)] = 0
    ids = rng.integers(4, vocabulary, mask.shape) * mask + pad * (1 - mask)
    shape = (2, 2, length) if task == "multiple-choice" else mask.shape
    arrays = {"input_ids": ids.reshape(shape), "attention_mask": mask.reshape(shape)}
    if getattr(config, "type_vocab_size", 0) and config.model_type != "gpt2":
        arrays["token_type_ids"] = rng.integers(0, config.type_vocab_size, shape)
    return arrays


def compare(ours: Any, theirs: Any, mask: np.ndarray) -> None:
    """Every output; of what is said of tokens, that of real ones."""
    real = mask.reshape(-1, mask.shape[-1]).astype(bool)
    assert set(ours) == {name for name in theirs if name not in ("cache", "past_key_values")}
    for name in ours:
        pairs = (
            list(zip(ours[name], theirs[name], strict=True))
            if name == "hidden_states"
            else [(ours[name], theirs[name])]
        )
        for a, b in pairs:
            a, b = np.asarray(a), np.asarray(b)
            assert a.shape == b.shape, name
            if a.shape[:2] == real.shape:
                a, b = a[real], b[real]
            assert np.abs(a - b).max() < TOLERANCE, name


def torch_outputs(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    with torch.no_grad():
        out = model(**{name: torch.tensor(array) for name, array in arrays.items()}, output_hidden_states=True)
    return {
        name: tuple(part.numpy() for part in value) if name == "hidden_states" else value.numpy()
        for name, value in out.items()
        if name not in ("cache", "past_key_values")
    }


@pytest.mark.parametrize(("family", "task", "odd"), CASES)
def test_outputs_and_both_directions(family: str, task: str | None, odd: bool, tmp_path: Path) -> None:
    theirs = theirs_of(family, task, **(ODD[family] if odd else {}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", "auto")
    assert ours.task == task and ours.family.model_type == family
    arrays = inputs(theirs.config, task)
    compare(oracle.run(ours, arrays), torch_outputs(theirs, arrays), arrays["attention_mask"])

    ours.save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ignored = {"architectures", "transformers_version", "dtype", "_name_or_path", "n_inner", "generator_size"}
    ignored |= {"generator_layers", "classifier_dropout", "use_cache", "torch_dtype"}
    one, other = (
        {key: value for key, value in model.config.to_dict().items() if key not in ignored} for model in (theirs, again)
    )
    assert {key: other.get(key) for key in one} == one


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_names_each_parameter_of_both_sides_once(family: str, tied: bool) -> None:
    kind = FAMILIES[family]
    assert set(kind.architectures) == set(TASKS[family])
    for task in TASKS[family]:
        assert kind.architectures[task] == class_of(family, task).__name__
        pooler = {"pooler": task is None} if kind.config().pooler else {}
        config = kind.config(**{**oracle.SIZES, **EXTRA.get(family, {})}, tie_word_embeddings=tied, **pooler)
        table = kind.table(config, task)
        ours = [path for row in table.rows for path in row.paths]
        assert len(ours) == len(set(ours)) and set(ours) == set(flatten(abstract_params(TextModel(config, task))))
        names = [row.theirs for row in table.rows]
        assert len(names) == len(set(names))
        prefix = kind.prefix if task is None else ""
        assert table.names == {
            f"{prefix}{name}" for name in theirs_of(family, task, tie_word_embeddings=tied).state_dict()
        }


@pytest.mark.parametrize(
    ("family", "task"), [(f, t) for f in TASKS for t in ("masked-lm", "causal-lm") if t in TASKS[f]]
)
def test_own_decoders(family: str, task: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, task, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    ours, arrays = from_pretrained(tmp_path, task), inputs(theirs.config, task)
    assert any(path.endswith("head/embedding") for path in flatten(ours.params))
    compare(oracle.run(ours, arrays), torch_outputs(theirs, arrays), arrays["attention_mask"])


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("roberta", "masked-lm"),
        ("roberta", "sequence-classification"),
        ("electra", "replaced-token"),
        ("electra", "masked-lm"),
        ("gpt2", "sequence-classification"),
        ("albert", "masked-lm"),
        ("distilbert", "masked-lm"),
    ],
)
def test_gradients_agree_with_torch(family: str, task: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, task)
    theirs.save_pretrained(tmp_path)
    model, arrays = from_pretrained(tmp_path, task), inputs(theirs.config, task)
    if family == "roberta":
        # Torch keeps the row of padding from learning; and here it would, at positions that nothing reads.
        arrays = {name: array[[0, 2]] for name, array in arrays.items()}
    weights = np.random.default_rng(1).normal(size=(1,)).astype(np.float32)
    out = theirs(**{name: torch.tensor(array) for name, array in arrays.items()}).logits
    push = np.random.default_rng(2).normal(size=tuple(out.shape)).astype(np.float32) * weights
    if out.shape[:2] == arrays["attention_mask"].shape:
        push *= arrays["attention_mask"].reshape(*arrays["attention_mask"].shape, *[1] * (out.ndim - 2))
    (out * torch.tensor(push)).sum().backward()

    def value(params: Any) -> Any:
        ids = {name: jnp.asarray(array) for name, array in arrays.items()}
        return (model.module.apply({"params": params}, **ids)["logits"] * push).sum()

    found = flatten(jax.jit(jax.grad(value))(model.params))
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    scale = max(float(grad.norm()) for grad in grads.values() if grad is not None)
    for row in FAMILIES[family].table(model.config, task).rows:
        grad = grads[row.theirs]
        expected = row.operation.load(
            torch.zeros(theirs.get_parameter(row.theirs).shape).numpy() if grad is None else grad.numpy()
        )
        for path, part in zip(row.paths, expected, strict=True):
            if family in ("electra", "albert", "distilbert", "gpt2") and path == "embeddings/token/embedding":
                # Torch lets the row of padding, `padding_idx`, learn nothing as an input.
                keep = np.arange(len(part)) != theirs.config.pad_token_id
                part, ours = part[keep], np.asarray(found[path])[keep]
            else:
                ours = np.asarray(found[path])
            assert np.linalg.norm(ours - part) <= 1e-4 * max(np.linalg.norm(part), 1e-2 * scale), path


def test_roberta_counts_positions_by_padding_ids(tmp_path: Path) -> None:
    theirs = theirs_of("roberta", "masked-lm", pad_token_id=3, max_position_embeddings=20)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "masked-lm")
    assert ours.config.max_length == 16
    ids = np.random.default_rng(0).integers(4, 67, (3, 16))
    ids[1, [2, 3, 9]] = 3  # padding inside a row does not count, whatever the mask says
    arrays = {"input_ids": ids}
    compare(ours(**arrays, output_hidden_states=True), torch_outputs(theirs, arrays), ids != 3)
    assert np.isfinite(np.asarray(ours(**arrays).logits)).all()
    with pytest.raises(JaxptmError, match="the input is 17 tokens long, the model takes 16"):
        ours(input_ids=np.full((1, 17), 5))


def test_gpt2_pads_on_either_side(tmp_path: Path) -> None:
    theirs = theirs_of("gpt2", "causal-lm")
    theirs.save_pretrained(tmp_path)
    arrays = inputs(theirs.config, None, left=True)
    arrays["position_ids"] = np.maximum(np.cumsum(arrays["attention_mask"], axis=1) - 1, 0)
    compare(
        oracle.run(from_pretrained(tmp_path, "causal-lm"), arrays),
        torch_outputs(theirs, arrays),
        arrays["attention_mask"],
    )


def test_gpt2_classifies_by_the_last_token(tmp_path: Path) -> None:
    theirs = theirs_of("gpt2", "sequence-classification", pad_token_id=None)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "auto")
    ids = np.random.default_rng(0).integers(4, 67, (1, 9))
    expected = torch_outputs(theirs, {"input_ids": ids})["logits"]
    np.testing.assert_allclose(ours(input_ids=ids).logits, expected, atol=TOLERANCE)
    padded = np.concatenate([ids, np.full((1, 4), 5)], axis=1)
    mask = np.array([[1] * 9 + [0] * 4])
    np.testing.assert_allclose(ours(input_ids=padded, attention_mask=mask).logits, expected, atol=TOLERANCE)


def test_later_tokens_change_nothing_before_them(tmp_path: Path) -> None:
    theirs_of("gpt2", "causal-lm").save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm")
    ids = np.random.default_rng(0).integers(4, 67, (2, 12))
    other = ids.copy()
    other[:, 7:] = 5
    one, two = (np.asarray(ours(input_ids=rows).logits) for rows in (ids, other))
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert np.abs(one[:, 7:] - two[:, 7:]).min(axis=(1, 2)).max() < np.abs(one[:, 7:] - two[:, 7:]).max()
    packed = np.array([[1] * 5 + [2] * 7] * 2)
    np.testing.assert_allclose(
        np.asarray(ours(input_ids=ids, segment_ids=packed, position_ids=np.tile(np.r_[0:5, 0:7], (2, 1))).logits)[
            :, 5:
        ],
        ours(input_ids=ids[:, 5:]).logits,
        atol=TOLERANCE,
    )


def test_models_without_token_types_take_zeros_and_nothing_else(tmp_path: Path) -> None:
    theirs_of("distilbert", None).save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids = np.full((1, 4), 5)
    np.testing.assert_array_equal(
        ours(input_ids=ids, token_type_ids=0 * ids).last_hidden_state, ours(input_ids=ids).last_hidden_state
    )
    with pytest.raises(JaxptmError, match="`token_type_ids` goes from 1 to 1; the model tells no types apart"):
        ours(input_ids=ids, token_type_ids=ids // ids)


def test_gpt2_checkpoints_of_the_hub_load(tmp_path: Path) -> None:
    """Bare names, the buffers of old versions, and no second copy of the tied table."""
    theirs = theirs_of("gpt2", "causal-lm")
    tensors = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in theirs.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    files.write_model(
        tmp_path, theirs.config.to_dict() | {"n_inner": None}, {n: np.array(t) for n, t in tensors.items()}
    )
    assert Gpt2Config(**FAMILIES["gpt2"].from_hf({"n_embd": 32, "n_head": 4})).intermediate_size == 128
    theirs.config.n_inner = 48
    theirs.config.save_pretrained(tmp_path)
    ours, arrays = from_pretrained(tmp_path, "causal-lm"), inputs(theirs.config, None)
    compare(oracle.run(ours, arrays), torch_outputs(theirs, arrays), arrays["attention_mask"])


def test_another_head_of_the_family_is_initialised_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for family, task, head in (
        ("roberta", "masked-lm", "classifier, pooler"),
        ("electra", "replaced-token", "classifier, pooler"),
        ("gpt2", "causal-lm", "classifier"),
        ("distilbert", "masked-lm", "classifier, pooler"),
    ):
        theirs_of(family, task).save_pretrained(tmp_path / family)
        caplog.clear()
        model = from_pretrained(tmp_path / family, "sequence-classification", num_labels=3)
        assert f"has no {head}: initialised at random" in caplog.text
        assert model(input_ids=np.full((2, 5), 5)).logits.shape == (2, 3)


def test_the_generator_of_a_pair_has_no_head_of_the_discriminator(tmp_path: Path) -> None:
    theirs_of("electra", "masked-lm").save_pretrained(tmp_path)
    with pytest.raises(JaxptmError, match="electra has no head for the task 'causal-lm'; it has None, masked-lm"):
        from_pretrained(tmp_path, "causal-lm")


COUNTS = {
    # Parameters of the bare models, as transformers counts them on the meta device and as the model cards say.
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "xlm-roberta-base": 278_043_648,
    "electra-small": 13_483_008,
    "electra-base": 108_891_648,
    "electra-large": 334_092_288,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "albert-base": 11_683_584,
    "albert-xxlarge": 222_595_584,
    "distilbert-base": 66_362_880,
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_of_the_presets(preset: str) -> None:
    family, config = PRESETS[preset]
    shapes = flatten(abstract_params(family.module(config, None)))
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == COUNTS[preset]
    kind = class_of(family.model_type, None)
    with torch.device("meta"):
        theirs = kind(kind.config_class(**family.to_hf(config)))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == COUNTS[preset]


def test_presets() -> None:
    for name, (family, config) in PRESETS.items():
        assert isinstance(config, family.config) and config.hidden_size % config.num_attention_heads == 0, name
    released = transformers.RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    assert FAMILIES["roberta"].from_hf(released.to_dict()) == PRESETS["roberta-base"][1].model_dump(
        exclude={"norm", "pooler", "embedding_size", "embedding_dropout_prob"}
    )
    assert PRESETS["roberta-base"][1].max_length == 512


@pytest.mark.parametrize("family", TASKS)
def test_config_json_both_ways(family: str) -> None:
    kind = FAMILIES[family]
    defaults = class_of(family, None).config_class().to_dict()
    silent = kind.config(**kind.from_hf({}))
    if family == "gpt2":  # ours follows the other dropout where nothing is said
        silent = silent.model_copy(update={"embedding_dropout_prob": 0.1})
    assert kind.config(**kind.from_hf(defaults)) == silent
    ours = theirs_of(family, None, hidden_dropout_prob=0.25, num_labels=3).config.to_dict()
    config = kind.config(**kind.from_hf(ours))
    assert (config.hidden_dropout_prob, config.num_labels, config.hidden_size) == (0.25, 3, 32)
    assert kind.config(**kind.from_hf(kind.to_hf(config))) == config
    for key in kind.fixed:
        with pytest.raises(ValueError, match=f"`{key}: other` is not supported"):
            kind.from_hf({**ours, key: "other"})


def test_the_generator_s_sizes() -> None:
    """google-research/electra, run_pretraining.py `get_generator_config`, and the released generators on the hub."""
    for preset, (layers, width, heads, inner, embedding) in {
        "electra-small": (12, 64, 1, 256, 128),
        "electra-small++": (12, 256, 4, 1024, 128),
        "electra-base": (12, 256, 4, 1024, 768),
        "electra-large": (24, 256, 4, 1024, 1024),
    }.items():
        config = PRESETS[preset][1]
        assert isinstance(config, ElectraConfig)
        made = config.generator()
        assert (made.num_hidden_layers, made.hidden_size, made.num_attention_heads) == (layers, width, heads)
        assert (made.intermediate_size, made.embedding_size) == (inner, embedding)
        assert FAMILIES["electra"].to_hf(config)["generator_size"] == config.generator_size


@pytest.mark.parametrize("config", [AlbertConfig(**oracle.SIZES, embedding_size=20), Gpt2Config(**oracle.SIZES)])
def test_scan_and_remat_change_nothing(config: TextConfig) -> None:
    plain = TextModel(config)
    params = oracle.random_params(abstract_params(plain))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 67, (2, 9)))

    def run(module: TextModel, params: Any) -> Any:
        def loss(params: Any) -> Any:
            out = module.apply({"params": params}, ids, output_hidden_states=True)
            return jnp.sum(out["last_hidden_state"] ** 2), out["hidden_states"]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (value, states), grads = run(plain, params)
    for options in ({"scan": True}, {"remat": True}, {"scan": True, "remat": "dots"}):
        module = TextModel(config, execution=Execution(**options))
        (other, others), found = run(module, stacked(params) if module.execution.scan else params)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), others, states)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), unstacked(found), grads)
        fresh = initialise(module, jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, unstacked(fresh), initialise(plain, jax.random.key(0)))


def test_albert_has_one_layer_whatever_is_asked() -> None:
    params = abstract_params(TextModel(AlbertConfig(**oracle.SIZES, embedding_size=20)))
    assert set(params["encoder"]) == {"shared_layer"}
    assert stacked(params) == params == unstacked(params)


def test_gpt2_begins_with_small_residual_projections() -> None:
    config = Gpt2Config(hidden_size=128, num_attention_heads=2, num_hidden_layers=8, vocab_size=2000)
    params = initialise(TextModel(config, "causal-lm"), jax.random.key(0))
    layer = params["encoder"]["layer_3"]
    for kernel in (layer["attention"]["output"]["kernel"], layer["mlp"]["down"]["kernel"]):
        assert float(jnp.std(kernel)) == pytest.approx(0.02 / 4, rel=0.05)
    for kernel in (layer["attention"]["query"]["kernel"], layer["mlp"]["up"]["kernel"]):
        assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.std(params["embeddings"]["token"]["embedding"])) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("family", "task"), [(f, t) for f, tasks in TASKS.items() for t in tasks if t != "multiple-choice"]
)
def test_flops_are_those_of_the_products(family: str, task: str | None) -> None:
    kind = FAMILIES[family]
    pooler = {"pooler": False} if kind.config().pooler else {}
    config = kind.config(**{**oracle.SIZES, **EXTRA.get(family, {})}, **pooler)
    module, rows, length, predictions = TextModel(config, task), 3, 8, 2

    def apply(params: Any, ids: jax.Array) -> Any:
        return module.apply({"params": params}, ids, mlm_positions=ids[:, :predictions])

    counted = 0
    for eqn in oracle.equations(apply, abstract_params(module), jnp.zeros((rows, length), jnp.int32)):
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            counted += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    labels = {
        "sequence-classification": rows,
        "token-classification": rows * length,
        "question-answering": rows * length,
    }
    counted -= 2 * 2 * 32 * labels.get(str(task), rows if task == "pretraining" else 0)  # two labels: left out
    assert forward_flops(config, task, rows, length, predictions) == counted


def test_a_bfloat16_gpt2_computes_norms_and_softmax_in_float32() -> None:
    module = TextModel(Gpt2Config(**oracle.SIZES), "causal-lm", Execution(jnp.bfloat16))
    params = oracle.random_params(abstract_params(module))
    seen: dict[str, set[str]] = {}
    ids = jnp.zeros((2, 8), jnp.int32)
    for operation in oracle.equations(lambda params: module.apply({"params": params}, ids, ids), params):
        seen.setdefault(operation.primitive.name, set()).update(str(operand.aval.dtype) for operand in operation.invars)
    assert seen["exp"] == {"float32"} and seen["rsqrt"] == {"float32"} and seen["dot_general"] == {"bfloat16"}
    assert module.apply({"params": params}, ids)["logits"].dtype == jnp.float32
