"""Threads that check a heap, timers of an event loop, a subprocess that answers; counted in a file."""

import asyncio
import os
import sys
import threading
import zlib

THREADS = 8
BLOCKS = 25
SIZE = 3 << 19  # 8 * 25 * 1.5 MiB = 300 MiB

turns = [0] * THREADS
ticks = [0, 0]
answers = [0]
wrong = []
stop = False


def work(number):
    """Fills its part of the heap once, and sums it up again and again."""
    seed = bytes((number * 31 + at) % 251 for at in range(4096))
    blocks = [bytearray(seed * (SIZE // 4096)) for _ in range(BLOCKS)]
    for at, block in enumerate(blocks):
        block[at * 17] ^= 0xFF
    sums = [zlib.crc32(block) for block in blocks]
    while not stop:
        for at, block in enumerate(blocks):
            if zlib.crc32(block) != sums[at]:
                wrong.append(f"block {at} of thread {number} changed")
            if stop:
                return
        turns[number] += 1


async def tick(which, seconds):
    while True:
        await asyncio.sleep(seconds)
        ticks[which] += 1


async def ask(child):
    """The subprocess says every line back."""
    while True:
        line = b"%d\n" % (answers[0] + 1)
        child.stdin.write(line)
        await child.stdin.drain()
        said = await child.stdout.readline()
        if said != line:
            wrong.append(f"asked {line!r}, answered {said!r}")
        answers[0] += 1
        await asyncio.sleep(0.003)


def report():
    text = "; ".join(wrong) or " ".join(str(count) for count in turns + ticks + answers)
    with open("counts.new", "w", encoding="ascii") as file:
        file.write(text)
    os.rename("counts.new", "counts")


async def main():
    global stop
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    echo = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", echo, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    tasks = [asyncio.create_task(work) for work in (tick(0, 0.002), tick(1, 0.007), ask(child))]
    while not os.path.exists("stop"):
        report()
        await asyncio.sleep(0.01)
    stop = True
    for task in tasks:
        task.cancel()
    for thread in threads:
        thread.join()
    child.stdin.close()
    await child.wait()
    sys.exit(1 if wrong else 0)


asyncio.run(main())
