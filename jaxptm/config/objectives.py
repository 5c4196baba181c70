"""What is learned."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxptm.config.base import Config, Positive, Share


class MaskedLmConfig(Config):
    """`masked-lm`; or `pretraining`, with next sentences (BERT section 3.1) or the order of sentences (ALBERT 3.1)."""

    name: Literal["masked-lm", "pretraining"]
    masking: Literal["tokens", "words", "spans"] = "tokens"
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    max_predictions: Positive | None = None
    """Static number of prediction slots a row; default `ceil(mask_probability * sequence_length)`."""
    dupe_factor: Positive | None = None
    """Masks that there are of a row in all, one of which is drawn at each visit, as where BERT's rows were written with
    10 each before training; default new ones at each visit (RoBERTa section 4.1). Not for pairs, which each epoch cuts
    anew."""

    def slots(self, sequence_length: int) -> int:
        """Prediction slots of a row of `sequence_length` tokens."""
        return self.max_predictions or math.ceil(self.mask_probability * sequence_length)


class GeneratorConfig(Config):
    """What objectives have in which a generator, a small masked LM trained beside the model, fills in masked tokens."""

    name: str
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    max_predictions: Positive | None = None
    """Static number of tokens a row to replace; default `int((mask_probability + 0.005) * sequence_length)`."""
    generator_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the generator's masked-LM loss in the sum."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the generator's distribution that replacements are drawn from."""

    def slots(self, sequence_length: int) -> int:
        """Prediction slots of a row of `sequence_length` tokens (google-research/electra, configure_pretraining.py)."""
        return self.max_predictions or max(1, int((self.mask_probability + 0.005) * sequence_length))


class ReplacedTokenConfig(GeneratorConfig):
    """`replaced-token`: a discriminator finds the tokens that a generator, trained beside it, has put in (ELECTRA)."""

    name: Literal["replaced-token"]
    discriminator_weight: Annotated[float, Field(ge=0)] = 50.0


class AllTokensMlmConfig(GeneratorConfig):
    """`all-tokens-mlm`: say of every token what it was before a generator filled in some, by copying it or from the
    vocabulary (All-Tokens MLM, Clark et al. 2020, section 3.4).
    """

    name: Literal["all-tokens-mlm"]
    model_weight: Annotated[float, Field(ge=0)] | None = None
    """Of the model's loss in the sum, a mean over all tokens, most of which are to be copied; default
    1 / mask_probability: a masked one then counts as much as in masked LM. The paper does not tell its own."""


class CausalLmConfig(Config):
    """`causal-lm`: predict each token from those before it (GPT-2)."""

    name: Literal["causal-lm"]

    def slots(self, sequence_length: int) -> int:
        """Tokens of a row that the head runs on."""
        return sequence_length


ClassWeights = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] | Literal["balanced"]


class FineTuningConfig(Config):
    """What all objectives over labelled data have."""

    name: str
    new_head: bool = False
    """Begin with a fresh head, whatever the weights that are loaded have; for a head of other labels."""

    def slots(self, sequence_length: int) -> int:
        """Tokens of a row that a language-model head runs on: there is none."""
        return 0


class SequenceClassificationConfig(FineTuningConfig):
    """`sequence-classification`: a label, several, or a number for each text or pair of texts."""

    name: Literal["sequence-classification"]
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """As in transformers; default what the GLUE task is, or else one label."""
    class_weights: ClassWeights | None = None
    """Weight of the examples of each label in the loss (several labels: of those that have it); `balanced`: inversely
    to how often each occurs, as in scikit-learn."""

    @model_validator(mode="after")
    def _check(self) -> SequenceClassificationConfig:
        if self.class_weights is not None and self.problem_type == "regression":
            raise ValueError("`class_weights` needs labels, and `problem_type: regression` has none")
        return self


class TokenClassificationConfig(FineTuningConfig):
    """`token-classification`: a label for each word."""

    name: Literal["token-classification"]
    class_weights: ClassWeights | None = None
    """Weight of the words of each label in the loss; `balanced` as in scikit-learn."""


class MultipleChoiceConfig(FineTuningConfig):
    """`multiple-choice`: which of several endings belongs to a text."""

    name: Literal["multiple-choice"]


class QuestionAnsweringConfig(FineTuningConfig):
    """`question-answering`: which stretch of a context answers a question, if any."""

    name: Literal["question-answering"]


class ContrastiveConfig(Config):
    """`contrastive`: find the quantised form of each masked frame among others (wav2vec 2.0).

    The defaults are those of the base model (Baevski et al. 2020, section 4.2; fairseq,
    wav2vec2_base_librispeech.yaml). The large one has `last_temperature: 0.1`, `feature_weight: 0` and
    `feature_gradient: 1`.
    """

    name: Literal["contrastive"]
    mask_probability: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Frames in spans over all frames, overlaps counted twice; about half of the frames are masked. The paper's p is a
    tenth of it."""
    mask_length: Positive = 10
    """Frames of a span."""
    negatives: Positive = 100
    """Other masked frames of the same row that each one is found among."""
    logit_temperature: Annotated[float, Field(gt=0)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Of the quantiser's softmax, at the start."""
    last_temperature: Annotated[float, Field(gt=0)] = 0.5
    temperature_decay: Annotated[float, Field(gt=0, le=1)] = 0.999995
    """What multiplies it at every step, down to `last_temperature`."""
    diversity_weight: Annotated[float, Field(ge=0)] = 0.1
    feature_weight: Annotated[float, Field(ge=0)] = 10.0
    """Of the mean square of the convolutions' features."""
    feature_gradient: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Multiplies the gradient of the convolutions."""

    def slots(self, sequence_length: int) -> int:
        """Tokens of a row that a language-model head runs on: there is none."""
        return 0


class CtcConfig(FineTuningConfig):
    """`ctc`: a transcript, by connectionist temporal classification.

    The masks are those of wav2vec 2.0 with ten hours of labels (fairseq, base_10h.yaml); 0 switches them off.
    """

    name: Literal["ctc"]
    mask_probability: Share = 0.65
    """Frames in spans over all frames, in training."""
    mask_length: Positive = 10
    channel_mask_probability: Share = 0.5
    """Channels in spans over all channels, in training."""
    channel_mask_length: Positive = 64


ObjectiveConfig = Annotated[
    MaskedLmConfig
    | ReplacedTokenConfig
    | AllTokensMlmConfig
    | CausalLmConfig
    | SequenceClassificationConfig
    | TokenClassificationConfig
    | MultipleChoiceConfig
    | QuestionAnsweringConfig
    | ContrastiveConfig
    | CtcConfig,
    Field(discriminator="name"),
]
"""What the model learns, by `name`."""
