"""grpcio's Python, plaintext: blocks go up a stream, are applied, and come back fresh.

plain_grpc.py [--bytes 100000000] [--block 1048576]
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent import futures
from statistics import median

import grpc
import numpy as np
from measure import repeat, say

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
LEARNING_RATE = np.float32(1e-6)


def serve(size: int, ports: multiprocessing.SimpleQueue[int]) -> None:
    parameters = np.random.rand(size // 4).astype(np.float32)

    def push_pull(blocks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        place = 0
        for block in blocks:
            gradient = np.frombuffer(block, np.float32)
            part = parameters[place : place + gradient.size]
            part -= LEARNING_RATE * gradient
            place += gradient.size
            yield part.tobytes()

    handler = grpc.stream_stream_rpc_method_handler(push_pull)
    server = grpc.server(futures.ThreadPoolExecutor(4), options=OPTIONS)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("peer", {"push_pull": handler})]
    )
    ports.put(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--block", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--for-s", type=float, default=1.0)
    options = parser.parse_args()
    ports = multiprocessing.SimpleQueue()
    server = multiprocessing.Process(target=serve, args=(options.bytes, ports), daemon=True)
    server.start()
    gradient = np.random.rand(options.bytes // 4).astype(np.float32)
    up = gradient.data.cast("B")
    down = np.empty_like(gradient).data.cast("B")
    with grpc.insecure_channel(f"127.0.0.1:{ports.get()}", options=OPTIONS) as channel:
        push_pull = channel.stream_stream("/peer/push_pull")
        starts = range(0, len(up), options.block)

        def round_trip() -> None:
            place = 0
            for block in push_pull(bytes(up[i : i + options.block]) for i in starts):
                down[place : place + len(block)] = block
                place += len(block)

        say(seconds=median(repeat(round_trip, options.repeats, options.for_s)))
    server.kill()


if __name__ == "__main__":
    main()
