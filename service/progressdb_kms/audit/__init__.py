"""Adapters of the ``AuditLog`` port."""
