"""The processes of one run and what they tell each other."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from clbench.errors import Interrupted, UserError
from clbench.processes.launched import count, number

Found = TypeVar("Found")

#: What a launcher such as torchrun sets.
_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Numbers that are reduced at once: what is copied for that stays small beside a large model.
_BUCKET = 1 << 25


class Group:
    """Processes that do the same at the same time, and say the same things in the same order.

    Args:
        store: Reaches all of them, also when one has ended.
        rank: Which one this is.
        count: How many there are.
        device: Where they compute; its tensors travel between devices, others over the network.
    """

    def __init__(self, store: Any, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device, self._store = rank, count, device, store
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)

    @staticmethod
    def gathering(device: torch.device) -> Group:
        """Waits for all processes that the launcher has started.

        Args:
            device: "cuda" becomes that of LOCAL_RANK.

        Raises:
            UserError: If the launcher has not said enough, or there are too few GPUs.
        """
        missing = [name for name in _SET if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={count()} asks for several processes, but {', '.join(missing)} is not "
                "set. Start them with torchrun --nproc-per-node N -m clbench ..."
            )
        if device.type == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= there:
                raise UserError(
                    f"Process {local} of this machine has no GPU of its own: there are {there}. "
                    "Start as many processes as GPUs, or set device=cpu."
                )
            torch.cuda.set_device(local)
        rank, size = number(), count()
        store, _, _ = next(rendezvous("env://", rank, size))
        return Group(store, rank, size, device)

    # Small things, that every process has to know.

    def told(self, find: Callable[[], Found]) -> Found:
        """What the leading process finds, or raises: in every process.

        Args:
            find: Called in the leading process alone.
        """
        error: Exception | None = None
        if self.rank == 0:
            try:
                found = find()
            except Exception as caught:
                error = caught
            self._send(_packed((error, None if error else found)))
            if error:
                raise error
            return found
        error, found = _unpacked(self._receive(), self.device)
        if error:
            raise error
        return found

    def agree(self, code: int) -> int:
        """The largest code of all processes."""
        codes = torch.tensor([code])
        self._together(lambda: dist.all_reduce(codes, dist.ReduceOp.MAX))
        return int(codes)

    def all_of(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every process; each has as many."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        whole = mine.new_empty(self.count * len(mine))
        self._together(lambda: dist.all_gather_into_tensor(whole, mine))
        found: list[list[int]] = whole.view(self.count, -1).tolist()
        return found

    # Large things.

    def gather(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, one after another.

        Args:
            part: Those of this one, [sizes[rank], ...].
            sizes: How many each has.
        """
        most = max(sizes)
        mine = part.contiguous()
        if len(mine) < most:
            mine = torch.cat((mine, mine.new_zeros(most - len(mine), *mine.shape[1:])))
        whole = mine.new_empty(self.count * most, *mine.shape[1:])
        # As bytes: not every backend knows every kind of number.
        into, content = (t.flatten().view(torch.uint8) for t in (whole, mine))
        self._together(lambda: dist.all_gather_into_tensor(into, content))
        if min(sizes) == most:
            return whole
        rows = zip(whole.split(most), sizes, strict=True)
        return torch.cat([some[:size] for some, size in rows])

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes, of one kind of number, few messages for all tensors."""
        found: list[Tensor] = []
        bucket: list[Tensor] = []
        for position, tensor in enumerate(tensors):
            bucket.append(tensor)
            if position + 1 == len(tensors) or sum(t.numel() for t in bucket) >= _BUCKET:
                found += self._summed(bucket)
                bucket = []
        return found

    def _summed(self, bucket: Sequence[Tensor]) -> Iterator[Tensor]:
        flat = torch.cat([t.flatten() for t in bucket])
        self._together(lambda: dist.all_reduce(flat))
        parts = flat.split([t.numel() for t in bucket])
        return (part.view(t.shape) for part, t in zip(parts, bucket, strict=True))

    # What goes wrong.

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """The others hear why this process leaves the block, if not with all of them."""
        try:
            yield
            self.agree(0)
        except BaseException as error:
            with suppress(Exception):
                self._store.set(_report(self.rank), _packed(error))
            raise
        finally:
            dist.destroy_process_group()

    def _together(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise self._reason() from error

    def _reason(self) -> BaseException:
        """Why the others can't be reached."""
        for rank in range(self.count):
            with suppress(Exception):
                if rank != self.rank and self._store.check([_report(rank)]):
                    found = _unpacked(self._store.get(_report(rank)), self.device)
                    if isinstance(found, BaseException):
                        return found
        return Interrupted(f"one of the {self.count} processes has gone without a word")

    def _send(self, content: bytes) -> None:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._together(lambda: dist.broadcast(size, 0))
        self._together(lambda: dist.broadcast(data, 0))

    def _receive(self) -> bytes:
        size = torch.zeros(1, dtype=torch.int64)
        self._together(lambda: dist.broadcast(size, 0))
        data = torch.empty(int(size), dtype=torch.uint8)
        self._together(lambda: dist.broadcast(data, 0))
        return data.numpy().tobytes()


def _report(rank: int) -> str:
    return f"clbench/why {rank} left"


def _packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
    except (pickle.PicklingError, TypeError, AttributeError):
        return _packed(RuntimeError(str(content)))
    return buffer.getvalue()


def _unpacked(content: bytes, device: torch.device) -> Any:
    """What another process of this run has packed."""
    return torch.load(io.BytesIO(content), map_location=device, weights_only=False)
