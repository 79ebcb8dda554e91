"""Other people's GPU kernels as functions of our arguments, each in the layout it prefers; or why one is not there.

`mlstm_kernels` and `flashrnn` are under the NXAI Community License: run as installed black boxes and nothing else. A
peer is imported when it is asked for, and whatever its import or its first call raises is the reason that is printed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from openxlstm.bench.gpu.stage import emit, sentence
from openxlstm.bench.harness import relative

CHUNKS = (64, 128, 256)  # of mlstm_kernels' xl_chunk: the lengths its authors report, the fastest is compared
LIMIT = 5e-2  # relative rms of a peer's h and ours, both rounded to bf16 and ours compared with float64
Leaves = list[Tensor]
Peer = tuple[Callable[[], Tensor], Leaves]  # forward, giving h, and what it differentiates


def guarded(name: str, make: Callable[[], Peer], error: Callable[[Tensor], float] | None = None) -> Peer | None:
    """The peer if it can be made and called, and gives what ours gives; otherwise the reason is said.

    `error` compares its h with ours; without it the peer computes something else by nature.
    """
    try:
        peer = make()
        h = peer[0]()
        if error is not None and not (found := error(h.detach())) <= LIMIT:
            raise ValueError(f"its h is {found:.1e} from ours, allowed {LIMIT:.0e}")
    except Exception as failure:
        emit("missing", peer=name, reason=sentence(failure))
        return None
    return peer


def _fresh(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


def xl_chunk(x: list[Tensor], chunk: int) -> Peer:
    """mlstm_kernels' chunkwise--triton_xl_chunk on q, k, v, i, f [B,T,H,*]; h as [B,H,T,V]. Gates in fp32, as ours."""
    kernel = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel("chunkwise--triton_xl_chunk")
    leaves = [_fresh(part.transpose(1, 2)) for part in x]
    return lambda: kernel(*leaves, chunk_size=chunk, autocast_kernel_dtype=x[0].dtype), leaves


def simple_gla(x: list[Tensor]) -> Peer:
    """flash-linear-attention's simple GLA: no input gate and no normaliser, so less work per token."""
    attend = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v, _, f = x
    leaves = [_fresh(part) for part in (q, k, v, nn.functional.logsigmoid(f))]
    return lambda: attend(q=leaves[0], k=leaves[1], v=leaves[2], g=leaves[3])[0], leaves


def xl_step(x: list[Tensor], states: list[list[Tensor]], h: Tensor) -> Callable[[], object]:
    """mlstm_kernels' Triton step, once for each of the states. It gives new states; ours are updated in place.

    Raises:
        ValueError: from the first state it gives another h than ours.
    """
    kernel = importlib.import_module("mlstm_kernels.torch").get_mlstm_step_kernel("triton")
    q, k, v, i, f = x
    own = [[C.clone(), n.clone(), m[..., None].clone()] for C, n, m in states]
    gates = [part[..., None].contiguous() for part in (i, f)]

    def call() -> object:
        return [kernel(q, k, v, *gates, *state) for state in own]

    found = relative(kernel(q, k, v, *gates, *own[0])[0].reshape(h.shape), h)
    if not found <= LIMIT:
        raise ValueError(f"its h is {found:.1e} from ours, allowed {LIMIT:.0e}")
    return call


def flashrnn(gates: Tensor, R: Tensor, b: Tensor, backend: str) -> Peer:
    """flashrnn's sLSTM on gates [B,T,4,H,K]; h [B,T,H,K]. Its fused backend is compiled by nvcc at this first call."""
    run = importlib.import_module("flashrnn").flashrnn
    leaves = [_fresh(gates), _fresh(R.permute(2, 0, 3, 1)), _fresh(b)]  # R[gate, head, output unit, input unit]
    return lambda: run(*leaves, function="slstm", backend=backend, dtype="bfloat16")[0][0], leaves


def cudnn_lstm(gates: Tensor) -> Peer:
    """torch's nn.LSTM of the same width: one head, another cell, and the product with its input included."""
    H, K = gates.shape[-2:]
    lstm = nn.LSTM(H * K, H * K, batch_first=True).to(gates.device, gates.dtype)
    x = _fresh(gates[:, :, 0].flatten(2))
    return lambda: lstm(x)[0], [x, *lstm.parameters()]


def versions() -> dict[str, str]:
    """Version of every peer, or the reason for its absence."""
    found: dict[str, str] = {"torch (nn.LSTM, scaled_dot_product_attention)": torch.__version__}
    for package, module in (
        ("mlstm_kernels", "mlstm_kernels.torch"), ("flash-linear-attention", "fla.ops.simple_gla"),
        ("flashrnn", "flashrnn"), ("transformers", "transformers"),
    ):  # fmt: skip
        try:
            importlib.import_module(module)
            found[package] = _version(package)
        except Exception as error:
            found[package] = f"not compared: {sentence(error)}"
    return found


def _version(package: str) -> str:
    from importlib import metadata

    for name in (package, "fla-core" if package.startswith("flash-linear") else package):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "version unknown"
