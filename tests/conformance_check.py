"""Run in a process with 8 devices: every check of the packaged networks and of two small ones, and
of these with one fault each the check that catches it.

Prints one JSON line: {'clean' or 'bugs': {name: {check: [outcome, text]}}}.
"""

from __future__ import annotations

import dataclasses
import json
import time

import conformance_networks

from xllm_jax.conformance import kit, packaged

# Stacks are compiled once whatever their depth is: the conformer has one before each pool.
SHALLOW = {"speech_encoder": {"depth": 2, "pools": (1,)}, "visual_interface": {"depth": 2}}


def results(subject, only=()):
    """{check: [outcome, text]}."""
    return {one.check: [one.outcome, one.text] for one in kit.check(subject, only)[1]}


def main():
    found = {"clean": {}, "bugs": {}, "seconds": {}}
    for name, subject in (packaged.subjects() | conformance_networks.CLEAN).items():
        start = time.process_time()
        part = dataclasses.replace(subject.part, fields=subject.part.fields | SHALLOW.get(name, {}))
        found["clean"][name] = results(dataclasses.replace(subject, part=part))
        found["seconds"][name] = round(time.process_time() - start, 1)
    for name, bug in conformance_networks.BUGS.items():
        start = time.process_time()
        with bug.planted():
            found["bugs"][name] = results(bug.subject, (bug.check,))
        found["seconds"][name] = round(time.process_time() - start, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
