"""The only doors to the cells' fast implementations: mlstm(), mlstm_step(), slstm(), slstm_step().

Each computes the function of the same name in `openxlstm.cells`, and is tested to be equal to it: outputs, states and
gradients. State in, state out; nothing passed in is changed; `explain()` says which backend serves which call here.
A folder below is a backend and bears its name.
"""

from openxlstm.kernels.dispatch import explain as explain
from openxlstm.kernels.dispatch import explain_table as explain_table
from openxlstm.kernels.dispatch import trust as trust
from openxlstm.kernels.doors import mlstm as mlstm
from openxlstm.kernels.doors import mlstm_step as mlstm_step
from openxlstm.kernels.doors import slstm as slstm
from openxlstm.kernels.doors import slstm_step as slstm_step
