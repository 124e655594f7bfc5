"""Continuous batching: one thread owns the model and takes all running answers one token further at a time.

Prompts join as soon as there is room and answers leave as soon as they end; nobody waits for the longest answer of a
batch. transformers' own continuous batching cannot run the policy: its paged cache takes a batch of one packed row
(`PagedAttentionCache.update`, transformers 5.23), while the policy needs one row a stream, and its forward call carries
no argument of a request's own such as a strength.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qadapter.serving.api_errors import ApiError, internal_error, queue_full, shutting_down
from qadapter.serving.decoder import Decoder, RowBatch, joined
from qadapter.serving.jobs import Answer, Failure, Job
from qadapter.serving.metrics import Metrics
from qadapter.serving.sampling import Chosen, choose_tokens, with_logprobs
from qadapter.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

FAILURES_TO_WORRY = 3


class Prefill:
    """Prompts on their way into the batch, `budget` tokens at a time; shorter ones are padded at the left."""

    def __init__(self, jobs: Sequence[Job], batch: RowBatch, budget: int) -> None:
        self.jobs, self.batch = jobs, batch
        self.chunk = max(1, budget // len(jobs))  # columns
        self.columns = max(len(job.prompt_ids) for job in jobs)
        self.done = 0
        self.heard: list[list[Chosen]] = []  # of the last chunk: tokens of the prompts to be echoed

    def advance(self, decoder: Decoder) -> Tensor | None:
        """Feed the next chunk; the logits (P, V) after the prompts once they are complete."""
        start, self.done = self.done, min(self.done + self.chunk, self.columns)
        pads = [self.columns - len(job.prompt_ids) for job in self.jobs]
        chunk = [
            job.prompt_ids[max(0, start - pad) : max(0, self.done - pad)]
            for job, pad in zip(self.jobs, pads, strict=True)
        ]

        def score(column: int, logits: Tensor) -> None:
            self._score(start + column, logits)

        scored = self.jobs[0].scored
        # Nothing is known of a prompt's first token; what a chunk's last one makes of the next comes with this chunk.
        self.heard = [
            [Chosen(token, None, ()) for token in (part[: start <= pad] if scored else part)] if job.echo else []
            for job, part, pad in zip(self.jobs, chunk, pads, strict=True)
        ]
        return decoder.feed(self.batch, chunk, read=self.done == self.columns, watch=score if scored else None)

    def _score(self, column: int, logits: Tensor) -> None:
        """Hear what the policies make of their prompts' tokens, from the logits (P, C, V) before them."""
        for job, heard, own in zip(self.jobs, self.heard, logits, strict=True):
            first = column - (self.columns - len(job.prompt_ids))  # the place in the prompt; before it is padding
            seen = range(max(first, 0), min(first + len(own), len(job.prompt_ids) - 1))
            if seen:
                following = logits.new_tensor(job.prompt_ids[seen.start + 1 : seen.stop + 1], dtype=torch.long)
                own = own[seen.start - first : seen.stop - first]
                heard += with_logprobs(own, following, [job.top_logprobs] * len(seen))


class Engine:
    """Works on jobs until it is stopped. All methods may be called from any thread.

    Args:
        decoder: runs the model; used by the engine's thread only.
        settings: sizes of the batch and the queue.
        metrics: what to count.
    """

    def __init__(self, decoder: Decoder, settings: ServerSettings, metrics: Metrics) -> None:
        self._decoder, self._settings, self._metrics = decoder, settings, metrics
        self._news = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._prefill: Prefill | None = None
        self._batch: RowBatch | None = None
        self._rows: list[tuple[Job, Answer]] = []
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="qadapter-engine", daemon=True)
        metrics.watch("qadapter_running_answers", "Answers being decoded", lambda: self.running)
        metrics.watch("qadapter_waiting_prompts", "Prompts in the queue", lambda: self.waiting)

    # -- from outside ------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Answers being generated."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._waiting)

    @property
    def healthy(self) -> bool:
        """Whether steps run and succeed."""
        return self._thread.is_alive() and not self._stopping and self._failures < FAILURES_TO_WORRY

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def require_places(self, count: int = 1) -> None:
        """Raise ApiError (429 or 503) unless `count` more prompts may wait."""
        if self._stopping:
            raise shutting_down()
        if len(self._waiting) + count > self._settings.max_queue:
            raise queue_full(self._settings.max_queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none.

        Raises:
            ApiError: no places (429), or shutting down (503).
        """
        with self._news:
            self.require_places(len(jobs))
            self._waiting.extend(jobs)
            self._news.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more: their places become free with the next step."""
        for job in jobs:
            job.cancelled = True
        with self._news:
            self._news.notify()

    def refuse_all(self) -> None:
        """Take no more jobs and end those under way with an error."""
        with self._news:
            self._stopping = True
            self._news.notify()

    def stop(self) -> None:
        """As `refuse_all`, and wait for the thread to end."""
        self.refuse_all()
        if self._thread.ident is not None:
            self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._step()
            except Exception:
                # Whatever it was (out of memory, say), the batch is lost but the server is not.
                jobs = self._running_jobs()
                self._prefill, self._batch, self._rows = None, None, []
                self._lose(jobs)
        with self._news:
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in [*waiting, *self._running_jobs()]:
            job.deliver(Failure(shutting_down()))

    def _wait_for_work(self) -> bool:
        with self._news:
            while not (self._stopping or self._waiting or self._prefill or self._rows):
                self._news.wait()
            return not self._stopping

    def _running_jobs(self) -> list[Job]:
        prefilling = self._prefill.jobs if self._prefill else ()
        return list(dict.fromkeys([*(job for job, _ in self._rows), *prefilling]))

    def _lose(self, jobs: Iterable[Job]) -> None:
        """Report the exception that is being handled, and end these jobs."""
        logger.exception("a step of the engine failed; the answers it worked on are lost")
        self._metrics.failed_steps.inc()
        self._failures += 1
        for job in jobs:
            job.cancelled = True
            job.deliver(Failure(internal_error()))

    def _step(self) -> None:
        self._drop_cancelled()
        if self._prefill is None:
            self._prefill = self._admitted()
        if self._prefill is not None:
            self._advance(self._prefill)
        if self._batch is not None:
            started = time.perf_counter()
            self._batch.shares = [job.share(answer.taken) for job, answer in self._rows]
            logits = self._decoder.feed(self._batch, [answer.taken[-1:] for _, answer in self._rows])
            self._keep(self._take_tokens(logits, self._rows))  # type: ignore[arg-type]
            self._metrics.step_seconds.observe(time.perf_counter() - started)

    def _drop_cancelled(self) -> None:
        with self._news:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        if self._prefill is not None and all(job.cancelled for job in self._prefill.jobs):
            self._prefill = None
        self._keep([not job.cancelled for job, _ in self._rows])

    def _keep(self, goes_on: Sequence[bool]) -> None:
        """Let the rows that do not go on leave the batch."""
        if all(goes_on):
            return
        kept = [row for row, stays in enumerate(goes_on) if stays]
        self._rows = [self._rows[row] for row in kept]
        self._batch = joined([(self._batch, kept)]) if kept else None  # type: ignore[list-item]

    def _admitted(self) -> Prefill | None:
        """The next prompts, in order, as many as find room and fit into one chunk; a longer one goes alone.

        Those that are scored go together, since all of a batch's columns are then read.
        """
        free = self._settings.max_batch - len(self._rows)
        budget = self._settings.prefill_tokens
        jobs: list[Job] = []
        longest = 0
        with self._news:
            while self._waiting and len(self._waiting[0].answers) <= free:
                longest = max(longest, len(self._waiting[0].prompt_ids))
                if jobs and (longest * (len(jobs) + 1) > budget or jobs[0].scored is not self._waiting[0].scored):
                    break
                jobs.append(self._waiting.popleft())
                free -= len(jobs[-1].answers)
        if not jobs:
            return None
        batch = self._decoder.empty([job.dial for job in jobs])
        batch.shares = [job.share() for job in jobs]
        return Prefill(jobs, batch, budget)

    def _advance(self, prefill: Prefill) -> None:
        """Feed the prompts' next chunk; once they are complete, draw the first tokens and join the batch."""
        try:
            logits = prefill.advance(self._decoder)
            self._echo(prefill, complete=logits is not None)
        except Exception:  # the running batch is as it was: only the new ones are lost
            self._prefill = None
            return self._lose(prefill.jobs)
        if logits is None:
            return None
        begun = [
            (source, job, answer)
            for source, job in enumerate(prefill.jobs)
            for answer in job.answers
            if answer.max_tokens  # an echo may be all that is wanted
        ]
        sources, rows = [source for source, _, _ in begun], [(job, answer) for _, job, answer in begun]
        kept = [row for row, stays in enumerate(self._take_tokens(logits[sources], rows)) if stays] if rows else []
        if kept:
            running = [] if self._batch is None else [(self._batch, range(len(self._rows)))]
            self._batch = joined([*running, (prefill.batch, [sources[row] for row in kept])])
            self._rows = [*self._rows, *(rows[row] for row in kept)]
        self._prefill = None
        return None

    def _echo(self, prefill: Prefill, complete: bool) -> None:
        """Report the last chunk of the prompts with which answers begin."""
        for job, tokens in zip(prefill.jobs, prefill.heard, strict=True):
            if not job.echo or job.cancelled:
                continue
            if not all(math.isfinite(token.logprob or 0.0) for token in tokens):
                job.cancelled = True
                job.deliver(Failure(not_finite()))
                continue
            for answer in job.answers:
                job.deliver(answer.echo(tokens, complete))

    def _take_tokens(self, logits: Tensor, rows: Sequence[tuple[Job, Answer]]) -> list[bool]:
        """Draw every row's next token and report it; whether each row goes on."""
        self._failures = 0
        finite = logits.logsumexp(-1).isfinite()  # (R,)
        sound = finite.tolist()
        if not all(sound):  # their draws would lie outside the vocabulary and fail the whole step
            logits = logits.masked_fill(~finite.unsqueeze(-1), 0.0)
        chosen = choose_tokens(logits, [answer.sampler for _, answer in rows])
        goes_on = []
        for (job, answer), token, is_sound in zip(rows, chosen, sound, strict=True):
            if not job.cancelled and not is_sound:
                job.cancelled = True
                job.deliver(Failure(not_finite()))
            if job.cancelled:
                goes_on.append(False)
                continue
            delta = answer.take(token)
            self._metrics.generated_tokens.labels(job.model).inc()
            job.deliver(delta)
            goes_on.append(delta.finish_reason is None)
        return goes_on


def not_finite() -> ApiError:
    """The mixed logits overflowed, or the model's own did."""
    message = "the model's logits are not finite here: use a strength (or weights) closer to 0."
    return ApiError(500, message, "logits_not_finite", "qadapter")
