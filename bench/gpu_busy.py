"""How much of a call's time the GPU works, from the kernels' own time stamps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# By how much the device's clock may be behind the host's.
MARGIN_NS = 5_000_000


@dataclass(frozen=True)
class Busy:
    """A profiled call.

    Args:
        wall: seconds from call to return.
        busy: seconds in which at least one kernel or copy ran.
        lead: seconds from the call to the first kernel or copy.
        kernels: (name, count, seconds), longest first.
    """

    wall: float
    busy: float
    lead: float
    kernels: list[tuple[str, int, float]]

    @property
    def share(self) -> float:
        return self.busy / self.wall

    @property
    def launches(self) -> int:
        return sum(count for _, count, _ in self.kernels)


def profile(call: Callable[[], Any]) -> Busy:
    """Runs the call once under torch.profiler; only the device is traced, which costs little time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as tracer

    torch.cuda.synchronize()
    with tracer(activities=[ProfilerActivity.CUDA]) as trace:
        # The tracer sets itself up at the first kernel, which does not count: it ends long before the call.
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        time.sleep(2e-9 * MARGIN_NS)
        begun_ns = time.time_ns()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    events = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in trace.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and event.start_ns() > begun_ns - MARGIN_NS
    ]
    assert events, "the call ran nothing on the GPU"
    busy, end = 0, 0
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for begin, stop, name in sorted(events):
        busy += max(0, stop - max(begin, end))
        end = max(end, stop)
        totals[name][0] += 1
        totals[name][1] += stop - begin
    kernels = [(name, count, time_ns / 1e9) for name, (count, time_ns) in totals.items()]
    lead = (min(events)[0] - begun_ns) / 1e9
    return Busy(wall, busy / 1e9, lead, sorted(kernels, key=lambda k: -k[2]))
