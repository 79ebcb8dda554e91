"""What a recipe can say: frozen dataclasses, one per table, each refusing what cannot run.

`config.py` reads them from TOML and resolves their units. After that every unit is an integer, and `Recipe.model`
holds all fields of one architecture. Ranges are checked here, in `__post_init__`, by a sentence that begins with the
field's name; the reader puts file and table in front of it.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf, isqrt
from typing import Any, Literal

from openxlstm.data.order import Ramp
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.train.schedules import Kind, Schedule, Shape

ARCHITECTURES: dict[str, tuple[Any, Any]] = {  # name: (config, model)
    "xlstm": (xLSTMConfig, xLSTM),
    "xlstm_large": (xLSTMLargeConfig, xLSTMLarge),
}
COMPARED = {  # architectures to compare with: (module, config, model); what is in hf/ needs transformers
    "lstm": ("openxlstm.tasks.baselines", "LSTMConfig", "LSTM"),
    "lstm_block": ("openxlstm.tasks.baselines", "LSTMBlockConfig", "LSTM"),
    "llama": ("openxlstm.hf.baselines", "LlamaConfig", "Llama"),
    "mamba2": ("openxlstm.hf.recurrent_baselines", "Mamba2Config", "Mamba2"),
    "rwkv4": ("openxlstm.hf.recurrent_baselines", "RWKV4Config", "RWKV4"),
}
MOST = 2**31 - 1  # of anything that is counted in rows or tokens of one batch: what index arithmetic is safe for


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecipe:
    """One source of text, and its share: with weights 3 and 1, three of four rows come from the first."""

    path: str  # "stdlib", a folder of texts, a token folder, or a prepared folder with train, valid and test
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < inf:
            raise ValueError(f"weight={self.weight} must be at least 0 and finite; 0 waits for a phase that wants it")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecipe:
    """Other shares of the sources from one step on."""

    from_step: int
    weights: tuple[float, ...]  # one per source, in the order of data.sources; 0 leaves a source out

    def __post_init__(self) -> None:
        _within("from_step", self.from_step, 1)
        if not all(0 <= weight < inf for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights={list(self.weights)} must be at least 0, finite, and not all 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """What is read: documents, the tokenizer, and how many tokens one row holds."""

    corpus: str | None = None  # one source: this; without it and without `sources`, "stdlib"
    sources: tuple[SourceRecipe, ...] | None = None  # several
    tokenizer: str = "bytes"  # or a tokenizer.json
    context: int = 256
    window: Literal["stream", "packed", "docs", "lanes"] = "stream"  # how documents become rows: data/windows.py
    phase: tuple[PhaseRecipe, ...] = ()
    valid: Mapping[str, str] = field(default_factory=dict)  # further validation sets: name = path
    skip: tuple[tuple[int, int], ...] = ()  # ranges [a, b) of samples that are never read

    def __post_init__(self) -> None:
        _within("context", self.context, 1, MOST)
        if self.sources is not None and not self.sources:
            raise ValueError('sources=[] must name at least one source, as in [{ path = "stdlib" }]')
        if not any(source.weight for source in self.mixture):
            raise ValueError(
                f"sources={[source.path for source in self.mixture]} all have weight 0; give one of them 1"
            )
        for phase in self.phase:
            if len(phase.weights) != len(self.mixture):
                has, wants = len(phase.weights), len(self.mixture)
                raise ValueError(f"phase={list(phase.weights)} has {has} weights, and there are {wants} sources")
        _rising("phase", [phase.from_step for phase in self.phase])
        for begin, end in self.skip:
            if not 0 <= begin < end:
                raise ValueError(f"skip=[{begin}, {end}] must be a range of samples, from 0 on: [first, one past last]")

    @property
    def mixture(self) -> tuple[SourceRecipe, ...]:
        """Every source, however the recipe said it."""
        return self.sources or (SourceRecipe(path=self.corpus or "stdlib"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """How long, in which portions, with which arithmetic, on how many processes."""

    batch: int | tuple[tuple[int, int], ...]  # rows per optimiser step, of all processes; or [[from_step, batch], ...]
    steps: int | None = None  # this,
    tokens: int | str | None = None  # or this: 2_000_000, "2B", or "20x" the parameters
    micro_batch: int | None = None  # rows per forward pass and process; None: all of a process's rows at once
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "fp32"  # fp64 shows whether a difference is only rounding
    parallel: Literal["auto", "single", "ddp", "fsdp2"] = "auto"  # auto: ddp if there are several processes
    shard: int | None = None  # of fsdp2: ranks that share one copy of the parameters (HSDP); None: all of them
    compile: bool = False  # each block by itself
    checkpoint_every: int = 0  # recompute every n-th block in the backward pass instead of keeping it; 0 keeps all
    max_minutes: float | None = None  # of training; the run then cools down early (see budget.py)
    stop_after: float | None = None  # minutes of this sitting, after which it saves and can be continued

    def __post_init__(self) -> None:
        _within("checkpoint_every", self.checkpoint_every, 0)
        _within("seed", self.seed, 0, 2**63 - 1)
        if self.steps is not None:
            _within("steps", self.steps, 1)
        if self.shard is not None:
            _within("shard", self.shard, 1)
        if not self.ramp or self.ramp[0][0] != 0:
            raise ValueError(f"batch={_lists(self.ramp)} must begin at step 0, as in [[0, 128], [2000, 256]]")
        _rising("batch", [step for step, _ in self.ramp])
        for _, batch in self.ramp:
            _within("batch", batch, 1, MOST)
            _divides("micro_batch", batch if self.micro_batch is None else self.micro_batch, batch)
        for name, value in (("max_minutes", self.max_minutes), ("stop_after", self.stop_after)):
            if value is not None and not 0 < value < inf:
                raise ValueError(f"{name}={value} must be above 0 and finite; leave it out for no limit")

    @property
    def ramp(self) -> tuple[tuple[int, int], ...]:
        """(first step, rows per step from there on), the first at step 0."""
        return ((0, self.batch),) if isinstance(self.batch, int) else self.batch

    def rows(self, steps: int) -> int:
        """Rows that the first `steps` steps read."""
        return Ramp.of(self.ramp).consumed(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecipe:
    """Cross-entropy, and what may be added to it. `chunk` and `recompute` trade memory for time, never the value."""

    chunk: int = 2048  # targets whose logits exist at one time
    z_loss: float = 0.0  # weight of the squared log-sum of the logits
    recompute: bool = False  # form the head's gradient in the backward pass: one more product, less memory

    def __post_init__(self) -> None:
        _within("chunk", self.chunk, 1, MOST)
        if not 0 <= self.z_loss < inf:
            raise ValueError(f"z_loss={self.z_loss} must be at least 0 and finite; 1e-4 is usual, 0 turns it off")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRecipe:
    """The course of the learning rate (schedules.py). Steps are numbers, or "10%" of the run."""

    kind: Kind = "cosine"
    warmup: int | str = 0
    cooldown: int | str = 0
    shape: Shape = "linear"  # of the cool-down
    floor: float = 0.1
    span: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor={self.floor} must be above 0 and at most 1; 0.1 ends at a tenth of the peak")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimRecipe:
    """The optimiser, and the clip of the global gradient norm; `clip = inf` never clips."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float | None = None  # decay per step of a moving average of the weights, such as 0.999; None: no average
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not 0 < value < inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be above 0; inf never clips")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be at least 0 and below 1; (0.9, 0.95) is usual")
        if not 0 <= self.weight_decay < inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; 0 turns it off")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must be above 0 and below 1; 0.999 is usual, leave it out for none")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRecipe:
    """When and on how much the model is measured. The test split is read once, at the very end."""

    every: int = 100  # steps between validations
    windows: int = 64  # of the validation split, evenly spaced, the same ones every time
    batch: int = 16  # rows per forward pass
    yardsticks: bool = True  # fit byte n-grams and compressors on the same bytes for the report
    lengths: tuple[int, ...] = ()  # further contexts to be measured at: does the model use more than it was trained on?
    samples: tuple[str, ...] = ()  # prompts that the model continues at every validation
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        _within("every", self.every, 1)
        _within("windows", self.windows, 1)
        _within("batch", self.batch, 1, MOST)
        _within("sample_tokens", self.sample_tokens, 1, MOST)
        for length in self.lengths:
            _within("lengths", length, 1, MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecipe:
    """When the run is saved, besides at its end and when it is told to stop, and which saves are kept."""

    every: int = 200
    keep_last: int = 2
    keep_every: int | None = None  # keep for good what falls on a multiple of this many steps
    keep_best: bool = False  # and the one with the lowest bits per byte on the validation windows
    asynchronous: bool = True  # write while the training goes on

    def __post_init__(self) -> None:
        _within("every", self.every, 1)
        _within("keep_last", self.keep_last, 1)
        if self.keep_every is not None:
            _within("keep_every", self.keep_every, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRecipe:
    """What is done about a step that went wrong (guard.py)."""

    nonfinite: Literal["skip", "rollback", "stop"] = "skip"  # the loss or the gradient norm is no number
    spike: Literal["log", "skip", "rollback", "stop"] = "log"  # either is far above what it was
    deviations: float = 10.0  # robust standard deviations above the running median that make a spike
    memory: int = 100  # steps that the median looks back on
    most_in_a_row: int = 10  # skipped steps; one more stops the run
    most: int = 50
    most_rollbacks: int = 3

    def __post_init__(self) -> None:
        _within("memory", self.memory, 2)
        for name in ("most_in_a_row", "most", "most_rollbacks"):
            _within(name, getattr(self, name), 0)
        if not self.deviations > 0:
            raise ValueError(f"deviations={self.deviations} must be above 0; inf never sees a spike")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecipe:
    """What is written down besides events and validations."""

    every: int = 1  # steps between lines of train.jsonl
    gates_every: int = 0  # steps between statistics of gates and states; 0: none
    tensorboard: bool = False
    wandb: str | None = None  # the project

    def __post_init__(self) -> None:
        _within("every", self.every, 1)
        _within("gates_every", self.gates_every, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run. After `config.resolve` every unit is an integer and `model` holds all fields of one architecture."""

    title: str = ""
    model: Mapping[str, Any]
    data: DataRecipe
    train: TrainRecipe
    loss: LossRecipe = field(default_factory=LossRecipe)
    optim: OptimRecipe
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    guard: GuardRecipe = field(default_factory=GuardRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON and TOML hold them."""
        return plain(asdict(self))

    def model_config(self) -> Any:
        """The config of the model: ours, or that of an architecture to compare with. Only for a resolved recipe."""
        config, _ = architecture(self.model["architecture"])
        return config.from_dict({key: value for key, value in self.model.items() if key != "architecture"})

    def schedule(self) -> Schedule:
        """The course of the learning rate. Only for a resolved recipe."""
        said, steps = self.optim.schedule, self.train.steps
        assert steps is not None, "resolve(recipe) first"
        assert isinstance(said.warmup, int), "resolve(recipe) first"
        assert isinstance(said.cooldown, int), "resolve(recipe) first"
        return Schedule(
            kind=said.kind, end=steps, warmup=said.warmup, cooldown=said.cooldown, shape=said.shape,
            floor=said.floor, span=said.span,
        )  # fmt: skip


def architecture(name: str) -> tuple[Any, Any]:
    """The classes of config and model that `name` stands for; `name` is in ARCHITECTURES or in COMPARED.

    Raises:
        ValueError: one to compare with, and transformers is not installed.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, config, model = COMPARED[name]
    try:
        baselines = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError(f"model.architecture = {name!r} is built by transformers: pip install openxlstm[hf]") from None
    return getattr(baselines, config), getattr(baselines, model)


def plain(value: Any) -> Any:
    """Tuples become lists, as JSON has them, so that what is stored equals what is read back."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def nearest_divisor(size: int, of: int) -> int:
    """The divisor of `of` that is nearest to `size`."""
    small = [part for part in range(1, isqrt(of) + 1) if of % part == 0]
    return min([*small, *(of // part for part in small)], key=lambda part: abs(part - size))


def _within(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} must be at most {most}")


def _divides(name: str, part: int, whole: int) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"{name}={part} must divide batch={whole}; nearest is {nearest_divisor(part, whole)}")


def _rising(name: str, steps: Sequence[int]) -> None:
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"{name}={list(steps)} must be steps in rising order")


def _lists(value: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(item) for item in value]
