"""Text of users' model files: good, slow, and wrong in every way that a run must survive."""

from __future__ import annotations

SOFTMAX = """
import numpy as np

def init(rng, example):
    x, y = example
    return {"W": np.zeros((x.shape[1], 10)), "b": np.zeros(10)}

def predict(params, x):
    return x @ params["W"] + params["b"]

def gradients(params, x, y):
    scores = predict(params, x)
    scores = scores - scores.max(axis=1, keepdims=True)
    exp = np.exp(scores)
    p = exp / exp.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y] + 1e-9).mean()
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    return float(loss), {"W": x.T @ p, "b": p.sum(axis=0)}
"""

SLOW = (
    SOFTMAX.replace("def gradients", "def fast")
    + """
import time

def gradients(params, x, y):
    time.sleep(0.01)
    return fast(params, x, y)
"""
)

# worker/0 computes for 7 s in pure Python, once; batches take 0.1 s
BUSY = (
    SOFTMAX.replace("def gradients", "def fast")
    + """
import sys, time

calls = 0

def gradients(params, x, y):
    global calls
    calls += 1
    time.sleep(0.1)
    if calls == 5 and sys.argv[1] == "worker/0":
        until = time.monotonic() + 7
        while time.monotonic() < until:
            pass
    return fast(params, x, y)
"""
)

# The first gradients are fine, then every call of worker/0's first process sleeps for ever.
HANGS = (
    SOFTMAX.replace("def gradients", "def fast")
    + """
import os, pathlib, sys, time

calls = 0
once = pathlib.Path(__file__).with_name("hung")

def gradients(params, x, y):
    global calls
    calls += 1
    time.sleep(0.01)
    if calls > 10 and sys.argv[1] == "worker/0":
        if not once.exists():
            once.write_text(str(os.getpid()))
        if once.read_text() == str(os.getpid()):
            time.sleep(1e6)
    return fast(params, x, y)
"""
)

# The first process of worker/1 kills itself in the middle of its 30th gradient.
DIES = (
    SOFTMAX.replace("def gradients", "def fast")
    + """
import os, pathlib, signal, sys, time

calls = 0
died = pathlib.Path(__file__).with_name("died")

def gradients(params, x, y):
    global calls
    calls += 1
    time.sleep(0.005)
    if calls == 30 and sys.argv[1:2] == ["worker/1"] and not died.exists():
        died.write_text(str(calls))
        os.kill(os.getpid(), signal.SIGKILL)
    return fast(params, x, y)
"""
)

# Batches take 12 s.
VERY_SLOW = (
    SOFTMAX.replace("def gradients", "def fast")
    + """
import time

def gradients(params, x, y):
    time.sleep(12)
    return fast(params, x, y)
"""
)

ALL_NAN = (
    SOFTMAX.replace("def gradients", "def fine")
    + """
def gradients(params, x, y):
    loss, g = fine(params, x, y)
    g["b"] = g["b"] * np.nan
    return loss, g
"""
)

RAISES_ON_IMPORT = "import numpy\nraise RuntimeError('no such luck')\n"

RAISES_LATER = (
    SOFTMAX.replace("def gradients", "def fine")
    + """
calls = 0

def gradients(params, x, y):
    global calls
    calls += 1
    if calls > 20:
        return deeper(x)
    return fine(params, x, y)

def deeper(x):
    return x.undefined_thing
"""
)

WRONG_SHAPE = SOFTMAX.replace('"W": x.T @ p', '"W": (x.T @ p).T')

EMPTY_DATA = """
import numpy as np

def load():
    return np.zeros((0, 4)), np.zeros(0, int), np.zeros((5, 4)), np.zeros(5, int)
"""
