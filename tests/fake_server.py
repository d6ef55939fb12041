"""A whole server with a fake engine, as a process: it is told to end by signals."""

from __future__ import annotations

import sys
import time

import served
from fake_engine import FakeEngine

from xllm_jax.serve import app, lifecycle


class Slow(FakeEngine):
    """One whose warm-up takes a while, or fails."""

    def start(self) -> None:
        """See `Engine.start`."""
        time.sleep(float(sys.argv[2]))
        if sys.argv[3] == "fails":
            raise RuntimeError("no device")
        super().start()


def main() -> int:
    """Serves until a signal comes; the arguments are seconds of a step, of the warm-up, a word."""
    engine = Slow(pause=float(sys.argv[1]))
    with served.decoders() as workers:
        made = served.service(engine, workers)
        opened = lifecycle.listen("127.0.0.1", 0)
        print(f"http://127.0.0.1:{opened.getsockname()[1]}", flush=True)
        lifecycle.Server(app.create(made, log=sys.stderr), made, drain=20).run([opened])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
