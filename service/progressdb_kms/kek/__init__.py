"""Sources of key-encryption keys, one module each, and the command that makes a KEK file."""
