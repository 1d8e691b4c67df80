"""progressdb-kms: a key management service with one data key per thread, and its client."""

__version__ = "0.1.0"
