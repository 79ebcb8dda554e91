"""Leaves that do not know what an LSTM is.

norm.py        LayerNorm, RMSNorm, HeadNorm
conv.py        causal_conv, ConvSiLU: the tail of the past is state
linear.py      Linear, Embedding, HeadwiseLinear
gates.py       GateLinear, project_gates
init.py        the papers' distributions
functional.py  soft_cap, fp32 islands
"""
