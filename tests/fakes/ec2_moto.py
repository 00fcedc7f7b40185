"""moto's server in a process of its own: `python -m tests.fakes.ec2_moto` prints its port and ends with its stdin."""

import atexit
import functools
import os
import subprocess
import sys
import threading

SETTINGS = {
    "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",  # 1.3 s for each account
    "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "true",
    "MOTO_ENABLE_AMI_VALIDATION": "true",
}


@functools.cache
def url() -> str:
    """Return the address of this test process' server; it is started when it is first asked for."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.ec2_moto"],
        env=os.environ | SETTINGS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def stop() -> None:
        server.communicate()

    atexit.register(stop)
    assert server.stdout is not None
    return f"http://127.0.0.1:{int(server.stdout.readline())}"


def serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None: ...

    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve()
