"""The parameters of a gate (Perfusion, Eq. 3); a module of its own because it needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from minikin.errors import BadRecipe


@dataclass(frozen=True)
class Gate:
    """Bias (beta) and temperature (tau > 0) of a gate: sigmoid((s - beta) / tau)."""

    beta: float
    tau: float

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise BadRecipe(f"tau must be greater than 0, but it is {self.tau}; 0.1 to 0.2 is usual.")


OPEN = Gate(0.0, 1.0)  # stands for the linear edit without a gate; compared by identity
