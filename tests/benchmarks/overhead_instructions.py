"""Instructions per request, counted by callgrind: a figure that no neighbour on the machine disturbs.

A child under valgrind makes the requests of every case: N to warm up, then N, then 2N. The difference
between the last two, divided by N, is what one request takes. callgrind writes down what it has counted each
time the child calls `getppid`, which nothing else does, so that one child is enough for all cases.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from overhead_apps import AT_ONCE, Case, Subject, in_memory, on_redis

PATIENCE = 1800.0  # seconds; valgrind is some fifty times slower than the processor
_COUNTED = re.compile(r"^totals: (\d+)", re.MULTILINE)
_PARTS = 3  # of each case: before and while it warms up, N requests, 2N requests


def per_request(root: Path, url: str | None, peers: Sequence[str], requests: int) -> dict[str, float]:
    """By case, what one request takes; empty where there is no valgrind or `requests`, which is N, is 0.

    `root` is where `asgi_sessions` is found; without the `url` of a Redis server only memory counts.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None or not requests:
        return {}
    with tempfile.TemporaryDirectory(prefix="callgrind-") as directory:
        command = [valgrind, "--tool=callgrind", "--dump-before=getppid", "--dump-line=no", "--quiet"]
        command += [f"--callgrind-out-file={directory}/out", sys.executable, str(Path(__file__).resolve())]
        command += [str(requests), *peers, *(["--url", url] if url else [])]
        settled = {"PYTHONHASHSEED": "0", "PYTHONMALLOC": "pymalloc", "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, env={**os.environ, **settled}, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode:
            raise RuntimeError(f"the requests under valgrind failed: {done.stderr}")
        return differences(json.loads(done.stdout), counts(Path(directory)), requests)


def counts(directory: Path) -> list[int]:
    """The instructions of each part that callgrind wrote, in the child's order."""
    parts = sorted(directory.glob("out.*"), key=lambda part: int(part.suffix[1:]))
    found = [_COUNTED.search(part.read_text()) for part in parts]
    return [int(match[1]) for match in found if match is not None]


def differences(cases: Sequence[str], counted: Sequence[int], requests: int) -> dict[str, float]:
    """Once what every batch costs is taken away; `RuntimeError` where parts are missing."""
    if len(counted) < _PARTS * len(cases):
        raise RuntimeError(f"{len(cases)} cases have {_PARTS} parts each, but callgrind wrote {len(counted)}")
    once, twice = counted[1::_PARTS], counted[2::_PARTS]
    return {case: (two - one) / requests for case, one, two in zip(cases, once, twice, strict=False)}


# -- the child -----------------------------------------------------------------------------------------------


async def batch(subject: Subject, case: Case, requests: int) -> None:
    app = subject.app(case)

    async def repeat(number: int) -> None:
        for _ in range(-(-requests // case.clients)):
            await subject.clients[number].request(app)

    await asyncio.gather(*[repeat(number) for number in range(case.clients)])


async def run(subject: Subject, case: Case, requests: int) -> None:
    """The three parts of one case."""
    await batch(subject, case, requests)
    gc.collect()
    gc.freeze()  # what was made before is no part of a collection that falls into one of the batches
    for times in (1, 2):
        os.getppid()
        await batch(subject, case, times * requests)
    os.getppid()


async def run_all(url: str | None, requests: int, peers: Sequence[str]) -> list[str]:
    """Give the cases' names in the order in which they ran."""
    done = []
    async with AsyncExitStack() as stack:
        remote = await stack.enter_async_context(on_redis(url, peers)) if url else []
        for subject in [*in_memory(peers), *remote]:
            for clients in AT_ONCE[subject.place]:
                await subject.begin(clients)
                for case in subject.cases(clients):
                    await run(subject, case, requests)
                    done.append(str(case))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests", type=int)
    parser.add_argument("peers", nargs="*")
    parser.add_argument("--url")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(run_all(options.url, options.requests, options.peers))))


if __name__ == "__main__":
    main()
