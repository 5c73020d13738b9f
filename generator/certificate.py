"""Certificates: who signs the manifests of our files.

A development certificate is made once and kept: it proves that a file is as this installation left it, and
nothing to anybody else. For the public, a certificate of an authority on the C2PA trust list goes into the settings.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from generator.settings import SigningSettings

_DAYS: Final = 3650
_CURVES: Final = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_ALLOWED_KEYS: Final = "EC (P-256, P-384, P-521), Ed25519, RSA of 2,048 bits or more"


class CertificateRefused(ValueError):
    """A certificate or key that cannot sign: a file that cannot be read, or two that do not belong together."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be used to sign creatives: {reason}. Nothing was published.")
        self.path = path


@dataclass(frozen=True)
class SigningIdentity:
    """What signs: the certificate with its issuers, the private key, both as PEM, and COSE's name of the algorithm.

    ``anchors`` are the certificates, PEM, by which its signatures are trusted again: the last of the chain.
    """

    chain: bytes
    private_key: bytes
    algorithm: str
    anchors: bytes


def load_identity(settings: SigningSettings, *, now_ms: int) -> SigningIdentity | None:
    """Return who signs, by the settings; None where nobody does.

    Parameters
    ----------
    settings
        Where certificate and key lie. A development certificate that is missing is made.
    now_ms
        The time, from which on a new certificate is valid, milliseconds since the Unix epoch.

    Raises
    ------
    CertificateRefused
        They cannot be read or do not belong together.
    """
    if settings.mode == "off":
        return None
    if settings.mode == "own":
        assert settings.certificate is not None
        assert settings.private_key is not None
        return _load(settings.certificate, settings.private_key)
    folder = settings.folder
    if not folder.exists():
        _make(folder, datetime.fromtimestamp(now_ms / 1000, UTC))
    return _load(folder / "certificate.pem", folder / "key.pem")


def trusted_anchors(settings: SigningSettings) -> bytes:
    """Return the certificates that signatures are trusted by, PEM: our own, and those that the settings add.

    Nothing is made: an installation that has not signed yet has none of its own.

    Raises
    ------
    CertificateRefused
        A file that the settings name cannot be read.
    """
    own = settings.folder / "certificate.pem" if settings.mode == "development" else settings.certificate
    found = b""
    if own is not None and (settings.mode == "own" or own.exists()):
        found += _last(own)
    if settings.trust_anchors is not None:
        found += _read(settings.trust_anchors)
    return found


def _load(certificate: Path, private_key: Path) -> SigningIdentity:
    chain, key_pem = _read(certificate), _read(private_key)
    anchors = _last(certificate)
    leaf = x509.load_pem_x509_certificates(chain)[0]
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateRefused(private_key, f"it holds no private key without a password ({error})") from error
    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in _CURVES:
            algorithm = _CURVES[key.curve.name]
        case ed25519.Ed25519PrivateKey():
            algorithm = "ed25519"
        case rsa.RSAPrivateKey() if key.key_size >= 2048:
            algorithm = "ps256"
        case _:
            raise CertificateRefused(private_key, f"its kind of key is not allowed; allowed are {_ALLOWED_KEYS}")
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise CertificateRefused(private_key, f"it is not the key of the first certificate in {certificate}")
    return SigningIdentity(chain, key_pem, algorithm, anchors)


def _last(path: Path) -> bytes:
    try:
        chain = x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise CertificateRefused(path, f"it holds no certificates in PEM ({error})") from error
    return chain[-1].public_bytes(Encoding.PEM)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateRefused(path, str(error)) from error


def _make(folder: Path, now: datetime) -> None:
    """Make an authority and a certificate of it; the authority's key is dropped, so it issues no other.

    C2PA lets nobody sign with a certificate that he issued himself.
    """
    authority_key, key = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    # The names differ between installations, so that nobody takes one's certificate for another's.
    number = secrets.token_hex(4)
    authority_name, name = _name(f"OSMF development authority {number}"), _name(f"OSMF development {number}")
    authority = (
        _builder(authority_name, authority_name, authority_key.public_key(), now)
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(_usage(signs=False, issues=True), critical=True)
        .sign(authority_key, None)
    )
    certificate = (
        _builder(name, authority_name, key.public_key(), now)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(_usage(signs=True, issues=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, None)
    )
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.mkdir(parents=True, mode=0o700)
        (beside / "certificate.pem").write_bytes(
            certificate.public_bytes(Encoding.PEM) + authority.public_bytes(Encoding.PEM)
        )
        with open(os.open(beside / "key.pem", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        beside.rename(folder)
    except OSError as error:
        if not (folder / "key.pem").exists():  # else another process was quicker, and its certificate is taken
            raise CertificateRefused(folder, str(error)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _usage(*, signs: bool, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(signs, False, False, False, False, issues, issues, False, False)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "OSMF"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ed25519.Ed25519PublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
