"""``hive tls new``: a certificate that this machine signs for itself.

It stands for this machine alone and signs no others, so whoever trusts it trusts nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeper.command import Json, given
from keeper.daemons import StateDir
from keeper.exits import WrongUsage
from keeper.output import Fields, Output
from operations.errors import HiveError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.x509 import ExtensionType

CERT_FILE = "tls-cert.pem"
KEY_FILE = "tls-key.pem"
DAYS = 825  # the longest that Apple's systems accept
LONGEST_COMMON_NAME = 64  # RFC 5280, ub-common-name
CLOCKS_DIFFER = timedelta(hours=1)

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")

Name = str | IPv4Address | IPv6Address
"""What a caller dials: a DNS name or an address."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key.

    :param cert: PEM
    :param key: PEM of PKCS #8, not encrypted
    :param fingerprint: SHA-256 of the certificate's DER, 32 bytes
    """

    cert: bytes
    key: bytes
    fingerprint: bytes
    names: Sequence[Name]
    not_after: datetime


@dataclass(frozen=True)
class File:
    """A file to be written. ``mode``: its permission bits, whatever the umask."""

    path: Path
    content: bytes
    mode: int


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("new")(new)


def new(
    ctx: typer.Context,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME_OR_ADDRESS",
            help="Another name of this machine; may be repeated.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[
        int, typer.Option(metavar="DAYS", min=1, max=36500, help="How long it is valid.")
    ] = DAYS,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to put it.", show_default="the state folder"),
    ] = None,
    state_dir: StateDir = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace the one that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a certificate and a key, so that nobody on the LAN reads along.

    It holds for localhost, this machine's name and IPv4 addresses, and what --host adds.
    """
    from keeper import connect

    given_names = [parse_host(text) for text in host or ()]
    names = own_names(socket.gethostname(), _addresses(), given_names)
    folder = (out or state_dir or connect.state_dir()).absolute()
    cert, key = folder / CERT_FILE, folder / KEY_FILE
    pair = make(names, days, datetime.now(UTC))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not force:
            _refuse_to_overwrite([cert, key])
        save([File(key, pair.key, 0o600), File(cert, pair.cert, 0o644)], replace=force)
    except OSError as error:
        raise HiveError(
            f"{folder} takes no certificate: {error.strerror}. Choose another with --out.",
            code="cannot_write",
        ) from None
    _tell(Output(as_json or given(ctx).as_json), pair, cert, key)


def parse_host(text: str) -> Name:
    """:raises WrongUsage: neither a DNS name nor an address that somebody could dial"""
    with suppress(ValueError):
        address = ip_address(text)
        if address.is_unspecified or address.is_multicast or "%" in text:
            raise WrongUsage(
                f"--host {text} is no address that callers can dial from everywhere. "
                "Give one that this machine has on the LAN.",
                param="host",
            )
        return address
    labels = text.removesuffix(".").split(".")
    well_formed = all(_LABEL.fullmatch(label) for label in labels)
    if not well_formed or len(text) > 253 or labels[-1].isdigit():
        raise WrongUsage(
            f"--host {text[:80]!r} is neither a host name nor an address. Give it bare, as in "
            "gpu-0.lab or 192.168.1.5: no scheme, no port, names beyond ASCII as xn--….",
            param="host",
        )
    return ".".join(labels).lower()


def own_names(hostname: str, addresses: Iterable[Name], more: Iterable[Name]) -> list[Name]:
    """Every name of a machine once, its own before ``more``; a hostname that is none is left out.

    :param hostname: as the system gives it, with or without a domain
    """
    names: list[Name] = ["localhost", ip_address("127.0.0.1"), ip_address("::1")]
    with suppress(WrongUsage):
        full = parse_host(hostname)
        if isinstance(full, str):
            short = full.partition(".")[0]
            names += [full, short, f"{short}.local"]
    return list(dict.fromkeys([*names, *addresses, *more]))


def make(names: Sequence[Name], days: int, now: datetime) -> Pair:
    """A self-signed certificate of an EC P-256 key for these names.

    :param days: from ``now`` less an hour, because clocks differ
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    own = next((n for n in names if isinstance(n, str) and n != "localhost"), "localhost")
    common_name = f"hive {own}"[:LONGEST_COMMON_NAME]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    begin = now - CLOCKS_DIFFER
    builder = x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=begin,
        not_valid_after=begin + timedelta(days=days),
    )
    for extension, critical in _extensions(names, key.public_key()):
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    return Pair(
        cert=certificate.public_bytes(pem),
        key=key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        fingerprint=certificate.fingerprint(hashes.SHA256()),
        names=names,
        not_after=certificate.not_valid_after_utc,
    )


def _extensions(
    names: Sequence[Name], key: EllipticCurvePublicKey
) -> list[tuple[ExtensionType, bool]]:
    """What the certificate says of itself, and which of it no reader may ignore."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    alternatives = [
        x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name) for name in names
    ]
    handshakes_only = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    own = x509.SubjectKeyIdentifier.from_public_key(key)
    return [
        (x509.SubjectAlternativeName(alternatives), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (handshakes_only, True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (own, False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False),
    ]


def save(files: Sequence[File], *, replace: bool) -> None:
    """Write all files or none; without ``replace``, none that is there already.

    :raises OSError: one of them cannot be written, or exists
    """
    targets = [
        file.path.with_name(f".{file.path.name}.{os.getpid()}") if replace else file.path
        for file in files
    ]
    written: list[Path] = []
    try:
        for file, target in zip(files, targets, strict=True):
            _create(target, file.content, file.mode)
            written.append(target)
        if replace:
            for file, target in zip(files, targets, strict=True):
                target.replace(file.path)
    except BaseException:
        for target in written:
            target.unlink(missing_ok=True)
        raise


def _create(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask takes away
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _refuse_to_overwrite(paths: Iterable[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise HiveError(
                f"{path} exists. Use it, or make a new pair with --force; then daemons have to "
                "start again, and callers have to trust the new certificate.",
                code="file_exists",
            )


def _addresses() -> list[Name]:
    """The IPv4 addresses of this machine's interfaces."""
    import ifaddr

    found = (ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4)
    return [IPv4Address(address) for address in found]


def _tell(out: Output, pair: Pair, cert: Path, key: Path) -> None:
    names = [str(name) for name in pair.names]
    if out.as_json:
        out.document(
            {
                "tls_cert": str(cert),
                "tls_key": str(key),
                "sha256": pair.fingerprint.hex(),
                "names": names,
                "not_after": pair.not_after.isoformat(),
            }
        )
        return
    out.fields(
        Fields(
            [
                ("certificate", str(cert)),
                ("key", str(key)),
                ("SHA-256", pair.fingerprint.hex(":").upper()),  # as openssl and browsers show it
                ("names", ", ".join(names)),
                ("valid until", f"{pair.not_after:%Y-%m-%d}"),
            ]
        )
    )
    # Written, not said: a terminal must not break the lines, for they are there to be copied.
    out.write(next_steps(shlex.quote(str(cert)), shlex.quote(str(key))))


def next_steps(cert: str, key: str) -> str:
    """What to do with the two files, given their paths as a shell reads them."""
    return f"""
Start this machine's daemons with it; the key stays here:
  hive queen --tls-cert {cert} --tls-key {key}
  hive agent --tls-cert {cert} --tls-key {key}

Callers trust it, in place of the usual authorities, by a copy of the certificate:
  SSL_CERT_FILE={cert}
Node, beside the usual authorities:
  NODE_EXTRA_CA_CERTS={cert}
"""
