"""``python -m bench.peers``: install them all; say which there are, and why the others are not."""

from __future__ import annotations

from bench.peers import PEERS, Absent


def main() -> None:
    for peer in PEERS:
        try:
            peer.install()
            print(f"{peer.name} {peer.version()}", flush=True)
        except Absent as why:
            print(f"{peer.name} is skipped: {why}", flush=True)


if __name__ == "__main__":
    main()
