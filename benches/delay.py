"""A TCP proxy on 127.0.0.1 that makes the way to a server longer and no narrower.

    delay.py PORT SERVER_PORT MILLISECONDS

Every byte arrives half of MILLISECONDS later, in each direction. Runs until it is killed.
"""

import asyncio
import sys
from collections import deque

PORT, SERVER_PORT, MILLISECONDS = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
ONE_WAY = MILLISECONDS / 2000
# What may be under way in one direction; a reader that is ahead of it waits.
BYTES_MAX = 16 << 20


async def forward(reader, writer):
    clock = asyncio.get_running_loop().time
    under_way, held, news, room = deque(), 0, asyncio.Event(), asyncio.Event()
    room.set()

    async def take():
        nonlocal held
        while data := await reader.read(1 << 16):
            under_way.append((clock() + ONE_WAY, data))
            held += len(data)
            news.set()
            if held > BYTES_MAX:
                room.clear()
                await room.wait()
        under_way.append((clock() + ONE_WAY, b""))
        news.set()

    async def give():
        nonlocal held
        while True:
            while not under_way:
                news.clear()
                await news.wait()
            due, data = under_way.popleft()
            if (wait := due - clock()) > 0:
                await asyncio.sleep(wait)
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            held -= len(data)
            if held <= BYTES_MAX:
                room.set()

    await asyncio.gather(take(), give())


async def connected(reader, writer):
    there = None
    try:
        from_server, there = await asyncio.open_connection("127.0.0.1", SERVER_PORT)
        await asyncio.gather(forward(reader, there), forward(from_server, writer))
    except OSError:
        pass
    finally:
        for end in (writer, there):
            if end:
                end.close()


async def main():
    server = await asyncio.start_server(connected, "127.0.0.1", PORT)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main())
