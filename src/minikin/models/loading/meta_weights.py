"""No normal numbers are drawn for weights on the meta device.

transformers builds a model on the meta device, where weights have no values, and then loads them. PyTorch
initialises an embedding there all the same, and imports its compiler (`torch._dynamo`, seconds) to do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.init.normal_:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def undrawn() -> Iterator[None]:
    """Context, and decorator, in which this thread's meta tensors are not filled with random numbers."""
    with _Undrawn():
        yield
