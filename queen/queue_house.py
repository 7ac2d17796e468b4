"""Where the durable queue lives in a queen: opened when it is first asked for.

Most queens relay inference and never have a task. What the queue takes (its library, SQLAlchemy) is
loaded by the first request for it; at the start only where there is a queue already.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

from operations.errors import HiveError, Unavailable
from operations.tasks import QUEUE_FILE, QUEUE_KEY_FILE, Claim, RoleInfo
from queen.settings import QueenSettings
from wire.secret import Secret
from wire.serve import CannotStart

if TYPE_CHECKING:
    from hive_orchestration.machine.hives import Topic
    from hive_orchestration.queue import Queue
    from hive_orchestration.seal import Sealer
    from hive_orchestration.store import Store

RETRY_S: Final = 2.0
COUNT_S: Final = 10.0  # what waits is not counted more often, nor waited for longer than
COUNTING_S: Final = 2.0
QUEUED_S: Final = 0.5  # for ``GET /health``, which is asked for often, and must not wait

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """An open queue, and what it is made of.

    :param signing_key: of callbacks
    """

    queue: Queue
    store: Store
    sealer: Sealer
    signing_key: bytes


class Work(Protocol):
    """What goes on in a queen for her queue."""

    async def drain(self, deadline_s: float) -> None:
        """Begin nothing more; what has begun may finish until the deadline."""

    async def close(self) -> None:
        """End. Fine to call twice."""


class QueueHouse:
    """Belongs to the queen's event loop."""

    def __init__(
        self,
        settings: QueenSettings,
        secret: Secret | None,
        work: Callable[[Opened], Sequence[Work]] = lambda opened: (),
    ) -> None:
        """:param work: begins what is done for the queue as long as it is open"""
        self._settings = settings
        self._secret = secret
        self._begin = work
        self._work: Sequence[Work] = ()
        self._lock = asyncio.Lock()
        self._trying: asyncio.Task[None] | None = None
        self._closed = False
        self._hives: dict[str, str] = {}  # the instance of each, by its id
        self._telling = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._queued = 0
        self._queued_at = float("-inf")
        self._counted: list[RoleInfo] = []
        self._count_at = float("-inf")
        self.opened: Opened | None = None
        self.stopping = asyncio.Event()
        """Set when the queen begins to stop: nobody is kept waiting any more."""

    async def start(self) -> None:
        """Open it, if there is one. A database that is away is waited for in the background.

        :raises CannotStart: it will never open
        """
        file = self._settings.state_dir / QUEUE_FILE
        if self._settings.database is None and not file.exists():
            return
        try:
            await self.open()
        except Unavailable as error:
            log.warning("%s Until then the queue's routes answer 503.", error.message)
            self._trying = asyncio.get_running_loop().create_task(self._try_on())
        except HiveError as error:
            raise CannotStart(error.message) from None

    async def queue(self) -> Queue:
        """:raises HiveError: it cannot be opened, and why"""
        return (await self.open()).queue

    async def open(self) -> Opened:
        """Opened by whoever asks first; see :meth:`queue`."""
        if self.opened is None:
            async with self._lock:
                if self.opened is None:
                    self.opened = await self._open()
                    self._work = self._begin(self.opened)
        return self.opened

    async def _open(self) -> Opened:
        if self._closed:
            raise stopping()
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Loading takes long enough for streams to stutter.
        await asyncio.to_thread(import_module, "hive_orchestration.queue")
        await asyncio.to_thread(import_module, "hive_orchestration.sqlite")
        from hive_orchestration.opening import open_store
        from hive_orchestration.queue import Queue
        from hive_orchestration.seal import sealer_for
        from queen.signing import signing_key

        key_file = self._settings.state_dir / QUEUE_KEY_FILE
        try:
            sealer = sealer_for(self._secret, key_file)
            signing = signing_key(self._settings, self._secret)
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"The key of the tasks' secrets cannot be had from {key_file} ({error}). Look at "
                "that file.",
                code="queue_unavailable",
            ) from None
        store = await open_store(self._settings.database or self._settings.state_dir / QUEUE_FILE)
        queue = Queue(store, sealer)
        queue.start()
        log.info("the queue is open: %s", getattr(store, "name", QUEUE_FILE))
        return Opened(queue, store, sealer, signing)

    async def _try_on(self) -> None:
        while self.opened is None:
            await asyncio.sleep(RETRY_S)
            try:
                await self.open()
            except HiveError as error:
                log.debug("%s", error.message)

    def give_back(self, claiming: asyncio.Future[list[Claim]]) -> None:
        """Nobody waits for these claims any more."""

        async def given() -> None:
            claiming.cancel()
            with contextlib.suppress(HiveError, asyncio.CancelledError):
                for claim in await claiming:
                    assert self.opened is not None
                    await self.opened.queue.release(claim.claim_id)

        self._in_background(given())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- what else is told -------------------------------------------------------------------

    def heard(
        self, hive_id: str, instance: str, watch: Callable[[Callable[[], None]], object]
    ) -> None:
        """A hive has been heard from; costs nothing while it is the same one.

        :param instance: new at each start of the hive
        :param watch: has a function called when it is gone
        """
        if self.opened is None or self._closed or self._hives.get(hive_id) == instance:
            return
        self._hives[hive_id] = instance
        watch(lambda: self._gone(hive_id, instance))
        self._tell("hive.joined", hive_id, instance)

    def _gone(self, hive_id: str, instance: str) -> None:
        if self._hives.get(hive_id) == instance:
            del self._hives[hive_id]
        if not self._closed:
            self._tell("hive.left", hive_id, instance)

    def _tell(self, topic: Topic, hive_id: str, instance: str) -> None:
        """An event that is nobody's own, after those told before it."""

        async def told() -> None:
            from hive_orchestration.machine.hives import seen

            async with self._telling:
                if self.opened is None:
                    return
                try:
                    await self.opened.store.write(lambda tx: seen(tx, topic, hive_id, instance))
                except HiveError:
                    if topic == "hive.joined":  # its next heartbeat tells it
                        self._hives.pop(hive_id, None)

        self._in_background(told())

    # -- what waits --------------------------------------------------------------------------

    async def queued(self) -> int:
        """How many tasks wait; as it was a moment ago, or when the database could last say so."""
        now = asyncio.get_running_loop().time()
        if self.opened is not None and now - self._queued_at >= QUEUED_S:
            from hive_orchestration.machine.reading import how_many_wait

            self._queued_at = now
            with contextlib.suppress(HiveError, TimeoutError):
                async with asyncio.timeout(QUEUED_S):
                    self._queued = await self.opened.store.read(how_many_wait)
        return self._queued

    @property
    def counted(self) -> list[RoleInfo]:
        """What waits and runs, as :meth:`count` last found it."""
        return self._counted

    async def count(self) -> None:
        """Count what waits, if that was not done a moment ago; not if the database is away."""
        now = asyncio.get_running_loop().time()
        if self.opened is None or now - self._count_at < COUNT_S:
            return
        self._count_at = now
        with contextlib.suppress(HiveError, TimeoutError):
            async with asyncio.timeout(COUNTING_S):
                self._counted = await self.opened.queue.roles(None)

    # -- stopping ----------------------------------------------------------------------------

    def stop(self) -> None:
        """The queen begins to stop. Fine to call twice."""
        self.stopping.set()

    async def drain(self, deadline_s: float) -> None:
        """What is done for the queue may finish until the deadline."""
        await asyncio.gather(*(work.drain(deadline_s) for work in self._work))

    async def close(self) -> None:
        """Fine to call twice."""
        self._closed = True
        self.stop()
        trying, self._trying = self._trying, None
        if trying is not None:
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)
        await asyncio.gather(*self._background, return_exceptions=True)
        async with self._lock:
            work, self._work = self._work, ()
            await asyncio.gather(*(one.close() for one in work))
            if self.opened is not None:
                await self.opened.queue.close()


def stopping() -> Unavailable:
    return Unavailable(
        "This queen is stopping. Ask another one, or again when she has started.", retry_after=1
    )


async def any_of(within_s: float, *events: asyncio.Event) -> None:
    """Return when one of them is set, or after a while."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
