"""A GRU reads a string of digits, another writes it backwards. Only torch is needed."""

from torch import nn
from torch.nn.functional import cross_entropy

PAD, START, END, DIGIT = 0, 1, 2, 3  # a digit d is DIGIT + d
WORDS, LENGTH = 13, 6  # digits at most in a string


class Reverser(nn.Module):
    def __init__(self, width=96):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.encoder = nn.GRU(32, width, batch_first=True)
        self.decoder = nn.GRU(32, width, batch_first=True)
        self.scores = nn.Linear(width, WORDS)

    def forward(self, x):  # (n, LENGTH) to read, then (n, LENGTH + 1) that was written before
        source, written = self.embedding(x[:, :LENGTH]), self.embedding(x[:, LENGTH:])
        _, thought = self.encoder(source)  # all that the decoder learns of the source
        states, _ = self.decoder(written, thought)
        return self.scores(states).transpose(1, 2)  # (n, WORDS, LENGTH + 1)


def loss(outputs, y):
    return cross_entropy(outputs, y, ignore_index=PAD)


def metrics(outputs, y):
    right = (outputs.argmax(dim=1) == y)[y != PAD]
    return {"accuracy": right.double().mean(), "perplexity": loss(outputs, y).exp()}
