"""Readers of the user's files: a module for each format, and one table.

A reader gets the path on this host and its options, and gives a `Dataset`. Whatever is wrong with a
file is a UserCodeError that names the file and, where there are lines, the line.
"""
