"""One process or many: who I am, what we share, and the same gradient for every way to split the work.

    torchrun --nproc-per-node 8 -m openxlstm train RECIPE train.parallel=fsdp2

    single   one process
    ddp      every process holds all parameters, and gradients are summed
    fsdp2    parameters, gradients and moments are cut into as many pieces as there are processes, or, with
             `train.shard`, as there are in a group; the groups then hold copies of each other (HSDP)

Gradients are sums, never means: every process divides by the number of targets of the whole batch before it goes
backward, and what comes back is added up. So a process with few targets, or with none, counts for what it has. DDP can
only average, so there the loss is multiplied by the number of processes first.

Sharded parameters are fp32, and so are their gradients. With bf16 products, only the weights that autocast would
round anyway travel as bf16 (`Unit.rounded`): half the traffic, and the numbers of one process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Kind = Literal["single", "ddp", "fsdp2"]
PATIENCE = timedelta(days=1)  # what rank 0 does alone, preparing data above all, may take a while

T = TypeVar("T")


class ElsewhereError(ValueError):
    """What rank 0 refused, as the other processes raise it: one of them has said it, and that is enough."""


@final
@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from one of them. Methods that speak of all must be called by all."""

    kind: Kind
    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh | None = None  # of fsdp2
    patient: Any = None  # a gloo group whose waits last up to PATIENCE; None without a process group

    @property
    def first(self) -> bool:
        """The process that prints, writes the run folder, and prepares data."""
        return self.rank == 0

    @property
    def loss_factor(self) -> float:
        """What the loss is multiplied by, so that gradients are sums over all processes."""
        return float(self.ranks) if self.kind == "ddp" else 1.0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, as a new tensor."""
        total = values.clone()
        if self.patient is not None:
            dist.all_reduce(total)
        return total

    def share(self, value: T) -> T:
        """What rank 0 gives, for everybody. Pickled, so for small things."""
        if self.patient is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def lead(self, make: Callable[[], T]) -> T:
        """`make()` in rank 0 while the others wait, then in them: what rank 0 has prepared they find done.

        Raises:
            ValueError, OSError: what `make` raised in rank 0, in every process.
        """
        made: list[T] = []
        error: ValueError | OSError | None = None
        if self.first:
            try:
                made.append(make())
            except (ValueError, OSError) as caught:
                error = caught
        said = self.share(None if error is None else str(error))
        if error is not None:
            raise error
        if said is not None:
            raise ElsewhereError(said)
        return made[0] if self.first else make()

    @contextmanager
    def led(self, hold: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Around a block of all processes: what rank 0 holds for them, such as a lock. Its refusal is everybody's."""
        with ExitStack() as stack:
            self.lead(lambda: stack.enter_context(hold()) if self.first else None)
            yield

    def wrap(self, objective: nn.Module, rounded: torch.dtype | None) -> nn.Module:
        """The module whose forward and backward the step calls. fsdp2 changes `objective` itself.

        Args:
            objective: holds a LanguageModel as `model`, on `device`.
            rounded: the dtype of matrix products, None for that of the parameters.
        """
        if self.kind == "ddp":
            # Views: a gradient and its bucket are one memory.
            return DistributedDataParallel(objective, gradient_as_bucket_view=True)
        if self.kind == "fsdp2":
            self._shard(objective, rounded)
        return objective

    def accumulate(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one portion of a step: gradients are exchanged in the `last` one only."""
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(last)
        elif isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return nullcontext()

    @contextmanager
    def unsharded(self, objective: nn.Module) -> Iterator[None]:
        """Inside, the model in `objective` can be called by itself, by all processes alike. After a first forward."""
        if not isinstance(objective, FSDPModule):
            yield
            return
        objective.unshard()
        try:
            yield
        finally:
            objective.reshard()

    @contextmanager
    def rewritten(self, objective: nn.Module) -> Iterator[None]:
        """Inside, the parameters may be overwritten, and are again at the end: nothing gathered before is used."""
        try:
            if isinstance(objective, FSDPModule):
                objective.reshard()
            yield
        finally:
            if isinstance(objective, FSDPModule):
                objective.reshard()

    def describe(self) -> dict[str, Any]:
        """How the work is split, for the run folder: it says where bits may differ."""
        if self.kind == "single":
            return {}
        sizes = {} if self.mesh is None else {"mesh": list(self.mesh.shape)}
        return {"parallel": self.kind, "processes": self.ranks, **sizes}

    def _shard(self, objective: nn.Module, rounded: torch.dtype | None) -> None:
        """Blocks are units, so that no more than one or two are whole at a time; what is left is one more unit."""
        assert self.mesh is not None
        # A state may be a view, and nothing in this library is ever changed in place, which is what the warning fears.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
        # Without inputs cast: autocast decides about products, and what it leaves alone is an island.
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        narrow = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32, cast_forward_inputs=False)
        model: Any = objective.model
        for unit in model.units():
            if rounded is not None:
                fully_shard(unit.rounded, mesh=self.mesh, mp_policy=narrow)
            fully_shard(unit.block, mesh=self.mesh, mp_policy=wide)
        fully_shard(objective, mesh=self.mesh, mp_policy=wide)
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo lacks the sum with a factor, even with factor 1


@contextmanager
def join(wanted: Literal["auto", "single", "ddp", "fsdp2"] = "auto", shard: int | None = None) -> Iterator[World]:
    """The world that torchrun's environment describes; without torchrun, a world of one.

    A process group that is there already is used, and left as it is.

    Args:
        wanted: "auto" is ddp where there are several processes.
        shard: of fsdp2: processes that share one copy of the parameters.

    Raises:
        ValueError: the recipe and the number of processes do not go together; there are fewer devices than processes.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, ranks = (
        int(os.environ[name]) if launched else fallback for name, fallback in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    kind = _kind(wanted, launched, ranks)
    groups = _groups(kind, ranks, shard)
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if kind == "single":
        yield World("single", 0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        mesh = None
        if kind == "fsdp2":
            names = ("replicate", "shard") if groups > 1 else ("shard",)
            sizes = (groups, ranks // groups) if groups > 1 else (ranks,)
            mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        yield World(kind, rank, ranks, device, mesh, patient)
    finally:
        if mine:
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that prints; also before `join`, and after it."""
    return os.environ.get("RANK", "0") == "0"


def global_norm(parameters: Sequence[Tensor]) -> float:
    """The norm of all gradients together, the same number in every process; sharded ones are seen whole."""
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def clip(parameters: Sequence[Tensor], limit: float, norm: float) -> None:
    """Scale all gradients, whose global norm is `norm`, so that it is at most `limit`."""
    factor = min(1.0, limit / (norm + 1e-6))  # PyTorch's own epsilon
    if factor < 1.0:
        torch._foreach_mul_([weight.grad for weight in parameters if weight.grad is not None], factor)


def _kind(wanted: str, launched: bool, ranks: int) -> Kind:
    if wanted == "auto":
        return "ddp" if ranks > 1 else "single"
    if wanted == "single":
        if ranks > 1:
            raise ValueError(
                f'train.parallel = "single", and torchrun started {ranks} processes, each of which would train the'
                ' whole run; use "ddp" or "fsdp2", or start one process'
            )
        return "single"
    if not launched:
        raise ValueError(
            f'train.parallel = "{wanted}" needs processes to share the work:'
            " torchrun --nproc-per-node 2 -m openxlstm train RECIPE"
        )
    return "ddp" if wanted == "ddp" else "fsdp2"


def _groups(kind: Kind, ranks: int, shard: int | None) -> int:
    """How many copies of the parameters there are under fsdp2."""
    if shard is None:
        return 1
    if kind != "fsdp2":
        raise ValueError(
            f'train.shard = {shard} is for train.parallel = "fsdp2", and this run is "{kind}"; leave it out'
        )
    if ranks % shard:
        near = max(size for size in range(1, min(shard, ranks) + 1) if ranks % size == 0)
        raise ValueError(f"train.shard = {shard} must divide the {ranks} processes; nearest below is {near}")
    return ranks // shard


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no device: there are {torch.cuda.device_count()};"
            f" use torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)
