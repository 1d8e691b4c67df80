"""The provider without a service: the same use cases over a store in this process's memory.

For development and tests. Keys end with the provider, nothing is audited, and whoever can read the process's
memory can read the KEK; a service keeps both away from the server that uses it. The only module of the client
that needs more than the base wheel: ``pip install progressdb-kms[embedded]``.
"""

from progressdb_kms.client.embedded.providers import EmbeddedProvider, SyncEmbeddedProvider

__all__ = ["EmbeddedProvider", "SyncEmbeddedProvider"]
