"""The definition of both cells: slow, plain, and the ground truth of everything else in the library.

    state.py   mLSTMState, sLSTMState: what a cell remembers
    mlstm.py   step, recurrent, chunkwise
    slstm.py   step, recurrent

Dimension key of the whole library; a letter never changes its meaning:
B batch, T time, H heads, K query/key width (sLSTM: head width), V value width, D model width, U inner width,
N chunks, L chunk length, J convolution taps, W vocabulary. `C n m` and `h c n m` are the papers' states.
"""

from openxlstm.cells import mlstm as mlstm
from openxlstm.cells import slstm as slstm
from openxlstm.cells.state import State as State
from openxlstm.cells.state import mLSTMState as mLSTMState
from openxlstm.cells.state import sLSTMState as sLSTMState
