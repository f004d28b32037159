"""One real ComfyUI server for all host tests of a run."""

import pytest
from host_server import HostServer, find_host, why_no_host


@pytest.fixture(scope="session")
def host_server(tmp_path_factory):
    """A running HostServer with this pack installed; its base folder is kept by pytest for a look after a failure."""
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    with HostServer(host, tmp_path_factory.mktemp("host")) as server:
        yield server


@pytest.fixture(scope="session")
def object_info(host_server):
    """The server's node descriptions, for `workflow_format`."""
    return host_server.object_info()
