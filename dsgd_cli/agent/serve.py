"""Answers one launcher over stdin and stdout: a line in, a line out, one after the other.

The first line out is `DSGD-READY {facts}`; login banners may come before it. The end of stdin ends
the process, and with it the lock on the cluster. Nothing survives it but an agent it started.
What not every connection needs is imported by the verb that needs it: the start must be quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from dsgd_cli.agent import bridge, facts, files, framing, logs, names, observe, runs
from dsgd_cli.agent.framing import Input, InputEnded, Message, Refused
from dsgd_cli.agent.hold import Hold


def main() -> None:
    os.umask(0o077)
    status = 0
    server = Server(Input(0))
    try:
        framing.write_all(1, b"\nDSGD-READY " + framing.encode(facts.ready()))
        server.run()
    except (InputEnded, BrokenPipeError, ConnectionResetError):
        pass  # the launcher went away
    except Exception:
        import traceback

        framing.complain(traceback.format_exc())
        status = 1
    finally:
        server.holding.release_all()
    os._exit(status)  # stdin may still be open at the other end: do not wait for anything


class Server:
    """The verbs. Each gives the value of "ok"; None means that it has already answered."""

    def __init__(self, stdin: Input) -> None:
        self.holding = Hold()
        self._stdin = stdin
        self._verbs: dict[str, Callable[[Message], Message | None]] = {
            "observe": lambda r: observe.observe(names.cluster(r.get("cluster")), wanted(r)),
            "hold": self._hold,
            "receive": self._receive,
            "send": lambda r: files.send(r.get("path"), r.get("id")),
            "remove": lambda r: files.remove(r.get("path")),
            "start_agent": self._start_agent,
            "attach": self._attach,
            "teardown": self._teardown,
            "verify": self._verify,
            "purge": self._purge,
            "logs": self._logs,
        }

    def run(self) -> None:
        while True:
            line = self._stdin.line()
            if line.strip():
                self._answer(line)

    def _answer(self, line: bytes) -> None:
        number = None
        try:
            request = framing.decode(line)
            number = request.get("id")
            verb = self._verbs.get(str(request.get("do")))
            if verb is None:
                raise Refused("unknown", f"no such verb: {ascii(request.get('do'))[:100]}")
            answer = verb(request)
        except Refused as refusal:
            framing.say({"id": number, "error": refusal.error})
        except (InputEnded, BrokenPipeError, ConnectionResetError, EOFError):
            raise
        except OSError as error:
            framing.say({"id": number, "error": {"kind": "unfit", "message": str(error)}})
        except Exception as error:
            import traceback

            text = traceback.format_exc()
            said = {"kind": "internal", "message": repr(error), "traceback": text}
            framing.say({"id": number, "error": said})
        else:
            if answer is not None:
                framing.say({"id": number, "ok": answer})

    def _hold(self, request: Message) -> Message:
        owner = request.get("owner")
        if not isinstance(owner, dict):
            raise Refused("invalid", "hold needs an owner")
        self.holding.hold(names.cluster(request.get("cluster")), owner)
        return {}

    def _receive(self, request: Message) -> Message:
        size = request.get("size")
        if not isinstance(size, int) or size < 0:
            raise InputEnded  # the bytes that follow cannot be told from requests
        from dsgd_cli.agent import unpack

        return unpack.receive(request.get("kind"), request.get("hash"), self._stdin.chunks(size))

    def _start_agent(self, request: Message) -> Message:
        from dsgd_cli.agent import launch

        answer = launch.start_agent(request)
        self.holding.renew(names.cluster(request.get("cluster")))
        return answer

    def _teardown(self, request: Message) -> Message:
        from dsgd_cli.agent import teardown

        grace_s = teardown.grace(request.get("grace_s", teardown.GRACE_S))
        return teardown.teardown(names.cluster(request.get("cluster")), grace_s)

    def _verify(self, request: Message) -> Message:
        from dsgd_cli.agent import teardown

        return teardown.verify(names.cluster(request.get("cluster")))

    def _purge(self, request: Message) -> Message:
        from dsgd_cli.agent import teardown

        return teardown.purge(names.cluster(request.get("cluster")))

    def _attach(self, request: Message) -> None:
        """Ends the process when either side ends; a lock that it holds stays held until then."""
        agent = bridge.connect(runs.current(names.cluster(request.get("cluster"))))
        framing.say({"id": request.get("id"), "ok": {}})
        bridge.join(agent, self._stdin.left_over())
        raise InputEnded

    def _logs(self, request: Message) -> Message:
        run_dir = runs.current(names.cluster(request.get("cluster")))
        chosen = logs.chosen(request.get("processes"))
        logs.send(
            run_dir,
            chosen,
            logs.tail(request.get("tail")),
            bool(request.get("follow")),
            self._stdin,
        )
        return {}


def wanted(request: Message) -> Message:
    value = request.get("wanted") or {}
    if not isinstance(value, dict):
        raise Refused("invalid", "`wanted` is not an object")
    return value
