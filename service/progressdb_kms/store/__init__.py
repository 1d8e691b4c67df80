"""The stores: Redis for a service, memory for development and tests. Both keep the promises of ``ports``."""
