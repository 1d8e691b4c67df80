"""``dev``: everything that the service needs, made under one directory, and the service itself."""
