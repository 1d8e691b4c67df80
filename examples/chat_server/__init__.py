"""A thread and message server that encrypts with progressdb-kms. To be copied and changed; see README.md.

``app`` (HTTP) -> ``threads`` (what a request does), ``rotation`` (what goes on in the background) -> ``keys``
(which key a thread has) -> ``cipher`` (envelopes and AAD), ``store`` (SQLite).
"""
