"""Softmax regression, as an example of a model of your own. Only numpy is needed."""

import numpy as np


def init(rng, example):
    x, y = example  # one batch, to learn the sizes from
    inputs, classes = x[0].size, int(y.max()) + 1
    return {"W": rng.normal(0, 0.01, (inputs, classes)), "b": np.zeros(classes)}


def predict(params, x):
    return x.reshape(len(x), -1) @ params["W"] + params["b"]


def gradients(params, x, y):
    scores = predict(params, x)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)  # probabilities, (batch, classes)
    rows = np.arange(len(y))
    loss = -np.log(p[rows, y] + 1e-12).mean()
    p[rows, y] -= 1  # the gradient of the loss by the scores, times the batch
    return loss, {"W": x.reshape(len(x), -1).T @ p / len(y), "b": p.mean(axis=0)}
