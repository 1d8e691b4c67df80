"""Why a TLS handshake failed, in the few words that a metric can have."""

from __future__ import annotations

import ssl
import time

from progressdb_kms.transport.identity import UNREADABLE, IdentityRefused
from progressdb_kms.transport.trust import Chain, ClientTrust, chain_of

_SAYS = {
    "expired": "it, or a CA above it, has expired",
    "revoked": "it is revoked",
    "unknown_ca": "its CA is not trusted any more",
    "no_crl": "its issuer is not in tls.client_ca, so that nothing says what that has revoked; put it there",
    "stale_crl": "tls.client_crl is past its next update, and tls.require_current_crl is set",
}
# Verify results of OpenSSL's x509_vfy.h.
_VERIFY = {
    2: "unknown_ca",  # unable to get issuer certificate
    7: "unknown_ca",  # signature does not fit: another CA of the same name
    9: "not_yet_valid",
    10: "expired",
    18: "self_signed",
    19: "unknown_ca",  # a self-signed certificate in the chain that is not one of ours
    20: "unknown_ca",  # unable to get local issuer certificate
    21: "unknown_ca",  # unable to verify the first certificate
    26: "wrong_usage",
    79: "unknown_ca",  # invalid CA certificate in the chain
}


def trusted_chain(connection: ssl.SSLObject, trust: ClientTrust) -> Chain:
    """Return the chain of a peer whose handshake has just ended.

    Raises:
        IdentityRefused: It is not, or not any more, to be trusted.
    """
    try:
        chain = chain_of(connection)
    except UNREADABLE as error:
        raise IdentityRefused("identity", "a certificate of its chain can't be read") from error
    if reason := trust.why_not(chain, time.time()):
        raise IdentityRefused(reason, _SAYS[reason])
    return chain


def handshake_reason(error: Exception) -> str:
    """Return the reason, as ``TransportEvents.handshake_refused`` takes it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, "other")
    if isinstance(error, ssl.SSLError):
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return "no_certificate"
        # An alert is the peer's judgement of us; anything else is not TLS 1.3 as it has to be.
        return "other" if "ALERT" in (error.reason or "") else "protocol"
    if isinstance(error, TimeoutError) or "taking longer" in str(error):
        return "timeout"
    return "other"
