"""Python processes that start in a moment: forked from one that has already imported torch.

``run`` takes the place of ``subprocess.run([sys.executable, ...], capture_output=True, text=True)``
and ``executable()`` that of ``sys.executable``, where a test is about what a new process does with
this project and transformers, of which nothing is imported beforehand, and not about torch. A
process in which an import is blocked or traced needs a new interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path

# with what they import in turn, this is most of the time that `import rodimus` takes
_PRELOADED = ("torch", "torch._dynamo", "torch.distributed.tensor", "torchao.quantization")
# read by what is preloaded, so the server must not have those of the tests
_NOT_INHERITED = ("PYTHONPATH", "TRITON_INTERPRET")
_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
    command = [executable(), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, **options)


@functools.cache
def executable() -> str:
    """A program that is called like Python, with ``-c CODE`` or ``-m MODULE`` first. It passes
    signals on, and ends its process when it is killed."""
    folder = Path(tempfile.mkdtemp())
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, "serve", folder],
        # which ends when this process does
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert server.stdout.readline() == b"ready\n"
    program = folder / "python"
    # nothing that it does not need is imported
    ask = shlex.join([sys.executable, "-IS", __file__, "ask", str(folder)])
    program.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
    program.chmod(0o755)
    return str(program)


def _ask(folder, *arguments):
    """Let the server run a program with the files and the environment of this process; its status,
    negative for a signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"{folder}/socket")
        job = {"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(server, [b" "], [0, 1, 2])
        server.sendall(json.dumps(job).encode() + b"\n")
        answers = server.makefile()
        pid = int(answers.readline())
        for number in _PASSED_ON:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        return int(answers.readline())


def _serve(folder):
    """Fork for every job; return in the forked process, with its job, or None at the end."""
    gc.disable()
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # no forked process looks for garbage in what is here, which would copy its pages
    gc.freeze()
    gc.enable()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        print("ready", flush=True)
        # by the file that tells of a process's end: its number and the connection
        running = {}
        while True:
            asked = {connection: pid for pid, connection in running.values()}
            ready, _, _ = select.select([listener, 0, *asked, *running], [], [])
            if 0 in ready:
                for pid in asked.values():
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)
                return None
            for connection in asked.keys() & set(ready):
                # the program that asked has gone
                os.kill(asked[connection], signal.SIGKILL)
            for ended in running.keys() & set(ready):
                pid, connection = running.pop(ended)
                os.close(ended)
                _, status = os.waitpid(pid, 0)
                with connection:
                    _tell(connection, os.waitstatus_to_exitcode(status))
            if listener in ready:
                connection, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(connection, 1, 3)
                job = json.loads(connection.makefile().readline())
                pid = os.fork()
                if pid == 0:
                    for other in running:
                        os.close(other)
                    for other in (connection, *asked):
                        other.close()
                    return job | {"files": files}
                for file in files:
                    os.close(file)
                _tell(connection, pid)
                running[os.pidfd_open(pid)] = (pid, connection)


def _tell(connection, number):
    # the program that asked may have been killed
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % number)


def _become(job):
    """Run a job as a new interpreter would; its status. Only the objects of this process are not
    taken apart one by one at its end, which is slow."""
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for number, file in enumerate(job["files"]):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)
    path = [x for x in job["env"].get("PYTHONPATH", "").split(os.pathsep) if x]
    how, what, *rest = job["arguments"]
    sys.path[:0] = ["" if how == "-c" else job["cwd"], *path]
    status = 0
    try:
        if how == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert how == "-c", f"expected -c or -m, got {how}"
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as stop:
        status = stop.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        if file is not None and not file.closed:
            file.flush()
    return status


def _end_with(status):
    """End this process at once, by a signal if the status is negative."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    role, *given = sys.argv[1:]
    if role == "ask":
        _end_with(_ask(*given))
    job = _serve(*given)
    _end_with(0 if job is None else _become(job))
