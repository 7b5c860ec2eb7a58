"""Two servers under load for minutes, with clients that leave: is every text right, and is the memory flat?

    build/vllm/bin/python tests/vllm_engine/soak.py [--minutes 15] [--json FILE]

Sixteen clients ask two servers for the texts that Transformers writes. A third of the requests is left before its end:
the stream is closed, or the client is gone. In the middle one server is killed and started again; its clients get
errors, those of the other one do not. One prompt, the canary, is asked for between all others. Written are lines of
progress, and at the end whether every finished text was right and what memory the server that lived has held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import openai
import psutil
from models import TINY
from server import Server, serving
from texts import FLOAT32, NEW, mixed_prompts, of_transformers

CLIENTS = 16
SECONDS = 15
"""Between two lines of progress, and two looks at the memory."""


class Soak:
    def __init__(self, prompts: list[list[int]], expected: list[list[int]], minutes: float):
        self.texts = list(zip(prompts, expected, strict=True))
        self.ends = time.monotonic() + 60 * minutes
        self.right = self.left = self.failed = self.canaries = 0
        self.wrong: list[str] = []
        self.memory: list[int] = []
        """Bytes of the server that lives."""

    async def client(self, servers: list[Server | None], number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < self.ends:
            which = choose.randrange(2)
            server = servers[which]
            if server is None:  # killed, and not up again
                await asyncio.sleep(1)
                continue
            canary = choose.random() < 0.1
            prompt, text = self.texts[0 if canary else choose.randrange(len(self.texts))]
            leaves = None if canary or choose.random() > 1 / 3 else choose.randrange(1, NEW)
            patience = choose.random() * 3 if leaves is not None and choose.random() < 0.5 else None
            try:
                got = await asyncio.wait_for(self.ask(server, prompt, leaves), patience)
            except asyncio.TimeoutError:
                got = []  # cancelled: the client is gone
            except (openai.APIError, OSError) as error:
                if servers[which] is server and which == 0:
                    self.wrong.append(f"the server that lives refused: {error!r}")
                self.failed += 1
                continue
            if leaves is not None:
                self.left += 1
            elif got == text:
                self.right += 1
                self.canaries += canary
            else:
                self.wrong.append(
                    f"{len(prompt)} tokens{', the canary' if canary else ''}: {got}, not {text}"
                )

    async def ask(self, server: Server, prompt: list[int], leaves: int | None) -> list[int]:
        async with server.client() as client:
            stream = await client.completions.create(
                model="model", prompt=prompt, max_tokens=NEW, temperature=0, stream=True,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
            got: list[int] = []
            async for event in stream:
                for choice in event.choices:
                    got += choice.token_ids or []  # type: ignore[attr-defined]
                if leaves is not None and len(got) >= leaves:
                    await stream.close()
                    break
            return got

    async def watch(self, process: psutil.Process) -> None:
        while time.monotonic() < self.ends:
            await asyncio.sleep(SECONDS)
            of = [process, *process.children(recursive=True)]
            self.memory.append(sum(p.memory_info().rss for p in of))
            print(
                f"{max(0, self.ends - time.monotonic()):.0f} s to go: {self.right} right ({self.canaries} canaries), "
                f"{self.left} left early, {self.failed} failed, {len(self.wrong)} wrong; "
                f"{self.memory[-1] / 2**20:.0f} MiB",
                flush=True,
            )


def group_of(server: Server) -> psutil.Process:
    """The server's first process."""
    port = server.url.rpartition(":")[2]
    return next(p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or ()))


async def run(soak: Soak, folder: Path, lives: Server) -> None:
    with contextlib.ExitStack() as stack:
        options = (*FLOAT32, "--max-num-batched-tokens", "256")
        dies = stack.enter_context(serving(TINY, folder / "dies.log", *options))
        servers: list[Server | None] = [lives, dies]
        tasks = [asyncio.create_task(soak.client(servers, i)) for i in range(CLIENTS)]
        tasks.append(asyncio.create_task(soak.watch(group_of(lives))))
        await asyncio.sleep((soak.ends - time.monotonic()) / 2)
        print("one server is killed", flush=True)
        os.killpg(group_of(dies).pid, signal.SIGKILL)
        await asyncio.sleep(5)
        servers[1] = None
        begin = asyncio.to_thread(stack.enter_context, serving(TINY, folder / "again.log", *options))
        servers[1] = await begin
        print("it is up again", flush=True)
        await asyncio.gather(*tasks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = mixed_prompts()
    expected = of_transformers(prompts)
    with tempfile.TemporaryDirectory() as folder:
        options = (*FLOAT32, "--enable-prefix-caching", "--max-num-batched-tokens", "256")
        with serving(TINY, Path(folder) / "lives.log", *options) as lives:
            soak = Soak(prompts, expected, args.minutes)
            asyncio.run(run(soak, Path(folder), lives))
    third = len(soak.memory) // 3
    early, late = (max(part) for part in (soak.memory[third : 2 * third], soak.memory[2 * third :]))
    found = dict(
        minutes=args.minutes, right=soak.right, canaries=soak.canaries, left_early=soak.left, failed=soak.failed,
        wrong=soak.wrong, memory_of_middle_third=early, memory_of_last_third=late, growth=late / early - 1,
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({**found, "wrong": len(soak.wrong)}, indent=1))
    for line in soak.wrong[:20]:
        print(line)
    sys.exit(bool(soak.wrong) or not soak.canaries or not soak.left)


if __name__ == "__main__":
    main()
