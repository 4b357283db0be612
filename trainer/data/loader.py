"""The loader: one process, no workers. A thread stays a few steps ahead of training.

    order -> deal -> map -> assemble into pinned memory -> copy to the device -> queue -> train step
                            ^ codecs zstd, jpeg: a few threads decode each image into its place there

With codec raw there is nothing to decode, and one thread suffices; numpy's large copies, and the decoders,
release the interpreter lock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch

from trainer.data.batch import Batch, BatchShape, assemble_batch
from trainer.data.counts import Counts, count_packs
from trainer.data.mixture import Mixture
from trainer.data.order import Imbalance, IntArray, cost_imbalance, deal_packs

# Steps kept ready: one being consumed, one waiting. More only costs memory.
STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that one optimizer step needs on this rank."""

    index: int
    microbatches: list[Batch]
    counts: Counts
    """Of the packs of this data-parallel rank."""
    imbalance: Imbalance
    wait_s: float


class Loader:
    """Iterate over steps from `start_step` on, for ever; `close()` ends the thread.

    Errors of the thread (a damaged or missing shard) are raised in the consumer.
    """

    def __init__(
        self,
        data: Mixture,
        *,
        split: str,
        seed: int,
        packs_per_microbatch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        start_step: int,
        decode_threads: int,
        row_part: tuple[int, int] | None = (0, 1),
        frames_per_row: int | None = None,
    ) -> None:
        self._data, self._split, self._seed = data, split, seed
        self._shape = BatchShape(
            packs=packs_per_microbatch,
            budget=data.budget,
            geometry=data.geometry,
            pad_token=data.tokens.pad,
            row_part=row_part,
            frames_per_row=frames_per_row,
        )
        self._accumulation = accumulation
        self._dp_rank, self._dp_size, self._device = dp_rank, dp_size, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[tuple[Step, torch.cuda.Event | None] | BaseException] = queue.Queue(
            STEPS_AHEAD
        )
        # None where all is raw: the threads would have nothing to do.
        self._decoders = ThreadPoolExecutor(decode_threads, "decode") if data.encoded else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(start_step,), daemon=True, name="loader")
        self._thread.start()

    @property
    def packs_per_step(self) -> int:
        """Packs in one global batch."""
        return self._shape.packs * self._accumulation * self._dp_size

    def packs_of_step(self, index: int) -> IntArray:
        """Packs of a global batch, int64 [packs_per_step]."""
        return self._data.packs_of_step(self._split, self.packs_per_step, self._seed, index)

    def __iter__(self) -> Iterator[Step]:
        while True:
            begin = time.perf_counter()
            entry = self._ready.get()
            if isinstance(entry, BaseException):
                raise entry
            step, copied = entry
            if copied is not None:
                _hand_over(step, copied)
            yield replace(step, wait_s=time.perf_counter() - begin)

    def close(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            try:  # a full queue keeps the thread from seeing the event
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)
        if self._decoders is not None:
            self._decoders.shutdown(cancel_futures=True)

    def _produce(self, step: int) -> None:
        try:
            if self._device.type == "cuda":
                # The current device belongs to the thread: without this, every rank would pin on device 0.
                torch.cuda.set_device(self._device)
            while not self._stopped.is_set():
                self._ready.put(self._load(step))
                step += 1
        except BaseException as error:  # handed to the consumer, whatever it is
            self._ready.put(error)

    def _load(self, index: int) -> tuple[Step, torch.cuda.Event | None]:
        """Assemble the step and start its copy to the device."""
        chosen = self.packs_of_step(index)
        costs = self._data.costs(self._split, chosen)
        table = deal_packs(
            costs,
            dp_size=self._dp_size,
            accumulation=self._accumulation,
            packs_per_microbatch=self._shape.packs,
        )
        own = chosen[table[self._dp_rank]].reshape(-1).tolist()
        packs = [self._data.pack(self._split, number) for number in own]
        spans = [self._data.document_spans(self._split, number) for number in own]
        batches = [
            assemble_batch(
                packs[first : first + self._shape.packs],
                spans[first : first + self._shape.packs],
                self._shape,
                pin_memory=self._copies is not None,
                decode_pool=self._decoders,
            )
            for first in range(0, len(own), self._shape.packs)
        ]
        counts = count_packs(packs, spans, len(self._data.sources))
        imbalance = cost_imbalance(costs, table)
        if self._copies is None:
            return Step(index, batches, counts, imbalance, wait_s=0.0), None
        with torch.cuda.stream(self._copies):
            batches = [batch.to(self._device) for batch in batches]
            copied = torch.cuda.Event()
            copied.record(self._copies)
        return Step(index, batches, counts, imbalance, wait_s=0.0), copied


def _hand_over(step: Step, copied: torch.cuda.Event) -> None:
    """Let the training stream wait for the copy, on the device; the host goes on."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for batch in step.microbatches:
        for field in fields(batch):
            getattr(batch, field.name).record_stream(current)
