"""Layers with the constructor and the call of `torch.nn.LSTM`: change one word and keep the script.

    rnn = openxlstm.rnn.sLSTM(input_size, hidden_size)      # was torch.nn.LSTM
    output, (h, c) = rnn(x)

    sLSTM   the bare cell with memory mixing: exponential gates, a normaliser, a full recurrent matrix
    mLSTM   the bare matrix memory: no recurrent matrix, hence parallel over time
    xLSTM   residual blocks around both cells, with norms, short convolutions and feed-forward layers

modules.py    the three, and what their arguments mean
recurrent.py  what they share: layers, directions, dropout, state
layers.py     what one layer is made of
sequences.py  padded, packed and unbatched input; errors about input
state.py      what is remembered, as a frozen tree and as the pair (h, c)

docs/rnn.md is the guide, docs/decisions/0007 says why the state is what it is.
"""

from openxlstm.rnn.modules import mLSTM as mLSTM
from openxlstm.rnn.modules import sLSTM as sLSTM
from openxlstm.rnn.modules import xLSTM as xLSTM
from openxlstm.rnn.state import RNNState as RNNState
