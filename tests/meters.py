"What operations make, counted in elements and bytes: the same on every machine, unlike resident memory."

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Within it: `largest`, elements of the largest tensor that an operation made; `peak`, the most bytes
    that were alive at a time, beyond `known` tensors."""

    def __init__(self, *known):
        super().__init__()
        storages = [x.untyped_storage() for x in known]
        self.live = {x._cdata: (StorageWeakRef(x), 0) for x in storages}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes() // x.element_size())
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out
