"""Models and data: the built-in ones, and the adapters for the user's own functions.

Imports numpy and contract.
"""
