"""Reads thousands of broken records through a pipeline, and tells what the process holds.

python tests/broken_stream.py FOLDER RECORDS      reads FOLDER/train.jsonl, a line of numbers a time
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import reading

LOOKS = 6


def main(folder: Path, records: int) -> None:
    """Prints `RECORDS BAD KILOBYTES FILES` at equal distances."""
    batches = reading.pipeline(folder, bad=1.0).iterate()
    read = bad = 0
    for look in range(1, LOOKS + 1):
        while read < records * look / LOOKS:
            _, info = next(batches)
            read, bad = read + reading.EXAMPLES, info["bad"]
        fields = (Path("/proc/self/statm").read_text()).split()
        held = int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        print(read, bad, held, len(os.listdir("/proc/self/fd")), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
