"""The HTTP API: a table of routes over the use cases, its models, its one map from errors to answers."""
