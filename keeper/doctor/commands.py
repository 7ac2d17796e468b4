"""``hive doctor`` and ``hive doctor net``: what is well on this machine and its LAN, what is not.

They need no daemon. What is found is told as findings (:mod:`keeper.doctor.finding`), which
:mod:`keeper.doctor.machine` and :mod:`keeper.doctor.verdict` make.
"""

from __future__ import annotations

import asyncio
import os
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeper import complete, words
from keeper.command import Given, Json, Url, endings, given
from keeper.doctor.finding import Finding
from keeper.output import Output
from operations.errors import HiveError

if TYPE_CHECKING:
    from keeper.doctor.net import Seen
    from wire.secret import Secret

SECONDS = 3.0

Interface = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Listen on this network interface; may be repeated.",
        show_default="those that daemons use",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        min=0.1,
        max=600,
        help="How long to listen for hives; some need 2 seconds to be heard.",
        show_default=f"{SECONDS:g}",
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module to an app of their own."""
    app.callback(invoke_without_command=True)(doctor)
    app.command("net")(net)


def doctor(
    ctx: typer.Context,
    interface: Interface = None,
    seconds: Seconds = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say what is well on this machine and its network, and what is not.

    Exit code 1 if there are problems.
    """
    before = given(ctx)
    ctx.obj = Given(url or before.url, before.hive, as_json or before.as_json)
    if ctx.invoked_subcommand is None:
        report = Report(Output(ctx.obj.as_json))
        with endings():
            asyncio.run(_all(report, _named(ctx.obj.url), interface or (), seconds or SECONDS))
        report.end()


def net(
    ctx: typer.Context,
    hives: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HIVE",
            help="Dial these, too: ids, hosts or URLs.",
            autocompletion=complete.hives,
            show_default=False,
        ),
    ] = None,
    interface: Interface = None,
    seconds: Seconds = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say which hives are found and which are not, and why: interfaces, multicast, answers."""
    before = given(ctx)
    earlier = ctx.parent.params if ctx.parent else {}
    names = [*(hives or ()), *([before.hive] if before.hive else ())]
    report = Report(Output(as_json or before.as_json))
    with endings():
        asyncio.run(
            _net_alone(
                report,
                _named(url or before.url),
                names,
                interface or earlier.get("interface") or (),
                seconds or earlier.get("seconds") or SECONDS,
            )
        )
    report.end()


def _named(url: str | None) -> str | None:
    return url or os.environ.get("HIVE_QUEEN_URL") or None


class Report:
    """Tells findings as they come, and how it all ends."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self._problems: list[str] = []
        self._values: dict[str, Any] = {}
        self._begun = False

    def section(self, title: str, findings: Sequence[Finding]) -> None:
        self._problems += [finding.text for finding in findings if not finding.well]
        if self.out.as_json or not findings:
            return
        if self._begun:
            self.out.say("")
        self._begun = True
        self.out.say(title, style="bold")
        for finding in findings:
            style = "" if finding.well else "yellow"
            self.out.say(self._line(finding), style=style, block=True)

    def add(self, **values: Any) -> None:
        """Values for JSON."""
        self._values |= values

    def end(self) -> None:
        """:raises HiveError: there were problems"""
        problems = self._problems
        if self.out.as_json:
            self.out.document({"ok": not problems, "problems": problems, **self._values})
        elif not problems:
            self.out.say("")
            self.out.say("All is well.", style="green")
        if problems:
            raise HiveError(
                f"The doctor found {words.count(len(problems), 'problem')}. Mend what is marked "
                "and ask again.",
                code="check_failed",
            )

    def _line(self, finding: Finding) -> str:
        line = words.printable(f"{'·' if finding.well else '!'} {finding.text}")
        if not self.out.rich_out:
            return line
        return textwrap.fill(
            line,
            self.out.console.width,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )


async def _all(report: Report, url: str | None, interfaces: Sequence[str], seconds: float) -> None:
    from keeper import connect
    from keeper.doctor import machine

    secret = machine.look_for_secret()
    shared = secret.secret
    folder = connect.state_dir()
    writable = machine.look_at_folder(folder)
    tls = machine.look_at_tls(folder, datetime.now(UTC))
    daemons = await machine.look_for_daemons(url, shared)
    report.section(
        "This machine",
        [
            machine.judge_secret(secret),
            machine.judge_folder(folder, writable),
            *machine.judge_tls(tls),
            *machine.judge_daemons(daemons, shared.cluster_id if shared else None),
        ],
    )
    report.add(
        secret={"cluster_id": shared.cluster_id if shared else None, "where": secret.where},
        state_dir=str(folder),
        tls={"cert": str(tls.cert), "present": tls.present, "days_left": tls.days_left},
        daemons=[_daemon(met) for met in daemons.met],
    )
    hives = await _hives(report, url, shared, interfaces, seconds)
    found = machine.versions(daemons.met, hives)
    if found:
        report.section("Versions", [machine.judge_versions(found)])
    report.add(versions=found)


def _daemon(met: Any) -> dict[str, Any]:
    from keeper.doctor.dial import why

    told = {"role": met.role, "id": met.id, "version": met.version, "why": why(met)}
    return {"url": met.url, **{name: value for name, value in told.items() if value}}


async def _hives(
    report: Report,
    url: str | None,
    shared: Secret | None,
    interfaces: Sequence[str],
    seconds: float,
) -> dict[str, str]:
    """Look at the LAN, if there is a secret; versions by hive id, as far as they are known."""
    from keeper.doctor import net as network

    if shared is None:
        queen = await network.ask_queen(url, None)
        return {k.hive_id: k.version for k in (queen.known if queen else ()) if k.online}
    seen = await _look(report, shared, url, (), interfaces, seconds, with_queen=False)
    return {hive.name: hive.best.version for hive in network.hives(seen) if hive.answers}


async def _net_alone(
    report: Report,
    url: str | None,
    names: Sequence[str],
    interfaces: Sequence[str],
    seconds: float,
) -> None:
    from keeper import connect

    await _look(report, connect.own_secret(), url, names, interfaces, seconds)


async def _look(
    report: Report,
    secret: Secret | None,
    url: str | None,
    names: Sequence[str],
    interfaces: Sequence[str],
    seconds: float,
    *,
    with_queen: bool = True,
) -> Seen:
    from keeper.doctor import net as network
    from keeper.doctor import verdict

    report.out.hint(f"Listening for hives for {seconds:g} s …")
    seen = await network.look(secret, url=url, names=names, wanted=interfaces, seconds=seconds)
    for title, findings in verdict.judge(seen, with_queen=with_queen):
        report.section(title, findings)
    report.add(**verdict.document(seen))
    return seen
