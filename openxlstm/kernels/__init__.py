"""The doors: mlstm(), mlstm_step(), slstm(), slstm_step(). Everything above this folder calls these and nothing else."""

from openxlstm.cells import mlstm as _m
from openxlstm.cells import slstm as _s


def mlstm(
    q,
    k,
    v,
    i,
    f,
    state=None,
    *,
    reset=None,
    mask=None,
    input_gate="exp",
    forget_gate="sigmoid",
    eps=1e-6,
    chunk=None,
    backend="auto",
):
    return _m.chunkwise(
        q,
        k,
        v,
        i,
        f,
        state,
        reset=reset,
        mask=mask,
        input_gate=input_gate,
        forget_gate=forget_gate,
        eps=eps,
        chunk=chunk or 64,
    )


def mlstm_step(
    q,
    k,
    v,
    i,
    f,
    state=None,
    *,
    reset=None,
    mask=None,
    input_gate="exp",
    forget_gate="sigmoid",
    eps=1e-6,
    backend="auto",
):
    return _m.step(
        q, k, v, i, f, state, reset=reset, mask=mask, input_gate=input_gate, forget_gate=forget_gate, eps=eps
    )


def slstm(gates, R, b, state=None, *, reset=None, mask=None, forget_gate="sigmoid", backend="auto"):
    return _s.recurrent(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)


def slstm_step(gates, R, b, state=None, *, reset=None, mask=None, forget_gate="sigmoid", backend="auto"):
    return _s.step(gates, R, b, state, reset=reset, mask=mask, forget_gate=forget_gate)
