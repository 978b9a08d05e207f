"""Functions in place of Horovod's with the same arguments and defaults."""

from __future__ import annotations

import pytest

from hvd_ext.horovod_api.signatures import copy_signature


def model(tensor, name=None, *, op="average", **options):
    raise AssertionError("the model is never called")


@copy_signature(model)
def recorded(**arguments):
    return arguments


def test_every_argument_arrives_under_its_name():
    assert recorded(1) == {"tensor": 1, "name": None, "op": "average"}
    assert recorded(name="x", tensor=2, op="sum") == {"tensor": 2, "name": "x", "op": "sum"}


def test_options_of_the_model_arrive_under_their_own_names():
    assert recorded(1, "x", late=3) == {"tensor": 1, "name": "x", "op": "average", "late": 3}


def test_an_argument_too_many_is_an_error_with_the_models_name():
    with pytest.raises(TypeError, match=r"model\(\) too many positional arguments"):
        recorded(1, "x", "sum")
