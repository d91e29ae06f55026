"""Profiles: what the caller may write, and what each mistake is answered with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiotrt.building.profiles import Dynamic, Examples, check_profiles, normal_profiles, profile_of
from aiotrt.errors import InputError

IMAGES = Dynamic("x", (None, 3, None, None), ("N", None, None, None))
STATIC = Dynamic("mask", (1, 8), (None, None))
SHAPE = Dynamic("size", (2,), (None,), values=True)


def check(profiles: Any, *inputs: Dynamic) -> None:
    check_profiles("m.onnx", inputs, normal_profiles(profiles))


def refused(profiles: Any, *inputs: Dynamic) -> str:
    with pytest.raises(InputError) as caught:
        check(profiles, *inputs)
    return str(caught.value)


def test_one_form_for_all_that_may_be_written() -> None:
    once = [{"x": ((1, 2), (1, 2), (1, 2))}]
    assert normal_profiles(None) == []
    assert normal_profiles({"x": (1, 2)}) == once
    assert normal_profiles([{"x": [[1, 2], [1, 2], [1, 2]]}]) == once
    assert normal_profiles({"x": np.array([1, 2]).tolist()}) == normal_profiles({"x": tuple(np.array([1, 2]))}) == once
    assert normal_profiles(iter([{"x": ((1, 2), (1, 2), (1, 2))}])) == once


@pytest.mark.parametrize(
    "profiles", [["x"], [{}], [3], {"x": 3}, {"x": "1x2"}, {"x": ((1, 2), (1, 2))}, {"x": ((1.5,), (2,), (3,))}, {"x": None}]
)
def test_anything_else_is_refused(profiles: Any) -> None:
    assert "expected" in refused(profiles, IMAGES)


def test_static_inputs_need_no_profile_and_may_have_one() -> None:
    check(None, STATIC)
    check({"mask": (1, 8)}, STATIC)
    assert "has 9 where the model has 8" in refused({"mask": (1, 9)}, STATIC)


def test_a_missing_profile_names_every_dynamic_input_and_shows_an_argument() -> None:
    message = refused(None, IMAGES, STATIC, Dynamic("ids", (None, None), ("N", "seq")))
    assert message.startswith("m.onnx: the shape of 'x' (N, 3, *, *), 'ids' (N, seq) is dynamic")
    assert "mask" not in message
    example = message[message.index("profiles=") + len("profiles=") :]
    check(eval(example), IMAGES, STATIC, Dynamic("ids", (None, None), ("N", "seq")))  # it works as it stands


def test_the_example_for_values_works_too() -> None:
    message = refused(None, SHAPE)
    check(eval(message[message.index("profiles=") + len("profiles=") :]), SHAPE)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"z": (1, 3, 8, 8)}, "no input 'z'; the inputs are 'x'"),
        ({"x": (1, 3, 8)}, "has 4 dimensions, and the smallest shape has 3"),
        ({"x": ((2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8))}, "smallest <= usual <= largest"),
        ({"x": ((1, 3, 8, 8), (1, 3, 9, 8), (1, 3, 8, 8))}, "smallest <= usual <= largest"),
        ({"x": (1, 4, 8, 8)}, "has 4 where the model has 3"),
        ({"x": ((0, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))}, "below 1"),
    ],
)
def test_what_does_not_fit_is_named(profile: Any, says: str) -> None:
    message = refused([{"x": (1, 3, 8, 8)}, profile], IMAGES)
    assert says in message
    assert message.startswith("m.onnx: profile 1")


def test_each_profile_covers_every_dynamic_input() -> None:
    assert "profile 0: lacks the dynamic input 'y'" in refused({"x": (1, 3, 8, 8)}, IMAGES, Dynamic("y", (None,), (None,)))


def test_dimensions_of_one_name_are_given_the_same() -> None:
    pair = Dynamic("a", (None, 8), ("n", None)), Dynamic("b", (None, 8), ("n", None))
    check({"a": (2, 8), "b": (2, 8)}, *pair)
    message = refused({"a": (2, 8), "b": (3, 8)}, *pair)
    assert "'a' dimension 0 and 'b' dimension 0 are both named 'n'" in message
    check({"a": (2, 8), "b": (3, 8)}, pair[0], Dynamic("b", (None, 8), (None, None)))


def test_values_may_be_anything_in_order() -> None:
    check({"size": ((0, -1), (4, 4), (8, 8))}, SHAPE)
    assert "has 2 dimensions, and the smallest shape has 1" in refused({"size": ((1,), (2,), (3,))}, SHAPE)
    assert "smallest <= usual" in refused({"size": ((5, 5), (4, 4), (8, 8))}, SHAPE)


# --- from examples ------------------------------------------------------------------------------------------------------


def derived(*shapes: Any, batch: int | None = None, inputs: Any = (IMAGES, STATIC)) -> Any:
    profile = profile_of(inputs, Examples(tuple(shapes), batch))
    if profile is not None:
        check_profiles("m.onnx", inputs, [profile])
    return profile


def test_a_profile_takes_the_examples_and_what_is_between_them() -> None:
    first, second = ((2, 3, 32, 640), (1, 8)), ((1, 3, 48, 320), (1, 8))
    assert derived((first, {}), (second, {})) == {"x": ((1, 3, 32, 320), (2, 3, 32, 640), (2, 3, 48, 640))}
    assert derived(((), {"mask": (1, 8), "x": (1, 3, 8, 8)})) == {"x": ((1, 3, 8, 8),) * 3}


def test_a_profile_of_items_takes_all_batches() -> None:
    items: Any = (((3, 32, 640), (8,)), {})
    assert derived(items, batch=4) == {"x": ((1, 3, 32, 640), (4, 3, 32, 640), (4, 3, 32, 640))}
    fixed = Dynamic("x", (2, None), (None, None))
    assert derived((((5,),), {}), batch=4, inputs=[fixed]) == {"x": ((2, 5),) * 3}


def test_examples_that_do_not_say_enough_give_no_profile() -> None:
    assert derived() is None
    assert derived((((1, 8),), {}), inputs=[STATIC]) is None  # needs none
    assert derived(((), {"mask": (1, 8)})) is None
    assert derived((((3, 8, 8),), {})) is None
    assert derived((((2,),), {}), inputs=[SHAPE, IMAGES]) is None
