"""The loss scale of fp16 as plain arithmetic, shared by every framework.

The rule of torch's GradScaler, with a floor and DeepSpeed's window: after an overflow the scale
halves, after `window` applied steps in a row it doubles.
"""

from __future__ import annotations

from collections.abc import Mapping

_GROWTH = 2.0
_BACKOFF = 0.5
_FLOOR = 1.0
_CEILING = 2.0**32


class LossScaler:
    """Dynamic loss scale; a disabled one stays at 1 whatever happens."""

    def __init__(self, *, initial: float, window: int, enabled: bool) -> None:
        self.enabled = enabled
        self.window = window
        self.scale = initial if enabled else 1.0
        self._applied_in_a_row = 0

    def update(self, *, overflow: bool) -> None:
        """Call once an optimizer step, with a flag that all ranks agreed on."""
        if not self.enabled:
            return
        if overflow:
            self.scale = max(_FLOOR, self.scale * _BACKOFF)
            self._applied_in_a_row = 0
            return
        self._applied_in_a_row += 1
        if self._applied_in_a_row >= self.window:
            self.scale = min(_CEILING, self.scale * _GROWTH)
            self._applied_in_a_row = 0

    def state(self) -> dict[str, float]:
        return {
            "scale": self.scale,
            "applied_in_a_row": float(self._applied_in_a_row),
            "enabled": float(self.enabled),
        }

    def load(self, state: Mapping[str, float]) -> None:
        """Take over a saved state; ignored when either run's precision needs no scale."""
        if self.enabled and state.get("enabled", 0.0):
            self.scale = float(state["scale"])
            self._applied_in_a_row = int(state["applied_in_a_row"])
