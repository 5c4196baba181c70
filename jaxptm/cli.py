"""The command line: what people type. Each command imports what it needs when it runs."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import typer

from jaxptm.allocation import keep_freed_memory
from jaxptm.errors import JaxptmError

app = typer.Typer(
    help="Pre-trained encoders in JAX. Add --debug to any command to see tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Command = TypeVar("Command", bound=Callable[..., Any])
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/pretrain/bert_mini.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.KEY=VALUE]...", help="Values instead of the file's.")
]


COMPUTING = {"train", "glue", "bench", "evaluate", "predict"}
"""Commands that run a model over and over."""


def main() -> None:
    """The entry point `jaxptm`."""
    if COMPUTING & set(sys.argv[1:2]):
        keep_freed_memory()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxptm").setLevel(logging.INFO)
    sys.excepthook = _excepthook
    app([argument for argument in sys.argv[1:] if argument != "--debug"])


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # When a checkpoint cannot be written, tensorstore still calls the event loop that Orbax has closed, once a file.
    if str(error) != "Event loop is closed" or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)


def _reported(command: Command) -> Command:
    """An error becomes one message and exit status 1; with --debug its traceback is shown."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            _leave_peers()
            raise typer.Exit(130) from None
        except Exception as error:
            if "--debug" in sys.argv:
                raise
            print(f"error: {_message(error)}", file=sys.stderr)
            _leave_peers()
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def _leave_peers() -> None:
    """Ends a process of several at once: at a usual exit JAX would wait for the others, who may wait for this one."""
    distributed = sys.modules.get("jax.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stderr.flush()
        os._exit(1)


def _message(error: Exception) -> str:
    if isinstance(error, JaxptmError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the run directory"
        return f"{place}: the disk is full; free some space and run the same command again."
    return f"{type(error).__name__}: {error} (this is a bug or a broken installation; --debug shows where)"


@app.command()
@_reported
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of several processes: where process 0 listens.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Of several processes: how many there are.")] = None,
    process: Annotated[int | None, typer.Option(help="Of several processes: which one this is, from 0.")] = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for the other processes at the start; later, up to 100, for a sign of life."
        ),
    ] = 300,
) -> None:
    """Pre-train or fine-tune as CONFIG says. Resumes by itself when the run directory holds a checkpoint.

    On several hosts, start the same command on each. On Cloud TPU, under srun and under mpirun the processes find each
    other; elsewhere tell them by --coordinator, --processes and --process.
    """
    from jaxptm.config import load_config
    from jaxptm.hosts import find_peers, join

    loaded = load_config(config, overrides or ())
    peers = find_peers(coordinator, processes, process)
    if peers is not None:
        if peers.index > 0:  # what all would say is said by process 0
            logging.getLogger("jaxptm").setLevel(logging.WARNING)
        logging.getLogger("jaxptm").info("waiting for %d processes at %s", peers.count, peers.coordinator)
        join(peers, timeout)

    from jaxptm.training import train

    results = train(loaded)
    if "train" in results:
        _print_values(results["train"] | {f"eval {name}": value for name, value in results["eval"].items()})


@app.command()
@_reported
def evaluate(
    run_or_model: Annotated[str, typer.Argument(help="A run directory, a model directory or a hub name.")],
    config: ConfigFile,
    overrides: Overrides = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of GLUE and SQuAD: write what their official scorers read.")
    ] = None,
) -> None:
    """Measure a model on the held-out data of CONFIG."""
    from jaxptm.config import load_config
    from jaxptm.evaluation import evaluate

    _print_values(evaluate(run_or_model, load_config(config, overrides or ()), predictions))
    if predictions is not None:
        print(f"written: {predictions}", file=sys.stderr)


@app.command()
@_reported
def glue(
    config: ConfigFile,
    overrides: Overrides = None,
    tasks: Annotated[
        str, typer.Option(metavar="TASK,TASK", help="Default: all nine.")
    ] = "cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli",
    seeds: Annotated[int, typer.Option(help="Runs a task, from train.seed upwards.")] = 5,
) -> None:
    """Fine-tune on tasks of GLUE with several seeds, and write one table. Finished runs are not repeated."""
    from jaxptm.config import load_config
    from jaxptm.glue import markdown, run_glue

    loaded = load_config(config, overrides or ())
    print(markdown(run_glue(loaded, [task.strip() for task in tasks.split(",")], seeds)), end="")


@app.command()
@_reported
def predict(
    task: Annotated[str, typer.Argument(help="fill-mask, text-classification, question-answering, ...")],
    model: Annotated[str, typer.Argument(help="A model directory, a hub name, or a run directory.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT|FILE]...",
            help="Texts, or files of them: .txt and others (one a line), .jsonl, .json (an array), .csv, .tsv, "
            ".parquet. Default: lines of standard input. A line may be a JSON object such as "
            '{"question": ..., "context": ...}; two texts may also be parted by a tab.',
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="Columns of a table or keys of JSON that hold the texts.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="How many answers; of generation, tokens to draw from.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any argument of the pipeline in Python, such as aggregation_strategy=simple.",
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of a generated text; default 256.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Generate the likeliest token each time.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of generated text; default 0.7.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Generate from the best tokens that hold this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of generated text; default 0.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object an input: where it stands, what it is, the output.")
    ] = False,
) -> None:
    """Ask a model. An input that cannot be answered is reported with its number, and the others are answered."""
    from jaxptm.pipelines import PIPELINES
    from jaxptm.pipelines.asking import ask, parse_options, read_inputs

    generation: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "greedy": greedy or None,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    settings = {name: value for name, value in generation.items() if value is not None}
    if settings and task in PIPELINES and task != "text-generation":
        raise JaxptmError(f"--{next(iter(settings)).replace('_', '-')} is for text-generation, not for {task}.")
    if settings.pop("greedy", False):
        settings["do_sample"] = False
    settings |= parse_options(task, [*([] if top_k is None else [f"top_k={top_k}"]), *(options or [])])
    failed = 0
    for (where, given), output, lines in ask(task, model, read_inputs(task, inputs or [], columns), settings):
        if isinstance(output, JaxptmError):
            failed += 1
            print(f"error: {where}: {output}", file=sys.stderr)
        elif as_json:
            print(json.dumps({"where": where, "input": given, "output": output}, ensure_ascii=False), flush=True)
        else:
            print(*lines, sep="\n", flush=True)
    if failed:
        print(f"{failed} input(s) could not be answered", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@_reported
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="How many steps of the run to measure.")] = 20,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Time the parts of the model, and write a trace for TensorBoard's profiler and ui.perfetto.dev.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one JSON object.")] = False,
) -> None:
    """Measure the speed and the memory of CONFIG on its own data: where the time of a step goes, utilisation."""
    from jaxptm.benchmark import benchmark, summary
    from jaxptm.config import load_config

    figures = benchmark(load_config(config, overrides or ()), steps, profile)
    print(json.dumps(figures) if as_json else summary(figures))
    if profile is not None:
        print(f"written: {profile}", file=sys.stderr)


@app.command()
@_reported
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    host: Annotated[int, typer.Option(help="Which of the hosts this is, from 0.")] = 0,
    hosts: Annotated[int, typer.Option(help="How many hosts share the work; each takes every n-th file.")] = 1,
    workers: Annotated[int | None, typer.Option(help="Parallel workers; default one a core.")] = None,
) -> None:
    """Turn the text of CONFIG into token shards, or decode its audio. An interrupted run goes on where it stopped."""
    from jaxptm.config import AudioData, TextData, load_config
    from jaxptm.data.corpus import Manifest
    from jaxptm.data.prepare import prepare
    from jaxptm.data.prepare_audio import prepare_audio
    from jaxptm.data.recordings import AudioManifest
    from jaxptm.data.speech import open_speech
    from jaxptm.directories import prepared_directory
    from jaxptm.metrics import progress_lines

    loaded = load_config(config, overrides or ())
    directory = prepared_directory(loaded)
    data, objective = loaded.data, loaded.objective.name
    report = progress_lines(lambda line: print(line, file=sys.stderr))
    manifest: Manifest | AudioManifest | None
    if isinstance(data, AudioData):
        manifest = prepare_audio(data, directory, host, hosts, workers, report)
    else:
        assert isinstance(data, TextData)
        manifest = prepare(data, directory, host, hosts, workers, report)
    if manifest is None:
        print(f"{directory}: the shares of other hosts are still missing")
        return
    for split in manifest.splits:
        print(f"{directory}: {split}: {manifest.summary(split)}")
    if isinstance(data, AudioData):  # says what will not serve before anyone waits for a training run
        speech = open_speech(
            data, directory, crop=objective == "contrastive", labelled=objective == "sequence-classification"
        )
        if speech.vocabulary is not None:
            print(f"{directory}: transcripts of {len(speech.vocabulary)} characters")


@app.command()
@_reported
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A model directory, a hub name, a run, or an original checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    to: Annotated[
        str, typer.Option(help="hf: config.json and safetensors; orbax: parameters as an Orbax checkpoint.")
    ] = "hf",
    step: Annotated[int | None, typer.Option(help="Of a run: which checkpoint; default the newest.")] = None,
    part: Annotated[str, typer.Option(help="Of an ELECTRA's run: model or generator.")] = "model",
    check: Annotated[bool, typer.Option("--check", help="Run it beside transformers first; needs torch.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write every tensor's shape, type and checksum there.")] = None,
) -> None:
    """Convert weights between Hugging Face directories, Orbax and the checkpoints of a run; read those of others.

    The others are Google's BERT and ELECTRA (TensorFlow), as `model.ckpt` or the directory of one, and fairseq's
    wav2vec 2.0 (a .pt file).
    """
    from jaxptm.conversion import TOLERANCE, convert

    model, differences = convert(source, target, to, step=step, part=part, checked=check, report=report)
    for name, difference in (differences or {}).items():
        print(f"{name}: {difference:.1e} of the largest value from transformers' (at most {TOLERANCE:.0e})")
    print(f"{target}: {model.family.architectures[model.task]}, {to}")
    if report is not None:
        print(f"{report}: the report")


@app.command()
@_reported
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories or their URLs.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Compare runs on one page: figures, curves, settings that differ, speed."""
    from jaxptm.report import report

    print(f"{report(runs, out)}: {len(runs)} run(s)")


@app.command()
@_reported
def doctor() -> None:
    """Show devices, versions and caches, and what is missing."""
    import platform
    from importlib import metadata

    from jaxptm.metrics import versions

    print(f"platform {platform.platform()}")
    for name, version in versions().items():
        print(f"{name} {version}")
    for name, need in (
        ("torch", "only to read pytorch_model.bin and fairseq's checkpoints, and for convert --check"),
        ("libtpu", "only on TPU"),
    ):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed ({need})")
    import jax
    from huggingface_hub import constants

    print(f"devices: {', '.join(f'{device.device_kind} ({device.platform})' for device in jax.devices())}")
    print(f"process {jax.process_index()} of {jax.process_count()}")
    print(f"Hugging Face cache: {constants.HF_HUB_CACHE}")
    print(
        f"compilation cache: {jax.config.values['jax_compilation_cache_dir'] or 'off (set JAX_COMPILATION_CACHE_DIR)'}"
    )


def _print_values(values: dict[str, float]) -> None:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:{width}}  {value:.6g}")


if __name__ == "__main__":
    main()
