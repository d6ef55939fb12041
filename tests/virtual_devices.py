"""Several CPU devices for a process that a test starts."""

from __future__ import annotations

import os


def environment(count: int) -> dict[str, str]:
    """This process's variables, with which another one sees `count` CPU devices.

    One device takes no flag, so that its programs are those that this process compiled.
    """
    flags = [os.environ.get("XLA_FLAGS", "")]
    if count > 1:
        flags.append(f"--xla_force_host_platform_device_count={count}")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(filter(None, flags))}
