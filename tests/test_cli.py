"""The commands as they are typed: exit status, output, errors without a traceback, and a quick start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import jaxptm
from reference import SMALL, perturbed

COMMANDS = ("train", "evaluate", "glue", "predict", "bench", "prepare", "convert", "report", "doctor")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from jaxptm.data.tokenizer import train_wordpiece

    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_wordpiece(["the cat sat on the mat", "a dog sat on a log"] * 5, 60)
    perturbed("BertForMaskedLM", **{**SMALL, "vocab_size": len(tokenizer)}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_importing_costs_nothing() -> None:
    heavy = ("jax", "flax", "transformers", "datasets", "grain", "orbax", "torch", "matplotlib", "numpy")
    code = (
        "import sys, jaxptm, jaxptm.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(jaxptm.cli.app, ['--help']).exit_code == 0\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_names_of_the_contract() -> None:
    import jaxptm as package

    for name in ("from_pretrained", "pipeline", "train"):
        assert callable(getattr(package, name)), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS]])
def test_help(command: tuple[str, ...]) -> None:
    status, out, _ = jaxptm(*command, "--help")
    assert status == 0 and "Usage" in out
    if not command:
        assert all(name in out for name in COMMANDS)


def test_predict_prints_a_table_or_json_lines(model: Path) -> None:
    text = "the [MASK] sat on the [MASK]"
    status, out, _ = jaxptm("predict", "fill-mask", str(model), text, "--top-k", "3")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == text and len(lines) == 3
    assert all(line.count("%") == 3 for line in lines[1:])
    status, out, _ = jaxptm("predict", "fill-mask", str(model), "--json", text="a [MASK]\n\nthe [MASK] sat\n")
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["input"] for record in records] == ["a [MASK]", "the [MASK] sat"]
    assert len(records[0]["output"]) == 5 and records[0]["output"][0].keys() == {
        "score",
        "token",
        "token_str",
        "sequence",
    }


def test_predict_reads_files_and_sets_bad_rows_aside(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('id,sentence\n1,the [MASK] sat\n2,the cat\n3\n4,"a [MASK], a dog"\n')
    command = ("predict", "fill-mask", str(model), str(tmp_path / "rows.csv"), "--columns", "sentence", "--json")
    status, out, err = jaxptm(*command, "-o", "top_k=2")
    assert status == 1 and "Traceback" not in err
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["input"] for record in records] == ["the [MASK] sat", "a [MASK], a dog"]
    assert [record["where"].rpartition("/")[2] for record in records] == ["rows.csv:2", "rows.csv:5"]
    assert all(len(record["output"]) == 2 for record in records)
    assert "rows.csv:3: 'the cat' holds no mask token" in err and "rows.csv:4: has 1 fields, expected 2" in err
    assert "2 input(s) could not be answered" in err
    status, _, err = jaxptm(*command, "-o", "top_k=many")
    assert status == 1 and err == "error: --option top_k=many: expected int.\n"
    status, _, err = jaxptm(*command, "-o", "stride=2")
    assert status == 1 and "fill-mask has no such argument, only top_k, targets, tokenizer_kwargs, batch_size" in err


def test_glue_wants_a_config_of_glue() -> None:
    path = Path(__file__).parent.parent / "configs/finetune/squad.yaml"
    status, _, err = jaxptm("glue", str(path))
    assert status == 1 and "the config is not of GLUE" in err


def test_predict_one_answer_to_one_text(model: Path) -> None:
    status, out, _ = jaxptm("predict", "fill-mask", str(model), "the cat [MASK]", "--top-k", "1")
    assert status == 0 and out.splitlines()[0] == "the cat [MASK]" and out.count("%") == 1
    status, out, _ = jaxptm("predict", "fill-mask", str(model), "the cat [MASK]", "--top-k", "1", "--json")
    assert [answer["token_str"] for answer in json.loads(out)["output"]]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    from jaxptm.data.tokenizer import train_wordpiece

    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_wordpiece(["the cat sat on the mat", "a dog sat on a log"] * 5, 60)
    tokenizer.save_pretrained(directory)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    end = tokenizer.sep_token_id
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=end, eos_token_id=end, initializer_range=0.3)
    ).save_pretrained(directory)
    return directory


def test_predict_prints_texts_or_json_lines(gpt2: Path) -> None:
    import jaxptm as package

    texts = ["the cat", "a dog sat on"]
    greedy = ("predict", "text-generation", str(gpt2), "--greedy", "--max-new-tokens", "8")
    wanted = package.pipeline("text-generation", gpt2)(texts, do_sample=False, max_new_tokens=8)
    status, out, _ = jaxptm(*greedy, *texts)
    assert status == 0 and out.splitlines() == [answers[0]["generated_text"] for answers in wanted]
    status, out, _ = jaxptm(*greedy, "--json", text="\n".join(texts))
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and records == [
        {"where": f"line {at}", "input": text, "output": answers}
        for at, (text, answers) in enumerate(zip(texts, wanted, strict=True), 1)
    ]
    status, out, _ = jaxptm(*greedy, texts[0])
    assert status == 0 and out.splitlines() == [wanted[0][0]["generated_text"]]


def test_predict_hands_the_settings_of_sampling_on(gpt2: Path) -> None:
    import jaxptm as package

    settings = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 7}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    wanted = package.pipeline("text-generation", gpt2)("the cat", **settings)
    status, out, _ = jaxptm("predict", "text-generation", str(gpt2), "the cat", *options)
    assert status == 0 and out.splitlines() == [wanted[0]["generated_text"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "0"), "temperature is 0.0, expected more than 0"),
        (("--top-p", "2"), "top_p is 2.0, expected more than 0 and at most 1"),
        (("--max-new-tokens", "100"), "the model takes 64; shorten the prompt or lower max_new_tokens"),
    ],
)
def test_settings_out_of_range(gpt2: Path, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = jaxptm("predict", "text-generation", str(gpt2), "the cat", *arguments)
    assert status == 1 and message in err and "Traceback" not in err


def test_predict_refuses_top_k_where_there_is_none() -> None:
    for option in (("--top-k", "3"), ("-o", "top_k=3")):
        status, _, err = jaxptm("predict", "token-classification", "/nowhere", "the cat", *option)
        assert status == 1
        assert err.startswith("error: --option top_k: token-classification has no such argument, only aggregation_")


@pytest.mark.parametrize("option", [("--greedy",), ("--seed", "1"), ("--temperature", "1"), ("--max-new-tokens", "3")])
def test_options_of_generation_fill_no_masks(model: Path, option: tuple[str, ...]) -> None:
    status, _, err = jaxptm("predict", "fill-mask", str(model), "a [MASK]", *option)
    assert status == 1 and f"{option[0]} is for text-generation, not for fill-mask" in err


def test_convert_there_and_back_is_exact(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    assert jaxptm("convert", str(model), str(tmp_path / "orbax"), "--to", "orbax")[0] == 0
    assert not list((tmp_path / "orbax").glob("*.safetensors"))
    assert jaxptm("convert", str(tmp_path / "orbax"), str(tmp_path / "hf"))[0] == 0
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert set(before) <= set(after)
    for name, tensor in before.items():
        assert (tensor == after[name]).all(), name
    assert (tmp_path / "hf/tokenizer.json").exists()


def test_doctor_names_the_devices() -> None:
    status, out, _ = jaxptm("doctor")
    assert status == 0 and "jax " in out and "cpu" in out and "torch" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.yaml"), "nowhere.yaml: cannot read the config"),
        (("predict", "fill-mask", "/nowhere", "a"), "/nowhere: there is no such directory"),
        (("predict", "fly", "/nowhere", "a"), "there is no pipeline 'fly'; there is fill-mask, text-generation"),
        (("predict", "fly", "/nowhere", "a", "--greedy"), "there is no pipeline 'fly'"),
        (("convert", "/nowhere", "x"), "/nowhere: there is no such directory"),
        (("convert", "/nowhere", "x", "--to", "onnx"), "--to onnx: write hf or orbax"),
        (("convert", "/nowhere", "x", "--step", "3"), "--step is for run directories"),
        (("evaluate", "/nowhere", "nowhere.yaml"), "nowhere.yaml: cannot read the config"),
        (("prepare", "nowhere.yaml"), "nowhere.yaml: cannot read the config"),
    ],
)
def test_an_error_is_one_message_and_a_status(arguments: tuple[str, ...], message: str) -> None:
    status, _, err = jaxptm(*arguments)
    assert status == 1
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_speech_is_prepared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from recorded import damaged, tone, write_audio

    for name, seconds in {"one": 0.5, "two": 0.4, "three": 9.0}.items():
        write_audio(tmp_path / "clips" / f"{name}.flac", tone(seconds, 8_000), 8_000)
        (tmp_path / "clips" / f"{name}.txt").write_text(name)
    damaged(tmp_path / "clips")
    (tmp_path / "speech.yaml").write_text(
        f"""
model: wav2vec2-base
objective: {{name: ctc}}
data: {{train: {tmp_path}/clips, max_seconds: 2, vocabulary: characters}}
optimizer: {{learning_rate: 1e-4}}
train: {{steps: 10, batch_size: 8}}
out: {tmp_path}/runs/speech
"""
    )
    status, out, err = jaxptm("prepare", str(tmp_path / "speech.yaml"), "--workers", "1")
    assert status == 0 and "preparing 100%: 13 of 13 utterances" in err
    assert "train: 3 utterances, 0.00 hours, 10 unusable" in out and "transcripts of 12 characters" in out
    assert "data.train: 11 of 13 utterances are unusable: 3 with a header that promises another length" in caplog.text
    assert "1 longer than data.max_seconds: 2 (three)" in caplog.text
    status, _, err = jaxptm("prepare", str(tmp_path / "speech.yaml"), "data.unusable=error")
    assert status == 1 and err.count("error: ") == 1 and "remove it, or set data.unusable: skip" in err


def test_a_text_without_a_mask(model: Path) -> None:
    status, _, err = jaxptm("predict", "fill-mask", str(model), "the cat")
    assert status == 1 and "'the cat' holds no mask token" in err


def test_debug_shows_the_traceback() -> None:
    for debug in (False, True):
        command = [sys.executable, "-m", "jaxptm.cli", "train", "nowhere.yaml", *(["--debug"] if debug else [])]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == debug


def test_a_full_disk_and_a_bug_are_told_apart() -> None:
    import errno

    from jaxptm.cli import _message

    assert "the disk is full" in _message(OSError(errno.ENOSPC, "No space left on device", "runs/x"))
    assert "bug or a broken installation" in _message(ZeroDivisionError("division by zero"))
