"""What a host, an address or a URL means."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hostname(url: str) -> str | None:
    """The host of a URL; None if it has none, or is no URL."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def on_loopback(url: str) -> bool:
    """Whether a URL means the machine that uses it."""
    return is_loopback(hostname(url))
