"""Several hosts that run one program: how they find each other and agree.

On TPU pods and GPU clusters every host (process) runs the same command. Host 0 offers the
coordination service, the small key-value store over which hosts agree on anything but arrays.
With one host there is no store, and whatever is agreed upon is its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the store has no public name

from xllm_jax.core.errors import LOST as LOST
from xllm_jax.core.errors import SAVED as SAVED
from xllm_jax.core.errors import UserError

Value = TypeVar("Value")  # what JSON holds

START_SECONDS = 300  # hosts of a cluster may be minutes apart in starting
SHOWN = 3  # differences that a message names
WAIT_SECONDS = 3600  # for host 0, which may read a large checkpoint


class Apart(UserError):
    """The hosts did not come together in time. On a cluster one of them may still be on its way
    back, so that the same command can succeed.
    """


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
      UserError: no cluster in the environment, or the port is taken.
      Apart: host 0 does not answer, or others are missing.
    """
    # Preemption is agreed upon in our own way, so Python may keep its signal handlers.
    jax.config.update("jax_enable_preemption_service", False)
    if _platform() == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if address:
        _join_at(address, count, index, seconds)
    else:
        _join_cluster(seconds)
    exit_when_coordinator_lost()


def _platform() -> str:
    """The first platform that JAX is set to use; '' when it may choose."""
    # JAX makes the attributes of its configuration at run time.
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    return (chosen or os.environ.get("JAX_PLATFORMS", "")).split(",")[0]


def _join_at(address: str, count: int | None, index: int | None, seconds: int) -> None:
    host, port = address.rsplit(":", 1)
    if index:
        _await_host(host, int(port), seconds)
        _on_abort(_strange(host, int(port)))
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
        raise Apart(
            f"the {count} hosts did not come together ({_line(error)})",
            field="--hosts",
            hint="Start the same command on every host, each with its own --host_index",
        ) from error


def _join_cluster(seconds: int) -> None:
    try:
        jax.distributed.initialize(initialization_timeout=seconds)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"no cluster found in the environment ({_line(error)})",
            field="--hosts",
            hint="'auto' reads that of a TPU pod, SLURM, Kubernetes or Open MPI; elsewhere give "
            "--hosts=ADDRESS:PORT --host_count=N --host_index=I",
        ) from error
    except RuntimeError as error:
        raise Apart(
            f"the hosts of the cluster did not come together ({_line(error)})",
            field="--hosts",
            hint="Start the same command on every host",
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
                raise Apart(
                    f"host 0 does not answer at {host}:{port} ({_line(error)})",
                    field="--hosts",
                    hint="Start it with --host_index=0, and let the port through",
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
            hint="Choose another port, or give this host another --host_index",
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def exit_when_coordinator_lost() -> None:
    """Makes the loss of host 0 an exit with `LOST`.

    When host 0 dies, JAX's client aborts the process from a thread of its own and takes no Python
    callback for it; only a handler of the C library sees the signal in that thread.
    """
    host, port = str(distributed.global_state.coordinator_address).rsplit(":", 1)
    if jax.process_index():
        _on_abort(_aborted(host, int(port)))


def _on_abort(handler: ctypes._FuncPointer) -> None:
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


@functools.cache
def _strange(host: str, port: int) -> Any:
    """Handler of SIGABRT while joining: JAX's client aborts where no host 0 speaks its language."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        line = f"--hosts: what answers at {host}:{port} is no host 0 of this run, or one that has "
        os.write(2, f"{line}ended. Choose another port, or start it again\n".encode())
        os._exit(LOST)

    return aborted


@functools.cache  # the C library does not keep its handler alive
def _aborted(host: str, port: int) -> Any:
    """Handler of SIGABRT; an abort while host 0 still answers is a crash, and stays one."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            os.write(2, b"Host 0 was lost. Run the same command again\n")
            os._exit(LOST)
        ctypes.CDLL(None).signal(signal.SIGABRT, None)

    return aborted


class Store:
    """The key-value store of a run's hosts, under names that belong to this start of it.

    Args:
      client: of JAX's coordination service.
      index, count: which host this is, of how many.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self.index, self.count = client, index, count
        start = client.key_value_increment(f"xllm/starts/{index}", 1)
        self._root = f"xllm/{start}/"  # a process may train several stages

    def put(self, name: str, value: object) -> None:
        """Publishes JSON under a name, replacing what was there."""
        self._client.key_value_set(self._root + name, json.dumps(value), allow_overwrite=True)

    def get(self, name: str, seconds: float = WAIT_SECONDS) -> Any:
        """Waits for a name.

        Raises:
          TimeoutError: nobody has published it.
        """
        try:
            return json.loads(
                self._client.blocking_key_value_get(self._root + name, int(seconds * 1000))
            )
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"nothing under {name!r} ({_line(error)})") from error

    def all(self, folder: str) -> dict[str, Any]:
        """{name below the folder: value} of what has been published by now."""
        root = f"{self._root}{folder}/"
        found = self._client.key_value_dir_get(root)
        return {key.removeprefix(root): json.loads(value) for key, value in found}

    def drop(self, name: str) -> None:
        """Forgets a name or a folder."""
        self._client.key_value_delete(self._root + name)


def store() -> Store | None:
    """The store of this start of a run; None with one host. Every host asks equally often."""
    count = jax.process_count()
    return Store(distributed.global_state.client, jax.process_index(), count) if count > 1 else None


def share(store: Store | None, name: str, make: Callable[[], Value]) -> Value:
    """What host 0 makes, on every host; JSON.

    Args:
      store: of the hosts; None with one.
      name: of the value in the store.
      make: gives the value; called on host 0 alone.
    """
    if store is None:
        return make()
    if store.index == 0:
        store.put(name, make())
    return store.get(name)


def gather(store: Store | None, name: str, value: Value) -> list[Value]:
    """Every host's value in the order of hosts, on host 0; the others get their own alone.

    Args:
      store: of the hosts; None with one.
      name: of the value in the store.
      value: of this host, JSON.
    """
    if store is None:
        return [value]
    store.put(f"{name}/{store.index}", value)
    if store.index:
        return [value]
    found = [store.get(f"{name}/{host}") for host in range(store.count)]
    store.drop(f"{name}/")
    return found


def meet(store: Store | None, name: str) -> None:
    """Waits for all hosts, however long they take; a `watchdog.Watch` ends it when one is lost."""
    if store is None:
        return
    store.put(f"{name}/{store.index}", True)
    for host in range(store.count):
        while not _there(store, f"{name}/{host}"):
            pass


def _there(store: Store, name: str) -> bool:
    """Whether a name was published within the usual time."""
    with contextlib.suppress(TimeoutError):
        return bool(store.get(name))
    return False


def agree(store: Store | None, what: str, items: Mapping[str, str]) -> None:
    """Compares what must be the same on all hosts with host 0's.

    Args:
      what: 'configuration', 'code' … for the message.
      items: {field, file or leaf: value}.

    Raises:
      UserError: they differ; names this host and the first items.
    """
    if store is None:
        return
    items = dict(items)
    if store.index == 0:
        store.put(f"agree/{what}", items)
        return
    wanted = store.get(f"agree/{what}", START_SECONDS)
    different = differences(items, wanted)
    if different:
        more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise UserError(
            f"{'; '.join(different[:SHOWN])}{more}",
            field=f"host {store.index} has another {what} than host 0",
            hint="Start every host with the same files, flags and packages",
        )


def differences(items: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """In words, where a host's items differ from host 0's."""
    different = []
    for name in sorted(items.keys() | wanted.keys()):
        here, there = items.get(name, "absent"), wanted.get(name, "absent")
        if here != there:
            different.append(f"{name} is {here[:80]}, on host 0 {there[:80]}")
    return different


def leave(code: int) -> NoReturn:
    """Ends this process at once; an ordinary exit would wait for hosts that are gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
