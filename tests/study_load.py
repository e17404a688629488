"""Many raters voting at once over HTTP, each through a connection of its own, with all that a bad network does."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from user_study.design import Choice
from user_study.links import make_link
from user_study.study import Study
from user_study.votes import VoteStore

CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both-bad")
CLIENT = {"input": "key", "viewport": "1280x860", "pixel_ratio": 1.0, "language": "en", "response_ms": 900}


@dataclass
class Load:
    """Raters that vote until their time is over; ``acknowledged`` is what the server said it has recorded.

    pause: mean seconds between a rater's answer and the next vote. copies: each vote is sent so many times at once.
    """

    study: Study
    origin: str
    num_raters: int
    seconds: float
    pause: float = 0.0
    copies: int = 1
    acknowledged: dict[str, str] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    contradicted: int = 0
    failures: int = 0
    elapsed: float = 0.0

    def run(self) -> Load:
        """Let everybody join, then vote; returns itself."""
        asyncio.run(self._run())
        return self

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=1 + self.copies)
        clients = [httpx.AsyncClient(base_url=self.origin, timeout=60, limits=limits) for _ in range(self.num_raters)]
        gate = asyncio.Semaphore(8)
        turns = await asyncio.gather(*(self._join(client, gate) for client in clients))
        started = time.perf_counter()
        ends = started + self.seconds
        await asyncio.gather(
            *(self._rate(client, turn, ends, r) for r, (client, turn) in enumerate(zip(clients, turns, strict=True)))
        )
        self.elapsed = time.perf_counter() - started
        await asyncio.gather(*(client.aclose() for client in clients))

    async def _join(self, client: httpx.AsyncClient, gate: asyncio.Semaphore) -> dict[str, Any]:
        _, token = make_link(self.study.key, datetime.now(UTC) + timedelta(hours=1))
        async with gate:
            await client.get(f"/r/{token}")
            await client.post("/api/consent", json={"language": "en"})
            answer = await client.post("/api/begin")
        answer.raise_for_status()
        return dict(answer.json())

    async def _rate(self, client: httpx.AsyncClient, turn: dict[str, Any], ends: float, r: int) -> None:
        rng = random.Random(r)
        await asyncio.sleep(rng.uniform(0, self.pause))
        number = 0
        while turn["items"] and time.perf_counter() < ends:
            body = {
                "key": f"load-{r:05d}-{number:06d}-{rng.getrandbits(32):08x}",
                "assignment_id": turn["items"][0]["assignment_id"],
                "choices": {"overall": rng.choice(CHOICES)},
                **CLIENT,
            }
            answers = await asyncio.gather(*(self._send(client, body) for _ in range(self.copies)))
            recorded = {str(answer["recorded"]) for answer in answers}
            self.contradicted += len(recorded) > 1
            self.acknowledged[body["assignment_id"]] = answers[0]["recorded"]["choices"]["overall"]
            turn = answers[-1]["turn"]
            number += 1
            if self.pause:
                await asyncio.sleep(min(rng.expovariate(1 / self.pause), ends - time.perf_counter()))

    async def _send(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """Send until there is an answer, as the page's outbox does."""
        while True:
            begun = time.perf_counter()
            try:
                answer = await client.post("/api/vote", json=body)
            except httpx.TransportError:
                self.failures += 1
                await asyncio.sleep(0.3)
                continue
            if answer.status_code == 429:
                await asyncio.sleep(1)
                continue
            answer.raise_for_status()
            self.latencies.append(time.perf_counter() - begun)
            return dict(answer.json())

    def lost_or_doubled(self, votes: VoteStore) -> tuple[int, int]:
        """Acknowledged votes that are not stored as acknowledged, and stored votes that nobody was told of twice."""
        rows = votes.votes()
        stored = {row.assignment_id: row.choices["overall"] for row in rows}
        lost = sum(stored.get(name) != choice for name, choice in self.acknowledged.items())
        doubled = len(rows) - len(stored) + len(rows) - len({(row.rater, row.pair_id, row.kind) for row in rows})
        return lost, doubled
