"""One paper, one file; they share only the leaves in `nn` and the contract in `interface`.

interface.py    ModelState, LanguageModel: what every model of this library can do
xlstm.py        xLSTM[a:b], arXiv:2405.04517
xlstm_large.py  xLSTM-7B, arXiv:2503.13427
presets.py      published configurations, each with its source and its number of parameters
accounting.py   parameters, FLOPs and bytes of state, from a config alone
checks.py       sentences for bad input and bad configurations
"""
