"""``hive tls new``: the certificate and key that it makes, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtensionOID
from typer.testing import CliRunner, Result

from keeper import tls
from keeper.exits import WrongUsage
from operations.errors import HiveError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    group = typer.Typer()
    tls.declare(group)
    made.add_typer(group, name="tls")
    return made


def run(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["tls", "new", *arguments])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def subject_names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    return [str(name.value) for name in found.value]


async def greet(folder: Path, name: str, trusted: Path) -> str:
    """Shake hands with a server that shows the pair in ``folder``, as a caller who dials ``name``.

    :returns: what the server says
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(folder / tls.CERT_FILE, folder / tls.KEY_FILE)
    caller = ssl.create_default_context(cafile=str(trusted))
    caller.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=served)
    async with server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=caller, server_hostname=name
        )
        try:
            return (await reader.read()).decode()
        finally:
            writer.close()
            await writer.wait_closed()


# -- what it makes -----------------------------------------------------------------------------


def test_a_pair_holds_for_this_machine_and_the_names_given(
    app: typer.Typer, tmp_path: Path
) -> None:
    hosts = ("gpu-0.Lab.example.", "192.168.7.5", "fd00::7")
    ran = run(app, "--out", str(tmp_path), "--json", *(f"--host={host}" for host in hosts))
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    certificate = x509.load_pem_x509_certificate(Path(told["tls_cert"]).read_bytes())
    key = load_pem_private_key(Path(told["tls_key"]).read_bytes(), None)
    assert subject_names(certificate) == told["names"]
    assert {"localhost", "127.0.0.1", "::1"} <= set(told["names"])
    assert told["names"][-3:] == ["gpu-0.lab.example", "192.168.7.5", "fd00::7"]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert key.public_key() == certificate.public_key()
    assert told["sha256"] == certificate.fingerprint(hashes.SHA256()).hex()
    assert told["not_after"] == certificate.not_valid_after_utc.isoformat()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "gpu-0.lab", "192.168.7.5"])
async def test_callers_that_trust_the_certificate_reach_the_machine_by_any_of_its_names(
    app: typer.Typer, tmp_path: Path, name: str
) -> None:
    run(app, "--out", str(tmp_path), "--host=gpu-0.lab", "--host=192.168.7.5")
    assert await greet(tmp_path, name, tmp_path / tls.CERT_FILE) == "hello"


async def test_callers_refuse_another_name_and_another_certificate(
    app: typer.Typer, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    run(app, "--out", str(here))
    run(app, "--out", str(there))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        await greet(here, "gpu-1.lab", here / tls.CERT_FILE)
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed"):
        await greet(here, "localhost", there / tls.CERT_FILE)


def test_the_certificate_signs_no_others() -> None:
    made = tls.make(["localhost"], 1, NOW)
    extensions = x509.load_pem_x509_certificate(made.cert).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_it_is_valid_at_once_even_where_a_clock_is_slow_and_for_the_days_asked_for() -> None:
    certificate = x509.load_pem_x509_certificate(tls.make(["localhost"], 825, NOW).cert)
    assert certificate.not_valid_before_utc == NOW - tls.CLOCKS_DIFFER
    valid = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert valid == timedelta(days=825)


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [
        ("gpu-0", ["gpu-0", "gpu-0.local"]),
        ("GPU-0.lab.example", ["gpu-0.lab.example", "gpu-0", "gpu-0.local"]),
        ("localhost", ["localhost.local"]),
        ("Mia's box", []),
        ("10.0.0.1", []),
        ("", []),
    ],
)
def test_a_machine_is_known_by_its_name_as_far_as_that_is_one(
    hostname: str, expected: Sequence[str]
) -> None:
    address = ip_address("10.0.0.1")
    names = tls.own_names(hostname, [address, ip_address("127.0.0.1")], ["extra", "localhost"])
    assert [name for name in names if isinstance(name, str)] == ["localhost", *expected, "extra"]
    assert names.count(address) == names.count(ip_address("127.0.0.1")) == 1


def test_the_longest_name_makes_a_certificate_too() -> None:
    name = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    certificate = x509.load_pem_x509_certificate(tls.make([tls.parse_host(name)], 1, NOW).cert)
    assert subject_names(certificate) == [name]


# -- the files ---------------------------------------------------------------------------------


def test_only_the_owner_reads_the_key_whatever_the_umask(app: typer.Typer, tmp_path: Path) -> None:
    for number, umask in enumerate((0o000, 0o077)):
        folder = tmp_path / str(number) / "deep"
        before = os.umask(umask)
        try:
            assert run(app, "--out", str(folder)).exit_code == 0
        finally:
            os.umask(before)
        assert mode(folder / tls.KEY_FILE) == 0o600
        assert mode(folder / tls.CERT_FILE) == 0o644
        assert mode(folder) == 0o700


def test_the_pair_goes_where_the_state_is(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HIVE_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert run(app).exit_code == 0
    assert (tmp_path / "xdg" / "hive" / tls.KEY_FILE).exists()
    monkeypatch.setenv("HIVE_STATE_DIR", str(tmp_path / "variable"))
    assert run(app).exit_code == 0
    assert (tmp_path / "variable" / tls.KEY_FILE).exists()
    assert run(app, "--state-dir", str(tmp_path / "flag")).exit_code == 0
    assert (tmp_path / "flag" / tls.KEY_FILE).exists()


@pytest.mark.parametrize("name", [tls.CERT_FILE, tls.KEY_FILE])
def test_nothing_is_overwritten_without_force(app: typer.Typer, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    ran = run(app, "--out", str(tmp_path))
    assert isinstance(ran.exception, HiveError)
    assert "--force" in ran.exception.message
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"
    assert run(app, "--out", str(tmp_path), "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [tls.CERT_FILE, tls.KEY_FILE]
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        tmp_path / tls.CERT_FILE, tmp_path / tls.KEY_FILE
    )
    assert mode(tmp_path / tls.KEY_FILE) == 0o600


def test_a_pair_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    files = [
        tls.File(tmp_path / "one", b"new", 0o600),
        tls.File(tmp_path / "missing" / "two", b"new", 0o600),
    ]
    (tmp_path / "one").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        tls.save(files, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert (tmp_path / "one").read_bytes() == b"old"
    with pytest.raises(FileExistsError):
        tls.save(files, replace=False)
    assert (tmp_path / "one").read_bytes() == b"old"
    (tmp_path / "one").unlink()
    with pytest.raises(FileNotFoundError):
        tls.save(files, replace=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_told_in_a_sentence(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        ran = run(app, "--out", str(folder))
        assert isinstance(ran.exception, HiveError)
        assert "--out" in ran.exception.message


# -- what it says ------------------------------------------------------------------------------


def test_it_says_what_to_do_next(app: typer.Typer, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    ran = run(app, "--out", str(folder))
    cert, key = folder / tls.CERT_FILE, folder / tls.KEY_FILE
    digest = x509.load_pem_x509_certificate(cert.read_bytes()).fingerprint(hashes.SHA256())
    assert digest.hex(":").upper() in ran.stdout
    for daemon in ("queen", "agent"):
        assert f"  hive {daemon} --tls-cert '{cert}' --tls-key '{key}'\n" in ran.stdout
    assert f"SSL_CERT_FILE='{cert}'" in ran.stdout
    assert "PRIVATE KEY" not in ran.output


@pytest.mark.parametrize(
    "host",
    [
        *("", " ", ".", "-", "-a", "a-", "a..b", "a b", "a/b", "a:1", "*", "*.lab", "user@a"),
        *("http://gpu-0", "[::1]", "1.2.3", "256.1.1.1", "1.2.3.4/24", "0x7f.1", "::g", "bee.5"),
        *("0.0.0.0", "::", "224.0.0.1", "ff02::1", "fe80::1%eth0"),
        *("zürich.lab", "東京", "\ud83d", "a\nb", "a\x1b[31mb", "a\u202eb", "gpu０", "²"),
        *("a" * 64, "a." * 126 + "aa", "a" * 100_000),
    ],
    ids=lambda host: ascii(host)[:24],
)
def test_a_host_that_nobody_can_dial_is_wrong_usage(
    app: typer.Typer, tmp_path: Path, host: str
) -> None:
    ran = run(app, "--out", str(tmp_path), f"--host={host}")
    assert isinstance(ran.exception, WrongUsage), ran.output
    assert len(ran.exception.message) < 400
    assert ran.exception.message.isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("days", ["0", "-1", "36501", "1e3", "many"])
def test_days_beyond_reason_are_wrong_usage(app: typer.Typer, tmp_path: Path, days: str) -> None:
    ran = run(app, "--out", str(tmp_path), "--days", days)
    assert ran.exit_code == 2
    assert "--days" in ran.output
    assert not list(tmp_path.iterdir())
