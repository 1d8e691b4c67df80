"""What the service does, as functions over ports: encryption, the life of keys, the KEK registry."""
