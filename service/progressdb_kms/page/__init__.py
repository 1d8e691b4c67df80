"""The page for operators: what the API tells, for a browser with a client certificate. Read-only."""
