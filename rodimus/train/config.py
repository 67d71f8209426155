"""Settings of a training run: one frozen dataclass per section of the TOML file.

Field docstrings become the text of ``rodimus train CONFIG --help``. Values are checked on
construction, so that a mistake ends the run before any work starts. ``rodimus.train.load`` reads
and writes the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass

from ..errors import InputError

# torch stores timeouts as 64-bit nanoseconds
_LONGEST_S = 1e9
# a smaller eps may be 0 in float32, and AdamW would divide 0 by 0 where there is no gradient
_LEAST_EPS = 1e-37


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _at_least(section: object, name: str, low: float, *fields: str) -> None:
    for key in fields:
        value = getattr(section, key)
        _require(value >= low, f"{name}.{key} must be at least {low}, got {value}")


def _within(section: object, name: str, low: float, high: float, *fields: str) -> None:
    for key in fields:
        value = getattr(section, key)
        _require(low <= value <= high, f"{name}.{key} must lie in [{low:g}, {high:g}], got {value}")


def _finite(section: object, name: str) -> None:
    for key, value in vars(section).items():
        numbers = value if isinstance(value, tuple) else (value,)
        wrong = [x for x in numbers if isinstance(x, float) and not math.isfinite(x)]
        _require(not wrong, f"{name}.{key} must be finite, got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class ModelSection:
    """Which model is trained."""

    config: str = ""
    """Configuration of Rodimus or of a peer (JSON); in a TOML file, relative to that file.
    Empty: the configuration of `weights`."""
    weights: str = ""
    """Folder of a model or run, or a hub name, whose weights to start from.
    Empty: random weights from train.seed."""

    def __post_init__(self) -> None:
        _require(
            bool(self.config or self.weights),
            "model.config must name the configuration of a model (JSON), or model.weights a folder",
        )


@dataclass(frozen=True)
class DataSection:
    """Token shards, written by `rodimus data pack`."""

    train: tuple[str, ...] = ()
    """Manifests (NAME.json) or globs, relative to the working directory; each entry is a source."""
    val: tuple[str, ...] = ()
    """Held-out manifests; empty means no evaluation."""
    weights: tuple[float, ...] = ()
    """Share of samples drawn from each entry of `train`; empty means in proportion to tokens."""
    seq_len: int = 2048
    """Tokens in one row of a batch."""
    packing: str = "concat"
    """concat: rows cut from the joined documents; bestfit: whole documents packed into rows."""
    mask_doc_start: bool = True
    """Do not predict the first token of a document from the document before it."""
    verify: bool = True
    """Check the sha256 of every shard before the first step. Each rank checks only its share:
    if every node has its own copy, no copy is checked completely."""

    def __post_init__(self) -> None:
        _require(bool(self.train), "data.train must name at least one manifest")
        _at_least(self, "data", 1, "seq_len")
        _one_of("data.packing", self.packing, ("concat", "bestfit"))
        _require(
            self.packing == "concat" or self.mask_doc_start,
            "data.packing = bestfit needs data.mask_doc_start: neighbours in a row are strangers",
        )
        if self.weights:
            _require(
                len(self.weights) == len(self.train) and min(self.weights) > 0,
                f"data.weights needs {len(self.train)} positive numbers, got {self.weights}",
            )


@dataclass(frozen=True)
class TrainSection:
    """Length, batch and arithmetic of the run."""

    steps: int = 0
    """Optimizer steps. Give either this or `tokens`."""
    tokens: int = 0
    """Training tokens, rounded up to whole steps. Give either this or `steps`."""
    global_batch_tokens: int = 524_288
    """Tokens in one optimizer step over all ranks; must be a multiple of data.seq_len."""
    micro_batch: int = 8
    """Rows in one forward pass of one rank; gradient accumulation follows from it."""
    dtype: str = "auto"
    """bfloat16, float32, or auto: bfloat16 if the device multiplies it natively, else float32."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if there is a GPU, else cpu."""
    compile: bool = False
    """torch.compile every block."""
    ac: str = "none"
    """Activation checkpointing: none, full, or selective (keep products, recurrence, attention)."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2, which keeps logits from drifting."""

    def __post_init__(self) -> None:
        _at_least(self, "train", 0, "steps", "tokens", "seed", "z_loss")
        _require(
            (self.steps > 0) != (self.tokens > 0),
            f"exactly one of train.steps and train.tokens must be positive, "
            f"got steps={self.steps}, tokens={self.tokens}",
        )
        _at_least(self, "train", 1, "micro_batch")
        _one_of("train.dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _one_of("train.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("train.ac", self.ac, ("none", "full", "selective"))
        _require(
            self.max_grad_norm > 0,
            f"train.max_grad_norm must be positive, got {self.max_grad_norm}",
        )


def steps_of_run(
    steps: int, tokens: int, global_batch_tokens: int, done: int = 0, seen: int = 0
) -> int:
    """Optimizer steps of a run of ``steps`` steps, or if that is 0 of ``tokens`` tokens, whose
    first ``done`` steps took ``seen`` tokens in batches of any size."""
    return steps or done - (-max(0, tokens - seen) // global_batch_tokens)


@dataclass(frozen=True)
class OptimSection:
    """The optimizer; biases, norms, residual weights and the embedding are not decayed."""

    name: str = "adamw"
    """adamw, or muon (matrices inside the blocks by Muon, the rest by AdamW)."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW denominator floor."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the decayed group."""
    muon_momentum: float = 0.95
    """Momentum of the matrices when name is muon."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("adamw", "muon"))
        _require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        _at_least(self, "optim", _LEAST_EPS, "eps")
        _at_least(self, "optim", 0, "weight_decay")
        _require(
            all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)),
            f"optim.betas and optim.muon_momentum must lie in [0, 1), "
            f"got {self.betas} and {self.muon_momentum}",
        )


@dataclass(frozen=True)
class ScheduleSection:
    """Learning rate over the run, as a share of the peak."""

    kind: str = "wsd"
    """wsd (warm up, stay, decay), cosine or linear."""
    warmup_steps: int = 0
    """Steps from 0 to the peak."""
    decay_frac: float = 0.2
    """wsd: share of all steps spent in the final decay."""
    decay_shape: str = "1-sqrt"
    """wsd: shape of the final decay, 1-sqrt or linear."""
    final_lr_frac: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, ("wsd", "cosine", "linear"))
        _one_of("schedule.decay_shape", self.decay_shape, ("1-sqrt", "linear"))
        _at_least(self, "schedule", 0, "warmup_steps")
        _within(self, "schedule", 0, 1, "decay_frac", "final_lr_frac")


@dataclass(frozen=True)
class ParallelSection:
    """How the ranks share the model."""

    replicate: int = 1
    """Copies of the sharded model (HSDP): usually the number of nodes."""
    reshard_after_forward: str = "auto"
    """true: free gathered weights after a block's forward; false: keep them until backward;
    auto: true if the bf16 weights of a replica exceed a tenth of a GPU's memory."""
    context_parallel: int = 1
    """Ranks among which every row is split, for rows too long for one GPU."""
    timeout_s: float = 600.0
    """A rank that makes no progress for this long is reported by name and the run ends."""

    def __post_init__(self) -> None:
        _at_least(self, "parallel", 1, "replicate", "context_parallel")
        _within(self, "parallel", 1, _LONGEST_S, "timeout_s")
        _one_of(
            "parallel.reshard_after_forward", self.reshard_after_forward, ("auto", "true", "false")
        )


@dataclass(frozen=True)
class CheckpointSection:
    """Saving and resuming."""

    every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    keep: int = 3
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0 means none."""
    async_save: bool = True
    """Write in the background while training goes on."""
    verify: bool = True
    """Check the sha256 of every file before loading."""
    timeout_s: float = 3600.0
    """A save or a restore that takes longer than this ends the run."""
    resume: str = "auto"
    """auto: newest intact checkpoint; never: an existing run is an error; or a step.
    Applies to the first start only: a job that Slurm or torchrun restarts always resumes (auto)."""

    def __post_init__(self) -> None:
        _at_least(self, "checkpoint", 1, "every", "keep")
        _within(self, "checkpoint", 1, _LONGEST_S, "timeout_s")
        _at_least(self, "checkpoint", 0, "keep_every")
        _require(
            self.resume in ("auto", "never") or self.resume.isdecimal(),
            f"checkpoint.resume must be auto, never or a step, got {self.resume!r}",
        )


@dataclass(frozen=True)
class GuardSection:
    """What happens when loss or gradient goes wrong."""

    max_bad_steps: int = 3
    """Consecutive bad steps, or rollbacks to one checkpoint, that end the run."""
    spike_sigma: float = 8.0
    """A loss this many standard deviations above its running mean is a spike; 0 disables this."""
    on_spike: str = "skip"
    """skip: drop the update; rollback: return to the last checkpoint and skip the data since;
    stop: end the run."""

    def __post_init__(self) -> None:
        _one_of("guard.on_spike", self.on_spike, ("skip", "rollback", "stop"))
        _at_least(self, "guard", 1, "max_bad_steps")
        _at_least(self, "guard", 0, "spike_sigma")


@dataclass(frozen=True)
class EvalSection:
    """Held-out loss, reported in nats per token and bits per byte."""

    every: int = 1000
    """Steps between evaluations; the last step always has one."""
    tokens: int = 0
    """Tokens evaluated, spread evenly over the held-out set; 0 means all of it."""
    sample_prompt: str = ""
    """Prompt that the exported model continues at the end of the run; empty means no sample."""
    sample_tokens: int = 96
    """Length of that continuation."""

    def __post_init__(self) -> None:
        _at_least(self, "eval", 1, "every", "sample_tokens")
        _at_least(self, "eval", 0, "tokens")


@dataclass(frozen=True)
class LogSection:
    """What is written while training; metrics.jsonl always is."""

    every: int = 10
    """Steps between console lines."""
    tensorboard: bool = False
    """Also write tensorboard events (needs the tensorboard package)."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the wandb package)."""

    def __post_init__(self) -> None:
        _at_least(self, "log", 1, "every")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: everything that decides its result."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    out: str = "runs/train"
    """Folder of the run: configuration, metrics, checkpoints, exported model."""
    export: bool = True
    """Write a HuggingFace folder with weights and tokenizer at the end."""
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    guard: GuardSection = field(default_factory=GuardSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)

    def __post_init__(self) -> None:
        for section in fields(self):
            value = getattr(self, section.name)
            if is_dataclass(value):
                _finite(value, section.name)
        _require(bool(self.out.strip()), f"out must name a folder, got {self.out!r}")
        rows, rest = divmod(self.train.global_batch_tokens, self.data.seq_len)
        _require(
            rest == 0 and rows > 0,
            f"train.global_batch_tokens must be a multiple of data.seq_len = {self.data.seq_len}, "
            f"got {self.train.global_batch_tokens}",
        )
        pieces = self.parallel.context_parallel
        _require(
            self.data.seq_len % pieces == 0,
            f"data.seq_len = {self.data.seq_len} must be a multiple of "
            f"parallel.context_parallel = {pieces}",
        )

    @property
    def rows(self) -> int:
        """Rows of one global batch."""
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, if the batch size never changed."""
        train = self.train
        return steps_of_run(train.steps, train.tokens, train.global_batch_tokens)

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step on each of ``world_size`` ranks.

        Raises:
            InputError: the rows of a batch do not divide evenly over ranks and micro-batches, or
                the ranks do not divide by ``parallel.context_parallel``.
        """
        pieces = self.parallel.context_parallel
        _require(
            world_size % pieces == 0,
            f"parallel.context_parallel = {pieces} does not divide {world_size} ranks",
        )
        step_rows = world_size // pieces * self.train.micro_batch
        _require(
            self.rows % step_rows == 0,
            f"{self.rows} rows a step (train.global_batch_tokens / data.seq_len) do not divide by "
            f"{world_size} ranks x train.micro_batch {self.train.micro_batch}"
            f"{f' / parallel.context_parallel {pieces}' if pieces > 1 else ''} = {step_rows} rows",
        )
        return self.rows // step_rows
