"""What runs on a host before anything was sent there: standard library only.

The launcher sends these modules as source text over the stream it opened, so they work on a host
that has only python3. Imports nothing of dsgd outside this package.
"""
