"""A captured graph with its callers' copies in it, as nodes whose addresses are set for each launch.

A copy that is submitted separately costs 4 to 12 us of the calling thread, and leaves the device idle before the graph. A
copy node costs 1.1 us when its address changed since the last launch (2 us with the Python code around it, and 4 while the
graph runs), and nothing when it did not (measured on an H200). So each buffer of the graph gets two nodes, one for device
memory and one for pinned memory, of which at most one is enabled. A change takes effect for later launches only: launches
in flight keep their parameters (CUDA driver API, "Graph Management").

Launches that must run one after the other are ordered by nodes too: a wait directly before the captured graph, and a record
directly after it. So only the captured work is ordered, and the copies of one launch run beside the work of another.
Throughput on an H200, relative to back-to-back launches, with two streams: for work of 200 us with a mebibyte in from
pinned memory, 100 %, and 84 % if the copies are ordered too; for work of 50 us with 4 KiB in and out on the device, 100 %
and 96 %. Like any wait, the node waits for the last record made before its own launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from cuda.bindings import driver

from aiotrt.devices.base import Copies

__all__ = ["CopyingGraph", "DirectGraph", "is_plain"]

Check = Callable[[str, tuple[Any, ...]], tuple[Any, ...]]

#: The status of a successful driver call: always this object.
_DONE: Final = driver.CUresult.CUDA_SUCCESS
#: Pinned memory for nodes that were not used yet, by device: a node can only be instantiated with a valid address.
_placeholders: Final[dict[int, torch.Tensor]] = {}


class CopyingGraph:
    """An executable graph: copies in, the captured graph, copies out.

    Args:
        raw: the captured graph. It remains the caller's, and must live as long as this object.
        inputs: buffers that the captured graph reads.
        outputs: buffers that the captured graph writes.
        check: returns the values of a driver call, or raises its error.
        ordered: whether the graph gets the nodes that `order` sets.

    Raises what `check` raises. Everything that was made is freed then.

    Attributes:
        handle: the driver's handle of the executable graph.
        context: the handle of the context in which the graph was made.
        ordered: the argument `ordered`.
        is_set: whether any copy node may be enabled.
        version: how often `set` was called.
        is_complete: whether nodes make all copies of the last call of `set`.
        is_whole: whether each input and each output has its own nodes.
    """

    def __init__(
        self,
        raw: int,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        check: Check,
        *,
        ordered: bool = False,
    ) -> None:
        self.ordered = ordered
        self.is_whole = False
        self._check = check
        self.context = 0
        self._nobody: Any = None  # a placeholder event: event nodes cannot be disabled, so they need one that orders nothing
        self._wait: Any = None  # the event nodes, and the events that they are set to
        self._record: Any = None
        self._waits_for: Any = None
        self._records: Any = None
        self._before: dict[int, _Port] = {}  # by the `id` of the buffer's tensor, which the port keeps alive
        self._after: dict[int, _Port] = {}
        self.is_set = False
        self.version = 0
        self.is_complete = False
        (context,) = check("finding the context", driver.cuCtxGetCurrent())
        self.context = int(context)
        (self._graph,) = check("creating a graph", driver.cuGraphCreate(0))
        self.handle: Any = None
        try:
            first = self._add(self._before, inputs, context, [], is_input=True)
            if ordered:
                flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
                (self._nobody,) = check("creating an event", driver.cuEventCreate(flags))
                (self._wait,) = check(
                    "adding a wait to a graph", driver.cuGraphAddEventWaitNode(self._graph, None, 0, self._nobody)
                )
                first.append(self._wait)
            (child,) = check(
                "adding a captured graph to another",
                driver.cuGraphAddChildGraphNode(self._graph, first or None, len(first), driver.CUgraph(raw)),
            )
            if ordered:
                (self._record,) = check(
                    "adding a record to a graph", driver.cuGraphAddEventRecordNode(self._graph, [child], 1, self._nobody)
                )
            self._add(self._after, outputs, context, [child], is_input=False)
            (self.handle,) = check("instantiating a graph", driver.cuGraphInstantiate(self._graph, 0))
            for port in (*self._before.values(), *self._after.values()):
                port.disable(self.handle)
            self.is_whole = len(self._before) == len(inputs) and len(self._after) == len(outputs)
        except BaseException:
            self.close()
            raise

    def set(self, before: Copies, after: Copies) -> tuple[Copies, Copies]:
        """Make later launches do these copies and no others. Returns the copies that cannot be nodes."""
        self.version += 1
        if not (before or after or self.is_set):
            self.is_complete = True
            return before, after
        self.is_set, self.is_complete = True, False
        others = self._set(self._before, before, 0), self._set(self._after, after, 1)
        self.is_set = bool(before or after)
        self.is_complete = not any(others)
        return others

    def order(self, wait: Any, record: Any) -> None:
        """Make the captured part of later launches wait for one event, and record another when it has ended.

        Args:
            wait: the driver's handle of the event to wait for, or None.
            record: the driver's handle of the event to record, or None.
        """
        wait, record = wait or self._nobody, record or self._nobody
        if wait is not self._waits_for:
            self._waits_for = None  # unknown if the call fails
            self._check(
                "setting the event that a graph waits for",
                driver.cuGraphExecEventWaitNodeSetEvent(self.handle, self._wait, wait),
            )
            self._waits_for = wait
        if record is not self._records:
            self._records = None
            self._check(
                "setting the event that a graph records",
                driver.cuGraphExecEventRecordNodeSetEvent(self.handle, self._record, record),
            )
            self._records = record

    def close(self) -> None:
        """Free the graph; the last launch must have completed."""
        if self.handle is not None:
            driver.cuGraphExecDestroy(self.handle)
        if self._nobody is not None:
            driver.cuEventDestroy(self._nobody)
        driver.cuGraphDestroy(self._graph)  # kept until now: its nodes identify those of the executable graph

    def _set(self, ports: dict[int, _Port], copies: Copies, mine: int) -> Copies:
        others, pointed = [], set()
        for copy in copies:
            buffer, other = copy[mine], copy[1 - mine]
            port = ports.get(id(buffer))
            # A node has one destination: the second copy of an output that is returned twice is no node. Neither is a copy
            # to or from another GPU.
            if (
                port is None
                or other.dtype is not buffer.dtype
                or not is_plain(other)
                or id(buffer) in pointed
                or other.get_device() not in (-1, buffer.get_device())
            ):
                others.append(copy)
            else:
                port.point(self.handle, other)
                pointed.add(id(buffer))
        if len(pointed) < len(ports):
            for identity, port in ports.items():
                if identity not in pointed:
                    port.disable(self.handle)
        return others

    def _add(
        self, ports: dict[int, _Port], buffers: Sequence[torch.Tensor], context: Any, after: list[Any], *, is_input: bool
    ) -> list[Any]:
        nodes: list[Any] = []
        for buffer in buffers:
            if buffer.nbytes and is_plain(buffer) and id(buffer) not in ports:
                port = ports[id(buffer)] = _Port(buffer, context, self._check, is_input=is_input)
                nodes += port.add(self._graph, after)
        return nodes


class DirectGraph:
    """An executable graph for the most frequent launches: no copies, or one copy in device memory for each buffer.

    A node costs the launching thread about 0.3 us and the device as much, even a disabled one. So such launches do not use
    `CopyingGraph`.

    Args:
        raw: the captured graph. It remains the caller's, and must live as long as this object.
        inputs: buffers that the captured graph reads, to copy to. If `outputs` is empty too, there are no copies.
        outputs: buffers that the captured graph writes, to copy from.
        check: returns the values of a driver call, or raises its error.

    Raises what `check` raises. Everything that was made is freed then.

    Attributes:
        handle: the driver's handle of the executable graph.
        context: the context of the memory that the copies are in.
        inputs: the node of each input.
        outputs: the node of each output.
    """

    def __init__(self, raw: int, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], check: Check) -> None:
        self._graph: Any = None
        self.handle: Any = None
        self.inputs: list[DirectPort] = []
        self.outputs: list[DirectPort] = []
        (self.context,) = check("finding the context", driver.cuCtxGetCurrent())
        graph = driver.CUgraph(raw)
        try:
            if inputs or outputs:
                (graph,) = (self._graph,) = check("creating a graph", driver.cuGraphCreate(0))
                for buffer in inputs:
                    self.inputs.append(DirectPort(graph, [], buffer, self.context, check, is_input=True))
                before = [port.node for port in self.inputs]
                (child,) = check(
                    "adding a captured graph to another",
                    driver.cuGraphAddChildGraphNode(graph, before or None, len(before), driver.CUgraph(raw)),
                )
                for buffer in outputs:
                    self.outputs.append(DirectPort(graph, [child], buffer, self.context, check, is_input=False))
            (self.handle,) = check("instantiating a graph", driver.cuGraphInstantiate(graph, 0))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the graph; the last launch must have completed."""
        if self.handle is not None:
            driver.cuGraphExecDestroy(self.handle)
        if self._graph is not None:
            driver.cuGraphDestroy(self._graph)


class DirectPort:
    """The node that copies to one input, or from one output.

    Attributes:
        node: the driver's handle of the node.
        buffer: the input or output.
        now: the address of the caller's memory that the node is set to; 0 where that is unknown.
    """

    __slots__ = ("_check", "_context", "_is_input", "_parameters", "buffer", "node", "now")

    def __init__(
        self, graph: Any, after: list[Any], buffer: torch.Tensor, context: Any, check: Check, *, is_input: bool
    ) -> None:
        self.buffer = buffer
        self.now = 0
        self._context = context
        self._check = check
        self._is_input = is_input
        self._parameters = parameters = driver.CUDA_MEMCPY3D()
        parameters.srcMemoryType = parameters.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        parameters.srcDevice = parameters.dstDevice = buffer.data_ptr()
        parameters.WidthInBytes, parameters.Height, parameters.Depth = buffer.nbytes, 1, 1
        (self.node,) = check(
            "adding a copy to a graph", driver.cuGraphAddMemcpyNode(graph, after or None, len(after), parameters, context)
        )

    def point(self, graph: Any, address: int) -> None:
        """Set the node to copy from or to this address of device memory."""
        self.now = 0  # unknown if the call fails
        if self._is_input:
            self._parameters.srcDevice = address
        else:
            self._parameters.dstDevice = address
        answer = driver.cuGraphExecMemcpyNodeSetParams(graph, self.node, self._parameters, self._context)
        if answer[0] is not _DONE:
            self._check("setting the address of a copy", answer)
        self.now = address


class _Port:
    """The two nodes of one buffer.

    Attributes:
        now: the address that the enabled node copies from or to; 0 if none is enabled.
    """

    __slots__ = ("_addresses", "_buffer", "_check", "_context", "_enabled", "_is_input", "_nodes", "_parameters", "now")

    def __init__(self, buffer: torch.Tensor, context: Any, check: Check, *, is_input: bool) -> None:
        self._buffer = buffer
        self._context = context
        self._check = check
        self._is_input = is_input
        self._nodes: list[Any] = []  # for pinned memory, and for device memory
        self._parameters = [self._describe(on_device=False), self._describe(on_device=True)]
        self._addresses = [0, 0]
        self.now = 0
        self._enabled = [True, True]

    def add(self, graph: Any, after: list[Any]) -> list[Any]:
        """Add the two nodes to a graph, after the nodes `after`, and return them."""
        for parameters in self._parameters:
            (node,) = self._check(
                "adding a copy to a graph",
                driver.cuGraphAddMemcpyNode(graph, after or None, len(after), parameters, self._context),
            )
            self._nodes.append(node)
        return self._nodes

    def point(self, graph: Any, other: torch.Tensor) -> None:
        """Set the nodes to copy from or to the memory of `other`."""
        address = other.data_ptr()
        if address == self.now:  # addresses of pinned and of device memory are never equal
            return
        on_device = other.is_cuda
        self.now = 0
        if self._addresses[on_device] != address:
            parameters = self._parameters[on_device]
            if on_device:
                if self._is_input:
                    parameters.srcDevice = address
                else:
                    parameters.dstDevice = address
            elif self._is_input:
                parameters.srcHost = address
            else:
                parameters.dstHost = address
            parameters.WidthInBytes = self._buffer.nbytes
            answer = driver.cuGraphExecMemcpyNodeSetParams(graph, self._nodes[on_device], parameters, self._context)
            if answer[0] is not _DONE:
                self._check("setting the address of a copy", answer)
            self._addresses[on_device] = address
        if not self._enabled[on_device]:
            self._enable(graph, on_device, enabled=True)
        if self._enabled[not on_device]:
            self._enable(graph, not on_device, enabled=False)
        self.now = address

    def disable(self, graph: Any) -> None:
        """Disable both nodes."""
        self.now = 0
        self._enable(graph, False, enabled=False)
        self._enable(graph, True, enabled=False)

    def _enable(self, graph: Any, on_device: bool, *, enabled: bool) -> None:
        if self._enabled[on_device] is not enabled:
            self._check(
                "switching a copy on or off", driver.cuGraphNodeSetEnabled(graph, self._nodes[on_device], int(enabled))
            )
            self._enabled[on_device] = enabled

    def _describe(self, *, on_device: bool) -> Any:
        """Return the parameters of a first copy: between the buffer and itself, or with the pinned placeholder."""
        memory = driver.CUmemorytype
        parameters = driver.CUDA_MEMCPY3D()
        parameters.srcMemoryType = parameters.dstMemoryType = memory.CU_MEMORYTYPE_DEVICE
        parameters.srcDevice = parameters.dstDevice = self._buffer.data_ptr()
        parameters.WidthInBytes, parameters.Height, parameters.Depth = 1, 1, 1
        if not on_device:
            address = _placeholder(self._buffer.device.index).data_ptr()
            if self._is_input:
                parameters.srcMemoryType, parameters.srcHost = memory.CU_MEMORYTYPE_HOST, address
            else:
                parameters.dstMemoryType, parameters.dstHost = memory.CU_MEMORYTYPE_HOST, address
        return parameters


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether copying the tensor's memory byte by byte copies its values."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()  # the memory lacks these lazy flags


def _placeholder(device: int) -> torch.Tensor:
    if device not in _placeholders:
        _placeholders[device] = torch.empty(16, dtype=torch.uint8, pin_memory=True)
    return _placeholders[device]
