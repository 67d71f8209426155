"""Python processes that start in a moment: forked from one that has already imported torch.

``run`` takes the place of ``subprocess.run([sys.executable, ...], capture_output=True)`` where a
test is about what a new process does with this project and transformers, of which nothing is
imported beforehand, and not about torch. A process in which an import is blocked or traced needs a
new interpreter.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

# with what they import in turn, this is most of the time that `import rodimus` takes
_PRELOADED = ("torch", "torch._dynamo", "torch.distributed.tensor", "torchao.quantization")
# read by what is preloaded, so the server must not have those of the tests
_NOT_INHERITED = ("PYTHONPATH", "TRITON_INTERPRET")
_server: subprocess.Popen | None = None


def run(
    *arguments,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess:
    """Run ``python *arguments``, which begin with ``-c CODE`` or ``-m MODULE``; output as text.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout`` seconds; it is ended.
    """
    global _server
    arguments = [str(argument) for argument in arguments]
    assert arguments[0] in ("-c", "-m"), f"expected -c or -m, got {arguments[0]}"
    if _server is None or _server.poll() is not None:
        _server = _start()
    with tempfile.TemporaryDirectory() as folder:
        files = [os.devnull, *(str(Path(folder, name)) for name in ("out", "err"))]
        job = {"arguments": arguments, "files": files, "cwd": str(cwd or Path.cwd())}
        _server.stdin.write(
            json.dumps(job | {"env": dict(os.environ if env is None else env)}) + "\n"
        )
        _server.stdin.flush()
        if not select.select([_server.stdout], [], [], timeout)[0]:
            os.killpg(_server.pid, signal.SIGKILL)
            _server.wait()
            raise subprocess.TimeoutExpired(arguments, timeout)
        status = int(_server.stdout.readline())
        out, err = (Path(file).read_text() for file in files[1:])
    return subprocess.CompletedProcess(arguments, status, out, err)


def _start():
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    # it ends with the process that started it, whose end closes its standard input
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _serve():
    """Fork for every job; return in the forked process, with its job, or None at the end."""
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # unbuffered, so that no forked process holds a part of a later job
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    for line in iter(requests.readline, b""):
        pid = os.fork()
        if pid == 0:
            requests.close()
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(job):
    """Run a job as a new interpreter would."""
    how, what, *rest = job["arguments"]
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for number, file in enumerate(job["files"]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    sys.stdin = open(0, closefd=False)
    path = [x for x in job["env"].get("PYTHONPATH", "").split(os.pathsep) if x]
    sys.path[:0] = ["" if how == "-c" else job["cwd"], *path]
    if how == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.argv = ["-c", *rest]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    job = _serve()
    if job is not None:
        _become(job)
