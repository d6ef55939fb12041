"""How often this process has compiled a program for its devices."""

from __future__ import annotations

import jax.monitoring

EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts from when it is made until it is closed, all threads together.

    Attributes:
      count: compilations so far.
    """

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == EVENT

    def close(self) -> None:
        """Counts no more."""
        jax.monitoring.unregister_event_duration_listener(self._heard)
