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


def is_address(host: str | None) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def checked_url(url: str) -> str:
    """A daemon's URL in its one spelling: scheme, host and port, loopback by number, no slash.

    :raises ValueError: it is none, or says more than that
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"'{url}' is no URL of a daemon; give e.g. http://192.168.1.20:7835")
    if parts.path not in ("", "/") or parts.query or parts.fragment or not url.isascii():
        raise ValueError(f"'{url}' says more than scheme, host and port")
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    try:
        port = parts.port
        host.encode("idna")
    except (ValueError, UnicodeError):
        raise ValueError(f"'{url}' has no host or port that can be dialled") from None
    if any(c.isspace() for c in url) or port == 0:
        raise ValueError(f"'{url}' has no host or port that can be dialled")
    return url_at(parts.scheme, host, port)


def url_at(scheme: str, host: str, port: int | None) -> str:
    """``http://host:port``, an IPv6 address in brackets; the scheme's own port if None."""
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port or (443 if scheme == 'https' else 80)}"


def hostname(url: str) -> str | None:
    """The host of a URL; None if it has none, or is no URL."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def on_loopback(url: str) -> bool:
    """Whether a URL means the machine that uses it."""
    return is_loopback(hostname(url))
