"""The first start in a cluster, and renewals: makes the Secrets that are missing, and nothing else.

``config`` says what is wanted, ``secrets`` is the API, ``passwords``, ``certificates`` and ``kek`` decide
what to write, each from what is there; ``run`` goes through them.
"""
