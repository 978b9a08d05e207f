"""Public names of earlier versions are refused with the new name."""

from __future__ import annotations

import importlib
import re

import pytest

from hvd_ext.seng import Settings
from hvd_ext.seng.settings import RENAMED, takes_settings
from hvd_ext.sharding import Server

FRONT_ENDS = ["hvd_ext.torch", "hvd_ext.tensorflow", "hvd_ext.tensorflow.keras"]


@pytest.fixture(params=FRONT_ENDS)
def hvd(request):
    pytest.importorskip(request.param.split(".")[1])
    return importlib.import_module(request.param)


@pytest.mark.parametrize(("old", "new"), [("Late", "DelayedUpdate"), ("uneven", "uneven_inputs")])
def test_a_function_or_class(hvd, old, new):
    assert hasattr(hvd, new)
    with pytest.raises(AttributeError, match=f"'{hvd.__name__}' has no attribute '{old}'; it is {new} now"):
        getattr(hvd, old)


def test_an_argument_of_a_front_end(hvd):
    with pytest.raises(TypeError, match=r"no argument late=; it is overlap=hvd\.DelayedUpdate"):
        hvd.DistributedOptimizer(None, late=True)
    with pytest.raises(TypeError, match="no argument weigh=; it is average_over= now"):
        hvd.uneven_inputs(None, weigh="samples")


def test_the_servers():
    with pytest.raises(TypeError, match=r"Server\(\) has no argument reply=; it is downlink= now"):
        Server("sharded", reply=None)
    assert Server("sharded", downlink=None) == Server("sharded")


@pytest.mark.parametrize("old", RENAMED)
def test_sengs(old):
    @takes_settings
    def make(**settings):
        return Settings(**settings)

    said = re.escape(f"SENG() has no argument {old}=; it is {RENAMED[old]} now")
    with pytest.raises(TypeError, match=said):
        make(damping=1.0, **{old: "keep"})
    assert make(damping=1.0, stale_curvature="rescale", fallback="matched").fallback == "matched"
