"""Leaves that do not know what an LSTM is.

norm.py        LayerNorm, RMSNorm, HeadNorm
conv.py        causal_conv, ConvSiLU: the tail of the past is state
linear.py      Linear, Embedding, HeadwiseLinear
quant.py       QuantLinear, QuantEmbedding: matrices that stay as they lie in a GGUF file
gates.py       GateLinear, project_gates
init.py        the papers' distributions
functional.py  soft_cap, fp32 islands
"""
