"""What tests of several benchmarks use."""

import pytest
from dit_quant.kernels import backends, dispatch


@pytest.fixture
def replace(monkeypatch):
    """Puts another function in the place of an implementation, for the dispatcher as well."""

    def put(module, name, function):
        monkeypatch.setattr(module, name, function)
        backends.load.cache_clear()
        dispatch.reset()

    yield put
    monkeypatch.undo()
    backends.load.cache_clear()
    dispatch.reset()
