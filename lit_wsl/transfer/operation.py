"""What every operation of a plan is: small, pure, and data itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from lit_wsl.errors import PlanError

Shape = tuple[int, ...]
MAX_TENSORS = 1_000_000  # results of one operation; a plan that asks for more is damaged, and would fill the memory


@dataclass(frozen=True)
class Operation(ABC):
    """One step from source tensors to target tensors.

    Attributes:
        name: The word for it in plans and reports.
        lossless: Whether no value is changed and nothing is invented.
        needs_target: Whether :meth:`apply` needs the target's present values (only value-changing operations).
        keeps_function: Whether the model computes the same after it as the source did (in evaluation mode).
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True

    @abstractmethod
    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        """Shapes of the results for inputs of these shapes.

        Raises:
            PlanError: If the operation does not fit the shapes.
        """

    @abstractmethod
    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        """Transform the tensors; results are views of the inputs where possible."""

    @abstractmethod
    def reverse(self) -> Operation:
        """The inverse operation: ``op.reverse().apply(op.apply(x)) == x``.

        Raises:
            PlanError: If there is none.
        """

    def to_dict(self) -> dict[str, Any]:
        """The operation as plain data, ``{"op": name, ...}``."""
        return {"op": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    def _misfit(self, inputs: Sequence[Shape], why: str) -> PlanError:
        shown = ", ".join(map(str, map(tuple, inputs[:4]))) + (f", ... ({len(inputs)} tensors)" if inputs[4:] else "")
        return PlanError(f"{self.name} does not fit shapes [{shown}]: {why}.")

    def _bound(self, inputs: Sequence[Shape], each: int) -> None:
        """Refuse to make millions of tensors of a few."""
        if len(inputs) * each > MAX_TENSORS:
            raise PlanError(f"{self.name} would make {len(inputs) * each:,} tensors; at most {MAX_TENSORS:,} may be.")

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """Refuse tensors that the operation was not planned for; torch alone would take some of them."""
        self.shapes([tuple(t.shape) for t in inputs])

    def _at_least(self, least: int, **values: object) -> None:
        """Check arguments that are integers, or tuples of them."""
        for argument, value in values.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers):
                raise PlanError(f"{self.name}: {argument} must be at least {least}, got {value!r}.")
