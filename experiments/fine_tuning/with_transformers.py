"""The run of a fine-tuning config in transformers + torch: same weights, examples, rates and figures, its own Trainer.

    python experiments/fine_tuning/with_transformers.py CONFIG [key.key=value ...]

Writes `results.json` in `out`, with the keys that `jaxptm glue` makes its table of. Needs torch and accelerate.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jaxptm.config import SquadData, load_config
from jaxptm.data.examples import Examples
from jaxptm.metrics import write_results
from jaxptm.resolving import count_labels, hf_labels, resolve, task_tokenizer
from jaxptm.tasks import open_task

DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


class Rows(torch.utils.data.Dataset):
    """Examples as the data collator of transformers takes them."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.lengths = examples, examples.lengths.tolist()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.examples.batch([index], self.lengths[index], 0)
        return {name: values[0].tolist() for name, values in batch.items()}


def main() -> None:
    config = resolve(load_config(sys.argv[1], sys.argv[2:]))
    loop, adam = config.train, config.optimizer
    tokenizer = task_tokenizer(config)
    task = open_task(config, tokenizer, training=True)
    transformers.set_seed(loop.seed)
    questions = isinstance(config.data, SquadData)
    kind = transformers.AutoModelForQuestionAnswering if questions else transformers.AutoModelForSequenceClassification
    labels = (
        {} if questions else {"num_labels": count_labels(config), "problem_type": hf_labels(config)["problem_type"]}
    )
    model = kind.from_pretrained(config.init_from, **labels)
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(config.out) / "trainer"),
        num_train_epochs=loop.epochs,
        per_device_train_batch_size=loop.batch_size,
        per_device_eval_batch_size=loop.batch_size,
        learning_rate=adam.learning_rate,
        lr_scheduler_type=adam.schedule,
        warmup_steps=adam.warmup,
        weight_decay=adam.weight_decay,
        max_grad_norm=adam.clip,
        adam_beta1=adam.beta1,
        adam_beta2=adam.beta2,
        adam_epsilon=adam.epsilon,
        seed=loop.seed,
        # By length, as here; the default ("random") pads most rows to the length of a much longer one.
        train_sampling_strategy=os.environ.get("SAMPLING", "group_by_length"),
        logging_steps=loop.log_every,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        label_names=["start_positions", "end_positions"] if questions else ["labels"],
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    begin = time.perf_counter()
    trainer = transformers.Trainer(model, arguments, collator, Rows(task.train))
    trainer.train()
    trained = time.perf_counter()
    trainer.args.train_sampling_strategy = "random"  # or predictions would come in the order of their lengths
    figures: dict[str, float] = {}
    for name, part in task.held_out.items():
        if part.score is None:
            continue
        said = trainer.predict(Rows(part.examples)).predictions
        outputs = dict(zip(("start_logits", "end_logits"), said, strict=True)) if questions else {"logits": said}
        values = part.score({name: list(np.asarray(rows, np.float32)) for name, rows in outputs.items()})
        figures |= {f"{name}/{figure}" if name else figure: value for figure, value in values.items()}
    seconds = time.perf_counter() - begin
    packages = ("transformers", "torch", "accelerate", "tokenizers", "numpy")
    results = {
        "finished": True,
        "eval": figures,
        "seconds": seconds,
        "training_seconds": trained - begin,
        "device": DEVICE,
        "versions": {name: metadata.version(name) for name in packages},
        "config": config.model_dump(mode="json"),
    }
    print(figures, f"{seconds:.1f} s")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_results(config.out, results)


if __name__ == "__main__":
    main()
