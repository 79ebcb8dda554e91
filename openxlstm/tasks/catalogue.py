"""The synthetic tasks by name: what `xlstm eval` and its recipes can ask for. A dict, to be read."""

from __future__ import annotations

from collections.abc import Callable

from openxlstm.tasks.base import Task
from openxlstm.tasks.formal import FORMAL
from openxlstm.tasks.images import Cifar10, Digits
from openxlstm.tasks.listops import ListOps
from openxlstm.tasks.mqar import MQAR
from openxlstm.tasks.nns import NearestNeighbour
from openxlstm.tasks.pathfinder import Pathfinder
from openxlstm.tasks.retrieval import AnthologyPairs, Duplicates

TASKS: dict[str, Callable[..., Task]] = {
    **FORMAL,
    "mqar": MQAR,
    "nns": NearestNeighbour,
    "listops": ListOps,
    "pathfinder": Pathfinder,
    "digits": Digits,
    "cifar10": Cifar10,
    "duplicates": Duplicates,
    "retrieval": AnthologyPairs,
}
