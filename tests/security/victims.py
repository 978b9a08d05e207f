"""Servers of a Horovod that is first on PYTHONPATH: the released one or the edited one.

``python victims.py NAME`` starts one, prints a line of JSON with its port and key, and then answers each line
of standard input with a line of JSON. It ends with its standard input. VICTIM_KEY is the job's key,
VICTIM_TIMEOUT the seconds within which peers of an edited server have to authenticate, VICTIM_PATIENCE those
that a shutdown may take.
"""

import json
import os
import sys
import threading
import types
from unittest.mock import MagicMock

HOST = "127.0.0.1"


class Driver:
    """Stands in for the elastic driver and keeps what it is told."""

    def __init__(self):
        self.ready, self.workers = [], []

    def record_ready(self, host, slot):
        self.ready.append(f"{host}:{slot}")

    def get_slot_info(self, host, slot):
        from horovod.runner.common.util.hosts import SlotInfo

        return SlotInfo(host, 0, slot, 0, 2, 2, 1)

    def register_worker_server(self, host, slot, addresses, key):
        self.workers.append([host, slot, addresses])


def start_http_server(server, **arguments):
    """Start Horovod's HTTP server on the loopback interface, where its version can choose."""
    start = getattr(server, "start", None) or server.start_server
    takes_address = "address" in start.__code__.co_varnames
    return start(**arguments, **({"address": HOST} if takes_address else {}))


def key_of(server):
    """The job's key, or None where the released server has none."""
    key = getattr(server, "_key", None) or getattr(server, "key", None)
    return key.hex() if key else None


def slots():
    """Two ranks of one host."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    return get_host_assignments(parse_hosts("node:2"), 2)


def rendezvous():
    """The server of ``horovodrun --gloo``."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = start_http_server(server)
    server.init(slots())
    server._httpd.cache["global"] = {"0": b"address of rank 0"}
    return port, key_of(server), lambda _: {
        scope: {key: value.decode("latin-1") for key, value in values.items()}
        for scope, values in server._httpd.cache.items()}


def elastic():
    """The server of the elastic driver."""
    from horovod.runner.elastic.rendezvous import create_rendezvous_handler
    from horovod.runner.http.http_server import RendezvousServer

    driver, server = Driver(), RendezvousServer()
    port = start_http_server(server, handler_cls=create_rendezvous_handler(driver))
    server.init(slots())
    return port, key_of(server), lambda _: {"ready": driver.ready, "workers": driver.workers}


def function_store():
    """The key-value store of ``horovod.run``, with a function for its workers."""
    from horovod.runner.http import http_client, http_server

    server = http_server.KVStoreServer(verbose=0)
    port = start_http_server(server)
    job = [server.key] if hasattr(server, "key") else []
    http_client.put_data_into_kvstore(HOST, port, "runfunc", "func", os.getpid, *job)

    def read_result(line):
        try:
            return repr(http_client.read_data_from_kvstore(HOST, port, "runfunc_result", line, *job))
        except Exception as error:
            return repr(error)

    return port, key_of(server), read_result


def service(kind):
    """One of the services that launchers start; it answers "shutdown" with "ended" or "hangs"."""
    replace_packages()
    key = bytes.fromhex(os.environ.get("VICTIM_KEY") or "11" * 32)
    made = make_service(kind, key)

    def handle(line):
        if line != "shutdown":
            return len(threading.enumerate())
        ending = threading.Thread(target=made.shutdown, daemon=True)
        ending.start()
        ending.join(float(os.environ.get("VICTIM_PATIENCE", "60")))
        return "hangs" if ending.is_alive() else "ended"

    return made.get_port(), key.hex(), handle


def make_service(kind, key):
    """A service by the launcher that starts it."""
    if kind == "driver":
        from horovod.runner.driver.driver_service import HorovodRunDriverService

        return HorovodRunDriverService(2, key, {"lo"})
    if kind == "task":
        from horovod.runner.task.task_service import HorovodRunTaskService

        return HorovodRunTaskService(0, key, {"lo"})
    if kind == "notification":
        from horovod.runner.elastic.worker import WorkerNotificationService

        return WorkerNotificationService(key, "lo", MagicMock())
    if kind == "compute":
        from horovod.runner.common.service.compute_service import ComputeService

        return ComputeService(1, 1, key, {"lo"})
    if kind == "spark driver":
        from horovod.spark.driver.driver_service import SparkDriverService

        return SparkDriverService(2, 2, os.getpid, (), {}, key, {"lo"})
    if kind == "spark task":
        from horovod.spark.task.task_service import SparkTaskService

        return SparkTaskService(0, key, {"lo"}, None)
    from horovod.ray.driver_service import HorovodRunDriverService

    assert kind == "ray driver"
    return HorovodRunDriverService(2, key, {"lo"})


def replace_packages():
    """Let modules of ``horovod.spark`` and ``horovod.ray`` be imported without Spark and Ray."""
    import horovod

    sys.modules.setdefault("pyspark", MagicMock(__version__="3.0.0"))
    for name in ("spark", "ray"):
        package = types.ModuleType(f"horovod.{name}")
        package.__path__ = [os.path.join(os.path.dirname(horovod.__file__), name)]
        sys.modules[package.__name__] = package


SERVICES = ("driver", "task", "notification", "compute", "spark driver", "spark task", "ray driver")
SERVERS = {"rendezvous": rendezvous, "elastic": elastic, "function store": function_store}

if __name__ == "__main__":
    if "VICTIM_TIMEOUT" in os.environ:
        from horovod.runner.common.util import guard

        guard.AUTHENTICATION_TIMEOUT_S = float(os.environ["VICTIM_TIMEOUT"])
    name = sys.argv[1]
    port, key, handle = SERVERS[name]() if name in SERVERS else service(name)
    print(json.dumps({"port": port, "key": key}), flush=True)
    for line in sys.stdin:
        print(json.dumps(handle(line.strip())), flush=True)
    os._exit(0)
