"""Items and batches of a model on several devices: where their inputs are, and how these get to the device that runs them.

Inputs on another device are copied by the stream of the slot that runs the batch, which first waits for an event of the
stream that wrote them. Results go the same way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiotrt.batching.batch import Batch, argument_of
from aiotrt.batching.group import Group
from aiotrt.batching.item import Item
from aiotrt.batching.member import Member
from aiotrt.devices import Copies, Device, Stream
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request, Slot
from aiotrt.tensors import Argument, Kind, Shapes, Specs

__all__ = ["PlacedBatch", "PlacedGroup", "PlacedItem", "PlacedRequest"]


class PlacedGroup(Group):
    """A group whose batches may run on each of several devices.

    Args:
        members: the model's devices.
        homes: the indices of the devices that hold inputs, in the order of the inputs.
        arguments: the arguments of the first item.
        specs: what they were checked against.
        shapes: the shapes of the inputs.
        kind: what the results should be.
        stack: whether items get a batch axis.

    Attributes:
        homes: as given.
        home: the first of `homes`, where results go; None if all inputs are on the host.
        members: the group of batches on each device.
    """

    def __init__(
        self,
        members: Sequence[Member],
        homes: Sequence[int],
        arguments: Sequence[Argument],
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        *,
        stack: bool,
    ) -> None:
        self.homes = homes
        self.home = homes[0] if homes else None
        super().__init__(members[self.home or 0].executor, arguments, specs, shapes, kind, stack=stack)
        self.members = [Group(member.executor, arguments, specs, shapes, kind, stack=stack) for member in members]


class PlacedItem(Item):
    """One caller's item, and the streams that it depends on.

    Attributes:
        origins: the caller's current stream of each device that holds an input, by the device's index. If none holds one and
            results are on the device, the streams of all devices, because any of them may run the item.
        patience: the time on the loop's clock from which on it no longer waits for a busy device; None if it did not wait.
        is_retried: whether the device that ran it broke, so that it runs a second time.
    """

    __slots__ = ("is_retried", "origins", "patience")

    group: PlacedGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.origins: dict[int, Stream] = {}
        self.patience: float | None = None
        self.is_retried = False


class PlacedRequest(Request):
    """The request of a batch whose callers have streams on several devices.

    Attributes:
        elsewhere: the callers' streams on other devices than the slot's; `origins` has those on the slot's device.
    """

    __slots__ = ("elsewhere",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.elsewhere: Sequence[Stream] = ()

    def order(self, slot: Slot) -> None:
        """Make the slot's stream wait as `Request.order` does, for streams on any device."""
        for origin in self.origins:
            slot.follow(origin)
        for origin in self.elsewhere:
            slot.stream.wait(origin.record())  # not `slot.mark`, which belongs to the slot's device
        for event in self.ready:
            slot.stream.wait(event)


class PlacedBatch(Batch):
    """A batch for one of several devices.

    Args:
        member: the device.
        arguments: as for `Batch`.
        stack: as for `Batch`.
    """

    __slots__ = ("home", "member")

    items: Sequence[PlacedItem]

    def __init__(self, member: Member, *arguments: Any, stack: bool) -> None:
        super().__init__(*arguments, stack=stack)
        self.member = member
        self.home: int | None = None

    def place(self, group: PlacedGroup) -> None:
        """Prepare this batch for its device, after its items were chosen from this group."""
        here = self.member.index
        self.home = home = group.home
        self.group = group.members[here]
        for item in self.items:
            item.origin = item.origins.get(here if home is None else home)
        first = self.items[0]
        if home is not None and group.homes != (here,) and not first.arguments:
            # The short path reads device inputs in place, and these are on another device: arguments make it copy them.
            first.arguments = [argument_of(value, i in group.on_host) for i, value in enumerate(first.values)]

    def allocate(self, device: Device, program: Program) -> Copies:
        """Allocate results as `Batch.allocate` does, on the device of the items' inputs, which is the same for all items."""
        return super().allocate(device if self.home is None else self.member.devices[self.home], program)

    def settle(self, results: Sequence[object], error: BaseException | None) -> None:
        """Count the batch for its device, and settle it as `Batch.settle` does."""
        if error is None:
            self.member.completed += 1
        else:
            self.member.failed += 1
        super().settle(results, error)

    def _take_long_way(self, request: Request) -> None:
        """Prepare the long way as `Batch._take_long_way` does; inputs on another device are copied, even bound ones."""
        super()._take_long_way(request)
        if not self.group.on_device:
            return
        assert isinstance(request, PlacedRequest)
        here = self.member.index
        streams = {
            (index, origin.handle): origin
            for item in self.items
            for index, origin in item.origins.items()
            if index == here or self.home is not None
        }
        request.origins = [origin for (index, _), origin in streams.items() if index == here]
        request.elsewhere = [origin for (index, _), origin in streams.items() if index != here]
        if request.elsewhere:
            request.bound = {}
