"""Several hosts that run one program: how they find each other.

On TPU pods and GPU clusters every host (process) runs the same command. Host 0 offers the
coordination service, the small key-value store over which hosts agree on anything but arrays.
"""

from __future__ import annotations

import os
import socket
import time

import jax

from xllm_jax.core.errors import UserError

START_SECONDS = 300  # hosts of a cluster may be minutes apart in starting


def join(
    address: str, count: int | None = None, index: int | None = None, seconds: int = START_SECONDS
) -> None:
    """Joins the other hosts of a run; before anything else asks JAX for its devices.

    Args:
      address: 'HOST:PORT' of host 0, or '' to read everything from the environment of a TPU pod,
        a SLURM step, Kubernetes or Open MPI.
      count: number of hosts; with an address only.
      index: which one this is, from 0.
      seconds: how long to wait for the others.

    Raises:
      UserError: no cluster in the environment, the port is taken, or host 0 does not answer.
    """
    # Preemption is agreed upon in our own way, so Python may keep its signal handlers.
    jax.config.update("jax_enable_preemption_service", False)
    if _platform() == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not address:
        _join_cluster(seconds)
        return
    host, port = address.rsplit(":", 1)
    if index:
        _await_host(host, int(port), seconds)
    else:
        _check_free(int(port))
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
        )
    except RuntimeError as error:
        raise UserError(
            f"the {count} hosts did not come together ({_line(error)})",
            field="--hosts",
            mend="Start the same command on every host, each with its own --host_index",
        ) from error


def _platform() -> str:
    """The first platform that JAX is told to use; '' when it may choose."""
    return (jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")).split(",")[0]


def _join_cluster(seconds: int) -> None:
    try:
        jax.distributed.initialize(initialization_timeout=seconds)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"no cluster found in the environment ({_line(error)})",
            field="--hosts",
            mend="'auto' reads that of a TPU pod, SLURM, Kubernetes or Open MPI; elsewhere give "
            "--hosts=ADDRESS:PORT --host_count=N --host_index=I",
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"the hosts of the cluster did not come together ({_line(error)})",
            field="--hosts",
            mend="Start the same command on every host",
        ) from error


def _await_host(host: str, port: int, seconds: int) -> None:
    """Waits until host 0 answers; JAX itself would end the process without a word of use."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"host 0 does not answer at {host}:{port} ({_line(error)})",
                    field="--hosts",
                    mend="Start it with --host_index=0, and let the port through",
                ) from error
            time.sleep(0.2)


def _check_free(port: int) -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be opened here ({_line(error)})",
            field="--hosts",
            mend="Choose another port, or give this host another --host_index",
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
