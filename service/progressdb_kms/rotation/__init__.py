"""The rotation job: what ``progressdb-kms rotate`` runs, by hand or from a CronJob."""
