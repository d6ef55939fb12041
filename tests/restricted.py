"""Start of a command that a test limits or interrupts."""

from __future__ import annotations

import resource
import sys

# Limits itself and becomes the command. `preexec_fn` would run between fork and exec, where threads
# of JAX and gRPC are no more. A shell's background ignores SIGINT, and what it starts does, too.
# Programs that JAX keeps for other processes are none of the files that a test looks at.
RESTRICT = """
import os, resource, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if limit != resource.RLIM_INFINITY:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.execv(sys.argv[2], sys.argv[2:])
"""


def restricted(limit: int = resource.RLIM_INFINITY) -> list[str]:
    """What stands before a command that heeds SIGINT and none of whose files outgrows a limit.

    Args:
      limit: bytes.
    """
    return [sys.executable, "-c", RESTRICT, str(limit)]
