"""What a profile tells: where the time of a step goes, and how much memory it takes at most."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# By the names that TorchRec, c10d and torch.optim give their ranges; the first match counts.
_PARTS = {
    "data": r"next_batch|copy_batch",
    "communication": r"c10d::|gloo:|nccl|[Ww]ait|ReduceScatter|AllGather|All2All|all2all|_dist",
    "lookup": r"\[lookup\]|fbgemm::|embedding_bag|ebc|permute_pooled",
    "optimizer": r"Optimizer\.",
}


def time_split(step: Callable[[], object], several_ranks: bool) -> dict[str, float]:
    """Seconds of some steps by part: data, communication, lookup, optimizer, and dense, the rest.

    An event belongs to the innermost range around it whose name tells its part.

    Args:
        step (Callable[[], object]): the steps.
        several_ranks (bool): then what the backward pass spends outside of all operators is
            waiting for the gradients of the other ranks.
    """
    activities = [ProfilerActivity.CPU]
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        step()
    seconds = dict.fromkeys([*_PARTS, "dense"], 0.0)
    for event in profiled.events():
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        seconds[_part(event, several_ranks)] += own / 1e6
    return seconds


def _part(event: FunctionEvent, several_ranks: bool) -> str:
    if several_ranks and re.fullmatch(r"## backward \d+ ##", event.name):
        return "communication"
    inner: FunctionEvent | None = event
    while inner is not None:
        for part, pattern in _PARTS.items():
            if re.search(pattern, inner.name):
                return part
        inner = inner.cpu_parent
    return "dense"


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors take during a step beyond what stood at its start.

    On CPU by the allocations and frees that the profiler sees, so that neither the allocator nor
    other work of the process adds to it. There, memory that the step gives back without having
    allocated it counts as standing: the profiler knows of some of it only.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live: dict[int, int] = {}
    standing = peak = 0
    for address, size in _memory_events(profiled):
        if size > 0:
            live[address] = size
        standing += size if size > 0 else -live.pop(address, 0)
        peak = max(peak, standing)
    return peak


def _memory_events(profiled: profile) -> Iterator[tuple[int, int]]:
    """Address and bytes of each allocation, and of each free with its bytes negated, in order."""
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    for event in events:
        events.extend(event.children)  # breadth first, while the list grows
    memory = [event for event in events if event.tag == _EventType.Allocation]
    for event in sorted(memory, key=lambda event: event.start_time_ns):
        yield event.extra_fields.ptr, event.extra_fields.alloc_size
