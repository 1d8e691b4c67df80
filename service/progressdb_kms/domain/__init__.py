"""Keys, envelopes, keyrings, policy and errors.

Pure: no I/O, no async, no environment, no clock. Whatever is random or timed is handed in.
"""
