"""What tensors take: live bytes at their most, and bytes kept for a backward pass."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts storages from the first operation that returns them until they are freed.

    Args:
        known: tensors that were there before and are not counted.

    Attributes:
        peak: most bytes alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        # By address, which the finalizer takes out again when the storage is freed.
        self._seen = {_address(tensor) for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address in self._seen or address == 0:
            return
        self._seen.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass while it is on, each storage once.

    Parameters and whatever else is `known` is not counted: it is there anyway.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {_address(tensor) for tensor in known}
        self._kept: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._known:
            self._kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def total(self) -> int:
        """Bytes kept. Valid while the graph is alive: freed addresses are reused."""
        return sum(self._kept.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
