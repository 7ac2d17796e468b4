"""What the doctor finds on this machine: secret, state folder, daemons, versions, certificate.

Functions named ``look_…`` look and raise nothing; those named ``judge_…`` are pure.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from keeper import connect, tls, words
from keeper.doctor.dial import Met, dial, why
from keeper.doctor.finding import Finding, problem
from keeper.exits import WrongUsage
from operations.hosts import VERSION
from wire.secret import Secret

DAY_S = 86_400
RENEW_DAYS = 30.0


# -- the secret ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SecretSeen:
    """The cluster secret of this machine's user.

    :param where: its file, or ``HIVE_SECRET``
    :param error: why it cannot be used, in whole sentences
    """

    where: str
    secret: Secret | None = None
    error: str = ""


def look_for_secret() -> SecretSeen:
    """Where keeper and daemons look: ``HIVE_SECRET``, then the file."""
    where = "HIVE_SECRET" if os.environ.get("HIVE_SECRET") else str(connect.secret_file())
    try:
        return SecretSeen(where, connect.own_secret())
    except WrongUsage as error:
        return SecretSeen(where, error=error.message)


def judge_secret(seen: SecretSeen) -> Finding:
    if seen.error:
        return problem(seen.error)
    if seen.secret is None:
        return Finding(
            f"There is no cluster secret ({seen.where}). One machine alone needs none; for "
            "several, make one with 'hive secret new'."
        )
    return Finding(f"This machine belongs to cluster {seen.secret.cluster_id} ({seen.where}).")


# -- the state folder ----------------------------------------------------------------------------

Folder = Literal["writable", "not_writable", "no_folder", "creatable", "not_creatable"]


def look_at_folder(path: Path) -> Folder:
    """Whether records and logs can be written to a folder, or it can be made."""
    if path.exists():
        if not path.is_dir():
            return "no_folder"
        return "writable" if os.access(path, os.W_OK | os.X_OK) else "not_writable"
    above = next(parent for parent in path.absolute().parents if parent.exists())
    usable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    return "creatable" if usable else "not_creatable"


def judge_folder(path: Path, seen: Folder) -> Finding:
    choose = "or choose another with --state-dir or HIVE_STATE_DIR."
    match seen:
        case "writable":
            return Finding(f"State and logs are in {path}.")
        case "creatable":
            return Finding(f"State and logs will be in {path}, which is not there yet.")
        case "not_writable":
            return problem(f"{path} cannot be written. Give it to this user, {choose}")
        case "no_folder":
            return problem(f"{path} is no folder. Move it away, {choose}")
        case "not_creatable":
            return problem(f"{path} is not there and cannot be made. Make it, {choose}")


# -- daemons -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DaemonsSeen:
    """The daemons that this machine's commands would ask.

    :param met: the named one, or both on loopback, the queen's place first
    :param keyed: those that have proven themselves, asked again with ``HIVE_API_KEY``
    """

    named: bool
    met: Sequence[Met]
    keyed: Sequence[Met] = ()


async def look_for_daemons(url: str | None, secret: Secret | None) -> DaemonsSeen:
    """:raises WrongUsage: the URL is none"""
    urls = (connect.checked_url(url),) if url else connect.LOOPBACK
    key = connect.api_key()
    first = key if secret is None else None
    met = await asyncio.gather(*(dial(one, secret, first) for one in urls))
    answering = [one.url for one in met if one.well] if key and secret else []
    keyed = await asyncio.gather(*(dial(one, None, key) for one in answering))
    return DaemonsSeen(url is not None, met, keyed)


def judge_daemons(seen: DaemonsSeen, cluster_id: str | None) -> list[Finding]:
    """:param cluster_id: of the secret that they had to prove; None without one"""
    if not seen.named and all(one.trouble == "refused" for one in seen.met):
        return [
            problem(
                "No Hive daemon answers on this machine (tried ports 7833 and 7835). Start one "
                "with 'hive up', or name one elsewhere with --url."
            )
        ]
    findings = [_judge_daemon(one, seen.named, cluster_id) for one in seen.met]
    findings += [
        problem(f"The {one.role or 'daemon'} at {one.url} refuses HIVE_API_KEY. {why(one)}")
        for one in seen.keyed
        if not one.well
    ]
    return findings


def _judge_daemon(met: Met, named: bool, cluster_id: str | None) -> Finding:
    if met.well:
        who = "queen" if met.role == "queen" else f"hive {met.id}"
        proof = f" and has proven to be of cluster {cluster_id}" if cluster_id else ""
        return Finding(f"The {who}, version {met.version}, answers at {met.url}{proof}.")
    if met.trouble == "refused" and not named:
        what = "queen" if met.url == connect.LOOPBACK[0] else "hive"
        return Finding(f"No {what} runs on this machine: nobody listens at {met.url}.")
    return problem(f"{met.url} cannot be used. {why(met)}")


# -- versions ------------------------------------------------------------------------------------


def judge_versions(seen: Mapping[str, str]) -> Finding:
    """:param seen: the version of each daemon, by its name"""
    if set(seen.values()) <= {VERSION}:
        return Finding(f"Version {VERSION} everywhere.")
    bearers: dict[str, list[str]] = {VERSION: ["this command"]}
    for who, version in seen.items():
        bearers.setdefault(version, []).append(who)
    listed = "; ".join(f"{version}: {', '.join(who)}" for version, who in bearers.items())
    return problem(f"Versions differ. {listed}. Install the newest everywhere and start again.")


def versions(daemons: Iterable[Met], hives: Mapping[str, str]) -> dict[str, str]:
    """Daemons and their versions, by name.

    :param hives: versions by hive id; empty where it is not known
    """
    found = {
        ("the queen" if one.role == "queen" else one.id): one.version for one in daemons if one.well
    }
    return {who: version for who, version in {**found, **hives}.items() if version}


# -- the certificate -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TlsSeen:
    """The certificate and key in the state folder.

    :param days_left: None if there is no certificate, or it cannot be read
    :param key: whether others may read it
    """

    cert: Path
    present: bool
    days_left: float | None = None
    key: Literal["private", "open", "missing"] = "missing"


def look_at_tls(folder: Path, now: datetime) -> TlsSeen:
    """:param now: with a time zone"""
    from cryptography import x509

    cert, key = folder / tls.CERT_FILE, folder / tls.KEY_FILE
    if not cert.exists():
        return TlsSeen(cert, present=False)
    try:
        ends = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
        days_left = (ends - now.astimezone(UTC)).total_seconds() / DAY_S
    except (OSError, ValueError):
        days_left = None
    try:
        shared = key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except OSError:
        return TlsSeen(cert, True, days_left)
    return TlsSeen(cert, True, days_left, "open" if shared else "private")


def judge_tls(seen: TlsSeen) -> list[Finding]:
    key = seen.cert.with_name(tls.KEY_FILE)
    anew = "Make a new one with 'hive tls new --force' and start the daemons again."
    if not seen.present:
        return [Finding("There is no TLS certificate in the state folder.")]
    findings = []
    if seen.days_left is None:
        findings.append(problem(f"{seen.cert} is no certificate that can be read. {anew}"))
    elif seen.days_left < 0:
        findings.append(problem(f"The certificate {seen.cert} has expired. {anew}"))
    else:
        left = words.count(int(seen.days_left), "day")
        said = f"The certificate {seen.cert} is valid for {left} more."
        soon = seen.days_left < RENEW_DAYS
        findings.append(problem(f"{said} {anew}") if soon else Finding(said))
    if seen.key == "missing":
        findings.append(problem(f"Its key {key} is not there. {anew}"))
    elif seen.key == "open":
        findings.append(
            problem(f"Its key {key} is open to other users. Close it with 'chmod 600 {key}'.")
        )
    return findings
