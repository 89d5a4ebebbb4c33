"""pyzmq, REQ and REP without copies: a vector there, another one back, without an update.

zmq_reqrep.py [--bytes 100000000]
"""

from __future__ import annotations

import argparse
import multiprocessing
from statistics import median

import numpy as np
import zmq
from measure import repeat, say


def serve(size: int, ports: multiprocessing.SimpleQueue[int]) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        ports.put(socket.bind_to_random_port("tcp://127.0.0.1"))
        parameters = np.random.rand(size // 4).astype(np.float32)
        while True:
            socket.recv(copy=False)
            socket.send(parameters, copy=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--for-s", type=float, default=1.0)
    options = parser.parse_args()
    ports = multiprocessing.SimpleQueue()
    server = multiprocessing.Process(target=serve, args=(options.bytes, ports), daemon=True)
    server.start()
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(f"tcp://127.0.0.1:{ports.get()}")
        gradient = np.random.rand(options.bytes // 4).astype(np.float32)

        def round_trip() -> None:
            socket.send(gradient, copy=False)
            socket.recv(copy=False)

        say(seconds=median(repeat(round_trip, options.repeats, options.for_s)))
    server.kill()


if __name__ == "__main__":
    main()
