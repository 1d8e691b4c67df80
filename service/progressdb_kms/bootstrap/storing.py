"""The store's settings, as configured."""

from __future__ import annotations

from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.settings import Settings
from progressdb_kms.store.settings import StoreSettings


def store_settings(settings: Settings) -> StoreSettings:
    """Return the store adapter's settings; reads the password file.

    Raises:
        SettingsInvalid: The password file can't be read.
    """
    store = settings.store
    password = ""
    if store.password_file is not None:
        try:
            password = store.password_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsInvalid(f"can't read store.password_file {store.password_file}") from error
    tls = store.tls
    return StoreSettings(
        url=store.url,
        username=store.username or "",
        password=password,
        tls_ca=str(tls.ca) if tls else "",
        tls_cert=str(tls.cert) if tls and tls.cert else "",
        tls_key=str(tls.key) if tls and tls.key else "",
        connect_timeout=store.connect_timeout,
        command_timeout=store.command_timeout,
        durability=store.durability,
        attested_reason=store.attested_reason,
        allow_data_loss=store.allow_data_loss,
        min_replicas=store.min_replicas,
    )
