"""The recipe: what a user writes, as frozen pydantic models.

Loads without torch, transformers, peft or datasets. Every block refuses unknown keys. Short forms:
``model: ID``, ``method: NAME``, ``data: PATH``, and a name for each of ``evaluation.metrics``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ftune.methods import AnyMethod, OptimizerSpec

__all__ = [
    "SHORT_FORMS",
    "CheckpointSpec",
    "ColumnMap",
    "DataSource",
    "DataSpec",
    "EvaluationSpec",
    "MetricSpec",
    "ModelSpec",
    "Recipe",
    "ScheduleSpec",
    "TrainingSpec",
]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _short(key: str, block: Any) -> BeforeValidator:
    """Accept a bare string where a block is expected: the value of its main key."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | block
    )


def _empty(block: type[BaseModel]) -> BeforeValidator:
    """Accept a block whose fields are all commented out (YAML's null) as the block of defaults."""
    return BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=block | None)


SHORT_FORMS: dict[tuple[str, ...], str] = {
    ("model",): "id",
    ("method",): "name",
    ("data",): "train",
    ("data", "train"): "path",
    ("data", "eval"): "path",
    ("evaluation", "metrics", "*"): "name",
}
"""Where a bare string stands for a block, and for which of its fields; ``*`` is any list index."""


class ModelSpec(_Block):
    """The base model: where it is, and how it is loaded."""

    id: str = Field(
        min_length=1,
        description="Hub id, local directory, local .gguf file, or package://NAME/FILE.gguf (a file inside "
        "an installed package).",
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    gguf_file: str | None = Field(None, description="Name of a .gguf file inside the hub repository or directory.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="What the model computes in. auto: bfloat16 where the device is fast in it, else float32.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Implementation of attention. auto: sdpa where the architecture has it, else eager."
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model. Off unless you must.")


SourceFormat = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text"]


class ColumnMap(_Block):
    """Which column is what: a column's name, or a text with {column} in it."""

    messages: str | None = Field(None, description="A conversation: a list of turns.")
    prompt: str | None = Field(None, description="What comes before the answer; no chat template is put around it.")
    completion: str | None = Field(None, description="The answer to `prompt`.")
    instruction: str | None = Field(None, description="What the user says, in the chat template if there is one.")
    input: str | None = Field(None, description="What belongs to `instruction`, below it.")
    output: str | None = Field(None, description="The answer to `instruction`.")
    history: str | None = Field(None, description="Turns before `instruction`: a list of [instruction, output].")
    text: str | None = Field(None, description="A document, all of it trained on.")
    system: str | None = Field(None, description="The system message of a conversation.")
    tools: str | None = Field(None, description="The tools of a conversation: a list of JSON schemas.")

    def given(self) -> dict[str, str]:
        """The fields that are given."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class DataSource(_Block):
    """One set of rows: a file, a directory of files, or a hub data set."""

    path: str = Field(
        min_length=1,
        description="A .jsonl, .json, .csv, .tsv, .parquet or .txt file (or a directory of them, without what is named "
        "for another split), or a hub data set's name.",
    )
    format: SourceFormat = Field(
        "auto", description="How a row is read. auto: detected from the columns, all of which must have a use."
    )
    columns: ColumnMap | None = Field(
        None,
        description="What the file's columns are: {prompt: question, completion: answer}, or texts with columns in "
        'them: {prompt: "Ticket: {body} Team:", completion: "{team}"}. data.eval takes those of data.train.',
    )
    split_on: str | None = Field(
        None,
        description="Where a .txt file is cut into documents: line, blank_line, or the text of a separator. Default: "
        "a file is one document.",
    )
    subset: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    revision: str | None = Field(None, description="Hub branch, tag or commit of a data set.")
    max_examples: int | None = Field(None, ge=1, description="Take the first N rows.")


class DataSpec(_Block):
    """What is trained on, what is held out, and how rows become tokens."""

    train: Annotated[DataSource, _short("path", DataSource)] = Field(description="Training rows.")
    eval: Annotated[DataSource, _short("path", DataSource)] | None = Field(None, description="Held-out rows.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Hold out this share of the training rows when there is no eval source."
    )
    max_length: int = Field(1024, ge=8, description="Longest sequence, in tokens.")
    too_long: Literal["auto", "truncate", "skip", "error", "split"] = Field(
        "auto",
        description="What happens to an example longer than max_length; always counted. split: a whole text becomes "
        "several, and every token is learned once. auto: split for the format text, else truncate.",
    )
    packing: bool | Literal["auto"] = Field(
        "auto",
        description="Several documents in a row, isolated from each other. auto: wherever the method can.",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="Tokens in the loss: assistant turns (or completions) only, of them the last of each row only, or "
        "all tokens.",
    )
    chat_template: str | None = Field(None, description="A Jinja chat template file that replaces the tokenizer's own.")


class ScheduleSpec(_Block):
    """The learning rate as a pure function of the step."""

    name: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of all steps spent warming up.")
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up in steps; replaces warmup_ratio.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Where the decay ends, as a share of the peak.")


class TrainingSpec(_Block):
    """How long, in what portions, from which seed."""

    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the data. Default: as many as make 100 updates, 1 to 10; or as max_steps needs.",
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer updates.")
    micro_batch_size: int = Field(1, ge=1, description="Rows in one forward pass on one device.")
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        description="Micro-batches in one optimizer update. Default: as many as make an update of a hundredth of the "
        "rows, 1 to 32.",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one forward pass where rows need no padding: an update's rows are regrouped, which "
        "changes no gradient. Default: as many as micro_batch_size of the longest rows have.",
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm; null: never.")
    stop_at_grad_norm: float | None = Field(
        None, gt=0, description="Stop, with a checkpoint, where the gradient norm before clipping is over this."
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Recompute blocks in the backward pass instead of keeping their activations. true: all; a number: "
        "the first so many; auto: none where the run fits, else the fewest that make it fit.",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="Replay blocks from CUDA graphs, one process, where the method can. auto: only where the GPU waits "
        "for Python; true: always.",
    )
    memory_gib: float | None = Field(
        None, gt=0, le=1e6, description="Memory that the run may take, in GiB. Default: what the device has free."
    )
    seed: int = Field(7, ge=0, lt=2**31, description="Order of the data, initial adapter, dropout.")

    @property
    def accumulation(self) -> int:
        """Micro-batches in an update, of a plan's recipe, where they are settled (``ftune.plan.defaults``)."""
        assert self.gradient_accumulation_steps is not None
        return self.gradient_accumulation_steps


class CheckpointSpec(_Block):
    """When the run is saved so that it can be resumed."""

    every_steps: int | None = Field(None, ge=1, description="Save after every N updates. Default: at the end only.")
    keep: int = Field(2, ge=1, description="How many checkpoints stay on disk.")


class MetricSpec(_Block):
    """A metric of greedily generated answers against the reference answer."""

    name: str = Field(
        min_length=1,
        description="exact_match, contains, strict, f1, rouge_l, json, choice, regex; accuracy or macro_f1 for few "
        "classes; or a name that an installed package registers under the entry point group ftune.metrics.",
    )
    pattern: str | None = Field(None, description="regex: its first group (or whole match) must equal the reference's.")
    reasoning: bool = Field(False, description="Compare the reasoning before an answer too, not the answer alone.")


class EvaluationSpec(_Block):
    """When the held-out loss is measured, and what is measured after training."""

    every_steps: int | None = Field(None, ge=1, description="Held-out loss after every N updates. Default: at the end.")
    batch_size: int = Field(8, ge=1, description="Sequences in one evaluation forward pass or generation.")
    metrics: tuple[Annotated[MetricSpec, _short("name", MetricSpec)], ...] = Field(
        (), description="Task metrics of `ftune eval`, from greedy generation."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer, in tokens.")
    max_examples: int | None = Field(None, ge=1, description="Generate for the first N held-out rows only.")


Tracker = Literal["progress", "jsonl", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml"]


class Recipe(_Block):
    """One fine-tuning run."""

    version: Literal[1] = Field(1, description="Version of the recipe format.")
    model: Annotated[ModelSpec, _short("id", ModelSpec)]
    method: Annotated[AnyMethod, _short("name", AnyMethod)]
    data: Annotated[DataSpec, _short("train", DataSpec)]
    optimizer: Annotated[OptimizerSpec, _empty(OptimizerSpec)] = OptimizerSpec()
    schedule: Annotated[ScheduleSpec, _empty(ScheduleSpec)] = ScheduleSpec()
    training: Annotated[TrainingSpec, _empty(TrainingSpec)] = TrainingSpec()
    checkpoint: Annotated[CheckpointSpec, _empty(CheckpointSpec)] = CheckpointSpec()
    evaluation: Annotated[EvaluationSpec, _empty(EvaluationSpec)] = EvaluationSpec()
    tracking: tuple[Tracker, ...] = Field(("progress", "jsonl"), description="Where numbers go while training.")
    output_dir: str = Field(min_length=1, description="The run's directory; made when missing.")

    @property
    def packing(self) -> bool:
        """Whether documents share rows: as asked, or wherever the method can."""
        return self.method.packable if self.data.packing == "auto" else self.data.packing

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: as asked, or the method's own; a plan's recipe has that of its number of updates."""
        return self.optimizer.learning_rate or self.method.default_learning_rate
