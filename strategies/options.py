"""What a user may ask of training, as plain data. Validated by `launcher.config`, read by the worker.

The names are those of HF `TrainingArguments` wherever they mean the same. Every field is
documented in docs/configuration.md; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

Precision = Literal["fp32", "bf16", "fp16"]
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
NonNegativeFloat = Annotated[float, Ge(0)]

_STRICT = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and which part of it is trained."""

    __pydantic_config__ = _STRICT

    name_or_path: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    # Patterns: a prefix of a parameter's name by dots ("bert.encoder"), a glob ("*.bias"),
    # or "base_model" for everything below the head.
    freeze: tuple[str, ...] = ()
    # None: only where nothing would fit into memory without.
    gradient_checkpointing: bool | None = None
    attn_implementation: str | None = None
    # Sets every dropout probability of the configuration; None leaves them.
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    # Start from config.json alone, weights drawn from train.seed.
    random_weights: bool = False
    trust_remote_code: bool = False
    save_dtype: Precision = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Which samples, and how they become tokens."""

    __pydantic_config__ = _STRICT

    name_or_path: str | None = None
    config_name: str | None = None
    revision: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    # Held out of the training split when there is no evaluation split.
    eval_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    # Of texts with several labels: a column of 0 and 1 for each, instead of one with lists.
    label_columns: tuple[str, ...] | None = None
    max_length: PositiveInt | None = None
    # Of language models: whole samples side by side, or all texts joined and cut.
    packing: Literal["none", "samples", "concatenate"] = "none"
    # What is done with a sample that is longer than max_length.
    long_samples: Literal["truncate", "drop", "error"] = "truncate"
    # Of masked language models: the share of tokens that are to be guessed, and whether the tokens of
    # a word are guessed together.
    mlm_probability: Annotated[float, Gt(0), Lt(1)] = 0.15
    whole_word_masking: bool = False
    max_train_samples: PositiveInt | None = None
    max_eval_samples: PositiveInt | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The optimisation itself."""

    __pydantic_config__ = _STRICT

    num_train_epochs: Annotated[float, Gt(0)] = 3.0
    # Optimizer steps; overrides num_train_epochs.
    max_steps: PositiveInt | None = None
    global_batch_size: PositiveInt = 32
    # Upper bound of a micro-batch; None lets the plan choose.
    per_device_train_batch_size: PositiveInt | None = None
    # Compute the largest micro-batch once before training. None: on accelerators.
    prove_micro_batch: bool | None = None
    # Padded tokens of a micro-batch at most; 0: no such bound, None lets the plan choose.
    max_tokens_per_micro_batch: NonNegativeInt | None = None
    per_device_eval_batch_size: PositiveInt | None = None
    learning_rate: NonNegativeFloat = 5e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    # Steps, or a fraction of all steps when below 1.
    warmup_steps: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    # 0 switches clipping off.
    max_grad_norm: NonNegativeFloat = 1.0
    seed: NonNegativeInt = 42
    class_weights: Literal["balanced"] | tuple[Annotated[float, Gt(0)], ...] | None = None
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    eval_steps: PositiveInt | None = None
    metrics: tuple[str, ...] | None = None
    # Evaluations in a row without a better metric_for_best_model.
    early_stopping_patience: PositiveInt | None = None
    early_stopping_threshold: NonNegativeFloat = 0.0
    # fp16 only.
    initial_loss_scale: Annotated[float, Gt(0)] = 65536.0
    loss_scale_window: PositiveInt = 1000
    # Skipped optimizer steps in a row after which the run is given up.
    max_skipped_steps: PositiveInt = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """When to save, what to keep, which is best."""

    __pydantic_config__ = _STRICT

    # Optimizer steps between saves; None saves at the end of every epoch. The end always saves.
    save_steps: PositiveInt | None = None
    save_total_limit: PositiveInt = 2
    # Training waits for the copy to the host's memory only, not for the disk.
    async_save: bool = True
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "loss"
    # None: lower is better for loss and *_loss, mse, mae, rmse, perplexity; higher otherwise.
    greater_is_better: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedOptions:
    """What only the ZeRO strategies have."""

    __pydantic_config__ = _STRICT

    # Optimizer state, and with zero3 the weights, in the host's memory. None: what `config` says.
    offload: Literal["none", "cpu"] | None = None
    # A DeepSpeed configuration: a JSON file, or what stands in one.
    config: dict[str, Any] | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """A low-rank adapter instead of the whole model."""

    __pydantic_config__ = _STRICT

    # The rank of the adapter's matrices; None: no adapter, the model itself is trained.
    r: PositiveInt | None = None
    # What the adapter adds is multiplied by alpha / r, under rsLoRA by alpha / sqrt(r). None: r.
    alpha: Annotated[float, Gt(0)] | None = None
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    # Ends of modules' names by dots ("query", "attention.output.dense"), or "all-linear".
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    use_dora: bool = False
    # Trained as they are and saved with the adapter, beside the head.
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What only `ftlaunch bench` reads."""

    __pydantic_config__ = _STRICT

    # Optimizer steps before those that count.
    warmup_steps: NonNegativeInt = 5
    steps: Annotated[int, Ge(2)] = 20
    # Times that each cell is run, each with new ranks. None: 3, beside peers 5.
    repeats: PositiveInt | None = None
    # Of random samples in place of data, in tokens (`strategies.data.synthetic.read_lengths`). None: the
    # demo's own data, and lognormal:64:0.5 for a model without data.
    lengths: int | str | None = None
    # How many random samples.
    samples: PositiveInt = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Everything that a worker reads from the plan about training."""

    __pydantic_config__ = _STRICT

    task: Annotated[str, "a key of strategies.data.task_names.TASKS"] = "text-classification"
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    bench: BenchOptions = field(default_factory=BenchOptions)
