"""Loaders: torch's, over :class:`~kw.data.dataset.ImageFolder`; they collect faults of the data.

A batch is ``{"images": uint8 [B, C, H, W], "labels": int64 [B] or int8 [B, classes], "indices":
int64 [B], "keys": the images' keys (:mod:`.samplers`), "key": the first}``, in host memory (pinned
where CUDA is available).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from kw.data.dataset import Sample, Samples
from kw.data.faults import FaultLog, TolerantDataset, collate_faults
from kw.data.reading import DataError
from kw.data.samplers import EvalBatchSampler, TrainBatchSampler
from kw.errors import answer


class Loader(DataLoader[Any]):
    """torch's loader; bad files that a batch names go to :attr:`faults`, not to the model.

    Attributes:
        faults: the bad files of the data set.
    """

    faults: FaultLog
    dataset: Any  # has a length

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # no more than an iterator
        return self._watched(super().__iter__())  # the processes start here, not at the first batch

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            for batch in batches:
                self.faults.record(batch.pop("faults", ()))
                if batch:
                    yield batch
        except DataError as error:  # torch's message is the traceback of the loader process
            raise DataError(answer(error)) from error


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples of one epoch -> a batch."""
    if isinstance(samples, Samples):
        images = samples.images
    else:  # torch's own collation stacks straight into memory that loader processes share
        images = default_collate([sample.image for sample in samples])
    labels = [sample.label for sample in samples]
    return {
        "images": images,  # [B, C, H, W]
        "labels": torch.stack(labels) if torch.is_tensor(labels[0]) else torch.tensor(labels),
        "indices": torch.tensor([sample.key[1] for sample in samples]),
        "key": samples[0].key,
        "keys": [sample.key for sample in samples],
    }


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop a loader's processes, where they wait for another epoch.

    Left to the garbage collector, which may close their queues first, each takes five seconds.
    """
    loader._iterator = None


def build_loader(
    dataset: TolerantDataset,
    sampler: TrainBatchSampler | EvalBatchSampler,
    workers: int,
    collate: Callable[[list[Any]], Any] = collate,
) -> Loader:
    """The loader of one process; 0 workers load in this process itself.

    Before each epoch of training call ``loader.batch_sampler.set_epoch(epoch, start_update)``.
    """
    dataset.note_for(workers)
    loader = Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(collate_faults, collate),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_signals if workers else None,
        # Its own generator: a loader otherwise draws from the global one at each epoch's start,
        # which would make the model's random choices depend on how often data was loaded.
        generator=torch.Generator(),
    )
    loader.faults = FaultLog(len(dataset), dataset.bad_images, getattr(dataset, "reader", None))
    return loader


def _outlive_signals(worker: int) -> None:
    """In a loader process: leave it to the run to end it.

    Ctrl-C and torchrun send signals to a whole group of processes, slurm to all that there are. The
    run then finishes an update, for which it needs images, and writes a checkpoint.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_run, name="signals", daemon=True).start()
    else:  # on macOS: out of reach of torchrun
        os.setpgid(0, 0)


def _end_with_run() -> None:
    """Follow a SIGTERM that the run itself sends, as Python does at its exit; no other."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def deaths_explained(*loaders: DataLoader[Any]) -> Iterator[None]:
    """Say which image a loader process was reading when it died; processes end with the block.

    torch reports a death from a signal handler, so that it may surface at any line of the run.

    Raises:
        DataError: a process of these loaders died.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:  # the latter in the middle of its answer
        with _without_child_signals():
            deaths = [line for loader in loaders for line in _deaths(loader, error)]
        if not deaths:
            raise
        raise DataError("; ".join(deaths)) from error
    finally:
        for loader in loaders:
            stop_workers(loader)


@contextmanager
def _without_child_signals() -> Iterator[None]:
    """While a death is looked into, torch's handler does not raise once more for it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if handler is not None:  # one that is not Python's cannot be set from here
            signal.signal(signal.SIGCHLD, handler)


def _deaths(loader: DataLoader[Any], cause: Exception) -> Iterator[str]:
    processes: Any = getattr(loader._iterator, "_workers", ())
    dataset: Any = loader.dataset
    for worker, process in enumerate(processes):
        if not isinstance(cause, RuntimeError):
            process.join(0.1)  # its connections end before it does
        status = process.exitcode
        if not status:
            continue
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            how += " (by the system, where it ran out of memory)"
        index = dataset.in_hand(worker)
        what = "between two images"
        if index is not None:
            what = f"while it read image {index}, {dataset.path(index)}"
        yield f"loader process {worker} (pid {process.pid}) {how} {what}"
