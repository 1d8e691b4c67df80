"""Sockets, certificates and HTTP/1.1: the only package that knows them. The app sees ASGI and an Identity."""
