"""The flags by which a command runs on several hosts, and how it joins them.

--hosts=                                    one process (the default)
--hosts=auto                                a TPU pod, SLURM, Kubernetes or Open MPI
--hosts=ADDRESS:PORT --host_count=N --host_index=I      anywhere else
"""

from __future__ import annotations

from absl import flags

from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli

HOSTS = flags.DEFINE_string(
    "hosts",
    "",
    "Hosts that run the command together: '' for this process alone, 'auto' for the hosts of a TPU "
    "pod, SLURM step or Kubernetes job, ADDRESS:PORT of host 0 for --host_count hosts.",
)
COUNT = flags.DEFINE_integer(
    "host_count", None, "Number of hosts; goes with --hosts=ADDRESS:PORT.", 1
)
INDEX = flags.DEFINE_integer(
    "host_index", None, "Number of this host, from 0 to host_count - 1.", 0
)


def join() -> None:
    """Joins the hosts that the flags name; call it before anything touches a device.

    Ends the program with LOST when the others do not come in time: a cluster brings them back.

    Raises:
      UserError: the flags contradict each other, or there is no cluster.
    """
    check(HOSTS.value, COUNT.value, INDEX.value)
    from xllm_jax.core import hosts  # brings JAX, which a mistake need not wait for

    if HOSTS.value:
        address = "" if HOSTS.value == "auto" else HOSTS.value
        try:
            hosts.join(address, COUNT.value, INDEX.value)
        except hosts.Apart as error:
            cli.fail(str(error), cli.LOST)


def share() -> tuple[int, int]:
    """(number of this host, how many there are), for work in which hosts may share just a folder.

    Joins them where --hosts says so; else --host_count and --host_index alone number them.

    Raises:
      UserError: the flags contradict each other.
    """
    count, index = COUNT.value, INDEX.value
    if HOSTS.value or (count is None and index is None):
        join()
        import jax

        return jax.process_index(), jax.process_count()
    check_numbers(count, index)
    return index, count


def check(address: str, count: int | None, index: int | None) -> None:
    """Raises `UserError` for flags that do not fit together."""
    if address in ("", "auto"):
        for name, value in (("host_count", count), ("host_index", index)):
            if value is not None:
                raise UserError(
                    "goes with an address only", field=f"--{name}", hint="Give --hosts=ADDRESS:PORT"
                )
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"{address!r} is no address with a port",
            field="--hosts",
            hint="Give ADDRESS:PORT such as 10.0.0.1:1234, 'auto', or nothing",
        )
    check_numbers(count, index)


def check_numbers(count: int | None, index: int | None) -> None:
    """Raises `UserError` unless `index` is one of `count` hosts."""
    for name, value in (("host_count", count), ("host_index", index)):
        if value is None:
            hint = "--host_count and --host_index go together"
            raise UserError("is missing", field=f"--{name}", hint=hint)
    if count < 1:
        raise UserError(f"{count} hosts", field="--host_count", hint="Give 1 or more")
    if not 0 <= index < count:
        raise UserError(
            f"{index} is not one of {count} hosts",
            field="--host_index",
            hint=f"Give 0 to {count - 1}",
        )
